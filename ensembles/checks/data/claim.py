"""What can be claimed of the samples that members see."""

from __future__ import annotations

from dataclasses import dataclass

from ensembles.claims import unknown

__all__ = ["RELATIONS", "DataClaim", "parse"]

RELATIONS = ("bagged", "paired", "shuffled")
"""A bootstrap for each member; the same samples in the same order; the same in other orders."""


@dataclass(frozen=True)
class DataClaim:
    """Which samples members see.

    Attributes:
        relation: One of `RELATIONS`.
    """

    relation: str


def parse(given: object) -> DataClaim:
    """The claim that a user wrote.

    Args:
        given: One of `RELATIONS`.

    Raises:
        ClaimError: If it is anything else.

    Example:
        >>> parse("paired")
        DataClaim(relation='paired')
    """
    if isinstance(given, str) and given in RELATIONS:
        return DataClaim(given)
    raise unknown("data", given, RELATIONS)
