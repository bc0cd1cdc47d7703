"""Random numbers that are pure functions of a key, and of nothing else.

What is drawn here depends on neither the global generators nor on what was drawn before, so that
image 7 is corrupted alike in every subset, and step 900 of an interrupted run is that of the
uninterrupted one. The key is hashed to 128 bits, the key of a counter-based generator (Philox;
Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). NumPy promises that the words of
a bit generator, and the draws of `RandomState`, never change from release to release (NEP 19);
`Generator.permutation` has no such promise, and so is not used.
"""

from __future__ import annotations

import operator
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["normals", "permutation", "words"]


def words(count: int, *key: int | str) -> NDArray[np.uint64]:
    """Uniform 64-bit words.

    Args:
        count: How many.
        key: What they are drawn for: integers and texts. Another key gives other words.

    Returns:
        The words, (count,) uint64.

    Raises:
        TypeError: If a part of the key is neither an integer nor a text.

    Example:
        >>> words(2, "crop", 7).tolist() == words(3, "crop", 7)[:2].tolist()
        True
    """
    return np.asarray(_philox(key).random_raw(count), dtype=np.uint64)


def permutation(count: int, *key: int | str) -> Tensor:
    """A uniform order of `count` things, an int64 tensor of (count,).

    Two of n words are equal with a probability of n^2 / 2^65, 2e-10 for n = 60,000: the order is
    as good as uniform.

    Args:
        count: How many.
        key: As in `words`.

    Example:
        >>> sorted(permutation(4, "order", 0).tolist())
        [0, 1, 2, 3]
    """
    return torch.from_numpy(np.argsort(words(count, *key), kind="stable").astype(np.int64))


def normals(count: int, *key: int | str) -> NDArray[np.float64]:
    """Standard normal numbers, (count,) float64.

    Args:
        count: How many.
        key: As in `words`.

    Example:
        >>> bool((normals(3, "noise", 1) == normals(3, "noise", 1)).all())
        True
    """
    return np.random.RandomState(_philox(key)).standard_normal(count)


def _philox(key: tuple[int | str, ...]) -> np.random.Philox:
    # Lists of integers as SeedSequence takes them collide: [1] and [1, 0] give the same stream.
    parts = tuple(part if isinstance(part, str) else operator.index(part) for part in key)
    digest = blake2b(repr(parts).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little"))
