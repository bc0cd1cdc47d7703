"""What the checks of a subject found, as data and as a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, overload

from ensembles.findings import Findings
from ensembles.message import aligned

__all__ = ["Result", "Results"]


@dataclass(frozen=True)
class Result:
    """What one check found.

    Attributes:
        subject: The subject's name.
        check: The check's name.
        claim: What was claimed; None if nothing was claimed.
        status: "held", "broken", "error" (the check could not look), "fails as expected", "passes
            unexpectedly" or "not claimed".
        found: The measurement in one line, or the first line of the message.
        message: The whole message of a broken claim or an error.
        measurement: The measurement of a claim that held.
        findings: What the judgement found, if the claim is broken.

    Example:
        >>> Result("net", "sharing", "distinct", "held", "1 member").status
        'held'
    """

    subject: str
    check: str
    claim: Any
    status: str
    found: str = ""
    message: str = ""
    measurement: object = None
    findings: Findings | None = None

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data that JSON can hold. A measurement is given as its text.

        Example:
            >>> Result("net", "sharing", None, "not claimed").to_dict()["status"]
            'not claimed'
        """
        return {
            "subject": self.subject,
            "check": self.check,
            "claim": None if self.claim is None else str(self.claim),
            "status": self.status,
            "found": self.found,
            "message": self.message,
            "measurement": None if self.measurement is None else str(self.measurement),
            "findings": None if self.findings is None else self.findings.to_dict(),
        }


@dataclass(frozen=True, repr=False)
class Results(Sequence[Result]):
    """The results of all checks of a subject: a sequence, also by name, as `results["sharing"]`.

    `str` is a table with the messages of broken claims. `held` is what a gate asks.

    Example:
        >>> results = Results((Result("net", "sharing", "distinct", "held", "1 member"),))
        >>> results["sharing"].status, results
        ('held', <Results of net: 1 held>)
    """

    results: tuple[Result, ...]

    @overload
    def __getitem__(self, index: int | str) -> Result: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Result, ...]: ...
    def __getitem__(self, index: int | str | slice) -> Result | tuple[Result, ...]:
        if not isinstance(index, str):
            return self.results[index]
        for result in self.results:
            if result.check == index:
                return result
        raise KeyError(
            f"there is no check {index!r}. Checks are: {', '.join(r.check for r in self)}."
        )

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)

    @property
    def held(self) -> bool:
        """Whether something was claimed, and every claim held or failed as expected."""
        states = {result.status for result in self.results}
        bad = {"broken", "error", "passes unexpectedly"}
        return "held" in states and not states & bad

    def to_dict(self) -> dict[str, Any]:
        """The results as plain data that JSON can hold."""
        return {
            "subject": self._subject,
            "held": self.held,
            "results": [result.to_dict() for result in self.results],
        }

    def to_json(self) -> str:
        """The results as JSON text.

        Example:
            >>> results = Results((Result("net", "sharing", None, "not claimed"),))
            >>> json.loads(results.to_json())["held"]
            False
        """
        return json.dumps(self.to_dict(), indent=2)

    @property
    def _subject(self) -> str:
        return self.results[0].subject if self.results else ""

    def __str__(self) -> str:
        lines = aligned([(r.check, r.status, r.found) for r in self.results])
        details = [r.message for r in self.results if r.message]
        return "\n\n".join(["\n".join(lines), *details])

    def __repr__(self) -> str:
        states = [result.status for result in self.results]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        return f"<Results of {self._subject}: {counts}>"

    def _repr_html_(self) -> str:
        """A table for notebooks, with each message below its row."""
        rows = []
        for result in self.results:
            if result.status == "not claimed":
                continue
            cells = (result.check, result.status, result.found)
            rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
            if result.message:
                message = f'<pre style="text-align: left">{escape(result.message)}</pre>'
                rows.append(f'<tr><td></td><td colspan="2">{message}</td></tr>')
        head = "".join(f"<th>{word}</th>" for word in ("check", "status", "found"))
        silent = [r.check for r in self.results if r.status == "not claimed"]
        caption = escape(self._subject) + (f" (not claimed: {', '.join(silent)})" if silent else "")
        return f"<table><caption>{caption}</caption><tr>{head}</tr>{''.join(rows)}</table>"
