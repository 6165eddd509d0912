"""Stage `latents`: the training images of a study encoded once by a VAE; and the way back, from latents to pixels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import PositiveInt, field_validator
from torch import Tensor, nn

from equilab.core import rng
from equilab.core.config import Params, UserError, read_json
from equilab.core.files import (
    is_intact,
    link,
    remove_others,
    require_disk,
    scratch,
    sha256_of,
    write,
    write_array,
    write_json,
)
from equilab.core.job import Job, Plan, folder_of
from equilab.core.machine import barrier, device_of, environment, identity, rank, world
from equilab.core.progress import bar
from equilab.data import images as data
from equilab.data.images import to_float, to_uint8
from equilab.models.checkpoint import checksum

SHARD = 1024  # latents in a file


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


class Pixels(NamedTuple):
    """How the images that a model makes become pixels: their shape (C, H, W), and a map to uint8 (..., C, H, W)."""

    shape: tuple[int, ...]
    decode: Callable[[Tensor], Tensor]


class Encoded:
    """The latents that the stage wrote into a folder, one for each training image, memory-mapped.

    Raises: UserError naming the file that is missing or damaged, or if they are not those of the data.
    """

    def __init__(self, folder: Path):
        meta = read_json(folder / "meta.json", "shape", "count", "data", "shards")
        if meta["data"] != sha256_of(folder_of("data") / "meta.json"):
            raise UserError(
                f"{folder} holds latents of other images than results/data; run the stage latents again"
            )
        self.shape, self.shards, left = tuple(meta["shape"]), [], meta["count"]
        for name, sha256 in meta["shards"].items():
            if not (folder / name).exists() or sha256_of(folder / name) != sha256:
                raise UserError(f"{folder / name} is missing or damaged; run the stage latents again")
            self.shards.append(np.load(folder / name, mmap_mode="r"))
            left -= len(self.shards[-1])
        if left:
            raise UserError(
                f"{folder} does not hold as many latents as its meta.json says; run the stage latents again"
            )

    def read(self, items: np.ndarray) -> Tensor:
        """Return the latents (B, C, H, W) float32 of these training images."""
        return torch.from_numpy(np.stack([self.shards[item // SHARD][item % SHARD] for item in items]))


def plan(config: Config, job: Job) -> Callable[[], Plan]:
    """Return what estimates the stage's cost; how many images there are is not known before they are read.

    Raises: UserError if there is no VAE, or it does not turn the study's images into such latents.
    """
    _vae(config, job.image)
    return partial(Plan, disk=None)


def run(config: Config, job: Job) -> None:
    """Encode every training image: a draw from the VAE's posterior, its noise a function of (seed, index), times the
    VAE's scaling factor, as float32 in shards. A killed run continues with the shard that it was at.

    Raises: UserError if there is no such VAE, the data are missing, or there is too little disk.
    Source: FPDM (Bai and Melas-Kyriazi 2024), section 4.1, after "High-resolution image synthesis with latent diffusion
        models" (Rombach 2022), section 3.1.
    """
    images = data.load(folder_of("data"), "train", verify=True).images
    device = device_of(job)
    vae = _vae(config, images.shape[1:]).to(device)
    about = {
        "data": sha256_of(folder_of("data") / "meta.json"),
        "vae": checksum(vae.state_dict()),
        "shape": config.shape,
    }
    with scratch(job, identity(job, config, about)) as folder:
        shards = [folder / f"latents-{start:010d}.npy" for start in range(0, len(images), SHARD)]
        missing = [k for k, path in enumerate(shards) if not is_intact(path)]
        require_disk(folder, 4 * int(np.prod(config.shape)) * SHARD * len(missing))
        with bar(
            job.name, len(images), done=min((len(shards) - len(missing)) * SHARD, len(images))
        ) as progress:
            for k in missing[rank() :: world()]:
                blocks = []
                for start in range(k * SHARD, min((k + 1) * SHARD, len(images)), config.batch):
                    items = np.arange(start, min(start + config.batch, (k + 1) * SHARD, len(images)))
                    noise = torch.from_numpy(rng.noise(job.study.seed, "latents", items, config.shape)).to(
                        device
                    )
                    blocks.append(_encoded(vae, to_float(torch.from_numpy(images[items])).to(device), noise))
                    progress.update(len(items))
                write(shards[k].with_suffix(".sha256"), write_array(shards[k], np.concatenate(blocks)))
        barrier()
        if rank() == 0:
            job.out.mkdir(parents=True, exist_ok=True)
            for path in shards:
                link(path, job.out)
            about["shards"] = {
                path.name: path.with_suffix(".sha256").read_text(encoding="utf-8") for path in shards
            }
            write_json(
                job.out / "meta.json", {**about, "count": len(images), "environment": environment(job)}
            )
            remove_others(job.out, about["shards"], "latents-*.npy")
        barrier()


@torch.inference_mode()
def _encoded(vae: nn.Module, image: Tensor, noise: Tensor) -> np.ndarray:
    posterior = vae.encode(image).latent_dist
    return ((posterior.mean + posterior.std * noise) * vae.config.scaling_factor).cpu().numpy()


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
    vae, path = _vae(config, job.image), folder_of("latents") / "meta.json"
    if read_json(path, "vae")["vae"] != checksum(vae.state_dict()):
        raise UserError(
            f"{path.parent} was made by another VAE than {config.vae} holds; run the stage latents again"
        )
    vae.to(device)

    @torch.inference_mode()
    def decode(image: Tensor) -> Tensor:
        flat = image.reshape(-1, *shape).float() / vae.config.scaling_factor
        parts = [to_uint8(vae.decode(part).sample.clamp(-1, 1)) for part in flat.split(config.batch)]
        return torch.cat(parts).reshape(*image.shape[:-3], *job.image)

    return Pixels(job.image, decode)


def _vae(config: Config, image: tuple[int, ...]) -> Any:
    """Return the VAE for images (C, H, W), in evaluation mode.

    Raises: UserError if it is not there, cannot be read, or does not fit.
    """
    from diffusers import AutoencoderKL

    path = Path(config.vae)
    if not (path / "config.json").exists():
        raise UserError(
            f"latents.vae: {path} holds no VAE; place there the files config.json and diffusion_pytorch_model.safetensors of an "
            "AutoencoderKL, for the paper's latents those of stabilityai/sd-vae-ft-ema, or change the key"
        )
    try:
        vae, told = AutoencoderKL.from_pretrained(
            str(path),
            local_files_only=True,
            low_cpu_mem_usage=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"latents.vae: the VAE in {path} cannot be read ({str(error).splitlines()[0]}); fetch its files again"
        ) from None
    if told["missing_keys"]:
        raise UserError(
            f"latents.vae: the weights in {path} lack {sorted(told['missing_keys'])[0]}; fetch its files again"
        )
    shrinks = 2 ** (len(vae.config.block_out_channels) - 1)
    found = (vae.config.latent_channels, *(size // shrinks for size in image[1:]))
    if vae.config.in_channels != image[0] or any(size % shrinks for size in image[1:]):
        raise UserError(
            f"latents.vae: the VAE in {path} takes images of {vae.config.in_channels} channels and sizes that "
            f"{shrinks} divides, data.image is {list(image)}; give another VAE"
        )
    if found != config.shape:
        raise UserError(
            f"latents.shape is {list(config.shape)}, the VAE in {path} makes {list(found)}; set it to that"
        )
    return vae.eval().requires_grad_(False)
