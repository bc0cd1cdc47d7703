"""Faults of seeds: construction or training depends on something other than the seed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from ensembles.faults.architectures import (
    ARCHITECTURES,
    CLASSES,
    WIDTH,
    Architecture,
    Network,
    sgd,
)
from ensembles.faults.fault import Place, fault
from ensembles.faults.members import separate
from ensembles.subject import Subject


def _repeating(
    architecture: Architecture, place: Place, plant: Callable[[list[Network]], Any]
) -> Subject:
    subject = separate(architecture, place, plant)
    return replace(subject, claims={"sharing": "independent", "determinism": "bitwise"})


@fault("members", "determinism")
def built_before_seed(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """All weights were drawn when the code was imported, and every model gets the same ones."""

    def drawn() -> list[dict[str, Any]]:
        return [architecture.network().state_dict() for _ in range(place.members)]

    early = drawn()

    def plant(members: list[Network]) -> None:
        for member, state in zip(members, early if broken else drawn(), strict=True):
            member.load_state_dict(state)

    subject = separate(architecture, place, plant)
    return replace(subject, claims={**subject.claims, "determinism": "bitwise"})


@fault("members", "determinism")
def seeds_in_constructor(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The constructor of one member seeds the global generators, so all later draws repeat."""

    def plant(members: list[Network]) -> None:
        for i in range(place.members):
            if broken and i == place.member:
                torch.manual_seed(0)
            members[i] = architecture.network()

    return _repeating(architecture, place, plant)


def _with_drawn_head(
    architecture: Architecture, place: Place, draw: Callable[[Tensor], Tensor]
) -> Subject:
    """The head's weight of one member is what `draw` makes of it."""

    def plant(members: list[Network]) -> None:
        weight = members[place.member].head.weight
        with torch.no_grad():
            weight.copy_(draw(weight.detach().clone()))

    return _repeating(architecture, place, plant)


def _from(seed: int, like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


@fault("members", "determinism")
def clock_for_seed(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A head is drawn from a generator that is seeded by the clock."""

    def draw(weight: Tensor) -> Tensor:
        return _from(time.time_ns() if broken else torch.initial_seed(), weight)

    return _with_drawn_head(architecture, place, draw)


@fault("members", "determinism")
def counter_for_seed(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A head is drawn from a generator that is seeded by a count of the networks so far."""
    made = count()

    def draw(weight: Tensor) -> Tensor:
        return _from(next(made) if broken else torch.initial_seed(), weight)

    return _with_drawn_head(architecture, place, draw)


@fault("members", "determinism")
def entropy_for_seed(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A head is made of random bytes of the operating system, which no seed reaches."""

    def draw(weight: Tensor) -> Tensor:
        size = weight.numel()
        number = os.urandom(size) if broken else torch.randint(256, (size,)).tolist()
        return (torch.tensor(list(number)) / 255 - 0.5).view_as(weight)

    return _with_drawn_head(architecture, place, draw)


@fault("members", "determinism")
def generator_of_its_own(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A head adds noise from a generator that was made once and goes on from run to run."""
    own = torch.Generator().manual_seed(0)

    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            noise = torch.randn(x.shape, generator=own if broken else None)
            return super().forward(x + 0.1 * noise)

    def plant(members: list[Network]) -> None:
        members[place.member].head = Noisy(WIDTH, CLASSES)

    return _repeating(architecture, place, plant)


@fault("members", "determinism")
def rate_by_run(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The optimizer counts runs, and anneals its learning rate from one run to the next."""
    runs = count()

    def optimizer(members: list[Network]) -> torch.optim.Optimizer:
        built = sgd(members)
        built.param_groups[0]["lr"] *= 0.5 ** next(runs) if broken else 1.0
        return built

    return replace(
        _repeating(architecture, place, lambda members: None),
        optimizer=optimizer,
    )


@fault("members", "determinism")
def unrepeatable_operation(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A head writes by `put_`, for which PyTorch has no deterministic implementation."""

    class Written(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            order = torch.arange(x.numel()).view_as(x)
            kept = torch.zeros_like(x)
            kept = kept.put(order, x.detach()) if broken else x.detach().clone()
            return super().forward(x + 0.1 * kept)

    def plant(members: list[Network]) -> None:
        members[place.member].head = Written(WIDTH, CLASSES)

    return _repeating(architecture, place, plant)


class _Ordered:
    """Factories by path: "mlp.2.3.1.0.set" has 2 members of 3 blocks, a set in block 0 of member 1.

    Processes that import a factory by its name cannot be given a closure.
    """

    def __init__(self, *words: str) -> None:
        self.words = words

    def __getattr__(self, word: str) -> _Ordered:
        if word.startswith("_"):
            raise AttributeError(word)
        return _Ordered(*self.words, word)

    def __call__(self) -> list[Network]:
        name, *numbers, kind = self.words
        count, layers, member, layer = map(int, numbers)
        architecture = replace(ARCHITECTURES[name], layers=layers)
        members = [architecture.network() for _ in range(count)]
        parts = ["first", "second", "third", "fourth", "fifth", "sixth"]
        drawn = {part: torch.randn(WIDTH) for part in (set(parts) if kind == "set" else parts)}
        with torch.no_grad():
            for parameter in members[member].blocks[layer].parameters():
                for part in parts:
                    parameter.view(-1)[: len(part)].add_(drawn[part][: len(part)].mean())
        return members


ordered = _Ordered()


# Two new processes take seconds, and do the same in every architecture.
@fault("members", "determinism", architectures=("mlp",))
def order_of_a_set(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Parts of a block are drawn in the order of a set of names, which is that of hashes."""
    numbers = (place.members, place.layers, place.member, place.layer)
    where = ".".join([architecture.name, *map(str, numbers)])
    path = f"ordered.{where}.{'set' if broken else 'list'}"
    factory = ordered
    for word in path.split(".")[1:]:
        factory = getattr(factory, word)
    return Subject(
        make=factory,
        batch=architecture.batch,
        claims={
            "sharing": "independent",
            "determinism": {"factory": f"{__name__}:{path}"},
        },
    )
