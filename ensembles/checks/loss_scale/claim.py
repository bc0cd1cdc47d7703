"""What can be claimed of how much each member counts in the loss, and of the rates that follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ensembles.claims import is_count, is_number, is_patterns, options_of, unknown

__all__ = ["STEPS", "LossScaleClaim", "Multiples", "Rates", "parse"]

STEPS = 100
"""Of the schedule that are looked at, where a claim does not say how many."""

Multiples = str | float | Mapping[str, float] | Sequence[float]
"""`sum`, `mean`, `joint`, one number, or one for each member, by name or in order."""

Rates = float | Sequence[float] | Callable[[list[Any]], Any]
"""One learning rate, the rate at every step, or what builds optimizer and scheduler."""

_WORDS = ("sum", "mean", "joint")
_OPTIONS = ("loss", "clipping", "shared", "lr", "weight_decay", "warmup", "steps")
_LOSS = [*_WORDS, "a number", "one for each member", f"a dict of {', '.join(_OPTIONS)}"]
_SCHEDULE = "a function of a list of parameters that builds the optimizer and returns its scheduler"


@dataclass(frozen=True)
class LossScaleClaim:
    """The multiple of its gradient alone that every member gets, and the rates that follow.

    Attributes:
        multiples: What is claimed of the loss; None where only rates are.
        clipping: "member" where clipping must not couple members, "joint" where it may. By default
            it must not, where there is any.
        shared: Patterns (`fnmatch`) of the parameters that members share by design; None for those
            that the subject claims shared under other checks.
        lr: The single model's learning rate, or its rates; None where no rate is claimed.
        weight_decay: The single model's weight decay; None where none is claimed.
        warmup: After how many steps the full rate is reached; None where that is not claimed.
        steps: How many steps of the schedule are looked at.

    Raises:
        ClaimError: If one of these cannot be claimed.
    """

    multiples: Multiples | None = None
    clipping: str | None = None
    shared: tuple[str, ...] | None = None
    lr: Rates | None = None
    weight_decay: float | None = None
    warmup: float | None = None
    steps: int = STEPS

    def __post_init__(self) -> None:
        clippings = ["member", "joint"]
        for option, given, fits, known in (
            ("", self.multiples, _is_multiples, _LOSS),
            (": clipping", self.clipping, clippings.__contains__, clippings),
            (": shared", self.shared, is_patterns, ["a list of name patterns"]),
            (": lr", self.lr, _is_rates, ["a number", "one for each step", _SCHEDULE]),
            (": weight_decay", self.weight_decay, is_number, ["a number"]),
            (": warmup", self.warmup, is_number, ["a number of steps"]),
            (": steps", self.steps, is_count, ["a whole number of at least one step"]),
        ):
            if given is not None and not fits(given):
                raise unknown(f"loss_scale{option}", given, known)

    @property
    def rates(self) -> bool:
        """Whether rates are claimed."""
        return any(rate is not None for rate in (self.lr, self.weight_decay, self.warmup))


def parse(given: object) -> LossScaleClaim:
    """The claim that a user wrote.

    Args:
        given: Multiples; or a dict of `loss` (multiples) and, where wanted, `clipping`, `shared`,
            `lr`, `weight_decay`, `warmup` and `steps` (by default as many as `lr` lists).

    Raises:
        ClaimError: If it is neither.

    Example:
        >>> parse("mean").multiples, parse({"loss": "sum", "lr": 0.1}).lr
        ('mean', 0.1)
        >>> parse({"loss": "sum", "lr": "fast"})
        Traceback (most recent call last):
        ensembles.claims.ClaimError: loss_scale: lr cannot be claimed to be 'fast'. It can be: ...
    """
    options: dict[str, Any] | None = {"loss": given}
    if isinstance(given, Mapping) and "loss" in given:
        options = options_of(given, _OPTIONS)
    if options is None or options["loss"] is None:
        raise unknown("loss_scale", given, _LOSS)
    if _are_numbers(options.get("lr")):
        options.setdefault("steps", len(options["lr"]))
    return LossScaleClaim(options.pop("loss"), **options)


def _is_multiples(given: object) -> bool:
    if isinstance(given, str):
        return given in _WORDS
    if isinstance(given, Mapping):
        return _are_numbers(list(given.values()))
    return is_number(given) or _are_numbers(given)


def _is_rates(given: object) -> bool:
    return is_number(given) or callable(given) or _are_numbers(given)


def _are_numbers(given: object) -> bool:
    return isinstance(given, Sequence) and bool(given) and all(map(is_number, given))
