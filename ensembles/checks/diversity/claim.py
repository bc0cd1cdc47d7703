"""What can be claimed of how members start."""

from __future__ import annotations

from dataclasses import dataclass

from ensembles.claims import is_patterns, unknown

__all__ = ["DiversityClaim", "parse"]


@dataclass(frozen=True)
class DiversityClaim:
    """How different members start.

    Attributes:
        distinct: Whether it is claimed only that no two members are one network.
        seeded: Whether every member has a seed of its own by design.
        alike: Patterns (`fnmatch`) of the names that members have in common by design.
    """

    distinct: bool = False
    seeded: bool = False
    alike: tuple[str, ...] = ()


def parse(given: object) -> DiversityClaim:
    """The claim that a user wrote.

    Args:
        given: "independent"; "distinct" (no two members are one network); "seeded" (each has a seed
            by design); or a list of patterns of the names that are alike by design.

    Raises:
        ClaimError: If it is none of these.

    Example:
        >>> parse(["trunk.*"]).alike
        ('trunk.*',)
    """
    if isinstance(given, str) and given in ("independent", "distinct", "seeded"):
        return DiversityClaim(distinct=given == "distinct", seeded=given == "seeded")
    if is_patterns(given):
        return DiversityClaim(alike=tuple(given))  # type: ignore[arg-type]
    words = ["independent", "distinct", "seeded", "a list of patterns of names that are alike"]
    raise unknown("diversity", given, words)
