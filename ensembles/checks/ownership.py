"""Promise: every scalar weight moves the outputs of exactly the members that are claimed to own it.

Catches members that mix where they are claimed apart (a layer with groups=1 in a grouped network,
a channel shuffle, a norm over all channels), subnets that read a block of another or an empty
group, a stem that is not tied, and parameters that move nothing. It is right where storage is
blind: masks, grouped and packed convolutions, low-rank factors, functional weights.

For every element of every parameter it finds the set of members whose output it reaches: one
backward pass a member, with the network made transparent, so that dead ReLUs, max-pool ties,
dropout, saturated softmax and branches that start at zero hide nothing. How, and the limits of it
(stop-gradients, hard routing, weights held at zero from outside), is told in
`ensembles.probes.influence`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from ctypes import c_char
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypedDict

import torch
from torch import Tensor

from ensembles.message import aligned, broken, counted, listed, told_in_common
from ensembles.probes.influence import Probe, Values, probing
from ensembles.probes.registers import registered
from ensembles.subject import LISTED, SPLIT, Model, Outputs, Partition, named_modules_of

__all__ = [
    "OwnershipMap",
    "assert_ownership",
    "measure_ownership_map",
]

Owners = tuple[str, ...]


class _Look(TypedDict, total=False):
    training: bool
    values: Values
    draw: int


Statement = str | Partition
"""`independent`, `tied`, `unused`, `partition` (short for `Partition()`), or a `Partition`."""

FURTHER_LOOKS: tuple[_Look, ...] = (
    {"training": True},
    {"values": "signed"},
    {"values": "present"},
)

ROUTING_LOOKS: tuple[_Look, ...] = tuple({"values": "signed", "draw": i} for i in range(1, 7))
"""Hard routing sends rows to an expert for some values. Needed where nothing was reached only."""

WORDS = ("independent", "tied", "partition", "unused")


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
    elements: Mapping[str, _Owners] = field(compare=False, repr=False)

    def statement(self, name: str) -> str:
        """What holds of a parameter: independent, tied, unused, or shared."""
        found = [owners for owners in self.owners[name] if owners]
        if not found:
            return "unused"
        if all(len(owners) == 1 for owners in found):
            return "independent"
        return "tied" if all(owners == self.members for owners in found) else "shared"

    def where(self, name: str, owners: Owners) -> str:
        """The elements of a parameter with these owners: a block such as [0:32, 32:64], or all.

        Args:
            name: The parameter.
            owners: One of the keys of `self.owners[name]`.
        """
        mask = self.elements[name].mask(owners)
        count = int(mask.sum())
        if count == mask.numel():
            return "all"
        index = mask.nonzero()
        low, high = index.amin(0).tolist(), index.amax(0).tolist()
        sides = [h - lo + 1 for lo, h in zip(low, high, strict=True)]
        box = ", ".join(
            ":" if side == size else f"{lo}:{lo + side}"
            for lo, side, size in zip(low, sides, mask.shape, strict=True)
        )
        filled = count == torch.tensor(sides).prod()
        return f"[{box}]" if filled else f"{count:,} elements within [{box}]"

    def __str__(self) -> str:
        totals: Counter[Owners] = Counter()
        spread: Counter[Owners] = Counter()
        for counts in self.owners.values():
            totals.update(counts)
            spread.update(counts.keys())
        everything = sum(totals.values())
        states = Counter(self.statement(name) for name in self.owners)
        told = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
        head = f"{counted(self.members, 'member')}, {everything:,} elements, parameters: {told}"
        rows = [
            (listed(owners) or "nobody", f"{total:,} elements", f"in {spread[owners]} parameters")
            for owners, total in sorted(totals.items(), key=lambda item: (-len(item[0]), item[0]))
        ]
        return "\n".join([head, *(f"  {line}" for line in aligned(rows))])


def measure_ownership_map(
    model: Model, batch: Any, *, outputs: Outputs | None = None
) -> OwnershipMap:
    """Finds, for every element of every parameter, the members whose output it reaches.

    The model is looked at in evaluation mode, as it predicts. Where elements reach nobody there,
    further looks may add to them: in training mode (auxiliary heads), with values of both signs
    in place of one-hot inputs, and at the present weights and batch (routing, clipping); and for
    parameters of which nothing was reached, with other values (an expert without any row).

    Args:
        model: One module, or the members as a list or dict of modules.
        batch: What the model is called with; the values of floating inputs do not matter.
        outputs: Splits what one module returns into member outputs: by default a list, tuple or
            dict; `split_axis` and `split_batch` for stacked ones.

    Returns:
        The map. It costs a forward pass and a backward pass through what each member uses, and
        one byte of memory for each element (eight where there are more than eight members).

    Raises:
        ValueError: If parameters hold no usable numbers, if the model cannot be called or split,
            or if its outputs do not depend on parameters by autograd.

    Example:
        >>> grouped = nn.Conv1d(4, 2, 1, groups=2, bias=False)
        >>> print(measure_ownership_map(
        ...     grouped, torch.randn(1, 4, 3), outputs=lambda y: [y[:, 0], y[:, 1]]))
        2 members, 4 elements, parameters: 1 independent
          0   2 elements   in 1 parameters
          1   2 elements   in 1 parameters
    """
    owned: dict[str, _Owners] = {}
    with probing(model, batch, outputs=outputs) as probe:
        members, lookups, frozen = tuple(probe.outputs), probe.lookups, probe.frozen
        homes = dict(probe.homes)
        if not probe.parameters:
            raise ValueError(f"the model has no parameters that anybody could own. {LISTED}.")
        owned = {name: _Owners(p, members) for name, p in probe.parameters.items()}
        _add_members(owned, probe)
    for look in (*FURTHER_LOOKS, *ROUTING_LOOKS):
        silent = {
            name: owners
            for name, owners in owned.items()
            if name not in lookups
            and not bool(owners.codes.any() if look in ROUTING_LOOKS else owners.codes.all())
        }
        # A look that fails has nothing to add: the model was called before.
        with suppress(ValueError):
            if silent:
                with probing(model, batch, outputs=outputs, **look) as probe:
                    _add_members(silent, probe)
    return OwnershipMap(
        members=members,
        owners={name: owners.counts() for name, owners in owned.items()},
        digests={name: owners.digest() for name, owners in owned.items()},
        lookups=lookups,
        frozen=frozen,
        homes=homes,
        names={e.names[0]: e.names for e in registered(named_modules_of(model))},
        elements=owned,
    )


def _add_members(owned: Mapping[str, _Owners], probe: Probe) -> None:
    """Adds who reaches the elements that nobody has reached yet."""
    free = {name: owners.codes == 0 for name, owners in owned.items()}
    for position, member in enumerate(probe.outputs):
        reached = probe.reach(member, owned)
        for name, owners in owned.items():
            mask = reached[name]
            owners.add(position, None if mask is None else mask & free[name])


def assert_ownership(
    ownership: OwnershipMap, claim: Statement | Mapping[str, Statement] = "independent"
) -> None:
    """Checks that every element's owners are those that are claimed.

    Args:
        ownership: From `measure_ownership_map`.
        claim: A statement about every parameter, or patterns (`fnmatch`) of parameter names, each
            with a statement; the first that fits counts, and every parameter must have one.
            Statements:

            - `independent`: an element reaches one member at most (where members are modules of
              their own: the one that it belongs to), and every parameter reaches some member.
              Blocks that a mask leaves unused are no finding; a member that has no part of a
              tensor in which several others have theirs is one. What is frozen may be shared.
            - `tied`: every element reaches every member.
            - `partition`, or `Partition(parent, times)`: every element reaches the parent and
              `times` subnets, and every subnet has an equal share.
            - `unused`: no element reaches anybody.

    Raises:
        ValueError: If there is one member only, a statement is unknown, a pattern fits nothing, a
            parameter fits no pattern, or there is no such parent.
        AssertionError: If some element has other owners than claimed.

    Example:
        >>> members = [nn.Linear(3, 2), nn.Linear(3, 2)]
        >>> assert_ownership(measure_ownership_map(members, torch.randn(1, 3)), "independent")
    """
    __tracebackhide__ = True
    if len(ownership.members) < 2:
        raise ValueError(
            "ownership compares members, and the model's output is one member's "
            f"({listed(ownership.members)}). {SPLIT}"
        )
    findings = [
        (name, finding)
        for name, statement in _statements(ownership, claim)
        for finding in _findings(ownership, name, statement)
    ]
    if not findings:
        return
    kinds = Counter(finding.kind for _, finding in findings)
    main = next(kind for kind in _VERBS if kind in kinds)
    touched = {name for name, _ in findings}
    found = [(name, finding.owners) for name, finding in findings if finding.kind == main]
    meaning, remedy = _explained(ownership, main, found)
    raise AssertionError(
        broken(
            f"weights of members {listed(ownership.members)} are claimed {_told(claim)}, "
            f"and {_VERBS[main]}",
            [
                (
                    _short(ownership, name),
                    ownership.where(name, finding.owners) if finding.here else "",
                    f"expected {finding.expected}",
                    f"found {finding.found}",
                )
                for name, finding in findings
            ],
            total=f"{len(touched)} of {counted(ownership.owners, 'parameter')}",
            meaning=meaning,
            remedy=remedy,
        )
    )


def _explained(
    ownership: OwnershipMap, kind: str, found: list[tuple[str, Owners]]
) -> tuple[str, str]:
    """Meaning and usual cause: what several register leaks by that, and mixes nothing."""
    meaning, remedy = _EXPLANATIONS[kind]
    if kind != "leaking":
        return meaning, remedy
    mixed = [n for n, owners in found if len(ownership.names[n]) < max(2, len(owners))]
    if mixed:
        return meaning, remedy.format(last=_short(ownership, mixed[-1]))
    among = found[0][1]
    theirs = [{*o} for o in ownership.owners.values() if not {*among}.isdisjoint(sum(o, ()))]
    every = all(owners <= {among, ()} for owners in theirs)
    return told_in_common(among, whole=every)


# --- what is found ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Finding:
    kind: str
    owners: Owners
    expected: str
    found: str
    here: bool = True


_VERBS = {
    "leaking": "leak into other members",
    "missing": "do not reach all the members that they should",
    "unused": "reach no member",
    "used": "reach members",
    "uneven": "are not divided equally",
}

_EXPLANATIONS = {
    "leaking": (
        "Training one member moves another's prediction: the members are not separate.",
        "They mix after {last}. Usual cause: a layer with groups=1, a channel shuffle or a norm "
        "over all channels between grouped layers; a shared layer; a reshape that mixes members.",
    ),
    "missing": (
        "Some member computes with other weights than is claimed: it is not tied there.",
        "Usual cause: a copy (deepcopy, clone) or a layer that was built instead of passed on; a "
        "subnet that reads another block, or a group that is empty.",
    ),
    "unused": (
        "Such weights are trained by nothing, and no prediction depends on them.",
        "Usual cause: a layer that forward does not call, a branch that reads an empty group, a "
        "mask that hides everything, a detach. Remove it, or claim it as 'unused'.",
    ),
    "used": (
        "What is claimed to be dead weight takes part in predictions.",
        "Claim what it is: 'independent', 'tied' or 'partition'.",
    ),
    "uneven": (
        "Some subnet has more of the parent than another: a block belongs to the wrong one.",
        "Usual cause: a route that visits a block twice and another never.",
    ),
}


def _statements(ownership: OwnershipMap, claim: Any) -> Iterator[tuple[str, Statement]]:
    patterns = claim if isinstance(claim, Mapping) else {"*": claim}
    for statement in patterns.values():
        if not isinstance(statement, Partition) and statement not in WORDS:
            raise ValueError(
                f"ownership cannot be claimed to be {statement!r}. It is {', '.join(WORDS)}, or a "
                "Partition(parent, times)."
            )
    for pattern in patterns:
        if not any(fnmatchcase(_short(ownership, name), pattern) for name in ownership.owners):
            raise ValueError(
                f"no parameter is named {pattern!r}, whose ownership is claimed. Names are, for "
                f"example, {listed([_short(ownership, name) for name in ownership.owners], 3)}."
            )
    for name in ownership.owners:
        fitting = [p for p in patterns if fnmatchcase(_short(ownership, name), p)]
        if not fitting:
            raise ValueError(
                f"nothing is claimed about the ownership of {_short(ownership, name)}. Add a "
                "pattern that fits it, or '*' as the last one."
            )
        statement = patterns[fitting[0]]
        statement = Partition() if statement == "partition" else statement
        if isinstance(statement, Partition) and statement.parent not in ownership.members:
            raise ValueError(
                f"ownership is claimed to be {statement}, and no member is named "
                f"{statement.parent!r}. Members are {listed(ownership.members)}."
            )
        yield name, statement


def _findings(ownership: OwnershipMap, name: str, statement: Statement) -> Iterator[_Finding]:
    counts = ownership.owners[name]
    reached = [owners for owners in counts if owners]
    if statement == "unused":
        for owners in reached:
            yield _Finding("used", owners, "nobody", _members(owners))
        return
    if name in ownership.frozen and () in counts:
        return  # a frozen trunk may run under no_grad, where influence cannot be followed
    if not reached:
        yield _Finding("unused", (), _expected(ownership, name, statement), "nobody")
        return
    if statement == "independent":
        yield from _left_out(ownership, name)
    for owners in counts:
        if statement == "independent":
            home = ownership.homes.get(name)
            misplaced = home is not None and owners and owners != (home,)
            if (len(owners) > 1 or misplaced) and name not in ownership.frozen:
                expected = _expected(ownership, name, statement)
                yield _Finding("leaking", owners, expected, _members(owners))
        elif not owners:
            if name not in ownership.lookups:
                yield _Finding("unused", owners, _expected(ownership, name, statement), "nobody")
        elif statement == "tied" and owners != ownership.members:
            yield _Finding("missing", owners, "all members", _members(owners))
        elif isinstance(statement, Partition):
            subnets = len(owners) - (statement.parent in owners)
            if statement.parent not in owners or subnets < statement.times:
                yield _Finding("missing", owners, str(statement), _members(owners))
            elif subnets > statement.times:
                yield _Finding("leaking", owners, str(statement), _members(owners))
    if isinstance(statement, Partition):
        yield from _uneven(ownership, counts, statement)


def _left_out(ownership: OwnershipMap, name: str) -> Iterator[_Finding]:
    """Members without a part of a packed tensor, whose part is there and reaches nobody."""
    counts = ownership.owners[name]
    owning = {member for owners in counts for member in owners}
    if () in counts and 1 < len(owning) < len(ownership.members) and name not in ownership.lookups:
        missing = [member for member in ownership.members if member not in owning]
        yield _Finding("unused", (), f"a part of {_members(tuple(missing))}", "nobody")


def _uneven(
    ownership: OwnershipMap, counts: Mapping[Owners, int], statement: Partition
) -> Iterator[_Finding]:
    subnets = [member for member in ownership.members if member != statement.parent]
    fair = sum(counts.values()) * statement.times // len(subnets)
    for subnet in subnets:
        share = sum(count for owners, count in counts.items() if subnet in owners)
        if share != fair:
            yield _Finding("uneven", (), f"{fair:,} elements of {subnet}", f"{share:,}", here=False)


def _expected(ownership: OwnershipMap, name: str, statement: Statement) -> str:
    if isinstance(statement, Partition):
        return str(statement)
    if statement == "tied":
        return "all members"
    return f"member {ownership.homes[name]}" if ownership.homes else "one member"


def _members(owners: Owners) -> str:
    return f"member {owners[0]}" if len(owners) == 1 else f"members {listed(owners)}"


def _told(claim: Any) -> str:
    if isinstance(claim, Mapping):
        return "owned as stated for each name"
    return f"to belong to {claim}" if isinstance(claim, Partition) else str(claim)


def _short(ownership: OwnershipMap, name: str) -> str:
    return name if ownership.homes else name.removeprefix("model.")


# --- owners of every element --------------------------------------------------------------------


class _Owners:
    """The set of members of every element of one parameter, as bits that members add.

    Eight members fit a byte. More take words of `CHUNK` bits; when one is full, the sets met so
    far are numbered, and the number stands above the next word.
    """

    CHUNK = 32
    """Bits of a word: as many stand above it in int64, for the number of sets met so far."""

    def __init__(self, parameter: Tensor, members: Owners) -> None:
        self.members = members
        small = len(members) <= 8
        self.codes = torch.zeros_like(parameter, dtype=torch.uint8 if small else torch.int64)
        self.bases: list[Owners] = [()]
        self.word = 0

    def add(self, position: int, reached: Tensor | None) -> None:
        word, bit = divmod(position, self.CHUNK)
        if word != self.word:
            codes, numbers = torch.unique(self.codes, return_inverse=True)
            self.bases = [self.owners(code) for code in codes.tolist()]
            self.codes = numbers << self.CHUNK
            self.word = word
        if reached is not None:
            self.codes += reached.to(self.codes.dtype) << bit

    def owners(self, code: int) -> Owners:
        here = self.members[self.word * self.CHUNK :]
        own = tuple(name for bit, name in enumerate(here[: self.CHUNK]) if code >> bit & 1)
        return (*self.bases[code >> self.CHUNK], *own)

    def counts(self) -> dict[Owners, int]:
        if self.codes.dtype is torch.uint8:
            sizes = torch.bincount(self.codes.flatten()).tolist()
            return {self.owners(code): size for code, size in enumerate(sizes) if size}
        codes, numbers = torch.unique(self.codes, return_counts=True)
        return {
            self.owners(code): size
            for code, size in zip(codes.tolist(), numbers.tolist(), strict=True)
        }

    def mask(self, owners: Owners) -> Tensor:
        code = next(c for c in torch.unique(self.codes).tolist() if self.owners(c) == owners)
        return torch.eq(self.codes, code)

    def digest(self) -> str:
        codes = self.codes.cpu().contiguous()
        sha = hashlib.sha256(f"{self.members}{tuple(codes.shape)}{self.bases}".encode())
        # The memory itself: NumPy, whose buffers hashlib takes, is not a dependency.
        sha.update((c_char * codes.nbytes).from_address(codes.data_ptr()))
        return sha.hexdigest()[:16]
