"""How a solution is differentiated: a choice of its own, separate from how it is found."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from equilab.solvers.record import Solution
from equilab.solvers.solver import Solver

METHODS = ("unrolled", "o1", "jfb", "s_jfb", "implicit")


@dataclass(frozen=True)
class Gradient:
    """How gradients pass through a solution z = f(z).

    "unrolled"    through every application; memory grows with their number.
    "o1"          the same bits, one application recomputed at a time: only the states are kept (GET, section 4.1).
    "jfb"         solve without gradient, then one application with it (Jacobian-free backpropagation, Fung 2021).
    "s_jfb"       the same with several applications, both counts handed in at each call: drawn by the trainer, or always
                  the same in multi-step JFB (FPDM, algorithm 1).
    "implicit"    solve without gradient, then dL/dz (I - df/dz)^-1 by the `adjoint` solver (GET, equation 3).

    Raises: ValueError for an unknown method, or an `adjoint` that it needs or does not take.
    """

    method: str  # one of METHODS
    adjoint: Solver | None = None  # implicit: how the linear system is solved in the backward pass

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; choose one of {', '.join(METHODS)}")
        if (self.method == "implicit") != (self.adjoint is not None):
            raise ValueError(f"adjoint is {self.adjoint}; 'implicit' needs a solver, others leave it out")


def equilibrium(
    f: Callable,
    init: Float[Tensor, "b n d"],
    solver: Solver,
    gradient: Gradient,
    counts: tuple[int, int] | None = None,
) -> Solution:
    """Solve z = f(z) from a constant `init` and return the Solution, its z differentiable as `gradient` says.

    Applications with gradient that follow the solve count as iterations. `counts` are the iterations (without
    gradient, 0 or more; with it, 1 or more) of "s_jfb" at this call.

    Raises: ValueError if "unrolled" or "o1" meet a method other than "iterate", or `counts` do not fit.
    """
    init = init.detach()
    if (gradient.method == "s_jfb") != (counts is not None) or (counts and (counts[0] < 0 or counts[1] < 1)):
        raise ValueError(f"counts is {counts}; 's_jfb' needs (0 or more, 1 or more), others leave it out")
    if gradient.method in ("unrolled", "o1"):
        if solver.method != "iterate":
            raise ValueError(
                f"method {solver.method!r} cannot be {gradient.method}; solve by 'iterate' or use 'jfb'"
            )
        return solver(_recomputed(f) if gradient.method == "o1" else f, init)
    no_grad_iterations, grad_iterations = counts or (solver.iterations, 1)
    tail = Solver("iterate", grad_iterations, 0.0, "last", record=solver.record, measure=solver.measure)
    if no_grad_iterations == 0:
        return tail(f, init)
    with torch.no_grad():
        solved = replace(solver, iterations=no_grad_iterations)(f, init)
    if gradient.method == "implicit":
        f = _implicit(f, gradient.adjoint)
    return _joined(solved, tail(f, solved.z))


def _joined(head: Solution, tail: Solution) -> Solution:
    """Return the Solution of two solves, the second from where the first ended."""
    return Solution(
        z=tail.z,
        iterations=head.iterations + tail.iterations,
        residuals=torch.cat([head.residuals, tail.residuals], 1),  # (B, K + steps)
        converged=head.converged,
        diverged=head.diverged | tail.diverged,
        iterates=head.iterates + tail.iterates,
    )


def _recomputed(f: Callable) -> Callable:
    """Return f, whose intermediate results are not kept but computed again in the backward pass."""

    def application(z: Tensor, rows: Tensor | None) -> Tensor:
        return checkpoint(f, z, rows, use_reentrant=False, preserve_rng_state=False)

    return application


def _implicit(f: Callable, adjoint: Solver) -> Callable:
    """Return f, whose backward pass hands on v = g + (df/dz)^T v for an incoming gradient g, solved by `adjoint`."""

    def application(z: Tensor, rows: Tensor | None) -> Tensor:
        if not torch.is_grad_enabled():
            return f(z, rows)
        z = z.detach().requires_grad_()
        fz = f(z, rows)
        handed_on = fz.view_as(fz)  # a hook on fz itself would be called again while the adjoint is solved
        handed_on.register_hook(lambda g: _solve_adjoint(fz, z, g, adjoint))
        return handed_on

    return application


def _solve_adjoint(fz: Tensor, z: Tensor, g: Tensor, adjoint: Solver) -> Tensor:
    """Return v = g + (df/dz)^T v."""

    def transposed(v: Tensor, rows: Tensor | None) -> Tensor:
        full = v if rows is None else torch.zeros_like(g).index_copy(0, rows, v)  # (B, N, D)
        (product,) = torch.autograd.grad(fz, z, full, retain_graph=True)  # (B, N, D)
        fv = product + g
        return fv if rows is None else fv[rows]

    solution = adjoint(transposed, g)
    diverged = int(solution.diverged.sum())
    if diverged:
        warnings.warn(f"the adjoint diverged for {diverged} of {len(g)} samples", stacklevel=2)
    return solution.z
