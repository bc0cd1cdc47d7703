"""What can be claimed of runs from one seed."""

from __future__ import annotations

from dataclasses import dataclass

from ensembles.claims import is_count, options_of, unknown

__all__ = ["DeterminismClaim", "parse"]


STEPS = 2
"""The second step is the first that sees what the first has left in optimizer and buffers."""


@dataclass(frozen=True)
class DeterminismClaim:
    """One seed gives the same bits.

    Attributes:
        loaded: Whether the weights come from a file, so that they need not depend on the seed.
        factory: "package.module:factory", to compare two new processes too; None for one process.
        loaders: "augmented" or "plain", to read the members' loaders too; None to leave them out.
        steps: How many optimizer steps.
    """

    loaded: bool = False
    factory: str | None = None
    loaders: str | None = None
    steps: int = STEPS


def parse(given: object) -> DeterminismClaim:
    """The claim that a user wrote.

    Args:
        given: "bitwise"; or a dict of `weights` ("loaded" or "drawn"), `factory`, `loaders`
            ("augmented" or "plain") and `steps`, as far as they are wanted.

    Raises:
        ClaimError: If it is neither.

    Example:
        >>> parse({"weights": "loaded", "steps": 10})
        DeterminismClaim(loaded=True, factory=None, loaders=None, steps=10)
    """
    if given == "bitwise":
        return DeterminismClaim()
    options = options_of(given, ["weights", "factory", "loaders", "steps"])
    if options is not None:
        weights, factory = options.get("weights", "drawn"), options.get("factory")
        loaders, steps = options.get("loaders"), options.get("steps", STEPS)
        known = weights in ("drawn", "loaded") and loaders in (None, "augmented", "plain")
        if known and is_count(steps) and (factory is None or isinstance(factory, str)):
            return DeterminismClaim(weights == "loaded", factory, loaders, steps)
    words = ["bitwise", '{"weights": "loaded"}', '{"factory": "package.module:factory"}']
    words += ['{"loaders": "augmented"}', '{"loaders": "plain"}', '{"steps": a number}']
    raise unknown("determinism", given, words)
