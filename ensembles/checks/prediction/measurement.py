"""Which reduction of the members' outputs the ensemble's prediction is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

import torch

from ensembles.case import Case
from ensembles.checks.prediction.claim import PredictionClaim
from ensembles.checks.prediction.predictions import PredictionLook
from ensembles.checks.prediction.reductions import Found, kind_of
from ensembles.checks.prediction.words import Metric, told_metric, told_reduction
from ensembles.handling.numbers import checked_numbers
from ensembles.message import counted
from ensembles.subject import Model, Recipe

__all__ = ["PredictionReduction", "measure", "measure_prediction_reduction"]


@dataclass(frozen=True)
class PredictionReduction:
    """Which reduction of the members' outputs the prediction is.

    Attributes:
        members: The members' names.
        emits: What members emit: "logits", "probabilities" or "log-probabilities".
        gives: What the prediction is: "probabilities", "log-probabilities", "classes" or
            "unnormalised".
        shape: The prediction's shape.
        expected: The shape that it should have.
        classes: How many classes there are.
        found: Every known reduction that the prediction equals.
        metrics: What the metric is; None where none was given, empty where it is unknown.
        weights: The weights that were claimed; () for none.
        sums: Least and greatest sum of a row of the prediction.
    """

    members: tuple[str, ...]
    emits: str
    gives: str
    shape: tuple[int, ...]
    expected: tuple[int, ...]
    classes: int
    found: tuple[Found, ...]
    metrics: tuple[Metric, ...] | None
    weights: tuple[float, ...] = ()
    sums: tuple[float, float] = field(default=(1.0, 1.0), compare=False)

    @property
    def told(self) -> str:
        """The reductions that were found, in words."""
        words = [told_reduction(found, self.members, self.weights) for found in self.found]
        return " or ".join(words) or "no known reduction"

    def __str__(self) -> str:
        head = (
            f"{counted(self.members, 'member')} that emit {self.emits}; the prediction "
            f"({self.gives}) is {self.told}"
        )
        if self.metrics is None:
            return head
        metrics = " or ".join(map(told_metric, self.metrics)) or "none that is known"
        return f"{head}\n  metric   {metrics}"


def measure_prediction_reduction(
    model: Case | Model | Callable[[], Model],
    batch: Any = None,
    *,
    weights: Sequence[float] | None = None,
    axis: int = 1,
    **recipe: Unpack[Recipe],
) -> PredictionReduction:
    """Finds which reduction of the members' outputs the ensemble's prediction is.

    The model is looked at in eval mode. Whether members emit logits or probabilities is seen from
    their sums.

    Args:
        model: One module, or the members as a list or dict of modules.
        batch: What the model is called with; at least two rows that differ.
        weights: Weights of the members that the reduction is claimed to have; their sum is 1.
        axis: The class axis of outputs and prediction; 1 as in `cross_entropy`.
        **recipe: See `Subject`. `predict` returns probabilities, log-probabilities or logits of
            shape (sample, class, ...), or classes of shape (sample, ...). `evaluate` gets labels
            that the check draws. `members` is needed where the model's call returns the prediction.

    Returns:
        The measurement. The model, its hooks and the random generators are as before.

    Raises:
        ValueError: If there is no `predict`, there are fewer than two members, outputs do not have
            one tensor with classes, or members or rows cannot be told apart.

    Example:
        >>> two = [nn.Linear(4, 3), nn.Linear(4, 3)]
        >>> def predict(members, x):
        ...     return sum(member(x) for member in members).div(2).softmax(1)
        >>> print(measure_prediction_reduction(two, torch.randn(5, 4), predict=predict))
        2 members that emit logits; the prediction (probabilities) is the geometric mean of the
        probabilities
    """
    __tracebackhide__ = True
    claim = PredictionClaim(weights=weights, axis=axis)
    return measure(Case.of(model, batch, **recipe), claim)


def measure(case: Case, claim: PredictionClaim) -> PredictionReduction:
    """What the prediction of a case is, with the weights and the axis of the claim."""
    __tracebackhide__ = True
    if case.subject.predict is None:
        raise ValueError(
            f"subject {case.subject.name!r} has no prediction: give predict=, a function of the "
            "model and the batch."
        )
    checked_numbers(case.model)
    with case.preserved(), torch.no_grad():
        for module in case.modules.values():
            module.eval()
        look = PredictionLook(case, tuple(claim.weights or ()), claim.axis)
        seen, found = look.look()
    given, prediction = seen[0].given, seen[0].prediction
    floating = given.is_floating_point()
    kind = kind_of(prediction, look.tolerance) if floating else "classes"
    sums = prediction.sum(-1) if floating else torch.ones(1)
    return PredictionReduction(
        members=tuple(look.names),
        emits=look.kind,
        gives="unnormalised" if kind == "logits" else kind,
        shape=tuple(given.shape),
        expected=look.shape if floating else look.classless,
        classes=look.shape[claim.axis],
        found=tuple(sorted(set(found))),
        metrics=None if case.subject.evaluate is None else tuple(look.metrics(seen)),
        weights=look.weights,
        sums=(float(sums.min()), float(sums.max())),
    )
