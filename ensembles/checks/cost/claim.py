"""What can be claimed of costs: budgets for a training step or a prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, TypedDict

from ensembles.claims import ClaimError, options_of, unknown

__all__ = ["BUDGETS", "Budgets", "CostClaim", "parse"]


class Budgets(TypedDict, total=False):
    """What can be claimed of a cost, each as a number or None."""

    flops: int | None
    """FLOPs of both passes."""
    forward: int | None
    """FLOPs of the forward pass."""
    backward: int | None
    """FLOPs of the backward pass."""
    parameters: int | None
    """Elements of all parameters."""
    buffers: int | None
    """Elements of all buffers."""
    kept_bytes: int | None
    """Bytes that are kept for the backward pass."""
    wasted: float | Fraction | None
    """The share of FLOPs that multiply by structural zeros, 0 to 1; a `Fraction` is exact."""


BUDGETS = tuple(Budgets.__annotations__)


@dataclass(frozen=True)
class CostClaim:
    """What a call costs.

    Attributes:
        budgets: Numbers, at least one where a cost is judged; what is None is left out.
        exact: Whether the cost is exactly this, or at most this.
        training: Whether it is that of a training step, or of a prediction.

    Raises:
        ClaimError: If a budget is no number of its kind.
    """

    budgets: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = False
    training: bool = True

    def __post_init__(self) -> None:
        given = {name: limit for name, limit in self.budgets.items() if limit is not None}
        object.__setattr__(self, "budgets", given)
        for name, limit in given.items():
            share = name == "wasted"
            number = isinstance(limit, (int, float, Fraction) if share else int)
            if name not in BUDGETS:
                raise ClaimError(f"{name} is no budget: budgets are {', '.join(BUDGETS)}.")
            if isinstance(limit, bool) or not number or not 0 <= limit <= (1 if share else limit):
                kind = "a share from 0 to 1" if share else "a whole number, 0 or more"
                raise ClaimError(f"{name}={limit!r} is no budget: it is {kind}.")


def parse(given: object) -> CostClaim:
    """The claim that a user wrote.

    Args:
        given: A dict of budgets for a training step: the cost is at most this. With "exact": True
            it is exactly this; with "training": False it is that of a prediction.

    Raises:
        ClaimError: If it is no such dict, or a budget is no number of its kind.

    Example:
        >>> parse({"flops": 100}).budgets
        {'flops': 100}
        >>> parse({"flops": 1.5})
        Traceback (most recent call last):
        ensembles.claims.ClaimError: flops=1.5 is no budget: it is a whole number, 0 or more.
    """
    options = options_of(given, [*BUDGETS, "exact", "training"]) or {}
    modes = {name: options.pop(name) for name in ("exact", "training") if name in options}
    if options and all(isinstance(mode, bool) for mode in modes.values()):
        claim = CostClaim(options, **modes)
        if claim.budgets:
            return claim
    known = [
        f"a dict of budgets, numbers of {', '.join(BUDGETS)} ('exact': True makes them exact, "
        "'training': False is of a prediction)"
    ]
    raise unknown("cost", given, known)
