"""Discrete diffusion: an image turns to noise in T timesteps, and what is known of the way back.

At timestep t the state is x = sqrt(alpha_bar) image + sqrt(1 - alpha_bar) noise, alpha_bar falling with t;
its signal to noise ratio is alpha_bar / (1 - alpha_bar). A Chain is some of the timesteps;
`chain.at(position)` is the Level that the equations below take. They compute in float64 and return the dtype
of their first argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, repeat
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from pydantic import Field, model_validator
from torch import Tensor

from equilab.core.config import Params


class Diffusion(Params):
    """A diffusion of `timesteps` steps, and what a network predicts of it.

    "learned" variance: the network returns twice the channels, the prediction and then a value in about -1..1
    that moves the variance between its bounds, the "small" one (of x one step before, if the image is known)
    and the "large" one (beta).

    Raises: ValueError for betas that are no diffusion, an SNR that does not fall or ends at 0 where it must
        not, or an unknown prediction or variance.
    Source: DiT, section 3.1, for betas and variance; FPDM, section 4.1, for v and zero terminal SNR.
    """

    timesteps: int = Field(ge=2, le=1_000_000)  # 1000 published
    beta_start: float  # relative variance added by the first timestep; 0.0001 published
    beta_end: float  # and by the last; 0.02 published
    zero_terminal_snr: bool  # shift and scale sqrt(alpha_bar) so that the last timestep is noise alone
    prediction: Literal["noise", "v"]
    variance: Literal["learned", "small", "large"]

    @model_validator(mode="after")
    def _checked(self) -> Diffusion:
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start is {self.beta_start}, beta_end {self.beta_end}; give 0 < beta_start <= beta_end < 1"
            )
        if self.zero_terminal_snr and self.prediction == "noise":
            raise ValueError(
                "zero_terminal_snr is true, but at SNR 0 a noise prediction says nothing of the image; predict 'v'"
            )
        alpha_bar = self.alpha_bar()
        if not (alpha_bar.diff() < 0).all() or (alpha_bar[-1] == 0) != self.zero_terminal_snr:
            raise ValueError(
                f"the SNR reaches 0 before the last of {self.timesteps} timesteps; "
                f"lower beta_end={self.beta_end} or timesteps"
            )
        return self

    def alpha_bar(self) -> Float64[Tensor, t]:
        """Return the share of the image in the variance of x at every timestep, the products of 1 - beta.

        Source: "Common diffusion noise schedules are flawed" (Lin 2023), algorithm 1, for zero terminal SNR.
        """
        betas = torch.linspace(self.beta_start, self.beta_end, self.timesteps, dtype=torch.float64)
        alpha_bar = (1 - betas).cumprod(0)  # (T,)
        if not self.zero_terminal_snr:
            return alpha_bar
        root = alpha_bar.sqrt()  # (T,)
        return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2

    def chain(self, t: Sequence[int] | None = None) -> Chain:
        """Return the chain of the timesteps `t`, any that rise (None: all); between two of them, one long step.

        Raises: ValueError if `t` is empty, does not rise or leaves 0..timesteps - 1.
        """
        t = range(self.timesteps) if t is None else [int(i) for i in t]
        if not t or t[0] < 0 or t[-1] >= self.timesteps or any(a >= b for a, b in zip(t, t[1:])):
            raise ValueError(f"t is {list(t)}; give timesteps that rise within 0..{self.timesteps - 1}")
        chosen = torch.tensor(t, dtype=torch.int64)  # (S,)
        alpha_bar = self.alpha_bar()[chosen]
        before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        large = 1 - alpha_bar / before
        small = large * (1 - before) / (1 - alpha_bar)
        small[0] = small[1] if len(small) > 1 else large[0]  # it is 0, and its logarithm is wanted
        return Chain(self, chosen, torch.stack([alpha_bar, before, small.log(), large.log()]))


def evenly(timesteps: int, steps: int) -> list[int]:
    """Return `steps` timesteps from 0 to timesteps - 1, evenly spaced; a single one is the last.

    Raises: ValueError if not 1 <= steps <= timesteps.
    Source: the published code of DiT and FPDM, whose fractional stride is added up and then rounded.
    Differs: there a single step is timestep 0, where no noise has been added yet.
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps is {steps}, but {timesteps} timesteps have room for 1..{timesteps}")
    if steps == 1:
        return [timesteps - 1]
    stride = (timesteps - 1) / (steps - 1)
    return [round(t) for t in accumulate(repeat(stride, steps - 1), initial=0.0)]


class Level(NamedTuple):
    """Where samples stand in a chain: numbers of each, (B, 1, 1, 1) float64.

    `before` is alpha_bar of the next cleaner timestep of the chain, 1 at the cleanest. `log_small` is the log
    variance of x one step before, if the image is known (0 at the cleanest, so there it is that of the
    second), `log_large` that of the step itself: log beta.
    """

    alpha_bar: Tensor
    before: Tensor
    log_small: Tensor
    log_large: Tensor


class Chain(NamedTuple):
    """Timesteps of a diffusion, from the cleanest to the noisiest."""

    diffusion: Diffusion
    t: Int64[Tensor, s]  # what the network is called with
    levels: Float64[Tensor, "4 s"]  # the numbers of a Level, at each

    def at(self, position: Int64[Tensor, b]) -> Level:
        """Return the levels of positions in the chain, 0 the cleanest; in the chain of all timesteps, these are t."""
        return Level(*self.levels.to(position.device)[:, position, None, None, None])

    def split(self, output: Float[Tensor, "b o h w"], channels: int) -> tuple[Tensor, Tensor | None]:
        """Return the prediction (B, C, H, W) of a network's output, and the value of a learned variance or None.

        Raises: ValueError if the output does not have `channels`, those of an image, once or, to learn, twice.
        """
        learned = self.diffusion.variance == "learned"
        if output.shape[1] != channels * (1 + learned):
            raise ValueError(
                f"output has {output.shape[1]} channels, but with variance={self.diffusion.variance!r} and images of "
                f"{channels} it needs {channels * (1 + learned)}; build the network for this diffusion"
            )
        return output.chunk(2, 1) if learned else (output, None)

    def image(
        self, x: Float[Tensor, "b c h w"], prediction: Float[Tensor, "b c h w"], level: Level
    ) -> Tensor:
        """Return the image that a prediction for `x` implies."""
        if self.diffusion.prediction == "noise":
            return image_of_noise(x, prediction, level)
        return image_of_v(x, prediction, level)

    def log_variance(self, value: Float[Tensor, "b c h w"] | None, level: Level) -> Tensor:
        """Return the log variance of a step back: (B, C, H, W) if learned, else (B, 1, 1, 1).

        Source: "Improved denoising diffusion probabilistic models" (Nichol 2021), equation 15.
        """
        if value is None:
            return level.log_small if self.diffusion.variance == "small" else level.log_large
        share = (value.double() + 1) / 2
        return (share * level.log_large + (1 - share) * level.log_small).to(value.dtype)


def noised(
    image: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], level: Level
) -> Float[Tensor, "b c h w"]:
    """Return the noisy state x.

    Source: "Denoising diffusion probabilistic models" (Ho 2020), equation 4.
    """
    return (level.alpha_bar.sqrt() * image + (1 - level.alpha_bar).sqrt() * noise).to(image.dtype)


def velocity(
    image: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], level: Level
) -> Float[Tensor, "b c h w"]:
    """Return v, the noise turned by a right angle from x.

    Source: "Progressive distillation" (Salimans 2022), section 4.
    """
    return (level.alpha_bar.sqrt() * noise - (1 - level.alpha_bar).sqrt() * image).to(image.dtype)


def image_of_noise(
    x: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], level: Level
) -> Float[Tensor, "b c h w"]:
    """Return the image of a state whose noise is known; needs SNR above 0."""
    return ((x - (1 - level.alpha_bar).sqrt() * noise) / level.alpha_bar.sqrt()).to(x.dtype)


def image_of_v(
    x: Float[Tensor, "b c h w"], v: Float[Tensor, "b c h w"], level: Level
) -> Float[Tensor, "b c h w"]:
    """Return the image of a state whose v is known."""
    return (level.alpha_bar.sqrt() * x - (1 - level.alpha_bar).sqrt() * v).to(x.dtype)


def noise_of_image(
    x: Float[Tensor, "b c h w"], image: Float[Tensor, "b c h w"], level: Level
) -> Float[Tensor, "b c h w"]:
    """Return the noise of a state whose image is known."""
    return ((x - level.alpha_bar.sqrt() * image) / (1 - level.alpha_bar).sqrt()).to(x.dtype)


def posterior_mean(
    image: Float[Tensor, "b c h w"], x: Float[Tensor, "b c h w"], level: Level
) -> Float[Tensor, "b c h w"]:
    """Return the mean of the state one step before `x`, the image known; its log variance is `level.log_small`.

    Source: "Denoising diffusion probabilistic models" (Ho 2020), equation 7.
    """
    alpha = level.alpha_bar / level.before
    mean = level.before.sqrt() * (1 - alpha) * image + alpha.sqrt() * (1 - level.before) * x
    return (mean / (1 - level.alpha_bar)).to(image.dtype)
