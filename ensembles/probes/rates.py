"""What an optimizer makes of a scaled gradient, and the rates that a schedule goes through."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ensembles.calling import called, raised
from ensembles.probes.state import preserved
from ensembles.probes.training import hidden_modules, optimizers_of
from ensembles.subject import Model, named_modules_of

__all__ = [
    "Group",
    "Rate",
    "Response",
    "advances_of",
    "close",
    "fraction",
    "groups_of",
    "near",
    "rates_of",
    "response_of",
]

STEPS = 12
"""Steps of the experiment: RAdam changes its rule after five."""

RATE = 1e-3
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
        optimizer: The optimizer's class.
        kind: What it makes of a scaled gradient: "proportional", "invariant" or "neither".
        built: The learning rate that the optimizer was built with.
        scheduled: The rate at every step.
        decay: The weight decay that is set.
        effective: The rates at which the member alone trains the same; None if there are none.
        effective_decay: The weight decay at which it does.
        alone: The rates of the schedule when it is built at the effective rate, as it would be
            for the member alone: others than `effective` where it holds absolute rates.
    """

    group: str
    optimizer: str
    kind: str
    built: float
    scheduled: tuple[float, ...]
    decay: float
    effective: tuple[float, ...] | None
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
        return step, by * self.scheduled[step] / self.effective[step] if self.effective[
            step
        ] else by

    def at(self, lr: float, multiple: float | None) -> float:
        """What a learning rate acts as in this group, for this multiple of the gradient."""
        return lr * multiple if self.kind == "proportional" and multiple is not None else lr


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
    except Exception:  # optimizers that need a closure, or more than parameters and options
        return Response(name, "neither", False)
    if torch.allclose(half, whole / 2, rtol=IN_PROPORTION, atol=0):
        kind = "proportional"
    else:
        kind = "invariant" if torch.allclose(half, whole, rtol=INVARIANT, atol=0) else "neither"
    alone = _start() * ((1 - RATE * 0.1) ** STEPS - 1)
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
        ValueError: If the scheduler raises, or is none.

    Example:
        >>> sgd = torch.optim.SGD([torch.ones(1)], lr=1.0)
        >>> rates_of([sgd], lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5), 4)
        [[1.0, 1.0, 0.5, 0.5]]
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: a schedule is looked at for at least one step.")
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
        except Exception as error:
            then = (
                "It takes the optimizer and returns its scheduler, a list of them, or a function "
                "to be called after each training step; schedules that wait for a metric have no "
                "rates beforehand."
            )
            what = f"scheduler={called(scheduler)}"
            raise ValueError(raised(what, error, then, of=scheduler)) from error
    return rates


@dataclass(frozen=True)
class Group:
    """An optimizer's group with all that does not depend on the member."""

    name: str
    response: Response
    built: float
    decay: float
    scheduled: tuple[float, ...]
    rebuilt: Mapping[float, tuple[float, ...]]
    """Multiple of the built rate to the schedule that is then built with it."""
    parameters: frozenset[int]

    def holds(self, parameters: Sequence[Tensor]) -> bool:
        """Whether it trains a member with these parameters; one without any is in all groups."""
        return not parameters or any(id(p) in self.parameters for p in parameters)

    def rate(self, multiple: float | None) -> Rate:
        """The rates of a member whose gradient is this multiple of its gradient alone."""
        s, response = multiple, self.response
        rates = [] if s is None else [response.lr(lr, s) for lr in self.scheduled]
        known = tuple(rate for rate in rates if rate is not None)
        alone = self.rebuilt[s] if s and response.kind == "proportional" else known
        return Rate(
            self.name,
            response.name,
            response.kind,
            self.built,
            self.scheduled,
            self.decay,
            known or None,
            None if s is None else response.decay(self.decay, s),
            alone or None,
        )


def groups_of(
    model: Model,
    optimizer: Any,
    scheduler: Callable[[Any], Any] | None,
    steps: int,
    *,
    multiples: Iterable[float | None],
) -> list[Group]:
    """Every group of the optimizers of a model, with its schedule, and what scaling makes of both.

    Args:
        model: One module, or the members as a list or dict of modules.
        optimizer: A function of the model: its optimizer, or a list of them.
        scheduler: As in `rates_of`.
        steps: How many training steps to look at.
        multiples: The schedule is built for these multiples of the built rate too.

    Raises:
        ValueError: If optimizer or scheduler do not fit.

    Example:
        >>> sgd = lambda model: torch.optim.SGD(model.parameters(), lr=0.4)
        >>> cosine = lambda sgd: torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 4, eta_min=0.01)
        >>> (group,) = groups_of(nn.Linear(2, 2), sgd, cosine, 5, multiples=[0.25])
        >>> rate = group.rate(0.25)
        >>> round(rate.effective[-1], 6), round(rate.alone[-1], 6)
        (0.0025, 0.01)
    """
    modules = list(named_modules_of(model).values())
    with preserved([*modules, *hidden_modules(modules)]):
        built = optimizers_of(optimizer, model)
        with _kept(built):
            rates = rates_of(built, scheduler, steps)
        scaled: dict[float, list[list[float]]] = {}
        for multiple in {m for m in multiples if m}:
            again = optimizers_of(optimizer, model)
            with _kept(again):
                for one in again:
                    for group in one.param_groups:
                        group["lr"] = float(group["lr"]) * multiple
                scaled[multiple] = rates_of(again, scheduler, steps)
        named = [
            (f"{i}.{j}" if len(built) > 1 else str(j), one, group)
            for i, one in enumerate(built)
            for j, group in enumerate(one.param_groups)
        ]
        return [
            Group(
                name,
                response_of(one, group),
                float(group["lr"]),
                float(group.get("weight_decay") or 0.0),
                tuple(rates[i]),
                {multiple: tuple(series[i]) for multiple, series in scaled.items()},
                frozenset(id(p) for p in group["params"]),
            )
            for i, (name, one, group) in enumerate(named)
        ]


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
    options["lr"] = RATE
    if "weight_decay" in options:
        options["weight_decay"] = decay
    own = _rebuilt(optimizer, {**options, "params": [parameter]})
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        gradient = torch.rand(4, generator=generator, dtype=torch.float64) + 0.5
        parameter.grad = scale * gradient
        own.step()
    return parameter.detach() - _start()


def _rebuilt(optimizer: Optimizer, group: dict[str, Any]) -> Optimizer:
    try:
        built: Any = type(optimizer)
        return cast(Optimizer, built([group]))
    except Exception:  # it takes more than groups: a copy whose groups are exchanged
        own = copy.copy(optimizer)
        own.state = type(optimizer.state)(dict)
        own.param_groups = [group]
        return own


# --- numbers ---------------------------------------------------------------------------------


def fraction(multiple: float | None) -> str:
    """A multiple as a person reads it.

    Example:
        >>> fraction(0.25), fraction(0.3), fraction(None)
        ('1/4', '0.3', 'no multiple')
    """
    if multiple is None:
        return "no multiple"
    over = round(1 / multiple) if multiple and abs(multiple) < 1 else 0
    if over and near(multiple, 1 / over):
        return f"1/{over}"
    return f"{multiple:.4g}"


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
