"""Whether members see the samples that they claim to see."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain

from ensembles.checks.data.claim import DataClaim
from ensembles.checks.data.measurement import MemberData
from ensembles.findings import Count, Finding, Findings
from ensembles.message import Explanation, assert_held, listed

__all__ = ["assert_members_bagged", "assert_members_paired", "assert_members_shuffled", "judge"]

ENOUGH = 8
"""Samples from which on two bootstraps that are equal are no accident: 1 in 8^8."""

DEVIATIONS = 6
"""Standard deviations that a share may be off: one healthy ensemble in 10^8 is."""


def assert_members_bagged(data: MemberData) -> None:
    """Checks that every member sees a bootstrap of its own: drawn with replacement.

    Args:
        data: From `measure_member_data`, with `size=` where members see more or fewer samples
            than the data set has.

    Raises:
        ValueError: If a member sees too few samples to tell.
        AssertionError: If two members see the same samples, too many in common, or if one's are
            not drawn with replacement, or anew in every epoch.

    Example:
        >>> import random
        >>> from ensembles import measure_member_data
        >>> assert_members_bagged(
        ...     measure_member_data(lambda member: random.choices(range(100), k=100), 3))
    """
    __tracebackhide__ = True
    assert_held(judge(data, DataClaim("bagged")))


def assert_members_paired(data: MemberData) -> None:
    """Checks that all members see the same samples in the same order.

    Raises:
        AssertionError: If two see others, naming the first position at which they part.

    Example:
        >>> from ensembles import measure_member_data
        >>> assert_members_paired(measure_member_data(lambda member: [2, 0, 1], 3))
    """
    __tracebackhide__ = True
    assert_held(judge(data, DataClaim("paired")))


def assert_members_shuffled(data: MemberData) -> None:
    """Checks that members see the same samples, and no two of them in the same order.

    Raises:
        ValueError: If members see fewer than 8 distinct samples, whose orders may agree.
        AssertionError: If two see other samples, or the same order.

    Example:
        >>> import random
        >>> from ensembles import measure_member_data
        >>> assert_members_shuffled(
        ...     measure_member_data(lambda member: random.sample(range(100), 100), 3))
    """
    __tracebackhide__ = True
    assert_held(judge(data, DataClaim("shuffled")))


def judge(data: MemberData, claim: DataClaim) -> Findings:
    """Where members see other samples than claimed, or in another order."""
    few = _too_few(data, claim)
    if few and not data.repeated:
        raise ValueError(few)
    items = [] if few else list(_FINDINGS[claim.relation](data))
    items.sort(key=lambda item: list(_TEXTS).index(item.kind))
    if items:
        members = f"members {listed(data.members)} are claimed {_CLAIMED[claim.relation]}"
        sentence = f"{members}, but {_TEXTS[items[0].kind][0]}"
    else:
        sentence = (
            "the workers of a member's loader are claimed to augment each in its own way, but "
            f"{_TEXTS['one stream'][0]}"
        )
    items += _streams(data)
    return Findings(
        claim=sentence,
        items=tuple(items),
        affected=tuple(_affected(data, items)),
        looked_at=data.looked_at,
    )


def _too_few(data: MemberData, claim: DataClaim) -> str:
    """Why nothing can be told of the samples; "" where they are enough."""
    if claim.relation == "bagged" and (fewest := min(data.seen)) < ENOUGH:
        which = "whether they are a bootstrap cannot be told from fewer than"
        return f"a member sees {fewest} samples: {which} {ENOUGH}."
    if claim.relation == "shuffled" and (fewest := min(data.distinct)) < ENOUGH:
        which = f"orders of fewer than {ENOUGH} agree by chance"
        return f"a member sees {fewest} distinct samples: {which}."
    return ""


def _affected(data: MemberData, items: list[Finding]) -> Iterator[Count]:
    concerned = {item.members for item in items}
    pairs = sum(len(members) > 1 for members in concerned)
    if pairs:
        yield Count(pairs, "pair of members", of=len(data.pairs))
    if len(concerned) > pairs:
        yield Count(len(concerned) - pairs, "member", of=len(data.members))
    if data.repeated:
        yield Count(len(data.repeated), "repeated stream")


# --- findings -----------------------------------------------------------------------------------

_CLAIMED = {
    "bagged": "bagged",
    "paired": "paired",
    "shuffled": "to see the same samples in orders of their own",
}

_NOT_PAIRED = "do not see the same samples in the same order"
_COMPARED = "Members that are compared differ by their data too."

_TEXTS: dict[str, tuple[str, str, str, str]] = {
    "same samples": (
        "see the same samples",
        "They differ by their initial weights only: nothing is bagged.",
        "one generator or seed for every member's sampler (default_rng(0) inside the loop)",
        "Seed it with the member: default_rng([0, i]).",
    ),
    "no bootstrap": (
        "do not see bootstraps",
        "A bootstrap draws with replacement: of n samples drawn from n, 63.2 % are distinct, and "
        "two members have 40 % of the data set in common.",
        "replacement is missing (randperm, sample, replace=False), or one bootstrap that is "
        "changed a little for each member",
        "Draw with replacement, for each member by itself. Where the data set has another size "
        "than a draw, give it: data_size= of a subject, size= of the fixture.",
    ),
    "drawn anew": (
        "draw anew in every epoch",
        "After e epochs a member has seen a share of 1 - 0.368^e of all samples: members differ "
        "in the order of what they see, but soon in nothing else.",
        "RandomSampler(replacement=True), which draws whenever it is read",
        "Draw once for each member, and train on Subset(data, indices).",
    ),
    "another order": (
        _NOT_PAIRED,
        _COMPARED,
        "a loader for each member that shuffles from the global generator",
        "Share the loader, or give each generator=torch.Generator().manual_seed(seed).",
    ),
    "other samples": (
        _NOT_PAIRED,
        _COMPARED,
        "a subset for each member, drop_last, or augmentation from the global generator",
        "Share the loader, or give each generator=torch.Generator().manual_seed(seed).",
    ),
    "one order": (
        "see one order",
        "A source of diversity is missing: every step shows all members the same batch.",
        "one loader for all members, one generator seed for each, or shuffle=False",
        "Give each a generator of its own seed.",
    ),
    "missing samples": (
        "see different samples",
        "Some members never see some samples.",
        "drop_last, a subset or split for each member, or random augmentation",
        "Where samples are augmented, compare indices: give the samplers.",
    ),
    "one stream": (
        "repeat each other",
        "The same random numbers augment other samples over and over.",
        "a generator that is made with the data set: each worker copies it, in each epoch anew",
        "In worker_init_fn, seed it with torch.initial_seed(), which is another in every worker "
        "and epoch.",
    ),
}
"""What follows "but", the meaning, the usual cause and what to do; the main kinds first."""


def _explained(kind: str) -> Explanation:
    _, meaning, cause, remedy = _TEXTS[kind]
    return Explanation(meaning=meaning, cause=cause, remedy=remedy)


def _finding(
    kind: str, members: tuple[str, ...], found: str, amount: float | None = None, expected: str = ""
) -> Finding:
    return Finding(
        kind=kind,
        place=f"member{'s' if len(members) > 1 else ''} {listed(members)}",
        members=members,
        expected=expected,
        found=found,
        amount=amount,
        **_explained(kind),
    )


def _bagged(data: MemberData) -> Iterator[Finding]:
    seen = dict(zip(data.members, data.seen, strict=True))
    for pair in data.pairs:
        if pair.same_samples:
            order = "the same" if pair.parted is None else "another"
            samples = f"the same {seen[pair.members[0]]} samples"
            yield _finding("same samples", pair.members, f"{samples} in {order} order")
    yield from chain(_wrong_shares(data), _wrong_overlaps(data))
    for name, share in data.redrawn:
        found = f"{share:.1%} of the next epoch not seen in the first"
        yield _finding("drawn anew", (name,), found, share)


def _paired(data: MemberData) -> Iterator[Finding]:
    for pair in data.pairs:
        if pair.parted is not None:
            kind = "another order" if pair.same_samples else "other samples"
            found = "the same samples in another order" if pair.same_samples else "other samples"
            yield _finding(kind, pair.members, f"{found}, from sample {pair.parted} on")


def _shuffled(data: MemberData) -> Iterator[Finding]:
    distinct = dict(zip(data.members, data.distinct, strict=True))
    for pair in data.pairs:
        if pair.parted is None:
            yield _finding("one order", pair.members, "the same samples in the same order")
        elif not pair.same_samples:
            one, two = (distinct[name] for name in pair.members)
            found = f"{pair.common} distinct samples in common, of {one} and {two}"
            yield _finding("missing samples", pair.members, found)


_FINDINGS = {"bagged": _bagged, "paired": _paired, "shuffled": _shuffled}


def _streams(data: MemberData) -> Iterator[Finding]:
    text = _explained("one stream")
    if not any(stream.held for _, stream in data.repeated):
        text["cause"] = (
            "a worker_init_fn that seeds with a constant or with the worker number, or a generator "
            "in a place that was not looked through"
        )
    for name, stream in data.repeated:
        yield Finding(
            kind="one stream",
            place=f"member {name}, {stream.what}",
            members=(name,),
            found=f"one stream in {listed(stream.places, 3)}",
            **text,
        )


# --- what a bootstrap looks like ----------------------------------------------------------------


def _share(seen: int, size: int) -> tuple[float, float]:
    """The expected share of the data set that is drawn at least once, with its deviation.

    With n draws of N the number of distinct samples has the mean N (1 - q) and the variance
    N q - N^2 q^2 + N (N - 1) r, where q = (1 - 1/N)^n and r = (1 - 2/N)^n.
    """
    q, r = (1 - 1 / size) ** seen, max(1 - 2 / size, 0.0) ** seen
    variance = size * q - (size * q) ** 2 + size * (size - 1) * r
    return 1 - q, math.sqrt(max(variance, 0.0)) / size


def _wrong_shares(data: MemberData) -> Iterator[Finding]:
    for name, seen, distinct in zip(data.members, data.seen, data.distinct, strict=True):
        size = data.size or seen
        share, deviation = _share(seen, size)
        if abs(distinct / size - share) > DEVIATIONS * deviation + 1 / size:
            found, expected = distinct / size, f"{share:.1%} of the {size} samples"
            yield _finding("no bootstrap", (name,), f"{found:.1%}", found, expected)


def _wrong_overlaps(data: MemberData) -> Iterator[Finding]:
    distinct = dict(zip(data.members, data.distinct, strict=True))
    size = data.size or max(data.seen)
    for pair in data.pairs:
        # Given how many each has, the overlap of independent draws is hypergeometric.
        a, b = (distinct[name] / size for name in pair.members)
        deviation = math.sqrt(max(a * b * (1 - a) * (1 - b), 0.0) / max(size - 1, 1))
        share = pair.common / size
        if not pair.same_samples and share > a * b + DEVIATIONS * deviation + 1 / size:
            expected = f"{a * b:.1%} of the {size} samples in common"
            yield _finding("no bootstrap", pair.members, f"{share:.1%}", share, expected)
