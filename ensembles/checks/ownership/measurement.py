"""Who owns what: for every element of every parameter, the members whose output it reaches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple, Unpack

from ensembles.case import Case, Given
from ensembles.checks.ownership.claim import OwnershipClaim
from ensembles.checks.ownership.owner_sets import Owners, OwnerSets
from ensembles.findings import Count
from ensembles.handling.registered_tensors import registered
from ensembles.instruments.influence import Probe, ProbeOptions, probing
from ensembles.message import SHOWN_ROWS, aligned, counted, listed
from ensembles.subject import LISTED, Recipe

__all__ = ["Block", "OwnershipMap", "measure", "measure_ownership_map"]

FURTHER_PASSES: tuple[ProbeOptions, ...] = (
    {"training": True},
    {"values": "signed"},
    {"values": "present"},
)

ROUTING_PASSES: tuple[ProbeOptions, ...] = tuple(
    {"values": "signed", "draw": i} for i in range(1, 7)
)
"""Hard routing sends rows to an expert for some values. Needed where nothing was reached only."""


class Block(NamedTuple):
    """The smallest block of a parameter that holds certain elements.

    Attributes:
        slices: As Python writes them: [0:32, 32:64].
        whole: Whether these are all elements of the parameter.
        filled: Whether these are all elements of the block.
    """

    slices: str
    whole: bool
    filled: bool


@dataclass(frozen=True)
class OwnershipMap:
    """For every element of every parameter, the members whose output it reaches.

    Two maps are equal when every element has the same owners.

    Attributes:
        members: The members' names.
        owners: Parameter name to its sets of owners, each with the number of elements; () is the
            set of elements that reach nobody.
        digests: Parameter name to a digest of where those elements are.
        lookups: Parameters that are read by index: rows that the batch does not name reach
            nobody, and that is no finding.
        frozen: Parameters that are not trained; nor is it a finding where these reach nobody.
        homes: Parameter to the member that registers it, where members are modules of their own,
            whose names then begin with the member's; empty for one module.
        names: Parameter to every name under which it is registered.
    """

    members: Owners
    owners: Mapping[str, Mapping[Owners, int]]
    digests: Mapping[str, str]
    lookups: frozenset[str]
    frozen: frozenset[str]
    homes: Mapping[str, str]
    names: Mapping[str, tuple[str, ...]]
    elements: Mapping[str, OwnerSets] = field(compare=False, repr=False)

    def statement(self, name: str) -> str:
        """What holds of a parameter: independent, tied, unused, or shared."""
        found = [owners for owners in self.owners[name] if owners]
        if not found:
            return "unused"
        if all(len(owners) == 1 for owners in found):
            return "independent"
        return "tied" if all(owners == self.members for owners in found) else "shared"

    def block(self, name: str, owners: Owners) -> Block:
        """The block of a parameter that holds the elements with these owners.

        Args:
            name: The parameter.
            owners: One of the keys of `self.owners[name]`.
        """
        mask = self.elements[name].mask(owners)
        index = mask.nonzero()
        low, high = index.amin(0).tolist(), index.amax(0).tolist()
        sides = [h - lo + 1 for lo, h in zip(low, high, strict=True)]
        slices = ", ".join(
            ":" if side == size else f"{lo}:{lo + side}"
            for lo, side, size in zip(low, sides, mask.shape, strict=True)
        )
        count = self.owners[name][owners]
        return Block(f"[{slices}]", whole=count == mask.numel(), filled=count == prod(sides))

    def __str__(self) -> str:
        totals: Counter[Owners] = Counter()
        spread: Counter[Owners] = Counter()
        for counts in self.owners.values():
            totals.update(counts)
            spread.update(counts.keys())
        states = Counter(self.statement(name) for name in self.owners)
        told = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
        rows = [
            (
                listed(owners) or "nobody",
                str(Count(total, "element")),
                f"in {Count(spread[owners], 'parameter')}",
            )
            for owners, total in sorted(totals.items(), key=lambda item: (-len(item[0]), item[0]))
        ]
        lines = aligned(rows[:SHOWN_ROWS])
        if len(rows) > SHOWN_ROWS:
            lines.append(f"... {len(rows) - SHOWN_ROWS} more sets of members")
        head = f"{counted(self.members, 'member')}, {Count(totals.total(), 'element')}, "
        return "\n".join([f"{head}parameters: {told}", *(f"  {line}" for line in lines)])


def measure_ownership_map(
    model: Given, batch: Any = None, **recipe: Unpack[Recipe]
) -> OwnershipMap:
    """Finds, for every element of every parameter, the members whose output it reaches.

    The model is looked at in eval mode, as it predicts. Where elements reach nobody there, further
    passes may add to them: in train mode (auxiliary heads), with values of both signs in place of
    one-hot inputs, and at the present weights and batch (routing, clipping); and for parameters of
    which nothing was reached, with other values (an expert without any row).

    Args:
        model: One module, or the members as a list or dict of modules.
        batch: What the model is called with; the values of floating inputs do not matter.
        **recipe: See `Subject`. `outputs` splits what one module returns.

    Returns:
        The map. It costs a forward pass and a backward pass through what each member uses, and
        one byte of memory for each element and each eight members of which one reaches it.

    Raises:
        ValueError: If parameters hold no usable numbers, if the model cannot be called or split,
            or if its outputs do not depend on parameters by autograd.

    Example:
        >>> grouped = nn.Conv1d(4, 2, 1, groups=2, bias=False)
        >>> print(measure_ownership_map(
        ...     grouped, torch.randn(1, 4, 3), outputs=lambda y: [y[:, 0], y[:, 1]]))
        2 members, 4 elements, parameters: 1 independent
          0   2 elements   in 1 parameter
          1   2 elements   in 1 parameter
    """
    return measure(Case.of(model, batch, **recipe))


def measure(case: Case, claim: OwnershipClaim | None = None) -> OwnershipMap:
    """What `measure_ownership_map` finds in a case; no claim asks for less."""
    __tracebackhide__ = True
    _ = case.members  # refuses none before outputs are looked at
    with probing(case) as probe:
        members, lookups, frozen = tuple(probe.outputs), probe.lookups, probe.frozen
        homes = dict(probe.homes)
        if not probe.parameters:
            raise ValueError(f"the model has no parameters that anybody could own. {LISTED}.")
        owned = {name: OwnerSets(p, members) for name, p in probe.parameters.items()}
        _add_members(owned, probe)
    for options in (*FURTHER_PASSES, *ROUTING_PASSES):
        silent = {
            name: owners
            for name, owners in owned.items()
            if name not in lookups
            and bool(owners.nobody().all() if options in ROUTING_PASSES else owners.nobody().any())
        }
        # A pass that fails has nothing to add: the model was called before.
        with suppress(ValueError):
            if silent:
                with probing(case, **options) as probe:
                    _add_members(silent, probe)
    return OwnershipMap(
        members=members,
        owners={name: owners.counts() for name, owners in owned.items()},
        digests={name: owners.digest() for name, owners in owned.items()},
        lookups=lookups,
        frozen=frozen,
        homes=homes,
        names={e.names[0]: e.names for e in registered(case.modules)},
        elements=owned,
    )


def _add_members(owned: Mapping[str, OwnerSets], probe: Probe) -> None:
    """Adds who reaches the elements that nobody has reached yet."""
    free = {name: owners.nobody() for name, owners in owned.items()}
    for position, member in enumerate(probe.outputs):
        reached = probe.reach(member, owned)
        for name, owners in owned.items():
            mask = reached[name]
            owners.add(position, None if mask is None else mask & free[name])
