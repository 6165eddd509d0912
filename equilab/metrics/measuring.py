"""What a call takes on this machine: seconds, memory, and the machine's own limit to compare them with."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


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

        def product():
            return a @ b

        once = timed(product, device, warmup=1, repeats=1).fastest
        if size == largest or 8 * once > longest:
            return 2 * size**3 / timed(product, device, warmup=1, repeats=10).fastest
        size *= 2


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that tensors made by `call()` held at once; what was there before is not counted."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when the first profiler starts, which else prints
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        call()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
