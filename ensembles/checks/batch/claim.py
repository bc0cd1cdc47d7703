"""What can be claimed of the rows of a batch."""

from __future__ import annotations

from dataclasses import dataclass

from ensembles.claims import unknown

__all__ = ["BatchClaim", "parse"]


@dataclass(frozen=True)
class BatchClaim:
    """Rows are independent.

    Attributes:
        training: Whether it is claimed of training mode, where BatchNorm is excepted.
    """

    training: bool = False


def parse(given: object) -> BatchClaim:
    """The claim that a user wrote.

    Args:
        given: "rows" (in eval mode) or "rows in training" (BatchNorm excepted).

    Raises:
        ClaimError: If it is anything else.

    Example:
        >>> parse("rows in training")
        BatchClaim(training=True)
    """
    if isinstance(given, str) and given in ("rows", "rows in training"):
        return BatchClaim(training=given == "rows in training")
    raise unknown("batch", given, ["rows", "rows in training"])
