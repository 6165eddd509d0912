"""What a solve returns, and the bookkeeping per sample that all methods share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

GROWTH = 1e6  # a sample whose state has grown by this factor since the start counts as diverged


class Solution(NamedTuple):
    """A solved batch: the state of each sample and how it was reached.

    Iterate k (1..K) of a sample is what its k-th application of f returned, K the iterations asked for. A
    stopped sample keeps its iterate; a diverged one keeps the last iterate before it broke. Residuals are the
    norm of f(z) - z over the norm of f(z): inf where the sample broke, nan where f was not applied.
    """

    z: Float[Tensor, "b n d"]  # the iterate chosen by the solver's `pick`
    iterations: Int64[Tensor, b]  # applications of f
    residuals: Float32[Tensor, "b k"]
    converged: Bool[Tensor, b]  # the residual fell to the tolerance
    diverged: Bool[Tensor, b]  # f(z) was not finite, or has grown beyond bounds
    iterates: tuple[Tensor, ...]  # K states (b, n, d) if recorded, else empty

    @property
    def last_residual(self) -> Float32[Tensor, b]:
        """The residual at each sample's last application of f."""
        last = (self.iterations - 1).clamp_min(0)[:, None]  # (B, 1)
        return self.residuals.gather(1, last)[:, 0]


class Record:
    """The samples of one solve: `apply` counts, measures and stops each by itself, `solution` returns the outcome.

    The arguments are the fields of a `Solver`.
    """

    def __init__(
        self,
        init: Tensor,
        iterations: int | Tensor,
        tolerance: float | Tensor,
        pick: str,
        record: bool,
        measure: bool,
    ):
        self.allowed = iterations if isinstance(iterations, Tensor) else None  # (B,)
        self.limit = iterations if self.allowed is None else int(self.allowed.max())
        self.tolerance, self.pick, self.record, self.measure = tolerance, pick, record, measure
        self.init = self.z = self.best = init
        batch, device = len(init), init.device
        self.active = torch.arange(batch, device=device)  # the samples that run on
        self.applied = 0
        self.iterations = torch.zeros(batch, dtype=torch.int64, device=device)
        self.converged = torch.zeros(batch, dtype=torch.bool, device=device)
        self.diverged = torch.zeros(batch, dtype=torch.bool, device=device)
        self.residuals: list[Tensor] = []
        self.iterates: list[Tensor] = []
        if measure:
            self.scale = norm(init)
            self.lowest = torch.full_like(self.scale, torch.inf)

    @property
    def done(self) -> bool:
        """Whether the iterations are used up or no sample runs on."""
        return self.applied == self.limit or len(self.active) == 0

    def apply(self, f: Callable, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Apply f to the running samples `x`; return f(x), and the positions in x that run on (None: all of them)."""
        fx = f(x, None if len(self.active) == len(self.z) else self.active)
        self.applied += 1
        going = None
        if self.measure:
            going = self._measured(x, fx)
        else:
            self.z = fx
        if self.record:
            self.iterates.append(self.z)
        return fx, going

    def _measured(self, x: Tensor, fx: Tensor) -> Tensor | None:
        """Take over f(x), stop the samples that converge or break, and return the positions that run on (None: all)."""
        rows = self.active
        with torch.no_grad():
            distance, size = norm(fx - x), norm(fx)  # (A,) each
            if self.applied == 1:
                self.scale = torch.maximum(self.scale, size)
            broken = ~(distance.isfinite() & (size <= GROWTH * self.scale[rows]))
            distance = distance.masked_fill(broken, torch.inf)
            converged = self._reached(rows, distance, size) & ~broken
            stopped = broken | converged
            if self.allowed is not None:
                stopped = stopped | (self.allowed[rows] == self.applied)
            smallest = torch.finfo(size.dtype).tiny
            residual = distance / size.clamp_min(smallest).masked_fill(broken, 1)
            of_all = torch.full_like(self.scale, torch.nan).index_copy(0, rows, residual)  # (B,)
            self.residuals.append(of_all)
            self.iterations[rows] += 1
        stopping = bool(stopped.any())
        if len(rows) == len(self.z) and not stopping:
            self.z = fx
        else:
            self.z = self.z.index_copy(0, rows[~broken], fx[~broken])
        if self.pick == "lowest":
            self._keep_the_best(rows, distance)
        if not stopping:
            return None
        self.diverged[rows] = broken
        self.converged[rows] = converged
        self.active = rows[~stopped]
        return (~stopped).nonzero()[:, 0]

    def _reached(self, rows: Tensor, distance: Tensor, size: Tensor) -> Tensor:
        """Return which of the running samples are within their tolerance of a fixed point."""
        if isinstance(self.tolerance, Tensor):
            return distance <= self.tolerance[rows] * size
        if self.tolerance > 0:
            return distance <= self.tolerance * size
        return torch.zeros_like(rows, dtype=torch.bool)

    def _keep_the_best(self, rows: Tensor, distance: Tensor) -> None:
        """Keep the states of the samples that are nearer to their fixed points than ever before."""
        better = torch.full_like(self.lowest, torch.inf).index_copy(0, rows, distance) < self.lowest  # (B,)
        self.lowest[rows] = torch.minimum(self.lowest[rows], distance)
        self.best = torch.where(better[:, None, None], self.z, self.best)

    def solution(self) -> Solution:
        """Return the outcome; residuals and iterates are filled up to the iterations asked for."""
        batch, missing = len(self.z), self.limit - self.applied
        if self.measure:
            empty = self.z.new_full((batch, missing), torch.nan, dtype=torch.float32)
            residuals = torch.cat([torch.stack(self.residuals, 1).float(), empty], 1)  # (B, K)
        else:
            residuals = self.z.new_empty((batch, 0), dtype=torch.float32)
            self.iterations += self.applied
            self.diverged = ~self.z.detach().isfinite().flatten(1).all(1)  # (B,)
        return Solution(
            z=self.best if self.pick == "lowest" else self.z,
            iterations=self.iterations,
            residuals=residuals,
            converged=self.converged,
            diverged=self.diverged,
            iterates=tuple(self.iterates + [self.z] * missing) if self.record else (),
        )


def norm(z: Float[Tensor, "b n d"]) -> Float[Tensor, b]:
    """Return the Euclidean norm of each sample, in float32 at least; without gradient."""
    wide = torch.promote_types(z.dtype, torch.float32)
    return torch.linalg.vector_norm(z.detach(), dim=(1, 2), dtype=wide)  # (B,)
