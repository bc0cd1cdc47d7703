"""Promise: a data loader gives the same batches from one seed, and no augmentation twice.

Catches the random stream that every worker repeats, and that starts anew in every epoch: a
generator held by the data set, which each worker copies, or a `worker_init_fn` with a fixed seed;
and the shuffled order that every epoch repeats, as `DistributedSampler` does without `set_epoch`.
The loss looks normal, and the data is augmented, or shuffled, far less than it seems.

How workers are asked is told in `ensembles.probes.streams`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any

from torch.utils.data import DataLoader

from ensembles.message import aligned, broken, counted, listed
from ensembles.message import seed as present_seed
from ensembles.probes.seeding import seeded
from ensembles.probes.streams import (
    DRAWS,
    INDICES,
    can_be_asked,
    digest_of_batch,
    orders_of,
    streams_of,
)

__all__ = ["LoaderDeterminism", "assert_loader_deterministic", "measure_loader_determinism"]

EPOCHS = 2
"""Epochs of a pass: with two, an order or a stream that is the same in each is seen."""

FALLING = 0.25
"""Share of places where indices fall from which on they are shuffled: at random half of them do,
and a quarter or less do in 1 of 230 orders of 16, but in 1 of 9 orders of 8 (Eulerian numbers)."""


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
        shuffled: Whether samples come in another order than that of their indices.
        one_order: Whether they come in one order in every epoch.
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
    shuffled: bool
    one_order: bool

    def __str__(self) -> str:
        head = (
            f"{self.differing} of {self.batches} batches differ between two passes from seed "
            f"{self.seed}, {counted(range(self.workers), 'worker')}, "
            f"{len(self.repeated)} repeated streams"
            + (", shuffled once for all epochs" if self.shuffled and self.one_order else "")
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
        drawn = streams_of(loader, epochs) if can_be_asked(loader) else None
        orders = orders_of(loader, epochs) if can_be_asked(loader) else ()
    return LoaderDeterminism(
        seed=seed,
        workers=loader.num_workers if isinstance(loader, DataLoader) else 0,
        epochs=epochs,
        batches=len(places),
        parted=differing[0] if differing else places[-1] if surplus else None,
        differing=len(differing) + surplus,
        random=drawn.random if drawn else (),
        repeated=drawn.repeated if drawn else (),
        asked=drawn is not None,
        shuffled=any(_is_shuffled(order) for order in orders),
        one_order=len(set(orders)) == 1,
    )


def assert_loader_deterministic(loading: LoaderDeterminism, *, augmented: bool = True) -> None:
    """Checks that batches repeat under the seed, and that no worker or epoch repeats another.

    Args:
        loading: From `measure_loader_determinism`.
        augmented: Whether samples are claimed to be augmented at random, as in training. Without,
            only that batches repeat under the seed is checked.

    Raises:
        ValueError: If augmentation is claimed and nothing random was found.
        AssertionError: If batches differ between two passes, two streams are one, or a shuffled
            order is that of every epoch.

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
    if loading.shuffled and loading.one_order:
        raise AssertionError(
            broken(
                "epochs are claimed to differ, and are shuffled into one order",
                [("order of the samples", f"the same in all {loading.epochs} epochs")],
                total=f"{loading.batches} batches",
                meaning="Every epoch makes the same batches of the same samples.",
                remedy="Usual cause: a DistributedSampler without sampler.set_epoch(epoch), or a "
                "sampler that seeds its generator in __iter__(). An order that is meant to stay "
                "is claimed with augmented=False.",
            )
        )


# --- passes -------------------------------------------------------------------------


def _pass(make_loader: Callable[[], Iterable[Any]], epochs: int, seed: int) -> list[list[str]]:
    with seeded(seed, algorithms=False):
        loader = make_loader()
        if not isinstance(loader, Iterable):
            raise ValueError(
                f"make_loader() returned an object of type {type(loader).__name__}, and no loader."
            )
        return [[digest_of_batch(batch) for batch in loader] for _ in range(epochs)]


def _is_shuffled(order: Sequence[Any]) -> bool:
    """Whether indices fall at a quarter of all places: at random they do at half of them.

    A rank's share of all, or several passes in order, begin anew now and then.
    """
    if not all(isinstance(index, Integral) for index in order):
        return False
    falls = len([1 for before, after in pairwise(order) if after < before])
    return falls > max(1, FALLING * len(order))


def _rows(repeated: Iterable[tuple[str, tuple[str, ...]]]) -> list[tuple[str, str]]:
    return [(what, f"one stream in {listed(places, 3)}") for what, places in repeated]
