"""What a check found, as data. Messages, tables, JSON and reports are made from it.

Standard library only. Instruments do not write sentences, and no code reads a sentence again. A
judgement fills in these fields, and `ensembles.message` turns them into words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload

__all__ = ["Count", "Finding", "Findings"]


@dataclass(frozen=True)
class Count:
    """A number of things, often of a total: how many are affected, or were looked at.

    Example:
        >>> print(Count(2, "parameter", of=62), "|", Count(1, "buffer"), "|", Count(3, "query"))
        2 of 62 parameters | 1 buffer | 3 queries
    """

    number: int
    noun: str
    of: int | None = None

    @property
    def complete(self) -> bool:
        """Whether it is all of them."""
        return self.of is None or self.number >= self.of

    def __str__(self) -> str:
        total = self.number if self.of is None else self.of
        count = f"{self.number:,}" if self.of is None else f"{self.number:,} of {self.of:,}"
        return f"{count} {self.noun if total == 1 else _plural(self.noun)}"


def _plural(noun: str) -> str:
    """The plural of a noun: "ordered pairs", "pieces of memory"."""
    head, preposition, rest = noun.partition(" of ")
    if head.endswith("y") and head[-2:-1] not in "aeiou":
        return f"{head[:-1]}ies{preposition}{rest}"
    ending = "es" if head.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{head}{ending}{preposition}{rest}"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that a check found.

    Attributes:
        kind: What kind of finding it is, in a word or two, such as "leak" or "zero gradient".
        place: Where it is: the path of a parameter, buffer or module, or a step, row or call.
        members: The members that it concerns.
        expected: What was claimed to be there; "" if the claim already says it.
        found: What was found.
        amount: How much, as a number in the unit that `found` names; None if nothing is counted.
        meaning: What this kind means for training or prediction, in one sentence.
        cause: The usual cause, in words that follow "Usual cause:"; "" if none is known.
        remedy: What to do, in full sentences.

    Example:
        >>> Finding(kind="shared", place="conv1.weight", found="one tensor in members 0, 1").place
        'conv1.weight'
    """

    kind: str
    place: str = ""
    members: tuple[str, ...] = ()
    expected: str = ""
    found: str = ""
    amount: float | None = None
    meaning: str = ""
    cause: str = ""
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Findings(Sequence[Finding]):
    """Everything that a check found against one claim; empty if the claim holds.

    Attributes:
        claim: The claim in one sentence. If it is broken, the sentence says how: "members 0, 1 are
            claimed independent, but share parameters".
        items: The findings, the most important first.
        affected: How much of the model they concern, such as 2 of 62 parameters.
        looked_at: How much was looked at, where that is not everything.
        notes: What a reader should know besides, in full sentences: what the claim lets pass.

    Example:
        >>> Findings(claim="two members are independent").held
        True
    """

    claim: str
    items: tuple[Finding, ...] = ()
    affected: tuple[Count, ...] = ()
    looked_at: tuple[Count, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def held(self) -> bool:
        """Whether nothing was found."""
        return not self.items

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of findings, in the order in which they first occur."""
        return tuple(dict.fromkeys(item.kind for item in self.items))

    def of_kind(self, kind: str) -> tuple[Finding, ...]:
        """The findings of one kind."""
        return tuple(item for item in self.items if item.kind == kind)

    @overload
    def __getitem__(self, index: int) -> Finding: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Finding, ...]: ...
    def __getitem__(self, index: int | slice) -> Finding | tuple[Finding, ...]:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.items)

    def to_dict(self) -> dict[str, Any]:
        """As plain data: what JSON can hold.

        Example:
            >>> Findings(claim="it holds").to_dict()["items"]
            []
        """
        return {
            "claim": self.claim,
            "items": [_plain(asdict(item)) for item in self.items],
            "affected": [asdict(count) for count in self.affected],
            "looked_at": [asdict(count) for count in self.looked_at],
            "notes": list(self.notes),
        }


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
