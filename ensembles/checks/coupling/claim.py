"""What can be claimed of training steps on single members."""

from __future__ import annotations

from dataclasses import dataclass

from ensembles.claims import options_of, unknown

__all__ = ["CouplingClaim", "parse"]


@dataclass(frozen=True)
class CouplingClaim:
    """What a step on one member moves.

    Attributes:
        relation: "independent", "tied" (every other member) or "parent" (subnets and their parent).
        parent: The parent's name, where the relation is "parent"; else "".
    """

    relation: str
    parent: str = ""


def parse(given: object) -> CouplingClaim:
    """The claim that a user wrote.

    Args:
        given: "independent", "tied" or `{"parent": its name}`.

    Raises:
        ClaimError: If it is none of these.

    Example:
        >>> parse({"parent": "wide"})
        CouplingClaim(relation='parent', parent='wide')
    """
    if isinstance(given, str) and given in ("independent", "tied"):
        return CouplingClaim(given)
    parent = (options_of(given, ["parent"]) or {}).get("parent")
    if isinstance(parent, str):
        return CouplingClaim("parent", parent)
    raise unknown("coupling", given, ["independent", "tied", '{"parent": its name}'])
