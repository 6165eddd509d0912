"""What a model costs by its shape: parameters and FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from equilab.core.config import Spec


def parameters(module: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def flops(call: Callable[[], object]) -> int:
    """Return the FLOPs of `call()`, counted by shape, on the meta device too.

    A multiply-accumulate of a matrix product, a convolution or attention is two; the rest is nothing.
    """
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


class Work(NamedTuple):
    """FLOPs by shape of a call, linear in the iterations of its fixed point; `per_iteration` is 0 where there is none."""

    fixed: int
    per_iteration: int = 0

    def flops(self, iterations: int | float = 0, calls: int = 1) -> int | float:
        """Return the FLOPs of calls that make so many iterations in all, a mean where samples differ."""
        return calls * self.fixed + self.per_iteration * iterations


def work(call: Callable[[int], object]) -> Work:
    """Return the Work of `call(iterations)`, counted at one iteration and at two."""
    once, twice = flops(lambda: call(1)), flops(lambda: call(2))
    return Work(2 * once - twice, twice - once)


class Cost(NamedTuple):
    """What a run costs by shape; a multiply-accumulate is two FLOPs."""

    parameters: int
    parameters_trained: int  # those that are not frozen
    image: Work  # of a call of a denoiser for an image; of an image of a generator
    train_flops_image: int | float | None  # of an update, for an image; None where it was not asked for


def network_on_meta(spec: Spec, image: tuple[int, ...], classes: int) -> nn.Module:
    """Return a network on the meta device, where shapes are computed and there are no numbers.

    Raises: UserError if its sizes do not fit.
    """
    with torch.device("meta"):
        return spec.build(image, classes)


def inputs_on_meta(
    image: tuple[int, ...], conditional: bool, batch: int = 1
) -> tuple[Float[Tensor, "b c h w"], Int64[Tensor, b] | None]:
    """Return images and labels on the meta device."""
    with torch.device("meta"):
        label = torch.zeros(batch, dtype=torch.int64) if conditional else None
        return torch.empty(batch, *image), label
