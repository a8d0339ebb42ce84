"""Random numbers that a seed and a purpose fix on every machine.

Each purpose has a stream of its own, so that one option does not move what another one draws.
"""

from __future__ import annotations

import zlib

import numpy as np


def stream(seed: int, purpose: str, *more: int) -> np.random.Generator:
    """The stream for `purpose`; `more` numbers tell apart its parts, such as epochs."""
    return np.random.Generator(np.random.PCG64([seed, zlib.crc32(purpose.encode()), *more]))


def drawn_order(n: int, seed: int, purpose: str) -> np.ndarray:
    """The numbers below `n` in an order (n,) that `seed` and `purpose` fix."""
    # Not Generator.permutation, whose way of shuffling may change between versions of numpy.
    return np.argsort(stream(seed, purpose).random(n), kind="stable")
