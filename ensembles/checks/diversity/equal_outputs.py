"""Which members compute one function: their outputs on the batch are equal to rounding."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ensembles.case import Case
from ensembles.checks.diversity.similarity import is_constant
from ensembles.handling.members import member_outputs, named_modules_of
from ensembles.handling.state import generators_kept, seed_generators
from ensembles.handling.training import fresh
from ensembles.subject import Model
from ensembles.tolerance import tolerance_of

__all__ = ["double_outputs", "equal_outputs", "vary"]

CLOSER = 0.01
"""Twins are closer to each other than a row is to others, by this factor at least."""

WOKEN = 0.5
"""What a trainable matrix of zeros is set to, to see what it will multiply: any number would do."""


def double_outputs(case: Case, *, woken: bool = False) -> dict[str, tuple[Tensor, ...]]:
    """What members return in eval mode, in float64 where the model allows it.

    Args:
        case: The model and its batch.
        woken: Whether trainable matrices that are zero hold one other number, in a copy, so that
            what a branch that starts at zero (Hu et al. 2022) will compute is seen.

    Example:
        >>> double_outputs(Case.of(nn.Linear(2, 1), torch.ones(3, 2)))["model"][0].dtype
        torch.float64
    """
    batch = case.batch
    try:
        wide = copy.deepcopy(case.model)
        if _held(wide) & _held(case.model):
            raise ValueError("an own __deepcopy__ gives the original, which is not converted")
        for module in named_modules_of(wide).values():
            module.double()
            for parameter in module.parameters() if woken else ():
                if parameter.ndim > 1 and parameter.requires_grad and not parameter.any():
                    # One number for all elements: what is a permuted twin stays one.
                    parameter.data.fill_(WOKEN)
        with generators_kept():  # of a copy nothing else needs to be kept
            return _called(case.having(wide), pytree.tree_map(_double, batch))
    except Exception:  # whatever a model does that knows one precision, or cannot be copied
        with case.preserved():
            return _called(case, batch)


def _held(model: Model) -> set[int]:
    return {
        id(held)
        for given in named_modules_of(model).values()
        for held in (*given.modules(), *given.parameters(), *given.buffers())
    }


def _called(case: Case, batch: Any) -> dict[str, tuple[Tensor, ...]]:
    for module in case.everything:
        module.eval()
    seed_generators(case.seed)
    with torch.no_grad():
        return member_outputs(case.model, fresh(batch), outputs=case.subject.outputs)


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def vary(tensors: Sequence[Tensor]) -> bool:
    """Whether outputs depend on the row, or, of one row, are not all one number.

    Example:
        >>> vary([torch.eye(2)]), vary([torch.ones(2, 3)])
        (True, False)
    """
    return any(
        bool((y != y[:1]).any()) if y.ndim and y.shape[0] > 1 else not is_constant(y)
        for y in tensors
    )


def equal_outputs(found: Mapping[str, tuple[Tensor, ...]]) -> list[tuple[str, ...]]:
    """Groups of members whose outputs are the same to rounding.

    Example:
        >>> y = torch.randn(3, 2)
        >>> equal_outputs({"a": (y,), "b": (y + 1,), "c": (y.clone(),)})
        [('a', 'c')]
    """
    groups: list[list[str]] = []
    for member, tensors in found.items():
        for group in groups:
            if _equal(found[group[0]], tensors):
                group.append(member)
                break
        else:
            groups.append([member])
    return [tuple(group) for group in groups if len(group) > 1]


def _equal(one: Sequence[Tensor], two: Sequence[Tensor]) -> bool:
    """Equal to rounding, and much closer to each other than rows are."""
    if [y.shape for y in one] != [y.shape for y in two]:
        return False
    for x, y in zip(one, two, strict=True):
        relative = tolerance_of("recomputed", x, y)
        x, y = x.double(), y.double()
        distance = float((x - y).abs().max()) if x.numel() else 0.0
        spread = float(x.std(0).max()) if x.ndim and x.shape[0] > 1 else math.inf
        if not distance <= min(relative * float(x.abs().max()), CLOSER * spread):
            return False
    return True
