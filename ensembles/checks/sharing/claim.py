"""What can be claimed of shared memory."""

from __future__ import annotations

from dataclasses import dataclass

from ensembles.claims import is_patterns, unknown

__all__ = ["SharingClaim", "parse"]


_WORDS: dict[str, tuple[str, ...] | None] = {"independent": (), "tied": ("*",), "distinct": None}


@dataclass(frozen=True)
class SharingClaim:
    """Which parameters members share.

    Attributes:
        shared: Patterns (`fnmatch`) of the names that all members share, and no others; None where
            only ties are claimed to be one `Parameter` object each.
    """

    shared: tuple[str, ...] | None


def parse(given: object) -> SharingClaim:
    """The claim that a user wrote.

    Args:
        given: "independent"; "tied" (one network); "distinct" (ties are one `Parameter` object);
            or a list of patterns of the names that are shared.

    Raises:
        ClaimError: If it is none of these.

    Example:
        >>> parse("independent").shared, parse(["stem.*"]).shared
        ((), ('stem.*',))
    """
    if isinstance(given, str) and given in _WORDS:
        return SharingClaim(_WORDS[given])
    if is_patterns(given):
        return SharingClaim(tuple(given))  # type: ignore[arg-type]
    raise unknown("sharing", given, [*_WORDS, "a list of name patterns"])
