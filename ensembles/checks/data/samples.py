"""Which samples a loader, a sampler or a list of indices gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from ensembles.instruments.recording import digest
from ensembles.user_calls import ERRORS, raised

__all__ = ["samples_of"]

MOST = 10_000_000
"""Samples, after which an iterable is taken to have no end."""


def samples_of(ask: Callable[[], Iterable[Any]], member: int | str) -> tuple[list[int | str], ...]:
    """Every sample that a member reads in an epoch: its index, or the digest of its content.

    Where samples come repeatedly, as in a bootstrap, the next epoch is read too, unless what was
    given can be read once only.

    Args:
        ask: Returns indices, a sampler, or a loader of batches, as the functions in `Case.data` do.
        member: The number or name of the member, for errors.

    Returns:
        The samples of one epoch, or of two.

    Raises:
        ValueError: If `ask` fails, gives neither indices nor tensors, nothing, or no end.

    Example:
        >>> samples_of(lambda: [[2, 0], torch.tensor([1])], 0)
        ([2, 0, 1],)
        >>> samples_of(lambda: [1, 0, 1], 0)
        ([1, 0, 1], [1, 0, 1])
    """
    then = "It takes a member and returns its sample indices, or its loader."
    try:
        found = ask()
        iter(found)
    except ERRORS as error:
        raise ValueError(raised(f"data({member!r})", error, then, of=ask)) from error
    keys = _epoch(found, member)
    if not keys:
        raise ValueError(f"member {member} sees no samples: there is nothing to compare.")
    if len(set(keys)) == len(keys) or iter(found) is found:
        return (keys,)
    return keys, _epoch(found, member)


def _epoch(found: Iterable[Any], member: int | str) -> list[int | str]:
    keys: list[int | str] = []
    for key in _keys(found, member):
        keys.append(key)
        if len(keys) > MOST:
            raise ValueError(
                f"the data of member {member} have not ended after {MOST:,} samples. Give "
                "one epoch: itertools.islice."
            )
    return keys


def _keys(found: Iterable[Any], member: int | str) -> Iterator[int | str]:
    loads = isinstance(found, DataLoader)
    for value in found:
        if isinstance(value, int):
            yield value
        elif loads or not _indices(value):
            yield from _contents(value, member)
        else:
            yield from (int(index) for index in _flat(value))


def _flat(value: Any) -> list[Any]:
    return value.flatten().tolist() if hasattr(value, "flatten") else list(value)


def _indices(value: Any) -> bool:
    """Whether this is an index or a list of them: an integer tensor or array of one axis."""
    if isinstance(value, (list, tuple)):
        return all(isinstance(entry, int) or _is_scalar(entry) for entry in value)
    if isinstance(value, Tensor):
        return value.ndim < 2 and not value.is_floating_point() and not value.is_complex()
    return hasattr(value, "dtype") and getattr(value, "ndim", 2) < 2 and value.dtype.kind in "iu"


def _is_scalar(entry: Any) -> bool:
    return getattr(entry, "ndim", None) == 0 and "int" in str(entry.dtype)


def _contents(value: Any, member: int | str) -> Iterator[str]:
    """A digest for each row of a batch."""
    leaves = [torch.as_tensor(x) if hasattr(x, "dtype") else x for x in pytree.tree_leaves(value)]
    tensors = [x for x in leaves if isinstance(x, Tensor) and x.ndim]
    if not tensors:
        raise ValueError(
            f"the data of member {member} give an object of type {type(value).__name__}, which is "
            "neither an index nor a batch with tensors. Give indices, a sampler or a DataLoader."
        )
    rows = tensors[0].shape[0]
    for i in range(rows):
        yield " ".join(digest(x[i]) for x in tensors if x.shape[0] == rows)
