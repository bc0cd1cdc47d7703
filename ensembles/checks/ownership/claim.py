"""What can be claimed of owners: a statement for each parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from typing_extensions import TypeIs

from ensembles.claims import is_count, unknown
from ensembles.subject import Partition

__all__ = ["OwnershipClaim", "Statement", "parse"]


WORDS = ("independent", "tied", "partition", "unused")

Statement = str | Partition
"""`independent`, `tied`, `unused`, `partition` (short for `Partition()`), or a `Partition`."""


@dataclass(frozen=True)
class OwnershipClaim:
    """A statement for each parameter.

    Attributes:
        statements: Pairs of a pattern (`fnmatch`) of parameter names and a statement; the first
            pattern that fits a name counts.
    """

    statements: tuple[tuple[str, Statement], ...]


def parse(given: object) -> OwnershipClaim:
    """The claim that a user wrote.

    Args:
        given: A statement about every parameter, or a dict of name patterns with one each.

    Raises:
        ClaimError: If a statement is unknown, or the dict is empty.

    Example:
        >>> parse("tied").statements
        (('*', 'tied'),)
        >>> parse({"stem.*": "partition"}).statements
        (('stem.*', Partition(parent='parent', times=1)),)
    """
    patterns = given if isinstance(given, Mapping) else {"*": given}
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise _unknown(given)
    statements: list[tuple[str, Statement]] = []
    for pattern, statement in patterns.items():
        if not _is_statement(statement):
            raise _unknown(statement)
        statements.append((pattern, Partition() if statement == "partition" else statement))
    return OwnershipClaim(tuple(statements))


def _unknown(given: object) -> ValueError:
    known = [*WORDS, "a Partition(parent, times)", "a dict of name patterns with one of these each"]
    return unknown("ownership", given, known)


def _is_statement(statement: object) -> TypeIs[Statement]:
    if isinstance(statement, Partition):
        return isinstance(statement.parent, str) and is_count(statement.times)
    return isinstance(statement, str) and statement in WORDS
