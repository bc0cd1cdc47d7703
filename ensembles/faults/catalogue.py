"""The fault catalogue: every fault by name, and the kill matrix, which says what catches it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ensembles.faults import (
    cost,
    drifts,
    groups,
    members,
    packed,
    predictions,
    rates,
    rows,
    seeds,
    sharing,
    starts,
    state,
    training,
    trips,
)
from ensembles.faults.fault import Fault
from ensembles.message import aligned
from ensembles.subject import Subject

__all__ = ["FAULTS", "KillMatrix", "Run", "kill_matrix"]

_MODULES = (
    members,
    packed,
    starts,
    seeds,
    rows,
    predictions,
    groups,
    training,
    rates,
    sharing,
    cost,
    state,
    drifts,
    trips,
)

FAULTS: Mapping[str, Fault] = MappingProxyType(
    {
        fault.name: fault
        for module in _MODULES
        for fault in vars(module).values()
        if isinstance(fault, Fault)
    }
)
"""Every fault that a module defines, by name, in the order in which they stand there."""


@dataclass(frozen=True)
class Run:
    """What every check said of one subject of the catalogue.

    Attributes:
        fault: The fault's name.
        architecture: The architecture's name.
        broken: Whether it is the fault, or its healthy twin.
        statuses: Check name to "held", "broken", "error" or "not claimed".
        messages: Check name to the message, for checks that fired.
    """

    fault: str
    architecture: str
    broken: bool
    statuses: Mapping[str, str]
    messages: Mapping[str, str]

    @property
    def fired(self) -> tuple[str, ...]:
        """The checks that did not pass: their claim is broken, or they ended in an error."""
        return tuple(check for check, said in self.statuses.items() if said in ("broken", "error"))


@dataclass(frozen=True)
class KillMatrix:
    """Which checks catch which faults, and whether a check fails on a healthy twin.

    Attributes:
        faults: The faults, in order.
        runs: One for each fault and architecture, and one for each twin.
    """

    faults: tuple[Fault, ...]
    runs: tuple[Run, ...]

    @property
    def missed(self) -> tuple[str, ...]:
        """Faults that a check should catch but did not, as "fault (architecture): check"."""
        named = {fault.name: fault.caught_by for fault in self.faults}
        return tuple(
            f"{run.fault} ({run.architecture}): {check}"
            for run in self.runs
            if run.broken
            for check in named[run.fault]
            if run.statuses[check] != "broken"
        )

    @property
    def false_alarms(self) -> tuple[str, ...]:
        """Healthy twins on which a check fails, as "fault (architecture): check"."""
        return tuple(
            f"{run.fault} ({run.architecture}): {check}"
            for run in self.runs
            if not run.broken
            for check in run.fired
        )

    @property
    def checks(self) -> tuple[str, ...]:
        """The checks, in order."""
        return tuple(self.runs[0].statuses) if self.runs else ()

    def explained_by(self, check: str) -> tuple[str, ...]:
        """The faults that this check alone catches, in every architecture."""
        return tuple(
            fault.name
            for fault in self.faults
            if {run.fired for run in self._of(fault.name, broken=True)} == {(check,)}
        )

    def __str__(self) -> str:
        rows = [("", "", *self.checks, "twin")]
        section = ""
        for fault in self.faults:
            if fault.section != section:
                section = fault.section
                rows.append((section, *[""] * (len(self.checks) + 2)))
            cells = [self._cell(fault, check) for check in self.checks]
            rows.append(("", fault.name, *cells, self._twin(fault)))
        return "\n".join(
            [
                *aligned(rows, gap="  "),
                "",
                f"{len(self.faults)} faults and their healthy twins, each in the architectures "
                "where it makes sense",
                "2/3: caught in 2 of 3 architectures; * named for the fault; ! the check could not "
                "look, and said so;",
                ". silent; - not claimed",
                f"missed: {', '.join(self.missed) or 'none'}",
                f"false alarms: {', '.join(self.false_alarms) or 'none'}",
                *(
                    f"{check} alone catches: {', '.join(self.explained_by(check)) or 'nothing'}"
                    for check in self.checks
                ),
            ]
        )

    def _of(self, fault: str, *, broken: bool) -> list[Run]:
        return [run for run in self.runs if (run.fault, run.broken) == (fault, broken)]

    def _cell(self, fault: Fault, check: str) -> str:
        said = [run.statuses[check] for run in self._of(fault.name, broken=True)]
        if set(said) == {"not claimed"}:
            return "-"
        caught = sum(status in ("broken", "error") for status in said)
        if not caught and check not in fault.caught_by:
            return "."
        marks = ("*" if check in fault.caught_by else "") + ("!" if "error" in said else "")
        return f"{caught}/{len(said)}{marks}"

    def _twin(self, fault: Fault) -> str:
        runs = self._of(fault.name, broken=False)
        silent = sum(not run.fired for run in runs)
        return "silent" if silent == len(runs) else f"fires in {len(runs) - silent}/{len(runs)}"


def kill_matrix(
    faults: Iterable[Fault] = FAULTS.values(), *, architectures: Iterable[str] | None = None
) -> KillMatrix:
    """Runs every check on every fault and on its healthy twin.

    Args:
        faults: The faults, by default the whole catalogue.
        architectures: Names of architectures, by default all.

    Returns:
        The matrix; print it.

    Example:
        >>> matrix = kill_matrix([FAULTS["same-module"]], architectures=["mlp"])
        >>> matrix.missed, matrix.false_alarms
        ((), ())
    """
    chosen = tuple(faults)
    wanted = None if architectures is None else tuple(architectures)
    return KillMatrix(
        chosen,
        tuple(
            _run(fault, name, make(name), broken)
            for fault in chosen
            for name in fault.architectures
            if wanted is None or name in wanted
            for broken, make in _forms(fault)
        ),
    )


def _forms(fault: Fault) -> tuple[tuple[bool, Callable[[str], Subject]], ...]:
    return (True, fault.subject), (False, fault.twin)


def _run(fault: Fault, architecture: str, subject: Subject, broken: bool) -> Run:
    from ensembles.gate.conformance import check_ensemble

    results = check_ensemble(subject)
    return Run(
        fault.name,
        architecture,
        broken,
        {result.check: result.status for result in results},
        {result.check: result.message for result in results if result.message},
    )
