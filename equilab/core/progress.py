"""Long work is visible: one bar with rate and time left, in a terminal, in a log and in a notebook."""

from __future__ import annotations

import sys

from tqdm import tqdm

from equilab.core.process import is_first


def bar(what: str, total: int, unit: str = "img", done: int = 0, delay: int = 0) -> tqdm:
    """Return a progress bar on stderr, of what takes more than `delay` seconds; where that is no terminal it writes a line every
    ten seconds."""
    terminal = sys.stderr.isatty()
    return tqdm(
        desc=what,
        total=total,
        initial=done,
        unit=unit,
        unit_scale=True,
        dynamic_ncols=terminal,
        ncols=None if terminal else 90,
        delay=delay,
        mininterval=0.2 if terminal else 10,
        file=None if terminal else _Lines(),
        disable=not is_first(),
    )


class _Lines:
    """A log in place of a terminal: what would overwrite a line becomes the next line."""

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text:
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        sys.stderr.flush()
