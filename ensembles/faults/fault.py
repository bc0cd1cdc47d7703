"""What a fault is: a subject with one known defect, and its healthy twin with the same claims."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from ensembles.faults.architectures import ARCHITECTURES, LAYERS, Architecture
from ensembles.subject import Subject

__all__ = ["INDEPENDENT", "Fault", "Place", "fault"]

INDEPENDENT: Mapping[str, Any] = MappingProxyType(
    {
        "sharing": "independent",
        "ownership": "independent",
        "coupling": "independent",
        "coverage": "complete",
    }
)
"""What an ensemble of separate members claims."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a defect is planted.

    Attributes:
        members: How many members the ensemble has.
        member: The member that has the defect.
        layer: The block that has it.
        layers: How many blocks every network has.

    Example:
        >>> Place(members=3, member=2).other
        0
    """

    members: int = 2
    member: int = 1
    layer: int = 0
    layers: int = LAYERS

    def __post_init__(self) -> None:
        if not (0 <= self.member < self.members > 1 and 0 <= self.layer < self.layers):
            raise ValueError(
                f"{self} is no place: members is at least 2, member below it, layer below layers."
            )

    @property
    def other(self) -> int:
        """A member without the defect."""
        return (self.member + 1) % self.members


Build = Callable[[Architecture, Place, bool], Subject]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A model or training set-up with one known defect, and its healthy twin.

    Attributes:
        name: What the catalogue calls it.
        section: Its part of the catalogue: "members", "training", "sharing", "cost" or "state".
        summary: One sentence.
        caught_by: The checks that must catch it, in every architecture.
        build: Makes the subject from the architecture, the place, and whether it is broken.
        architectures: The architectures in which it makes sense.
        recorded: Whether the graph of the twin is claimed too.

    Example:
        >>> from ensembles.faults.catalogue import FAULTS
        >>> fault = FAULTS["same-module"]
        >>> first, second = fault.subject("mlp").make()
        >>> first is second
        True
        >>> fault.subject("mlp").claims == fault.twin("mlp").claims
        True
    """

    name: str
    section: str
    summary: str
    caught_by: tuple[str, ...]
    build: Build = field(repr=False)
    architectures: tuple[str, ...] = tuple(ARCHITECTURES)
    recorded: bool = False

    def subject(self, architecture: str, *, place: Place | None = None) -> Subject:
        """The subject with the defect.

        Args:
            architecture: One of `architectures`.
            place: Where the defect is; by default in member 1 of 2, block 0.

        Raises:
            ValueError: If the fault makes no sense in this architecture.
        """
        return self._made(architecture, place or Place(), True)

    def twin(self, architecture: str, *, place: Place | None = None) -> Subject:
        """The subject that lacks only the defect, with the same claims; args as for `subject`."""
        return self._made(architecture, place or Place(), False)

    def _made(self, architecture: str, place: Place, broken: bool) -> Subject:
        if architecture not in self.architectures:
            raise ValueError(
                f"fault {self.name!r} makes no sense in {architecture!r}: it is one of "
                f"{', '.join(self.architectures)}."
            )
        built = replace(ARCHITECTURES[architecture], layers=place.layers)
        subject = self.build(built, place, broken)
        claims = dict(subject.claims)
        if self.recorded:
            twin = self.build(built, place, False)
            claims["graph"] = _graph_of(twin)
        twin_of = "" if broken else "healthy twin of "
        return replace(subject, name=f"{twin_of}{self.name} ({architecture})", claims=claims)


def _graph_of(subject: Subject) -> str:
    from ensembles.checks.graph.measurement import measure_autograd_graph

    return str(measure_autograd_graph(subject))


def fault(
    section: str,
    *caught_by: str,
    architectures: tuple[str, ...] = tuple(ARCHITECTURES),
    recorded: bool = False,
) -> Callable[[Build], Fault]:
    """Makes a `Fault` of a function; its name is the fault's, its docstring the summary.

    Args:
        section: As for `Fault`.
        *caught_by: As for `Fault`.
        architectures: As for `Fault`.
        recorded: As for `Fault`.

    Example:
        >>> @fault("members", "sharing")
        ... def no_members(architecture, place, broken):
        ...     '''The members are missing.'''
        >>> no_members.name, no_members.summary
        ('no-members', 'The members are missing.')
    """

    def make(build: Build) -> Fault:
        return Fault(
            name=build.__name__.replace("_", "-"),
            section=section,
            summary=" ".join((build.__doc__ or "").split()),
            caught_by=caught_by,
            build=build,
            architectures=architectures,
            recorded=recorded,
        )

    return make
