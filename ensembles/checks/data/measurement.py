"""Which samples members see, in which order, and which random streams their workers draw from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from ensembles.case import Case
from ensembles.checks.data.claim import DataClaim
from ensembles.checks.data.samples import samples_of
from ensembles.findings import Count
from ensembles.handling.state import generators_kept, seed_generators
from ensembles.instruments.loader_rng import INDICES, RepeatedStream, can_be_asked, streams_of
from ensembles.message import aligned, counted, listed

__all__ = ["DataPair", "MemberData", "measure", "measure_member_data"]


REDRAWN = 0.5
"""Share of the samples that a new bootstrap is expected to add to those of the last, from which on
it is one: a last batch that is left out adds fewer."""


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
        repeated: (member, stream): what several workers of the member's loader, or a worker in
            several epochs, draw alike.
        looked_at: How much of the workers' streams was looked at.
    """

    members: tuple[str, ...]
    seen: tuple[int, ...]
    distinct: tuple[int, ...]
    pairs: tuple[DataPair, ...]
    size: int | None
    by_content: bool
    redrawn: tuple[tuple[str, float], ...] = ()
    repeated: tuple[tuple[str, RepeatedStream], ...] = ()
    looked_at: tuple[Count, ...] = ()

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
            (f"member {name}", stream.what, f"one stream in {listed(stream.places, 3)}")
            for name, stream in self.repeated
        ]
        return "\n".join([head, *(f"  {line}" for line in aligned(rows))])


def measure_member_data(
    data: Case | Callable[[Any], Iterable[Any]],
    members: int | Sequence[str] = 2,
    *,
    size: int | None = None,
) -> MemberData:
    """Reads the samples of every member, one member after the other.

    Args:
        data: A function of the member's number (or name, where names are given) to what it reads
            in an epoch: an iterable of indices, a sampler, or a `DataLoader`. Or a case.
        members: How many members, or their names.
        size: How many samples the data set has; by default as many as a member sees.

    Returns:
        The measurement.

    Raises:
        ValueError: If there are fewer than two members, `data` fails, or a member sees nothing.

    Example:
        >>> print(measure_member_data(lambda member: range(10), 2))
        2 members, 1 pair: 1 see the same samples in the same order, 0 in another order, ...
          member 0   10 samples   100.0% distinct
          member 1   10 samples   100.0% distinct
    """
    if isinstance(data, Case):
        return measure(data)
    names = [str(i) for i in range(members)] if isinstance(members, int) else members
    nobody = {name: nn.Identity() for name in names}  # of the members only their data are known
    return measure(Case.of(nobody, data=data, data_size=size))


def measure(case: Case, claim: DataClaim | None = None) -> MemberData:
    """What `measure_member_data` finds in a case; no claim asks for less."""
    __tracebackhide__ = True
    data, size = case.data, case.subject.data_size
    if len(data) < 2:
        raise ValueError(f"data are compared between members, but {len(data)} was given.")
    read: dict[str, list[int | str]] = {}
    redrawn: list[tuple[str, float]] = []
    with generators_kept():
        seed_generators(case.seed)
        for member, ask in data.items():
            keys, *again = samples_of(ask, member)
            read[str(member)] = keys
            if again:
                known = set(keys)
                share = sum(key not in known for key in again[0]) / len(again[0])
                # Of a new draw. A last batch that is left out is another too, and is less.
                if share > REDRAWN * math.exp(-len(keys) / (size or len(keys))):
                    redrawn.append((str(member), share))
        by_content = any(isinstance(key, str) for keys in read.values() for key in keys)
        repeated, looked_at = _workers(data) if by_content else ((), ())
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
        repeated=repeated,
        looked_at=looked_at,
    )


def _workers(
    data: Mapping[int | str, Callable[[], Any]],
) -> tuple[tuple[tuple[str, RepeatedStream], ...], tuple[Count, ...]]:
    """The streams that workers repeat, and how much was looked at."""
    repeated: list[tuple[str, RepeatedStream]] = []
    sizes: list[int] = []
    loaders = 0
    for member, ask in data.items():
        loader = ask()
        if isinstance(loader, DataLoader) and loader.num_workers:
            loaders += 1
            if can_be_asked(loader):
                repeated += [(str(member), stream) for stream in streams_of(loader).repeated]
                sizes.append(len(loader.dataset))  # type: ignore[arg-type]
    asked = sum(min(size, INDICES) for size in sizes)
    counts = (
        Count(len(sizes), "pool of workers", of=loaders),
        Count(asked, "sample of data sets, for workers' streams", of=sum(sizes)),
    )
    return tuple(repeated), tuple(count for count in counts if not count.complete)


def _parted(one: Sequence[Any], two: Sequence[Any]) -> int | None:
    for position, (a, b) in enumerate(zip(one, two, strict=False)):
        if a != b:
            return position
    return None if len(one) == len(two) else min(len(one), len(two))
