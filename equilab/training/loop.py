"""The one training loop: accumulate, step, average, yield; images seen is its clock."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from equilab import rng
from equilab.config import Job, Plan, UserError, digest, plain
from equilab.files import scratch, write, write_json
from equilab.progress import bar
from equilab.training.state import load_tensors, save_tensors

Batch = Callable[[range], Any]  # positions in the endless stream of images -> what the loss needs, on the CPU
Loss = Callable[[nn.Module, Any], Tensor]  # (network, batch) -> mean loss over the batch's images


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
                raise ValueError(f"snapshots: {count} must be a multiple of report_nimg ({self.report_nimg}) up to nimg")
        if not self.lr > 0 or not self.ema_half_life_nimg > 0 or self.clip is not None and not self.clip > 0:
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
    return config.lr * warm * (1 - passed if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * passed)))


def ema_decay(config: Optimisation, nimg: int) -> float:
    """Return the decay of the averaged weights after the update that starts with `nimg` images seen.

    0.5^(batch / min(half-life, warm-up * nimg)); 0 at the first update if there is a warm-up.
    Source: EDM's training; the published GET keeps 0.9999 a step of 128, a half-life of 887,184 images, no warm-up.
    """
    half_life = config.ema_half_life_nimg
    if config.ema_warmup:
        half_life = min(half_life, config.ema_warmup * nimg)
    return 0.5 ** (config.batch / half_life) if half_life else 0.0


class Run:
    """The state of one run: network, averaged weights, optimiser, images seen, log. `fit` moves it on.

    `folder` is the run's scratch folder: `state.safetensors` and the snapshots live there.
    """

    def __init__(
        self, net: nn.Module, config: Optimisation, seed: int, identity: str, folder: Path, device: torch.device
    ):
        self.net, self.config, self.seed, self.device = net.to(device), config, seed, device
        self.identity, self.folder = identity, folder
        self.ema = {name: value.detach().clone() for name, value in net.state_dict().items()}
        self.named = {name: p for name, p in net.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.named.values(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self.nimg, self.log = 0, []
        if (folder / "state.safetensors").exists():
            self._resume()

    def _resume(self) -> None:
        tensors, metadata = load_tensors(self.folder / "state.safetensors")
        if metadata["identity"] != self.identity:
            raise UserError(f"{self.folder} holds a run of another configuration; delete the folder to start anew")
        part = lambda key: {name[len(key):]: t for name, t in tensors.items() if name.startswith(key)}  # noqa: E731
        self.net.load_state_dict(part("net."))
        for name, value in part("ema.").items():
            self.ema[name].copy_(value)
        for name, parameter in self.named.items():  # moments in the memory format of their parameter, as the kernel needs
            moments = {key: tensors[f"optimizer.{key}.{name}"] for key in ("exp_avg", "exp_avg_sq")}
            kept = {key: torch.empty_like(parameter).copy_(value).detach() for key, value in moments.items()}
            self.optimizer.state[parameter] = {"step": tensors[f"optimizer.step.{name}"].to(self.device), **kept}
        self.nimg, self.log = metadata["nimg"], metadata["log"]

    def save(self) -> None:
        """Write the whole state, atomically."""
        tensors = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in self.ema.items()}
        for name, parameter in self.named.items():
            tensors |= {f"optimizer.{key}.{name}": t for key, t in self.optimizer.state[parameter].items()}
        metadata = {"identity": self.identity, "nimg": self.nimg, "log": self.log}
        save_tensors(self.folder / "state.safetensors", tensors, metadata)

    def snapshot(self, nimg: int) -> Path:
        """Return the path of the averaged weights kept at `nimg` images."""
        return self.folder / f"snapshot-{nimg:010d}.safetensors"


def fit(run: Run, batch_of: Batch, loss: Loss) -> Iterator[Progress]:
    """Train `run` to its end from wherever it stands; yields after every update, saves at every report.

    Each process of a distributed run takes its share of every batch. The batch of the next update is read while
    this one is computed.

    Raises: UserError with the step and the loss, if the loss is not finite; the last good state is kept.
    """
    config = run.config
    if config.micro_batch % world():
        raise UserError(f"micro_batch ({config.micro_batch}) must be a multiple of the number of processes ({world()})")
    share = config.micro_batch // world()
    passes = config.batch // config.micro_batch
    net = torch.compile(run.net) if config.compile else run.net
    net = nn.parallel.DistributedDataParallel(net) if world() > 1 else net
    context = precision(config.precision, run.device)
    updates = config.report_nimg // config.batch
    losses = torch.zeros(updates, device=run.device)
    decay_targets = [run.ema[name] for name in run.named]
    run.net.train()

    def positions(nimg: int) -> range:  # of the micro batch that starts there, this process's share
        return range(nimg + rank() * share, nimg + (rank() + 1) * share)

    with ThreadPoolExecutor(1) as reader:
        upcoming = reader.submit(batch_of, positions(run.nimg)) if run.nimg < config.nimg else None
        while run.nimg < config.nimg:
            rate, seen = learning_rate(config, run.nimg), 0.0
            torch.manual_seed(rng.torch_seed(run.seed, "dropout", run.nimg + rank()))  # dropout alone knows processes
            for group in run.optimizer.param_groups:
                group["lr"] = rate
            for k in range(passes):
                batch = to_device(upcoming.result(), run.device)
                upcoming = reader.submit(batch_of, positions(run.nimg + (k + 1) * config.micro_batch))
                last = k == passes - 1
                with contextlib.nullcontext() if last or world() == 1 else net.no_sync(), context():
                    value = loss(net, batch) / passes
                    value.backward()
                seen = seen + value.detach()
            if config.clip is not None:
                nn.utils.clip_grad_norm_(run.named.values(), config.clip)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            torch._foreach_lerp_(decay_targets, list(run.named.values()), 1 - ema_decay(config, run.nimg))
            losses[run.nimg // config.batch % updates] = seen
            run.nimg += config.batch
            yield Progress(run.nimg, _report(run, losses, rate) if run.nimg % config.report_nimg == 0 else None)


def _report(run: Run, losses: Tensor, rate: float) -> dict[str, int | float]:
    values = (total(losses) / world()).tolist()
    for k, value in enumerate(values):
        if not math.isfinite(value):
            step = run.nimg // run.config.batch - len(values) + k + 1
            raise UserError(f"the loss became {value} at step {step} ({step * run.config.batch} images); {_remedy(run)}")
    for name, parameter in run.named.items():
        if not parameter.isfinite().all():
            raise UserError(f"{name} is no longer finite after {run.nimg} images, the loss was {values[-1]:.4g}; {_remedy(run)}")
    row = {"nimg": run.nimg, "loss": sum(values) / len(values), "lr": rate}
    run.log.append(row)
    for name, value in run.net.named_buffers():
        run.ema[name].copy_(value) if name in run.ema else None
    if rank() == 0:
        if run.nimg in run.config.snapshots:
            save_tensors(run.snapshot(run.nimg), run.ema, {"nimg": run.nimg})
        run.save()
    return row


def _remedy(run: Run) -> str:
    kept = f"the last good state is kept in {run.folder}" if run.log else "it had not yet reported, so nothing is kept"
    return f"{kept}; lower optimisation.lr or clip the gradient"


def rank() -> int:
    """Return this process's number among those that torchrun started; 0 alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Return how many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def total(values: Tensor) -> Tensor:
    """Return the sum of `values` over all processes."""
    if dist.is_initialized():
        values = values.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(values)
    return values.cpu()


def precision(name: str, device: torch.device) -> Callable[[], contextlib.AbstractContextManager]:
    """Return a maker of the context in which a network runs: fp32, tf32 (matmuls of a GPU) or bf16 autocast."""
    if name == "bf16":
        return lambda: torch.autocast(device.type, torch.bfloat16)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
    return contextlib.nullcontext


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the tensors of a (nested) tuple on `device`; None stays None."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    return tuple(to_device(part, device) for part in batch) if isinstance(batch, tuple) else batch


def build(spec, seed: int, purpose: str, *given) -> nn.Module:
    """Return a freshly initialised network, a pure function of (seed, purpose)."""
    torch.manual_seed(rng.torch_seed(seed, purpose))
    return spec.build(*given).to(memory_format=torch.channels_last)


def identity(job: Job, *values: Any) -> str:
    """Return what unfinished work is keyed by: everything that the bytes of a run depend on."""
    return digest(job.code, job.study.seed, environment(job), *values)


def train(
    job: Job, config: Any, inputs: dict[str, str], net: nn.Module, batch_of: Batch, loss: Loss, about: dict[str, Any]
) -> None:
    """Train `net` from wherever its scratch folder stands and write the results of the stage into `job.out`.

    `weights.safetensors` (averaged weights), `snapshots/`, `log.csv` (a row a report), `summary.json`. `inputs` names
    what the run depends on beside its config (checksums); `about` is kept with the weights.
    """
    key = identity(job, config, inputs)
    with scratch(job.scratch(key)) as folder:
        run = Run(net, config.optimisation, job.study.seed, key, folder, device_of(job))
        with bar(job.name, config.optimisation.nimg, done=run.nimg) as progress:
            for step in fit(run, batch_of, loss):
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
                save_tensors(job.out / "snapshots" / f"{nimg:010d}.safetensors", tensors, {**about, "nimg": nimg})
            save_tensors(job.out / "weights.safetensors", run.ema, {**about, "nimg": run.nimg})
            rows = ["nimg,loss,lr", *(f"{r['nimg']},{r['loss']:.9g},{r['lr']:.9g}" for r in run.log)]
            write(job.out / "log.csv", "\n".join(rows) + "\n")
            found = {"nimg": run.nimg, "loss": run.log[-1]["loss"], "environment": environment(job)}
            write_json(job.out / "summary.json", {**about, **found})
        barrier()


def plan(config: Optimisation, about: dict[str, int]) -> Plan:
    """Return what training costs: `train_flops_image` for an image, or three times the FLOPs of its forward pass."""
    kept = 1 + len(config.snapshots)
    step = float(about.get("train_flops_image", 3 * about["flops_image"]))
    return Plan(about["parameters"], step * config.nimg, 4 * about["parameters"] * kept)


def device_of(job: Job) -> torch.device:
    """Return the device that the study asks for.

    Raises: UserError if there is none.
    """
    wanted = job.study.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("study.device is cuda, but torch sees no GPU; set it to auto or cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def environment(job: Job) -> dict[str, Any]:
    """Return what the bits of a result depend on beside its config: versions, device, threads, processes."""
    device = device_of(job)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "torch": torch.__version__, "numpy": np.__version__, "device": f"{device.type} {name}",
        "threads": torch.get_num_threads(), "processes": world(),
    }  # fmt: skip
