"""Methods of torchdeq: it proposes the points, our record counts, measures and stops. The only importer of torchdeq."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from equilab.solvers.record import Record, Solution


@torch.no_grad()
def propose(method: str, f: Callable, record: Record, memory: int | None, mixing: float | None) -> Solution:
    """Return the solution over the points that torchdeq's Broyden, fixed-point or Anderson method visits.

    Its own stopping test looks at the whole batch and its counts are not those of f, so both are switched
    off: it runs in float32 at least, over the full batch, in which its methods treat the samples separately,
    while f is applied to the samples that still run, as often as asked for. Not differentiated.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchdeq.solver import anderson_solver, broyden_solver, fixed_point_iter
    visit = {
        "broyden": partial(broyden_solver, max_iter=record.limit - 1),
        "torchdeq_iterate": partial(fixed_point_iter, max_iter=record.limit),
        "torchdeq_anderson": partial(anderson_solver, max_iter=record.limit, m=memory, tau=mixing),
    }[method]
    init = record.init
    device = init.device.type
    lowered = torch.is_autocast_enabled(device)

    def observed(x: Tensor) -> Tensor:
        if record.done:
            return x
        rows = record.active
        with torch.autocast(device, enabled=lowered):
            fx, going = record.apply(f, x.to(init.dtype)[rows])
        if going is not None:
            rows, fx = rows[going], fx[going]
        return x.index_copy(0, rows, fx.to(x.dtype))

    wide = init.to(torch.promote_types(init.dtype, torch.float32))
    with torch.autocast(device, enabled=False):
        visit(observed, wide, tol=0, return_final=True)
    return record.solution()
