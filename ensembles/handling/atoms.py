"""What holds no tensor and no module, however long it is: a search passes it over at once."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Mapping
from functools import lru_cache, partial
from numbers import Number
from pathlib import PurePath
from typing import Any

from torch import Tensor, nn

__all__ = ["FUNCTIONS", "SEQUENCES", "holds_nothing"]

ATOMS = frozenset((bool, int, float, complex, str, bytes, type(None)))

DEPTH = 3
"""Containers in containers that are looked through: a list of records of pairs."""

SEQUENCES = (list, tuple, set, frozenset, deque)

FUNCTIONS = (types.FunctionType, types.MethodType)

ELSEWHERE = (Tensor, nn.Module, Mapping, *SEQUENCES, *FUNCTIONS, partial, type, types.ModuleType)
"""What may hold something elsewhere than in its attributes."""


def holds_nothing(thing: Any, depth: int = DEPTH) -> bool:
    """Whether it is a number, a text or a path; or a list, dict or record of such.

    Example:
        >>> holds_nothing([(0, "a.png"), (1, "b.png")]), holds_nothing([(0, torch.ones(1))])
        (True, False)
    """
    kind: Any = type(thing)
    if kind in ATOMS or _is_atom(kind):
        return True
    if kind in SEQUENCES:
        inside = thing
    elif kind is dict:
        inside = thing.values()
    elif _is_record(kind):
        inside = vars(thing).values()
    else:
        return False
    if ATOMS.issuperset(map(type, inside)):  # without a call for each
        return True
    return depth > 0 and all(holds_nothing(value, depth - 1) for value in inside)


@lru_cache(maxsize=1024)
def _is_atom(kind: type) -> bool:
    return issubclass(kind, (Number, PurePath))


@lru_cache(maxsize=1024)
def _is_record(kind: type) -> bool:
    """Whether all that its objects hold is in their dict."""
    slots = any("__slots__" in vars(ancestor) for ancestor in kind.__mro__)
    return kind.__dictoffset__ != 0 and not slots and not issubclass(kind, ELSEWHERE)
