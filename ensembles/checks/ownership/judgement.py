"""Whether every element has the owners that are claimed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from ensembles.checks.ownership.claim import OwnershipClaim, Statement, parse
from ensembles.checks.ownership.measurement import OwnershipMap
from ensembles.checks.ownership.owner_sets import Owners
from ensembles.findings import Count, Finding, Findings
from ensembles.message import Explanation, assert_held, in_common, listed
from ensembles.subject import SPLIT, Partition

__all__ = ["assert_ownership", "judge"]


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
        >>> from ensembles.checks.ownership.measurement import measure_ownership_map
        >>> members = [nn.Linear(3, 2), nn.Linear(3, 2)]
        >>> assert_ownership(measure_ownership_map(members, torch.randn(1, 3)), "independent")
    """
    __tracebackhide__ = True
    assert_held(judge(ownership, parse(claim)))


def judge(ownership: OwnershipMap, claim: OwnershipClaim) -> Findings:
    """The elements that have other owners than claimed."""
    if len(ownership.members) < 2:
        raise ValueError(
            "ownership compares members, but the model's output is one member's "
            f"({listed(ownership.members)}). {SPLIT}"
        )
    claimed = _claimed(ownership, claim)
    found = [
        (name, finding)
        for name, (_, statement) in claimed.items()
        for finding in _findings(ownership, name, statement)
    ]
    found.sort(key=lambda pair: list(_VERBS).index(pair[1].kind))
    sentence = f"weights of members {listed(ownership.members)} are owned as claimed"
    if found:
        name, main = found[0]
        sentence = _sentence(ownership, *claimed[name], main.kind)
    return Findings(
        claim=sentence,
        items=tuple(_explained(ownership, found)),
        affected=(Count(len({name for name, _ in found}), "parameter", of=len(ownership.owners)),),
        looked_at=tuple(_looked_at(ownership, claimed)),
    )


def _claimed(ownership: OwnershipMap, claim: OwnershipClaim) -> dict[str, tuple[str, Statement]]:
    """The pattern and the statement that count for each parameter."""
    short = {name: _short(ownership, name) for name in ownership.owners}
    for pattern, statement in claim.statements:
        if not any(fnmatchcase(name, pattern) for name in short.values()):
            raise ValueError(
                f"no parameter is named {pattern!r}, whose ownership is claimed. Names are, for "
                f"example, {listed(list(short.values()), 3)}."
            )
        if isinstance(statement, Partition) and statement.parent not in ownership.members:
            raise ValueError(
                f"ownership is claimed to be {statement}, but no member is named "
                f"{statement.parent!r}. Members are {listed(ownership.members)}."
            )
    claimed = {}
    for name in ownership.owners:
        fitting = [pair for pair in claim.statements if fnmatchcase(short[name], pair[0])]
        if not fitting:
            raise ValueError(
                f"nothing is claimed about the ownership of {short[name]}. Add a pattern that "
                "fits it, or '*' as the last one."
            )
        claimed[name] = fitting[0]
    return claimed


def _sentence(ownership: OwnershipMap, pattern: str, statement: Statement, kind: str) -> str:
    """The claim that the first finding breaks, and how."""
    named = "weights" if pattern == "*" else f"weights named {pattern!r}"
    what = f"to belong to {statement}" if isinstance(statement, Partition) else statement
    return f"{named} of members {listed(ownership.members)} are claimed {what}, but {_VERBS[kind]}"


def _looked_at(
    ownership: OwnershipMap, claimed: Mapping[str, tuple[str, Statement]]
) -> Iterator[Count]:
    """What of tables and of frozen parameters was judged, where that is not all."""
    names = [name for name, (_, statement) in claimed.items() if statement != "unused"]
    frozen = [name for name in names if name in ownership.frozen]
    left_out = [name for name in frozen if () in ownership.owners[name]]
    if left_out:
        yield Count(len(frozen) - len(left_out), "frozen parameter", of=len(frozen))
    tables = [
        ownership.owners[name] for name in names if name in ownership.lookups and name not in frozen
    ]
    rows = sum(counts.get((), 0) for counts in tables if len(counts) > 1)
    if rows:
        everything = sum(sum(counts.values()) for counts in tables)
        yield Count(everything - rows, "element of embeddings", of=everything)


# --- findings -----------------------------------------------------------------------------------

_VERBS = {
    "leak": "leak into other members",
    "shared": "are shared between members",
    "not tied": "do not reach all the members that they should",
    "unused": "reach no member",
    "used": "reach members",
    "uneven": "are not divided equally",
}
"""The kinds, the one that explains the most first, and how a claim that they break goes on."""

_EXPLANATIONS = {
    "leak": Explanation(
        meaning="Training one member moves another's prediction: the members are not separate.",
        cause="a layer with groups=1, a channel shuffle or a norm over all channels between "
        "grouped layers; a reshape that mixes members",
        remedy="",
    ),
    "not tied": Explanation(
        meaning="A member that should compute with these weights does not: its training leaves "
        "them as they are.",
        cause="a copy (deepcopy, clone) or a layer that was built instead of passed on; a subnet "
        "that reads another block, or a group that is empty",
        remedy="Pass on the layer itself, and check what each subnet reads.",
    ),
    "unused": Explanation(
        meaning="No prediction depends on these weights, so that nothing trains them.",
        cause="a layer that forward does not call, a branch that reads an empty group, a mask that "
        "hides everything, a detach",
        remedy="Remove it, or claim it as 'unused'.",
    ),
    "used": Explanation(
        meaning="What is claimed to be dead weight takes part in predictions.",
        cause="",
        remedy="Claim what it is: 'independent', 'tied' or 'partition'.",
    ),
    "uneven": Explanation(
        meaning="A block of the parent belongs to the wrong subnet.",
        cause="a route that visits a block twice and another never",
        remedy="Check the route of every subnet that is listed.",
    ),
}


def _explained(ownership: OwnershipMap, found: list[tuple[str, Finding]]) -> Iterator[Finding]:
    """The findings with what they mean and what to do."""
    mixed = [name for name, finding in found if finding.kind == "leak"]
    shared = [finding.members for _, finding in found if finding.kind == "shared"]
    for _, finding in found:
        if finding.kind == "shared":
            yield replace(finding, **_in_common(ownership, shared[0]))
            continue
        explained = _EXPLANATIONS[finding.kind]
        if finding.kind == "leak":
            last = _short(ownership, mixed[-1])
            explained = {
                **explained,
                "remedy": f"They mix after {last}: look at what is computed there.",
            }
        yield replace(finding, **explained)


def _in_common(ownership: OwnershipMap, members: Owners) -> Explanation:
    theirs = [
        {*owners}
        for owners in ownership.owners.values()
        if not {*members}.isdisjoint(sum(owners, ()))
    ]
    return in_common(members, whole=all(owners <= {members, ()} for owners in theirs))


def _findings(ownership: OwnershipMap, name: str, statement: Statement) -> Iterator[Finding]:
    counts = ownership.owners[name]
    reached = [owners for owners in counts if owners]
    if statement == "unused":
        for owners in reached:
            yield _finding(ownership, "used", name, owners, "nobody")
        return
    if name in ownership.frozen and () in counts:
        return  # a frozen trunk may run under no_grad, where influence cannot be followed
    expected = _expected(ownership, name, statement)
    if not reached:
        yield _finding(ownership, "unused", name, (), expected)
    elif statement == "independent":
        yield from _not_independent(ownership, name, expected)
    else:
        if () in counts and name not in ownership.lookups:
            yield _finding(ownership, "unused", name, (), expected)
        kinds = {owners: _misplaced(ownership, owners, statement) for owners in reached}
        for owners, kind in kinds.items():
            if kind:
                yield _finding(ownership, kind, name, owners, expected)
        if isinstance(statement, Partition):
            # What lacks an owner has fewer elements for it too: one kind says both.
            yield from _uneven(ownership, name, statement, max(kinds.values()) or "uneven")


def _not_independent(ownership: OwnershipMap, name: str, expected: str) -> Iterator[Finding]:
    counts, home = ownership.owners[name], ownership.homes.get(name)
    owning = {member for owners in counts for member in owners}
    if () in counts and 1 < len(owning) < len(ownership.members) and name not in ownership.lookups:
        # Others have their part of a packed tensor; the part of these is there, but is cut off.
        missing = tuple(member for member in ownership.members if member not in owning)
        yield _finding(ownership, "unused", name, (), f"a part of {_members(missing)}")
    if name in ownership.frozen:
        return
    for owners in counts:
        if len(owners) > 1 or (home is not None and owners and owners != (home,)):
            # What several register is shared by that; all else that several own is mixed.
            registered = len(ownership.names[name]) >= max(2, len(owners))
            yield _finding(ownership, "shared" if registered else "leak", name, owners, expected)


def _misplaced(ownership: OwnershipMap, owners: Owners, statement: Statement) -> str:
    """The kind of finding that these owners are, where weights are claimed to be common."""
    if not isinstance(statement, Partition):
        return "" if owners == ownership.members else "not tied"
    subnets = len(owners) - (statement.parent in owners)
    if statement.parent not in owners or subnets < statement.times:
        return "not tied"
    return "leak" if subnets > statement.times else ""


def _uneven(
    ownership: OwnershipMap, name: str, statement: Partition, kind: str
) -> Iterator[Finding]:
    counts = ownership.owners[name]
    subnets = [member for member in ownership.members if member != statement.parent]
    fair = sum(counts.values()) * statement.times // len(subnets)
    for subnet in subnets:
        share = sum(count for owners, count in counts.items() if subnet in owners)
        if share != fair:
            yield Finding(
                kind=kind,
                place=_short(ownership, name),
                members=(subnet,),
                expected=f"{Count(fair, 'element')} of {subnet}",
                found=str(Count(share, "element")),
                amount=share,
            )


def _finding(
    ownership: OwnershipMap, kind: str, name: str, owners: Owners, expected: str
) -> Finding:
    block, count = ownership.block(name, owners), ownership.owners[name][owners]
    place = _short(ownership, name)
    if not block.whole:
        place += block.slices if block.filled else f"{block.slices} in part"
    return Finding(
        kind=kind,
        place=place,
        members=owners,
        expected=expected,
        found=f"{_members(owners)} ({Count(count, 'element')})",
        amount=count,
    )


def _expected(ownership: OwnershipMap, name: str, statement: Statement) -> str:
    if isinstance(statement, Partition):
        return str(statement)
    if statement == "tied":
        return "all members"
    return f"member {ownership.homes[name]}" if ownership.homes else "one member"


def _members(owners: Owners) -> str:
    if not owners:
        return "nobody"
    return f"member {owners[0]}" if len(owners) == 1 else f"members {listed(owners)}"


def _short(ownership: OwnershipMap, name: str) -> str:
    return name if ownership.homes else name.removeprefix("model.")
