"""Our own fixed-point methods; each sample stops by itself, and the others are packed together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from equilab.solvers.record import Record, Solution

if TYPE_CHECKING:
    from equilab.solvers.solver import Solver

RIDGE = 10  # machine epsilons, relative to each residual's square: keeps Anderson's small systems solvable


def iterate(f, init: Tensor, solver: Solver) -> Solution:
    """Return the solution by plain iteration z <- f(z); transparent to autograd."""
    record, z = Record(init, solver), init
    while not record.done:
        z, keep = record.apply(f, z)
        if keep is not None:
            z = z[keep]
    return record.solution()


@torch.no_grad()
def anderson(f, init: Tensor, solver: Solver) -> Solution:
    """Return the solution by Anderson acceleration: each new state combines the last `memory` ones; not differentiated.

    Source: Walker and Ni, "Anderson acceleration for fixed-point iterations", 2011, equation (1.1), with damping.
    """
    record, x = Record(init, solver), init
    states: list[Tensor] = []
    steps: list[Tensor] = []
    while not record.done:
        fx, keep = record.apply(f, x)
        wide = torch.promote_types(x.dtype, torch.float32)
        states = [*states, x.to(wide)][-solver.memory :]
        steps = [*steps, fx.to(wide) - x.to(wide)][-solver.memory :]
        if keep is not None:
            states, steps = [s[keep] for s in states], [s[keep] for s in steps]
        if not record.done:
            x = _combine(torch.stack(states, 1), torch.stack(steps, 1), solver.mixing).to(x.dtype)
    return record.solution()


def _combine(states: Tensor, steps: Tensor, mixing: float) -> Tensor:
    """Return sum_i a_i (x_i + mixing g_i), where a minimises |sum_i a_i g_i| under sum_i a_i = 1.

    With H = G G^T the minimiser is a = H^-1 1 / (1^T H^-1 1); H is scaled to a unit diagonal before it is solved.
    """
    with torch.autocast(steps.device.type, enabled=False):
        g = steps.flatten(2)  # (A, M, N*D)
        length = torch.linalg.vector_norm(g, dim=2, keepdim=True)  # (A, M, 1)
        unit = g / length.clamp_min(torch.finfo(g.dtype).tiny)
        ridge = RIDGE * torch.finfo(g.dtype).eps * torch.eye(g.shape[1], dtype=g.dtype, device=g.device)
        smallest = length.amin(1, keepdim=True)
        inverse = torch.where(length > 0, smallest / length, 1.0)  # (A, M, 1), scaled to at most 1
        weights = inverse * torch.linalg.solve_ex(unit @ unit.mT + ridge, inverse).result
        weights = (weights / weights.sum(1, keepdim=True))[..., None]  # (A, M, 1, 1)
        return (weights * (states + mixing * steps)).sum(1)  # (A, N, D)
