"""Noise/image pairs as training reads them: images from shards, noise from its index."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from equilab.core import rng
from equilab.core.checked import read_array
from equilab.core.config import UserError, plain, read_json, unreadable, unusable
from equilab.core.job import Job, folder_of
from equilab.data.images import require_same, to_float
from equilab.models.checkpoint import read_metadata

NOISE, LABEL = "pair noise", "pair label"  # purposes of the random numbers of a pair


class Shard(BaseModel):
    """What meta.json says of a file of images."""

    images: int
    sha256: str


CONTENT = {  # of meta.json
    "count": int,
    "held_out": int,
    "classes": int,
    "shape": list[int],
    "seed": int,
    "shard": int,
    "dtype": Literal["uint8", "float16", "float32"],
    "shards": dict[str, Shard],
    "noise_checksum": str,
    "teacher": str,
}


class Pairs(NamedTuple):
    """Pairs at some indices: unit noise and image in -1..1 (B, C, H, W) float32, label (B,) int64 or None."""

    noise: Tensor
    image: Tensor
    label: Tensor | None


class PairSet:
    """The pairs that the stage wrote, read at random without loading the set: `read(indices)`.

    Indices 0..held_out-1 are held out, the `count` after them are for training.

    Raises: UserError if a file is missing or damaged, or the noise cannot be regenerated as it was.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "meta.json"
        self.meta = read_json(self.path, **CONTENT)
        self.count, self.held_out, self.classes = (self.meta[key] for key in ("count", "held_out", "classes"))
        self.shape, self.seed = tuple(self.meta["shape"]), self.meta["seed"]
        self.label_counts = self.meta.get("label_counts")
        if len(self.meta["shards"]) * self.meta["shard"] != self.count + self.held_out:
            raise unreadable(self.path, "its shards hold another number of pairs than it says")
        self.images = [self._read(name) for name in self.meta["shards"]]
        if noise_checksum(self.seed, self.shape) != self.meta["noise_checksum"]:
            raise UserError(
                f"{folder}: noise regenerated from its index differs from when the pairs were made; "
                "install the numpy version of the lock file, or make the pairs anew"
            )

    def check(self, job: Job) -> None:
        """Compare how the pairs were made, as meta.json says, with params as they are: seed, numbers, type, sampler, labels, teacher.

        It does not say the batch and the precision, on which their last bits depend too.

        Raises: UserError naming the key that differs.
        """
        config = job.read("pairs")
        now = {
            f"pairs.{key}": plain(getattr(config, key)) for key in ("count", "held_out", "dtype", "sampler")
        }
        for key, value in {"study.seed": job.study.seed, **now}.items():
            if value != (before := self.meta.get(key.partition(".")[2])):
                raise unusable(self.path, f"was made with {before}, but {key} is {value}")
        wanted = job.read("data").labels
        if (wanted == "frequency") != (self.label_counts is not None):
            raise UserError(
                f"data.labels is {wanted}, but {self.folder} was made otherwise; run the stages from `data` again"
            )
        weights = folder_of("teacher") / "weights.safetensors"
        if not weights.exists():
            return  # pairs alone can be trained on too
        teacher = read_metadata(weights)
        require_same(weights, teacher)
        if teacher["checksum"] != self.meta["teacher"]:
            raise unusable(self.path, f"was made by another teacher than {weights}")

    def _read(self, name: str, sha256: str | None = None) -> np.ndarray:
        shape = self.meta["shard"], *self.shape
        return read_array(self.folder / name, shape, self.meta["dtype"], sha256)

    def verify(self) -> None:
        """Read every shard and compare its checksum.

        Raises: UserError naming the shard that differs.
        """
        for name, shard in self.meta["shards"].items():
            self._read(name, shard["sha256"])

    def read(self, indices: np.ndarray) -> Pairs:
        """Return the pairs at `indices` (0..held_out+count-1)."""
        shard, row = np.divmod(indices, self.meta["shard"])
        image = torch.from_numpy(np.stack([self.images[s][r] for s, r in zip(shard, row)]))  # (B, C, H, W)
        image = to_float(image) if image.dtype == torch.uint8 else image.float()
        noise = torch.from_numpy(rng.noise(self.seed, NOISE, indices, self.shape))
        return Pairs(noise, image, labels(self.seed, indices, self.classes, counts=self.label_counts))


def labels(
    seed: int,
    indices: rng.Indices,
    classes: int,
    purpose: str = LABEL,
    counts: Sequence[int] | None = None,
) -> Tensor | None:
    """Return classes (B,) int64, each a function of its index, or None without classes.

    They are uniform or, given how many training images each class has, as frequent as there.
    """
    if not classes:
        return None
    if counts is None:
        return torch.from_numpy(rng.integers(seed, purpose, indices, classes))
    # which training image has the label, in the order of their classes
    image = rng.integers(seed, purpose, indices, sum(counts))
    return torch.from_numpy(np.searchsorted(np.cumsum(counts), image, side="right"))


def noise_checksum(seed: int, shape: tuple[int, ...]) -> str:
    """Return what tells that the noise of a pair is regenerated as it was."""
    return hashlib.sha256(rng.noise(seed, NOISE, [0], shape).tobytes()).hexdigest()
