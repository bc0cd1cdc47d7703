"""Whether members start as different as they are claimed to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import combinations

from ensembles.checks.diversity.claim import DiversityClaim
from ensembles.checks.diversity.measurement import MemberDiversity
from ensembles.checks.diversity.similarity import Alike, Likeness
from ensembles.findings import Count, Finding, Findings
from ensembles.message import Explanation, assert_held, in_common, listed

__all__ = ["assert_members_distinct", "assert_members_diverse", "judge"]

_Networks = dict[frozenset[str], str]


def assert_members_diverse(
    diversity: MemberDiversity, alike: Sequence[str] = (), *, seeded: bool = False
) -> None:
    """Checks that members start different, in every drawn parameter and in their outputs.

    Args:
        diversity: From `measure_member_diversity`.
        alike: Patterns (`fnmatch`) of parameters that members have in common by design, such as
            those of a shared trunk.
        seeded: Whether each member has a seed of its own by design, so that every construction
            gives the same ensemble.

    Raises:
        ValueError: If nothing was compared, or a pattern names no drawn parameter.
        AssertionError: If members are alike, or construction does not draw as it should.

    Example:
        >>> from copy import deepcopy
        >>> from ensembles import measure_member_diversity
        >>> first = nn.Linear(4, 2)
        >>> assert_members_diverse(measure_member_diversity([first, deepcopy(first)]))
        Traceback (most recent call last):
        AssertionError: members 0, 1 are claimed to start different, but are alike
        ...
    """
    __tracebackhide__ = True
    assert_held(judge(diversity, DiversityClaim(seeded=seeded, alike=tuple(alike))))


def assert_members_distinct(diversity: MemberDiversity) -> None:
    """Checks that no two members are one network: what any ensemble can claim.

    A parameter that construction is seen to draw must be drawn for each member. Where that cannot
    be seen, because members were given as objects or construction seeds, a parameter that is the
    same in several may come from a file, and members are one network where every parameter is
    alike, or their outputs are. Seeds of their own, one tensor that members share, copies with
    noise, and members that hold only constants such as zeros are no finding.

    Args:
        diversity: From `measure_member_diversity`.

    Raises:
        ValueError: If nothing was compared.
        AssertionError: If members are one network, or start alike in what is drawn.

    Example:
        >>> from copy import deepcopy
        >>> from ensembles import measure_member_diversity
        >>> trunk = nn.Linear(4, 4)
        >>> pair = [nn.Sequential(deepcopy(trunk), nn.Linear(4, 2)) for _ in range(2)]
        >>> assert_members_distinct(measure_member_diversity(pair, torch.randn(5, 4)))
        >>> pair = [nn.Sequential(trunk), nn.Sequential(deepcopy(trunk))]
        >>> assert_members_distinct(measure_member_diversity(pair))
        Traceback (most recent call last):
        AssertionError: members 0, 1 are claimed to be distinct, but start alike
        ...
    """
    __tracebackhide__ = True
    assert_held(judge(diversity, DiversityClaim(distinct=True)))


def judge(diversity: MemberDiversity, claim: DiversityClaim) -> Findings:
    """Where members start more alike than claimed."""
    found: list[Likeness] = []
    items: list[Finding] = []
    if not (claim.distinct and diversity.only_constants):
        _refuse(diversity, claim)
        networks = _networks(diversity)
        found = _against(claim, diversity, networks)
        items = list(_likenesses(diversity, found, networks))
    sentence = f"members {listed(diversity.members)} are claimed to "
    if claim.distinct:
        sentence += "be distinct, but start alike"
    elif items:
        sentence += "start different, but are alike"
    else:
        sentence += "draw their weights from the global generators, but do not"
    if not claim.distinct and not claim.seeded:
        items += _construction(diversity, advised=any(item.cause == _SEEDS for item in items))
    return Findings(
        claim=sentence,
        items=tuple(sorted(items, key=lambda item: item.kind not in _WHOLE)),
        affected=tuple(_affected(diversity, found)),
        looked_at=diversity.looked_at,
    )


def _refuse(diversity: MemberDiversity, claim: DiversityClaim) -> None:
    """Refuses what cannot be judged: nothing that was compared, names of nothing."""
    for pattern in claim.alike:
        if not any(fnmatchcase(name, pattern) for name in diversity.drawn):
            raise ValueError(
                f"no drawn parameter is named {pattern!r}, which is claimed alike. Names are, for "
                f"example, {listed(diversity.drawn, 3)}."
            )
    if not diversity.drawn and diversity.outputs != "compared":
        raise ValueError(
            "no two members have a drawn parameter of one name and shape, and outputs say nothing "
            "of the members (they are the same for all rows, of different shapes, or none were "
            "given): give a batch, or a function that builds the model."
        )


def _against(
    claim: DiversityClaim, diversity: MemberDiversity, networks: _Networks
) -> list[Likeness]:
    if not claim.distinct:
        return [
            likeness
            for likeness in diversity.alike
            if not any(fnmatchcase(likeness.name, pattern) for pattern in claim.alike)
        ]
    seen = diversity.constructed and not diversity.reset
    by_design = (Alike.ONE_TENSOR, Alike.CORRELATED, Alike.SUMMED)
    return [
        likeness
        for likeness in diversity.alike
        if any(network & {*likeness.members} for network in networks)
        or (seen and likeness.how not in by_design)
    ]


def _networks(diversity: MemberDiversity) -> _Networks:
    """Groups of members with the same numbers in all that is drawn, and how they are alike."""
    names: dict[frozenset[str], set[str]] = {}
    for likeness in diversity.alike:
        if likeness.how in (Alike.ONE_TENSOR, Alike.EQUAL, Alike.REORDERED):
            for pair in combinations(likeness.members, 2):
                names.setdefault(frozenset(pair), set()).add(likeness.name)
    groups: list[frozenset[str]] = []
    for members, alike in names.items():
        if alike >= set(diversity.drawn):
            touched = [group for group in groups if group & members]
            groups = [group for group in groups if group not in touched]
            groups.append(members.union(*touched))
    return {group: _network_kind(group, diversity) for group in groups}


def _network_kind(network: frozenset[str], diversity: MemberDiversity) -> str:
    hows = {x.how for x in diversity.alike if network >= {*x.members}}
    twins = any(network <= {*group} for group in diversity.twins)
    if hows == {Alike.ONE_TENSOR}:
        # Members that compute with one memory in ways of their own are no one network.
        return "one network" if twins or diversity.outputs != "compared" else "one tensor"
    if Alike.REORDERED not in hows:
        return "copied"
    return "permuted" if twins else "reordered"


def _affected(diversity: MemberDiversity, found: Sequence[Likeness]) -> Iterator[Count]:
    if found:
        names = {likeness.name for likeness in found}
        yield Count(len(names), "drawn parameter", of=len(diversity.drawn))
    if diversity.twins:
        pairs = math.comb(len(diversity.members), 2)
        yield Count(diversity.twin_pairs, "pair of outputs", of=pairs)


# --- findings -----------------------------------------------------------------------------------


def _likenesses(
    diversity: MemberDiversity, found: Sequence[Likeness], networks: _Networks
) -> Iterator[Finding]:
    rows = [(x.name, x.members, x.amount, *_HOW[x.how]) for x in found]
    rows += [("outputs", m, None, "same function", "equal to rounding") for m in diversity.twins]
    for place, members, amount, kind, told in rows:
        kind = next((of for network, of in networks.items() if network >= {*members}), kind)
        yield Finding(
            kind=kind,
            place=place,
            members=members,
            found=f"{told.format(amount)} in members {listed(members)}",
            amount=amount,
            **_explained(kind, members, diversity),
        )


def _construction(diversity: MemberDiversity, *, advised: bool) -> Iterator[Finding]:
    """That every construction gives the same; without advice where another finding gives it."""
    text = _TEXTS["construction"]
    text = _text(text["meaning"], "", "") if advised else text
    rows = [
        (f"generator {name}", "in one state after construction, whatever it was before")
        for name in diversity.reset
    ]
    if diversity.repeated:
        rows.append(("initial weights", "the same in two constructions in a row"))
    for place, found in rows:
        yield Finding(kind="construction", place=place, found=found, **text)


_HOW = {
    Alike.ONE_TENSOR: ("one tensor", "one tensor"),
    Alike.EQUAL: ("equal", "equal"),
    Alike.EQUAL_IN_PART: ("equal", "{:.0%} of the elements equal"),
    Alike.REORDERED: ("reordered", "equal but for the order"),
    Alike.SHIFTED: ("one stream", "{:.0%} of the elements equal, at other places,"),
    Alike.CORRELATED: ("changed copy", "correlated by {:.2f}"),
    Alike.SUMMED: ("sum of others", "weighted sums of each other"),
}
"""The kind of finding where not all that is drawn is alike, and what was found."""

_WHOLE = ("one network", "copied", "permuted")
"""Kinds that concern all that is drawn, and are told first."""


def _text(meaning: str, cause: str, remedy: str) -> Explanation:
    return Explanation(meaning=meaning, cause=cause, remedy=remedy)


_COPIES = "deepcopy of one initialised network, one state dict loaded into several"
_SEEDS = "torch.manual_seed(...) inside a constructor"
_COPIED = f"{_COPIES}, or the same seed before each"
_ANEW = "Build each member anew, without seeding in between."
_FORK = "Seed once, outside; in a constructor use torch.random.fork_rng()."

_TEXTS = {
    "copied": _text(
        "They start as copies: on equal data they stay equal bit by bit, and the ensemble is one "
        "network at the price of several.",
        _COPIED,
        _ANEW,
    ),
    "permuted": _text(
        "They are permuted twins: the weights stand in another order, but the function is the "
        "same.",
        "hidden units of a copy that were permuted",
        "Draw each member anew.",
    ),
    "equal": _text(
        "Other weights of these members differ, but these do not: members have less to differ by "
        "than it seems.",
        "a copy whose reset does not reach every layer (reset_parameters of some types only, or of "
        "direct children only), or one block that was built once and copied",
        "Build each member anew, or claim by name what is alike by design.",
    ),
    "reordered": _text(
        "These tensors hold the same numbers in another order: they were not drawn anew.",
        _COPIED,
        _ANEW,
    ),
    "one stream": _text(
        "Members draw from one stream of random numbers, but each begins at another place in it: "
        "what one draws first, another draws later.",
        "the same seed before each, and another number of draws before the first weight",
        "Seed once, outside.",
    ),
    "changed copy": _text(
        "These tensors were scaled, negated or moved a little, but not drawn anew.",
        _COPIED,
        _ANEW,
    ),
    "sum of others": _text(
        "One of these members is made of the others, as their mean is: it adds no network to the "
        "ensemble.",
        "an average of members (a soup, a merged checkpoint) that stands among them",
        "Evaluate it beside the ensemble, or draw that member anew.",
    ),
    "same function": _text(
        "Their weights differ, but the function is the same: they are twins (units permuted, "
        "scaled, or weights that the output does not use).",
        "",
        "Draw each member anew, or load another checkpoint into each.",
    ),
    "construction": _text(
        "The seed of the run is lost: whatever it was, the next draws are the same.",
        _SEEDS,
        f"{_FORK} Members with a seed each by design are claimed as seeded.",
    ),
}
"""What each kind of finding means, its usual cause and what to do."""


def _explained(kind: str, members: Sequence[str], diversity: MemberDiversity) -> Explanation:
    if kind in ("one network", "one tensor"):
        return in_common(members, whole=kind == "one network")
    text = _TEXTS[kind]
    if kind in ("copied", "equal") and diversity.reset:
        return _text(text["meaning"], _SEEDS, _FORK)
    if kind == "copied" and not diversity.constructed:
        unseen = "which, a function that builds the members would show"
        return _text(text["meaning"], f"{_COPIES}, {_SEEDS}, or one seed: {unseen}", _ANEW)
    if kind == "same function" and not diversity.drawn:
        return _text("They are one network, however it was loaded.", "", text["remedy"])
    return text
