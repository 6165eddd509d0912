"""The one training loop: accumulate, step, average, yield; images seen is its clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from equilab.core import rng
from equilab.core.config import UserError
from equilab.core.files import write_table
from equilab.core.machine import precision, rank, to_device, total, world
from equilab.models.checkpoint import load_tensors, save_tensors
from equilab.training.optimisation import Optimisation, ema_decay, learning_rate


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
        # the first columns, whatever order a state that was read again has
        first = dict.fromkeys(("nimg", "loss", "lr"))
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
            decay = ema_decay(config, run.nimg)
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
    trainable: Trainable,
    net: nn.Module,
    loss: Loss,
    batches: list[Any],
    context: Callable[[], AbstractContextManager],
    clip: float | None,
    rate: float,
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
