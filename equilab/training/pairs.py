"""Stage `pairs`: the teacher's image for every index; its noise is never stored, it is regenerated from the index."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from equilab.core import rng
from equilab.core.config import Params, plain
from equilab.core.files import (
    is_intact,
    link,
    remove_others,
    require_disk,
    scratch,
    write,
    write_array,
    write_json,
)
from equilab.core.job import Job, Plan, folder_of
from equilab.core.machine import barrier, device_of, environment, identity, precision, rank, world
from equilab.core.progress import bar
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
        if (self.count + self.held_out) % self.shard:
            raise ValueError(
                f"count + held_out ({self.count + self.held_out}) must be a multiple of shard ({self.shard})"
            )
        return self


def plan(config: Config, job: Job) -> Callable[[], Plan]:
    """Check the config and return the estimate of its cost: that of all pairs, those that are already there included."""

    def count() -> Plan:
        total, counted = config.count + config.held_out, cost(job.read("teacher"), job.image, job.classes)
        work = float(counted.image.flops(calls=config.sampler.nfe)) * total
        disk = total * int(np.prod(job.image)) * np.dtype(config.dtype).itemsize
        calls = config.sampler.nfe * total
        return Plan(counted.parameters, work, disk, images=total, teacher_calls=calls)

    return count


def run(config: Config, job: Job) -> None:
    """Write the shards of images and `meta.json` into results/pairs.

    Shards live in a scratch folder that outlasts the stage and are linked into the results, so that a killed run
    continues where it stopped and a larger `count` adds to what is there.

    Raises: UserError if the teacher is missing, or there is too little disk.
    """
    net, about = load_network(folder_of("teacher") / "weights.safetensors", job.read("teacher"))
    shape, classes, counts = tuple(about["image"]), about["classes"], about.get("label_counts")
    total = config.held_out + config.count
    size = np.dtype(config.dtype).itemsize * int(np.prod(shape))
    recipe = {k: v for k, v in plain(config).items() if k not in ("count", "held_out")}
    parts = identity(job, recipe, about["checksum"] if counts is None else (about["checksum"], counts))
    del parts["processes"]  # any number of them writes the same bytes
    device = device_of(job)
    denoise = EDM(net, sigma_data=about["config"]["sigma_data"]).to(device)
    with scratch(job, parts, keep=True) as folder:
        shards = [folder / f"images-{start:010d}.npy" for start in range(0, total, config.shard)]
        missing = [k for k, path in enumerate(shards) if not is_intact(path)]
        require_disk(folder, len(missing) * config.shard * size)
        with bar(job.name, total, done=total - len(missing) * config.shard) as progress:
            for k in missing[rank() :: world()]:
                blocks = []
                for start in range(k * config.shard, (k + 1) * config.shard, config.batch):
                    block = _block(config, denoise, job.study.seed, start, shape, classes, counts, device)
                    blocks.append(block)
                    progress.update(config.batch)
                write(shards[k].with_suffix(".sha256"), write_array(shards[k], np.concatenate(blocks)))
        barrier()
        if rank() == 0:
            _publish(config, job, shards, shape, classes, about)


def _block(config, denoise, seed, start, shape, classes, counts, device) -> np.ndarray:
    """Return the images (batch, C, H, W) of the pairs start..start+batch-1, in the stored type."""
    indices = np.arange(start, start + config.batch)
    noise = torch.from_numpy(rng.noise(seed, NOISE, indices, shape)).to(device)
    label = labels(seed, indices, classes, counts=counts)
    with torch.inference_mode(), precision(config.precision, device)():
        image = finish(config.sampler.start(denoise, noise, label if label is None else label.to(device))).x
    image = to_uint8(image) if config.dtype == "uint8" else image.to(getattr(torch, config.dtype))
    return image.cpu().numpy()


def _publish(config: Config, job: Job, shards: list[Path], shape, classes: int, about: dict) -> None:
    """Link the shards into the results and describe them in meta.json."""
    job.out.mkdir(parents=True, exist_ok=True)
    described = {}
    for path in shards:
        link(path, job.out)
        described[path.name] = {
            "images": config.shard,
            "sha256": path.with_suffix(".sha256").read_text(encoding="utf-8"),
        }
    total = config.held_out + config.count
    meta = {
        "count": config.count,
        "held_out": config.held_out,
        "shard": config.shard,
        "dtype": config.dtype,
        "shape": shape,
        "classes": classes,
        "seed": job.study.seed,
        "shards": described,
        "noise_checksum": noise_checksum(job.study.seed, shape),
        "teacher": about["checksum"],
        "sampler": config.sampler,
        "nfe_image": config.sampler.nfe,
        "nfe": config.sampler.nfe * total,
        "environment": environment(job),
    }
    if "label_counts" in about:
        meta["label_counts"] = about["label_counts"]
    write_json(job.out / "meta.json", meta)
    remove_others(job.out, described, "images-*.npy")
