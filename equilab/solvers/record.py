"""What a solve returns, and the bookkeeping per sample that all methods share."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

if TYPE_CHECKING:
    from equilab.solvers.solver import Solver

GROWTH = 1e6  # a sample whose state has grown by this factor since the start counts as diverged


class Solution(NamedTuple):
    """A solved batch: the state of each sample and how it was reached.

    Iterate k (1..K) of a sample is what its k-th application of f returned, K the iterations asked for. A stopped
    sample keeps its iterate; a diverged one keeps the last iterate before it broke.
    """

    z: Float[Tensor, "b n d"]  # the iterate chosen by the solver's `pick`
    iterations: Int64[Tensor, b]  # applications of f
    residuals: Float32[
        Tensor, "b k"
    ]  # norm of f(z) - z over norm of f(z); inf where it broke, nan where not applied
    converged: Bool[Tensor, b]  # the relative residual fell to the tolerance
    diverged: Bool[Tensor, b]  # f(z) was not finite, or has grown beyond bounds
    iterates: tuple[Tensor, ...]  # K states (b, n, d) if recorded, else empty


class Record:
    """The samples of one solve: `apply` counts, measures and stops each by itself, `solution` tells the outcome."""

    def __init__(self, init: Tensor, solver: Solver):
        batch, device = len(init), init.device
        self.solver, self.z, self.best = solver, init, init
        self.active = torch.arange(batch, device=device)
        self.applied = 0
        self.iterations = torch.zeros(batch, dtype=torch.int64, device=device)
        self.converged = torch.zeros(batch, dtype=torch.bool, device=device)
        self.diverged = torch.zeros(batch, dtype=torch.bool, device=device)
        self.residuals: list[Tensor] = []
        self.iterates: list[Tensor] = []
        if solver.measure:
            self.scale = norm(init)
            self.lowest = torch.full_like(self.scale, torch.inf)

    @property
    def done(self) -> bool:
        """Whether the iterations are used up or no sample runs on."""
        return self.applied == self.solver.iterations or len(self.active) == 0

    def apply(self, f, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Apply f to the running samples `x`; return f(x), and the positions in x that run on (None: all of them)."""
        everyone = len(self.active) == len(self.z)
        fx = f(x, None if everyone else self.active)
        self.applied += 1
        if not self.solver.measure:
            self.z, keep = fx, None
        else:
            keep = self._measure(x, fx, everyone)
        if self.solver.record:
            self.iterates.append(self.z)
        return fx, keep

    def _measure(self, x: Tensor, fx: Tensor, everyone: bool) -> Tensor | None:
        with torch.no_grad():
            rows, distance, size = self.active, norm(fx - x), norm(fx)
            if self.applied == 1:
                self.scale = torch.maximum(self.scale, size)
            broken = ~(distance.isfinite() & (size <= GROWTH * self.scale[rows]))
            distance = distance.masked_fill(broken, torch.inf)
            stop = broken | (distance <= self.solver.tolerance * size) if self.solver.tolerance else broken
            relative = distance / size.clamp_min(torch.finfo(size.dtype).tiny).masked_fill(broken, 1)
            self.residuals.append(torch.full_like(self.scale, torch.nan).index_copy(0, rows, relative))
            self.iterations[rows] += 1
            stopping = bool(stop.any())
            if stopping:
                self.diverged[rows] = broken
                self.converged[rows] = stop & ~broken
                self.active = rows[~stop]
        if everyone and not stopping:
            self.z = fx
        else:
            self.z = self.z.index_copy(0, rows[~broken], fx[~broken])
        if self.solver.pick == "lowest":
            better = torch.full_like(self.lowest, torch.inf).index_copy(0, rows, distance) < self.lowest
            self.lowest[rows] = torch.minimum(self.lowest[rows], distance)
            self.best = torch.where(better[:, None, None], self.z, self.best)
        return (~stop).nonzero()[:, 0] if stopping else None

    def solution(self) -> Solution:
        """Return the outcome; residuals and iterates are filled up to the iterations asked for."""
        batch, missing = len(self.z), self.solver.iterations - self.applied
        if self.solver.measure:
            empty = self.z.new_full((batch, missing), torch.nan, dtype=torch.float32)
            residuals = torch.cat([torch.stack(self.residuals, 1).float(), empty], 1)  # (B, K)
        else:
            residuals = self.z.new_empty((batch, 0), dtype=torch.float32)
            self.iterations += self.applied
            self.diverged = ~self.z.detach().isfinite().flatten(1).all(1)  # (B,)
        return Solution(
            z=self.best if self.solver.pick == "lowest" else self.z,
            iterations=self.iterations,
            residuals=residuals,
            converged=self.converged,
            diverged=self.diverged,
            iterates=tuple(self.iterates + [self.z] * missing) if self.solver.record else (),
        )


def norm(z: Tensor) -> Tensor:
    """Return the Euclidean norm of each sample, in float32 at least."""
    return torch.linalg.vector_norm(
        z.detach(), dim=(1, 2), dtype=torch.promote_types(z.dtype, torch.float32)
    )  # (B,)
