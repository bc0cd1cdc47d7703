"""What a conversion did to a model, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["ASPECTS", "BROKEN", "PYTORCHS", "Difference", "Outcome"]

ASPECTS = ("ties", "function", "ownership", "parameters", "optimizer")
"""What a conversion may keep or break, in the order of reports."""

BROKEN, PYTORCHS = "broken", "broken by PyTorch"

_BY_PYTORCH: Mapping[str, tuple[str, ...]] = {
    "assign=True": ("ties", "ownership", "optimizer"),
    "to_empty": ("ties", "ownership", "not saved"),
    "weight_norm": ("ties", "ownership", "parameters", "optimizer"),
    "functional_call": ("moves the original",),
    "vmap": ("moves the original",),
    "export": ("optimizer",),
    "fsdp2": ("optimizer",),
}
"""What PyTorch itself breaks, by conversion: aspects, and kinds of difference; the rest is the
model's."""


@dataclass(frozen=True)
class Difference:
    """One thing that is not what it was before a conversion.

    Attributes:
        aspect: What it breaks, one of `ASPECTS`.
        kind: What happened, in a few words.
        names: The parameters or buffers that it concerns.
        amount: By how much outputs differ, as a share of the greatest; or how many elements have
            other owners.
        limit: The greatest amount that is none; or how many elements there are.
        now: The members that the first element with other owners reaches.
        before: The members that it reached.
        error: What was raised.
    """

    aspect: str
    kind: str
    names: tuple[str, ...] = ()
    amount: float | None = None
    limit: float | None = None
    now: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Outcome:
    """What one conversion did to a model.

    Attributes:
        conversion: Its name.
        looked_at: The `ASPECTS` that could be compared.
        differences: All that is not as before, in their order.
        reason: Why nothing was looked at; "" where something was.
        unowned: Why owners alone were not looked at, where the look would have ended the process.
        applies: Whether there is anything to convert in this model.
    """

    conversion: str
    looked_at: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()
    reason: str = ""
    applies: bool = True
    unowned: str = ""

    @property
    def unseen(self) -> tuple[str, str]:
        """What was not looked at, and why; empty where everything was."""
        if self.unowned:
            return f"ownership after {self.conversion}", self.unowned
        return (self.conversion if self.reason else ""), self.reason

    def status(self, aspect: str) -> str:
        """What became of one of `ASPECTS`: "kept", "broken", "broken by PyTorch", or "-".

        Example:
            >>> Outcome("fsdp2", (), (Difference("optimizer", "not held"),)).status("optimizer")
            'broken by PyTorch'
        """
        found = {one.kind for one in self.differences if one.aspect == aspect}
        if not found:
            return "kept" if aspect in self.looked_at else "-"
        rules = _BY_PYTORCH.get(self.conversion, ())
        return PYTORCHS if aspect in rules or not found.isdisjoint(rules) else BROKEN

    def having(self, status: str) -> tuple[str, ...]:
        """The aspects with this status."""
        return tuple(aspect for aspect in ASPECTS if self.status(aspect) == status)
