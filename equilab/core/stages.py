"""The names of stages by what they make, and of the results that a notebook can show."""

from __future__ import annotations

from collections.abc import Iterable

from equilab.core.config import UserError, nearest

# stages whose runs make images
GENERATORS = ("teacher", "distill", "diffusion", "gan", "consistency", "progressive")
MEASUREMENTS = ("relative", "activation", "cost")
# claims, all of them or one paper's ("claims/get"), and those on seconds and memory
SHOWN = (*GENERATORS, *MEASUREMENTS, "claims", "measured")


def refuse_unknown(shown: Iterable[str], path: str) -> None:
    """Refuse names of results that no stage writes; `path` is of what says them.

    Raises: UserError with the nearest name.
    """
    for name in shown:
        if name not in SHOWN and not str(name).startswith("claims/"):
            raise UserError(f"{path}: {name!r} are no results of a stage{nearest(name, SHOWN)}")
