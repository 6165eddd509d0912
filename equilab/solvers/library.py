"""Methods of torchdeq: it proposes the points, our record counts, measures and stops. The only importer of torchdeq."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from equilab.solvers.record import Record, Solution

if TYPE_CHECKING:
    from equilab.solvers.solver import Solver


@torch.no_grad()
def propose(f, init: Tensor, solver: Solver) -> Solution:
    """Return the solution over the points that torchdeq's Broyden, fixed-point or Anderson method visits.

    Its own stopping test looks at the whole batch and its counts are not those of f, so both are switched off: it runs
    in float32 at least, over the full batch, in which its methods treat the samples separately, while f is applied to
    the samples that still run, as often as asked for. Not differentiated.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchdeq.solver import anderson_solver, broyden_solver, fixed_point_iter
    method, options = {
        "broyden": (broyden_solver, {"max_iter": solver.iterations - 1}),
        "torchdeq_iterate": (fixed_point_iter, {"max_iter": solver.iterations}),
        "torchdeq_anderson": (
            anderson_solver,
            {"max_iter": solver.iterations, "m": solver.memory, "tau": solver.mixing},
        ),
    }[solver.method]
    record, kind = Record(init, solver), init.device.type
    lowered = torch.is_autocast_enabled(kind)

    def observed(x: Tensor) -> Tensor:
        if record.done:
            return x
        rows = record.active
        point = x.to(init.dtype)[rows]
        with torch.autocast(kind, enabled=lowered):
            fx, keep = record.apply(f, point)
        going = slice(None) if keep is None else keep
        return x.index_copy(0, rows[going], fx[going].to(x.dtype))

    with torch.autocast(kind, enabled=False):
        method(
            observed,
            init.to(torch.promote_types(init.dtype, torch.float32)),
            tol=0,
            return_final=True,
            **options,
        )
    return record.solution()
