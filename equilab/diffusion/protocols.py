"""What denoisers, generators and samplers return: the words in which models and samplers talk to each other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from jaxtyping import Bool, Float, Float64
from torch import Tensor

from equilab.solvers import Solution


class Generated(NamedTuple):
    """What `generate(noise, label)` returns."""

    image: Float[Tensor, "*k b c h w"]  # in -1..1; of iterates, if these are asked for, one more dimension
    solution: Solution | None  # of an implicit model


class Denoised(NamedTuple):
    """What `denoise(x, sigma, label, carry=None)` returns."""

    image: Float[Tensor, "b c h w"]  # D(x; sigma)
    carry: Float[Tensor, "b n d"] | None  # where the next call starts its fixed point
    solution: Solution | None  # of an implicit model


class Step(NamedTuple):
    """What a sampler yields after a step."""

    x: Float64[Tensor, "b c h w"]  # where the step leads; after the last one the image, not clamped
    noise_level: float  # of the state that it left: sigma, or the timestep t
    image: Float[Tensor, "b c h w"]  # the image predicted there
    solutions: tuple[Solution, ...]  # of each call of an implicit network, in order
    diverged: Bool[Tensor, b]  # the state or a solution broke, in this step or before
    nfe: int  # calls of the network since the start


def finish(steps: Iterable[Step]) -> Step:
    """Run a sampler to its end; returns its last step, whose x is the image."""
    for step in steps:
        last = step
    return last


def not_finite(x: Float[Tensor, "b c h w"]) -> Bool[Tensor, b]:
    """Return which samples hold a number that is not finite."""
    return ~x.isfinite().flatten(1).all(1)  # (B,)
