"""Faults of sharing: weights claimed tied are copies, and subnets take a wrong route."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ensembles.faults.architectures import (
    GROUPS,
    WIDTH,
    Architecture,
    Network,
    Subnets,
    loss_of_members,
    sgd,
)
from ensembles.faults.fault import Place, fault
from ensembles.faults.members import separate
from ensembles.subject import Partition, Subject

# --- members with a common stem -----------------------------------------------------------------


def _with_common_stem(
    architecture: Architecture, place: Place, tie: Callable[[nn.Module], nn.Module]
) -> Subject:
    """The stem of one member is what `tie` makes of that of the others."""

    def plant(members: list[Network]) -> None:
        for network in members:
            network.stem = members[place.other].stem
        members[place.member].stem = tie(members[place.other].stem)

    claims = {
        "sharing": ["stem.*"],
        "ownership": {"*.stem.*": "tied", "*": "independent"},
        "coupling": "tied",
        "coverage": "complete",
    }
    return replace(separate(architecture, place, plant), claims=claims)


@fault("sharing", "sharing", "ownership", "coupling")
def cloned_stem(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A stem that is claimed tied is a copy in one member."""
    return _with_common_stem(
        architecture, place, lambda stem: copy.deepcopy(stem) if broken else stem
    )


@fault("sharing", "sharing", "ownership", "coupling")
def cache_by_member(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A stem that is claimed tied comes from a cache whose key has the member in it."""
    cache: dict[int, nn.Module] = {}

    def tie(stem: nn.Module) -> nn.Module:
        cache[place.other] = stem
        key = place.member if broken else place.other
        if key not in cache or key == place.member:
            cache[key] = architecture.stem()
        return cache[key]

    return _with_common_stem(architecture, place, tie)


@fault("sharing", "sharing", "ownership", "coverage")
def two_leaves(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A stem that is claimed tied has Parameters of its own over the same memory."""

    def tie(stem: nn.Module) -> nn.Module:
        if not broken:
            return stem
        again = copy.deepcopy(stem)
        for (path, weight), module in _parameters_with_modules(stem, again):
            setattr(module, path, nn.Parameter(weight.data))
        return again

    return _with_common_stem(architecture, place, tie)


def _parameters_with_modules(stem: nn.Module, again: nn.Module) -> list[tuple[Any, nn.Module]]:
    return [
        ((name.rpartition(".")[2], weight), again.get_submodule(name.rpartition(".")[0]))
        for name, weight in stem.named_parameters()
    ]


@fault("sharing", "ownership")
def wrong_factor(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Members share a network, and each has its own scale, but one member uses another's."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = architecture.network()
            # Fast weights of rank one, as in BatchEnsemble (Wen et al. 2020, arXiv:2002.06715).
            self.scales = nn.Parameter(1 + 0.1 * torch.randn(place.members, WIDTH))

        def forward(self, x: Tensor) -> list[Tensor]:
            rows = list(range(place.members))
            if broken:
                rows[place.member] = place.other
            features = self.network.features(x)
            return [self.network.head(features * self.scales[row]) for row in rows]

    return Subject(
        make=Scaled,
        batch=architecture.batch,
        optimizer=sgd,
        loss=loss_of_members,
        claims={
            "sharing": "distinct",
            "ownership": {"scales": "independent", "*": "tied"},
            "coupling": "tied",
            "coverage": "complete",
        },
    )


# --- a parent and its subnets -------------------------------------------------------------------


def _subnets(architecture: Architecture, plant: Callable[[Subnets], Any], **claims: Any) -> Subject:
    def make() -> Subnets:
        model = Subnets(architecture)
        plant(model)
        return model

    return Subject(
        make=make,
        batch=architecture.batch,
        optimizer=sgd,
        loss=loss_of_members,
        claims={
            "sharing": "distinct",
            "ownership": {
                # The stem's input has no groups: its rows are shared by all that start there.
                "stem.weight": Partition(times=GROUPS),
                "blocks.*": Partition(),
                "*": "independent",
            },
            "coupling": {"parent": "parent"},
            "coverage": "complete",
            **claims,
        },
    )


def _name(place: Place, shift: int = 1) -> str:
    return f"subnet_{place.member % GROUPS}_{shift}"


@fault("sharing", "ownership")
def untied_stem(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A subnet is tied to the parent, except for the stem, which is a copy."""

    def plant(model: Subnets) -> None:
        if broken:
            model.stems[_name(place)] = copy.deepcopy(model.stem)

    return _subnets(architecture, plant)


@fault("sharing", "ownership")
def untied_block(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A subnet computes with the detached weight of one of the parent's layers."""

    class Untied(Subnets):
        def weight(self, name: str, layer: int) -> Tensor:
            weight = super().weight(name, layer)
            here = (name, layer) == (_name(place), place.layer)
            return weight.detach() if broken and here else weight

    return replace(_subnets(architecture, lambda model: None), make=lambda: Untied(architecture))


@fault("sharing", "ownership")
def wrong_block(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """From one layer on, a subnet visits the groups that another should."""

    def plant(model: Subnets) -> None:
        if broken:
            first, *rest = model.steps[_name(place)][place.layer :]
            first.into, first.switch = (first.into + 1) % GROUPS, (first.switch + 1) % GROUPS
            for step in rest:
                step.into, step.source = (step.into + 1) % GROUPS, (step.source + 1) % GROUPS

    return _subnets(architecture, plant)


@fault("sharing", "ownership")
def empty_group(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A layer of a subnet reads a group that is empty there: its path is constantly zero."""

    def plant(model: Subnets) -> None:
        if broken:
            step = model.steps[_name(place)][place.layer]
            step.source = (step.source + 1) % GROUPS

    return _subnets(architecture, plant)


@fault("sharing", "ownership", architectures=("convnet",))
def norm_of_two_subnets(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """One BatchNorm belongs to two subnets, with statistics that fit neither."""

    def plant(model: Subnets) -> None:
        if broken:
            model.norms[_name(place)] = model.norms[_name(place, shift=0)]

    return _subnets(architecture, plant)


# --- what is computed, seen against the recorded graph ------------------------------------------


@fault("sharing", "graph", recorded=True)
def missing_switch(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The shortcut of a subnet stays in its group, but the main path moves to another."""

    def plant(model: Subnets) -> None:
        if broken:
            model.steps[_name(place)][place.layer].switch = 0

    return _subnets(architecture, plant)


class _Derived(nn.Module):
    """A layer that computes with the weights of the one that it wraps."""

    def __init__(self, layer: nn.Conv1d | nn.Conv2d, faithful: bool) -> None:
        super().__init__()
        self.layer, self.faithful = layer, faithful

    def forward(self, x: Tensor) -> Tensor:
        bias = self.layer.bias if self.faithful else None
        y: Tensor = self.layer._conv_forward(x, self.layer.weight, bias)
        return y


@fault("sharing", "ownership", "coverage", "graph", recorded=True)
def lost_bias(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A derived layer computes without the bias of the layer that it wraps."""

    def plant(members: list[Network]) -> None:
        network = members[place.member]
        conv = architecture.conv(4, 4, bias=True)
        network.blocks.append(_Derived(conv, not broken))

    return separate(architecture, place, plant)


@fault("sharing", "graph", recorded=True, architectures=("convnet",))
def lost_arguments(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A derived layer drops the stride and the padding of the layer that it wraps."""

    class Derived(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            if broken:
                return F.conv2d(x, self.weight)
            return super().forward(x)

    def plant(members: list[Network]) -> None:
        # In front, where the image is larger than the kernel however deep the network is.
        members[place.member].blocks.insert(0, Derived(4, 4, 3, stride=2, padding=1, bias=False))

    return separate(architecture, place, plant)


@fault("sharing", "graph", recorded=True)
def lost_activation(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A rewritten network leaves out the activation behind a block."""

    def plant(members: list[Network]) -> None:
        activation = nn.Identity() if broken else nn.Tanh()
        members[place.member].blocks.insert(place.layer + 1, activation)

    return separate(architecture, place, plant)
