"""Noise schedules: which noise levels a sampler visits."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor


def edm_sigmas(steps: int, *, sigma_min: float, sigma_max: float, rho: float) -> Float64[Tensor, n]:
    """Return the noise levels (steps + 1,) of a sampler: sigma_max down to sigma_min, evenly in sigma^(1/rho), then 0.

    A single step goes from sigma_max to 0.

    Raises: ValueError if not steps >= 1, 0 < sigma_min < sigma_max < 1e6 and 0.01 <= rho <= 1000.
    Source: EDM, equation 5.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} leaves nothing to sample; give 1 or more")
    if not (0 < sigma_min < sigma_max < 1e6 and 0.01 <= rho <= 1e3):
        raise ValueError(
            f"sigma_min={sigma_min}, sigma_max={sigma_max}, rho={rho} is no schedule; "
            "give 0 < sigma_min < sigma_max < 1e6 and rho in 0.01..1000"
        )
    fraction = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = (high + fraction * (low - high)) ** rho  # (steps,)
    return torch.cat([sigmas, sigmas.new_zeros(1)])  # (steps + 1,)
