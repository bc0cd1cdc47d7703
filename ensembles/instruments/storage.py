"""Which registered tensors are the same memory, wholly or in part: exact, and without a call.

Every storage is cut into the largest pieces on which all its views agree, so views may have any
offset and stride. Memory that several storages map is compared by address; on the meta device,
where addresses mean nothing, it is compared by storage.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ensembles.handling.memory import memory_in
from ensembles.handling.numbers import checked_initialised

__all__ = ["Registration", "SharedMemory", "shared_memory"]


@dataclass(frozen=True, order=True)
class Registration:
    """Where a tensor is registered.

    Attributes:
        member: The member that registers it.
        name: Its name in that member.
        kind: "parameter" or "buffer".
    """

    member: str
    name: str
    kind: str

    def __str__(self) -> str:
        return f"{self.member}.{self.name}"


@dataclass(frozen=True)
class SharedMemory:
    """Bytes that belong to several registered tensors.

    Attributes:
        places: Every registration that these bytes belong to, in the order of members and names.
        bytes: How many bytes.
        whole: Whether these bytes are all of each of the tensors.
        objects: How many different tensor objects there are: a tied parameter is one.
    """

    places: tuple[Registration, ...]
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


def shared_memory(
    modules: Mapping[str, nn.Module],
) -> tuple[tuple[Registration, ...], tuple[SharedMemory, ...]]:
    """Every registered parameter and buffer, and every piece of memory that several of them share.

    The cost grows with the number of tensors, and with the number of elements only where views of
    one memory differ.

    Args:
        modules: The members by name.

    Raises:
        ValueError: If a parameter is lazy, or PyTorch does not show the memory of a tensor.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> places, shared = shared_memory({"0": layer, "1": layer})
        >>> [(memory.names, memory.members, memory.bytes) for memory in shared]
        [(('weight',), ('0', '1'), 24), (('bias',), ('0', '1'), 8)]
    """
    counter = count()
    views = [view for name, module in modules.items() for view in _views(name, module, counter)]
    distinct: dict[_Extent, list[_View]] = defaultdict(list)
    for view in views:
        distinct[view.extent].append(view)
    shared = [
        (order, memory)
        for cluster in _clusters(list(distinct))
        for order, memory in _pieces(cluster, distinct)
        if len(memory.places) > 1
    ]
    return (
        tuple(dict.fromkeys(view.place for view in views)),
        tuple(memory for _, memory in sorted(shared, key=lambda found: found[0])),
    )


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
    place: Registration
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
        place = Registration(member, name, kind)
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
