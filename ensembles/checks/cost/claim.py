"""What can be claimed of costs: budgets for a training step."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from ensembles.claims import is_number, options_of, unknown

__all__ = ["CostClaim", "parse"]


BUDGETS = ("flops", "parameters", "kept_bytes", "wasted")


@dataclass(frozen=True)
class CostClaim:
    """Budgets for a training step; None where there is none.

    Attributes:
        flops: FLOPs of both passes, at most.
        parameters: Elements of all parameters, at most.
        kept_bytes: Bytes that are kept for the backward pass, at most.
        wasted: The share of FLOPs that multiply by structural zeros, 0 to 1, at most.
    """

    flops: int | None = None
    parameters: int | None = None
    kept_bytes: int | None = None
    wasted: float | Fraction | None = None


def parse(given: object) -> CostClaim:
    """The claim that a user wrote.

    Args:
        given: A dict of budgets, each a number.

    Raises:
        ClaimError: If it is no such dict, or a budget is no number of zero or more.

    Example:
        >>> parse({"flops": 100}).flops
        100
    """
    budgets = options_of(given, BUDGETS)
    if budgets and all(_is_budget(budget) for budget in budgets.values()):
        return CostClaim(**budgets)
    known = [f"a dict of budgets for a training step, numbers of {', '.join(BUDGETS)}"]
    raise unknown("cost", given, known)


def _is_budget(budget: object) -> bool:
    return isinstance(budget, Fraction) or is_number(budget)
