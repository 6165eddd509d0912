"""What a model costs by its shape: parameters and FLOPs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from equilab.core.config import plain


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


def counted_once(count: Callable) -> Callable:
    """Return `count(config, image, classes)` with a memory: counting takes a second, and runs share what it depends on.

    It must not depend on the config's seed, optimisation or number of pairs.
    """
    known: dict[str, Any] = {}

    @functools.wraps(count)
    def remembered(config, image: tuple[int, ...], classes: int):
        matters = {
            key: value for key, value in plain(config).items() if key not in ("seed", "optimisation", "pairs")
        }
        key = repr((matters, tuple(image), classes))
        if key not in known:
            known[key] = count(config, image, classes)
        return known[key]

    return remembered
