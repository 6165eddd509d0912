"""What a model costs: parameters and FLOPs counted by shape, seconds and memory measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from equilab.core.config import Spec


def parameters(module: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def flops(call: Callable[[], object]) -> int:
    """Return the FLOPs of `call()`, counted by shape: two for each multiply-accumulate of matrix products, convolutions
    and attention, nothing for the rest. Works on the meta device.
    """
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


class Work(NamedTuple):
    """FLOPs by shape that grow linearly with the iterations of a fixed point; `per_iteration` is 0 where there is none."""

    fixed: int
    per_iteration: int = 0

    def flops(self, iterations: float = 0) -> float:
        """Return the FLOPs at so many iterations, a mean where samples differ."""
        return self.fixed + self.per_iteration * iterations


def work(call: Callable[[int], object]) -> Work:
    """Return the Work of `call(iterations)`, counted at one iteration and at two."""
    once, twice = flops(lambda: call(1)), flops(lambda: call(2))
    return Work(2 * once - twice, twice - once)


class Cost(NamedTuple):
    """What a run costs by shape; a multiply-accumulate is two FLOPs."""

    parameters: int
    parameters_trained: int  # those that are not frozen
    image: Work  # of a call of a denoiser for an image; of an image of a generator
    train_flops_image: float | None  # of an update, for an image; None where it was not asked for


def network_on_meta(spec: Spec, image: tuple[int, ...], classes: int) -> nn.Module:
    """Return a network on the meta device, where shapes are computed and there are no numbers.

    Raises: UserError if its sizes do not fit.
    """
    with torch.device("meta"):
        return spec.build(image, classes)


def inputs_on_meta(
    image: tuple[int, ...], conditional: bool, batch: int = 1
) -> tuple[Float[Tensor, "b c h w"], Int64[Tensor, b] | None]:
    """Return images and labels on the meta device."""
    with torch.device("meta"):
        label = torch.zeros(batch, dtype=torch.int64) if conditional else None
        return torch.empty(batch, *image), label


class Seconds(NamedTuple):
    """Wall-clock seconds of one call, over repeated calls."""

    median: float
    fastest: float
    slowest: float


def timed(call: Callable[[], object], device: torch.device, *, warmup: int, repeats: int) -> Seconds:
    """Return the seconds of `call()`, its kernels included, after `warmup` calls that are not counted."""
    measured = []
    for _ in range(warmup + repeats):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        measured.append(time.perf_counter() - start)
    counted = measured[warmup:]
    return Seconds(statistics.median(counted), min(counted), max(counted))


def matmul_peak(device: torch.device, dtype: torch.dtype, longest: float = 1.0) -> float:
    """Return the FLOP/s of a large square matrix product, the machine's own limit: the best of ten.

    The matrices are as large as the device needs, smaller where a product would take more than `longest` seconds: some
    CPUs have no instructions for bf16.
    """
    size, largest = 256, 8192 if device.type == "cuda" else 2048
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = timed(lambda: a @ b, device, warmup=1, repeats=1).fastest
        if size == largest or 8 * seconds > longest:
            return 2 * size**3 / timed(lambda: a @ b, device, warmup=1, repeats=10).fastest
        size *= 2


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that tensors made by `call()` held at once; what was there before is not counted."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        call()
    held = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
