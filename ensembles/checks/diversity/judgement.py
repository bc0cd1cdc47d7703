"""Whether members start as different as they are claimed to."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import combinations

from ensembles.checks.diversity.claim import DiversityClaim
from ensembles.checks.diversity.measurement import MemberDiversity, pairs_in
from ensembles.checks.diversity.similarity import Alike, Likeness
from ensembles.findings import Count, Finding, Findings
from ensembles.message import Explanation, assert_held, in_common, listed

__all__ = ["assert_members_distinct", "assert_members_diverse", "judge"]


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
        ensembles.message.Broken: members 0, 1 are claimed to start different, but are alike
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
    noise, and members that hold nothing but zeros, ones and other constants are no finding.

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
        ensembles.message.Broken: members 0, 1 are claimed to be distinct, but start alike
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
        found = [x for x in diversity.alike if _is_against(claim, x, diversity, networks)]
        items = [
            *(_of_weights(likeness, diversity, networks) for likeness in found),
            *(_of_outputs(group, diversity, networks) for group in diversity.twins),
        ]
    sentence = f"members {listed(diversity.members)} are claimed to "
    if claim.distinct:
        sentence += "be distinct, but start alike"
    elif items:
        sentence += "start different, but are alike"
    else:
        sentence += "draw their weights from the global generators, but do not"
    if not claim.distinct and not claim.seeded:
        items += _of_construction(diversity, advised=any(i.cause == _SEEDS for i in items))
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


def _is_against(
    claim: DiversityClaim,
    likeness: Likeness,
    diversity: MemberDiversity,
    networks: Mapping[frozenset[str], str],
) -> bool:
    if not claim.distinct:
        return not any(fnmatchcase(likeness.name, pattern) for pattern in claim.alike)
    if any(network & {*likeness.members} for network in networks):
        return True
    seen = diversity.constructed and not diversity.reset
    return seen and likeness.how not in (Alike.ONE_TENSOR, Alike.CORRELATED, Alike.SUMMED)


def _networks(diversity: MemberDiversity) -> dict[frozenset[str], str]:
    """Groups of members with the same numbers in all that is drawn, in any order; to their kind.

    The kind is "" where the members compute with these numbers in ways of their own.
    """
    names: dict[frozenset[str], set[str]] = {}
    for likeness in diversity.alike:
        if likeness.how in (Alike.ONE_TENSOR, Alike.EQUAL, Alike.REORDERED):
            for pair in combinations(likeness.members, 2):
                names.setdefault(frozenset(pair), set()).add(likeness.name)
    groups: list[frozenset[str]] = []
    for pair_of, alike in names.items():
        if alike >= set(diversity.drawn):
            touched = [group for group in groups if group & pair_of]
            groups = [group for group in groups if group not in touched]
            groups.append(pair_of.union(*touched))
    return {group: _network_kind(group, diversity) for group in groups}


def _network_kind(network: frozenset[str], diversity: MemberDiversity) -> str:
    hows = {x.how for x in diversity.alike if network >= {*x.members}}
    twins = any(network <= {*group} for group in diversity.twins)
    if hows == {Alike.ONE_TENSOR}:
        return "one network" if twins or diversity.outputs != "compared" else ""
    if Alike.REORDERED not in hows:
        return "copied"
    return "permuted" if twins else ""


def _affected(diversity: MemberDiversity, found: Sequence[Likeness]) -> Iterator[Count]:
    if found:
        names = {likeness.name for likeness in found}
        yield Count(len(names), "drawn parameter", of=len(diversity.drawn))
    if diversity.twins:
        pairs = math.comb(len(diversity.members), 2)
        yield Count(pairs_in(diversity.twins), "pair of outputs", of=pairs)


# --- findings -----------------------------------------------------------------------------------

_FOUND = {
    Alike.ONE_TENSOR: "one tensor",
    Alike.EQUAL: "equal",
    Alike.EQUAL_IN_PART: "{:.0%} of the elements equal",
    Alike.REORDERED: "equal but for the order",
    Alike.SHIFTED: "{:.0%} of the elements equal, at other places,",
    Alike.CORRELATED: "correlated by {:.2f}",
    Alike.SUMMED: "weighted sums of each other",
}

_KINDS = {
    Alike.ONE_TENSOR: "one tensor",
    Alike.EQUAL: "equal",
    Alike.EQUAL_IN_PART: "equal",
    Alike.REORDERED: "reordered",
    Alike.SHIFTED: "one stream",
    Alike.CORRELATED: "changed copy",
    Alike.SUMMED: "sum of others",
}
"""The kind of finding, where not all that is drawn is alike."""

_COPIES = "deepcopy of one initialised network, one state dict loaded into several"
_SEEDS = "torch.manual_seed(...) inside a constructor"
_ANEW = "Build each member anew, without seeding in between."
_FORK = "Seed once, outside; in a constructor use torch.random.fork_rng()."


def _text(meaning: str, cause: str, remedy: str) -> Explanation:
    return Explanation(meaning=meaning, cause=cause, remedy=remedy)


_WHOLE = ("one network", "copied", "permuted")
"""The kinds that say most, told first: members are alike in all that is drawn."""

_TEXTS = {
    "copied": _text(
        "They start as copies: on equal data they stay equal bit by bit, and the ensemble is one "
        "network at the price of several.",
        f"{_COPIES}, or one seed for each",
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
        f"{_COPIES}, or one seed for each",
        _ANEW,
    ),
    "one stream": _text(
        "Members draw from one stream of random numbers, but each begins at another place in it: "
        "what one draws first, another draws later.",
        "one seed for each, and another number of draws before the first weight",
        "Seed once, outside.",
    ),
    "changed copy": _text(
        "These tensors were scaled, negated or moved a little, but not drawn anew.",
        f"{_COPIES}, or one seed for each",
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
"""What each kind of finding means, why it comes about and what to do."""


def _explained(kind: str, members: Sequence[str], diversity: MemberDiversity) -> Explanation:
    if kind in ("one network", "one tensor"):
        return in_common(members, whole=kind == "one network")
    text = _TEXTS[kind]
    if kind in ("copied", "equal") and diversity.reset:
        return _text(text["meaning"], _SEEDS, _FORK)
    if kind == "copied" and not diversity.constructed:
        cause = (
            f"{_COPIES}, {_SEEDS}, or one seed for each: which, a function that builds the members "
            "would show"
        )
        return _text(text["meaning"], cause, text["remedy"])
    if kind == "same function" and not diversity.drawn:
        return _text("They are one network, however it was loaded.", "", text["remedy"])
    return text


def _kind(members: Collection[str], networks: Mapping[frozenset[str], str]) -> str:
    """In what way members are one network; "" where they are none."""
    return next((kind for network, kind in networks.items() if network >= {*members}), "")


def _of_weights(
    likeness: Likeness, diversity: MemberDiversity, networks: Mapping[frozenset[str], str]
) -> Finding:
    kind = _kind(likeness.members, networks) or _KINDS[likeness.how]
    told = _FOUND[likeness.how].format(likeness.amount)
    return Finding(
        kind=kind,
        place=likeness.name,
        members=likeness.members,
        found=f"{told} in members {listed(likeness.members)}",
        amount=likeness.amount,
        **_explained(kind, likeness.members, diversity),
    )


def _of_outputs(
    group: Sequence[str], diversity: MemberDiversity, networks: Mapping[frozenset[str], str]
) -> Finding:
    kind = _kind(group, networks) or "same function"
    return Finding(
        kind=kind,
        place="outputs",
        members=tuple(group),
        found=f"equal to rounding in members {listed(group)}",
        **_explained(kind, group, diversity),
    )


def _of_construction(diversity: MemberDiversity, *, advised: bool) -> Iterator[Finding]:
    """That every construction gives the same.

    Args:
        diversity: The measurement.
        advised: Whether another finding says already how that comes about.
    """
    text = _TEXTS["construction"]
    if advised:
        text = _text(text["meaning"], "", "")
    rows = [
        (f"generator {name}", "in one state after construction, whatever it was before")
        for name in diversity.reset
    ]
    if diversity.repeated:
        rows.append(("initial weights", "the same in two constructions in a row"))
    for place, found in rows:
        yield Finding(kind="construction", place=place, found=found, **text)
