"""What can be claimed of how much each member counts in the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ensembles.claims import is_count, is_number, is_patterns, options_of, unknown

__all__ = ["LossScaleClaim", "parse"]


STEPS = 100
"""Of the schedule, where rates are claimed."""

Multiples = str | float | Mapping[str, float] | Sequence[float]
"""`sum`, `mean`, `joint`, one number, or one for each member, by name or in order."""

_WORDS = ("sum", "mean", "joint")
_OPTIONS = ("loss", "clipping", "shared", "lr", "weight_decay", "warmup", "steps")


@dataclass(frozen=True)
class LossScaleClaim:
    """The multiple of its gradient alone that every member gets, and the rates that follow.

    Attributes:
        multiples: What is claimed of the loss.
        clipping: "member", or "joint" where clipping may couple members.
        shared: Patterns of parameters that members share by design; None for those that the
            subject claims shared under other checks.
        lr: The single model's learning rate; None where no rate is claimed.
        weight_decay: The single model's weight decay; None where none is claimed.
        warmup: After how many steps the full rate is reached; None where that is not claimed.
        steps: How many steps of the schedule are looked at.
    """

    multiples: Multiples
    clipping: str = "member"
    shared: tuple[str, ...] | None = None
    lr: Any = None
    weight_decay: float | None = None
    warmup: float | None = None
    steps: int = STEPS


def parse(given: object) -> LossScaleClaim:
    """The claim that a user wrote.

    Args:
        given: Multiples; or a dict of `loss` (multiples) and, where wanted, `clipping`, `shared`,
            `lr`, `weight_decay`, `warmup` and `steps`.

    Raises:
        ClaimError: If it is neither.

    Example:
        >>> parse("mean").multiples, parse({"loss": "sum", "lr": 0.1}).lr
        ('mean', 0.1)
    """
    options = {"loss": given}
    if isinstance(given, Mapping) and "loss" in given:
        options = options_of(given, _OPTIONS) or {}
    shared, steps = options.get("shared"), options.get("steps", STEPS)
    known = _is_multiples(options.get("loss")) and is_count(steps)
    known = known and (shared is None or is_patterns(shared))
    known = known and options.get("clipping", "member") in ("member", "joint")
    if not known:
        words = [*_WORDS, "a number", "one for each member"]
        raise unknown("loss_scale", given, [*words, f"a dict of {', '.join(_OPTIONS)}"])
    rates = {key: options[key] for key in ("lr", "weight_decay", "warmup") if key in options}
    return LossScaleClaim(
        options["loss"],  # type: ignore[arg-type]
        clipping=options.get("clipping", "member"),  # type: ignore[arg-type]
        shared=None if shared is None else tuple(shared),  # type: ignore[arg-type]
        steps=steps,  # type: ignore[arg-type]
        **rates,
    )


def _is_multiples(given: object) -> bool:
    if isinstance(given, str):
        return given in _WORDS
    if isinstance(given, Mapping):
        return bool(given) and all(is_number(each) for each in given.values())
    if isinstance(given, Sequence):
        return bool(given) and all(is_number(each) for each in given)
    return is_number(given)
