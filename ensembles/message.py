"""Writes the message of a broken claim: claim, where, how much, likely cause, remedy, replay.

Standard library only. One function writes all messages, so that they have the same order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence, Sized
from shlex import quote as quoted
from textwrap import wrap
from typing import TYPE_CHECKING, TypedDict

from ensembles import present_run

if TYPE_CHECKING:
    from ensembles.findings import Finding, Findings

SHOWN_ROWS = 8
"""How many rows of a table are shown, so that a message fits on one screen."""

PROSE_WIDTH = 92


class Broken(AssertionError):  # noqa: N818  (what it says of a claim)
    """A broken claim: its text is the message, and the message is made from `findings`.

    Example:
        >>> from ensembles.findings import Finding, Findings
        >>> found = Findings(claim="two weights are claimed equal, but differ",
        ...                  items=(Finding(kind="differs", place="weight"),))
        >>> Broken(found).findings.kinds
        ('differs',)
    """

    def __init__(self, findings: Findings) -> None:
        super().__init__(rendered(findings))
        self.findings = findings


# Tracebacks show it under the name that readers know.
Broken.__module__, Broken.__qualname__ = "builtins", "AssertionError"


def assert_held(findings: Findings) -> None:
    """Raises `Broken` if something was found.

    Example:
        >>> from ensembles.findings import Findings
        >>> assert_held(Findings(claim="nothing is wrong"))
    """
    __tracebackhide__ = True
    if not findings.held:
        raise Broken(findings)


def rendered(findings: Findings) -> str:
    """The message of a broken claim: claim, where, how much, meaning, cause, remedy, replay.

    Rows of every kind of finding are shown. Rows that do not fit are counted.

    Args:
        findings: What a judgement found.

    Returns:
        The message, with the command that replays it when a pytest test is running.

    Example:
        >>> from ensembles.findings import Count, Finding, Findings
        >>> print(rendered(Findings(
        ...     claim="members 0, 1 are claimed independent, but share parameters",
        ...     items=(Finding(kind="shared", place="weight", found="one tensor in members 0, 1",
        ...                    meaning="The two members are one network.",
        ...                    cause="[model] * n", remedy="Build each member anew."),),
        ...     affected=(Count(1, "parameter", of=1),),
        ... )).partition("  replay")[0].rstrip())
        members 0, 1 are claimed independent, but share parameters
        <BLANKLINE>
          weight   one tensor in members 0, 1
          (1 of 1 parameter)
        <BLANKLINE>
          The two members are one network.
          Usual cause: [model] * n. Build each member anew.
    """
    shown = _shown(findings)
    hidden = len(findings) - len(shown)
    table = aligned(_rows(shown, several=len(findings.kinds) > 1))
    affected = ", ".join(map(str, findings.affected))
    if hidden:
        table.append(f"... {hidden} more" + (f" ({affected})" if affected else ""))
    elif affected:
        table.append(f"({affected})")
    if findings.looked_at:
        table.append(f"looked at {', '.join(map(str, findings.looked_at))}")
    prose = [*_prose(findings), *findings.notes]
    told = [line for text in prose for line in wrap(text, PROSE_WIDTH)]
    below = [*table, *([""] if told else []), *told, *filter(None, [replay()])]
    return "\n".join(line.rstrip() for line in [findings.claim, "", *(f"  {x}" for x in below)])


def _prose(findings: Findings) -> Iterator[str]:
    """What each kind means, its usual cause and what to do; one paragraph for each kind."""
    several = len(findings.kinds) > 1
    for kind in findings.kinds:
        items = findings.of_kind(kind)
        told = [
            *dict.fromkeys(item.meaning for item in items),
            *dict.fromkeys(_advice(item) for item in items),
        ]
        if several:
            yield f"{kind[:1].upper()}{kind[1:]}: {' '.join(filter(None, told))}"
        else:
            yield from told


def _shown(findings: Findings) -> list[Finding]:
    """As many findings as fit, in their order, and at least one of every kind."""
    firsts = {findings.items.index(findings.of_kind(kind)[0]) for kind in findings.kinds}
    others = [i for i in range(len(findings)) if i not in firsts]
    room = max(SHOWN_ROWS - len(firsts), 0)
    return [findings[i] for i in sorted([*firsts, *others[:room]])]


def _rows(items: Sequence[Finding], *, several: bool) -> list[tuple[str, ...]]:
    """Rows of place, kind, expected and found; columns that are empty are left out.

    The kind is shown only where there are several. If expected and found are too wide for one line,
    they stand one below the other.
    """
    rows: list[tuple[str, ...]] = [
        (
            item.place,
            f"{item.kind}:" if several else "",
            f"expected {item.expected}" if item.expected else "",
            f"found {item.found}" if item.expected and item.found else item.found,
        )
        for item in items
    ]
    if sum(max(len(row[i]) for row in rows) for i in (2, 3)) > PROSE_WIDTH:
        rows = [line for row in rows for line in _stacked(*row)]
    kept = [i for i in range(4) if any(row[i] for row in rows)]
    return [tuple(row[i] for i in kept) for row in rows]


def _stacked(place: str, kind: str, expected: str, found: str) -> Iterator[tuple[str, ...]]:
    yield (place, kind, expected or found, "")
    if expected and found:
        yield ("", "", found.replace("found ", "found    ", 1), "")


def _advice(item: Finding) -> str:
    cause = f"Usual cause: {item.cause.rstrip('.')}." if item.cause else ""
    return " ".join(filter(None, (cause, item.remedy)))


class Explanation(TypedDict):
    """What a kind of finding means, and what to do: fields of a `Finding`."""

    meaning: str
    cause: str
    remedy: str


def in_common(members: Sequence[str], *, whole: bool) -> Explanation:
    """What it means that members register the same weights, and how that comes about.

    Args:
        members: The members that do.
        whole: Whether everything that they register is the same, so that they are one network.

    Example:
        >>> in_common(["0", "1"], whole=True)["meaning"]
        'Members 0, 1 are one network: training them trains one model 2 times.'
    """
    if whole:
        return Explanation(
            meaning=f"Members {listed(members)} are one network: training them trains one model "
            f"{len(members)} times.",
            cause="[model] * n, or a registry that returns the same instance",
            remedy="Build each member anew.",
        )
    return Explanation(
        meaning="A training step of one member moves the others.",
        cause="a layer that was made once and passed to several members (a default argument, a "
        "dict)",
        remedy="Make it in each member, or claim it as shared.",
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
    if not file or file.endswith("ensembles/suite.py"):  # pytest finds the gate by its import name
        test = f"ensembles.suite::{name}"
    gate = "--pyargs " if test.startswith("ensembles.suite") else ""
    about = (
        f" --ensembles-subject={quoted(present_run.subject.get())}"
        if gate and present_run.subject.get()
        else ""
    )
    return f"replay: pytest {gate}{quoted(test)}{about} --ensembles-seed={present_run.seed.get()}"
