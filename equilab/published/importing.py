"""`python -m equilab import FAMILY FILE [KEY=VALUE ...] [--out NAME]`: published weights as results that stages can read."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from equilab.core.config import UserError
from equilab.core.files import sha256_of
from equilab.core.job import checked_name
from equilab.data.reading import expanded
from equilab.models.checkpoint import read_metadata, save_tensors
from equilab.published.loading import load_network
from equilab.sampling.command import read_value

FOLDER = Path("results/imported")


def command(arguments: list[str]) -> int:
    """Read published weights of a family, and keep them in the results."""
    parser = argparse.ArgumentParser(
        prog="equilab import",
        usage="equilab import FAMILY FILE [KEY=VALUE ...] [--out NAME]",
        description=__doc__,
        epilog="KEY=VALUE is what the file does not tell, such as heads=6.",
        allow_abbrev=False,
    )
    parser.add_argument("family", metavar="FAMILY", help="the family of the model, such as get")
    parser.add_argument(
        "file", metavar="FILE", type=Path, help="what its authors published (docs/checkpoints.md)"
    )
    parser.add_argument(
        "--out", metavar="NAME", help="the folder in results/imported; the name of the file if left out"
    )
    given, config = parser.parse_known_args(arguments)
    path = run(given.family, given.file, given.out or given.file.stem, _config(config))
    print(path)
    print(
        f"# what params say of such a run:\n{yaml.safe_dump(read_metadata(path)['config'], sort_keys=False)}",
        end="",
    )
    return 0


def run(family: str, file: Path, name: str, config: Mapping[str, Any]) -> Path:
    """Read published weights and keep them in results/imported/NAME; return their path.

    `equilab.load` gives the model back.

    Raises: UserError as `equilab.published.load`, or for a name that no run could have, or that an import has.
    """
    file, path = expanded(str(file)), FOLDER / name / "weights.safetensors"
    try:
        checked_name(name)
    except ValueError as error:
        if name == file.stem:
            raise UserError(
                f"{file}: without --out its name is that of the import, and {error}; give --out NAME"
            ) from None
        raise UserError(f"--out: {error}") from None
    if path.exists():
        raise UserError(f"{path.parent} is there already; give another --out NAME, or remove it")
    loaded = load_network(family, file, config)
    about = loaded.about(name)
    about["published"] |= {"file": file.name, "sha256": sha256_of(file)}
    save_tensors(path, loaded.network.state_dict(), about)
    return path


def _config(entries: list[str]) -> dict[str, Any]:
    """Return what is given as KEY=VALUE, with the values as in params."""
    config = {}
    for entry in entries:
        key, equals, value = entry.partition("=")
        if not equals or key.startswith("-"):
            raise UserError(f"{entry!r} is not KEY=VALUE; give what the file does not tell as in heads=6")
        if key in config:
            raise UserError(f"{key} is given twice; give it once")
        config[key] = read_value(key, value)
    return config
