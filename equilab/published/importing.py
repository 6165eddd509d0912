"""`python -m equilab import FAMILY FILE [KEY=VALUE ...] [--out NAME]`: published weights as results that stages can read."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from equilab.core.config import UserError, load
from equilab.core.files import sha256_of
from equilab.core.job import checked_name
from equilab.models.checkpoint import read_metadata, save_tensors
from equilab.published.loading import load_network

FOLDER = Path("results/imported")


def command(arguments: list[str]) -> int:
    """Read published weights of a family, and keep them in the results."""
    parser = argparse.ArgumentParser(prog="equilab import", description=__doc__)
    parser.add_argument("family", metavar="FAMILY", help="the family of the model, such as get")
    parser.add_argument(
        "file", metavar="FILE", type=Path, help="what its authors published (docs/checkpoints.md)"
    )
    parser.add_argument(
        "config", metavar="KEY=VALUE", nargs="*", help="what the file does not tell, such as heads=6"
    )
    parser.add_argument(
        "--out", metavar="NAME", help="the folder in results/imported; the name of the file if left out"
    )
    given = parser.parse_intermixed_args(arguments)
    path = run(given.family, given.file, given.out or given.file.stem, _config(given.config))
    print(path)
    print(
        f"# what params say of such a run:\n{yaml.safe_dump(read_metadata(path)['config'], sort_keys=False)}",
        end="",
    )
    return 0


def run(family: str, file: Path, name: str, config: Mapping[str, Any]) -> Path:
    """Read published weights and keep them in results/imported/NAME; return their path.

    `equilab.load` gives the model back.

    Raises: UserError as `equilab.published.load`, or for a name that no run could have.
    """
    try:
        checked_name(name)
    except ValueError as error:
        raise UserError(f"--out: {error}") from None
    loaded = load_network(family, file, config)
    about = loaded.about(name)
    about["published"] |= {"file": file.name, "sha256": sha256_of(file)}
    path = FOLDER / name / "weights.safetensors"
    save_tensors(path, loaded.network.state_dict(), about)
    return path


def _config(entries: list[str]) -> dict[str, Any]:
    """Return what is given as KEY=VALUE, with the values as in params."""
    config = {}
    for entry in entries:
        key, equals, value = entry.partition("=")
        if not equals:
            raise UserError(f"{entry!r} is not KEY=VALUE; give what the file does not tell as in heads=6")
        try:
            config[key] = load(value)
        except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError):
            raise UserError(
                f"{entry!r}: the value is no number, word or list; write it as in params"
            ) from None
    return config
