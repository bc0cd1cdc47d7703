"""Where two recorded runs diverge: every value that differs, in the order of computation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ensembles.instruments.recording import KINDS, Entry
from ensembles.tolerance import Kind, tolerance_of

__all__ = ["Divergence", "divergences", "tolerated"]

MADE = ("parameter", "buffer", "generator", "batch")
"""The kinds of step 0, in the order in which they come to be."""


How = Literal["first only", "second only", "value", "share", "zero", "bits", "norm"]


@dataclass(frozen=True)
class Divergence:
    """A recorded value that differs between two runs.

    Attributes:
        step: 0 for what construction left, then the number of the optimizer step.
        kind: As in `Entry`.
        place: Member and name.
        how: "first only" and "second only" where one run has none; "value" where they cannot be
            subtracted; "share" beyond a tolerance; "zero" in one of them; "bits" where the norm is
            the same; "norm" where it is another.
        ratio: The norm in the first run, divided by that in the second; NaN where there is none.
        share: The greatest difference, as a share of the greatest element of its kind; NaN where
            that was not compared.
    """

    step: int
    kind: str
    place: str
    how: How
    ratio: float = math.nan
    share: float = math.nan

    @property
    def what(self) -> str:
        """Kind and place."""
        return f"{self.kind} {self.place}".strip()

    def __str__(self) -> str:
        return {
            "first only": "in the first run only",
            "second only": "in the second run only",
            "value": "another value",
            "share": f"by {self.share:.0e} of the greatest {self.kind}",
            "zero": "zero in one run",
            "bits": "same norm, other bits",
            "norm": f"norm {self.ratio:.3g} times the other's",
        }[self.how]


def tolerated(tolerance: float | Kind, *runs: Sequence[Entry]) -> float:
    """A tolerance as a number: that of a kind of comparison follows from the recorded dtypes.

    Args:
        tolerance: A number, or a word of `ensembles.tolerance`.
        runs: From `recorded`, with values.

    Raises:
        ValueError: If it is another word, or values were not kept.

    Example:
        >>> run = [Entry(1, "loss", "", "", "a1", 3.0, torch.ones(1, dtype=torch.bfloat16))]
        >>> tolerated(0.5, run), tolerated("reordered", run) > tolerated("bitwise", run)
        (0.5, True)
    """
    if not isinstance(tolerance, str):
        return tolerance
    values = [entry.values for run in runs for entry in run if entry.values is not None]
    if not values and tolerance != "bitwise":
        raise ValueError(
            f"tolerance={tolerance!r} follows from dtypes, which are known where values were kept: "
            "record both runs with values=True."
        )
    return tolerance_of(tolerance, *values)


def divergences(
    one: Sequence[Entry], two: Sequence[Entry], tolerance: float = 0.0
) -> list[Divergence]:
    """Every value that differs, first what was computed first.

    Args:
        one: From `recorded`.
        two: The other run.
        tolerance: The greatest difference, as a share of the greatest element that the second run
            has of the same kind in the same step: a bias before BatchNorm has a gradient that is
            nothing but roundings, whose own size says nothing. 0.0 compares bits, and so does
            every tolerance for numbers that are not floating.

    Raises:
        ValueError: If a tolerance is given and values were not kept.

    Example:
        >>> [str(found) for found in divergences([Entry(1, "loss", "", "", "a1", 3.0)],
        ...                                      [Entry(1, "loss", "", "", "b2", 2.0)])]
        ["norm 1.5 times the other's"]
    """
    pairs: dict[tuple[int, str, str, str], list[Entry | None]] = {}
    for side, entries in enumerate((one, two)):
        for entry in entries:
            pairs.setdefault(entry.key, [None, None])[side] = entry
    greatest: dict[tuple[str, ...], float] = {}
    if tolerance:
        for entry in two:
            greatest[_group(entry)] = max(greatest.get(_group(entry), 0.0), _greatest(entry))
    found = []
    # Sorting is stable: within a kind the order stays that of the first run.
    for key in sorted(pairs, key=lambda key: (key[0], _rank(*key[:2]))):
        a, b = pairs[key]
        step, kind, member, name = key
        differs = partial(Divergence, step, kind, ".".join(filter(None, (member, name))))
        if a is None or b is None:
            found.append(differs("second only" if a is None else "first only"))
        elif a.digest == b.digest:
            continue
        elif tolerance:
            share = _distance(a, b, greatest[_group(b)])
            if share > tolerance:
                found.append(differs("share" if math.isfinite(share) else "value", share=share))
        else:
            ratio = a.norm / b.norm if b.norm else math.nan
            found.append(differs(_how(a.norm, b.norm), ratio=ratio))
    return found


def _rank(step: int, kind: str) -> int:
    """When it is computed: construction comes before the state in which it leaves generators."""
    return MADE.index(kind) if step == 0 else KINDS.index(kind)


def _how(one: float, two: float) -> How:
    if not one or not two:
        return "zero" if one != two else "bits"
    return "bits" if f"{one / two:.3g}" == "1" else "norm"


def _group(entry: Entry) -> tuple[str, ...]:
    """What is of one size: moments and squared moments of an optimizer are not."""
    return str(entry.step), entry.kind, entry.member, entry.name.partition(" ")[2]


def _greatest(entry: Entry) -> float:
    values = entry.values
    if values is None or not values.numel() or not _is_floating(values):
        return 0.0
    return float(values.abs().nan_to_num(0.0, 0.0).max())


def _is_floating(values: Tensor) -> bool:
    return values.is_floating_point() or values.is_complex()


def _distance(one: Entry, two: Entry, greatest: float) -> float:
    """The greatest difference, as a share; infinite where no tolerance is to help."""
    a, b = one.values, two.values
    if a is None or b is None:
        if one.kind == "state":  # a number or a text, which has no tolerance
            return math.inf
        raise ValueError(
            f"{one.kind} {one.place} differs, and can be compared within a tolerance only where "
            "values were kept: record both runs with values=True."
        )
    if a.shape != b.shape or a.dtype != b.dtype or not _is_floating(a):
        return math.inf
    wide = torch.complex128 if a.is_complex() else torch.float64
    difference = (a.to(wide) - b.to(wide)).abs()
    unequal = difference[~((a == b) | (a.isnan() & b.isnan()))]
    by = float(unequal.max()) if unequal.numel() else 0.0
    return by and (math.inf if math.isnan(by) or not greatest else by / greatest)
