"""Where the work is done: processes, device, precision."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from equilab.core.config import UserError, digest
from equilab.core.job import Job


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
    """Return a maker of the context in which a network runs: fp32, tf32 (matrix products of a GPU) or bf16 (autocast)."""
    if name == "bf16":
        return functools.partial(torch.autocast, device.type, torch.bfloat16)
    return functools.partial(_tf32, name == "tf32")


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Let a GPU round the factors of its matrix products and convolutions, or not; afterwards as before."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = allowed
    try:
        yield
    finally:
        for switch, value in zip(switches, before):
            switch.allow_tf32 = value


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a (nested, maybe named) tuple with its tensors on `device`; what is no tensor stays as it is."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if not isinstance(batch, tuple):
        return batch
    parts = (to_device(part, device) for part in batch)
    return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)


def require_memory(needed: int, what: str) -> None:
    """Check that this machine has so many bytes of memory in all, which something takes.

    Raises: UserError if it has not.
    """
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(
            f"{what} takes {needed / 2**30:,.0f} GiB of memory, this machine has {there / 2**30:,.0f} GiB; make it smaller, "
            "or use a larger machine"
        )


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


def environment(job: Job, processes: int | list[int] | None = None) -> dict[str, Any]:
    """Return what the bits of a result depend on besides its config: versions, device, threads, processes.

    `processes` is 1 where any number of them writes the same bytes; by default the number of those that work now.
    """
    device = device_of(job)
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability()
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": f"{device.type} {name}",
        "threads": torch.get_num_threads(),
        "processes": processes or world(),
    }


def identity(job: Job, config: Any, inputs: Any) -> dict[str, str]:
    """Return what unfinished work goes on with, part by part: params, code, threads, versions, inputs.

    `inputs` are the checksums of what the work reads. The number of processes may change.
    """
    found = environment(job)
    versions = [f"{name} {found[name]}" for name in ("torch", "numpy", "device")]
    return {
        "params": digest(job.study.seed, config),
        "code": job.code,
        "threads": str(found["threads"]),
        "versions": ", ".join(versions),
        "inputs": digest(inputs),
    }
