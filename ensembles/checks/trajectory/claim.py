"""What can be claimed of how members train."""

from __future__ import annotations

from dataclasses import dataclass

from ensembles.claims import is_count, is_number, options_of, unknown

__all__ = ["TrajectoryClaim", "parse"]


KINDS = ("bitwise", "reordered", "rewritten", "rescaled", "recomputed")
"""Kinds of comparison that a tolerance may name: those of `ensembles.tolerance`."""

STEPS = 3
"""Enough for momentum to have a past, and for a schedule to have moved."""


@dataclass(frozen=True)
class TrajectoryClaim:
    """Every member trains as it would alone.

    Attributes:
        identical: Whether all members are given the same weights, to follow the single model; else
            each follows its own run.
        loss: "sum", or "mean" where members train at the rates to which a mean amounts.
        tolerance: The greatest difference, as a share of the greatest element, or a kind of
            comparison (`ensembles.tolerance`); 0 compares bits.
        steps: How many optimizer steps.
    """

    identical: bool
    loss: str = "sum"
    tolerance: float | str = 0.0
    steps: int = STEPS


def parse(given: object) -> TrajectoryClaim:
    """The claim that a user wrote.

    Args:
        given: A dict of `members` ("single" or "separate") and, where wanted, `loss` ("sum" or
            "mean"), `tolerance` and `steps`.

    Raises:
        ClaimError: If it is no such dict.

    Example:
        >>> parse({"members": "single", "loss": "mean"}).identical
        True
    """
    options = options_of(given, ["members", "loss", "tolerance", "steps"]) or {}
    follow, loss = options.get("members"), options.get("loss", "sum")
    tolerance, steps = options.get("tolerance", 0.0), options.get("steps", STEPS)
    known = follow in ("single", "separate") and loss in ("sum", "mean")
    within = tolerance in KINDS if isinstance(tolerance, str) else is_number(tolerance)
    if known and is_count(steps) and within and (isinstance(tolerance, str) or tolerance >= 0):
        return TrajectoryClaim(follow == "single", loss, tolerance, steps)
    words = ['{"members": "single"}', '{"members": "separate"}', 'with "loss": "mean"']
    words += [f'with "tolerance": a number or {", ".join(KINDS)}', 'with "steps": a number']
    raise unknown("trajectory", given, words)
