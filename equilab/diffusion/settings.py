"""How a denoiser of noise levels is sampled, as params say it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Literal

from jaxtyping import Float, Float64, Int64
from pydantic import Field, model_validator
from torch import Tensor

from equilab.core.config import Params
from equilab.diffusion.protocols import Step
from equilab.diffusion.samplers import euler, heun
from equilab.diffusion.schedules import edm_sigmas

Level = Annotated[float, Field(ge=1e-6, le=1e6)]  # a noise level


class Sampler(Params):
    """How a denoiser of noise levels is sampled, without fresh noise on the way: a pair needs a deterministic image."""

    method: Literal["heun", "euler"]
    steps: Annotated[int, Field(ge=1, le=100_000)]
    sigma_min: Level
    sigma_max: Level
    rho: Annotated[float, Field(ge=0.01, le=1000)]

    @model_validator(mode="after")
    def _levels_fall(self):
        self.sigmas()
        return self

    def sigmas(self) -> Float64[Tensor, n]:
        """Return the noise levels, (steps + 1,)."""
        return edm_sigmas(self.steps, sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho)

    @property
    def nfe(self) -> int:
        """Calls of the denoiser for an image: 2 steps - 1 for Heun."""
        return 2 * self.steps - 1 if self.method == "heun" else self.steps

    def start(
        self, denoise: Callable, noise: Float[Tensor, "b c h w"], label: Int64[Tensor, b] | None
    ) -> Iterator[Step]:
        """Return the sampler, started: it yields a Step a step."""
        follow = heun if self.method == "heun" else euler
        return follow(denoise, noise, self.sigmas(), label)
