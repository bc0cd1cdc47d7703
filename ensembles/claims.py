"""What all claims have in common: how a wrong claim is refused.

Standard library only, because a claim is parsed before any model is built. The file `claim.py` in
the folder of a promise says what can be claimed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

__all__ = ["ClaimError", "is_count", "is_number", "is_patterns", "options_of", "unknown"]


class ClaimError(ValueError):
    """A claim that cannot be parsed. It says what was given, and what can be claimed.

    Example:
        >>> raise unknown("sharing", "independant", ["independent", "tied"])
        Traceback (most recent call last):
        ensembles.claims.ClaimError: sharing cannot be claimed to be 'independant'. Did you mean ...
    """


def unknown(check: str, given: object, known: Sequence[str]) -> ClaimError:
    """The error for a claim that a check does not know.

    Args:
        check: The check.
        given: What was claimed.
        known: What can be claimed, as a user writes it.

    Example:
        >>> print(unknown("coverage", "all", ["complete"]))
        coverage cannot be claimed to be 'all'. It can be: complete.
    """
    close = get_close_matches(given, known, 1) if isinstance(given, str) else []
    hint = f" Did you mean {close[0]!r}?" if close else ""
    choices = " or ".join(filter(None, (", ".join(known[:-1]), known[-1])))
    return ClaimError(f"{check} cannot be claimed to be {given!r}.{hint} It can be: {choices}.")


def options_of(given: object, known: Sequence[str]) -> dict[str, Any] | None:
    """A claim that is a dict of options, as a dict; None if it is no dict, or has other keys.

    Example:
        >>> options_of({"steps": 3}, ["steps"]), options_of({"stesp": 3}, ["steps"])
        ({'steps': 3}, None)
    """
    if isinstance(given, Mapping) and given and set(given) <= set(known):
        return dict(given)
    return None


def is_count(number: object) -> bool:
    """Whether it is a whole number above zero.

    Example:
        >>> is_count(3), is_count(0), is_count(True)
        (True, False, False)
    """
    return isinstance(number, int) and not isinstance(number, bool) and number > 0


def is_number(number: object) -> bool:
    """Whether it is a finite real number.

    Example:
        >>> is_number(0.1), is_number(float("nan")), is_number("1")
        (True, False, False)
    """
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return False
    return number - number == 0


def is_patterns(given: object) -> bool:
    """Whether it is a list of name patterns (`fnmatch`).

    Example:
        >>> is_patterns(["stem.*"]), is_patterns("stem.*"), is_patterns([1])
        (True, False, False)
    """
    if isinstance(given, str) or not isinstance(given, Sequence):
        return False
    return all(isinstance(pattern, str) for pattern in given)
