"""The one training loop: accumulate, step, average, yield; images seen is its clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from equilab.core import rng
from equilab.core.config import UserError, digest, plain
from equilab.core.files import require_disk, scratch, write, write_json
from equilab.core.job import Job, Plan
from equilab.core.machine import barrier, device_of, environment, precision, rank, to_device, total, world
from equilab.core.progress import bar
from equilab.models.checkpoint import load_tensors, save_tensors

Batch = Callable[[range], Any]  # positions in the endless stream of images -> what the loss needs, on the CPU
# (network, batch) -> mean loss over the batch's images, or that and what the log shows in its place
Loss = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor]]
Watch = Callable[
    [dict[str, int | float]], tuple[str, str] | None
]  # row of the log -> what is wrong with it, and the remedy


@dataclass(frozen=True)
class Optimisation:
    """How a run is optimised; every count is in images seen (`nimg`)."""

    nimg: int  # images seen in all
    batch: int  # images in an update
    micro_batch: int  # images in a forward pass; batch / micro_batch passes are accumulated
    lr: float  # peak learning rate of AdamW
    betas: tuple[float, float]
    weight_decay: float
    clip: float | None  # largest norm of the gradient
    warmup_nimg: int  # images of linear warm-up
    decay: Literal["none", "linear", "cosine"]  # to 0 at nimg
    decay_start_nimg: int  # where the decay starts
    ema_half_life_nimg: float  # half-life of the averaged weights
    ema_warmup: float  # the half-life is at most this fraction of the images seen; 0 switches the limit off
    precision: Literal["fp32", "tf32", "bf16"]
    compile: bool
    report_nimg: int  # images between two reports; at each the loss is checked and the state saved
    snapshots: tuple[int, ...]  # image counts at which the averaged weights are kept, for learning curves

    def __post_init__(self):
        if self.batch < 1 or self.micro_batch < 1 or self.batch % self.micro_batch:
            raise ValueError(f"batch ({self.batch}) must be a multiple of micro_batch ({self.micro_batch})")
        for name in ("nimg", "report_nimg"):
            if getattr(self, name) < self.batch or getattr(self, name) % self.batch:
                raise ValueError(f"{name} ({getattr(self, name)}) must be a multiple of batch ({self.batch})")
        if self.nimg % self.report_nimg:
            raise ValueError(f"nimg ({self.nimg}) must be a multiple of report_nimg ({self.report_nimg})")
        for count in self.snapshots:
            if count % self.report_nimg or not 0 < count <= self.nimg:
                raise ValueError(
                    f"snapshots: {count} must be a multiple of report_nimg ({self.report_nimg}) up to nimg"
                )
        if (
            not self.lr > 0
            or not self.ema_half_life_nimg > 0
            or (self.clip is not None and not self.clip > 0)
        ):
            raise ValueError("lr, ema_half_life_nimg and clip (if not null) must be > 0")
        if self.warmup_nimg < 0 or self.weight_decay < 0 or not 0 <= self.ema_warmup <= 1:
            raise ValueError("warmup_nimg and weight_decay must be >= 0, ema_warmup between 0 and 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in 0..1 (1 excluded), got {self.betas}")
        if self.decay != "none" and not 0 <= self.decay_start_nimg < self.nimg:
            raise ValueError(f"decay_start_nimg ({self.decay_start_nimg}) must lie in 0..nimg-1")


@dataclass(frozen=True)
class Progress:
    """One update done: images seen, and at a report the row of numbers for the log."""

    nimg: int
    report: dict[str, int | float] | None


def learning_rate(config: Optimisation, nimg: int) -> float:
    """Return the learning rate of the update that starts with `nimg` images seen."""
    warm = min(1.0, (nimg + config.batch) / config.warmup_nimg) if config.warmup_nimg else 1.0
    if config.decay == "none" or nimg < config.decay_start_nimg:
        return config.lr * warm
    passed = (nimg - config.decay_start_nimg) / (config.nimg - config.decay_start_nimg)
    return (
        config.lr
        * warm
        * (1 - passed if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * passed)))
    )


def ema_decay(config: Optimisation, nimg: int) -> float:
    """Return the decay of the averaged weights after the update that starts with `nimg` images seen.

    0.5^(batch / min(half-life, warm-up * nimg)); 0 at the first update if there is a warm-up.
    Source: EDM's training; the published GET keeps 0.9999 a step of 128, a half-life of 887,184 images, no warm-up.
    """
    half_life = config.ema_half_life_nimg
    if config.ema_warmup:
        half_life = min(half_life, config.ema_warmup * nimg)
    return 0.5 ** (config.batch / half_life) if half_life else 0.0


class Player:
    """A network that a run trains, with its optimiser. A run has one, or two that are trained in turn.

    `name` tells the second one's numbers and tensors from the first one's, `lr` is its own peak learning rate.
    """

    def __init__(
        self,
        net: nn.Module,
        config: Optimisation,
        device: torch.device,
        name: str = "",
        lr: float | None = None,
    ):
        self.net, self.name, self.lr_share = net.to(device), name, 1.0 if lr is None else lr / config.lr
        self.named = {key: p for key, p in net.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.named.values(),
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def state(self) -> dict[str, Tensor]:
        """Return what changes in training: trained parameters, buffers, and the optimiser's moments."""
        frozen = {key for key, p in self.net.named_parameters() if key not in self.named}
        tensors = {f"net.{key}": value for key, value in self.net.state_dict().items() if key not in frozen}
        for key, parameter in self.named.items():
            tensors |= {
                f"optimizer.{name}.{key}": t for name, t in self.optimizer.state.get(parameter, {}).items()
            }
        return {f"{self.name}.{key}" if self.name else key: value for key, value in tensors.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on from the tensors that `state` returned."""
        part = _part(tensors, f"{self.name}.") if self.name else tensors
        self.net.load_state_dict(_part(part, "net."), strict=False)  # what is frozen is there already
        for (
            key,
            parameter,
        ) in self.named.items():  # moments in the memory format of their parameter, as the kernel needs
            if f"optimizer.step.{key}" not in part:
                continue  # it has had no gradient yet
            moments = {name: part[f"optimizer.{name}.{key}"] for name in ("exp_avg", "exp_avg_sq")}
            kept = {
                name: torch.empty_like(parameter).copy_(value).detach() for name, value in moments.items()
            }
            self.optimizer.state[parameter] = {
                "step": part[f"optimizer.step.{key}"].to(parameter.device),
                **kept,
            }


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


class Run:
    """The state of one run: network, averaged weights, optimiser, images seen, log. `fit` moves it on.

    `folder` is the run's scratch folder: `state.safetensors` and the snapshots live there. `rival` is a second player,
    (name, network, peak learning rate), whose weights are not averaged.
    """

    def __init__(
        self,
        net: nn.Module,
        config: Optimisation,
        seed: int,
        identity: str,
        folder: Path,
        device: torch.device,
        rival: tuple[str, nn.Module, float] | None = None,
    ):
        self.config, self.seed, self.device, self.identity, self.folder = (
            config,
            seed,
            device,
            identity,
            folder,
        )
        self.players = [Player(net, config, device)]
        if rival is not None:
            name, other, lr = rival
            self.players.append(Player(other, config, device, name, lr))
        self.net, self.named = self.players[0].net, self.players[0].named
        self.ema = {name: value.detach().clone() for name, value in net.state_dict().items()}
        self.nimg, self.log = 0, []
        if (folder / "state.safetensors").exists():
            self._resume()

    def _resume(self) -> None:
        tensors, metadata = load_tensors(self.folder / "state.safetensors")
        if metadata["identity"] != self.identity:
            raise UserError(
                f"{self.folder} holds a run of another configuration; delete the folder to start anew"
            )
        for player in self.players:
            player.restore(tensors)
        for name, value in _part(tensors, "ema.").items():
            self.ema[name].copy_(value)
        self.nimg, self.log = metadata["nimg"], metadata["log"]

    def save(self) -> None:
        """Write the whole state, of both players, atomically."""
        tensors = {f"ema.{name}": value for name, value in self.ema.items()}
        for player in self.players:
            tensors |= player.state()
        metadata = {"identity": self.identity, "nimg": self.nimg, "log": self.log}
        save_tensors(self.folder / "state.safetensors", tensors, metadata)

    def snapshot(self, nimg: int) -> Path:
        """Return the path of the averaged weights kept at `nimg` images."""
        return self.folder / f"snapshot-{nimg:010d}.safetensors"


def fit(run: Run, batch_of: Batch, *losses: Loss, watch: Watch | None = None) -> Iterator[Progress]:
    """Train `run` to its end from wherever it stands; yields after every update, saves at every report.

    `losses` are one for each player; an update moves the players in turn, on the same batch. Each process of a
    distributed run takes its share of every batch. The batch of the next update is read while this one is computed.
    `watch` looks at every row of the log and returns what is wrong with it, or None.

    Raises: UserError with the step and the loss, if a loss is not finite; the last good state is kept.
    """
    config = run.config
    if config.micro_batch % world():
        raise UserError(
            f"micro_batch ({config.micro_batch}) must be a multiple of the number of processes ({world()})"
        )
    share = config.micro_batch // world()
    passes = config.batch // config.micro_batch
    nets = [torch.compile(player.net) if config.compile else player.net for player in run.players]
    context = precision(config.precision, run.device)
    updates = config.report_nimg // config.batch
    seen = torch.zeros(len(run.players), updates, device=run.device)
    decay_targets = [run.ema[name] for name in run.named]
    for player in run.players:
        player.net.train()

    def positions(nimg: int) -> range:  # of the micro batch that starts there, this process's share
        return range(nimg + rank() * share, nimg + (rank() + 1) * share)

    def submit(nimg: int) -> list:  # the batches of the update that starts there
        left = range(passes if nimg < config.nimg else 0)
        return [reader.submit(batch_of, positions(nimg + k * config.micro_batch)) for k in left]

    with ThreadPoolExecutor(1) as reader:
        upcoming = submit(run.nimg)
        while run.nimg < config.nimg:
            rate, k = learning_rate(config, run.nimg), run.nimg // config.batch % updates
            torch.manual_seed(
                rng.torch_seed(run.seed, "dropout", run.nimg + rank())
            )  # dropout alone knows processes
            batches = [to_device(batch.result(), run.device) for batch in upcoming]
            upcoming = submit(run.nimg + config.batch)
            for number, (player, net, loss) in enumerate(zip(run.players, nets, losses, strict=True)):
                for other in run.players:
                    for parameter in other.named.values():
                        parameter.requires_grad_(other is player)
                seen[number, k] = _update(player, net, loss, batches, context, config.clip, rate)
            torch._foreach_lerp_(decay_targets, list(run.named.values()), 1 - ema_decay(config, run.nimg))
            run.nimg += config.batch
            yield Progress(
                run.nimg, _report(run, seen, rate, watch) if run.nimg % config.report_nimg == 0 else None
            )


def _update(
    player: Player, net: nn.Module, loss: Loss, batches, context, clip: float | None, rate: float
) -> Tensor:
    """Move a player by the gradient of its loss over all batches (of all processes); return what the log shows of it."""
    value = 0.0
    for batch in batches:
        with context():
            found = loss(net, batch)
            part, shown = found if isinstance(found, tuple) else (found, found)
            (part / len(batches)).backward()
        value = value + torch.where(part.isfinite(), shown, part).detach() / len(
            batches
        )  # what is not shown may be at fault
    if world() > 1:
        gradients = [p.grad for p in player.named.values() if p.grad is not None]
        mean = torch.cat([g.flatten() for g in gradients])  # one message
        dist.all_reduce(mean)
        for gradient, part in zip(gradients, mean.div_(world()).split([g.numel() for g in gradients])):
            gradient.copy_(part.view_as(gradient))
    if clip is not None:
        nn.utils.clip_grad_norm_(player.named.values(), clip)
    for group in player.optimizer.param_groups:
        group["lr"] = rate * player.lr_share
    player.optimizer.step()
    player.optimizer.zero_grad(set_to_none=True)
    return value


def _report(run: Run, seen: Tensor, rate: float, watch: Watch | None) -> dict[str, int | float]:
    values = total(seen) / world()  # (players, updates)
    for k in range(values.shape[1]):
        if not values[:, k].isfinite().all():
            step = run.nimg // run.config.batch - values.shape[1] + k + 1
            bad = next(value for value in values[:, k].tolist() if not math.isfinite(value))
            raise UserError(
                f"the loss became {bad} at step {step} ({step * run.config.batch} images); {_remedy(run)}"
            )
    for player in run.players:
        for name, parameter in player.named.items():
            if not parameter.isfinite().all():
                last = values[0, -1].item()
                raise UserError(
                    f"{name} is no longer finite after {run.nimg} images, the loss was {last:.4g}; {_remedy(run)}"
                )
    means = [sum(row) / len(row) for row in values.tolist()]
    row = {"nimg": run.nimg, "loss": means[0], "lr": rate}
    row |= {f"loss_{player.name}": mean for player, mean in zip(run.players[1:], means[1:])}
    if watch is not None and (wrong := watch(row)):
        raise UserError(
            f"{wrong[0]} at step {run.nimg // run.config.batch} ({run.nimg} images); {_remedy(run, wrong[1])}"
        )
    run.log.append(row)
    for name, value in run.net.named_buffers():
        run.ema[name].copy_(value) if name in run.ema else None
    if rank() == 0:
        if run.nimg in run.config.snapshots:
            save_tensors(run.snapshot(run.nimg), run.ema, {"nimg": run.nimg})
        run.save()
    return row


def _remedy(run: Run, remedy: str = "") -> str:
    kept = (
        f"the last good state is kept in {run.folder}"
        if run.log
        else "it had not yet reported, so nothing is kept"
    )
    rates = " or ".join(["optimisation.lr", *(f"{player.name}_lr" for player in run.players[1:])])
    return f"{kept}; {remedy or f'lower {rates} or clip the gradient'}"


def build(spec, seed: int, purpose: str, *given) -> nn.Module:
    """Return a freshly initialised network, a pure function of (seed, purpose)."""
    torch.manual_seed(rng.torch_seed(seed, purpose))
    return spec.build(*given).to(memory_format=torch.channels_last)


def identity(job: Job, *values: Any) -> str:
    """Return what unfinished work is keyed by: everything that the bytes of a run depend on."""
    return digest(job.code, job.study.seed, environment(job), *values)


def train(
    job: Job,
    config: Any,
    inputs: dict[str, str],
    net: nn.Module,
    batch_of: Batch,
    loss: Loss,
    about: dict[str, Any],
    rival: tuple[str, nn.Module, float, Loss] | None = None,
    watch: Watch | None = None,
) -> None:
    """Train `net` from wherever its scratch folder stands and write the results of the stage into `job.out`.

    `weights.safetensors` (averaged weights), `snapshots/`, `log.csv` (a row a report), `summary.json`. `inputs` names
    what the run depends on beside its config (checksums); `about` is kept with the weights. `rival` is a second player:
    its name, network, peak learning rate and loss.
    """
    key = identity(job, config, inputs)
    players = sum(p.numel() for n in (net, *(rival[1:2] if rival else ())) for p in n.parameters())
    require_disk(
        job.out, 4 * (8 * players + about["parameters"] * (1 + 2 * len(config.optimisation.snapshots)))
    )  # two states at most
    with scratch(job.scratch(key)) as folder:
        run = Run(net, config.optimisation, job.study.seed, key, folder, device_of(job), rival and rival[:3])
        with bar(job.name, config.optimisation.nimg, done=run.nimg) as progress:
            for step in fit(run, batch_of, loss, *(rival[3:] if rival else ()), watch=watch):
                progress.update(step.nimg - progress.n)
                if step.report:
                    progress.set_postfix(loss=f"{step.report['loss']:.4g}")
        if rank() == 0:
            about = {**about, "stage": job.stage, "run": job.run, "config": plain(config), "inputs": inputs}
            (job.out / "snapshots").mkdir(parents=True, exist_ok=True)
            for path in (job.out / "snapshots").iterdir():
                path.unlink()
            for nimg in config.optimisation.snapshots:
                tensors, _ = load_tensors(run.snapshot(nimg))
                save_tensors(
                    job.out / "snapshots" / f"{nimg:010d}.safetensors", tensors, {**about, "nimg": nimg}
                )
            save_tensors(job.out / "weights.safetensors", run.ema, {**about, "nimg": run.nimg})
            columns = ["nimg", "loss", "lr", *sorted(set(run.log[0]) - {"nimg", "loss", "lr"})]
            rows = [",".join(columns), *(",".join(_digits(row[key]) for key in columns) for row in run.log)]
            write(job.out / "log.csv", "\n".join(rows) + "\n")
            found = {"nimg": run.nimg, "loss": run.log[-1]["loss"], "environment": environment(job)}
            write_json(job.out / "summary.json", {**about, **found})
        barrier()


def _digits(value: int | float) -> str:
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def plan(config: Optimisation, about: dict[str, int]) -> Plan:
    """Return what training costs: `train_flops_image` for an image, or three times the FLOPs of its forward pass."""
    kept = 1 + len(config.snapshots)
    step = float(about.get("train_flops_image", 3 * about["flops_image"]))
    return Plan(about["parameters"], step * config.nimg, 4 * about["parameters"] * kept)
