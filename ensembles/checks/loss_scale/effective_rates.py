"""Promise: every member trains at the learning rate and weight decay that a single model has.

Catches the mean of M losses at the learning rate of one, weight decay that was not divided,
schedules that are stepped for each member, absolute rates (eta_min, the start of a warm-up) that do
not scale with the learning rate, and a warm-up of length 0 or of fractional length.

The effective rates are those of `ensembles.checks.loss_scale.measurement`, over the whole schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ensembles.checks.loss_scale.measurement import LossScale, MemberScale
from ensembles.instruments.learning_rates import Rate, close, fraction, rates_of
from ensembles.message import broken, counted, listed

__all__ = ["assert_rates_effective"]

Rates = float | Sequence[float] | Callable[[list[torch.nn.Parameter]], Any]
"""One learning rate, the rate at every step, or what builds optimizer and scheduler."""

MOST_STEPS = 64
"""How often a schedule may be stepped in one training step, and be told as such: once a member, or
once a micro-batch."""


def assert_rates_effective(
    scale: LossScale,
    *,
    lr: Rates | None = None,
    weight_decay: float | None = None,
    warmup: float | None = None,
) -> None:
    """Checks that every member trains as a single model at these rates does.

    Limits: what follows from multiples is true of parameters that a member has for itself. Where
    gradients of several add up in one, no single model trains so: `assert_loss_scaled` says where.

    Args:
        scale: From `measure_loss_scale` with `optimizer=`.
        lr: The single model's learning rate. One number is what its optimizer is built with; its
            rates at every step are a list, or a function of a list of parameters that builds its
            optimizer and returns the scheduler.
        weight_decay: The single model's weight decay, in the groups that have any.
        warmup: After how many steps the full rate (that the optimizer is built with) is reached:
            0 at once, and a fraction at the next whole step. It is never exceeded.

    Raises:
        ValueError: If nothing is claimed, rates were not measured or do not exist, or one number
            is claimed where the loss scales gradients and the schedule holds absolute rates:
            whether those were scaled too, only the single model's schedule can say.
        AssertionError: If effective rates are others.

    Example:
        >>> from ensembles.checks.loss_scale.measurement import measure_loss_scale
        >>> labels = torch.tensor([0, 1, 1])
        >>> def mean_of_losses(outputs):
        ...     return sum(nn.functional.cross_entropy(y, labels) for y in outputs.values()) / 2
        >>> two = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])
        >>> scale = measure_loss_scale(two, torch.randn(3, 4), mean_of_losses,
        ...     optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.2, weight_decay=1e-4))
        >>> assert_rates_effective(scale, lr=0.1, weight_decay=2e-4)
    """
    __tracebackhide__ = True
    if lr is None and weight_decay is None and warmup is None:
        raise ValueError("no rate is claimed: give lr=, weight_decay= or warmup=.")
    rates = [(member, rate) for member in scale.members for rate in member.rates]
    bare = [member.member for member in scale.members if not member.rates]
    if bare:
        raise ValueError(
            f"no optimizer group holds parameters of member {listed(bare)}, so that it has no "
            "rates. Give optimizer=a function of the model; the coverage check says what it lacks."
        )
    claimed = _claimed(lr, len(rates[0][1].scheduled))
    findings = [
        row for member, rate in rates for row in _findings(member, rate, claimed, weight_decay)
    ]
    if not findings and warmup is not None:
        findings = [row for member, rate in rates for row in _warmups(member, rate, warmup)]
    if not findings:
        return
    raise AssertionError(
        broken(
            f"members {listed(scale.names)} are claimed to train as a single model at "
            f"{_rates_told(lr, weight_decay, warmup)}, and do not",
            [row[:4] for row in findings],
            total=f"{len({row[0] for row in findings})} of {counted(scale.members, 'member')}; "
            f"{scale.told}",
            meaning=findings[0][4],
            remedy=_REMEDIES[findings[0][5]],
        )
    )


# --- what is found ------------------------------------------------------------------------------

_Row = tuple[str, str, str, str, str, str]
"""Member, place, expected, found; meaning and key of the remedy."""

_REMEDIES = {
    "rate": "Usual cause: the mean of M losses at the learning rate of one. With the mean under "
    "SGD, multiply lr by M and divide weight decay by M; with the sum, or under Adam, leave lr.",
    "steps": "Usual cause: scheduler.step() inside the loop over members, or for each micro-batch. "
    "Step it once after each optimizer step.",
    "absolute": "Usual cause: eta_min, a warm-up's start or max_lr. Multiply these too, or sum the "
    "losses and leave all rates.",
    "warmup": "Usual cause: a division by the length of the warm-up. Use min(1, (step + 1) / "
    "length), and no warm-up for a length of 0.",
}


def _findings(
    member: MemberScale, rate: Rate, lr: Any, weight_decay: float | None
) -> Iterator[_Row]:
    if rate.effective is None:
        raise ValueError(
            f"member {member.member} has no effective rates to compare: {rate.optimizer} neither "
            "scales its update with the gradient nor ignores the scale, or its gradient "
            f"({fraction(member.multiple)} of its gradient alone) is no training alone."
        )
    place, alone = f"group {rate.group}", "They train as a single model at other rates does."
    if isinstance(lr, float):
        built = rate.at(rate.built, member.multiple)
        if not close(built, lr, member.precision):
            yield member.member, place, f"expected lr {lr:.4g}", f"found {built:.4g}", alone, "rate"
        elif rate.absolute:
            step, _ = rate.absolute
            raise ValueError(
                f"lr={lr:.4g} does not say what a single model's rate is at step {step}, because "
                "the schedule holds absolute rates (eta_min, a warm-up's start, max_lr), which may "
                "have been scaled or not. Give lr=a function of a list of parameters that builds "
                "the single model's optimizer and returns its scheduler."
            )
    elif lr is not None:
        pairs = list(zip(rate.effective, lr, strict=True))
        off = [i for i, (x, y) in enumerate(pairs) if not close(x, y, member.precision)]
        if off:
            yield _of_schedule(member, rate, lr, max(off, key=lambda i: abs(pairs[i][0] - lr[i])))
    bare = not any(other.decay for other in member.rates)  # biases and norms often have none
    if weight_decay is not None and (rate.decay or bare):
        found = rate.effective_decay or 0.0
        if not close(found, weight_decay, member.precision):
            expected = f"expected weight decay {weight_decay:.4g}"
            yield member.member, place, expected, f"found {found:.4g}", alone, "rate"


def _of_schedule(member: MemberScale, rate: Rate, wanted: Sequence[float], step: int) -> _Row:
    effective = rate.effective or ()
    found = f"found {effective[step]:.4g}"
    meaning, remedy = "They train as a single model at other rates does.", "rate"
    times = _times(effective, wanted)
    if times:
        found += f", the rate of step {times * step}"
        meaning, remedy = f"The schedule goes {times} times as fast as the training.", "steps"
    elif rate.absolute and not _in_proportion(effective, wanted):
        by = (wanted[step] - effective[step]) * rate.built / rate.at(rate.built, member.multiple)
        found += f", set {abs(by):.4g} too {'low' if by > 0 else 'high'}"
        meaning = "The schedule holds absolute rates, which did not grow with the learning rate."
        remedy = "absolute"
    place = f"group {rate.group}, step {step}"
    return member.member, place, f"expected lr {wanted[step]:.4g}", found, meaning, remedy


def _in_proportion(one: Sequence[float], two: Sequence[float]) -> bool:
    return all(close(a * two[0], b * one[0]) for a, b in zip(one, two, strict=True))


def _claimed(lr: Rates | None, steps: int) -> float | tuple[float, ...] | None:
    """A number, or the rate at each step."""
    if lr is None or isinstance(lr, (int, float)):
        return None if lr is None else float(lr)
    if callable(lr):
        scheduler = lr([torch.nn.Parameter(torch.ones(1))])
        optimizer = getattr(scheduler, "optimizer", None)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(
                f"lr=... returned an object of type {type(scheduler).__name__}. It takes a list of "
                "parameters, builds the single model's optimizer, and returns its scheduler."
            )
        # Built with its scheduler, it has the first step's rate; the scheduler goes on from there.
        return tuple(rates_of([optimizer], lambda _: scheduler, steps)[0])
    wanted = tuple(float(x) for x in lr)
    if len(wanted) != steps:
        raise ValueError(
            f"lr= has {len(wanted)} rates, and {steps} steps were measured: give as many to "
            "measure_loss_scale(steps=...)."
        )
    return wanted


def _times(found: Sequence[float], wanted: Sequence[float]) -> int:
    """The k with found(t) = wanted(k t), that is, how often a schedule is stepped each step."""
    for k in range(2, MOST_STEPS + 1):
        seen = range((len(wanted) - 1) // k + 1)
        if len(seen) > 2 and all(close(found[t], wanted[k * t]) for t in seen):
            return k
    return 0


def _warmups(member: MemberScale, rate: Rate, warmup: float) -> Iterator[_Row]:
    full, rates, place = rate.built, rate.scheduled, f"group {rate.group}"
    due = min(math.ceil(warmup), len(rates) - 1)
    peak = max(range(len(rates)), key=lambda i: (rates[i], -i))
    meaning = "The first steps are not taken at the rates that the warm-up is claimed to have."
    if rates[peak] > full and not close(rates[peak], full):
        found = f"found {rates[peak]:.4g} at step {peak}"
        yield member.member, place, f"expected at most {full:.4g}", found, meaning, "warmup"
    elif not any(close(x, full) for x in rates[: due + 1]):
        found = f"found {rates[due]:.4g}"
        yield member.member, place, f"expected {full:.4g} at step {due}", found, meaning, "warmup"
    elif warmup > 1 and close(rates[0], full):
        found = "found the full rate at once"
        yield (
            member.member,
            place,
            f"expected a warm-up of {warmup:g} steps",
            found,
            meaning,
            "warmup",
        )


def _rates_told(lr: Any, weight_decay: float | None, warmup: float | None) -> str:
    told = []
    if lr is not None:
        one = isinstance(lr, (int, float))
        told.append(f"lr {lr:.4g}" if one else "the rates of its own schedule")
    if weight_decay is not None:
        told.append(f"weight decay {weight_decay:.4g}")
    if warmup is not None:
        told.append(f"a warm-up of {warmup:g} steps")
    return " and ".join(told)
