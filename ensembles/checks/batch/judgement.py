"""Whether every row of the output depends on its own row of the input only."""

from __future__ import annotations

from collections.abc import Iterator

from ensembles.checks.batch.claim import BatchClaim
from ensembles.checks.batch.measurement import BatchIndependence
from ensembles.findings import Count, Finding, Findings
from ensembles.message import assert_held, listed

__all__ = ["assert_rows_independent", "judge"]


def assert_rows_independent(independence: BatchIndependence) -> None:
    """Checks that every row of the output depends on its own row of the input only.

    Args:
        independence: From `measure_batch_independence`.

    Raises:
        AssertionError: If a row reaches another, or an output depends on the place of its row or
            on the number of rows.

    Example:
        >>> from ensembles.checks.batch.measurement import measure_batch_independence
        >>> norm = nn.BatchNorm1d(4)
        >>> assert_rows_independent(measure_batch_independence(norm, torch.randn(3, 4)))
        >>> norm = nn.BatchNorm1d(4, track_running_stats=False)
        >>> assert_rows_independent(measure_batch_independence(norm, torch.randn(3, 4)))
        Traceback (most recent call last):
        AssertionError: rows of a batch are claimed independent, but reach each other in eval mode
        ...
    """
    __tracebackhide__ = True
    assert_held(judge(independence, BatchClaim(independence.training)))


def judge(independence: BatchIndependence, claim: BatchClaim) -> Findings:
    """The rows that reach others, or whose output depends on their place or number."""
    items = tuple(_found(independence))
    return Findings(
        claim=f"rows of a batch are claimed independent, but {_how(independence)} in "
        f"{'training' if independence.training else 'eval'} mode",
        items=items,
        affected=tuple(_affected(independence)) if items else (),
        looked_at=_looked_at(independence),
    )


def _how(independence: BatchIndependence) -> str:
    if independence.reaches:
        return "reach each other"
    what = "place of its row" if independence.moved else "number of rows"
    return f"an output depends on the {what}"


def _affected(independence: BatchIndependence) -> Iterator[Count]:
    if independence.reaches:
        rows = independence.rows
        yield Count(independence.pairs, "pair of different rows", of=rows * (rows - 1))
    members = {
        *(reach.member for reach in independence.reaches),
        *independence.moved,
        *independence.sized,
    }
    if len(independence.members) > 1:
        yield Count(len(members), "member", of=len(independence.members))


def _looked_at(independence: BatchIndependence) -> tuple[Count, ...]:
    if independence.replaced == independence.rows:
        return ()
    return (Count(independence.replaced, "row", of=independence.rows),)


# --- findings -----------------------------------------------------------------------------------

_MIXED = (
    "The prediction for a sample depends on what else is in the batch, and one sample leaks into "
    "another's gradient."
)
_PLACED = "The prediction for a sample depends on the order or on the size of the batch."

_NORM = (
    "statistics of the batch in eval mode (track_running_stats=False, or F.batch_norm with "
    "training=True)",
    "Use running statistics, or GroupNorm.",
)
_SEQUENCE = (
    "batch_first is missing, so that the batch is taken for the sequence",
    "Give batch_first=True, or the sequence as axis 0.",
)
_RESHAPED = (
    "view or reshape where permute is meant; softmax, max, mean or a norm over axis 0 or over all "
    "axes",
    "Name the axis of every reduction.",
)
_POSITIONS = (
    "position encodings that are added along the batch",
    "Add them along the axis of tokens.",
)
_SQUEEZED = (
    "squeeze() without an axis, which drops a batch of one; or a sum that is divided by the number "
    "of rows",
    "Name the axis.",
)
_SEQUENTIAL = ("Attention", "Transformer", "LSTM", "GRU", "RNN")


def _found(independence: BatchIndependence) -> Iterator[Finding]:
    cause, remedy = _reason(independence)
    first = independence.first
    if first is not None and independence.reaches:
        yield Finding(
            kind="rows mix",
            place=f"{first.module} ({first.kind})" if first.module else first.kind,
            found="is the first module that mixes them"
            if first.inside
            else "is the first module that reads mixed rows",
            meaning=_MIXED,
            cause=cause,
            remedy=remedy,
        )
    for reach in independence.reaches:
        rows = "row" if len(reach.reached) == 1 else "rows"
        member = f"member {reach.member}, " if len(independence.members) > 1 else ""
        by = f"by {reach.change:.2g} of the largest" if reach.change else "by its gradient"
        yield Finding(
            kind="rows mix",
            place=f"{member}input row {reach.row}",
            members=(reach.member,),
            found=f"reaches output {rows} {listed([str(row) for row in reach.reached])} {by}",
            amount=reach.change,
            meaning=_MIXED,
            cause=cause,
            remedy=remedy,
        )
    if not independence.reaches:
        for kind, members, done in (
            ("depends on the place", independence.moved, "other outputs when rows move one place"),
            ("depends on the size", independence.sized, "another output when a row stands alone"),
        ):
            for member in members:
                yield Finding(
                    kind=kind,
                    place=f"member {member}",
                    members=(member,),
                    found=done,
                    meaning=_PLACED,
                    cause=cause,
                    remedy=remedy,
                )


def _reason(independence: BatchIndependence) -> tuple[str, str]:
    """The usual cause and what to do, by the class of the module where rows first mix."""
    kind = independence.first.kind if independence.first else ""
    if "BatchNorm" in kind or "InstanceNorm" in kind:
        return _NORM
    if any(name in kind for name in _SEQUENTIAL):
        return _SEQUENCE
    if independence.reaches:
        return _RESHAPED
    return _POSITIONS if independence.moved else _SQUEEZED
