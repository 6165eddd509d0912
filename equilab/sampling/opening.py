"""A trained run by the path of its folder, with the setting at which its study scores it first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from equilab.core.config import UserError, parse, read_json
from equilab.core.like import read
from equilab.data.reading import expanded
from equilab.models.checkpoint import load_network
from equilab.sampling.generators import Generator, from_network
from equilab.sampling.hub import fetch, is_on_hub
from equilab.sampling.runs import Run
from equilab.sampling.settings import Setting

WEIGHTS = "weights.safetensors"
POINTER = b"version https://git-lfs"  # how a file begins that Git LFS has not fetched
POINTED = "is a Git LFS pointer, not the weights: fetch them with `git lfs pull`"
BY_OTHERS = (b"PK\x03\x04", b"\x80")  # how the files of torch and of pickle begin


def open_run(
    path: Path | str,
    *,
    seed: int | None = None,
    device: str = "auto",
    precision: Literal["fp32", "tf32", "bf16"] = "fp32",
    vae: Path | str | None = None,
) -> Generator:
    """Return the run in a folder as a model that draws images, at the setting at which its study scores it first.

    `path` is the folder of a run or of one of its seeds, or a file of weights, such as a snapshot; of several seeds the
    first is taken, or `seed`. "hf://owner/name" is a folder on the Hugging Face Hub. `vae` is the folder of the autoencoder
    of a model that makes latents, if its study does not say it.

    Raises: UserError if there are no weights, they are damaged, or they have no such seed or make no latents.
    """
    weights = find_weights(fetch(path) if is_on_hub(path) else Path(path), seed)
    generator = from_network(*_read(weights), str(weights), device=device_named(device), precision=precision)
    study = study_of(weights)
    if study is None:
        setting = _given_setting(weights, generator.run)
    else:
        sections = read(study / "params.yaml")
        setting = headline(study, sections, generator.run)
        if generator.run.latent and sections.get("latents"):
            generator = replace(generator, vae=study / sections["latents"]["vae"])
    return with_vae(replace(generator, setting=setting), vae)


def with_vae(generator: Generator, vae: Path | str | None) -> Generator:
    """Return a model whose latents the autoencoder in a folder decodes; None leaves it as it is.

    Raises: UserError if the model makes no latents, or there is no autoencoder of them.
    """
    if vae is None:
        return generator
    if not generator.run.latent:
        raise UserError(
            f"vae is {str(vae)!r}, but {generator.run.family.label} makes images, not latents; leave it out"
        )
    found = replace(generator, vae=expanded(str(vae)))
    _ = found.pixels  # read now, so that a mistake is told now
    return found


def _read(weights: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return a network with what is kept with its weights.

    Raises: UserError if the file is missing, damaged or was not written by equilab.
    """
    start = b""
    if weights.is_file():
        with open(weights, "rb") as file:
            start = file.read(len(POINTER))
    if start == POINTER:
        raise UserError(f"{weights} {POINTED}")
    if start.startswith(BY_OTHERS) and start[8:9] != b"{":
        raise UserError(
            f"{weights} was not written by equilab; read the authors' checkpoints with equilab.published.load, or by "
            f"`python -m equilab import FAMILY {weights}`"
        )
    return load_network(weights)


def find_weights(path: Path, seed: int | None = None) -> Path:
    """Return the file of weights that a path leads to: itself, that of a folder, or that of a seed in it, by default the first.

    Raises: UserError if it leads to none, or has no such seed.
    """
    path = expanded(str(path))
    if not path.exists():
        raise UserError(
            f"{path} is not there; give the folder of a run, such as models/get of the repository"
        )
    if path.is_file():
        _require_none(seed, path)
        return path
    folders = {folder.name: folder for folder in sorted(path.iterdir()) if folder.is_dir()}
    seeds = sorted(int(name) for name in folders if name.isdigit())
    if (path / WEIGHTS).exists() or (not seeds and (path / "summary.json").exists()):
        _require_none(seed, path)
        return path / WEIGHTS
    if not seeds:
        names = ", ".join(folders) or "nothing"
        raise UserError(
            f"{path} holds no weights of a run (it holds {names}); give a folder that does, such as models/get of the repository"
        )
    if seed is not None and seed not in seeds:
        raise UserError(f"{path} has no seed {seed}; it has {', '.join(map(str, seeds))}")
    return path / str(seeds[0] if seed is None else seed) / WEIGHTS


def _require_none(seed: int | None, path: Path) -> None:
    """Refuse a seed where there is none to choose from."""
    if seed is not None:
        raise UserError(f"seed is {seed}, but {path} has no seeds to choose from; leave it out")


def device_named(name: str) -> torch.device:
    """Return a device by its name in torch; "auto" is a GPU where there is one.

    Raises: UserError if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise UserError(
            f"device is {name!r}, which torch does not have here; give cpu, cuda or auto"
        ) from None


def study_of(weights: Path) -> Path | None:
    """Return the folder of the study in whose results a file of weights lies, None outside of any."""
    for folder in weights.absolute().parents:
        if folder.name == "results" and (folder.parent / "params.yaml").exists():
            return folder.parent
    return None


def _given_setting(weights: Path, run: Run) -> Setting | None:
    """Return the setting that a folder which was given away says, None if it says none."""
    path = weights.with_name("config.json")
    if run.setting is None or not path.exists():
        return None
    setting = read_json(path, setting=Any)["setting"]
    return None if setting is None else parse(run.setting, setting, f"{path}: setting")


def headline(study: Path, sections: dict, run: Run) -> Setting | None:
    """Return the first setting at which a study evaluates a run; None if it evaluates no such run, or none can be set."""
    for name, entry in (sections.get("evaluate") or {}).items():
        if run.listed and entry.get("of") == run.of and entry.get(run.listed):
            place = f"{study / 'params.yaml'}: evaluate.{name}.{run.listed}[0]"
            return parse(run.setting, entry[run.listed][0], place)
    return None
