"""Faults of members' start and data: they are alike where they are claimed to differ."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler

from ensembles.faults.architectures import WIDTH, Architecture, Network
from ensembles.faults.fault import Place, fault
from ensembles.faults.members import separate
from ensembles.subject import Subject

SAMPLES = 100


def _diverse(
    architecture: Architecture, place: Place, plant: Callable[[list[Network]], Any]
) -> Subject:
    subject = separate(architecture, place, plant)
    return replace(subject, claims={**subject.claims, "diversity": "independent"})


@fault("members", "diversity")
def copied_members(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A member is a deep copy of another: they start equal, and stay equal on equal data."""

    def plant(members: list[Network]) -> None:
        if broken:
            members[place.member] = copy.deepcopy(members[place.other])

    return _diverse(architecture, place, plant)


@fault("members", "diversity")
def one_state_dict(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Two members were loaded from the state_dict of one initialised network."""

    def plant(members: list[Network]) -> None:
        state = (members[place.other] if broken else architecture.network()).state_dict()
        members[place.member].load_state_dict(state)

    return _diverse(architecture, place, plant)


@fault("members", "diversity")
def partly_reset(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A copy was drawn anew in all layers except one block."""

    def plant(members: list[Network]) -> None:
        block = copy.deepcopy(members[place.other].blocks[place.layer])
        again = block if broken else architecture.block(layer=place.layer)
        members[place.member].blocks[place.layer] = again

    return _diverse(architecture, place, plant)


@fault("members", "diversity")
def same_seed(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The constructor sets a seed, so every member draws the same weights."""

    def plant(members: list[Network]) -> None:
        for i, _ in enumerate(members):
            if broken:
                torch.manual_seed(0)
            members[i] = architecture.network()

    return _diverse(architecture, place, plant)


@fault("members", "diversity")
def permuted_twin(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A member has another's hidden units in another order: other weights, the same function."""
    # Halves change places, so that the channels of an attention head stay together.
    order = torch.arange(WIDTH).roll(WIDTH // 2)

    def plant(members: list[Network]) -> None:
        source = members[place.other] if broken else architecture.network()
        state = copy.deepcopy(source.state_dict())
        for name, tensor in state.items():
            for axis in range(min(tensor.ndim, 2)):
                if state[name].shape[axis] == WIDTH:
                    state[name] = state[name].index_select(axis, order)
        members[place.member].load_state_dict(state)

    return _diverse(architecture, place, plant)


# The MLP's tensors are too small for a correlation to tell.
@fault("members", "diversity", architectures=("convnet", "attention"))
def perturbed_copies(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A member is another one with a little noise in every weight, so no number is the same."""

    def plant(members: list[Network]) -> None:
        source = members[place.other] if broken else architecture.network()
        state = {
            name: t + 1e-2 * torch.randn_like(t) if t.is_floating_point() else t
            for name, t in source.state_dict().items()
        }
        members[place.member].load_state_dict(state)

    return _diverse(architecture, place, plant)


# The MLP's tensors are too small for a weighted sum to tell.
@fault("members", "diversity", architectures=("convnet", "attention"))
def averaged_member(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A member is the mean of the others, weight by weight."""

    def plant(members: list[Network]) -> None:
        others = [architecture.network() for _ in members[1:]]
        if broken:
            others = [member for i, member in enumerate(members) if i != place.member]
        states = [other.state_dict() for other in others]
        mean = {
            name: torch.stack([state[name] for state in states]).mean(0)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in states[0].items()
        }
        members[place.member].load_state_dict(mean)

    return _diverse(architecture, place, plant)


@fault("members", "diversity")
def one_stream(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Members are drawn from one seed, each after one number more than the last."""

    def plant(members: list[Network]) -> None:
        seed = int(torch.randint(2**31, ()))
        for i in range(place.members):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed if broken else seed + i)
                torch.rand(i)
                members[i] = architecture.network()

    subject = separate(architecture, place, plant)
    return replace(subject, claims={**subject.claims, "diversity": "independent"})


# --- data ---------------------------------------------------------------------------------------


def _trained_on(
    architecture: Architecture, place: Place, data: Callable[[int], Iterable[Any]], claim: str
) -> Subject:
    subject = separate(architecture, place, lambda members: None)
    # The model is healthy: the other claims are those that do not look at training.
    return replace(subject, data=data, claims={"sharing": "independent", "data": claim})


@fault("members", "data")
def same_bootstrap(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Members are claimed bagged, but all get the same sample indices."""

    def data(member: int) -> Iterable[Any]:
        generator = torch.Generator().manual_seed(0 if broken else member)
        return torch.randint(SAMPLES, (SAMPLES,), generator=generator).tolist()

    return _trained_on(architecture, place, data, "bagged")


@fault("members", "data")
def bootstrap_without_replacement(
    architecture: Architecture, place: Place, broken: bool
) -> Subject:
    """Members are claimed bagged, but each sees every sample once, in its own order."""

    def data(member: int) -> Iterable[Any]:
        drawn = torch.randperm(SAMPLES) if broken else torch.randint(SAMPLES, (SAMPLES,))
        return drawn.tolist()

    return replace(_trained_on(architecture, place, data, "bagged"), data_size=SAMPLES)


@fault("members", "data")
def bootstrap_of_each_epoch(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Members are claimed bagged, but one draws its bootstrap anew whenever it is read."""

    def data(member: int) -> Iterable[Any]:
        drawn = RandomSampler(range(SAMPLES), replacement=True, num_samples=SAMPLES)
        return drawn if broken and member == place.member else list(drawn)

    return _trained_on(architecture, place, data, "bagged")


@fault("members", "data")
def unpaired_loaders(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Members are claimed to see the same batches, but every loader shuffles by itself."""

    def data(member: int) -> Iterable[Any]:
        generator = None if broken else torch.Generator().manual_seed(0)
        return RandomSampler(range(SAMPLES), generator=generator)

    return _trained_on(architecture, place, data, "paired")


@fault("members", "data")
def one_order(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Members are claimed to see different orders, but one generator seed shuffles for all."""

    def data(member: int) -> Iterable[Any]:
        generator = torch.Generator().manual_seed(0 if broken else member)
        return RandomSampler(range(SAMPLES), generator=generator)

    return _trained_on(architecture, place, data, "shuffled")


class _Augmented(Dataset[Tensor]):
    """Samples with noise from a generator of the data set, or from the worker's own."""

    def __init__(self, shape: tuple[int, ...], generator: torch.Generator | None) -> None:
        self.shape, self.generator = shape, generator

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        return index + torch.randn(self.shape, generator=self.generator)


@fault("members", "data")
def workers_of_one_stream(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Workers augment with a generator of the data set, which each of them copies in each epoch."""

    def data(member: int) -> Iterable[Any]:
        own = torch.Generator().manual_seed(0) if broken and member == place.member else None
        paired = torch.Generator().manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of machines with one core
            return DataLoader(
                _Augmented(architecture.shape, own), batch_size=3, num_workers=2, generator=paired
            )

    return _trained_on(architecture, place, data, "paired")


@fault("members", "determinism")
def loader_by_entropy(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """One member's loader shuffles by a seed of the operating system: no seed repeats its order."""

    def data(member: int) -> Iterable[Any]:
        unknown = broken and member == place.member
        drawn = torch.seed() if unknown else int(torch.randint(2**31, ()))
        return RandomSampler(range(SAMPLES), generator=torch.Generator().manual_seed(drawn))

    claims = {"sharing": "independent", "determinism": {"loaders": "plain"}}
    return replace(_trained_on(architecture, place, data, "shuffled"), claims=claims)


class _Seeds:
    """Seeds a worker by its number, or as PyTorch does."""

    def __init__(self, *, by_number: bool) -> None:
        self.by_number = by_number

    def __call__(self, worker: int) -> None:
        torch.manual_seed(worker if self.by_number else torch.initial_seed())


# Worker processes take their time, and do the same in every architecture.
@fault("members", "determinism", architectures=("mlp",))
def workers_by_number(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Workers are seeded by their number, so they augment alike in every epoch."""

    def data(member: int) -> Iterable[Any]:
        seeds = _Seeds(by_number=broken and member == place.member)
        samples = _Augmented(architecture.shape, None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of machines with one core
            return DataLoader(samples, batch_size=6, num_workers=1, worker_init_fn=seeds)

    claims = {"sharing": "independent", "determinism": {"loaders": "augmented"}}
    return replace(_trained_on(architecture, place, data, "paired"), claims=claims)


class _Epochs(DistributedSampler[Tensor]):
    """A sampler that shuffles by the epoch. It is told each epoch, or never."""

    def __init__(self, samples: Dataset[Tensor], *, told: bool) -> None:
        super().__init__(samples, num_replicas=1, rank=0)
        self.told = told

    def __iter__(self) -> Iterator[Any]:
        yield from super().__iter__()
        if self.told:
            self.set_epoch(self.epoch + 1)


@fault("members", "determinism")
def order_of_one_epoch(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A sampler is not told which epoch it is, so it shuffles alike in each of them."""

    def data(member: int) -> Iterable[Any]:
        samples = _Augmented(architecture.shape, None)
        epochs = _Epochs(samples, told=not (broken and member == place.member))
        return DataLoader(samples, batch_size=6, sampler=epochs)

    claims = {"sharing": "independent", "determinism": {"loaders": "augmented"}}
    return replace(_trained_on(architecture, place, data, "paired"), claims=claims)
