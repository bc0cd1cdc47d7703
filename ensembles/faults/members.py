"""Faults of members that are claimed separate, but are one network, mix, or read each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ensembles.faults.architectures import (
    WIDTH,
    Architecture,
    Ensemble,
    Network,
    cross_entropy,
    loss_of_members,
    sgd,
)
from ensembles.faults.fault import INDEPENDENT, Place, fault
from ensembles.subject import Model, Outputs, Subject

__all__ = ["Masked", "separate", "subject_of", "together"]


def separate(
    architecture: Architecture, place: Place, plant: Callable[[list[Network]], Any]
) -> Subject:
    """A list of members, into which `plant` puts a defect.

    Example:
        >>> from ensembles.faults.architectures import ARCHITECTURES
        >>> len(separate(ARCHITECTURES["mlp"], Place(), lambda members: None).make())
        2
    """

    def make() -> list[Network]:
        members = [architecture.network() for _ in range(place.members)]
        plant(members)
        return members

    return subject_of(make, architecture)


def together(
    architecture: Architecture,
    place: Place,
    ensemble: Callable[[Sequence[Network]], nn.Module],
    *,
    outputs: Outputs | None = None,
) -> Subject:
    """Members inside one module, which `ensemble` makes of them.

    Example:
        >>> from ensembles.faults.architectures import ARCHITECTURES
        >>> type(together(ARCHITECTURES["mlp"], Place(), Ensemble).make()).__name__
        'Ensemble'
    """

    def make() -> nn.Module:
        return ensemble([architecture.network() for _ in range(place.members)])

    return subject_of(
        make, architecture, outputs=outputs, members=lambda model: list(model.members)
    )


def subject_of(
    make: Callable[[], Model],
    architecture: Architecture,
    *,
    claims: Mapping[str, Any] = INDEPENDENT,
    **more: Any,
) -> Subject:
    """Members that claim to be independent, with the optimizer and the loss of all subjects here.

    Example:
        >>> from ensembles.faults.architectures import ARCHITECTURES
        >>> subject_of(lambda: nn.Linear(2, 2), ARCHITECTURES["mlp"]).claims["coverage"]
        'complete'
    """
    return Subject(
        make=make,
        batch=architecture.batch,
        optimizer=sgd,
        loss=loss_of_members,
        claims=claims,
        **more,
    )


# --- one network under several names ------------------------------------------------------------


@fault("members", "sharing", "ownership", "coupling")
def same_module(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """One module is in the list of members twice."""

    def plant(members: list[Network]) -> None:
        if broken:
            members[place.member] = members[place.other]

    return separate(architecture, place, plant)


@fault("members", "sharing", "ownership", "coupling")
def shared_layer(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A block was made once, as by a default argument, and is part of two members."""

    def plant(members: list[Network]) -> None:
        block = architecture.block(layer=place.layer)
        members[place.other].blocks[place.layer] = block
        again = block if broken else architecture.block(layer=place.layer)
        members[place.member].blocks[place.layer] = again

    return separate(architecture, place, plant)


def _sharing_a_part(
    architecture: Architecture, place: Place, broken: bool, part: Callable[[], nn.Module]
) -> Subject:
    """Two members have the same object before a block, from a default argument or a registry."""

    def plant(members: list[Network]) -> None:
        first = part()
        for member in (place.other, place.member):
            again = first if broken or member == place.other else part()
            members[member].blocks.insert(place.layer, again)

    return separate(architecture, place, plant)


class _Swish(nn.Module):
    """x sigmoid(b x) with a learned b for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.steepness = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x * self.steepness.view(-1, *[1] * (x.ndim - 2)))


@fault("members", "sharing", "ownership", "coupling")
def shared_activation(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """An activation with parameters is a default argument, so two members have the same one."""
    return _sharing_a_part(architecture, place, broken, _Swish)


@fault("members", "sharing", "ownership", "coupling")
def shared_norm(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A norm comes from a registry of instances, so two members have the same one."""
    return _sharing_a_part(architecture, place, broken, lambda: nn.GroupNorm(1, WIDTH))


@fault("members", "sharing", "ownership", "coupling")
def cache_without_member(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A cached function makes the layers, but its key leaves out the member."""

    def plant(members: list[Network]) -> None:
        cache: dict[Any, nn.Module] = {}
        for member in (place.other, place.member):
            key = (WIDTH, place.layer) if broken else (WIDTH, place.layer, member)
            if key not in cache:
                cache[key] = architecture.conv(WIDTH, WIDTH)
            members[member].blocks.insert(place.layer, cache[key])

    return separate(architecture, place, plant)


@fault("members", "sharing", "coupling", "coverage")
def assigned_snapshots(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Two members were loaded from one state_dict with assign=True: their weights are its own."""

    def plant(members: list[Network]) -> None:
        snapshot = members[place.other].state_dict()
        members[place.member].load_state_dict(snapshot, assign=broken)

    return separate(architecture, place, plant)


@fault("members", "sharing", "coupling", "coverage")
def overlapping_memory(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The heads are slices of one flat tensor, but the slices overlap by one row."""

    def plant(members: list[Network]) -> None:
        length = members[0].head.weight.numel()
        step = length - WIDTH if broken else length
        flat = 0.5 * torch.randn(length * len(members))
        for member, network in enumerate(members):
            view = flat[step * member : step * member + length].view_as(network.head.weight)
            network.head.weight = nn.Parameter(view)

    return separate(architecture, place, plant)


@fault("members", "sharing", "coupling", architectures=("convnet",))
def shared_statistics(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The running statistics of a BatchNorm were assigned, so both members update them."""

    def plant(members: list[Network]) -> None:
        norms: list[Any] = [network.blocks[place.layer].bn1 for network in members]
        mine, other = norms[place.member], norms[place.other]
        mine.running_mean = other.running_mean if broken else other.running_mean.clone()

    return separate(architecture, place, plant)


class Masked(nn.Linear):
    """A linear layer with a pruning mask.

    Example:
        >>> Masked(nn.Linear(3, 2), torch.zeros(2, 3)).weight.shape
        torch.Size([2, 3])
    """

    def __init__(self, layer: nn.Linear, mask: Tensor) -> None:
        super().__init__(layer.in_features, layer.out_features)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return F.linear(x, self.weight * self.get_buffer("mask"), self.bias)


@fault("members", "sharing")
def shared_mask(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Two members hold one pruning mask: whoever prunes one of them later prunes both."""

    def plant(members: list[Network]) -> None:
        masks = [torch.ones_like(network.head.weight) for network in members]
        if broken:
            masks[place.member] = masks[place.other]
        for network, mask in zip(members, masks, strict=True):
            mask[0, 0] = 0
            network.head = Masked(network.head, mask)

    return separate(architecture, place, plant)


# --- members that follow each other -------------------------------------------------------------


@fault("members", "coupling")
def coupled_loss(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The loss is that of the mean prediction, but members are claimed independent."""

    def loss(outputs: Mapping[str, Tensor]) -> Tensor:
        if broken:
            return cross_entropy(torch.stack(list(outputs.values())).mean(0))
        return loss_of_members(outputs)

    return replace(separate(architecture, place, lambda members: None), loss=loss)


@fault("members", "coupling")
def common_target(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A loss pulls members to their detached mean: no gradient couples them, but all agree."""

    def loss(outputs: Mapping[str, Tensor]) -> Tensor:
        logits = torch.stack(list(outputs.values()))
        target = logits.mean(0) if broken else torch.zeros_like(logits[0])
        return loss_of_members(outputs) + (logits - target.detach()).square().mean()

    return replace(separate(architecture, place, lambda members: None), loss=loss)


@fault("members", "coupling")
def common_weights(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A penalty pulls members' weights to their mean: no prediction is read, but all agree."""
    trained: list[Network] = []

    def plant(members: list[Network]) -> None:
        trained[:] = members

    def loss(outputs: Mapping[str, Tensor]) -> Tensor:
        total = loss_of_members(outputs)
        for alike in zip(*(member.parameters() for member in trained), strict=True):
            weights = torch.stack(alike)
            centre = weights.mean(0) if broken else torch.zeros_like(weights[0])
            total = total + 0.1 * (weights - centre.detach()).square().sum()
        return total

    return replace(separate(architecture, place, plant), loss=loss)


@fault("members", "coupling")
def foreign_features(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The head of one member also reads the detached features of another member."""

    class Reading(Ensemble):
        def forward(self, x: Tensor) -> list[Tensor]:
            features = [member.features(x) for member in self.members]
            if broken:
                features[place.member] = features[place.member] + features[place.other].detach()
            return [member.head(seen) for member, seen in zip(self.members, features, strict=True)]

    return together(architecture, place, Reading)


@fault("members", "coupling")
def swapped_outputs(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """An output has the name of one member, but another member computes it."""

    class Swapped(Ensemble):
        def forward(self, x: Tensor) -> list[Tensor]:
            outputs = [member(x) for member in self.members]
            if broken:
                one, two = place.member, place.other
                outputs[one], outputs[two] = outputs[two], outputs[one]
            return outputs

    return together(architecture, place, Swapped)


@fault("members", "coupling")
def mixed_by_chance(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """In about half of the training calls two members swap features: mixup of the wrong axis."""

    class Mixing(Ensemble):
        def forward(self, x: Tensor) -> list[Tensor]:
            features = [member.features(x) for member in self.members]
            mixed = self.training and float(torch.rand(())) < 0.5
            if mixed and broken:
                one, two = place.member, place.other
                features[one], features[two] = features[two], features[one]
            return [member.head(seen) for member, seen in zip(self.members, features, strict=True)]

    return together(architecture, place, Mixing)


@fault("members", "coverage")
def list_members(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Members are in a Python list, so parameters() lists none of their parameters."""

    class Weighted(Ensemble):
        def __init__(self, members: Sequence[nn.Module]) -> None:
            super().__init__(members)
            if broken:
                del self.members
                self.members = list(members)
            self.temperature = nn.Parameter(torch.ones(len(members)))

        def forward(self, x: Tensor) -> list[Tensor]:
            pairs = zip(self.members, self.temperature.unbind(), strict=True)
            return [member(x) * temperature for member, temperature in pairs]

    return together(architecture, place, Weighted)
