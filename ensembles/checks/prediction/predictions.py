"""How an ensemble predicts, looked at with members' outputs that tell reductions apart.

Members of a new network agree too well: all reductions of almost equal outputs are almost equal.
So, while this looks, every member's output is replaced by a function of itself that is as confident
as a trained network's, and another one for each member. The function works on each row by itself,
so that rows keep their identity through loaders, chunks and reshapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations, cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ensembles.case import Case
from ensembles.checks.prediction.reductions import (
    SMALLEST,
    Emitted,
    Found,
    kind_of,
    matching,
    metrics_of,
    reductions_of,
    reorderings_of,
)
from ensembles.checks.prediction.words import Metric
from ensembles.handling.precision import autocasts, dtypes_of
from ensembles.handling.state import generators_kept, seed_generators
from ensembles.handling.training import fresh
from ensembles.message import counted, listed
from ensembles.tolerance import tolerance_of
from ensembles.user_calls import asked

__all__ = ["PredictionLook", "PredictionSeen"]

DRAWS = 8
"""Changes of the members' outputs that are looked at where classes or metrics are compared: each
row says little there."""

FEW_DRAWS = 2
"""The same where probabilities are compared."""

CONFIDENCE = 3.0
"""Greatest logit of a changed output: its softmax is between about 0.002 and 0.99."""

SMALLEST_LOGIT = -70.0
"""Stands for the logarithm of a probability that is zero, and for a masked logit."""

STRETCH = 7.0
"""How far outputs that differ by their own deviation come to lie apart, in radians."""

LEAST_SPREAD = 1e-2
"""The least deviation that is taken, as a share of the greatest logit: less would show roundings
in place of outputs."""

APART = 10
"""Tolerances that members, or rows, must lie apart for their means, or their order, to be told."""

WEIGHTS = 1e-6
"""By how much the sum of claimed weights may miss 1: they are written in decimals."""

RIGHT = 0.6
"""Share of the labels that are drawn from members' votes: members are right more or less often."""


@dataclass(frozen=True)
class PredictionSeen:
    """What was seen with one change of the members' outputs, in float64 on the CPU.

    Attributes:
        emitted: Of shape (member, row, class).
        prediction: Of shape (row, class), (row,) for classes, or as given where it fits neither.
        given: The prediction as given.
        metric: What evaluate returned.
        labels: What evaluate was given, of shape (row,).
        reached: What predict called of the modules whose outputs are changed.
    """

    emitted: Tensor
    prediction: Tensor
    given: Tensor
    metric: float
    labels: Tensor
    reached: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the prediction has the shape of one."""
        shape = self.emitted.shape[1:]
        return self.prediction.shape == (shape if self.given.is_floating_point() else shape[:1])


class PredictionLook:
    """How the case predicts in eval mode, and what is known of its members' outputs."""

    def __init__(self, case: Case, weights: tuple[float, ...], axis: int) -> None:
        self.case, self.axis = case, axis
        self.outputs, self.evaluate = case.subject.outputs, case.subject.evaluate
        with autocasts() as cast:
            plain = self._member_outputs()
        self.names = list(plain)
        self.shape = _checked_outputs(plain, axis)
        if weights and (len(weights) != len(plain) or abs(sum(weights) - 1) > WEIGHTS):
            raise ValueError(
                f"weights={weights}: give one for each of {counted(plain, 'member')}, whose sum "
                "is 1."
            )
        self.weights = weights
        rows, classes = math.prod(self.classless), self.shape[axis]
        # Each row has classes - 1 numbers of its own, and the members' weights are unknown.
        self.least = max(FEW_DRAWS, math.ceil(2 * (len(plain) + 2) / (rows * (classes - 1))))
        self.draws = max(DRAWS, self.least)
        self.dtypes = dtypes_of(case.model, case.batch, plain, *cast)
        kinds = {name: kind_of(self._rows(y), self.tolerance) for name, y in plain.items()}
        self.kind = kinds[self.names[0]]
        if len(set(kinds.values())) > 1:
            told = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
            raise ValueError(
                f"members emit different things: {told}. Give outputs=a function that returns the "
                "same kind for every member."
            )
        # Drawn beforehand, because nothing can be drawn under vmap.
        generator = torch.Generator().manual_seed(0)
        self.phases = {
            (draw, name): math.tau * torch.rand(self.shape[axis], generator=generator).double()
            for draw in range(self.draws)
            for name in self.names
        }
        self.spread = {name: _Spread.of(self._logits(self._rows(y))) for name, y in plain.items()}

    @property
    def tolerance(self) -> float:
        """Of a prediction that is written in another way: what all dtypes so far can tell."""
        return tolerance_of("rewritten", *self.dtypes)

    def look(self) -> tuple[list[PredictionSeen], list[Found]]:
        """Looks until one reduction is left, and returns what was seen and found."""
        looks: list[PredictionSeen] = []
        found: list[Found] = []
        for draw in range(self.draws):
            with self._changed(draw) as used:
                looks.append(self._look(draw, used))
            if not looks[-1].reached:
                break
            if len(looks) < self.least:
                continue
            found = self._found(looks)
            one_by_one = looks[-1].given.is_floating_point() and self.evaluate is None
            if not found or (one_by_one and len(found) == 1):
                break
        if not found and {*looks[-1].reached} != {*self._hooked_names()}:
            # Predict calls copies, or one module for all: real outputs have to do.
            real = [self._look(0, [])]
            found = self._found(real)
            looks = real if found or not looks[-1].reached else looks
        return looks, found

    def _found(self, looks: Sequence[PredictionSeen]) -> list[Found]:
        if not looks or not all(look.fits for look in looks):
            return []
        tolerance = self.tolerance
        emitted = Emitted(torch.cat([look.emitted for look in looks], 1), self.kind)
        _check_members_apart(emitted, self.names, tolerance)
        _check_rows_apart(Emitted(looks[0].emitted, self.kind), tolerance)
        prediction = torch.cat([look.prediction for look in looks])
        found = reductions_of(prediction, emitted, tolerance, claimed=self.weights)
        first = looks[0]
        return found or reorderings_of(
            first.prediction, Emitted(first.emitted, self.kind), tolerance, claimed=self.weights
        )

    # --- one look

    def _look(self, draw: int, used: list[str]) -> PredictionSeen:
        emitted = torch.stack([self._rows(y) for y in self._member_outputs().values()])
        used.clear()
        given = self._given()
        reached = tuple(used)
        metric, labels = math.nan, torch.zeros(0)
        if self.evaluate is not None:
            generator = torch.Generator().manual_seed(draw)
            labels = _labels(Emitted(emitted, self.kind), generator)
            metric = self._evaluated(labels)
        return PredictionSeen(emitted, self._prediction_rows(given), given, metric, labels, reached)

    def _member_outputs(self) -> dict[str, Tensor]:
        with _rewound():
            found = self._called()
        for name, tensors in found.items():
            if len(tensors) != 1:
                raise ValueError(
                    f"member {name} yields {len(tensors)} tensors, and a prediction is made of "
                    "one. Give outputs=a function that returns each member's logits only."
                )
        return {name: tensors[0].detach() for name, tensors in found.items()}

    def _called(self) -> dict[str, tuple[Tensor, ...]]:
        """What the model's call yields; where it yields the prediction, what each member does."""
        case = self.case
        found_inside = case.is_one_module and case.subject.members is not None
        if found_inside and self.outputs is None:
            found = case.call()
            return found if len(found) == len(case.members) else case.call(case.members)
        return case.call()

    def _given(self) -> Tensor:
        predict = self.case.subject.predict
        assert predict is not None
        then = "It takes the model and the batch, and returns the ensemble's prediction."
        with _rewound(), autocasts() as cast:
            given = asked("predict", predict, self.case.model, fresh(self.case.batch), then=then)
        if not isinstance(given, Tensor):
            raise ValueError(
                f"predict=... returned an object of type {type(given).__name__}. It returns the "
                "ensemble's prediction, a tensor of probabilities, logits or classes."
            )
        given = given.detach().cpu()
        self.dtypes |= {*cast, given.dtype}
        # Votes are often counted in whole numbers; only what has no class axis is classes.
        counts = not given.is_floating_point() and tuple(given.shape) == self.shape
        return given.double() if counts else given

    def _evaluated(self, labels: Tensor) -> float:
        assert self.evaluate is not None
        shaped = labels.reshape(self.classless)
        device = next((p.device for p in self._parameters()), torch.device("cpu"))
        then = "It takes the model, the batch and labels (integers), and returns one number."
        given = (self.case.model, fresh(self.case.batch), shaped.to(device))
        with _rewound():
            value = asked("evaluate", self.evaluate, *given, then=then)
        return float(asked("evaluate", lambda: float(value), then=then))

    def _parameters(self) -> Iterator[Tensor]:
        for module in self.case.modules.values():
            yield from module.parameters()

    def _rows(self, y: Tensor) -> Tensor:
        return y.movedim(self.axis, -1).flatten(0, -2).double().cpu()

    def _prediction_rows(self, given: Tensor) -> Tensor:
        if given.is_floating_point():
            fits = tuple(given.shape) == self.shape
            return self._rows(given) if fits else given.double()
        fits = tuple(given.shape) == self.classless
        return given.long().flatten() if fits else given.long()

    @property
    def classless(self) -> tuple[int, ...]:
        """The shape of a prediction that is classes."""
        axis = self.axis % len(self.shape)
        return tuple(size for i, size in enumerate(self.shape) if i != axis)

    def _logits(self, rows: Tensor) -> Tensor:
        logits = rows.clamp_min(0).log() if self.kind == "probabilities" else rows
        return logits.clamp_min(SMALLEST_LOGIT)

    # --- changed outputs

    def _hooked_modules(self) -> dict[str, nn.Module]:
        """The member modules, or the one module that yields all members' outputs."""
        modules = self.case.members
        if not self.case.members_known:
            return dict(modules)
        # In the order of the outputs: what they are called inside does not matter.
        return dict(zip(self.names, modules.values(), strict=False))

    def _hooked_names(self) -> list[str]:
        return list(self._hooked_modules())

    @contextmanager
    def _changed(self, draw: int) -> Iterator[list[str]]:
        used: list[str] = []
        change = self._member if self._hooked_names() != ["model"] else self._all
        with ExitStack() as stack:
            for name, module in self._hooked_modules().items():
                stack.enter_context(_hooked(module, partial(change, name, draw, used)))
            yield used

    def _member(self, name: str, draw: int, used: list[str], value: Any) -> Any:
        used.append(name)
        return pytree.tree_map(
            lambda x: self._changed_tensor(x, self.axis, self.spread[name], name, draw), value
        )

    def _all(self, name: str, draw: int, used: list[str], value: Any) -> Any:
        used.append(name)
        leaves, structure = pytree.tree_flatten(value)
        if isinstance(value, Tensor):
            every = _Spread.joint(list(self.spread.values()))
            return self._changed_tensor(
                value, self._stacked_axis(value), every, self.names[0], draw
            )
        changed = [
            self._changed_tensor(x, self.axis, self.spread[member], member, draw)
            for member, x in zip(cycle(self.names), leaves, strict=False)
        ]
        return pytree.tree_unflatten(changed, structure)

    def _stacked_axis(self, value: Tensor) -> int:
        """Where classes are in a tensor of all members: their distance in memory says it."""
        if self.outputs is None:
            return self.axis
        places = torch.arange(value.numel(), dtype=torch.float64).reshape(value.shape)
        first = next(iter(pytree.tree_leaves(self.outputs(places))))
        one, two = first.movedim(self.axis, -1).flatten(0, -2)[0, :2].tolist()
        return places.stride().index(int(two - one))

    def _changed_tensor(self, x: Any, axis: int, spread: _Spread, name: str, draw: int) -> Any:
        fits = isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1
        if not fits or x.shape[axis] != self.shape[self.axis]:
            return x
        phase = self.phases[draw, name]
        rows = self._logits(x.movedim(axis, -1).double().cpu())
        values = CONFIDENCE * (STRETCH * (rows - spread.mean) / spread.scale + phase).sin()
        if self.kind != "logits":
            values = values.log_softmax(-1)
        values = values.exp() if self.kind == "probabilities" else values
        return values.movedim(-1, axis).to(x)

    # --- the metric

    def metrics(self, looks: Sequence[PredictionSeen]) -> list[Metric]:
        """What the numbers of evaluate are."""
        series: dict[Metric, list[float]] = {}
        for look in looks:
            members = Emitted(look.emitted, self.kind).probabilities
            each = [metrics_of(p, look.labels) for p in members]
            if look.fits:
                for metric, value in metrics_of(self._as_probabilities(look), look.labels).items():
                    series.setdefault(Metric(metric, "prediction"), []).append(value)
            for metric in each[0]:
                values = [found[metric] for found in each]
                for name, value in zip(self.names, values, strict=True):
                    series.setdefault(Metric(metric, "member", name), []).append(value)
                mean = sum(values) / len(values)
                series.setdefault(Metric(metric, "members"), []).append(mean)
        return matching(series, [look.metric for look in looks], self.tolerance)

    def _as_probabilities(self, look: PredictionSeen) -> Tensor:
        if not look.given.is_floating_point():
            return torch.nn.functional.one_hot(look.prediction, self.shape[self.axis]).double()
        kind = kind_of(look.prediction, self.tolerance)
        if kind == "probabilities":
            return look.prediction
        return look.prediction.exp() if kind != "logits" else look.prediction.softmax(-1)


@dataclass(frozen=True)
class _Spread:
    """Mean of every class's logit over the rows, and how far rows are from it."""

    mean: Tensor
    scale: float

    @classmethod
    def of(cls, rows: Tensor) -> _Spread:
        mean = rows.mean(0)
        scale = float((rows - mean).square().mean().sqrt())
        # Not less than a share of the logits, or the change would show their rounding.
        return cls(mean, max(scale, LEAST_SPREAD * float(rows.abs().max()), SMALLEST))

    @classmethod
    def joint(cls, spreads: Sequence[_Spread]) -> _Spread:
        mean = torch.stack([spread.mean for spread in spreads]).mean(0)
        return cls(mean, sum(spread.scale for spread in spreads) / len(spreads))


@contextmanager
def _hooked(module: nn.Module, change: Callable[[Any], Any]) -> Iterator[None]:
    if isinstance(module, torch.jit.ScriptModule):  # it refuses hooks: real outputs have to do
        yield
        return
    handle = module.register_forward_hook(lambda _, __, value: change(value))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _rewound() -> Iterator[None]:
    """Every call draws the same random numbers."""
    with generators_kept():
        seed_generators(0)
        yield


def _labels(emitted: Emitted, generator: torch.Generator) -> Tensor:
    """Labels of which every member gets another share right."""
    votes = emitted.probabilities.argmax(-1)
    members, rows = votes.shape
    picked = votes[torch.randint(members, (rows,), generator=generator), torch.arange(rows)]
    noise = torch.randint(emitted.values.shape[-1], (rows,), generator=generator)
    return torch.where(torch.rand(rows, generator=generator) < RIGHT, picked, noise)


def _checked_outputs(plain: Mapping[str, Tensor], axis: int) -> tuple[int, ...]:
    names = list(plain)
    if len(plain) < 2:
        raise ValueError(
            f"a reduction is over members, and only one was found ({listed(names)}). Give a list "
            "of modules, members=a function that finds them inside the model, or outputs=a "
            "function that splits what it returns."
        )
    shapes = {name: tuple(y.shape) for name, y in plain.items()}
    shape = shapes[names[0]]
    if len(set(shapes.values())) > 1:
        told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"members' outputs have different shapes ({told}): nothing reduces them.")
    if len(shape) < 2 or not -len(shape) <= axis < len(shape) or shape[axis] < 2:
        raise ValueError(
            f"members' outputs have shape {shape}, with no classes on axis {axis}. They are "
            "(sample, class, ...); give axis= where classes are elsewhere."
        )
    if 0 in shape:
        raise ValueError(f"members' outputs have shape {shape}: the batch has no rows.")
    for name, y in plain.items():
        if not y.isfinite().logical_or(y == -math.inf).all():
            raise ValueError(
                f"the output of member {name} holds NaN or infinity in eval mode. Nothing can be "
                "concluded from it."
            )
    return shape


def _check_members_apart(emitted: Emitted, names: Sequence[str], tolerance: float) -> None:
    """Refuses members that are so equal that all means of them are."""
    p = emitted.probabilities
    for i, j in combinations(range(len(p)), 2):
        if float((p[i] - p[j]).abs().max()) < APART * tolerance:
            raise ValueError(
                f"members {names[i]} and {names[j]} predict the same on this batch, so that all "
                "means of them are equal and cannot be told apart. Usual cause: one module, or a "
                "copy; the sharing check says which. Else give other inputs."
            )
    _, rows, classes = p.shape
    if rows * (classes - 1) <= len(names):
        raise ValueError(
            f"{rows} rows of {classes} classes cannot tell reductions of {len(names)} members "
            "apart: give more rows."
        )


def _check_rows_apart(emitted: Emitted, tolerance: float) -> None:
    """Refuses rows that are so equal that any pairing of them looks right."""
    p = emitted.probabilities
    if float((p - p[:, :1]).abs().max()) < APART * tolerance:
        raise ValueError(
            "members predict the same for all rows of this batch, so that rows cannot be told "
            "apart. Give a batch of at least two rows that differ; or members that look at them, "
            "which heads that start at zero do not."
        )
