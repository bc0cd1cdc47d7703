"""Reductions and metrics in words, for a measurement's text and for findings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ensembles.checks.prediction.reductions import Found

__all__ = ["REDUCTIONS", "Metric", "told_metric", "told_reduction"]

TOLD = 2e-3
"""How far a solved weight may be from one that is told in words, and twice that for their sum."""

REDUCTIONS = {
    "arithmetic": "arithmetic mean of the probabilities",
    "geometric": "geometric mean of the probabilities",
    "geometric, not normalised": "geometric mean of the probabilities, not normalised",
    "log-probabilities": "mean of the log-probabilities, not normalised",
    "logits": "mean of the logits",
    "vote": "shares of the votes",
    "softmax twice": "mean of the softmax of probabilities (softmax twice)",
    "softmax of the mean": "softmax of the mean of the probabilities (softmax twice)",
    "softmax of the geometric": "softmax of the geometric mean (softmax twice)",
    "uniform": "uniform distribution, whatever members predict (softmax over the members?)",
    "maximum": "maximum over the members",
    "maximum, normalised": "maximum over the members, normalised",
    "median": "median over the members",
    "winner, lowest": "winner of the vote, ties to the lowest class",
    "winner, highest": "winner of the vote, ties to the highest class",
    "winner, first": "winner of the vote, ties to the first member",
    "winner, probability": "winner of the vote, ties by the mean probability",
    "class of arithmetic": "class of the arithmetic mean",
    "class of geometric": "class of the geometric mean",
    "class of member": "class of one member",
}

METRICS = {
    "cross-entropy of logits": "cross-entropy, with probabilities taken for logits,",
    "nll of logarithms": "nll, with probabilities taken for their logarithms,",
}
"""Of metrics that are not told by their name."""


class Metric(NamedTuple):
    """A metric, and what it is computed from.

    Attributes:
        name: A key of `reductions.metrics_of`.
        of: "prediction" (the ensemble's), "members" (their mean), or "member".
        member: The member's name, where it is one member's; else "".
    """

    name: str
    of: str
    member: str = ""


def told_metric(metric: Metric) -> str:
    """A metric in words.

    Example:
        >>> told_metric(Metric("nll", "prediction")), told_metric(Metric("nll", "member", "2"))
        ("the nll of the ensemble's prediction", 'the nll of member 2 alone')
    """
    name = METRICS.get(metric.name, metric.name)
    if metric.of == "members":
        return f"the mean of the members' {name}"
    whose = "the ensemble's prediction" if metric.of == "prediction" else ""
    return f"the {name} of {whose or f'member {metric.member} alone'}"


def told_reduction(found: Found, members: Sequence[str], claimed: Sequence[float] = ()) -> str:
    """A reduction in words.

    Args:
        found: The reduction.
        members: The members' names.
        claimed: The weights that are claimed; () for none.

    Example:
        >>> told_reduction(Found("arithmetic", (0.0, 1.0)), ["0", "1"])
        'member 1 alone'
        >>> told_reduction(Found("logits", (1.0, 1.0)), ["0", "1"])
        'the sum over members in place of the mean of the logits'
    """
    words = f"the {REDUCTIONS[found.reduction]}{_weights(found, members, claimed)}"
    if found.alone:
        alone = members[found.weights.index(1.0)]
        words = {
            "arithmetic": f"member {alone} alone",
            "logits": f"the logits of member {alone} alone",
            "vote": f"the class of member {alone} alone",
            "softmax twice": f"the softmax of member {alone}'s probabilities (softmax twice)",
            "class of member": f"the class of member {alone} alone",
        }.get(found.reduction, words)
    elif len(found.weights) > 1 and all(x == 1.0 for x in found.weights):
        words = f"the sum over members in place of the {REDUCTIONS[found.reduction]}"
    return words + (f", {_order(found)}" if found.order else "")


def _order(found: Found) -> str:
    things, places = found.order or ("", ())
    if not places:
        return f"of {things} that a reshape mixed (view in place of permute)"
    told = ", ".join(str(i) for i in places[:6]) + (", ..." if len(places) > 6 else "")
    return f"with {things} in another order: {told}"


def _weights(found: Found, members: Sequence[str], claimed: Sequence[float]) -> str:
    w, count = found.weights, len(members)
    if not w:
        return ""
    for words, wanted in _known_weights(claimed, count):
        if all(abs(x - y) < TOLD for x, y in zip(w, wanted, strict=True)):
            return words
    left_out = [name for name, x in zip(members, w, strict=True) if abs(x) < TOLD]
    if left_out and len({round(x, 2) for x in w if abs(x) >= TOLD}) == 1:
        total = "" if abs(sum(w) - 1) < 2 * TOLD else ", not divided by their number"
        return f" without member {', '.join(left_out)}{total}"
    shown = f"weights {', '.join(f'{x:.3g}' for x in w)}"
    if claimed and sorted(round(x, 2) for x in w) == sorted(round(x, 2) for x in claimed):
        return f", with the weights of other members: {shown}"
    return f" with {shown}"


def _known_weights(claimed: Sequence[float], count: int) -> Iterator[tuple[str, list[float]]]:
    if not claimed:
        yield "", [1 / count] * count
        return
    squares = [x * x for x in claimed]
    yield ", with the claimed weights", list(claimed)
    yield ", with the weights applied twice", squares
    yield ", with the weights applied twice, normalised", [x / sum(squares) for x in squares]
    yield f", with the weights, and divided by {count} too", [x / count for x in claimed]
    yield ", without the weights", [1 / count] * count
