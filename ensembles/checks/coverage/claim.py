"""What can be claimed of an optimizer's coverage."""

from __future__ import annotations

from dataclasses import dataclass

from ensembles.claims import unknown

__all__ = ["CoverageClaim", "parse"]


@dataclass(frozen=True)
class CoverageClaim:
    """Every trainable parameter is stepped exactly once, and gets a gradient."""


def parse(given: object) -> CoverageClaim:
    """The claim that a user wrote.

    Args:
        given: "complete".

    Raises:
        ClaimError: If it is anything else.

    Example:
        >>> parse("complete")
        CoverageClaim()
    """
    if given != "complete":
        raise unknown("coverage", given, ["complete"])
    return CoverageClaim()
