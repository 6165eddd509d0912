"""Stage `latents`: the training images of a study encoded once by a VAE; and the way back, from latents to pixels."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from torch import Tensor, nn

from equilab.core import rng
from equilab.core.checked import read_array
from equilab.core.config import Params, UserError, read_json, sentences, unreadable, unusable
from equilab.core.files import publishing, scratch, sha256_of, write_json
from equilab.core.job import Job, Plan, folder_of
from equilab.core.machine import barrier, device_of, environment, identity, rank
from equilab.data import images as data
from equilab.data import shards
from equilab.data.images import to_float, to_uint8
from equilab.models.checkpoint import checksum

SHARD = 1024  # latents in a file
DECODED = 8  # latents through a VAE at once, where params do not say


class Config(Params):
    """The params section `latents`; a study without it works in pixels."""

    vae: str  # folder of an AutoencoderKL as diffusers saves it, from the study's folder or absolute
    shape: tuple[PositiveInt, PositiveInt, PositiveInt]  # of a latent
    batch: PositiveInt  # images through the VAE at once; part of what decides the bits

    @field_validator("batch")
    @classmethod
    def _divides(cls, batch: int) -> int:
        if SHARD % batch:
            raise ValueError(f"must divide {SHARD}, got {batch}")
        return batch


Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Channels = Annotated[int, Field(ge=1, le=4096)]


class VAEConfig(BaseModel):
    """What the config.json of an AutoencoderKL says of sizes, and of how latents are scaled; the rest diffusers checks."""

    model_config = ConfigDict(strict=True, extra="allow")

    class_name: Literal["AutoencoderKL"] = Field(alias="_class_name")
    in_channels: Channels = 3
    out_channels: Channels = 3
    latent_channels: Channels = 4
    block_out_channels: Annotated[list[Channels], Field(min_length=1, max_length=8)] = [64]
    layers_per_block: Annotated[int, Field(ge=1, le=16)] = 1
    scaling_factor: Positive = 0.18215
    shift_factor: Finite | None = None
    latents_mean: list[Finite] | None = None
    latents_std: list[Positive] | None = None

    @model_validator(mode="after")
    def _scaling(self):
        mean, deviation = self.latents_mean, self.latents_std
        if (mean is None) != (deviation is None):
            raise ValueError("latents_mean and latents_std are given together or not at all")
        if mean is not None and self.shift_factor is not None:
            raise ValueError("shift_factor and latents_mean both say what is subtracted")
        if mean is not None and {len(mean), len(deviation)} != {self.latent_channels}:
            raise ValueError("latents_mean and latents_std need a value for each latent channel")
        return self


class VAE(NamedTuple):
    """An AutoencoderKL in evaluation mode; latents are (encoded - center) * scale, per channel (C, 1, 1).

    Source: diffusers, its pipelines of Stable Diffusion 3 (shift_factor) and XL (latents_mean, latents_std).
    """

    net: nn.Module
    center: Tensor
    scale: Tensor

    def encode(self, image: Tensor, noise: Tensor) -> Tensor:
        """Return the latents of images in -1..1: draws from the posterior, by unit noise of their shape."""
        posterior = self.net.encode(image).latent_dist
        return (posterior.mean + posterior.std * noise - self.center) * self.scale

    def decode(self, latent: Tensor) -> Tensor:
        """Return the images of latents."""
        return self.net.decode(latent.float() / self.scale + self.center).sample

    def checksum(self) -> str:
        """Return what changes with the weights or the scaling."""
        return checksum({**self.net.state_dict(), "center": self.center, "scale": self.scale})


class Pixels(NamedTuple):
    """How the images that a model makes become pixels: their shape (C, H, W), and a map to uint8 (..., C, H, W)."""

    shape: tuple[int, ...]
    decode: Callable[[Tensor], Tensor]


class Encoded:
    """The latents that the stage wrote into a folder, one for each training image, memory-mapped.

    Raises: UserError naming the file that is missing or damaged, or if they are not those of the data.
    """

    def __init__(self, folder: Path):
        content = {"shape": list[int], "count": int, "data": str, "shards": dict[str, str]}
        path = folder / "meta.json"
        meta = read_json(path, **content)
        if meta["data"] != sha256_of(folder_of("data") / "meta.json"):
            raise unusable(path, "was made of other images than results/data")
        self.shape, self.shards, left = tuple(meta["shape"]), [], meta["count"]
        for name, sha256 in meta["shards"].items():
            count = min(SHARD, left)
            self.shards.append(read_array(folder / name, (count, *self.shape), np.float32, sha256))
            left -= count
        if left:
            raise unreadable(path, "its shards hold another number of latents than it says")

    def read(self, items: np.ndarray) -> Tensor:
        """Return the latents (B, C, H, W) float32 of these training images."""
        return torch.from_numpy(np.stack([self.shards[item // SHARD][item % SHARD] for item in items]))


def plan(config: Config, job: Job) -> Callable[[], Plan]:
    """Check the config and return the estimate of its cost; how many images there are is not known before they are read.

    Raises: UserError if there is no VAE, or it does not turn the study's images into such latents.
    """
    open_vae(config, job.image)
    return partial(Plan, disk=None)


def run(config: Config, job: Job) -> None:
    """Encode every training image: a draw from the VAE's posterior, its noise a function of (seed, index), scaled as the
    VAE says, as float32 in shards. A killed run continues with the shard that it was at.

    Raises: UserError if there is no such VAE, the data are missing, or there is too little disk.
    Source: FPDM (Bai and Melas-Kyriazi 2024), section 4.1, after "High-resolution image synthesis with latent diffusion
        models" (Rombach 2022), section 3.1.
    """
    images = data.load(folder_of("data"), "train", verify=True).images
    device = device_of(job)
    vae = open_vae(config, images.shape[1:], device)
    about = {
        "data": sha256_of(folder_of("data") / "meta.json"),
        "vae": vae.checksum(),
        "shape": config.shape,
    }

    @torch.inference_mode()
    def encoded(items: np.ndarray) -> np.ndarray:
        noise = torch.from_numpy(rng.noise(job.study.seed, "latents", items, config.shape)).to(device)
        image = to_float(torch.from_numpy(images[items])).to(device)
        return vae.encode(image, noise).cpu().numpy()

    sizes = {"count": len(images), "shard": SHARD, "batch": config.batch}
    with scratch(job, identity(job, config, about)) as folder, publishing(job.out, "latents-*.npy") as fresh:
        made = shards.make(job, folder, "latents", encoded, row_bytes=4 * math.prod(config.shape), **sizes)
        if rank() == 0:
            about["shards"] = shards.publish(made, fresh)
            meta = {**about, "count": len(images), "environment": environment(job, processes=1)}
            write_json(fresh / "meta.json", meta)
            print(f"latents: {len(images):,} of training images, in {job.out}")
        barrier()


def shape_of(read: Callable, image: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of what denoisers of discrete timesteps see: latents, or the study's images."""
    config = read("latents")
    return image if config is None else config.shape


def pixels(job: Job, shape: tuple[int, ...], latent: bool, device: torch.device) -> Pixels:
    """Return how what a run makes becomes pixels; with `latent` it works in latents, if the study has them.

    Raises: UserError if there is no such VAE, or it is not the one that made the latents.
    """
    config = job.read("latents") if latent else None
    if config is None:
        return Pixels(shape, to_uint8)
    vae, path = open_vae(config, job.image, device), folder_of("latents") / "meta.json"
    if read_json(path, vae=str)["vae"] != vae.checksum():
        raise unusable(path, f"was made by another VAE than {config.vae} holds")
    return Pixels(job.image, partial(_decoded, vae, config.batch))


def decoder(folder: Path, shape: tuple[int, ...], device: torch.device) -> Pixels:
    """Return how latents of a shape become pixels by the VAE in a folder.

    Raises: UserError if there is no such VAE, or it makes other latents.
    """
    about = _read_config(folder)
    grows = 2 ** (len(about.block_out_channels) - 1)
    image = (about.out_channels, *(size * grows for size in shape[1:]))
    vae = open_vae(Config(vae=str(folder), shape=shape, batch=DECODED), image, device)
    return Pixels(image, partial(_decoded, vae, DECODED))


@torch.inference_mode()
def _decoded(vae: VAE, batch: int, latent: Tensor) -> Tensor:
    """Return the pixels of latents (..., C, H, W), uint8."""
    parts = latent.flatten(0, -4).split(batch)
    images = torch.cat([to_uint8(vae.decode(part).clamp(-1, 1)) for part in parts])
    return images.reshape(*latent.shape[:-3], *images.shape[1:])


def open_vae(config: Config, image: tuple[int, ...], device: torch.device | str = "cpu") -> VAE:
    """Return the VAE of a study for images (C, H, W).

    Raises: UserError if it is not there, cannot be read, or does not fit.
    """
    path = Path(config.vae)
    about = _read_config(path)
    shrinks = 2 ** (len(about.block_out_channels) - 1)
    if {about.in_channels, about.out_channels} != {image[0]} or any(size % shrinks for size in image[1:]):
        raise UserError(
            f"latents.vae: the VAE in {path} takes images of {about.in_channels} channels and sizes that "
            f"{shrinks} divides, and makes {about.out_channels} channels, data.image is {list(image)}; give another VAE"
        )
    found = (about.latent_channels, *(size // shrinks for size in image[1:]))
    if found != config.shape:
        raise UserError(
            f"latents.shape is {list(config.shape)}, the VAE in {path} makes {list(found)}; set it to that"
        )
    center = about.latents_mean or [about.shift_factor or 0.0] * about.latent_channels
    deviation = about.latents_std or [1.0] * about.latent_channels
    per_channel = torch.tensor([center, deviation]).reshape(2, -1, 1, 1).to(device)
    return VAE(_load(path).to(device), per_channel[0], about.scaling_factor / per_channel[1])


def _read_config(path: Path) -> VAEConfig:
    """Return what the config.json of a VAE says.

    Raises: UserError if it is not there, damaged, of another class, or has a key that diffusers would pass over.
    """
    from diffusers import AutoencoderKL

    if not (path / "config.json").exists():
        raise UserError(
            f"latents.vae: {path} holds no VAE; place there the files config.json and diffusion_pytorch_model.safetensors of an "
            "AutoencoderKL, for the paper's latents those of stabilityai/sd-vae-ft-ema, or change the key"
        )
    try:
        about = VAEConfig.model_validate_json((path / "config.json").read_bytes())
    except ValidationError as error:
        mistake = sentences(VAEConfig, error, f"latents.vae: {path / 'config.json'}")[0]
        raise UserError(f"{mistake}; correct it, or fetch its files again") from None
    known = inspect.signature(AutoencoderKL.__init__).parameters
    for key in about.model_extra:
        if key not in known and not key.startswith("_"):
            raise UserError(
                f"latents.vae: config.json in {path} has the key {key!r}, which this version of diffusers passes over; "
                "correct it, or install a version that knows it"
            )
    return about


def _load(path: Path) -> nn.Module:
    """Return the VAE of a folder, in evaluation mode.

    Raises: UserError if its weights cannot be read or are not those of its config.
    """
    from diffusers import AutoencoderKL

    try:
        vae, mismatch = AutoencoderKL.from_pretrained(
            str(path),
            local_files_only=True,
            low_cpu_mem_usage=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # one of a dozen types, by what is wrong in the config
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"latents.vae: the VAE in {path} cannot be read ({reason}); fetch its files again"
        ) from None
    for keys, what in (("missing_keys", "lack"), ("unexpected_keys", "have, against its config.json,")):
        if mismatch[keys]:
            raise UserError(
                f"latents.vae: the weights in {path} {what} {sorted(mismatch[keys])[0]}; fetch its files again"
            )
    return vae.eval().requires_grad_(False)
