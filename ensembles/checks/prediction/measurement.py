"""The measurement of `prediction`, and its assertions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ensembles.case import Case
from ensembles.checks.prediction.claim import PredictionClaim
from ensembles.checks.prediction.predictions import Bench, Evaluate, Predict
from ensembles.checks.prediction.reductions import Found, kind_of, rounded
from ensembles.handling.members import named_modules_of
from ensembles.handling.numbers import checked_numbers
from ensembles.handling.state import preserved
from ensembles.handling.training import hidden_modules
from ensembles.message import broken, counted, listed
from ensembles.subject import Members, Model, Outputs

__all__ = [
    "PredictionReduction",
    "assert_metric_of_prediction",
    "assert_prediction_reduced",
    "measure",
    "measure_prediction_reduction",
]

REDUCTIONS = ("arithmetic", "geometric", "logits", "vote")
METRICS = ("accuracy", "error", "nll", "brier")


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
        metrics: What the metric is, in words; empty where none was given or it is unknown.
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
    metrics: tuple[str, ...] | None
    weights: tuple[float, ...] = ()
    sums: tuple[float, float] = field(default=(1.0, 1.0), compare=False)

    @property
    def told(self) -> str:
        """The reductions that were found, in words."""
        words = [found.told(self.members, self.weights) for found in self.found]
        return " or ".join(words) or "no known reduction"

    def __str__(self) -> str:
        head = (
            f"{counted(self.members, 'member')} that emit {self.emits}; the prediction "
            f"({self.gives}) is {self.told}"
        )
        if self.metrics is None:
            return head
        return f"{head}\n  metric   {' or '.join(self.metrics) or 'none that is known'}"


def measure_prediction_reduction(
    model: Model,
    batch: Any,
    predict: Predict,
    *,
    outputs: Outputs | None = None,
    members: Members | None = None,
    weights: Sequence[float] | None = None,
    evaluate: Evaluate | None = None,
    axis: int = 1,
) -> PredictionReduction:
    """Finds which reduction of the members' outputs the ensemble's prediction is.

    The model is looked at in eval mode. Whether members emit logits or probabilities is seen from
    their sums. Reductions are told apart by their weights, which are unique: see
    `ensembles.checks.prediction.reductions`.

    Limits: where neither the member modules nor the model's own call can be changed from outside
    (`predict` calls inner parts of one module, or copies it), real outputs are compared, and those
    of a new network may not tell reductions apart: that is an error then.

    Args:
        model: One module, or the members as a list or dict of modules.
        batch: What the model is called with; at least two rows that differ.
        predict: The prediction, a function of model and batch: probabilities, log-probabilities or
            logits of shape (sample, class, ...), or classes of shape (sample, ...).
        outputs: Splits what one module returns into member outputs, in the order of the members.
        members: Finds the member modules inside one module; needed where its call returns the
            prediction itself.
        weights: Weights of the members that the reduction is claimed to have; their sum is 1.
        evaluate: The metric, a function of model, batch and labels (integers, drawn by the check).
        axis: The class axis of outputs and prediction; 1 as in `cross_entropy`.

    Returns:
        The measurement. The model, its hooks and the random generators are as before.

    Raises:
        ValueError: If there are fewer than two members, outputs do not have one tensor with
            classes, or members or rows cannot be told apart.

    Example:
        >>> two = [nn.Linear(4, 3), nn.Linear(4, 3)]
        >>> def predict(members, x):
        ...     return sum(member(x) for member in members).div(2).softmax(1)
        >>> print(measure_prediction_reduction(two, torch.randn(5, 4), predict))
        2 members that emit logits; the prediction (probabilities) is the geometric mean of the
        probabilities
    """
    checked_numbers(model)
    modules = list(named_modules_of(model).values())
    with preserved([*modules, *hidden_modules(modules)]), torch.no_grad():
        for module in modules:
            module.eval()
        bench = Bench(model, batch, predict, outputs, members, evaluate, tuple(weights or ()), axis)
        looks, found = bench.look()
    given, prediction = looks[0].given, looks[0].prediction
    floating = given.is_floating_point()
    kind = kind_of(prediction, bench.tolerance) if floating else "classes"
    sums = prediction.sum(-1) if floating else torch.ones(1)
    return PredictionReduction(
        members=tuple(bench.names),
        emits=bench.kind,
        gives="unnormalised" if kind == "logits" else kind,
        shape=tuple(given.shape),
        expected=bench.shape if floating else bench.classless,
        classes=bench.shape[axis],
        found=tuple(sorted(set(found))),
        metrics=None if evaluate is None else tuple(bench.metrics(looks)),
        weights=bench.weights,
        sums=(float(sums.min()), float(sums.max())),
    )


def assert_prediction_reduced(
    prediction: PredictionReduction, reduction: str = "arithmetic", *, ties: str = "lowest"
) -> None:
    """Checks that the prediction is this reduction of the members' outputs, row for row.

    Args:
        prediction: From `measure_prediction_reduction`, with `weights=` if there are any.
        reduction: "arithmetic" (mean of probabilities), "geometric" (softmax of the mean of
            log-probabilities), "logits" (mean of what members emit, as it is) or "vote"
            (plurality, as classes, as a one-hot tensor or as shares of the votes). Probabilities
            may be given as log-probabilities, and all means as classes.
        ties: What decides a vote between equals: "lowest" or "highest" class, "first" member, or
            "probability" (the highest mean probability).

    Raises:
        ValueError: If the reduction is unknown, or cannot be told from another on this batch.
        AssertionError: If the prediction is another reduction, or none.

    Example:
        >>> two = [nn.Linear(4, 3), nn.Linear(4, 3)]
        >>> def predict(members, x):
        ...     return torch.stack([member(x).softmax(1) for member in members]).mean(0)
        >>> assert_prediction_reduced(measure_prediction_reduction(two, torch.randn(5, 4), predict))
    """
    __tracebackhide__ = True
    expected = _expected(prediction, reduction, ties)
    right = [found for found in prediction.found if found in expected]
    others = [found for found in prediction.found if found not in expected]
    others = [found for found in others if not _same(right, found, prediction)]
    if right and others:
        names = [found.told(prediction.members, prediction.weights) for found in (*right, *others)]
        raise ValueError(
            f"{listed(names, 3)} cannot be told apart on this batch: members' outputs are too few "
            "or too equal. Give more rows; or members=a function that finds the member modules, so "
            "that their outputs can be changed while the check looks."
        )
    if right:
        return
    claim = expected[0].told(prediction.members, prediction.weights)
    meaning, remedy = _explanation(prediction)
    rows = [("prediction", f"expected {claim}", f"found {_shown(prediction)}")]
    fits = prediction.shape == prediction.expected
    if fits and prediction.gives == "unnormalised" and reduction != "logits":
        low, high = (f"{total:.3g}" for total in prediction.sums)
        sums = f"sums from {low} to {high}" if low != high else f"sums of {low}"
        rows.append(("rows", "expected to sum to 1", f"found {sums}"))
    raise AssertionError(
        broken(
            f"the prediction of members {listed(prediction.members)} is claimed to be {claim}, "
            "and is not",
            rows,
            total=f"members emit {prediction.emits}; the prediction is {_GIVES[prediction.gives]}",
            meaning=meaning,
            remedy=remedy,
        )
    )


def assert_metric_of_prediction(prediction: PredictionReduction, metric: str) -> None:
    """Checks that the metric is computed from the ensemble's prediction, with its own labels.

    Args:
        prediction: From `measure_prediction_reduction` with `evaluate=`.
        metric: "accuracy", "error", "nll" (mean negative log-likelihood) or "brier" (summed over
            classes, mean over rows).

    Raises:
        ValueError: If the metric is unknown, was not measured, or cannot be told from another.
        AssertionError: If it is a member's, the mean of the members', or something else.

    Example:
        >>> two = [nn.Linear(4, 3), nn.Linear(4, 3)]
        >>> def predict(members, x):
        ...     return torch.stack([member(x).softmax(1) for member in members]).mean(0)
        >>> def evaluate(members, x, labels):
        ...     return nn.functional.nll_loss(predict(members, x).log(), labels)
        >>> measured = measure_prediction_reduction(
        ...     two, torch.randn(5, 4), predict, evaluate=evaluate)
        >>> assert_metric_of_prediction(measured, "nll")
    """
    __tracebackhide__ = True
    if metric not in METRICS:
        raise ValueError(f"the metric cannot be claimed to be {metric!r}. It is {_or(METRICS)}.")
    if prediction.metrics is None:
        raise ValueError(
            f"the metric is claimed to be {metric}, and none was measured: give evaluate=a "
            "function of the model, the batch and the labels."
        )
    claim = f"the {metric} of the ensemble's prediction"
    if claim in prediction.metrics and len(prediction.metrics) > 1:
        raise ValueError(
            f"{listed(prediction.metrics, 3)} cannot be told apart on this batch: give more rows."
        )
    if claim in prediction.metrics:
        return
    found = " or ".join(prediction.metrics) or "no known metric of these predictions and labels"
    confined = "probabilities taken for logits" in found
    classes = prediction.classes
    low, high = _confined(classes)
    raise AssertionError(
        broken(
            f"the metric is claimed to be {claim}, and is not",
            [("metric", f"expected {claim}", f"found {found}")],
            total=f"{counted(prediction.members, 'member')}; the prediction is {prediction.told}",
            meaning=(
                f"Such a loss stays between {low:.5f} and {high:.5f} for {classes} classes, "
                "however good the prediction is."
                if confined
                else "What is reported says nothing about the ensemble."
            ),
            remedy=(
                "Usual cause: cross_entropy of what went through softmax before. Use "
                "nll_loss(p.log(), labels)."
                if confined
                else "Usual cause: the metric is computed for each member, or averaged over them; "
                "or rows and labels are in another order. Reduce first, then compare."
            ),
        )
    )


# --- what is claimed ----------------------------------------------------------------------------


def _expected(prediction: PredictionReduction, reduction: str, ties: str) -> list[Found]:
    count = len(prediction.members)
    weights = rounded(prediction.weights or [1 / count] * count)
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"a prediction cannot be claimed to be {reduction!r}. It is {_or(REDUCTIONS)}."
        )
    if reduction == "logits" and prediction.emits != "logits":
        raise ValueError(
            f"the prediction is claimed to be the mean of logits, and members emit "
            f"{prediction.emits}. Claim 'arithmetic' or 'geometric'."
        )
    if reduction != "vote":
        # The mean of logits is largest where the geometric mean is.
        mean = "geometric" if reduction == "logits" else reduction
        return [Found(reduction, weights), Found(f"class of {mean}", weights)]
    if ties not in ("lowest", "highest", "first", "probability"):
        raise ValueError(
            f"ties cannot be claimed to go to {ties!r}. It is lowest, highest, first or "
            "probability."
        )
    if prediction.weights:
        raise ValueError("a vote has no weights here: claim 'arithmetic', or leave weights out.")
    winner = Found(f"winner, {ties}")
    # Shares, and counts: the same votes before one class is picked.
    shares = [Found("vote", weights), Found("vote", (1.0,) * count)]
    return [winner, *shares] if _picks(prediction) else [*shares, winner]


def _same(right: Sequence[Found], other: Found, prediction: PredictionReduction) -> bool:
    """Whether two reductions to classes are one function, and not equal by chance."""
    names = {found.reduction for found in right}
    if other.reduction.startswith("winner") and any(name.startswith("winner") for name in names):
        return True  # no vote was between equals: with two classes and three members none is
    of_two = {"class of arithmetic", "class of geometric", "winner, probability"}
    two = len(prediction.members) == prediction.classes == 2
    return two and not prediction.weights and names <= of_two and other.reduction in of_two


_GIVES = {
    "probabilities": "a distribution in each row",
    "log-probabilities": "the logarithm of a distribution in each row",
    "classes": "one class in each row",
    "unnormalised": "no distribution",
}


def _picks(prediction: PredictionReduction) -> bool:
    one_hot = any(found.reduction.startswith("winner") for found in prediction.found)
    return prediction.gives == "classes" or one_hot


_EXPLANATIONS = {
    "geometric": (
        "The mean of logits, or of logarithms, is another classifier than the mean of "
        "probabilities: confident members count more.",
        "Usual cause: softmax after the mean in place of before it. Average softmax(logits), or "
        "claim 'geometric'.",
    ),
    "twice": (
        "Softmax of probabilities is nearly uniform: accuracy hardly changes, the loss does.",
        "Usual cause: members that end in softmax, and a softmax in the ensemble too. Leave one.",
    ),
    "alone": (
        "The other members are computed, and then ignored.",
        "Usual cause: a variable of the loop over members that is used after it, or an index.",
    ),
    "order": (
        "Predictions are paired with the labels of others.",
        "Usual cause: view or reshape where permute or transpose is meant, or a shuffled loader. "
        "Stack members on an axis of their own.",
    ),
    "not a distribution": (
        "It is no distribution over classes, so that losses and calibration mean nothing.",
        "Usual cause: a softmax or a division that is missing. Normalise after the reduction.",
    ),
    "shape": (
        "It is not one prediction for each row.",
        "Usual cause: no reduction, one over another axis, or a last batch that was dropped. "
        "Reduce over the members, and keep all rows and classes.",
    ),
    "weights": (
        "Members count for more or less than they are claimed to.",
        "Usual cause: weights applied twice or to the wrong member, or a mean after a weighted "
        "sum. Apply each weight once, to its own member.",
    ),
    "other": (
        "The ensemble that is evaluated is not the one that is claimed.",
        "Compute the reduction as claimed, or claim what it is.",
    ),
}


def _explanation(prediction: PredictionReduction) -> tuple[str, str]:
    words = prediction.told
    first = prediction.found[0] if prediction.found else Found("")
    if first.order:
        key = "order"
    elif "twice" in first.reduction or first.reduction.startswith("softmax"):
        key = "twice"
    elif words.endswith(" alone"):
        key = "alone"
    elif "weights" in words:
        key = "weights"
    elif prediction.shape != prediction.expected:
        key = "shape"
    elif prediction.gives == "unnormalised":
        key = "not a distribution"
    elif first.reduction.endswith("geometric"):
        key = "geometric"
    else:
        key = "other"
    return _EXPLANATIONS[key]


def _shown(prediction: PredictionReduction) -> str:
    if prediction.found or prediction.shape == prediction.expected:
        return prediction.told
    return f"shape {prediction.shape} in place of {prediction.expected}"


def _confined(classes: int) -> tuple[float, float]:
    """What cross-entropy of a distribution, taken for logits, lies between."""
    high = math.log(math.e + classes - 1)
    return high - 1, high


def _or(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def measure(case: Case, claim: PredictionClaim) -> PredictionReduction:
    """What `prediction` looks at, for this claim."""
    __tracebackhide__ = True
    given = case.subject
    if given.predict is None:
        raise ValueError(
            f"subject {given.name!r} claims a prediction, and has none: give "
            "Subject(predict=...), a function of the model and the batch."
        )
    return measure_prediction_reduction(
        case.model,
        case.batch,
        given.predict,
        outputs=given.outputs,
        members=given.members,
        weights=claim.weights,
        evaluate=given.evaluate,
    )
