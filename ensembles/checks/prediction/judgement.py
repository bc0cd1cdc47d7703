"""Whether the prediction is the claimed reduction, and the metric is that of the prediction."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ensembles.checks.prediction.claim import METRICS, REDUCTIONS, TIES, PredictionClaim
from ensembles.checks.prediction.measurement import PredictionReduction
from ensembles.checks.prediction.reductions import Found, rounded
from ensembles.checks.prediction.words import TOLD, Metric, told_metric, told_reduction
from ensembles.claims import unknown
from ensembles.findings import Finding, Findings
from ensembles.message import assert_held, listed

__all__ = ["assert_metric_of_prediction", "assert_prediction_reduced", "judge"]


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
        >>> from ensembles import measure_prediction_reduction
        >>> two = [nn.Linear(4, 3), nn.Linear(4, 3)]
        >>> def predict(members, x):
        ...     return torch.stack([member(x).softmax(1) for member in members]).mean(0)
        >>> assert_prediction_reduced(
        ...     measure_prediction_reduction(two, torch.randn(5, 4), predict=predict))
    """
    __tracebackhide__ = True
    if reduction not in REDUCTIONS:
        raise unknown("prediction", reduction, REDUCTIONS)
    if ties not in TIES:
        raise unknown("ties of a vote", ties, TIES)
    claim = PredictionClaim(reduction, prediction.weights or None, ties)
    assert_held(judge(prediction, claim))


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
        >>> from ensembles import measure_prediction_reduction
        >>> two = [nn.Linear(4, 3), nn.Linear(4, 3)]
        >>> def predict(members, x):
        ...     return torch.stack([member(x).softmax(1) for member in members]).mean(0)
        >>> def evaluate(members, x, labels):
        ...     return nn.functional.nll_loss(predict(members, x).log(), labels)
        >>> measured = measure_prediction_reduction(
        ...     two, torch.randn(5, 4), predict=predict, evaluate=evaluate)
        >>> assert_metric_of_prediction(measured, "nll")
    """
    __tracebackhide__ = True
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    items = tuple(_of_metric(prediction, metric))
    assert_held(Findings(claim=_sentence(prediction, metric=metric), items=items))


def judge(prediction: PredictionReduction, claim: PredictionClaim) -> Findings:
    """Where the prediction is another reduction than claimed, and the metric is another's."""
    expected = _expected(prediction, claim)
    wrong = tuple(_of_reduction(prediction, claim, expected))
    metric = () if claim.metric is None else tuple(_of_metric(prediction, claim.metric))
    sentence = _sentence(
        prediction, expected=None if metric and not wrong else expected[0], metric=claim.metric
    )
    return Findings(claim=sentence, items=(*wrong, *metric))


def _sentence(
    prediction: PredictionReduction, *, expected: Found | None = None, metric: str | None = None
) -> str:
    if expected is None:
        of_ensemble = told_metric(Metric(str(metric), "prediction"))
        return f"the metric is claimed to be {of_ensemble}, but is not"
    claimed = told_reduction(expected, prediction.members, prediction.weights)
    members = listed(prediction.members)
    return f"the prediction of members {members} is claimed to be {claimed}, but is not"


# --- the reduction ------------------------------------------------------------------------------


def _expected(prediction: PredictionReduction, claim: PredictionClaim) -> list[Found]:
    count = len(prediction.members)
    weights = rounded(prediction.weights or [1 / count] * count)
    if claim.reduction == "logits" and prediction.emits != "logits":
        raise ValueError(
            "the prediction is claimed to be the mean of logits, but members emit "
            f"{prediction.emits}. Claim 'arithmetic' or 'geometric'."
        )
    if claim.reduction != "vote":
        # The mean of logits is largest where the geometric mean is.
        mean = "geometric" if claim.reduction == "logits" else claim.reduction
        return [Found(claim.reduction, weights), Found(f"class of {mean}", weights)]
    if prediction.weights:
        raise ValueError("a vote has no weights here: claim 'arithmetic', or leave weights out.")
    winner = Found(f"winner, {claim.ties}")
    # Shares, and counts: the same votes before one class is picked.
    shares = [Found("vote", weights), Found("vote", (1.0,) * count)]
    return [winner, *shares] if _picks(prediction) else [*shares, winner]


def _of_reduction(
    prediction: PredictionReduction, claim: PredictionClaim, expected: Sequence[Found]
) -> Iterator[Finding]:
    right = [found for found in prediction.found if found in expected]
    others = [found for found in prediction.found if found not in expected]
    others = [found for found in others if not _same(right, found, prediction)]
    words = [
        told_reduction(found, prediction.members, prediction.weights)
        for found in (*right, *others, expected[0])
    ]
    if right and others:
        raise ValueError(
            f"{listed(words[:-1], 3)} cannot be told apart on this batch: members' outputs are too "
            "few or too equal. Give more rows; or members=a function that finds the member "
            "modules, so that their outputs can be changed while the check looks."
        )
    if right:
        return
    kind = _kind(prediction)
    meaning, cause, remedy = _KINDS[kind]
    yield Finding(
        kind=kind,
        place="prediction",
        members=prediction.members,
        expected=words[-1],
        found=_shown(prediction),
        meaning=meaning,
        cause=cause,
        remedy=remedy,
    )
    fits = prediction.shape == prediction.expected
    if fits and prediction.gives == "unnormalised" and claim.reduction != "logits":
        low, high = (f"{total:.3g}" for total in prediction.sums)
        yield Finding(
            kind="not a distribution",
            place="rows of the prediction",
            expected="to sum to 1",
            found=f"sums from {low} to {high}" if low != high else f"sums of {low}",
            amount=prediction.sums[1],
            meaning=_KINDS["not a distribution"][0],
            cause=_KINDS["not a distribution"][1],
            remedy=_KINDS["not a distribution"][2],
        )


def _same(right: Sequence[Found], other: Found, prediction: PredictionReduction) -> bool:
    """Whether two reductions to classes are one function, and not equal by chance."""
    names = {found.reduction for found in right}
    if other.reduction.startswith("winner") and any(name.startswith("winner") for name in names):
        return True  # no vote was between equals: with two classes and three members none is
    of_two = {"class of arithmetic", "class of geometric", "winner, probability"}
    two = len(prediction.members) == prediction.classes == 2
    return two and not prediction.weights and names <= of_two and other.reduction in of_two


def _picks(prediction: PredictionReduction) -> bool:
    one_hot = any(found.reduction.startswith("winner") for found in prediction.found)
    return prediction.gives == "classes" or one_hot


def _shown(prediction: PredictionReduction) -> str:
    if prediction.found or prediction.shape == prediction.expected:
        return prediction.told
    return f"shape {prediction.shape}, but members have {prediction.expected}"


_KINDS = {
    "geometric": (
        "The mean of logits, or of logarithms, is another classifier than the mean of "
        "probabilities: confident members count more.",
        "softmax after the mean, and not before it",
        "Average softmax(logits), or claim 'geometric'.",
    ),
    "softmax twice": (
        "Softmax of probabilities is nearly uniform: accuracy hardly changes, but the loss does.",
        "members that end in softmax, and a softmax in the ensemble too",
        "Leave one.",
    ),
    "one member": (
        "The other members are computed, but they are ignored.",
        "a variable of the loop over members that is used after it, or an index",
        "Reduce over all members.",
    ),
    "another order": (
        "Predictions are paired with the labels of others.",
        "view or reshape where permute or transpose is meant, or a shuffled loader",
        "Stack members on an axis of their own.",
    ),
    "not a distribution": (
        "It is no distribution over classes, so losses and calibration mean nothing.",
        "a softmax or a division that is missing",
        "Normalise after the reduction.",
    ),
    "another shape": (
        "It is not one prediction for each row.",
        "no reduction, one over another axis, or a last batch that was dropped",
        "Reduce over the members, and keep all rows and classes.",
    ),
    "other weights": (
        "Members count for more or less than they are claimed to.",
        "weights that are applied twice or to the wrong member, or a mean after a weighted sum",
        "Apply each weight once, to its own member.",
    ),
    "another reduction": (
        "The ensemble that is evaluated is not the one that is claimed.",
        "",
        "Compute the reduction as claimed, or claim what it is.",
    ),
}
"""By kind of finding: what it means, the usual cause, and what to do."""


def _kind(prediction: PredictionReduction) -> str:
    """What is wrong with the prediction, one of `_KINDS`."""
    first = prediction.found[0] if prediction.found else Found("")
    count = len(prediction.members)
    claimed = rounded(prediction.weights or [1 / count] * count)
    is_sum = set(first.weights) == {1.0}
    others = any(abs(x - y) > TOLD for x, y in zip(first.weights, claimed, strict=False))
    kinds = {
        "another order": bool(first.order),
        "softmax twice": "twice" in first.reduction or first.reduction.startswith("softmax"),
        "one member": first.alone,
        "other weights": others and not is_sum,
        "another shape": prediction.shape != prediction.expected,
        "not a distribution": prediction.gives == "unnormalised",
        "geometric": first.reduction.endswith("geometric"),
    }
    return next((kind for kind, holds in kinds.items() if holds), "another reduction")


# --- the metric ---------------------------------------------------------------------------------


def _of_metric(prediction: PredictionReduction, metric: str) -> Iterator[Finding]:
    if prediction.metrics is None:
        raise ValueError(
            f"the metric is claimed to be {metric}, but none was measured: give evaluate=a "
            "function of the model, the batch and the labels."
        )
    claimed, found = Metric(metric, "prediction"), prediction.metrics
    words = [told_metric(one) for one in found]
    if claimed in found and len(found) > 1:
        raise ValueError(f"{listed(words, 3)} cannot be told apart on this batch: give more rows.")
    if claimed in found:
        return
    confined = any(one.name == "cross-entropy of logits" for one in found)
    high = math.log(math.e + prediction.classes - 1)
    yield Finding(
        kind="probabilities for logits" if confined else "another metric",
        place="metric",
        expected=told_metric(claimed),
        found=" or ".join(words) or "no known metric of these predictions and labels",
        meaning=f"Such a loss stays between {high - 1:.5f} and {high:.5f} for "
        f"{prediction.classes} classes, however good the prediction is."
        if confined
        else "What is reported says nothing about the ensemble.",
        cause="cross_entropy of what went through softmax before"
        if confined
        else "the metric is computed for each member, or averaged over them; or rows and labels "
        "are in another order",
        remedy="Use nll_loss(p.log(), labels)." if confined else "Reduce first, then compare.",
    )
