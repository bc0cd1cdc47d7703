"""Promise: a data loader gives the same batches from one seed, and no augmentation twice.

Catches the random stream that every worker repeats, and that starts anew in every epoch: a
generator held by the data set, which each worker copies, or a `worker_init_fn` with a fixed seed.
The loss looks normal, and the data is augmented far less than it seems.

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
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ensembles.message import aligned, broken, counted, listed
from ensembles.message import seed as present_seed
from ensembles.probes.recording import digest
from ensembles.probes.seeding import seeded

__all__ = ["LoaderDeterminism", "assert_loader_deterministic", "measure_loader_determinism"]

EPOCHS = 2
INDICES = 4
"""Samples that every worker is asked for: one of them may be blank, or its own mirror image."""
DRAWS = 6
"""How often each: two workers with coins of their own agree 24 times in 2 of 10^7 cases."""

SAMPLE = "the augmented samples"


@dataclass(frozen=True)
class LoaderDeterminism:
    """What a loader repeats: from one seed it should, between workers and epochs it should not.

    Attributes:
        seed: The seed of both passes that were compared.
        workers: The number of worker processes; 0 where the main process loads.
        epochs: How many epochs.
        batches: How many batches a pass has, over all epochs.
        parted: (epoch, batch) of the first batch that differs between two passes from one seed.
        differing: How many batches differ.
        random: What draws random numbers while a sample is loaded: "the augmented samples", and
            generators by name. Empty where nothing does, or where no sample can be asked for.
        repeated: (what, places): one stream that several workers, or a worker in several epochs,
            have in common.
        asked: Whether samples could be asked for; an `IterableDataset` gives what it gives.
    """

    seed: int
    workers: int
    epochs: int
    batches: int
    parted: tuple[int, int] | None
    differing: int
    random: tuple[str, ...]
    repeated: tuple[tuple[str, tuple[str, ...]], ...]
    asked: bool

    def __str__(self) -> str:
        head = (
            f"{self.differing} of {self.batches} batches differ between two passes from seed "
            f"{self.seed}, {counted(range(self.workers), 'worker')}, "
            f"{len(self.repeated)} repeated streams"
        )
        lines = aligned(_rows(self.repeated))
        return "\n".join([head, *(f"  {line}" for line in lines)])


def measure_loader_determinism(
    make_loader: Callable[[], Iterable[Any]], *, epochs: int = EPOCHS, seed: int | None = None
) -> LoaderDeterminism:
    """Loads everything twice from one seed, then asks every worker for the same samples.

    Args:
        make_loader: Builds the loader anew, with its data set; called after the seed was set.
        epochs: How many epochs each pass has, at least 2.
        seed: Of both passes; by default that of the present run.

    Returns:
        The measurement. The random generators are as before.

    Raises:
        ValueError: If `make_loader` is no function, returns no loader, or gives no batches.

    Example:
        >>> data = [torch.full((2,), float(i)) for i in range(4)]
        >>> print(measure_loader_determinism(
        ...     lambda: torch.utils.data.DataLoader(data, batch_size=2, shuffle=True), seed=0))
        0 of 4 batches differ between two passes from seed 0, 0 workers, 0 repeated streams
    """
    if not callable(make_loader):
        raise ValueError(
            f"make_loader=... is an object of type {type(make_loader).__name__}: a loader is "
            "built twice, so give a function that builds it, make_loader=lambda: ..."
        )
    if epochs < 2:
        raise ValueError(
            f"epochs={epochs}: streams are compared between epochs, so give 2 or more."
        )
    seed = present_seed.get() if seed is None else seed
    first, second = (_pass(make_loader, epochs, seed) for _ in range(2))
    places = [(epoch, i) for epoch, batches in enumerate(first) for i, _ in enumerate(batches)]
    if not places:
        raise ValueError("the loader gives no batches: there is nothing to compare.")
    flat = [[d for batches in side for d in batches] for side in (first, second)]
    differing = [place for place, a, b in zip(places, *flat, strict=False) if a != b]
    surplus = abs(len(flat[0]) - len(flat[1]))
    with seeded(seed, algorithms=False):
        loader = make_loader()
        asked = False
        streams: dict[str, dict[str, list[str]]] = {}
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            asked, streams = True, _streams(loader, epochs)
    used = [what for what, found in streams.items() if _is_random(what, found)]
    return LoaderDeterminism(
        seed=seed,
        workers=loader.num_workers if isinstance(loader, DataLoader) else 0,
        epochs=epochs,
        batches=len(places),
        parted=differing[0] if differing else places[-1] if surplus else None,
        differing=len(differing) + surplus,
        random=tuple(used),
        repeated=tuple(
            (what, places) for what in used for places in _alike(streams[what]) if len(places) > 1
        ),
        asked=asked,
    )


def assert_loader_deterministic(loading: LoaderDeterminism, *, augmented: bool = True) -> None:
    """Checks that batches repeat under the seed, and that no worker or epoch repeats another.

    Args:
        loading: From `measure_loader_determinism`.
        augmented: Whether samples are claimed to be augmented at random. Without, only that
            batches repeat under the seed is checked.

    Raises:
        ValueError: If augmentation is claimed and nothing random was found.
        AssertionError: If batches differ between two passes, or two streams are one.

    Example:
        >>> data = [torch.full((2,), float(i)) for i in range(4)]
        >>> assert_loader_deterministic(measure_loader_determinism(
        ...     lambda: torch.utils.data.DataLoader(data, shuffle=True)), augmented=False)
    """
    __tracebackhide__ = True
    if loading.parted is not None:
        epoch, batch = loading.parted
        raise AssertionError(
            broken(
                f"batches are claimed to repeat from seed {loading.seed}, and do not",
                [(f"epoch {epoch}, batch {batch}", "the first that differs")],
                total=f"{loading.differing} of {loading.batches} batches",
                meaning="Two runs from one seed see other data.",
                remedy="Usual cause: augmentation from numpy.random.default_rng() or random() "
                "seeded by the clock, or a data set in the order of a set or of os.listdir. "
                "Draw from torch's generator in the worker.",
            )
        )
    if not augmented:
        return
    if not loading.random:
        raise ValueError(
            "augmentation is claimed, and "
            + (
                f"{INDICES} samples were the same each of {DRAWS} times: nothing random is drawn. "
                if loading.asked
                else "an IterableDataset, or what is no DataLoader, cannot be asked for one "
                "sample several times. "
            )
            + "For data without augmentation check augmented=False."
        )
    if loading.repeated:
        held = any(what.startswith("dataset") for what, _ in loading.repeated)
        raise AssertionError(
            broken(
                "workers and epochs are claimed to augment each in its own way, and repeat "
                "each other",
                _rows(loading.repeated),
                total=f"{counted(loading.repeated, 'repeated stream')}, "
                f"{counted(range(loading.workers), 'worker')}, {loading.epochs} epochs",
                meaning="The same random numbers augment other samples over and over.",
                remedy=(
                    "Usual cause: a generator that is made with the data set: each worker copies "
                    "it, in each epoch anew. "
                    if held
                    else "Usual cause: a worker_init_fn that seeds with a constant or with the "
                    "worker number, or a generator in a place that was not looked through. "
                )
                + "In worker_init_fn, seed it with torch.initial_seed(), which is another in "
                "every worker and epoch.",
            )
        )


# --- passes and streams -------------------------------------------------------------------------


def _pass(make_loader: Callable[[], Iterable[Any]], epochs: int, seed: int) -> list[list[str]]:
    with seeded(seed, algorithms=False):
        loader = make_loader()
        if not isinstance(loader, Iterable):
            raise ValueError(
                f"make_loader() returned an object of type {type(loader).__name__}, and no loader."
            )
        return [[_digest(batch) for batch in loader] for _ in range(epochs)]


def _streams(loader: DataLoader[Any], epochs: int) -> dict[str, dict[str, list[str]]]:
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


def _rows(repeated: Iterable[tuple[str, tuple[str, ...]]]) -> list[tuple[str, str]]:
    return [(what, f"one stream in {listed(places, 3)}") for what, places in repeated]


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
        found = {SAMPLE: _digest(self.collate(samples))}
        found["torch (global)"] = digest(torch.get_rng_state())
        found["random (global)"] = digest(random.getstate())
        if "numpy" in sys.modules:
            found["numpy.random (global)"] = digest(
                _numbers(sys.modules["numpy"].random.get_state())
            )
        if info is not None:
            for name, generator in _generators("dataset", info.dataset):
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
        elif isinstance(value, (list, tuple)) and len(value) < 100:  # transforms, and no data
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


def _digest(batch: Any) -> str:
    leaves, shape = pytree.tree_flatten(batch)
    return digest([str(shape), *(digest(_plain(leaf)) for leaf in leaves)])


def _plain(leaf: Any) -> Any:
    return leaf if isinstance(leaf, Tensor) or not hasattr(leaf, "tolist") else leaf.tolist()
