"""Everything random is a pure function of (seed, purpose, index), drawn on the CPU by numpy's Philox."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

Indices = Sequence[int] | np.ndarray


def generator(seed: int, purpose: str, index: int = 0) -> np.random.Generator:
    """Return the generator of one random event: the stream of `purpose` under `seed` at position `index`.

    The key of Philox is (seed, crc32 of the purpose); the index is the third word of its counter, so that
    neighbouring indices are 2^128 draws apart.
    """
    return next(_generators(seed, purpose, [index]))


def _generators(seed: int, purpose: str, indices: Indices) -> Iterator[np.random.Generator]:
    """Yield the generator of each index: one object, moved from stream to stream, which takes a fifth of making it anew."""
    philox = np.random.Philox(key=np.array([seed, zlib.crc32(purpose.encode())], dtype=np.uint64))
    moved, state = np.random.Generator(philox), philox.state
    for index in indices:
        state["state"]["counter"] = np.array([0, 0, index, 0], dtype=np.uint64)
        philox.state = state
        yield moved


def noise(seed: int, purpose: str, indices: Indices, shape: tuple[int, ...]) -> np.ndarray:
    """Return unit normals (len(indices), *shape), float32; row i depends on (seed, purpose, indices[i]) alone."""
    rows = np.empty((len(indices), *shape), dtype=np.float32)
    for row, drawn in zip(rows, _generators(seed, purpose, indices)):
        row[...] = drawn.standard_normal(shape, dtype=np.float32)
    return rows


def integers(seed: int, purpose: str, indices: Indices, high: int) -> np.ndarray:
    """Return int64 (len(indices),) uniform in 0..high-1, one per index."""
    drawn = _generators(seed, purpose, indices)
    return np.array([each.integers(high) for each in drawn], dtype=np.int64)


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, purpose: str, epoch: int, size: int) -> np.ndarray:
    return generator(seed, purpose, epoch).permutation(size)


def batch(seed: int, purpose: str, start: int, count: int, size: int) -> np.ndarray:
    """Return the items (count,) int64 at positions start..start+count-1 of an endless shuffled pass over 0..size-1.

    Each pass visits every item once, in an order of its own.
    """
    positions = np.arange(start, start + count)
    epochs, offsets = np.divmod(positions, size)
    return np.array(
        [_permutation(seed, purpose, int(e), size)[o] for e, o in zip(epochs, offsets)], dtype=np.int64
    )


def torch_seed(seed: int, purpose: str, index: int = 0) -> int:
    """Return a 63-bit integer for torch.manual_seed, where a library draws by itself (weights, dropout)."""
    return int(generator(seed, purpose, index).integers(2**63 - 1))
