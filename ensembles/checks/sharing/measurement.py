"""What members share: every piece of memory that belongs to several registered tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Unpack

from ensembles.case import Case
from ensembles.checks.sharing.claim import SharingClaim
from ensembles.instruments.storage import Registration, SharedMemory, shared_memory
from ensembles.message import aligned, counted, listed
from ensembles.subject import Model, Recipe

__all__ = ["ParameterSharing", "measure", "measure_parameter_sharing", "told_memory"]


@dataclass(frozen=True)
class ParameterSharing:
    """Which parameters and buffers are the same memory, wholly or in part.

    Attributes:
        members: The members' names.
        places: Every registered parameter and buffer that has elements.
        shared: Every piece of memory that belongs to more than one place.
        doubled: Every piece of memory that belongs to several tensor objects, of members or not.
    """

    members: tuple[str, ...]
    places: tuple[Registration, ...]
    shared: tuple[SharedMemory, ...]
    doubled: tuple[SharedMemory, ...]

    @property
    def between_members(self) -> tuple[SharedMemory, ...]:
        """The pieces of memory that belong to more than one member."""
        return tuple(memory for memory in self.shared if len(memory.members) > 1)

    def __str__(self) -> str:
        head = f"{counted(self.members, 'member')}, {len(self.places)} parameters and buffers, " + (
            f"{len(self.shared)} shared pieces of memory" if self.shared else "nothing shared"
        )
        rows = [
            (listed(memory.names, 3), told_memory(memory), f"{memory.bytes:,} bytes")
            for memory in self.shared
        ]
        return "\n".join([head, *(f"  {line}" for line in aligned(rows))])


def measure_parameter_sharing(
    model: Case | Model, batch: Any = None, **recipe: Unpack[Recipe]
) -> ParameterSharing:
    """Finds every parameter and buffer that is the same memory as another, wholly or in part.

    It needs no batch, calls nothing, and works on the meta device: see `instruments.storage`.

    Args:
        model: One module, or the members as a list or dict of modules.
        batch: Not used.
        **recipe: `members` finds the members inside one module.

    Returns:
        The measurement.

    Raises:
        ValueError: If there are no members, or a parameter is lazy.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> print(measure_parameter_sharing([layer, layer]))
        2 members, 4 parameters and buffers, 2 shared pieces of memory
          weight   one tensor in members 0, 1   24 bytes
          bias     one tensor in members 0, 1   8 bytes
    """
    return measure(Case.of(model, batch, **recipe))


def measure(case: Case, claim: SharingClaim | None = None) -> ParameterSharing:
    """What `measure_parameter_sharing` finds in a case; no claim asks for less."""
    places, shared = shared_memory(case.members)
    everywhere = shared
    if case.subject.members is not None:  # what stands beside the members can be tied as well
        _, everywhere = shared_memory(case.modules)
    return ParameterSharing(
        members=tuple(case.members),
        places=places,
        shared=shared,
        doubled=tuple(memory for memory in everywhere if memory.objects > 1),
    )


def told_memory(memory: SharedMemory) -> str:
    """How members share a piece of memory, in a few words.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> told_memory(measure_parameter_sharing([layer, layer]).shared[0])
        'one tensor in members 0, 1'
    """
    how = "one tensor" if memory.whole else f"{memory.bytes:,} bytes in common"
    return f"{how} in members {listed(memory.members)}"
