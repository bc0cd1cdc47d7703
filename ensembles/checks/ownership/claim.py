"""What can be claimed of owners: a statement for each parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ensembles.claims import unknown
from ensembles.subject import Partition

__all__ = ["OwnershipClaim", "parse"]


WORDS = ("independent", "tied", "partition", "unused")

Statement = str | Partition
"""`independent`, `tied`, `unused`, `partition` (short for `Partition()`), or a `Partition`."""


@dataclass(frozen=True)
class OwnershipClaim:
    """A statement for each parameter.

    Attributes:
        statements: Pairs of a pattern (`fnmatch`) of parameter names and a statement; the first
            pattern that fits a name counts.
        given: As the user wrote it.
    """

    statements: tuple[tuple[str, Statement], ...]
    given: Statement | Mapping[str, Statement]


def parse(given: object) -> OwnershipClaim:
    """The claim that a user wrote.

    Args:
        given: A statement about every parameter, or a dict of name patterns with one each.

    Raises:
        ClaimError: If a statement is unknown, or the dict is empty.

    Example:
        >>> parse("tied").statements
        (('*', 'tied'),)
    """
    patterns = given if isinstance(given, Mapping) else {"*": given}
    for pattern, statement in patterns.items():
        if not isinstance(pattern, str) or not _is_statement(statement):
            break
    else:
        if patterns:
            return OwnershipClaim(tuple(patterns.items()), given)  # type: ignore[arg-type]
    wrong = given if not isinstance(given, Mapping) or not patterns else statement
    known = [*WORDS, "a Partition(parent, times)", "a dict of name patterns with one of these each"]
    raise unknown("ownership", wrong, known)


def _is_statement(statement: object) -> bool:
    return isinstance(statement, Partition) or (isinstance(statement, str) and statement in WORDS)
