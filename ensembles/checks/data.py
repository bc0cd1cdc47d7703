"""Promise: members see the samples that they are claimed to see: bagged, paired or shuffled.

Catches "bagged" members that all get the same sample indices, bootstraps that are drawn without
replacement, anew in every epoch, or that overlap too much, members claimed paired whose loaders
shuffle by themselves, members claimed shuffled that read in one order, and loaders whose workers
augment with one stream.

A bootstrap draws n of N samples with replacement: N (1 - (1 - 1/N)^n) of them are distinct, for
n = N a share of 1 - 1/e = 63.2 %, and two members have the square of that share in common (Efron
1979, "Bootstrap methods"; Breiman 1996, "Bagging predictors"). Both are compared within six
standard deviations, so that one healthy ensemble in a hundred million is refused. A member keeps
its bootstrap: one that is drawn anew in every epoch has seen all samples after a few.

Samples are known by their index where integers come, and by the digest of their content where a
loader gives batches: then equal samples count as one, and random augmentation makes every sample
another. Loaders are read one after the other, from the present seed, as training would read them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from ensembles.message import aligned, broken, counted, listed
from ensembles.message import seed as present_seed
from ensembles.probes.samples import samples_of
from ensembles.probes.state import generators_kept, seed_generators
from ensembles.probes.streams import can_be_asked, streams_of

__all__ = [
    "DataPair",
    "MemberData",
    "assert_members_bagged",
    "assert_members_paired",
    "assert_members_shuffled",
    "measure_member_data",
]

ENOUGH = 8
"""Samples from which on members are compared: two bootstraps of 8 are the same samples by accident
in 1 of 2,600 cases, of 16 in 1 of 44 million, and two orders of 8 are one in 1 of 40,320."""

REDRAWN = 0.5
"""Share of the samples that a new bootstrap is expected to add to those of the last, from which on
it is one: a last batch that is left out adds fewer."""

DEVIATIONS = 6
"""Standard deviations that a share may be off: one healthy ensemble in 10^8 is."""


@dataclass(frozen=True)
class DataPair:
    """What two members' samples have in common.

    Attributes:
        members: The two members.
        common: How many distinct samples both see.
        same_samples: Whether both see the same samples, each as often.
        parted: The first position at which they see different samples; None where they see the
            same in the same order.
    """

    members: tuple[str, str]
    common: int
    same_samples: bool
    parted: int | None


@dataclass(frozen=True)
class MemberData:
    """Which samples members see.

    Attributes:
        members: The members' names.
        seen: How many samples each sees, repeats included.
        distinct: How many distinct samples each sees.
        pairs: What every two of them have in common.
        size: How many samples the data set has, where it was told.
        by_content: Whether samples are known by their content, not by an index.
        redrawn: (member, share): how much of what the member sees in its next epoch it did not see
            in the first, where that is more than half of what a new draw would show.
        repeated: (member, what, places): a random stream of the member's loader that several
            workers, or a worker in several epochs, have in common.
    """

    members: tuple[str, ...]
    seen: tuple[int, ...]
    distinct: tuple[int, ...]
    pairs: tuple[DataPair, ...]
    size: int | None
    by_content: bool
    redrawn: tuple[tuple[str, float], ...] = ()
    repeated: tuple[tuple[str, str, tuple[str, ...]], ...] = ()

    def __str__(self) -> str:
        same = sum(pair.parted is None for pair in self.pairs)
        reordered = sum(pair.same_samples and pair.parted is not None for pair in self.pairs)
        head = (
            f"{counted(self.members, 'member')}, {counted(self.pairs, 'pair')}: {same} see the "
            f"same samples in the same order, {reordered} in another order, "
            f"{len(self.pairs) - same - reordered} other samples"
        )
        rows = [
            (f"member {name}", f"{seen} samples", f"{distinct / seen:.1%} distinct")
            for name, seen, distinct in zip(self.members, self.seen, self.distinct, strict=True)
        ]
        rows += [
            (f"member {name}", "other samples in the next epoch", f"{share:.1%} of them not seen")
            for name, share in self.redrawn
        ]
        rows += [
            (f"member {n}", what, f"one stream in {listed(p, 3)}") for n, what, p in self.repeated
        ]
        return "\n".join([head, *(f"  {line}" for line in aligned(rows))])


def measure_member_data(
    data: Callable[[Any], Iterable[Any]],
    members: int | Sequence[str] = 2,
    *,
    size: int | None = None,
) -> MemberData:
    """Reads the samples of every member, one member after the other.

    Args:
        data: A function of the member's number (or name, where names are given) to what it reads
            in an epoch: an iterable of indices, a sampler, or a `DataLoader`.
        members: How many members, or their names.
        size: How many samples the data set has; by default as many as a member sees.

    Returns:
        The measurement. The random generators are as before.

    Raises:
        ValueError: If there are fewer than two members, `data` fails, or a member sees nothing.

    Example:
        >>> print(measure_member_data(lambda member: range(10), 2))
        2 members, 1 pair: 1 see the same samples in the same order, 0 in another order, ...
          member 0   10 samples   100.0% distinct
          member 1   10 samples   100.0% distinct
    """
    if not callable(data):
        raise ValueError(
            f"data=... is an object of type {type(data).__name__}. Give a function of the "
            "member that returns its sample indices or its loader: data=lambda member: ..."
        )
    names: Sequence[Any] = range(members) if isinstance(members, int) else list(members)
    if len(names) < 2:
        raise ValueError(f"data are compared between members, and {len(names)} was given.")
    by_content = False
    read: dict[str, list[int | str]] = {}
    redrawn: list[tuple[str, float]] = []
    repeated: list[tuple[str, str, tuple[str, ...]]] = []
    with generators_kept():
        seed_generators(present_seed.get())
        for name in names:
            keys, *again = samples_of(data, name)
            by_content |= any(isinstance(key, str) for key in keys)
            read[str(name)] = keys
            if again:
                known = set(keys)
                share = sum(key not in known for key in again[0]) / len(again[0])
                # Of a new draw. A last batch that is left out is another too, and is less.
                if share > REDRAWN * math.exp(-len(keys) / (size or len(keys))):
                    redrawn.append((str(name), share))
        for name in names if by_content else ():
            loader = data(name)
            if can_be_asked(loader) and loader.num_workers:
                found = streams_of(loader).repeated
                repeated += [(str(name), what, places) for what, places in found]
    counts = {name: Counter(keys) for name, keys in read.items()}
    return MemberData(
        members=tuple(read),
        seen=tuple(len(keys) for keys in read.values()),
        distinct=tuple(len(counted) for counted in counts.values()),
        pairs=tuple(
            DataPair(
                (one, two),
                len(counts[one].keys() & counts[two].keys()),
                counts[one] == counts[two],
                _parted(read[one], read[two]),
            )
            for one, two in combinations(read, 2)
        ),
        size=size,
        by_content=by_content,
        redrawn=tuple(redrawn),
        repeated=tuple(repeated),
    )


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
        >>> assert_members_bagged(
        ...     measure_member_data(lambda member: random.choices(range(100), k=100), 3))
    """
    __tracebackhide__ = True
    _assert_streams_own(data)
    if min(data.seen) < ENOUGH:
        raise ValueError(
            f"a member sees {min(data.seen)} samples: whether they are a bootstrap cannot be told "
            f"from fewer than {ENOUGH}."
        )
    same = [pair for pair in data.pairs if pair.same_samples]
    if same:
        total = f"{len(same)} of {counted(data.pairs, 'pair')} of members"
        raise AssertionError(
            broken(
                f"members {listed(data.members)} are claimed bagged, and see the same samples",
                [
                    (
                        f"members {pair.members[0]}, {pair.members[1]}",
                        f"the same {data.seen[data.members.index(pair.members[0])]} samples",
                        "in the same order" if pair.parted is None else "in another order",
                    )
                    for pair in same
                ],
                total=total,
                meaning="They differ by their initial weights only: nothing is bagged.",
                remedy="Usual cause: one generator or seed for every member's sampler "
                "(default_rng(0) inside the loop). Seed it with the member: default_rng([0, i]).",
            )
        )
    rows = [*_wrong_shares(data), *_wrong_overlaps(data)]
    if rows:
        raise AssertionError(
            broken(
                f"members {listed(data.members)} are claimed bagged, and do not see bootstraps",
                rows,
                total=f"{len(rows)} of {len(data.members) + len(data.pairs)} shares",
                meaning="A bootstrap draws with replacement: of n samples drawn from n, 63.2 % "
                "are distinct, and two members have 40 % of the data set in common.",
                remedy="Usual cause: replacement is missing (randperm, sample, replace=False), or "
                "one bootstrap that is changed a little for each member. A data set of another "
                "size than a member's draw is told by size=.",
            )
        )
    if data.redrawn:
        raise AssertionError(
            broken(
                f"members {listed(data.members)} are claimed bagged, and draw anew in every epoch",
                [
                    (f"member {name}", f"{share:.1%} of the next epoch", "not seen in the first")
                    for name, share in data.redrawn
                ],
                total=f"{len(data.redrawn)} of {counted(data.members, 'member')}",
                meaning="After e epochs a member has seen a share of 1 - 0.368^e of all samples: "
                "members differ in the order of what they see, and soon in nothing else.",
                remedy="Usual cause: RandomSampler(replacement=True), which draws whenever it is "
                "read. Draw once for each member, and train on Subset(data, indices).",
            )
        )


def assert_members_paired(data: MemberData) -> None:
    """Checks that all members see the same samples in the same order.

    Raises:
        AssertionError: If two see others, naming the first position at which they part.

    Example:
        >>> assert_members_paired(measure_member_data(lambda member: [2, 0, 1], 3))
    """
    __tracebackhide__ = True
    _assert_streams_own(data)
    apart = [pair for pair in data.pairs if pair.parted is not None]
    if apart:
        raise AssertionError(
            broken(
                f"members {listed(data.members)} are claimed paired, and do not see the same "
                "samples in the same order",
                [
                    (
                        f"members {pair.members[0]}, {pair.members[1]}",
                        f"part at sample {pair.parted}",
                        "the same samples in another order" if pair.same_samples else "others",
                    )
                    for pair in apart
                ],
                total=f"{len(apart)} of {counted(data.pairs, 'pair')} of members",
                meaning="Members that are compared differ by their data too.",
                remedy=(
                    "Usual cause: a loader for each member that shuffles from the global "
                    "generator, or augments. Share the loader, or give each "
                    "generator=torch.Generator().manual_seed(seed)."
                ),
            )
        )


def assert_members_shuffled(data: MemberData) -> None:
    """Checks that members see the same samples, and no two of them in the same order.

    Raises:
        ValueError: If members see fewer than 8 distinct samples, whose orders may agree.
        AssertionError: If two see other samples, or the same order.

    Example:
        >>> import random
        >>> assert_members_shuffled(
        ...     measure_member_data(lambda member: random.sample(range(100), 100), 3))
    """
    __tracebackhide__ = True
    _assert_streams_own(data)
    if min(data.distinct) < ENOUGH:
        raise ValueError(
            f"a member sees {min(data.distinct)} distinct samples: orders of fewer than {ENOUGH} "
            "agree by chance."
        )
    wrong = [pair for pair in data.pairs if pair.parted is None or not pair.same_samples]
    if wrong:
        ordered = any(pair.parted is None for pair in wrong)
        raise AssertionError(
            broken(
                f"members {listed(data.members)} are claimed to see the same samples in orders of "
                f"their own, and {'see one order' if ordered else 'see different samples'}",
                [
                    (
                        f"members {pair.members[0]}, {pair.members[1]}",
                        "the same samples in the same order"
                        if pair.parted is None
                        else f"{pair.common} distinct samples in common, of "
                        f"{data.distinct[data.members.index(pair.members[0])]} and "
                        f"{data.distinct[data.members.index(pair.members[1])]}",
                    )
                    for pair in wrong
                ],
                total=f"{len(wrong)} of {counted(data.pairs, 'pair')} of members",
                meaning=(
                    "A source of diversity is missing: every step shows all members the same batch."
                    if ordered
                    else "Some members never see some samples."
                ),
                remedy=(
                    "Usual cause: one loader for all members, one generator seed for each, or "
                    "shuffle=False. Give each a generator of its own seed."
                    if ordered
                    else "Usual cause: drop_last, a subset or split for each member, or random "
                    "augmentation (then compare indices: give the samplers)."
                ),
            )
        )


# --- what workers draw --------------------------------------------------------------------------


def _assert_streams_own(data: MemberData) -> None:
    __tracebackhide__ = True
    if data.repeated:
        raise AssertionError(
            broken(
                "the workers of a member's loader are claimed to augment each in its own way, and "
                "repeat each other",
                [
                    (f"member {name}", what, f"one stream in {listed(places, 3)}")
                    for name, what, places in data.repeated
                ],
                total=f"{counted(data.repeated, 'repeated stream')}",
                meaning="The same random numbers augment other samples over and over.",
                remedy="Usual cause: a generator that is made with the data set: each worker "
                "copies it, in each epoch anew. In worker_init_fn, seed it with "
                "torch.initial_seed(), which is another in every worker and epoch.",
            )
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


def _wrong_shares(data: MemberData) -> list[tuple[str, str, str]]:
    rows = []
    for name, seen, distinct in zip(data.members, data.seen, data.distinct, strict=True):
        size = data.size or seen
        share, deviation = _share(seen, size)
        if abs(distinct / size - share) > DEVIATIONS * deviation + 1 / size:
            rows.append(
                (
                    f"member {name}",
                    f"expected {share:.1%} of {size} samples",
                    f"found {distinct / size:.1%}",
                )
            )
    return rows


def _wrong_overlaps(data: MemberData) -> list[tuple[str, str, str]]:
    rows = []
    of = {name: i for i, name in enumerate(data.members)}
    for pair in data.pairs:
        one, two = (of[name] for name in pair.members)
        size = data.size or max(data.seen)
        # Given how many each has, the overlap of independent draws is hypergeometric.
        a, b = data.distinct[one] / size, data.distinct[two] / size
        deviation = math.sqrt(max(a * b * (1 - a) * (1 - b), 0.0) / max(size - 1, 1))
        if pair.common / size > a * b + DEVIATIONS * deviation + 1 / size:
            rows.append(
                (
                    f"members {pair.members[0]}, {pair.members[1]}",
                    f"expected {a * b:.1%} of {size} samples in common",
                    f"found {pair.common / size:.1%}",
                )
            )
    return rows


def _parted(one: Sequence[Any], two: Sequence[Any]) -> int | None:
    for position, (a, b) in enumerate(zip(one, two, strict=False)):
        if a != b:
            return position
    return None if len(one) == len(two) else min(len(one), len(two))
