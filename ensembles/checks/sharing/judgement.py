"""Whether members share what they claim to share, and nothing else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from ensembles.checks.sharing.claim import SharingClaim
from ensembles.checks.sharing.measurement import ParameterSharing, told_memory
from ensembles.findings import Count, Finding, Findings
from ensembles.instruments.storage import Registration, SharedMemory
from ensembles.message import assert_held, counted, in_common, listed
from ensembles.subject import LISTED

__all__ = ["assert_members_share", "assert_parameters_distinct", "judge"]


def assert_members_share(sharing: ParameterSharing, names: Sequence[str] = ()) -> None:
    """Checks that members share the parameters of these names, wholly, and nothing else.

    A tie must be one `Parameter` object, as for `assert_parameters_distinct`.

    Args:
        sharing: From `measure_parameter_sharing`.
        names: Patterns (`fnmatch`) of the parameter names that are shared: every parameter with
            such a name is one tensor in all members that have the name, and at least two have
            it. All others belong to one member. The empty sequence claims members that are
            independent, ("*",) that they are one network. Buffers are never claimed: they are
            shared only where the name of the buffer is given.

    Raises:
        ValueError: If there is only one member, or a pattern names nothing.
        AssertionError: If something else is shared, or something claimed is not.

    Example:
        >>> from ensembles import measure_parameter_sharing
        >>> embedding = nn.Embedding(8, 4)
        >>> two = [nn.Sequential(embedding, nn.Linear(4, 2)) for _ in range(2)]
        >>> assert_members_share(measure_parameter_sharing(two), ["0.weight"])
    """
    __tracebackhide__ = True
    assert_held(judge(sharing, SharingClaim(tuple(names))))


def assert_parameters_distinct(sharing: ParameterSharing) -> None:
    """Checks that no memory belongs to two different parameter objects.

    A tied weight is one `Parameter` under several names: optimizers then step it once, and
    `.to()`, `.double()` and copies keep the tie. Two objects over one memory look tied, but they
    are stepped twice, and they come apart at the first conversion.

    Args:
        sharing: From `measure_parameter_sharing`, of one member or more.

    Raises:
        ValueError: If there are no parameters or buffers.
        AssertionError: If two parameter objects overlap in memory.

    Example:
        >>> from ensembles import measure_parameter_sharing
        >>> tied = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False))
        >>> tied[1].weight = tied[0].weight
        >>> assert_parameters_distinct(measure_parameter_sharing(tied))
    """
    __tracebackhide__ = True
    assert_held(judge(sharing, SharingClaim(None)))


def judge(sharing: ParameterSharing, claim: SharingClaim) -> Findings:
    """What is shared otherwise than claimed."""
    _refuse(sharing, claim)
    surplus: list[SharedMemory] = []
    apart: list[Finding] = []
    if claim.shared is not None:
        surplus = [
            memory
            for memory in sharing.between_members
            if not all(_claimed(name, claim.shared) for name in memory.names)
        ]
        apart = list(_apart(sharing, claim.shared))
    return Findings(
        claim=_sentence(sharing, claim, surplus, apart),
        items=(*_surplus(sharing, surplus), *apart, *_doubled(sharing)),
        affected=tuple(_affected(sharing, claim, surplus, apart)),
    )


def _refuse(sharing: ParameterSharing, claim: SharingClaim) -> None:
    """Refuses what cannot be judged: one member, no parameters, names of nothing."""
    if claim.shared is not None and len(sharing.members) < 2:
        raise ValueError(
            f"sharing compares members, but only one was given ({listed(sharing.members)}). Give a "
            "list of modules, or members=a function that finds them inside the model, such as "
            "members=lambda model: model.members."
        )
    if not sharing.places:
        raise ValueError(
            f"the model has no parameters or buffers: there is nothing to compare. {LISTED}."
        )
    for pattern in claim.shared or ():
        if not any(fnmatchcase(place.name, pattern) for place in sharing.places):
            raise ValueError(
                f"no parameter or buffer is named {pattern!r}, which is claimed shared. "
                f"Names are, for example, {listed([p.name for p in sharing.places], 3)}."
            )


def _claimed(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _sentence(
    sharing: ParameterSharing,
    claim: SharingClaim,
    surplus: Sequence[SharedMemory],
    apart: Sequence[Finding],
) -> str:
    if not surplus and not apart:
        one = len(sharing.doubled) == 1
        return (
            "tied parameters are claimed to be one object each, but "
            f"{counted(sharing.doubled, 'piece')} of memory {'has' if one else 'have'} several "
            "objects"
        )
    members, patterns = f"members {listed(sharing.members)} are claimed", claim.shared or ()
    if surplus and not patterns:
        kinds = {place.kind for memory in surplus for place in memory.places}
        return f"{members} independent, but share {max(kinds)}s"
    if surplus:
        return f"{members} to share {listed(patterns)} only, but share more"
    return f"{members} to share {listed(patterns)}, but do not"


def _affected(
    sharing: ParameterSharing,
    claim: SharingClaim,
    surplus: Sequence[SharedMemory],
    apart: Sequence[Finding],
) -> Iterator[Count]:
    places = {place for memory in surplus for place in memory.places}
    for kind in ("parameter", "buffer"):
        touched = {place.name for place in places if place.kind == kind}
        if touched or (surplus and kind == "parameter"):
            among = {place.name for place in sharing.places if place.kind == kind}
            yield Count(len(touched), kind, of=len(among))
    if apart:
        among = {p.name for p in sharing.places if _claimed(p.name, claim.shared or ())}
        yield Count(len(apart), "claimed parameter", of=len(among))
    if sharing.doubled:
        tied = {*sharing.shared, *sharing.doubled}
        yield Count(len(sharing.doubled), "tied piece of memory", of=len(tied))


# --- findings -----------------------------------------------------------------------------------


def _doubled(sharing: ParameterSharing) -> Iterator[Finding]:
    for memory in sharing.doubled:
        extent = "the same memory" if memory.whole else "overlapping memory"
        yield Finding(
            kind="several objects",
            place=listed([str(place) for place in memory.places], 3),
            members=memory.members,
            found=f"{memory.objects} objects over {extent} ({memory.bytes:,} bytes)",
            amount=memory.bytes,
            meaning="An optimizer steps such memory once per object, and copies and conversions "
            "untie it.",
            cause="nn.Parameter(other.weight) or .data",
            remedy="Assign the Parameter itself: b.weight = a.weight.",
        )


def _surplus(sharing: ParameterSharing, surplus: Sequence[SharedMemory]) -> Iterator[Finding]:
    touched = {place for memory in surplus for place in memory.places}
    seen_in = tuple(m for m in sharing.members if any(m == place.member for place in touched))
    everything = all(memory.whole for memory in surplus) and all(
        place in touched for place in sharing.places if place.member in seen_in
    )
    explained = in_common(seen_in, whole=everything)
    for memory in surplus:
        yield Finding(
            kind="shared",
            place=listed(memory.names, 2),
            members=memory.members,
            found=told_memory(memory),
            amount=memory.bytes,
            **explained,
        )


def _apart(sharing: ParameterSharing, patterns: Sequence[str]) -> Iterator[Finding]:
    holders: dict[str, list[Registration]] = defaultdict(list)
    for place in sharing.places:
        if _claimed(place.name, patterns):
            holders[place.name].append(place)
    tied = {
        frozenset(place for place in memory.places if place.name == name)
        for memory in sharing.shared
        if memory.whole
        for name in memory.names
    }
    for name, places in holders.items():
        if frozenset(places) in tied and len(places) > 1:
            continue
        groups = [
            sorted(place.member for place in group)
            for group in tied
            if group and next(iter(group)).name == name
        ]
        alone = [p.member for p in places if not any(p.member in group for group in groups)]
        found = [f"members {listed(group)} together" for group in sorted(groups) if len(group) > 1]
        lone = sorted({*alone, *(g[0] for g in groups if len(g) == 1)}, key=sharing.members.index)
        if lone:
            found.append(f"a tensor of its own in {listed(lone)}")
        yield Finding(
            kind="not shared",
            place=name,
            members=tuple(place.member for place in places),
            found="; ".join(found),
            meaning="A step on one member leaves the others' copies behind.",
            cause="deepcopy, clone, or a layer built instead of passed on",
            remedy="Register the same module (or Parameter object) in every member.",
        )
