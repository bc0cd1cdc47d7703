"""What can be claimed of an ensemble's prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ensembles.claims import options_of, unknown

__all__ = ["PredictionClaim", "parse"]


REDUCTIONS = ("arithmetic", "geometric", "vote", "logits")
TIES = ("lowest", "highest", "first", "probability")
METRICS = ("accuracy", "error", "nll", "brier")


@dataclass(frozen=True)
class PredictionClaim:
    """The reduction that makes the prediction, and what the metric is.

    Attributes:
        reduction: One of `REDUCTIONS`.
        weights: The members' weights, by name or in order; None where all count alike.
        ties: What decides a vote between equals: one of `TIES`.
        metric: One of `METRICS`; None where none is claimed.
        axis: The class axis of outputs and prediction; 1 as in `cross_entropy`.
    """

    reduction: str = "arithmetic"
    weights: Any = None
    ties: str = "lowest"
    metric: str | None = None
    axis: int = 1


def parse(given: object) -> PredictionClaim:
    """The claim that a user wrote.

    Args:
        given: A reduction; or a dict of `reduction` and, where wanted, `weights`, `ties`, `metric`
            and `axis`.

    Raises:
        ClaimError: If it is neither.

    Example:
        >>> parse("vote").ties, parse({"metric": "nll"}).reduction
        ('lowest', 'arithmetic')
    """
    claimed = given if isinstance(given, Mapping) else {"reduction": given}
    options = options_of(claimed, ["reduction", "weights", "ties", "metric", "axis"])
    if options is not None:
        claim = PredictionClaim(**options)
        known = claim.reduction in REDUCTIONS and claim.ties in TIES and isinstance(claim.axis, int)
        if known and claim.metric in (None, *METRICS):
            return claim
    words = [*REDUCTIONS, f"a dict of reduction, weights, ties ({', '.join(TIES)})"]
    words[-1] += f", metric ({', '.join(METRICS)}) and axis"
    raise unknown("prediction", given, words)
