"""How a run is optimised: its settings, and the learning rate and the averaging that follow from the images seen."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from equilab.core.config import Params

ImageCount = Annotated[int, Field(ge=1, le=10**10)]
BatchSize = Annotated[int, Field(ge=1, le=10**6)]
LearningRate = Annotated[float, Field(ge=1e-9, le=10)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimisation(Params):
    """How a run is optimised; every count is in images seen (`nimg`)."""

    nimg: ImageCount  # in all
    batch: BatchSize  # images in an update
    micro_batch: BatchSize  # images in a forward pass; batch / micro_batch passes are accumulated
    lr: LearningRate  # peak learning rate of AdamW
    betas: tuple[Beta, Beta]
    weight_decay: float = Field(ge=0, le=100)
    clip: Annotated[float, Field(ge=1e-6, le=1e6)] | None  # largest norm of the gradient
    warmup_nimg: int = Field(ge=0, le=10**10)  # images of linear warm-up
    decay: Literal["none", "linear", "cosine"]  # to 0 at nimg
    decay_start_nimg: int = Field(ge=0, le=10**10)  # where the decay starts
    ema_half_life_nimg: float = Field(ge=1e-3, le=1e10)  # half-life of the averaged weights
    ema_warmup: float = Field(ge=0, le=1)  # the half-life's largest share of the images seen; 0: no limit
    precision: Literal["fp32", "tf32", "bf16"]
    compile: bool
    report_nimg: ImageCount  # between two reports; at each the loss is checked and the state saved
    snapshots: tuple[ImageCount, ...]  # counts at which the averaged weights are kept, for learning curves

    @model_validator(mode="after")
    def _fits(self):
        if self.batch % self.micro_batch:
            raise ValueError(f"batch ({self.batch}) must be a multiple of micro_batch ({self.micro_batch})")
        for name in ("nimg", "report_nimg"):
            if getattr(self, name) % self.batch:
                raise ValueError(f"{name} ({getattr(self, name)}) must be a multiple of batch ({self.batch})")
        if self.nimg % self.report_nimg:
            raise ValueError(f"nimg ({self.nimg}) must be a multiple of report_nimg ({self.report_nimg})")
        for count in self.snapshots:
            if count % self.report_nimg or count > self.nimg:
                raise ValueError(
                    f"snapshots: {count} must be a multiple of report_nimg ({self.report_nimg}) up to nimg"
                )
        if self.decay != "none" and self.decay_start_nimg >= self.nimg:
            raise ValueError(
                f"decay_start_nimg ({self.decay_start_nimg}) must be less than nimg ({self.nimg})"
            )
        return self


def learning_rate(config: Optimisation, nimg: int) -> float:
    """Return the learning rate of the update that starts with `nimg` images seen."""
    warm = min(1.0, (nimg + config.batch) / config.warmup_nimg) if config.warmup_nimg else 1.0
    rate = config.lr * warm
    if config.decay == "none" or nimg < config.decay_start_nimg:
        return rate
    passed = (nimg - config.decay_start_nimg) / (config.nimg - config.decay_start_nimg)
    if config.decay == "linear":
        return rate * (1 - passed)
    return rate * (0.5 * (1 + math.cos(math.pi * passed)))


def ema_decay(config: Optimisation, nimg: int) -> float:
    """Return the decay of the averaged weights after the update that starts with `nimg` images seen.

    0.5^(batch / min(half-life, warm-up * nimg)); 0 at the first update if there is a warm-up.

    Source: EDM's training; the published GET keeps 0.9999 a step of 128, a half-life of 887,184 images, no warm-up.
    """
    half_life = config.ema_half_life_nimg
    if config.ema_warmup:
        half_life = min(half_life, config.ema_warmup * nimg)
    return 0.5 ** (config.batch / half_life) if half_life else 0.0
