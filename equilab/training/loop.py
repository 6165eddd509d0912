"""The one training loop: accumulate, step, average, yield; images seen is its clock."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor, nn

from equilab.core import rng
from equilab.core.config import Params, Spec, UserError, plain
from equilab.core.files import SCRATCH, publishing, require_disk, scratch, write_json, write_table
from equilab.core.job import Job, Plan, Watcher
from equilab.core.machine import (
    barrier,
    device_of,
    environment,
    identity,
    precision,
    rank,
    require_memory,
    to_device,
    total,
    world,
)
from equilab.core.progress import bar
from equilab.data.images import label_counts
from equilab.metrics.counting import Cost, network_on_meta
from equilab.models.checkpoint import load_tensors, save_tensors
from equilab.models.family import Family, Stage, families

ImageCount = Annotated[int, Field(ge=1, le=10**10)]
BatchSize = Annotated[int, Field(ge=1, le=10**6)]
LearningRate = Annotated[float, Field(ge=1e-9, le=10)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Logged(NamedTuple):
    """A loss, and the part of it that the log shows."""

    loss: Tensor
    logged: Tensor


class Halt(NamedTuple):
    """Why a run must stop, and what to do about it."""

    reason: str
    remedy: str


Row = dict[str, int | float]  # of the log
BatchOf = Callable[[range], Any]  # positions in the endless stream of images -> a batch, on the CPU
Loss = Callable[[nn.Module, Any], Tensor | Logged]  # (network, batch) -> mean over the images of the batch
Watch = Callable[[Row], Halt | None]
Finish = Callable[[Path], dict[str, Any]]  # (folder of the results) -> what more the summary says of them


class Optimisation(Params):
    """How a run is optimised; every count is in images seen (`nimg`)."""

    nimg: ImageCount  # in all
    batch: BatchSize  # images in an update
    micro_batch: BatchSize  # images in a forward pass; batch / micro_batch passes are accumulated
    lr: LearningRate  # peak learning rate of AdamW
    betas: tuple[Beta, Beta]
    weight_decay: float = Field(ge=0, le=100)
    clip: Annotated[float, Field(ge=1e-6, le=1e6)] | None  # largest norm of the gradient
    warmup_nimg: int = Field(ge=0, le=10**10)  # images of linear warm-up
    decay: Literal["none", "linear", "cosine"]  # to 0 at nimg
    decay_start_nimg: int = Field(ge=0, le=10**10)  # where the decay starts
    ema_half_life_nimg: float = Field(ge=1e-3, le=1e10)  # half-life of the averaged weights
    ema_warmup: float = Field(ge=0, le=1)  # the half-life's largest share of the images seen; 0: no limit
    precision: Literal["fp32", "tf32", "bf16"]
    compile: bool
    report_nimg: ImageCount  # between two reports; at each the loss is checked and the state saved
    snapshots: tuple[ImageCount, ...]  # counts at which the averaged weights are kept, for learning curves

    @model_validator(mode="after")
    def _fits(self):
        if self.batch % self.micro_batch:
            raise ValueError(f"batch ({self.batch}) must be a multiple of micro_batch ({self.micro_batch})")
        for name in ("nimg", "report_nimg"):
            if getattr(self, name) % self.batch:
                raise ValueError(f"{name} ({getattr(self, name)}) must be a multiple of batch ({self.batch})")
        if self.nimg % self.report_nimg:
            raise ValueError(f"nimg ({self.nimg}) must be a multiple of report_nimg ({self.report_nimg})")
        for count in self.snapshots:
            if count % self.report_nimg or count > self.nimg:
                raise ValueError(
                    f"snapshots: {count} must be a multiple of report_nimg ({self.report_nimg}) up to nimg"
                )
        if self.decay != "none" and self.decay_start_nimg >= self.nimg:
            raise ValueError(
                f"decay_start_nimg ({self.decay_start_nimg}) must be less than nimg ({self.nimg})"
            )
        return self


class Model(Params):
    """What sampling needs to know of every run that makes images, which has a `network` and is `conditional` or not."""

    stage: ClassVar[Stage]  # that trains it

    @property
    def family(self) -> Family:
        """The family of models that it is of."""
        return families(self.stage)[self.network.kind]

    def classes_of(self, classes: int) -> int:
        """Return how many of the data's classes the network knows: all of them, or 0 if it is not conditional."""
        return classes if self.conditional else 0

    def on_meta(self, image: tuple[int, ...], classes: int) -> nn.Module:
        """Return the network for such data on the meta device.

        Raises: UserError if its sizes do not fit.
        """
        return network_on_meta(self.network, image, self.classes_of(classes))


def learning_rate(config: Optimisation, nimg: int) -> float:
    """Return the learning rate of the update that starts with `nimg` images seen."""
    warm = min(1.0, (nimg + config.batch) / config.warmup_nimg) if config.warmup_nimg else 1.0
    rate = config.lr * warm
    if config.decay == "none" or nimg < config.decay_start_nimg:
        return rate
    passed = (nimg - config.decay_start_nimg) / (config.nimg - config.decay_start_nimg)
    if config.decay == "linear":
        return rate * (1 - passed)
    return rate * (0.5 * (1 + math.cos(math.pi * passed)))


def ema_decay(nimg: int, *, batch: int, half_life_nimg: float, warmup: float) -> float:
    """Return the decay of the averaged weights after the update that starts with `nimg` images seen.

    0.5^(batch / min(half-life, warm-up * nimg)); 0 at the first update if there is a warm-up.

    Source: EDM's training; the published GET keeps 0.9999 a step of 128, a half-life of 887,184 images, no warm-up.
    """
    half_life = min(half_life_nimg, warmup * nimg) if warmup else half_life_nimg
    return 0.5 ** (batch / half_life) if half_life else 0.0


class Lazy(NamedTuple):
    """A loss by which a network is moved in an update of its own, after every `interval`-th but the very first."""

    loss: Loss
    interval: int


class Adversary(NamedTuple):
    """The second network of a run, trained in turn with the first; its weights are not averaged."""

    name: str  # tells its numbers and tensors from those of the first
    net: nn.Module
    lr: float  # its own peak learning rate
    loss: Loss
    betas: tuple[float, float]  # of its own AdamW
    lazy: Lazy | None = None


class Trainable:
    """A network that a run trains, with its optimiser; `name` is that of the adversary, empty for the first network."""

    def __init__(
        self,
        net: nn.Module,
        config: Optimisation,
        device: torch.device,
        name: str,
        lr: float,
        betas: tuple[float, float],
    ):
        self.net, self.name, self.lr_share = net.to(device), name, lr / config.lr
        self.prefix = f"{name}." if name else ""
        self.named = {key: p for key, p in net.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.named.values(),
            lr=config.lr,
            betas=betas,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def state(self) -> dict[str, Tensor]:
        """Return what changes in training: trained parameters, buffers, and the optimiser's moments."""
        frozen = {key for key, p in self.net.named_parameters() if key not in self.named}
        tensors = {f"net.{key}": value for key, value in self.net.state_dict().items() if key not in frozen}
        for key, parameter in self.named.items():
            for name, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
        return {f"{self.prefix}{key}": value for key, value in tensors.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on from the tensors that `state` returned."""
        ours = _part(tensors, self.prefix)
        self.net.load_state_dict(_part(ours, "net."), strict=False)  # what is frozen is there already
        for key, parameter in self.named.items():
            step = ours.get(f"optimizer.step.{key}")
            if step is None:
                continue  # it has had no gradient yet
            moments = {"step": step.to(parameter.device)}
            for name in ("exp_avg", "exp_avg_sq"):
                like_parameter = torch.empty_like(parameter)  # in its memory format, as the kernel needs
                moments[name] = like_parameter.copy_(ours[f"optimizer.{name}.{key}"]).detach()
            self.optimizer.state[parameter] = moments


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


class Run:
    """The state of one run: networks with their optimisers, averaged weights, images seen, log. `fit` moves it on.

    `folder` is the run's scratch folder: `state.safetensors` and the snapshots live there, and a run goes on from them;
    `log.csv` is there to be looked at.
    """

    def __init__(
        self,
        net: nn.Module,
        config: Optimisation,
        seed: int,
        folder: Path,
        device: torch.device,
        adversary: Adversary | None = None,
    ):
        self.config, self.seed, self.folder, self.device = config, seed, folder, device
        self.adversary = adversary
        self.trainables = [Trainable(net, config, device, "", config.lr, config.betas)]
        if adversary is not None:
            own = adversary.name, adversary.lr, adversary.betas
            self.trainables.append(Trainable(adversary.net, config, device, *own))
        self.net, self.named = self.trainables[0].net, self.trainables[0].named
        self.ema = {name: value.detach().clone() for name, value in net.state_dict().items()}
        self.nimg, self.log = 0, []
        self.processes = [world()]  # how many have worked on it, in their order
        if (folder / "state.safetensors").exists():
            self._resume()

    def _resume(self) -> None:
        tensors, metadata = load_tensors(self.folder / "state.safetensors")
        for trainable in self.trainables:
            trainable.restore(tensors)
        for name, value in _part(tensors, "ema.").items():
            self.ema[name].copy_(value)
        self.nimg, self.log = metadata["nimg"], metadata["log"]
        self.processes = metadata["processes"]
        if self.processes[-1] != world():
            self.processes.append(world())

    def save(self) -> None:
        """Write the whole state atomically."""
        tensors = {f"ema.{name}": value for name, value in self.ema.items()}
        for trainable in self.trainables:
            tensors |= trainable.state()
        about = {"nimg": self.nimg, "log": self.log, "processes": self.processes}
        save_tensors(self.folder / "state.safetensors", tensors, about)
        self.write_log(self.folder)

    def write_log(self, folder: Path) -> None:
        """Write the log, a row a report."""
        first = dict.fromkeys(
            ("nimg", "loss", "lr")
        )  # columns, whatever order a state that was read again has
        write_table(folder / "log.csv", [first | row for row in self.log])

    def snapshot(self, nimg: int) -> Path:
        """Return the path of the averaged weights kept at `nimg` images."""
        return self.folder / f"snapshot-{nimg:010d}.safetensors"


class Progress(NamedTuple):
    """One update done: images seen, and at a report the row of numbers for the log."""

    nimg: int
    report: Row | None


def fit(run: Run, batch_of: BatchOf, loss: Loss, watch: Watch | None = None) -> Iterator[Progress]:
    """Train `run` to its end from wherever it stands; yields after every update, saves at every report.

    `loss` is the first network's. An update moves the networks in turn, on the same batch. Each process of a distributed
    run takes its share of every batch. The batch of the next update is read while this one is computed. `watch` looks at
    every row of the log and returns why the run must stop, or None.

    Raises: UserError with the step and the loss, if a loss is not finite; the last good state is kept.
    """
    config = run.config
    if config.micro_batch % world():
        raise UserError(
            f"micro_batch ({config.micro_batch}) must be a multiple of the number of processes ({world()})"
        )
    losses = [loss] if run.adversary is None else [loss, run.adversary.loss]
    lazy = run.adversary and run.adversary.lazy
    nets = [torch.compile(each.net) if config.compile else each.net for each in run.trainables]
    context = precision(config.precision, run.device)
    updates = config.report_nimg // config.batch  # between two reports
    values = torch.zeros(len(run.trainables), updates, device=run.device)
    averaged = [run.ema[name] for name in run.named]
    for trainable in run.trainables:
        trainable.net.train()
    with ThreadPoolExecutor(1) as reader:
        upcoming = _read(reader, batch_of, config, run.nimg)
        while run.nimg < config.nimg:
            rate, update = learning_rate(config, run.nimg), run.nimg // config.batch % updates
            # the seed of dropout is all that differs between processes
            torch.manual_seed(rng.torch_seed(run.seed, "dropout", run.nimg + rank()))
            batches = [to_device(batch.result(), run.device) for batch in upcoming]
            upcoming = _read(reader, batch_of, config, run.nimg + config.batch)
            for number, (trainable, net, loss) in enumerate(zip(run.trainables, nets, losses, strict=True)):
                _require_gradients(run, trainable)
                values[number, update] = _update(trainable, net, loss, batches, context, config.clip, rate)
            if lazy and run.nimg and run.nimg // config.batch % lazy.interval == 0:
                _update(run.trainables[-1], nets[-1], lazy.loss, batches, context, config.clip, rate)
            decay = ema_decay(
                run.nimg,
                batch=config.batch,
                half_life_nimg=config.ema_half_life_nimg,
                warmup=config.ema_warmup,
            )
            torch._foreach_lerp_(averaged, list(run.named.values()), 1 - decay)
            run.nimg += config.batch
            due = run.nimg % config.report_nimg == 0
            yield Progress(run.nimg, _report(run, values, rate, watch) if due else None)


def _read(
    reader: ThreadPoolExecutor, batch_of: BatchOf, config: Optimisation, nimg: int
) -> list[Future[Any]]:
    """Begin to read this process's share of the micro-batches of the update that starts with `nimg` images seen."""
    if nimg >= config.nimg:
        return []
    share = config.micro_batch // world()
    starts = range(nimg + rank() * share, nimg + config.batch, config.micro_batch)
    return [reader.submit(batch_of, range(start, start + share)) for start in starts]


def _require_gradients(run: Run, chosen: Trainable) -> None:
    """Let the parameters of one network have gradients, those of the others none."""
    for trainable in run.trainables:
        for parameter in trainable.named.values():
            parameter.requires_grad_(trainable is chosen)


def _update(
    trainable: Trainable, net: nn.Module, loss: Loss, batches, context, clip: float | None, rate: float
) -> Tensor:
    """Move a network by the gradient of its loss over all batches (of all processes); return what the log shows of it."""
    shown = 0.0
    for batch in batches:
        with context():
            found = loss(net, batch)
            value, logged = found if isinstance(found, Logged) else (found, found)
            (value / len(batches)).backward()
        # where the loss is not finite, the log shows that, though the part that it shows may be
        shown = shown + torch.where(value.isfinite(), logged, value).detach() / len(batches)
    if world() > 1:
        _average_gradients(trainable)
    if clip is not None:
        nn.utils.clip_grad_norm_(trainable.named.values(), clip)
    for group in trainable.optimizer.param_groups:
        group["lr"] = rate * trainable.lr_share
    trainable.optimizer.step()
    trainable.optimizer.zero_grad(set_to_none=True)
    return shown


def _average_gradients(trainable: Trainable) -> None:
    """Replace gradients by their mean over processes, in one message."""
    gradients = [p.grad for p in trainable.named.values() if p.grad is not None]
    mean = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(mean)
    parts = mean.div_(world()).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts):
        gradient.copy_(part.view_as(gradient))


def _report(run: Run, values: Tensor, rate: float, watch: Watch | None) -> Row:
    """Check the losses (networks, updates) since the last report and the weights; log, keep and return their means."""
    losses = total(values) / world()
    _require_finite(run, losses)
    means = [sum(row) / len(row) for row in losses.tolist()]
    row = {"nimg": run.nimg, "loss": means[0], "lr": rate}
    for trainable, mean in zip(run.trainables[1:], means[1:]):
        row[f"loss_{trainable.name}"] = mean
    if watch is not None and (halt := watch(row)):
        raise UserError(
            f"{halt.reason} at step {run.nimg // run.config.batch} ({run.nimg} images); "
            f"{_kept(run)}; {halt.remedy}"
        )
    run.log.append(row)
    for name, value in run.net.named_buffers():
        if name in run.ema:
            run.ema[name].copy_(value)
    if rank() == 0:
        if run.nimg in run.config.snapshots:
            save_tensors(run.snapshot(run.nimg), run.ema, {"nimg": run.nimg})
        run.save()
    return row


def _require_finite(run: Run, losses: Tensor) -> None:
    rates = ["optimisation.lr", *(f"{each.name}_lr" for each in run.trainables[1:])]
    remedy = f"{_kept(run)}; lower {' or '.join(rates)} or clip the gradient"
    updates = losses.shape[1]
    for update, values in enumerate(losses.T.tolist()):
        broken = [value for value in values if not math.isfinite(value)]
        if broken:
            step = run.nimg // run.config.batch - updates + update + 1
            images = step * run.config.batch
            raise UserError(f"the loss became {broken[0]} at step {step} ({images} images); {remedy}")
    for trainable in run.trainables:
        for name, parameter in trainable.named.items():
            if not parameter.isfinite().all():
                raise UserError(
                    f"{name} is no longer finite after {run.nimg} images, the loss was "
                    f"{losses[0, -1].item():.4g}; {remedy}"
                )


def _kept(run: Run) -> str:
    if run.log:
        return f"the last good state is kept in {run.folder}"
    return "it had not yet reported, so nothing is kept"


def build(spec: Spec, seed: int, purpose: str, *given: Any) -> nn.Module:
    """Return a freshly initialised network, a pure function of (seed, purpose).

    Raises: UserError if this machine has less memory than its parameters take, before they take it.
    """
    sizes = [parameter.numel() for parameter in network_on_meta(spec, *given).parameters()]
    require_memory(4 * sum(sizes), f"{spec.path or spec.kind}: a network of {sum(sizes):,} parameters")
    torch.manual_seed(rng.torch_seed(seed, purpose))
    return spec.build(*given).to(memory_format=torch.channels_last)


def counted_once(cost: Callable[..., Cost]) -> Callable[..., Cost]:
    """Return `cost(config, ...)`, remembered; seed, optimisation and R1 make no difference to what it counts."""
    remembered = functools.cache(cost)

    @functools.wraps(cost)
    def counted(config: Params, *given: Any) -> Cost:
        indifferent = {"seed", "optimisation", "r1"} & set(type(config).model_fields)
        return remembered(config.model_copy(update=dict.fromkeys(indifferent)), *given)

    return counted


def about(image: tuple[int, ...], classes: int, cost: Cost, iterations: int | float = 0) -> dict[str, Any]:
    """Return what is kept with weights: what the network is of, and what it costs at so many iterations."""
    return {
        "image": image,
        "classes": classes,
        "parameters": cost.parameters,
        "flops_image": cost.image.flops(iterations),
    }


def train(
    job: Job,
    config: Any,
    inputs: dict[str, str],
    net: nn.Module,
    batch_of: BatchOf,
    loss: Loss,
    about: dict[str, Any],
    adversary: Adversary | None = None,
    watch: Watch | None = None,
    finish: Finish | None = None,
) -> None:
    """Train `net` from wherever its scratch folder stands and write the results of the stage into `job.out`, all in one move.

    `weights.safetensors` (averaged weights), `snapshots/`, `log.csv` (a row a report), `summary.json`. `inputs` names
    what the run depends on besides its config (checksums); `about` is kept with the weights. `finish` looks at the results
    before they are published.
    """
    optimisation, about = config.optimisation, {**about, **label_counts(job)}
    about |= {"stage": job.stage, "run": job.run, "config": plain(config), "inputs": inputs}
    if job.run is not None:
        about |= {"seed": job.seed, "family": config.family.name}
    _require_disk(job, net, optimisation, about["parameters"], adversary)
    # what is unfinished goes last, when the results are in their place
    with scratch(job, identity(job, config, inputs)) as folder, publishing(job.out) as fresh:
        run = Run(net, optimisation, job.study.seed, folder, device_of(job), adversary)
        _say_processes(job, run)
        with bar(job.name, optimisation.nimg, done=run.nimg) as progress, _watcher(job, run) as watcher:
            for step in fit(run, batch_of, loss, watch):
                progress.update(step.nimg - progress.n)
                if step.report:
                    progress.set_postfix(loss=f"{step.report['loss']:.4g}")
                if step.report and watcher:
                    watcher.report(step.report)
                    if step.nimg in optimisation.snapshots:
                        watcher.snapshot(run.snapshot(step.nimg), {**about, "nimg": step.nimg})
        if rank() == 0:
            _write(job, run, about, fresh, finish)
        barrier()


def _say_processes(job: Job, run: Run) -> None:
    """Say that the number of processes has changed, on which the bits of a training depend."""
    if len(run.processes) > 1 and rank() == 0:
        numbers = ", then ".join(map(str, run.processes))
        print(
            f"equilab: {job.name} goes on with another number of processes ({numbers}): the same training to rounding, "
            "in other bits",
            file=sys.stderr,
        )


@contextlib.contextmanager
def _watcher(job: Job, run: Run) -> Iterator[Watcher | None]:
    """Give what the training reports to, in the first process, if the study says that there is any."""
    if job.watcher is None or rank() != 0:
        yield None
        return
    with contextlib.closing(job.watcher(job, run.nimg)) as watcher:
        yield watcher


def _require_disk(
    job: Job, net: nn.Module, config: Optimisation, parameters: int, adversary: Adversary | None
) -> None:
    """Check that the results fit on their disk; two states (weights, average, moments) of what is trained, and the snapshots,
    on that of what is unfinished."""
    nets = nn.ModuleList([net] if adversary is None else [net, adversary.net])
    state = 4 * sum(p.numel() for p in nets.parameters())
    snapshots = parameters * len(config.snapshots)
    require_disk({SCRATCH: 4 * (2 * state + snapshots), job.out: 4 * (parameters + snapshots)})


def _write(job: Job, run: Run, about: dict[str, Any], fresh: Path, finish: Finish | None) -> None:
    """Write the results of a run that is done into a fresh folder."""
    snapshots = fresh / "snapshots"
    snapshots.mkdir()
    for nimg in run.config.snapshots:
        tensors, _ = load_tensors(run.snapshot(nimg))
        save_tensors(snapshots / f"{nimg:010d}.safetensors", tensors, {**about, "nimg": nimg})
    save_tensors(fresh / "weights.safetensors", run.ema, {**about, "nimg": run.nimg})
    run.write_log(fresh)
    processes = run.processes[0] if len(run.processes) == 1 else run.processes
    found = {"nimg": run.nimg, "loss": run.log[-1]["loss"], "environment": environment(job, processes)}
    if finish is not None:
        found |= finish(fresh)
    write_json(fresh / "summary.json", {**about, **found})
    print(f"{job.name}: loss {found['loss']:.4g} after {run.nimg:,} images, in {job.out}")


def plan(config: Optimisation, cost: Cost, note: str = "", teacher_calls: int = 0) -> Plan:
    """Return what training costs; of an image of an update, `teacher_calls` evaluations of the teacher."""
    kept = 1 + len(config.snapshots)
    weights = 4 * cost.parameters  # bytes
    return Plan(
        cost.parameters,
        float(cost.train_flops_image * config.nimg),
        kept * weights,
        note,
        config.nimg,
        teacher_calls * config.nimg,
        2 * weights + 12 * cost.parameters_trained,  # with the average; gradient and two moments
    )
