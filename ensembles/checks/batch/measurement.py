"""Which rows of a batch reach which others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

from ensembles.case import Case
from ensembles.checks.batch.claim import BatchClaim
from ensembles.checks.batch.rows import FirstMixed, RowsSeen, look_at_rows
from ensembles.message import aligned, counted
from ensembles.subject import Model, Recipe

__all__ = ["BatchIndependence", "RowReach", "measure", "measure_batch_independence"]


@dataclass(frozen=True)
class RowReach:
    """A row of the input that reaches other rows of a member's output.

    Attributes:
        member: The member's name.
        row: The row of the input.
        reached: The rows of the output that it should not reach.
        change: The largest change of these rows, as a part of the largest output; 0 where only
            the gradient shows it.
    """

    member: str
    row: int
    reached: tuple[int, ...]
    change: float


@dataclass(frozen=True)
class BatchIndependence:
    """Which rows of a batch reach which others.

    Attributes:
        members: The members' names.
        rows: How many rows the batch has.
        replaced: How many of them were replaced, and followed by gradients.
        training: Whether modules were in training mode (BatchNorm was not).
        reaches: Every row that reaches others.
        moved: Members whose output for a row changes with its place in the batch.
        sized: Members whose output for a row changes when it stands alone.
        first: Where rows were first seen to mix; None where that was not seen.
        gradients: Whether gradients could be followed.
        random: Whether outputs are drawn, so that places could not be compared.
        alone: Whether the model can be called on one row.
    """

    members: tuple[str, ...]
    rows: int
    replaced: int
    training: bool
    reaches: tuple[RowReach, ...]
    moved: tuple[str, ...]
    sized: tuple[str, ...]
    first: FirstMixed | None
    gradients: bool
    random: bool
    alone: bool

    @property
    def pairs(self) -> int:
        """How many pairs of different rows reach each other."""
        return len({(reach.row, row) for reach in self.reaches for row in reach.reached})

    def __str__(self) -> str:
        compared = ["values"]
        compared += ["gradients"] if self.gradients else []
        compared += [] if self.random or self.reaches else ["places"]
        compared += ["one row alone"] if self.alone else []
        mode = "training mode without BatchNorm" if self.training else "eval mode"
        head = (
            f"{counted(self.members, 'member')}, {self.rows} rows, "
            f"{self.pairs or 'no'} pairs of different rows reach each other in {mode} "
            f"({', '.join(compared)} compared)"
        )
        rows = [
            (f"member {reach.member}", f"row {reach.row}", f"reaches {list(reach.reached)}")
            for reach in self.reaches
        ]
        return "\n".join([head, *(f"  {line}" for line in aligned(rows))])


def measure_batch_independence(
    model: Case | Model | Callable[[], Model],
    batch: Any = None,
    *,
    training: bool = False,
    axis: int = 0,
    output_axis: int = 0,
    **recipe: Unpack[Recipe],
) -> BatchIndependence:
    """Replaces, follows, moves and isolates the rows of a batch.

    Args:
        model: One module, or the members as a list or dict of modules.
        batch: What the model is called with, of at least two rows. Tensors of another size along
            `axis` are the same for all rows.
        training: Look in training mode. BatchNorm mixes rows there by design: it stays in eval
            mode, and everything else is looked at. Random numbers are the same at each call.
        axis: The axis of the rows in the batch, such as 1 for (token, sample, feature).
        output_axis: The axis of the rows in each member's output.
        **recipe: See `Subject`. Where the batch has the rows of all members one after the other, a
            member's output has its own rows.

    Returns:
        The measurement. The model, the batch and the random generators are as before.

    Raises:
        ValueError: If there are fewer than two rows, all rows are equal, no output has the rows
            of the batch, or two calls on one batch differ.

    Example:
        >>> print(measure_batch_independence(nn.Linear(4, 2), torch.randn(3, 4)))
        1 member, 3 rows, no pairs of different rows reach each other in eval mode
        (values, gradients, places, one row alone compared)
    """
    case = Case.of(model, batch, **recipe)
    return measure(case, BatchClaim(training=training), axis=axis, output_axis=output_axis)


def measure(
    case: Case, claim: BatchClaim | None = None, *, axis: int = 0, output_axis: int = 0
) -> BatchIndependence:
    """What `measure_batch_independence` finds in a case, in the mode of the claim."""
    training = claim is not None and claim.training
    seen = look_at_rows(case, training=training, axis=axis, output_axis=output_axis)
    return BatchIndependence(
        members=seen.members,
        rows=seen.rows,
        replaced=seen.replaced,
        training=training,
        reaches=tuple(_reaches(seen)),
        moved=seen.moved,
        sized=seen.sized,
        first=seen.first,
        gradients=seen.gradients,
        random=seen.random,
        alone=seen.alone,
    )


def _reaches(seen: RowsSeen) -> list[RowReach]:
    return [
        RowReach(member, row, tuple(sorted(reached)), seen.changes.get((member, row), 0.0))
        for member in seen.members
        for row, reached in sorted(_by_row(seen.pairs, member).items())
    ]


def _by_row(pairs: Sequence[tuple[str, int, int]], member: str) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for name, row, reached in pairs:
        if name == member:
            found.setdefault(row, set()).add(reached)
    return found
