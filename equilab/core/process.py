"""This process: what has to be set before torch is imported, and whether it is the first of those that work together."""

from __future__ import annotations

import ctypes
import os


def is_first() -> bool:
    """Return whether this is the first of the processes that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def prepare_process() -> None:
    """Set up this process for training and measuring; it must be called before torch is first imported.

    What the environment says already stays.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # idle threads sleep soon: a busy neighbour costs less
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # of glibc
        # a freed tensor's memory stays with the process: to take it anew, page by page, was a tenth of a small network's step
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
