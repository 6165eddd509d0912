"""Stage `pairs`: the teacher's image for every index; its noise is never stored, it is regenerated from the index."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from equilab.core import rng
from equilab.core.config import Params, plain
from equilab.core.files import publishing, scratch, write_json
from equilab.core.job import Job, Plan, folder_of
from equilab.core.machine import device_of, environment, identity, precision, rank, to_device
from equilab.data import shards
from equilab.data.images import to_uint8
from equilab.data.pairset import NOISE, labels, noise_checksum
from equilab.diffusion.protocols import finish
from equilab.diffusion.settings import Sampler
from equilab.models.checkpoint import load_network
from equilab.models.precond import EDM
from equilab.training.teacher import cost

Count = Annotated[int, Field(ge=1, le=10**10)]


class Config(Params):
    """The params section `pairs`."""

    count: Count  # pairs for training
    held_out: Count  # pairs before these, never trained on
    shard: Count  # images in a file
    batch: Count  # images through the teacher at once; part of what decides the bits
    dtype: Literal["uint8", "float16", "float32"]  # of the stored images
    precision: Literal["fp32", "tf32", "bf16"]  # of the teacher's network
    sampler: Sampler

    @model_validator(mode="after")
    def _shards(self):
        if self.shard % self.batch:
            raise ValueError(f"shard ({self.shard}) must be a multiple of batch ({self.batch})")
        if self.total % self.shard:
            raise ValueError(f"count + held_out ({self.total}) must be a multiple of shard ({self.shard})")
        return self

    @property
    def total(self) -> int:
        """All pairs."""
        return self.count + self.held_out


def plan(config: Config, job: Job) -> Callable[[], Plan]:
    """Check the config and return the estimate of its cost: that of all pairs, those that are already there included."""

    def count() -> Plan:
        counted = cost(job.read("teacher"), job.image, job.classes)
        work = float(counted.image.flops(calls=config.sampler.nfe)) * config.total
        disk, calls = config.total * _row_bytes(config, job.image), config.sampler.nfe * config.total
        return Plan(counted.parameters, work, disk, images=config.total, teacher_calls=calls)

    return count


def _row_bytes(config: Config, shape: tuple[int, ...]) -> int:
    """Return the bytes of a stored image."""
    return math.prod(shape) * np.dtype(config.dtype).itemsize


def run(config: Config, job: Job) -> None:
    """Write the shards of images and `meta.json` into results/pairs.

    Shards live in a scratch folder that outlasts the stage and are linked into the results, so that a killed run
    continues where it stopped and a larger `count` adds to what is there.

    Raises: UserError if the teacher is missing, or there is too little disk.
    """
    net, about = load_network(folder_of("teacher") / "weights.safetensors", job.read("teacher"))
    shape, classes, counts = tuple(about["image"]), about["classes"], about.get("label_counts")
    recipe = {k: v for k, v in plain(config).items() if k not in ("count", "held_out")}
    parts = identity(job, recipe, about["checksum"] if counts is None else (about["checksum"], counts))
    device = device_of(job)
    denoise = EDM(net, sigma_data=about["config"]["sigma_data"]).to(device)

    @torch.inference_mode()
    def images(indices: np.ndarray) -> np.ndarray:
        noise = torch.from_numpy(rng.noise(job.study.seed, NOISE, indices, shape))
        label = labels(job.study.seed, indices, classes, counts=counts)
        with precision(config.precision, device)():
            image = finish(config.sampler.start(denoise, *to_device((noise, label), device))).x
        image = to_uint8(image) if config.dtype == "uint8" else image.to(getattr(torch, config.dtype))
        return image.cpu().numpy()

    sizes = {"count": config.total, "shard": config.shard, "batch": config.batch}
    with scratch(job, parts, keep=True) as folder, publishing(job.out, own="images-*.npy") as fresh:
        made = shards.make(job, folder, "images", images, row_bytes=_row_bytes(config, shape), **sizes)
        if rank() == 0:
            meta = _meta(config, job, shards.publish(made, fresh), about)
            write_json(fresh / "meta.json", meta)
            print(f"pairs: {config.count:,} for training, {config.held_out:,} held out, in {job.out}")


def _meta(config: Config, job: Job, checksums: dict[str, str], about: dict) -> dict[str, Any]:
    """Return what meta.json says of the shards, by their checksums; `about` is what is known of the teacher."""
    described = {name: {"images": config.shard, "sha256": found} for name, found in checksums.items()}
    meta = {
        "count": config.count,
        "held_out": config.held_out,
        "shard": config.shard,
        "dtype": config.dtype,
        "shape": about["image"],
        "classes": about["classes"],
        "seed": job.study.seed,
        "shards": described,
        "noise_checksum": noise_checksum(job.study.seed, tuple(about["image"])),
        "teacher": about["checksum"],
        "sampler": config.sampler,
        "nfe_image": config.sampler.nfe,
        "nfe": config.sampler.nfe * config.total,
        "environment": environment(job, processes=1),
    }
    if "label_counts" in about:
        meta["label_counts"] = about["label_counts"]
    return meta
