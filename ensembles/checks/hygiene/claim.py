"""What can be claimed of a model's state."""

from __future__ import annotations

from dataclasses import dataclass

from ensembles.claims import options_of, unknown

__all__ = ["HygieneClaim", "parse"]


@dataclass(frozen=True)
class HygieneClaim:
    """State is registered, and moves only when it should.

    Attributes:
        updates: How often the statistics of a norm move in one training step.
    """

    updates: int = 1


def parse(given: object) -> HygieneClaim:
    """The claim that a user wrote.

    Args:
        given: "clean", or `{"updates": n}` where norms update their statistics n times in a step.

    Raises:
        ClaimError: If it is neither.

    Example:
        >>> parse({"updates": 4})
        HygieneClaim(updates=4)
    """
    if given == "clean":
        return HygieneClaim()
    updates = (options_of(given, ["updates"]) or {}).get("updates")
    if isinstance(updates, int) and not isinstance(updates, bool) and updates >= 0:
        return HygieneClaim(updates)
    raise unknown("hygiene", given, ["clean", '{"updates": how often norms update in a step}'])
