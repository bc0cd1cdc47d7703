"""What an optimizer makes of a scaled gradient, and the rates that a schedule goes through."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ensembles.case import Case
from ensembles.user_calls import ERRORS, called, raised

__all__ = [
    "Rate",
    "Response",
    "advances_of",
    "close",
    "near",
    "rates_of",
    "rates_of_members",
    "response_of",
]

TRIAL_STEPS = 12
"""Steps of the experiment with an optimizer: RAdam changes its rule after five."""

TRIAL_RATE = 1e-3
"""Learning rate of the experiment, because warm-up may start at a rate of zero."""

NEAR = 1e-3
"""Relative difference of multiples that are the same: less than one member in a thousand makes."""

NO_MULTIPLE = 1e-12
"""What a multiple may be of where none is wanted."""

CLOSE = 1e-6
"""Relative difference of rates that are the same, after a schedule's arithmetic in float64."""

NO_RATE = 1e-15
"""What a rate may be where none is wanted: less than any warm-up starts with."""

IN_PROPORTION = 1e-3
"""Relative difference below which one update is half of another: the experiment is in float64, and
what is not proportional is off by much more."""

INVARIANT = 1e-2
"""The same of two updates that are one: eps in a denominator changes less, and half a gradient that
is seen changes more."""


@dataclass(frozen=True)
class Response:
    """What an optimizer makes of a gradient that is scaled by s.

    Attributes:
        name: The optimizer's class.
        kind: "proportional" (the update is scaled by s: SGD), "invariant" (it stays as it is but
            for eps: Adam) or "neither".
        decoupled: Whether weight decay acts beside the gradient (AdamW) and not through it.
    """

    name: str
    kind: str
    decoupled: bool

    def lr(self, lr: float, scale: float) -> float | None:
        """The rate at which the unscaled gradient gives the same training; None if none does.

        Example:
            >>> Response("SGD", "proportional", False).lr(0.1, 0.25)
            0.025
        """
        if self.kind == "neither":
            return None
        return lr * scale if self.kind == "proportional" else lr

    def decay(self, decay: float, scale: float) -> float | None:
        """The weight decay at which it does; None if none does.

        Example:
            >>> Response("SGD", "proportional", False).decay(5e-4, 0.25)
            0.002
        """
        if self.kind == "neither" or (not scale and decay):
            return None
        kept = self.kind == "invariant" and self.decoupled
        return decay if kept or not decay else decay / scale


@dataclass(frozen=True)
class Rate:
    """The rates at which one group of parameters is trained.

    Attributes:
        group: Where in the optimizers: "0" for its group, "1.0" for group 0 of optimizer 1.
        response: What the optimizer makes of a scaled gradient.
        built: The learning rate that the optimizer was built with.
        scheduled: The rate at every step.
        decay: The weight decay that is set.
        effective: The rates at which the member alone trains the same; None if there are none.
        effective_built: The rate that the optimizer would be built with for that.
        effective_decay: The weight decay at which it does.
        alone: The rates of the schedule when it is built at the effective rate, as it would be
            for the member alone: others than `effective` where it holds absolute rates.
    """

    group: str
    response: Response
    built: float
    scheduled: tuple[float, ...]
    decay: float
    effective: tuple[float, ...] | None
    effective_built: float | None
    effective_decay: float | None
    alone: tuple[float, ...] | None

    @property
    def absolute(self) -> tuple[int, float] | None:
        """The step at which absolute rates do most, and by how much the set rate is off there.

        None where the schedule is proportional to the rate that it is built with.
        """
        if self.effective is None or self.alone is None:
            return None
        pairs = list(enumerate(zip(self.effective, self.alone, strict=True)))
        off = [(step, a - b) for step, (a, b) in pairs if not close(a, b)]
        if not off:
            return None
        step, by = max(off, key=lambda found: abs(found[1]))
        scaled = self.effective[step]
        return step, by * self.scheduled[step] / scaled if scaled else by


def response_of(optimizer: Optimizer, group: dict[str, Any]) -> Response:
    """Finds by experiment what an optimizer makes of a scaled gradient, and of weight decay.

    A small parameter is stepped with fixed random gradients, and with half of each.

    Example:
        >>> adam = torch.optim.AdamW([torch.ones(1)], lr=0.1, weight_decay=0.01)
        >>> response_of(adam, adam.param_groups[0])
        Response(name='AdamW', kind='invariant', decoupled=True)
    """
    name = type(optimizer).__name__
    try:
        whole = _moved(optimizer, group, scale=1.0, decay=0.0)
        half = _moved(optimizer, group, scale=0.5, decay=0.0)
        shrunk = _moved(optimizer, group, scale=0.0, decay=0.1)
    except ERRORS:  # optimizers that need a closure, or more than parameters and options
        return Response(name, "neither", False)
    if torch.allclose(half, whole / 2, rtol=IN_PROPORTION, atol=0):
        kind = "proportional"
    else:
        kind = "invariant" if torch.allclose(half, whole, rtol=INVARIANT, atol=0) else "neither"
    alone = _start() * ((1 - TRIAL_RATE * 0.1) ** TRIAL_STEPS - 1)
    return Response(name, kind, bool(torch.allclose(shrunk, alone, rtol=INVARIANT, atol=0)))


def rates_of(
    optimizers: Sequence[Optimizer], scheduler: Callable[[Any], Any] | None, steps: int
) -> list[list[float]]:
    """The learning rate of every group, in the order of optimizers, at each of the first steps.

    Args:
        optimizers: Newly built ones.
        scheduler: A function of one optimizer: its scheduler, a list of them, or a function to be
            called after each step; None for constant rates.
        steps: How many training steps to look at.

    Raises:
        ValueError: If the scheduler raises, or returns none.

    Example:
        >>> sgd = torch.optim.SGD([torch.ones(1)], lr=1.0)
        >>> rates_of([sgd], lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5), 4)
        [[1.0, 1.0, 0.5, 0.5]]
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # schedulers are stepped here without their optimizer
        try:
            advances = [step for o in optimizers for step in advances_of(o, scheduler)]
            rates: list[list[float]] = [[] for o in optimizers for _ in o.param_groups]
            for _ in range(steps):
                groups = [group for o in optimizers for group in o.param_groups]
                for series, group in zip(rates, groups, strict=True):
                    series.append(float(group["lr"]))
                for advance in advances:
                    advance()
        except ERRORS as error:
            then = (
                "It takes the optimizer and returns its scheduler, a list of them, or a function "
                "to be called after each training step; schedules that wait for a metric have no "
                "rates beforehand."
            )
            what = f"scheduler={called(scheduler)}"
            raise ValueError(raised(what, error, then, of=scheduler)) from error
    return rates


def rates_of_members(
    case: Case,
    multiples: Mapping[str, float | None],
    parameters: Mapping[str, Sequence[Tensor]],
    steps: int,
) -> dict[str, tuple[Rate, ...]]:
    """The rates at which every member is trained, by the optimizers and schedules of the case.

    Args:
        case: Whose optimizers are built: once, and once for each multiple other than 1.
        multiples: By member, what its gradient is of its gradient alone; None where it is none.
        parameters: By member, those that it has for itself; one without any is in all groups.
        steps: How many training steps of the schedule are looked at.

    Raises:
        ValueError: If optimizer or scheduler do not fit.

    Example:
        >>> sgd = lambda model: torch.optim.SGD(model.parameters(), lr=0.4)
        >>> cosine = lambda sgd: torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 4, eta_min=0.01)
        >>> case = Case.of(nn.Linear(2, 2), optimizer=sgd, scheduler=cosine)
        >>> (rate,) = rates_of_members(case, {"model": 0.25}, {"model": []}, 5)["model"]
        >>> round(rate.effective[-1], 6), round(rate.alone[-1], 6)
        (0.0025, 0.01)
    """
    scheduler = case.subject.scheduler
    with case.preserved():
        built = case.optimizers()
        with _kept(built):
            scheduled = rates_of(built, scheduler, steps)
        rebuilt = {1.0: scheduled}
        for share in {m for m in multiples.values() if m} - {1.0}:
            again = case.optimizers()
            with _kept(again):
                for group in (group for one in again for group in one.param_groups):
                    group["lr"] = float(group["lr"]) * share
                rebuilt[share] = rates_of(again, scheduler, steps)
        found: dict[str, tuple[Rate, ...]] = dict.fromkeys(multiples, ())
        groups = [(i, j) for i, one in enumerate(built) for j in range(len(one.param_groups))]
        for number, (i, j) in enumerate(groups):
            name, group = f"{i}.{j}" if len(built) > 1 else str(j), built[i].param_groups[j]
            response, held = response_of(built[i], group), {id(p) for p in group["params"]}
            for member, multiple in multiples.items():
                own = [id(p) for p in parameters[member]]
                if not own or not held.isdisjoint(own):
                    series = tuple(scheduled[number])
                    alone = tuple(rebuilt[multiple][number]) if multiple else None
                    found[member] += (_rate(name, response, group, multiple, series, alone),)
        return found


def _rate(
    name: str,
    response: Response,
    group: Mapping[str, Any],
    multiple: float | None,
    scheduled: tuple[float, ...],
    rebuilt: tuple[float, ...] | None,
) -> Rate:
    """The rates of a group for a member whose gradient is this multiple of its gradient alone."""
    built, decay = float(group["lr"]), float(group.get("weight_decay") or 0.0)
    if multiple is None or response.kind == "neither":
        return Rate(name, response, built, scheduled, decay, None, None, None, None)
    first, *effective = (response.lr(lr, multiple) or 0.0 for lr in (built, *scheduled))
    return Rate(
        name,
        response,
        built,
        scheduled,
        decay,
        tuple(effective),
        first,
        response.decay(decay, multiple),
        rebuilt if rebuilt and response.kind == "proportional" else tuple(effective),
    )


@contextmanager
def _kept(optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Restores options and attributes: a function of the model may give an optimizer in use."""
    before = [(one, dict(vars(one)), [dict(g) for g in one.param_groups]) for one in optimizers]
    tensors = [
        (value, value.clone())
        for one in optimizers
        for group in one.param_groups
        for key, value in group.items()
        if key != "params" and isinstance(value, Tensor)
    ]
    try:
        yield
    finally:
        for one, attributes, groups in before:
            vars(one).clear()
            vars(one).update(attributes)
            for group, options in zip(one.param_groups, groups, strict=True):
                group.clear()
                group.update(options)
        for tensor, value in tensors:
            tensor.copy_(value)


def advances_of(
    optimizer: Optimizer, scheduler: Callable[[Any], Any] | None
) -> Iterator[Callable[[], Any]]:
    """What is called after each training step: the scheduler's steps, or the function that it is.

    Raises:
        TypeError: If it is neither.

    Example:
        >>> sgd = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
        >>> halved = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        >>> (advance,) = advances_of(sgd, halved)
        >>> sgd.step(), advance(), sgd.param_groups[0]["lr"]
        (None, None, 0.5)
    """
    if scheduler is None:
        return
    built = scheduler(optimizer)
    for one in built if isinstance(built, (list, tuple)) else [built]:
        if not callable(one) and not callable(getattr(one, "step", None)):
            raise TypeError(f"it returned an object of type {type(one).__name__}")
        yield one.step if hasattr(one, "step") else one


def _start() -> Tensor:
    return torch.linspace(1.0, 2.0, 4, dtype=torch.float64)


def _moved(optimizer: Optimizer, group: dict[str, Any], *, scale: float, decay: float) -> Tensor:
    parameter = nn.Parameter(_start())
    options = {key: value for key, value in group.items() if key not in ("params", "initial_lr")}
    options["lr"] = TRIAL_RATE
    if "weight_decay" in options:
        options["weight_decay"] = decay
    own = _rebuilt(optimizer, {**options, "params": [parameter]})
    generator = torch.Generator().manual_seed(0)
    for _ in range(TRIAL_STEPS):
        gradient = torch.rand(4, generator=generator, dtype=torch.float64) + 0.5
        parameter.grad = scale * gradient
        own.step()
    return parameter.detach() - _start()


def _rebuilt(optimizer: Optimizer, group: dict[str, Any]) -> Optimizer:
    try:
        built: Any = type(optimizer)
        return cast(Optimizer, built([group]))
    except ERRORS:  # it takes more than groups: a copy whose groups are exchanged
        own = copy.copy(optimizer)
        own.state = type(optimizer.state)(dict)
        own.param_groups = [group]
        return own


# --- numbers ---------------------------------------------------------------------------------


def near(multiple: float | None, wanted: float, precision: float = 0.0) -> bool:
    """Whether a multiple is the one that is wanted.

    Args:
        multiple: As measured; None for none.
        wanted: As claimed.
        precision: To what the measured one is known, where that is less than `NEAR`.

    Example:
        >>> near(0.2500001, 0.25), near(None, 1.0), near(0.3008, 0.3), near(0.3008, 0.3, 0.01)
        (True, False, False, True)
    """
    relative = max(NEAR, precision)
    return multiple is not None and math.isclose(
        multiple, wanted, rel_tol=relative, abs_tol=NO_MULTIPLE
    )


def close(one: float, two: float, precision: float = 0.0) -> bool:
    """Whether two rates are the same.

    Args:
        one: A rate.
        two: The other.
        precision: To what a rate is known that was computed from a measured multiple.

    Example:
        >>> close(0.1 * 3 / 3, 0.1), close(0.1, 0.11)
        (True, False)
    """
    return math.isclose(one, two, rel_tol=max(CLOSE, precision), abs_tol=NO_RATE)
