"""Trainings that are watched while they run: in TensorBoard, DVCLive or wandb, as `study.watch` says."""

from __future__ import annotations

import importlib
import resource
import shutil
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from equilab.core.config import UserError, read
from equilab.core.job import Job
from equilab.core.machine import device_of
from equilab.models.checkpoint import load_tensors, save_tensors
from equilab.sampling.generators import KINDS
from equilab.sampling.opening import headline, open_run
from equilab.sampling.pictures import grid

FOLDER = Path(".equilab/watch")  # a folder a job, in the study's folder
COUNT = 16  # images in a grid, of the same noises at every snapshot


class TensorBoard:
    """A folder of events; those after `nimg` images, of a training that was killed, are hidden."""

    def __init__(self, job: Job, folder: Path, nimg: int):
        _package("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=nimg + 1 if nimg else None)

    def number(self, name: str, value: int | float, nimg: int) -> None:
        """Show a number."""
        self.writer.add_scalar(name, value, nimg)
        self.writer.flush()

    def picture(self, name: str, picture: UInt8[np.ndarray, "h w ..."], nimg: int) -> None:
        """Show a picture."""
        self.writer.add_image(name, picture, nimg, dataformats="HW" if picture.ndim == 2 else "HWC")
        self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        self.writer.close()


class DVCLive:
    """A folder of tables, which `dvc plots show` and DVC's extension for VS Code read."""

    def __init__(self, job: Job, folder: Path, nimg: int):
        live = _package("dvclive").Live
        self.live = live(
            str(folder), resume=bool(nimg), save_dvc_exp=False, dvcyaml=None, monitor_system=False
        )

    def number(self, name: str, value: int | float, nimg: int) -> None:
        """Show a number."""
        self.live.step = nimg
        self.live.log_metric(name, value)
        self.live.make_summary()

    def picture(self, name: str, picture: UInt8[np.ndarray, "h w ..."], nimg: int) -> None:
        """Show a picture."""
        self.live.step = nimg
        self.live.log_image(f"{name}-{nimg:010d}.png", picture)

    def close(self) -> None:
        """Write the summary."""
        self.live.end()


class Wandb:
    """A run of the project that is named as the study; `WANDB_MODE=offline` keeps it here."""

    def __init__(self, job: Job, folder: Path, nimg: int):
        self.wandb = _package("wandb")
        folder.mkdir(parents=True, exist_ok=True)
        name = folder / "id"
        if not name.exists():
            name.write_text(uuid.uuid4().hex, encoding="utf-8")
        self.run = self.wandb.init(
            project=job.study.name,
            name=job.name,
            id=name.read_text(encoding="utf-8"),
            dir=str(folder),
            resume="allow",
        )

    def number(self, name: str, value: int | float, nimg: int) -> None:
        """Show a number."""
        self.run.log({name: value, "nimg": nimg})

    def picture(self, name: str, picture: UInt8[np.ndarray, "h w ..."], nimg: int) -> None:
        """Show a picture."""
        self.run.log({name: self.wandb.Image(picture), "nimg": nimg})

    def close(self) -> None:
        """End the run."""
        self.run.finish()


# each shows numbers and pictures at so many images seen
WRITERS = {"tensorboard": TensorBoard, "dvclive": DVCLive, "wandb": Wandb}


class Watched:
    """What a training reports to: its log, its speed and memory, and images of the same noises at each snapshot."""

    def __init__(self, job: Job, nimg: int):
        self.job, self.device = job, device_of(job)
        self.nimg, self.since = nimg, time.monotonic()
        folder = FOLDER / job.name
        if not nimg:
            shutil.rmtree(folder, ignore_errors=True)  # of a training before
        self.writer = WRITERS[str(job.study.watch)](job, folder, nimg)

    def report(self, row: Mapping[str, int | float]) -> None:
        """Show a row of the log, images a second since the last one, and memory in GiB."""
        now, nimg = time.monotonic(), int(row["nimg"])
        shown = {name: value for name, value in row.items() if name != "nimg"}
        shown["images_per_second"] = (nimg - self.nimg) / max(now - self.since, 1e-9)
        shown["memory_gib"] = _memory(self.device) / 2**30
        for name, value in shown.items():
            self.writer.number(name, value, nimg)
        self.nimg, self.since = nimg, now

    def snapshot(self, weights: Path, about: Mapping[str, Any]) -> None:
        """Show images of averaged weights; what keeps them from being made is told, and the training goes on."""
        if about["stage"] not in KINDS:
            return  # a classifier
        try:
            images = self._images(weights, about)
        except (UserError, RuntimeError, OSError) as error:
            print(f"equilab: {self.job.name}: no images to watch: {error}", file=sys.stderr)
            return
        self.writer.picture("samples", np.asarray(grid(images)), int(about["nimg"]))
        self.since = time.monotonic()  # the images are no part of the speed

    def _images(self, weights: Path, about: Mapping[str, Any]) -> UInt8[np.ndarray, "n c h w"]:
        """Return images at the setting at which the study scores the run first."""
        complete = weights.with_name("watched.safetensors")
        tensors, _ = load_tensors(weights)
        save_tensors(complete, tensors, about)
        with torch.random.fork_rng():  # a network is filled with random numbers before it has its own
            generator = open_run(complete, device=str(self.device))
        complete.unlink()
        setting = headline(Path(), read(Path("params.yaml")), generator.run)
        latents = self.job.read("latents") if generator.run.latent else None
        vae = None if latents is None else Path(latents.vae)
        return replace(generator, setting=setting, vae=vae).sample(COUNT, seed=0).images

    def close(self) -> None:
        """Show nothing more."""
        self.writer.close()


def _memory(device: torch.device) -> int:
    """Return the most bytes that were in use: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest


def _package(name: str) -> Any:
    """Return a package that only those who watch need.

    Raises: UserError if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"study.watch is {name}, which is not installed ({error}); run `pip install {name}`, or set it to null"
        ) from None
