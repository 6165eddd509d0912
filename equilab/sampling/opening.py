"""A trained run by the path of its folder, with the setting at which its study scores it first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from equilab.core.config import UserError, parse, read_json
from equilab.core.like import read
from equilab.models.checkpoint import load_network
from equilab.sampling.generators import Generator, from_network
from equilab.sampling.hub import fetch, is_on_hub
from equilab.sampling.runs import Run
from equilab.sampling.settings import Setting

WEIGHTS = "weights.safetensors"


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

    Raises: UserError if there are no weights, or they are damaged.
    """
    weights = find_weights(fetch(path) if is_on_hub(path) else Path(path), seed)
    generator = from_network(
        *load_network(weights), str(weights), device=device_named(device), precision=precision
    )
    study = study_of(weights)
    if study is None:
        setting = _given_setting(weights, generator.run)
    else:
        sections = read(study / "params.yaml")
        setting = headline(study, sections, generator.run)
        if vae is None and generator.run.latent and sections.get("latents"):
            vae = study / sections["latents"]["vae"]
    return replace(generator, setting=setting, vae=None if vae is None else Path(vae))


def find_weights(path: Path, seed: int | None = None) -> Path:
    """Return the file of weights that a path leads to: itself, that of a folder, or that of a seed in it, by default the first.

    Raises: UserError if it leads to none.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path} is not there; give the folder of a run, such as results/distill/get-m")
    folders = {folder.name: folder for folder in sorted(path.iterdir()) if folder.is_dir()}
    seeds = sorted(int(name) for name in folders if name.isdigit())
    if (path / WEIGHTS).exists() or (not seeds and (path / "summary.json").exists()):
        return path / WEIGHTS
    if not seeds:
        names = ", ".join(folders) or "nothing"
        raise UserError(
            f"{path} is not the folder of a run (it holds {names}); give one such as results/distill/get-m"
        )
    if seed is not None and seed not in seeds:
        raise UserError(f"{path} has no seed {seed}; it has {', '.join(map(str, seeds))}")
    return path / str(seeds[0] if seed is None else seed) / WEIGHTS


def device_named(name: str) -> torch.device:
    """Return a device by its name in torch; "auto" is a GPU where there is one.

    Raises: UserError if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device is {name!r}, which torch does not have here ({str(error).splitlines()[0]}); give cpu, cuda or auto"
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
    setting = read_json(path, "setting")["setting"]
    return None if setting is None else parse(run.setting, setting, f"{path}: setting")


def headline(study: Path, sections: dict, run: Run) -> Setting | None:
    """Return the first setting at which a study evaluates a run; None if it evaluates no such run, or none can be set."""
    for name, entry in (sections.get("evaluate") or {}).items():
        if run.listed and entry.get("of") == run.of and entry.get(run.listed):
            place = f"{study / 'params.yaml'}: evaluate.{name}.{run.listed}[0]"
            return parse(run.setting, entry[run.listed][0], place)
    return None
