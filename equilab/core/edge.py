"""The edge of every command: whatever happens within becomes an exit status and sentences on stderr."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from equilab.core.config import UserError

LOGS = Path(".equilab/errors")  # of a study: tracebacks, a file each
MENDABLE = (  # a file that may not be read or written, a full disk, something else in the place of a file or folder
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
)


def answered(command: Callable[[], int | None], words: Sequence[str]) -> int:
    """Run a command, of which `words` are what was typed, and return its exit status.

    It is 2 where a user can mend something, and 1 where nobody foresaw what happened: one sentence then says what it was,
    with which file in hand, and where the traceback is.
    """
    try:
        return command() or 0
    except UserError as error:
        for line in str(error).splitlines():
            _say(line)
        return 2
    except Exception as error:
        if isinstance(error, OSError) and error.errno in MENDABLE:
            _say(
                f"{_in_hand(error) or 'a file'}: {error.strerror}; make it readable or writable, free disk space, or run the "
                "stage that writes it again"
            )
            return 2
        what = f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0].rstrip(": ")
        path = _in_hand(error)
        held = f", with {path} in hand" if path else ""
        _say(
            f"{' '.join(words)} ended unforeseen{held} ({what}); its traceback is in {_logged(error, words)}"
        )
        return 1


def _say(line: str) -> None:
    print(f"equilab: {line}", file=sys.stderr)


def _in_hand(error: Exception) -> object:
    """Return the file or folder that the error names, or that the package was last busy with, as the innermost of its functions
    that has one says; None if there is none."""
    found = getattr(error, "filename", None)
    if found is not None:
        return found
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] == "equilab":
            paths = [value for value in frame.f_locals.values() if isinstance(value, Path)]
            found = paths[-1] if paths else found
    return found


def _logged(error: Exception, words: Sequence[str]) -> str:
    """Write the traceback of an error; return where it is: in a study's folder, or else among temporary files."""
    text = f"{' '.join(words)}\n\n{''.join(traceback.format_exception(error))}"
    in_study = Path("params.yaml").exists() and os.access(".", os.W_OK)
    folder = LOGS if in_study else Path(tempfile.gettempdir(), "equilab-errors")
    path = folder / f"{time.strftime('%Y-%m-%d-%H-%M-%S')}-{os.getpid()}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError:
        print(text, file=sys.stderr)
        return "the lines above"
    return str(path)
