"""Promise: row i of the output depends on row i of the input, and on no other row of the batch.

Catches a view where a permute is meant, a norm over the batch in eval mode, attention that takes
the batch for the sequence, a softmax or a maximum over the whole batch, and predictions that
depend on the place in the batch or on its size.

Rows are looked at twice. Numerically: each is replaced, the shape stays, and every other row of
the output must have the same bits; differences of rounding size (kernels may follow the values,
as in packed sequences) count only where the gradient confirms them. By gradients: at generic
weights, through operations that hide nothing, so that a branch that starts at zero does not hide
what it mixes; inputs are floating tensors of the batch and the outputs of embeddings that read it.
Then rows change places, and one stands alone. Kernels depend on the place and on the size, so what
is let pass, here as there, is what a network that is recomputed may differ by in the coarsest dtype
that took part (`ensembles.tolerance`).

Limits: of more than 8 rows, 8 are replaced and 8 are followed by gradients, evenly spread. Integer
inputs that no `nn.Embedding` reads are looked at numerically only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ensembles.message import aligned, broken, counted, listed
from ensembles.probes.rows import Look, look_at_rows
from ensembles.subject import Model, Outputs

__all__ = ["BatchIndependence", "RowReach", "assert_rows_independent", "measure_batch_independence"]


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
        training: Whether modules were in training mode (BatchNorm was not).
        reaches: Every row that reaches others.
        moved: Members whose output for a row changes with its place in the batch.
        sized: Members whose output for a row changes when it stands alone.
        first: Where rows were first seen to mix; "" where they were not.
        gradients: Whether gradients could be followed.
        random: Whether outputs are drawn, so that places could not be compared.
        alone: Whether the model can be called on one row.
    """

    members: tuple[str, ...]
    rows: int
    training: bool
    reaches: tuple[RowReach, ...]
    moved: tuple[str, ...]
    sized: tuple[str, ...]
    first: str
    gradients: bool
    random: bool
    alone: bool

    @property
    def broken(self) -> bool:
        """Whether a row depends on another, on its place, or on the size of the batch."""
        return bool(self.reaches or self.moved or self.sized)

    def __str__(self) -> str:
        looks = ["values"]
        looks += ["gradients"] if self.gradients else []
        looks += [] if self.random or self.reaches else ["places"]
        looks += ["one row alone"] if self.alone else []
        mode = "training mode without BatchNorm" if self.training else "eval mode"
        head = (
            f"{counted(self.members, 'member')}, {self.rows} rows, "
            f"{_pairs(self.reaches)} pairs of different rows reach each other in {mode} "
            f"({', '.join(looks)} compared)"
        )
        return "\n".join([head, *(f"  {line}" for line in aligned(_rows(self)))])


def measure_batch_independence(
    model: Model,
    batch: Any,
    *,
    outputs: Outputs | None = None,
    training: bool = False,
    axis: int = 0,
    output_axis: int = 0,
) -> BatchIndependence:
    """Replaces, follows, moves and isolates the rows of a batch.

    Args:
        model: One module, or the members as a list or dict of modules.
        batch: A tensor, a tuple of positional arguments, or a dict of keyword arguments, of at
            least two rows. Tensors of another size along `axis` are the same for all rows.
        outputs: Splits what one module returns into member outputs. Where the batch has the rows
            of all members one after the other, a member's output has its own rows.
        training: Look in training mode. BatchNorm mixes rows there by design: it stays in eval
            mode, and everything else is looked at. Random numbers are the same at each call.
        axis: The axis of the rows in the batch, such as 1 for (token, sample, feature).
        output_axis: The axis of the rows in each member's output.

    Returns:
        The measurement. The model, the batch and the random generators are as before.

    Raises:
        ValueError: If there are fewer than two rows, all rows are equal, no output has the rows
            of the batch, or two calls on one batch differ.

    Example:
        >>> print(measure_batch_independence(nn.Linear(4, 2), torch.randn(3, 4)))
        1 member, 3 rows, 0 pairs of different rows reach each other in eval mode
        (values, gradients, places, one row alone compared)
    """
    look = look_at_rows(
        model, batch, outputs=outputs, training=training, axis=axis, output_axis=output_axis
    )
    return BatchIndependence(
        members=look.members,
        rows=look.rows,
        training=training,
        reaches=tuple(_reaches(look)),
        moved=look.moved,
        sized=look.sized,
        first=look.first,
        gradients=look.gradients,
        random=look.random,
        alone=look.alone,
    )


def assert_rows_independent(independence: BatchIndependence) -> None:
    """Checks that every row of the output depends on its own row of the input only.

    Args:
        independence: From `measure_batch_independence`.

    Raises:
        AssertionError: If a row reaches another, or an output depends on the place of its row or
            on the number of rows.

    Example:
        >>> norm = nn.BatchNorm1d(4)
        >>> assert_rows_independent(measure_batch_independence(norm, torch.randn(3, 4)))
        >>> norm = nn.BatchNorm1d(4, track_running_stats=False)
        >>> assert_rows_independent(measure_batch_independence(norm, torch.randn(3, 4)))
        Traceback (most recent call last):
        AssertionError: rows of a batch are claimed independent, and reach each other in eval mode
        ...
    """
    __tracebackhide__ = True
    if not independence.broken:
        return
    mode = "in training mode" if independence.training else "in eval mode"
    if independence.reaches:
        found = f"and reach each other {mode}"
        rows = independence.rows
        total = f"{_pairs(independence.reaches)} of {rows * (rows - 1)} pairs of different rows"
        if len(independence.members) > 1:
            among = {reach.member for reach in independence.reaches}
            total += f", in {len(among)} of {len(independence.members)} members"
    elif independence.moved:
        found = f"and an output depends on the place of its row {mode}"
        total = f"{len(independence.moved)} of {counted(independence.members, 'member')}"
    else:
        found = f"and an output depends on the number of rows {mode}"
        total = f"{len(independence.sized)} of {counted(independence.members, 'member')}"
    if independence.first:
        total += f"; first seen {independence.first}"
    raise AssertionError(
        broken(
            f"rows of a batch are claimed independent, {found}",
            _rows(independence),
            total=total,
            meaning=_MEANINGS[0] if independence.reaches else _MEANINGS[1],
            remedy=_remedy(independence),
        )
    )


# --- how the assertion looks --------------------------------------------------------------------


_MEANINGS = (
    "The prediction for a sample depends on what else is in the batch, and one sample leaks into "
    "another's gradient.",
    "The prediction for a sample depends on the order or on the size of the batch.",
)


def _rows(independence: BatchIndependence) -> list[tuple[str, str, str]]:
    found = [
        (
            f"member {reach.member}",
            f"input row {reach.row} reaches output "
            f"{'row' if len(reach.reached) == 1 else 'rows'} "
            f"{listed([str(row) for row in reach.reached])}",
            f"by {reach.change:.2g} of the largest" if reach.change else "by its gradient",
        )
        for reach in independence.reaches
    ]
    if not found:
        found += [
            (f"member {member}", "all rows move by one place", "other outputs")
            for member in independence.moved
        ]
        found += [
            (f"member {member}", "one row stands alone", "another output")
            for member in independence.sized
        ]
    return found


def _pairs(reaches: Iterable[RowReach]) -> int:
    return len({(reach.row, row) for reach in reaches for row in reach.reached})


def _remedy(independence: BatchIndependence) -> str:
    first = independence.first
    if "BatchNorm" in first or "InstanceNorm" in first:
        return (
            "Usual cause: statistics of the batch in eval mode (track_running_stats=False, or "
            "F.batch_norm with training=True). Use running statistics, or GroupNorm."
        )
    if any(name in first for name in ("Attention", "Transformer", "LSTM", "GRU", "RNN")):
        return (
            "Usual cause: batch_first is missing, so that the batch is taken for the sequence. "
            "Give batch_first=True, or the sequence as axis 0."
        )
    if not independence.reaches and independence.moved:
        return (
            "Usual cause: position encodings that are added along the batch. Add them along the "
            "axis of tokens."
        )
    if not independence.reaches:
        return (
            "Usual cause: squeeze() without an axis, which drops a batch of one; or a sum that is "
            "divided by the number of rows. Name the axis."
        )
    return (
        "Usual cause: view or reshape where permute is meant; softmax, max, mean or a norm over "
        "axis 0 or over all axes. Name the axis of every reduction."
    )


def _reaches(look: Look) -> list[RowReach]:
    return [
        RowReach(member, row, tuple(sorted(reached)), look.changes.get((member, row), 0.0))
        for member in look.members
        for row, reached in sorted(_by_row(look.pairs, member).items())
    ]


def _by_row(pairs: Sequence[tuple[str, int, int]], member: str) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for name, row, reached in pairs:
        if name == member:
            found.setdefault(row, set()).add(reached)
    return found
