"""Which random streams the workers of a loader draw from, and which of them are one stream.

Every worker is asked for the same few samples, several times, in two epochs: streams that are of
their own give other augmentations, and leave other generator states. Generators are found by
walking through the data set, so that one that repeats is seen behind another that does not.
"""

from __future__ import annotations

import random
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from typing_extensions import TypeIs

from ensembles.instruments.recording import digest

__all__ = [
    "DRAWS",
    "INDICES",
    "RepeatedStream",
    "Streams",
    "can_be_asked",
    "digest_of_batch",
    "orders_of",
    "streams_of",
]

INDICES = 4
"""Samples that every worker is asked for: one of them may be blank, or its own mirror image."""

DRAWS = 6
"""How often each: two workers with coins of their own agree 24 times in 2 of 10^7 cases."""

MOST_PARTS = 100
"""Elements of a list that is not looked into any more: it holds data, and no transforms."""

SAMPLE = "the augmented samples"
DATASET = "dataset"


class RepeatedStream(NamedTuple):
    """One stream of random numbers that is drawn from in several places.

    Attributes:
        what: `SAMPLE`, or a generator: the path to it from the data set, or a global one.
        places: Epochs, and workers where there are any.
    """

    what: str
    places: tuple[str, ...]

    @property
    def held(self) -> bool:
        """Whether it is a generator that the data set holds."""
        return self.what.startswith(DATASET)


@dataclass(frozen=True)
class Streams:
    """What draws random numbers while samples are loaded.

    Attributes:
        random: `SAMPLE`, and generators by name; empty where nothing draws.
        repeated: What several workers, or a worker in several epochs, have in common.
    """

    random: tuple[str, ...] = ()
    repeated: tuple[RepeatedStream, ...] = ()


def can_be_asked(loader: object) -> TypeIs[DataLoader[Any]]:
    """Whether workers can be asked for one sample several times.

    Example:
        >>> can_be_asked(DataLoader([1, 2])), can_be_asked([1, 2])
        (True, False)
    """
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def streams_of(loader: DataLoader[Any], epochs: int = 2) -> Streams:
    """Asks every worker for the same samples, in each of some epochs.

    Args:
        loader: A loader of a data set with indices.
        epochs: How many.

    Example:
        >>> streams_of(DataLoader([1, 2]))
        Streams(random=(), repeated=())
    """
    found = _asked(loader, epochs)
    used = [what for what, streams in found.items() if _is_random(what, streams)]
    streams = [RepeatedStream(what, places) for what in used for places in _alike(found[what])]
    return Streams(tuple(used), tuple(one for one in streams if len(one.places) > 1))


def orders_of(loader: DataLoader[Any], epochs: int = 2) -> tuple[tuple[Any, ...], ...]:
    """The indices of the samples in the order in which each epoch takes them; loads none.

    Example:
        >>> orders_of(DataLoader([1, 2, 3], batch_size=2))
        ((0, 1, 2), (0, 1, 2))
    """
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    return tuple(tuple(pytree.tree_leaves(list(sampler))) for _ in range(epochs))


def _asked(loader: DataLoader[Any], epochs: int) -> dict[str, dict[str, list[str]]]:
    """What every worker drew in every epoch: by what, then by where."""
    size = len(loader.dataset)  # type: ignore[arg-type]
    lanes = max(1, loader.num_workers)
    # Batches go to workers in turn, so that each worker gets the same row of requests.
    asked = [[i % size] for _ in range(DRAWS) for i in range(INDICES) for _ in range(lanes)]
    workers: dict[str, Any] = {}
    if loader.num_workers:
        workers = {
            "worker_init_fn": loader.worker_init_fn,
            "multiprocessing_context": loader.multiprocessing_context,
            "persistent_workers": loader.persistent_workers,
        }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few cores: the user's own loader has warned already
        probe: DataLoader[Any] = DataLoader(
            loader.dataset,
            batch_sampler=asked,
            num_workers=loader.num_workers,
            collate_fn=_Watch(loader.collate_fn),
            generator=loader.generator,
            **workers,
        )
    streams: dict[str, dict[str, list[str]]] = {}
    for epoch in range(epochs):
        for number, found in enumerate(probe):
            where = f"epoch {epoch}" + (f" worker {number % lanes}" if loader.num_workers else "")
            for what, state in found.items():
                streams.setdefault(what, {}).setdefault(where, []).append(state)
    return streams


def _alike(streams: Mapping[str, Sequence[str]]) -> Iterable[tuple[str, ...]]:
    """Where each different stream was drawn."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for where, stream in streams.items():
        groups.setdefault(tuple(stream), []).append(where)
    return map(tuple, groups.values())


def _is_random(what: str, streams: Mapping[str, Sequence[str]]) -> bool:
    """Whether it changes from draw to draw; a sample only against itself."""
    period = INDICES if what == SAMPLE else 1
    return any(
        len({stream[i] for i in range(start, len(stream), period)}) > 1
        for stream in streams.values()
        for start in range(period)
    )


class _Watch:
    """A collate function that returns digests of the batch and of every generator in reach.

    It runs in the worker, right after the sample was loaded. A wrapper around the data set would
    stand between it and the user's worker_init_fn.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: Any) -> dict[str, str]:
        info = get_worker_info()
        found = {SAMPLE: digest_of_batch(self.collate(samples))}
        found["torch (global)"] = digest(torch.get_rng_state())
        found["random (global)"] = digest(random.getstate())
        if "numpy" in sys.modules:
            found["numpy.random (global)"] = digest(
                _numbers(sys.modules["numpy"].random.get_state())
            )
        if info is not None:
            for name, generator in _generators(DATASET, info.dataset):
                found[name] = _state(generator)
        return found


def _generators(name: str, thing: Any) -> Iterator[tuple[str, Any]]:
    """Generators held below an object, with the path to them."""
    stack, seen = [(name, thing)], {0}
    while stack:
        path, value = stack.pop()
        if id(value) in seen or isinstance(value, (type, types.ModuleType, Tensor, str, bytes)):
            continue
        seen.add(id(value))
        if _state(value):
            yield path, value
        elif isinstance(value, Mapping):
            stack += [(f"{path}[{key!r}]", inner) for key, inner in value.items()]
        elif isinstance(value, (list, tuple)) and len(value) < MOST_PARTS:
            stack += [(f"{path}[{i}]", inner) for i, inner in enumerate(value)]
        elif isinstance(value, types.FunctionType):
            cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
            stack += [(f"{path}.{n}", cell.cell_contents) for n, cell in cells]
        elif hasattr(value, "__dict__"):
            stack += [(f"{path}.{key}", inner) for key, inner in vars(value).items()]


def _state(value: Any) -> str:
    """Digest of a generator's state; "" for what is no generator."""
    if isinstance(value, torch.Generator):
        return digest(value.get_state())
    if isinstance(value, random.Random):
        return digest(value.getstate())
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return digest(_numbers(value.bit_generator.state))
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return digest(_numbers(value.get_state()))
    return ""


def _numbers(state: Any) -> Any:
    """Without arrays, whose text is cut short."""
    return pytree.tree_map(lambda x: x.tolist() if hasattr(x, "tolist") else x, state)


def digest_of_batch(batch: Any) -> str:
    """Of a batch of any shape.

    Example:
        >>> digest_of_batch([torch.ones(2), 1]) == digest_of_batch([torch.ones(2), 1])
        True
    """
    leaves, shape = pytree.tree_flatten(batch)
    return digest([str(shape), *(digest(_plain(leaf)) for leaf in leaves)])


def _plain(leaf: Any) -> Any:
    return leaf if isinstance(leaf, Tensor) or not hasattr(leaf, "tolist") else leaf.tolist()
