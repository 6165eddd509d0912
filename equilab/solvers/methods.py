"""Our own fixed-point methods; each sample stops by itself, and the others are packed together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from equilab.solvers.record import Record, Solution

RIDGE = 10  # machine epsilons, relative to each residual's square: keeps Anderson's small systems solvable


def iterate(f: Callable, record: Record) -> Solution:
    """Return the solution by plain iteration z <- f(z); transparent to autograd."""
    z = record.init
    while not record.done:
        z, going = record.apply(f, z)
        if going is not None:
            z = z[going]
    return record.solution()


@torch.no_grad()
def anderson(f: Callable, record: Record, memory: int, mixing: float) -> Solution:
    """Return the solution by Anderson acceleration: each new state combines the last `memory` ones; not differentiated.

    Source: Walker and Ni, "Anderson acceleration for fixed-point iterations", 2011, equation (1.1), with damping.
    """
    x = record.init
    wide = torch.promote_types(x.dtype, torch.float32)
    states: list[Tensor] = []
    steps: list[Tensor] = []
    while not record.done:
        fx, going = record.apply(f, x)
        states = [*states, x.to(wide)][-memory:]
        steps = [*steps, fx.to(wide) - x.to(wide)][-memory:]
        if going is not None:
            states = [state[going] for state in states]
            steps = [step[going] for step in steps]
        if not record.done:
            x = combine(torch.stack(states, 1), torch.stack(steps, 1), mixing).to(x.dtype)
    return record.solution()


def combine(
    states: Float[Tensor, "b m n d"], steps: Float[Tensor, "b m n d"], mixing: float
) -> Float[Tensor, "b n d"]:
    """Return sum_i a_i (x_i + mixing g_i) of states x and their steps g = f(x) - x.

    The weights a, which sum to 1, minimise |sum_i a_i g_i|: with H = G G^T they are a = H^-1 1 / (1^T H^-1 1).
    H is scaled to a unit diagonal before it is solved.
    """
    with torch.autocast(steps.device.type, enabled=False):
        g = steps.flatten(2)  # (B, M, N*D)
        length = torch.linalg.vector_norm(g, dim=2, keepdim=True)  # (B, M, 1)
        unit = g / length.clamp_min(torch.finfo(g.dtype).tiny)
        ridge = RIDGE * torch.finfo(g.dtype).eps * torch.eye(g.shape[1], dtype=g.dtype, device=g.device)
        smallest = length.amin(1, keepdim=True)  # (B, 1, 1)
        inverse = torch.where(length > 0, smallest / length, 1.0)  # (B, M, 1), scaled to at most 1
        weights = inverse * torch.linalg.solve_ex(unit @ unit.mT + ridge, inverse).result
        weights = (weights / weights.sum(1, keepdim=True))[..., None]  # (B, M, 1, 1)
        return (weights * (states + mixing * steps)).sum(1)  # (B, N, D)
