"""Promise: members share exactly the memory that they claim to share, and no other.

Catches members that are one module under several names, "tied" weights that are copies, layers
that are shared through a default argument or a registry, and two parameters over one memory.

The comparison is by storage, not by value: it is exact for views with any offset and stride
(views that interleave without overlapping do not share), needs no batch, and works on the meta
device, where nothing is allocated.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import count, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ensembles.memory import memory_in
from ensembles.message import aligned, broken, counted, listed, told_in_common
from ensembles.subject import LISTED, Members, Model, checked_initialised, named_members

__all__ = [
    "ParameterSharing",
    "Place",
    "SharedMemory",
    "assert_members_share",
    "assert_parameters_distinct",
    "measure_parameter_sharing",
]


@dataclass(frozen=True, order=True)
class Place:
    """Where a tensor is registered: member, its name in that member, and what it is."""

    member: str
    name: str
    kind: str

    def __str__(self) -> str:
        return f"{self.member}.{self.name}"


@dataclass(frozen=True)
class SharedMemory:
    """Bytes that belong to several registered tensors.

    Attributes:
        places: Every place that these bytes belong to, in the order of members and names.
        bytes: How many bytes.
        whole: Whether these bytes are all of each of the tensors.
        objects: How many different tensor objects the places are: a tied parameter is one.
    """

    places: tuple[Place, ...]
    bytes: int
    whole: bool
    objects: int

    @property
    def members(self) -> tuple[str, ...]:
        """The members among the places, in order."""
        return tuple(dict.fromkeys(place.member for place in self.places))

    @property
    def names(self) -> tuple[str, ...]:
        """The names among the places, in order."""
        return tuple(dict.fromkeys(place.name for place in self.places))


@dataclass(frozen=True)
class ParameterSharing:
    """Which parameters and buffers are the same memory, wholly or in part.

    Attributes:
        members: The members' names.
        places: Every registered parameter and buffer that has elements.
        shared: Every piece of memory that belongs to more than one place.
    """

    members: tuple[str, ...]
    places: tuple[Place, ...]
    shared: tuple[SharedMemory, ...]

    @property
    def between_members(self) -> tuple[SharedMemory, ...]:
        """The pieces of memory that belong to more than one member."""
        return tuple(memory for memory in self.shared if len(memory.members) > 1)

    def __str__(self) -> str:
        head = (
            f"{counted(self.members, 'member')}, {len(self.places)} parameters and buffers, "
            f"{counted(self.shared, 'piece')} of memory with several places"
        )
        rows = [
            (
                listed(memory.names, 3),
                _seen(memory),
                f"{memory.bytes:,} bytes",
            )
            for memory in self.shared
        ]
        return "\n".join([head, *(f"  {line}" for line in aligned(rows))])


def measure_parameter_sharing(model: Model, *, members: Members | None = None) -> ParameterSharing:
    """Finds every parameter and buffer that is the same memory as another, wholly or in part.

    Every storage is cut into the largest pieces on which all its views agree, so views may have
    any offset and stride; memory that several storages map is compared by address, and on the
    meta device, where addresses mean nothing, by storage.

    Args:
        model: One module, or the members as a list or dict of modules.
        members: Finds the members inside one module.

    Returns:
        The measurement; cost grows with the number of tensors, and with the number of elements
        only where views of one memory differ.

    Raises:
        ValueError: If there are no members, a parameter is lazy, or PyTorch does not show the
            memory of a tensor.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> print(measure_parameter_sharing([layer, layer]))
        2 members, 4 parameters and buffers, 2 pieces of memory with several places
          weight   one tensor in members 0, 1   24 bytes
          bias     one tensor in members 0, 1   8 bytes
    """
    named = named_members(model, members)
    counter = count()
    views = [view for name, module in named.items() for view in _views(name, module, counter)]
    distinct: dict[_Extent, list[_View]] = defaultdict(list)
    for view in views:
        distinct[view.extent].append(view)
    shared = [
        (order, memory)
        for cluster in _clusters(list(distinct))
        for order, memory in _pieces(cluster, distinct)
        if len(memory.places) > 1
    ]
    return ParameterSharing(
        members=tuple(named),
        places=tuple(dict.fromkeys(view.place for view in views)),
        shared=tuple(memory for _, memory in sorted(shared, key=lambda found: found[0])),
    )


def assert_members_share(sharing: ParameterSharing, names: Sequence[str] = ()) -> None:
    """Checks that members share the parameters of these names, wholly, and nothing else.

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
        >>> embedding = nn.Embedding(8, 4)
        >>> two = [nn.Sequential(embedding, nn.Linear(4, 2)) for _ in range(2)]
        >>> assert_members_share(measure_parameter_sharing(two), ["0.weight"])
    """
    __tracebackhide__ = True
    if len(sharing.members) < 2:
        raise ValueError(
            "sharing compares members, and only one was given "
            f"({listed(sharing.members)}). Give a list of modules, or members=a function that "
            "finds them inside the model, such as members=lambda model: model.members."
        )
    if not sharing.places:
        raise ValueError(
            f"the members have no parameters or buffers: there is nothing to compare. {LISTED}."
        )
    for pattern in names:
        if not any(fnmatchcase(place.name, pattern) for place in sharing.places):
            raise ValueError(
                f"no parameter or buffer is named {pattern!r}, which is claimed shared. "
                f"Names are, for example, {listed([p.name for p in sharing.places], 3)}."
            )
    _assert_nothing_else_shared(sharing, names)
    _assert_claimed_shared(sharing, names)


def assert_parameters_distinct(sharing: ParameterSharing) -> None:
    """Checks that no memory belongs to two different parameter objects.

    A tied weight is one `Parameter` under several names: optimizers then step it once, and
    `.to()`, `.double()` and copies keep the tie. Two objects over one memory look tied, are
    stepped twice, and come apart at the first conversion.

    Args:
        sharing: From `measure_parameter_sharing`, of one member or more.

    Raises:
        ValueError: If there are no parameters or buffers.
        AssertionError: If two parameter objects overlap in memory.

    Example:
        >>> tied = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False))
        >>> tied[1].weight = tied[0].weight
        >>> assert_parameters_distinct(measure_parameter_sharing(tied))
    """
    __tracebackhide__ = True
    if not sharing.places:
        raise ValueError(
            f"the model has no parameters or buffers: there is nothing to compare. {LISTED}."
        )
    twice = [memory for memory in sharing.shared if memory.objects > 1]
    if twice:
        raise AssertionError(
            broken(
                "parameters are claimed tied by being one object, and "
                f"{counted(twice, 'piece')} of memory {'has' if len(twice) == 1 else 'have'} "
                "several",
                [
                    (listed([str(place) for place in memory.places], 3), _doubled(memory))
                    for memory in twice
                ],
                total=f"{len(twice)} of {counted(sharing.shared, 'shared piece')} of memory",
                meaning="An optimizer steps such memory once per object, and copies and "
                "conversions untie it.",
                remedy="Usual cause: nn.Parameter(other.weight) or .data. "
                "Assign the Parameter itself: b.weight = a.weight.",
            )
        )


# --- how the two assertions look ---------------------------------------------------------------


def _assert_nothing_else_shared(sharing: ParameterSharing, names: Sequence[str]) -> None:
    __tracebackhide__ = True
    surplus = [
        memory
        for memory in sharing.between_members
        if not all(any(fnmatchcase(name, pattern) for pattern in names) for name in memory.names)
    ]
    if not surplus:
        return
    touched = {place for memory in surplus for place in memory.places}
    owned = [place for place in sharing.places if place.kind == "parameter"]
    touched_names = {place.name for place in touched if place.kind == "parameter"}
    buffers = {place.name for place in touched if place.kind == "buffer"}
    among = {place.name for place in owned}
    seen_in = tuple(m for m in sharing.members if any(m == place.member for place in touched))
    everything = all(memory.whole for memory in surplus) and all(
        place in touched for place in sharing.places if place.member in seen_in
    )
    meaning, remedy = told_in_common(seen_in, whole=everything)
    kinds = "parameters" if touched_names else "buffers"
    claim = "are claimed independent" if not names else f"are claimed to share {listed(names)} only"
    raise AssertionError(
        broken(
            f"members {listed(sharing.members)} {claim}, and share "
            + (kinds if not names else "more"),
            [(listed(memory.names, 2), _seen(memory)) for memory in surplus],
            total=f"{len(touched_names)} of {counted(among, 'parameter')}"
            + (f", {counted(buffers, 'buffer')}" if buffers else ""),
            meaning=meaning,
            remedy=remedy,
        )
    )


def _assert_claimed_shared(sharing: ParameterSharing, names: Sequence[str]) -> None:
    __tracebackhide__ = True
    holders: dict[str, list[Place]] = defaultdict(list)
    for place in sharing.places:
        if any(fnmatchcase(place.name, pattern) for pattern in names):
            holders[place.name].append(place)
    tied = {
        frozenset(place for place in memory.places if place.name == name)
        for memory in sharing.shared
        if memory.whole
        for name in memory.names
    }
    apart = []
    for name, places in holders.items():
        if frozenset(places) in tied and len(places) > 1:
            continue
        groups = [
            sorted(place.member for place in group)
            for group in tied
            if next(iter(group)).name == name and group
        ]
        alone = [p.member for p in places if not any(p.member in group for group in groups)]
        found = [f"members {listed(group)} together" for group in sorted(groups) if len(group) > 1]
        lone = sorted({*alone, *(g[0] for g in groups if len(g) == 1)}, key=sharing.members.index)
        if lone:
            found.append(f"a tensor of its own in {listed(lone)}")
        apart.append((name, "; ".join(found)))
    if apart:
        raise AssertionError(
            broken(
                f"members {listed(sharing.members)} are claimed to share "
                f"{listed(list(names))}, and do not",
                apart,
                total=f"{len(apart)} of {counted(holders, 'claimed parameter')}",
                meaning="A step on one member leaves the others' copies behind.",
                remedy="Usual cause: deepcopy, clone, or a layer built instead of passed on. "
                "Register the same module (or Parameter object) in every member.",
            )
        )


def _seen(memory: SharedMemory) -> str:
    how = "one tensor" if memory.whole else f"{memory.bytes:,} bytes in common"
    return f"{how} in members {listed(memory.members)}"


def _doubled(memory: SharedMemory) -> str:
    extent = "the same memory" if memory.whole else "overlapping memory"
    return f"{memory.objects} objects over {extent} ({memory.bytes:,} bytes)"


# --- memory -------------------------------------------------------------------------------------


class _Extent(NamedTuple):
    """The bytes of a strided tensor: outer dimensions, largest stride first, of contiguous runs.

    Attributes:
        space: What `start` is relative to: a device's addresses, or a storage on meta.
        start: The first byte.
        dims: (size, stride in bytes) of every dimension above the contiguous run.
        run: Length of the contiguous run, in bytes.
    """

    space: tuple[str, int]
    start: int
    dims: tuple[tuple[int, int], ...]
    run: int

    @property
    def stop(self) -> int:
        return self.start + sum((size - 1) * stride for size, stride in self.dims) + self.run


_HERE = ("relative", 0)
"""The space of extents that start relative to each other."""

_Piece = tuple[tuple[int, ...], int]
"""Which extents of a cluster hold a piece of memory, and how many bytes it has."""


class _View(NamedTuple):
    place: Place
    extent: _Extent
    identity: int
    """id() of the parameter object, and 0 for buffers, which are never stepped."""
    order: int
    """Rank among all views: members in their order, and registration in each."""


def _views(member: str, module: nn.Module, counter: Iterator[int]) -> Iterator[_View]:
    registered = [
        *(("parameter", n, p) for n, p in module.named_parameters(remove_duplicate=False)),
        *(("buffer", n, b) for n, b in module.named_buffers(remove_duplicate=False)),
    ]
    for kind, name, tensor in registered:
        if is_lazy(tensor):
            checked_initialised(tensor, f"{kind} {member}.{name}")
        place = Place(member, name, kind)
        for inner in memory_in(tensor, f"{kind} {place}"):
            if inner.numel():
                identity = id(tensor) if kind == "parameter" else 0
                yield _View(place, _extent(inner), identity, next(counter))


def _extent(tensor: Tensor) -> _Extent:
    item = tensor.element_size()
    if tensor.is_contiguous():
        return _Extent(*_start(tensor), (), item * tensor.numel())
    dims = sorted(
        (
            (size, stride * item)
            for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
            if size > 1 and stride > 0
        ),
        key=lambda dim: -dim[1],
    )
    run = item
    while dims and dims[-1][1] == run:
        run *= dims.pop()[0]
    return _Extent(*_start(tensor), tuple(dims), run)


def _start(tensor: Tensor) -> tuple[tuple[str, int], int]:
    """The space and the first byte of a tensor."""
    device, storage = tensor.device, tensor.untyped_storage()
    if storage.device.type == "meta":  # of fake tensors too, whatever device they imitate
        offset = int(tensor.storage_offset()) * tensor.element_size()
        return ("meta", storage._cdata), offset
    return (device.type, device.index or 0), tensor.data_ptr()


def _clusters(extents: list[_Extent]) -> Iterator[list[_Extent]]:
    """Extents whose byte intervals are connected; only those can overlap."""
    cluster: list[_Extent] = []
    stop = 0
    for extent in sorted(extents, key=lambda e: (e.space, e.start)):
        if cluster and (extent.space != cluster[0].space or extent.start >= stop):
            yield cluster
            cluster = []
        stop = max(stop, extent.stop) if cluster else extent.stop
        cluster.append(extent)
    if cluster:
        yield cluster


def _pieces(
    cluster: list[_Extent], distinct: Mapping[_Extent, list[_View]]
) -> Iterator[tuple[list[int], SharedMemory]]:
    """The pieces of memory on which all extents of a cluster agree, with where they rank."""
    if len(cluster) == 1 and len(distinct[cluster[0]]) == 1:
        return  # the common case: a tensor by itself
    cut: Iterable[_Piece]
    if any(extent.dims for extent in cluster):
        base = cluster[0].start
        cut = _atoms(tuple(_Extent(_HERE, e.start - base, e.dims, e.run) for e in cluster))
    else:
        cut = _runs(cluster)
    pieces = [([cluster[i] for i in members], size) for members, size in cut]
    lengths: dict[_Extent, int] = defaultdict(int)
    for extents, size in pieces:
        for extent in extents:
            lengths[extent] += size
    for extents, size in pieces:
        views = sorted(
            (view for extent in extents for view in distinct[extent]), key=lambda view: view.order
        )
        yield (
            [view.order for view in views],
            SharedMemory(
                places=tuple(dict.fromkeys(view.place for view in views)),
                bytes=size,
                whole=all(lengths[extent] == size for extent in extents),
                objects=len({view.identity for view in views if view.identity}),
            ),
        )


def _length(extent: _Extent) -> int:
    return extent.run * math.prod(size for size, _ in extent.dims)


def _runs(cluster: list[_Extent]) -> Iterable[_Piece]:
    """`_atoms` for contiguous extents: a sweep over their ends, whatever their number."""
    ends = sorted({end for extent in cluster for end in (extent.start, extent.stop)})
    sizes: dict[tuple[int, ...], int] = defaultdict(int)
    active: list[int] = []
    queue = deque(range(len(cluster)))  # clusters come sorted by start
    for low, high in pairwise(ends):
        active = [i for i in active if cluster[i].stop > low]
        while queue and cluster[queue[0]].start <= low:
            active.append(queue.popleft())
        if active:
            sizes[tuple(active)] += high - low
    return sizes.items()


@lru_cache(maxsize=256)
def _atoms(cluster: tuple[_Extent, ...]) -> list[_Piece]:
    """Cuts a cluster's memory into pieces: which extents hold it, and how many bytes it has.

    Memory is a row of cells, as large as all offsets, strides and runs allow (their greatest
    common divisor), each with a label that stands for the set of extents seen there. Every extent
    splits the labels that it meets; so the work is the number of cells that extents cover.

    Extents start relative to the first, so that layers of equal shapes are cut once.
    """
    cell = math.gcd(*(n for e in cluster for n in (e.start, e.run, *(s for _, s in e.dims))))
    cells = max(extent.stop for extent in cluster) // cell
    labels = torch.zeros(cells, dtype=torch.int32)
    sets: list[tuple[int, ...]] = [()]
    # The longest first: most extents then meet a single label, which is relabelled in one fill.
    order = sorted(range(len(cluster)), key=lambda i: -_length(cluster[i]))
    for i in order:
        extent = cluster[i]
        shape = (*(size for size, _ in extent.dims), extent.run // cell)
        strides = (*(stride // cell for _, stride in extent.dims), 1)
        seen = labels.as_strided(shape, strides, extent.start // cell)
        low, high = (int(x) for x in seen.aminmax())
        if low == high:
            met, table = [low], None
        else:
            met = torch.unique(seen).tolist()
            table = torch.arange(len(sets), dtype=torch.int32)
            table[met] = torch.arange(len(sets), len(sets) + len(met), dtype=torch.int32)
        new = len(sets) if table is None else table[seen.long()]
        sets.extend((*sets[label], i) for label in met)
        if _overlaps_itself(extent):
            index = torch.arange(cells).as_strided(shape, strides, extent.start // cell)
            labels[index.flatten()] = new if isinstance(new, int) else new.flatten()
        elif isinstance(new, int):
            seen.fill_(new)
        else:
            seen.copy_(new)
    sizes = torch.bincount(labels.long(), minlength=len(sets)).tolist()
    return [
        (tuple(sorted(members)), size * cell)
        for members, size in zip(sets, sizes, strict=True)
        if size and members
    ]


def _overlaps_itself(extent: _Extent) -> bool:
    """Whether two indices reach one byte, as in overlapping windows; then writes go by index."""
    below = extent.run
    for size, stride in reversed(extent.dims):
        if stride < below:
            return True
        below = stride * (size - 1) + below
    return False
