"""Any trained run as a function from noise to images, with its counted cost."""

from __future__ import annotations

from equilab.sampling.generators import load

__all__ = ["load"]
