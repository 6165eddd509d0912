"""`python -m equilab sample PATH --out OUT [--count N] [--OPTION VALUE ...]`: images of a trained run or of imported weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from equilab.core.config import UserError, load
from equilab.data.reading import expanded
from equilab.sampling.generators import PRECISIONS
from equilab.sampling.opening import open_run
from equilab.sampling.pictures import require_place, save


def command(arguments: list[str]) -> int:
    """Draw images from a run and write them."""
    parser = argparse.ArgumentParser(
        prog="equilab sample",
        description=__doc__,
        epilog="OPTION is any of the sampler, solver or budget of the model: --iterations 6, --steps 10, ...",
        allow_abbrev=False,
    )
    parser.add_argument("path", metavar="PATH", help="the folder of a run, such as models/get")
    parser.add_argument(
        "--out", metavar="OUT", type=Path, required=True, help="GRID.png, ARRAYS.npz or a folder"
    )
    parser.add_argument("--count", metavar="N", type=int, default=16, help="how many images")
    parser.add_argument("--label", metavar="CLASS", type=_label, help="a class, or one for each: 3 or 3,1,4")
    parser.add_argument("--seed", metavar="K", type=int, default=0, help="of the noise")
    parser.add_argument("--batch", metavar="N", type=int, default=64, help="images at once")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument(
        "--vae", metavar="FOLDER", help="what decodes the latents of a model that makes latents"
    )
    given, rest = parser.parse_known_args(arguments)
    options, out = _options(rest), expanded(str(given.out))
    require_place(out)
    model = open_run(given.path, device=given.device, precision=given.precision, vae=given.vae)
    samples = model.sample(given.count, label=given.label, seed=given.seed, batch=given.batch, **options)
    save(samples, out)
    solved = "" if samples.iterations is None else f", {samples.iterations.mean():.4g} iterations each"
    print(f"{out}: {len(samples)} images of {model.run.of}, nfe {samples.nfe}{solved}")
    return 0


def _label(text: str) -> int | list[int]:
    try:
        labels = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no class; give a number, or several: 3 or 3,1,4"
        ) from None
    return labels if "," in text else labels[0]


def _options(words: list[str]) -> dict[str, Any]:
    """Return what is given as --name value or --name=value, with the values as in params or in Python."""
    options, words = {}, list(words)
    while words:
        name, equals, value = words.pop(0).partition("=")
        if not name.startswith("--") or (not equals and not words):
            raise UserError(f"{name} is no --OPTION with a value; give such as --iterations 6")
        key = name[2:].replace("-", "_")
        if key in options:
            raise UserError(f"{name} is given twice; give it once")
        options[key] = read_value(name, value if equals else words.pop(0))
    return options


def read_value(name: str, text: str) -> Any:
    """Return a value of the command line, written as in params; None may be written as in Python.

    Raises: UserError with the name under which it is given, if it is none.
    """
    try:
        return None if text == "None" else load(text)
    except yaml.YAMLError:
        raise UserError(f"{name}: {text!r} is no number, word or list; write it as in params") from None
