"""The Hugging Face Hub, where folders of runs are given away; the only importer of huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path

from equilab.core.config import UserError

PREFIX = "hf://"
NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")  # owner/name, perhaps @revision
FILES = ("weights.safetensors", "config.json", "README.md")


def is_on_hub(path: Path | str) -> bool:
    """Return whether a path is the name of a folder on the hub, such as "hf://owner/name"."""
    return isinstance(path, str) and path.startswith(PREFIX)


def fetch(path: str) -> Path:
    """Return the folder in the cache of the hub that holds what "hf://owner/name", or "hf://owner/name@revision", names.

    Raises: UserError if it is no such name, or cannot be fetched.
    """
    name, _, revision = checked_name(path.removeprefix(PREFIX)).partition("@")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(FILES)))
    except Exception as error:  # one of two dozen types, by what is missing
        raise UserError(
            f"{path} cannot be fetched ({_reason(error)}); correct the name, connect to a network or, where it asks for that, "
            "log in by `hf auth login`"
        ) from None


def upload(folder: Path, name: str) -> str:
    """Put the files of a folder on the hub under "owner/name"; return the address.

    Raises: UserError if it is no such name, or they cannot be put there.
    """
    checked_name(name)
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=list(FILES))
    except Exception as error:
        raise UserError(
            f"{folder} cannot be put on the hub as {name} ({_reason(error)}); connect to a network, and log in by `hf auth login` "
            "as one who may write there"
        ) from None
    return str(address)


def checked_name(name: str) -> str:
    """Return the name of a folder on the hub.

    Raises: UserError if it is none.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"{name!r} is no name on the hub; give one as owner/name")
    return name


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
