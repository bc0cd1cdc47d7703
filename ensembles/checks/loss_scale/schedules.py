"""The schedule that a single model is claimed to have, and how another one relates to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim import Optimizer

from ensembles.checks.loss_scale.claim import Rates
from ensembles.handling.state import generators_kept
from ensembles.instruments.learning_rates import close, rates_of
from ensembles.user_calls import asked

__all__ = ["in_proportion", "single_schedule", "times_as_fast"]

MOST_STEPS = 64
"""How often a schedule may be stepped in one training step, and be told as such: once a member, or
once a micro-batch."""


def single_schedule(lr: Rates | None, steps: int) -> tuple[float, ...]:
    """The claimed rate at each step; nothing where one number, or none, is claimed.

    Raises:
        ValueError: If it has another number of steps, or builds no scheduler.

    Example:
        >>> halved = lambda ps: torch.optim.lr_scheduler.StepLR(torch.optim.SGD(ps, 1.0), 2, 0.5)
        >>> single_schedule(halved, 4), single_schedule(0.1, 4)
        ((1.0, 1.0, 0.5, 0.5), ())
    """
    if callable(lr):
        then = (
            "It takes a list of parameters, builds the single model's optimizer, and returns its "
            "scheduler."
        )
        with generators_kept():
            scheduler = asked("lr", lr, [torch.nn.Parameter(torch.ones(1))], then=then)
        optimizer = getattr(scheduler, "optimizer", None)
        if not isinstance(optimizer, Optimizer):
            kind = type(scheduler).__name__
            raise ValueError(f"lr=... returned an object of type {kind}. {then}")
        # Built with its scheduler, it has the first step's rate; the scheduler goes on from there.
        return tuple(rates_of([optimizer], lambda _: scheduler, steps)[0])
    if not isinstance(lr, Sequence):
        return ()
    if len(lr) != steps:
        raise ValueError(
            f"lr= has {len(lr)} rates, but {steps} steps were measured: give as many to "
            "measure_loss_scale(steps=...)."
        )
    return tuple(map(float, lr))


def in_proportion(one: Sequence[float], two: Sequence[float]) -> bool:
    """Whether one schedule is a multiple of the other.

    Example:
        >>> in_proportion([0.1, 0.05], [0.2, 0.1]), in_proportion([0.1, 0.05], [0.2, 0.05])
        (True, False)
    """
    return all(close(a * two[0], b * one[0]) for a, b in zip(one, two, strict=True))


def times_as_fast(found: Sequence[float], wanted: Sequence[float]) -> int:
    """The k with found(t) = wanted(k t), as where a schedule is stepped k times a step; 0 for none.

    Example:
        >>> times_as_fast([5.0, 3.0, 1.0, 0.0, 0.0], [5.0, 4.0, 3.0, 2.0, 1.0])
        2
    """
    for k in range(2, MOST_STEPS + 1):
        seen = range((len(wanted) - 1) // k + 1)
        if len(seen) > 2 and all(close(found[t], wanted[k * t]) for t in seen):
            return k
    return 0
