"""How a broken claim is told: claim, where, how much, likely cause, what to do, replay.

Standard library only. One function, so that every check's message has the same order.
"""

from __future__ import annotations

import os
from collections.abc import Sequence, Sized
from contextvars import ContextVar
from shlex import quote as quoted
from textwrap import wrap

SHOWN_ROWS = 8
"""Rows of a table before it is capped: a message fits on one screen."""

PROSE_WIDTH = 92

DEFAULT_SEED = 1729

seed: ContextVar[int] = ContextVar("seed", default=DEFAULT_SEED)
"""The seed of the present run, as `--ensembles-seed` or `check_ensemble(seed=...)` set it."""

subject: ContextVar[str] = ContextVar("subject", default="")
"""The subject of the present run, as `--ensembles-subject` names it."""


def broken(
    claim: str, rows: Sequence[Sequence[str]], *, total: str, meaning: str, remedy: str
) -> str:
    """The text of a broken claim.

    Args:
        claim: The claim and that it does not hold, in one sentence.
        rows: Where: place, expected and found, one row each. Capped at `SHOWN_ROWS`.
        total: How much in all, such as "62 of 62 parameters".
        meaning: What it means for training, in one sentence; its line breaks are kept.
        remedy: The usual cause and what to do next; its line breaks are kept.

    Returns:
        The message, with the command that replays it when a pytest test is running.

    Example:
        >>> print(broken(
        ...     "members 0, 1 are claimed independent, and share parameters",
        ...     [("weight", "one tensor in members 0, 1")], total="1 of 1 parameters",
        ...     meaning="The two members are one network.", remedy="Build each member anew.",
        ... ).partition("  replay")[0].rstrip())
        members 0, 1 are claimed independent, and share parameters
        <BLANKLINE>
          weight   one tensor in members 0, 1
          (1 of 1 parameters)
        <BLANKLINE>
          The two members are one network.
          Build each member anew.
    """
    shown = [tuple(row) for row in rows[:SHOWN_ROWS]]
    hidden = len(rows) - len(shown)
    table = aligned(shown)
    table.append(f"... {hidden} more ({total})" if hidden else f"({total})")
    prose = [*meaning.splitlines(), *remedy.splitlines()]
    told = [line for sentence in prose for line in wrap(sentence, PROSE_WIDTH)]
    lines = [claim, "", *(f"  {line}" for line in [*table, "", *told])]
    lines = [line.rstrip() for line in lines]
    command = replay()
    return "\n".join([*lines, f"  {command}"] if command else lines)


def told_in_common(members: Sequence[str], *, whole: bool) -> tuple[str, str]:
    """What it means that members register the same weights, and how that comes about.

    Args:
        members: The members that do.
        whole: Whether all that they register is the same, so that they are one network.

    Returns:
        Meaning and remedy, for `broken`.

    Example:
        >>> told_in_common(["0", "1"], whole=True)[0]
        'Members 0, 1 are one network: training them trains one model 2 times.'
    """
    if whole:
        return (
            f"Members {listed(members)} are one network: training them trains one model "
            f"{len(members)} times.",
            "Usual cause: [model] * n, or a registry that returns the same instance. "
            "Build each member anew.",
        )
    return (
        "A training step of one member moves the others.",
        "Usual cause: a layer made once and passed to several members (a default "
        "argument, a dict). Make it in each member, or claim it as shared.",
    )


def aligned(rows: Sequence[Sequence[str]], gap: str = "   ") -> list[str]:
    """Rows as lines, with every column as wide as its widest entry.

    Example:
        >>> aligned([("a", "one"), ("long", "two")])
        ['a      one', 'long   two']
    """
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        gap.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def listed(names: Sequence[str], most: int = 6) -> str:
    """Names in one line, capped.

    Example:
        >>> listed(["0", "1", "2"]), listed([str(i) for i in range(9)])
        ('0, 1, 2', '0, 1, 2, 3, 4, 5 and 3 more')
    """
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"


def counted(things: Sized, noun: str) -> str:
    """How many things, with the noun in the right number.

    Example:
        >>> counted("abc", "member"), counted("a", "member")
        ('3 members', '1 member')
    """
    return f"{len(things)} {noun}" + ("" if len(things) == 1 else "s")


def replay() -> str:
    """The command that runs the present test again with the same seed; "" outside pytest."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
    if not test:
        return ""
    file, _, name = test.partition("::")
    if not file or file.endswith("ensembles/suite.py"):  # the gate is found by its import name
        test = f"ensembles.suite::{name}"
    gate = "--pyargs " if test.startswith("ensembles.suite") else ""
    about = f" --ensembles-subject={quoted(subject.get())}" if gate and subject.get() else ""
    return f"replay: pytest {gate}{quoted(test)}{about} --ensembles-seed={seed.get()}"
