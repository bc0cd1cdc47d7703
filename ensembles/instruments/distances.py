"""How far apart the numbers of two tensors are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ensembles.handling.memory import numbers_in

__all__ = ["distance"]


def distance(one: Tensor | None, two: Tensor | None) -> float:
    """The greatest absolute difference; 0.0 only if every element is equal (NaN equals NaN).

    Example:
        >>> distance(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]))
        0.5
        >>> distance(torch.ones(2), torch.ones(3))
        inf
    """
    if one is None or two is None:
        return 0.0 if one is two else math.inf
    one, two = numbers_in(one), numbers_in(two)
    if one.shape != two.shape or one.dtype != two.dtype:
        return math.inf
    if torch.equal(one, two):
        return 0.0
    if one.dtype in (torch.float32, torch.float64):  # enough digits, and a third of the time
        by = float(torch.linalg.vector_norm(one - two, math.inf))
        if 0 < by < math.inf:
            return by
    same = (one == two) | ((one != one) & (two != two))
    if same.all():
        return 0.0
    wide = torch.complex128 if one.is_complex() else torch.float64
    by = float((one.cpu().to(wide) - two.cpu().to(wide)).abs()[~same.cpu()].max())
    return by if by > 0 else math.inf
