"""Promise: every member trains at the learning rate and weight decay that a single model has.

Catches the mean of M losses at the learning rate of one, weight decay that was not divided,
schedules that are stepped for each member, absolute rates (eta_min, the start of a warm-up) that do
not scale with the learning rate, and a warm-up of length 0 or of fractional length.

The effective rates are those of `ensembles.checks.loss_scale`, over the whole schedule.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from ensembles.checks.loss_scale import LossScale, MemberScale
from ensembles.message import broken, counted, listed
from ensembles.probes.rates import Rate, close, fraction, near

__all__ = ["assert_rates_effective"]


def assert_rates_effective(
    scale: LossScale,
    *,
    lr: float | Sequence[float] | None = None,
    weight_decay: float | None = None,
    warmup: float | None = None,
) -> None:
    """Checks that every member trains as a single model at these rates does.

    Args:
        scale: From `measure_loss_scale` with `optimizer=`.
        lr: The single model's learning rate: the one that its optimizer is built with, or its
            rate at every step. With one number, the schedule must be proportional to it where
            the loss scales gradients.
        weight_decay: The single model's weight decay, in the groups that have any.
        warmup: After how many steps the full rate (that the optimizer is built with) is reached:
            0 at once, and a fraction at the next whole step. It is never exceeded.

    Raises:
        ValueError: If nothing is claimed, or rates were not measured, or there are none.
        AssertionError: If effective rates are others.

    Example:
        >>> from ensembles.checks.loss_scale import measure_loss_scale
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
    findings = [row for member, rate in rates for row in _findings(member, rate, lr, weight_decay)]
    if not findings and warmup is not None:
        findings = [row for member, rate in rates for row in _warmups(member, rate, warmup)]
    if not findings and isinstance(lr, (int, float)):
        findings = [row for member, rate in rates for row in _absolutes(scale, member, rate)]
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
    place, alone = f"group {rate.group}", "No single model at these rates trains like that."
    if isinstance(lr, (int, float)):
        built = rate.at(rate.built, member.multiple)
        if not close(built, lr):
            yield member.member, place, f"expected lr {lr:.4g}", f"found {built:.4g}", alone, "rate"
    elif lr is not None:
        wanted = [float(x) for x in lr]
        if len(wanted) != len(rate.effective):
            raise ValueError(
                f"lr= has {len(wanted)} rates, and {len(rate.effective)} steps were measured: give "
                "as many to measure_loss_scale(steps=...)."
            )
        off = [
            i
            for i, (a, b) in enumerate(zip(rate.effective, wanted, strict=True))
            if not close(a, b)
        ]
        if off:
            times = _times(rate.effective, wanted)
            step = max(off, key=lambda i: abs(rate.effective[i] - wanted[i]))  # type: ignore[index]
            yield (
                member.member,
                f"{place}, step {step}",
                f"expected lr {wanted[step]:.4g}",
                f"found {rate.effective[step]:.4g}"
                + (f", the rate of step {times * step}" if times else ""),
                f"The schedule goes {times} times as fast as the training." if times else alone,
                "steps" if times else "rate",
            )
    if weight_decay is not None and rate.decay and rate.effective_decay is not None:
        found = rate.effective_decay
        if not close(found, weight_decay):
            expected = f"expected weight decay {weight_decay:.4g}"
            yield member.member, place, expected, f"found {found:.4g}", alone, "rate"


def _times(found: Sequence[float], wanted: Sequence[float]) -> int:
    """The k with found(t) = wanted(k t), that is, how often a schedule is stepped each step."""
    for k in range(2, 65):
        seen = range((len(wanted) - 1) // k + 1)
        if len(seen) > 2 and all(close(found[t], wanted[k * t]) for t in seen):
            return k
    return 0


def _absolutes(scale: LossScale, member: MemberScale, rate: Rate) -> Iterator[_Row]:
    """A rate that is given as one number stands for a schedule that is proportional to it."""
    count = len(scale.members)
    scaled = rate.kind == "proportional" and not near(member.multiple, 1.0)
    if scaled and any(rate.absolute):
        step = max(range(len(rate.absolute)), key=lambda i: abs(rate.absolute[i]))
        off = rate.absolute[step]
        yield (
            member.member,
            f"group {rate.group}, step {step}",
            f"expected {rate.scheduled[step] - off / count:.4g} of a schedule that scales",
            f"off by {off:.4g} at {count} times the rate",
            "Some rates of the schedule are absolute: they do not follow the learning rate.",
            "absolute",
        )


def _warmups(member: MemberScale, rate: Rate, warmup: float) -> Iterator[_Row]:
    full, rates, place = rate.built, rate.scheduled, f"group {rate.group}"
    due = min(math.ceil(warmup), len(rates) - 1)
    peak = max(range(len(rates)), key=lambda i: (rates[i], -i))
    meaning = "The first steps are not taken at the rates that the warm-up is claimed to have."
    if rates[peak] > full * (1 + 1e-6):
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
        told.append(f"lr {lr:.4g}" if one else f"a schedule of {len(lr)} rates")
    if weight_decay is not None:
        told.append(f"weight decay {weight_decay:.4g}")
    if warmup is not None:
        told.append(f"a warm-up of {warmup:g} steps")
    return " and ".join(told)
