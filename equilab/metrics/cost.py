"""What a model costs: parameters and FLOPs, counted."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def parameters(module: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def flops(call: Callable[[], object]) -> int:
    """Return the FLOPs of `call()`, counted by shape: two for each multiply-accumulate of matrix products, convolutions
    and attention, nothing for the rest. Works on the meta device.
    """
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()
