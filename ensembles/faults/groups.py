"""Faults of optimizer groups: parameters are missing, listed twice, stale, or at rate zero."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ensembles.faults.architectures import CLASSES, WIDTH, Architecture, Network, sgd
from ensembles.faults.fault import Place, fault
from ensembles.faults.members import separate
from ensembles.subject import Subject


def _healthy(architecture: Architecture, place: Place) -> Subject:
    return separate(architecture, place, lambda members: None)


@fault("training", "coverage")
def not_in_optimizer(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The groups were made by hand, but they leave out a block of one member."""

    def optimizer(members: list[Network]) -> torch.optim.Optimizer:
        forgotten = list(members[place.member].blocks[place.layer].parameters()) if broken else []
        every = nn.ModuleList(members).parameters()
        return torch.optim.SGD([p for p in every if not any(p is f for f in forgotten)], lr=0.1)

    return replace(_healthy(architecture, place), optimizer=optimizer)


@fault("training", "coverage")
def stale_optimizer(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The head was replaced after the optimizer was built."""

    class Trained(nn.ModuleList):
        def __init__(self) -> None:
            super().__init__([architecture.network() for _ in range(place.members)])
            before = sgd(self)
            self[place.member].head = nn.Linear(WIDTH, CLASSES)
            self.optimizer = before if broken else sgd(self)

    def optimizer(model: Trained) -> torch.optim.Optimizer:
        return model.optimizer

    return replace(_healthy(architecture, place), make=Trained, optimizer=optimizer)


@fault("training", "coverage")
def optimizer_of_a_copy(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The optimizer was built for the model that was copied before training."""

    def optimizer(members: list[Network]) -> torch.optim.Optimizer:
        return sgd(copy.deepcopy(members) if broken else members)

    return replace(_healthy(architecture, place), optimizer=optimizer)


@fault("training", "coverage")
def optimizer_of_another(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Every member has an optimizer, but one of them got the parameters of another member."""

    def optimizers(members: list[Network]) -> list[torch.optim.Optimizer]:
        trained = list(members)
        if broken:
            trained[place.member] = members[place.other]
        return [sgd(network) for network in trained]

    return replace(_healthy(architecture, place), optimizer=optimizers)


@fault("training", "coverage")
def twice_in_optimizer(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A weight is listed twice, so it is stepped twice."""

    def optimizer(members: list[Network]) -> torch.optim.Optimizer:
        again = [members[place.member].head.weight] if broken else []
        return torch.optim.SGD([*nn.ModuleList(members).parameters(), *again], lr=0.1)

    return replace(_healthy(architecture, place), optimizer=optimizer)


@fault("training", "coverage")
def in_two_optimizers(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """One optimizer is for matrices and one for the rest, but one matrix is in both."""

    def optimizers(members: list[Network]) -> list[torch.optim.Optimizer]:
        every = list(nn.ModuleList(members).parameters())
        matrices = [p for p in every if p.ndim > 1]
        rest = [p for p in every if p.ndim <= 1]
        again = [members[place.member].head.weight] if broken else []
        return [torch.optim.SGD(matrices, lr=0.1), torch.optim.SGD([*rest, *again], lr=0.01)]

    return replace(_healthy(architecture, place), optimizer=optimizers)


@fault("training", "coverage")
def member_added_later(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A member was added to the ensemble after the optimizer was built."""

    class Grown(nn.ModuleList):
        def __init__(self) -> None:
            super().__init__([architecture.network() for _ in range(place.members - 1)])
            before = sgd(self)
            self.insert(place.member, architecture.network())
            self.optimizer = before if broken else sgd(self)

    def optimizer(model: Grown) -> torch.optim.Optimizer:
        return model.optimizer

    return replace(_healthy(architecture, place), make=Grown, optimizer=optimizer)


@fault("training", "coverage")
def converted_after_optimizer(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A head was weight-normalised after the optimizer was built: its weight is two tensors now."""

    class Converted(nn.ModuleList):
        def __init__(self) -> None:
            super().__init__([architecture.network() for _ in range(place.members)])
            before = sgd(self)
            converted: Any = self[place.member]
            nn.utils.parametrizations.weight_norm(converted.head)
            self.optimizer = before if broken else sgd(self)

    def optimizer(model: Converted) -> torch.optim.Optimizer:
        return model.optimizer

    return replace(_healthy(architecture, place), make=Converted, optimizer=optimizer)


@fault("training", "coverage")
def rate_of_zero(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A block is in a group of its own, whose learning rate is 0."""

    def optimizer(members: list[Network]) -> torch.optim.Optimizer:
        block = list(members[place.member].blocks[place.layer].parameters())
        every = nn.ModuleList(members).parameters()
        rest = [p for p in every if not any(p is own for own in block)]
        rate = 0.0 if broken else 0.01
        groups: list[dict[str, Any]] = [{"params": rest}, {"params": block, "lr": rate}]
        return torch.optim.SGD(groups, lr=0.1)

    return replace(_healthy(architecture, place), optimizer=optimizer)
