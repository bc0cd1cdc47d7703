"""What a data loader repeats: the same batches from one seed, but no random stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any

from torch.utils.data import DataLoader

from ensembles.checks.determinism.seeding import seeded
from ensembles.instruments.loader_rng import (
    RepeatedStream,
    can_be_asked,
    digest_of_batch,
    orders_of,
    streams_of,
)
from ensembles.message import aligned, counted, listed
from ensembles.present_run import seed as present_seed

__all__ = ["LoaderDeterminism", "measure_loader_determinism"]

EPOCHS = 2
"""Epochs of a pass: an order, or a stream, may be the same in each."""

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
        differs: (epoch, batch) of the first batch that differs between two passes from one seed.
        differing: How many batches differ.
        random: What draws random numbers while a sample is loaded: "the augmented samples", and
            generators by name. Empty where nothing does, or where no sample can be asked for.
        repeated: Streams that several workers, or a worker in several epochs, have in common.
        asked: Whether samples could be asked for; an `IterableDataset` gives what it gives.
        shuffled: Whether samples come in another order than that of their indices.
        one_order: Whether they come in one order in every epoch.
    """

    seed: int
    workers: int
    epochs: int
    batches: int
    differs: tuple[int, int] | None
    differing: int
    random: tuple[str, ...]
    repeated: tuple[RepeatedStream, ...]
    asked: bool
    shuffled: bool
    one_order: bool

    def __str__(self) -> str:
        head = (
            f"{self.differing or 'none'} of {self.batches} batches differ between two passes from "
            f"seed {self.seed}, {counted(range(self.workers), 'worker')}, "
            f"{counted(self.repeated, 'repeated stream')}"
            + (", shuffled once for all epochs" if self.shuffled and self.one_order else "")
        )
        lines = aligned(
            [(each.what, f"one stream in {listed(each.places, 3)}") for each in self.repeated]
        )
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
        none of 4 batches differ between two passes from seed 0, 0 workers, 0 repeated streams
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
        differs=differing[0] if differing else places[-1] if surplus else None,
        differing=len(differing) + surplus,
        random=drawn.random if drawn else (),
        repeated=drawn.repeated if drawn else (),
        asked=drawn is not None,
        shuffled=any(_is_shuffled(order) for order in orders),
        one_order=len(set(orders)) == 1,
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
