"""Which reduction of the members' outputs a prediction is, and which metric a number is.

A reduction is found by solving for its weights: a prediction that is a weighted mean of the
members' probabilities has one set of weights only, whatever they are, so "member 2 alone", "the
weights twice" and "not divided by 3" need no list. The same is done for logarithms of
probabilities (geometric means), for logits, for votes, and for softmax applied once too often.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ensembles.tolerance import PROBABILITY_SUM

__all__ = [
    "Emitted",
    "Found",
    "Order",
    "is_alone",
    "kind_of",
    "matching",
    "metrics_of",
    "reductions_of",
    "reorderings_of",
    "rounded",
]

SMALLEST = 1e-30
"""Stands for probabilities that are zero, where a logarithm is taken."""

SIMPLER = 0.1
"""How far solved weights may be from simple ones that fit too, in shares of a mean's weight: what
lies between is rounding, and the nearest other mean leaves a member out."""

DEPENDENT = 1e-6
"""Ratio of singular values below which members' outputs depend on each other, and no weights are
unique: in float64, of outputs that were changed to differ."""

WHOLE = 1e-3
"""How far a weight may be from a whole number that is shown for it: a mean over hundreds of numbers
in float32 is known better."""

DIGITS = 1e-3
"""Relative difference of metrics that are one number: they are often returned with three digits."""

LEAST_METRIC = 1e-2
"""Of smaller metrics, the difference that counts is a part of this: an error rate may be zero."""


Series = TypeVar("Series")


@dataclass(frozen=True, order=True)
class Found:
    """A reduction that the prediction equals.

    Attributes:
        reduction: A key of `words.REDUCTIONS`.
        weights: Of the members, to four digits; () where the reduction has none.
        order: How rows or classes are paired, where it is not as given; else ().
    """

    reduction: str
    weights: tuple[float, ...] = ()
    order: Order | tuple[()] = ()

    @property
    def alone(self) -> bool:
        """Whether one member counts, and no other."""
        return is_alone(self.weights)


class Order(NamedTuple):
    """How rows or classes are paired, where it is not as given.

    Attributes:
        things: "rows" or "classes" that come in another order; "members and rows" where a reshape
            mixed them.
        places: Which of them stands in each place; () for a reshape.
    """

    things: str
    places: tuple[int, ...] = ()


@dataclass(frozen=True)
class Emitted:
    """What members emit, as float64.

    Attributes:
        values: As emitted, of shape (member, row, class).
        kind: "logits", "probabilities" or "log-probabilities".
    """

    values: Tensor
    kind: str

    @property
    def logarithms(self) -> Tensor:
        """The members' log-probabilities."""
        if self.kind == "logits":
            return self.values.log_softmax(-1)
        return self.values if self.kind != "probabilities" else _log(self.values)

    @property
    def probabilities(self) -> Tensor:
        """The members' probabilities."""
        return self.values if self.kind == "probabilities" else self.logarithms.exp()


def kind_of(values: Tensor, tolerance: float) -> str:
    """What rows of numbers are, by their sums: "probabilities", "log-probabilities" or "logits".

    Example:
        >>> [kind_of(x, 1e-4) for x in (torch.tensor([[0.5, 0.5]]), torch.zeros(1, 2))]
        ['probabilities', 'logits']
    """
    if not values.isfinite().logical_or(values == -math.inf).all():
        return "logits"
    if bool((values >= -tolerance).all()) and _near(values.sum(-1), 1, tolerance):
        return "probabilities"
    if bool((values <= tolerance).all()) and _near(values.exp().sum(-1), 1, tolerance):
        return "log-probabilities"
    return "logits"


def reductions_of(
    prediction: Tensor, emitted: Emitted, tolerance: float, *, claimed: Sequence[float] = ()
) -> list[Found]:
    """Every known reduction that the prediction equals.

    Args:
        prediction: Of shape (row, class), in any of the three kinds, or classes of shape (row,).
        emitted: What the members emit.
        tolerance: Greatest difference, for numbers of order 1.
        claimed: Weights of the members that are claimed, by which votes of classes are looked at.

    Example:
        >>> emitted = Emitted(torch.randn(3, 8, 4, dtype=torch.float64), "logits")
        >>> reductions_of(emitted.values.mean(0).softmax(-1), emitted, 1e-9)[0].reduction
        'geometric'
    """
    if prediction.is_floating_point():
        return list(_by_value(prediction, emitted, tolerance, claimed))
    return list(_by_class(prediction, emitted, claimed))


def reorderings_of(
    prediction: Tensor, emitted: Emitted, tolerance: float, *, claimed: Sequence[float] = ()
) -> list[Found]:
    """The reductions that the prediction is when members and rows, or classes, are mixed up.

    Args:
        prediction: Of shape (row, class).
        emitted: What the members emit.
        tolerance: Greatest difference, for numbers of order 1.
        claimed: Weights of the members that are claimed.

    Example:
        >>> emitted = Emitted(torch.randn(3, 8, 4, dtype=torch.float64), "logits")
        >>> shuffled = emitted.probabilities.mean(0).roll(1, 0)
        >>> reorderings_of(shuffled, emitted, 1e-9)[0].order
        Order(things='rows', places=(7, 0, 1, 2, 3, 4, 5, 6))
    """
    if not prediction.is_floating_point():
        return []
    found = []
    for order, view in _scrambled(emitted.values):
        found += [
            Found(f.reduction, f.weights, order)
            for f in _by_value(prediction, Emitted(view, emitted.kind), tolerance, claimed)
            if f.weights and not is_alone(f.weights)
        ]
    return found or list(_permuted(prediction, emitted, tolerance, claimed))


# --- predictions that are numbers ---------------------------------------------------------------


def _by_value(
    prediction: Tensor, emitted: Emitted, tolerance: float, claimed: Sequence[float]
) -> Iterator[Found]:
    kind = kind_of(prediction, tolerance)
    target = prediction.exp() if kind == "log-probabilities" else prediction
    if not target.isfinite().all():
        return
    p = emitted.probabilities
    scale = max(1.0, float(target.abs().max()))

    def fits(value: Tensor) -> bool:
        return float((value - target).abs().max()) < tolerance * scale

    for reduction, basis, of_mean in _means(emitted, kind != "logits"):
        if of_mean is None:
            weights = _solved(basis, target)
        elif bool((target >= 0).all()):
            up_to_constants = kind != "logits"
            weights = _solved(basis, _log(target), row_weight=target if up_to_constants else None)
        else:
            continue
        if weights is None:
            continue
        # Simple weights that fit as well are what was meant: the rest is rounding.
        for simple in (*_simple(weights, claimed), weights):
            mean = torch.einsum("m,mrc->rc", simple, basis)
            if fits(mean if of_mean is None else of_mean(mean)):
                shown = rounded(simple.tolist())
                # Of one member, all means are the same; and of none.
                if any(shown) and (of_mean is None or not is_alone(shown)):
                    yield Found(reduction, shown)
                break
    top = p.max(0).values
    others = {
        "softmax of the geometric": emitted.logarithms.mean(0).softmax(-1).softmax(-1),
        "uniform": torch.full_like(target, 1 / target.shape[-1]),
        "maximum": top,
        "maximum, normalised": top / top.sum(-1, keepdim=True),
        **({"median": p.median(0).values} if len(p) > 2 else {}),
        **{name: _one_hot(c, p.shape[-1]) for name, c in _winners(p).items()},
    }
    for reduction, value in others.items():
        if fits(value):
            yield Found(reduction)


def _means(
    emitted: Emitted, distribution: bool
) -> Iterator[tuple[str, Tensor, Callable[[Tensor], Tensor] | None]]:
    """Name, what is averaged, and what is done to the mean: a softmax, an exponential, nothing."""
    p, logs = emitted.probabilities, emitted.logarithms
    yield "arithmetic", p, None
    yield "vote", _one_hot(p.argmax(-1), p.shape[-1]), None
    yield "softmax twice", p.softmax(-1), None
    if distribution:
        yield "geometric", logs, lambda mean: mean.softmax(-1)
        yield "softmax of the mean", p, lambda mean: mean.softmax(-1)
        return
    yield "geometric, not normalised", logs, torch.exp
    yield "log-probabilities", logs, None
    if emitted.kind == "logits":
        yield "logits", emitted.values, None


def _simple(weights: Tensor, claimed: Sequence[float]) -> Iterator[Tensor]:
    count = len(weights)
    for simple in (
        torch.full_like(weights, 1 / count),
        *([torch.tensor(claimed, dtype=torch.float64)] if claimed else []),
        weights.round(),
    ):
        if float((simple - weights).abs().max()) < SIMPLER / count:
            yield simple


def _solved(basis: Tensor, target: Tensor, *, row_weight: Tensor | None = None) -> Tensor | None:
    """Weights w of the members with sum_m w_m basis_m = target; None where they are not unique.

    With `row_weight` (probabilities), only up to a constant in each row: entries count by their
    probability, since the logarithm of a small one is all rounding.
    """
    if row_weight is not None:
        share = row_weight.clamp_min(0)
        basis = (basis - (share * basis).sum(-1, keepdim=True)) * share.sqrt()
        target = (target - (share * target).sum(-1, keepdim=True)) * share.sqrt()
    matrix = basis.flatten(1).T
    singular = torch.linalg.svdvals(matrix)
    if len(matrix) <= len(basis) or singular[-1] < DEPENDENT * singular[0] or not singular[0]:
        return None
    solution: Tensor = torch.linalg.lstsq(matrix, target.flatten()[:, None]).solution[:, 0]
    return solution if solution.isfinite().all() else None


def _scrambled(values: Tensor) -> Iterator[tuple[Order, Tensor]]:
    """The two wrong ways to take (member, row, class) for (row, member, class) in memory."""
    members, rows, classes = values.shape
    by_member = values.reshape(rows, members, classes).permute(1, 0, 2)
    by_row = values.permute(1, 0, 2).reshape(members, rows, classes)
    mixed = Order("members and rows")
    yield mixed, by_member
    if not torch.equal(by_member, by_row):
        yield mixed, by_row


def _permuted(
    prediction: Tensor, emitted: Emitted, tolerance: float, claimed: Sequence[float]
) -> Iterator[Found]:
    """Reductions whose rows, or classes, come in another order."""
    logarithms = kind_of(prediction, tolerance) == "log-probabilities"
    target = prediction.exp() if logarithms else prediction
    members = len(emitted.values)
    weights = torch.tensor(claimed or [1 / members] * members, dtype=torch.float64)
    p, logs = emitted.probabilities, emitted.logarithms
    means = {
        "arithmetic": torch.einsum("m,mrc->rc", weights, p),
        "geometric": torch.einsum("m,mrc->rc", weights, logs).softmax(-1),
        "logits": torch.einsum("m,mrc->rc", weights, emitted.values),
    }
    for reduction, mean in means.items():
        for things, found, expected in (("rows", target, mean), ("classes", target.T, mean.T)):
            order = _matched(found, expected, tolerance)
            if order is not None:
                shown = rounded(weights.tolist())
                yield Found(reduction, shown, Order(things, tuple(order)))


def _matched(found: Tensor, expected: Tensor, tolerance: float) -> list[int] | None:
    """Which row of `expected` every row of `found` is, where each is used once."""
    distances = (found[:, None] - expected[None]).abs().amax(-1)
    nearest, order = distances.min(1)
    scale = max(1.0, float(found.abs().max()))
    one_each = len(set(order.tolist())) == len(order)
    return order.tolist() if one_each and bool((nearest < tolerance * scale).all()) else None


# --- predictions that are classes ---------------------------------------------------------------


def _by_class(prediction: Tensor, emitted: Emitted, claimed: Sequence[float]) -> Iterator[Found]:
    p, logs = emitted.probabilities, emitted.logarithms
    members = len(p)
    weightings = {tuple([1 / members] * members), *([tuple(claimed)] if claimed else [])}
    for weighting in sorted(weightings):
        weights = torch.tensor(weighting, dtype=torch.float64)
        shown = rounded(weights.tolist())
        for reduction, values in (("arithmetic", p), ("geometric", logs)):
            mean = torch.einsum("m,mrc->rc", weights, values)
            if torch.equal(mean.argmax(-1), prediction):
                yield Found(f"class of {reduction}", shown)
    for reduction, winner in _winners(p).items():
        if torch.equal(winner, prediction):
            yield Found(reduction)
    for member in range(members):
        if torch.equal(p[member].argmax(-1), prediction):
            yield Found("class of member", tuple(float(i == member) for i in range(members)))


def _winners(p: Tensor) -> dict[str, Tensor]:
    """The class with most votes, by what decides between equals."""
    votes = p.argmax(-1)
    counts = _one_hot(votes, p.shape[-1]).sum(0)
    tied = counts == counts.amax(-1, keepdim=True)
    classes = torch.arange(p.shape[-1])
    first = torch.gather(tied, 1, votes.T).to(torch.int8).argmax(1)
    return {
        "winner, lowest": torch.where(tied, classes, len(classes)).amin(-1),
        "winner, highest": torch.where(tied, classes, -1).amax(-1),
        "winner, first": torch.gather(votes.T, 1, first[:, None])[:, 0],
        "winner, probability": torch.where(tied, p.mean(0), -1.0).argmax(-1),
    }


# --- metrics ------------------------------------------------------------------------------------


def metrics_of(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """The usual metrics of one prediction, and what a loss becomes that takes it for logits.

    Args:
        probabilities: Of shape (row, class).
        labels: Of shape (row,).

    Example:
        >>> metrics_of(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))["brier"]
        0.0
    """
    p = probabilities.double()
    of_label = torch.gather(p, 1, labels[:, None])[:, 0]
    right = float((p.argmax(-1) == labels).double().mean())
    brier = float((p - _one_hot(labels, p.shape[-1])).square().sum(-1).mean())
    return {
        "accuracy": right,
        "error": 1 - right,
        "nll": float(-_log(of_label).mean()),
        "brier": brier,
        "accuracy in per cent": 100 * right,
        "error in per cent": 100 - 100 * right,
        "brier, mean over classes": brier / p.shape[-1],
        "cross-entropy of logits": float((p.exp().sum(-1).log() - of_label).mean()),
        "nll of logarithms": float(-of_label.mean()),
    }


# --- numbers ------------------------------------------------------------------------------------


def is_alone(weights: Sequence[float]) -> bool:
    """Whether one weight is 1, and all others are 0.

    Example:
        >>> is_alone([0.0, 1.0]), is_alone([0.5, 0.5])
        (True, False)
    """
    return sorted(weights)[-1:] == [1.0] and sum(map(abs, weights)) == 1.0


def rounded(weights: Iterable[float]) -> tuple[float, ...]:
    """To four digits; nearly whole numbers are whole, since networks round in float32.

    Example:
        >>> rounded([1 / 3, 0.99999, 0.0])
        (0.3333, 1.0, 0.0)
    """
    return tuple(float(round(x)) if abs(x - round(x)) < WHOLE else round(x, 4) for x in weights)


def _one_hot(classes: Tensor, count: int) -> Tensor:
    return torch.nn.functional.one_hot(classes, count).double()


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.clamp_min(SMALLEST).log()


def _near(values: Tensor, wanted: float, tolerance: float) -> bool:
    return bool(((values - wanted).abs() <= PROBABILITY_SUM + tolerance).all())


def matching(
    values: Mapping[Series, Sequence[float]], given: Sequence[float], tolerance: float
) -> list[Series]:
    """The names of the series that equal the given one.

    Args:
        values: Numbers by name, of any type.
        given: As many.
        tolerance: Relative difference, where dtypes can tell less than `DIGITS`.

    Example:
        >>> matching({"nll": [1.0, 2.0], "brier": [0.5, 0.7]}, [1.0, 2.00001], 1e-4)
        ['nll']
    """
    relative = max(DIGITS, tolerance)
    return [
        name
        for name, series in values.items()
        if all(
            abs(a - b) <= relative * max(LEAST_METRIC, abs(a), abs(b))
            for a, b in zip(series, given, strict=True)
        )
    ]
