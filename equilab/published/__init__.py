"""Reads the authors' checkpoints into our models, without running anything in them."""

from __future__ import annotations

from equilab.published.loading import load

__all__ = ["load"]
