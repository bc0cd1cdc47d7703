"""Faults of members: claimed separate, they are one network, mix, or read each other."""

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
    Packed,
    cross_entropy,
    loss_of_members,
    sgd,
)
from ensembles.faults.fault import INDEPENDENT, Fault, Place, fault
from ensembles.subject import Model, Outputs, Subject, split_axis

__all__ = ["FAULTS", "Masked", "separate", "side_by_side", "together"]


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

    return _subject(make, architecture)


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

    return _subject(make, architecture, outputs=outputs, members=lambda model: list(model.members))


def side_by_side(
    architecture: Architecture, place: Place, plant: Callable[[Packed], Any]
) -> Subject:
    """Members in the channels of grouped layers, into which `plant` puts a defect.

    Storage cannot tell them apart, so that sharing is claimed of the whole only.

    Example:
        >>> from ensembles.faults.architectures import ARCHITECTURES
        >>> side_by_side(ARCHITECTURES["mlp"], Place(), lambda packed: None).claims["sharing"]
        'distinct'
    """

    def make() -> Packed:
        packed = Packed(architecture, place.members)
        plant(packed)
        return packed

    return _subject(make, architecture, claims={**INDEPENDENT, "sharing": "distinct"})


def _subject(
    make: Callable[[], Model],
    architecture: Architecture,
    *,
    claims: Mapping[str, Any] = INDEPENDENT,
    **more: Any,
) -> Subject:
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


@fault("members", "sharing", "coupling", "coverage")
def assigned_snapshots(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Two members were loaded from one state_dict with assign=True: their weights are its own."""

    def plant(members: list[Network]) -> None:
        snapshot = members[place.other].state_dict()
        members[place.member].load_state_dict(snapshot, assign=broken)

    return separate(architecture, place, plant)


@fault("members", "sharing", "coupling", "coverage")
def overlapping_memory(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The heads are slices of one flat tensor, and the slices overlap by one row."""

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
    """The running statistics of a BatchNorm were assigned, and both members update them."""

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


# --- packed members that mix --------------------------------------------------------------------


@fault("members", "ownership", "coupling")
def leaky_group(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """One layer between grouped layers has groups=1."""

    def plant(packed: Packed) -> None:
        wide = WIDTH * place.members
        groups = 1 if broken else place.members
        packed.between[place.layer] = architecture.conv(wide, wide, groups=groups)

    return side_by_side(architecture, place, plant)


@fault("members", "ownership", "coupling")
def channel_shuffle(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Channels are shuffled between the groups of different members."""

    def plant(packed: Packed) -> None:
        # Within a group of one channel nothing is shuffled.
        packed.between[place.layer] = _Shuffle(place.members if broken else 1)

    return side_by_side(architecture, place, plant)


class _Shuffle(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        samples, channels, *positions = x.shape
        grouped = x.view(samples, self.groups, channels // self.groups, *positions)
        return grouped.transpose(1, 2).flatten(1, 2)


@fault("members", "ownership", "coupling")
def joint_norm(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A norm takes its mean over the channels of all members."""

    def plant(packed: Packed) -> None:
        groups = 1 if broken else place.members
        packed.between[place.layer] = nn.GroupNorm(groups, WIDTH * place.members)

    return side_by_side(architecture, place, plant)


@fault("members", "ownership", "coupling")
def wrong_reshape(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Packed logits are read as (class, member), and they lie as (member, class)."""

    def plant(packed: Packed) -> None:
        packed.between.append(_Shuffle(place.members) if broken else nn.Identity())
        packed.blocks.append(
            architecture.convolution(
                WIDTH * place.members, 6 * place.members, 1, groups=place.members
            )
        )
        packed.head = architecture.convolution(
            6 * place.members, 3 * place.members, 1, groups=place.members
        )

    return side_by_side(architecture, place, plant)


@fault("members", "ownership", "coupling")
def mixed_rows(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Logits stacked as (sample, member, class) are viewed as (member, sample, class)."""

    class Stacked(Ensemble):
        def forward(self, x: Tensor) -> Tensor:
            logits = torch.stack([member(x) for member in self.members], 1)
            samples, members, classes = logits.shape
            if broken:
                return logits.view(members, samples, classes)
            return logits.transpose(0, 1)

    return together(architecture, place, Stacked, outputs=split_axis(0))


# --- members that follow each other -------------------------------------------------------------


@fault("members", "coupling")
def coupled_loss(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The loss is that of the mean prediction, and members are claimed independent."""

    def loss(outputs: Mapping[str, Tensor]) -> Tensor:
        if broken:
            return cross_entropy(torch.stack(list(outputs.values())).mean(0))
        return loss_of_members(outputs)

    return replace(separate(architecture, place, lambda members: None), loss=loss)


@fault("members", "coupling")
def common_target(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Members are drawn to their detached mean: no gradient flows between them, and all agree."""

    def loss(outputs: Mapping[str, Tensor]) -> Tensor:
        logits = torch.stack(list(outputs.values()))
        target = logits.mean(0) if broken else torch.zeros_like(logits[0])
        return loss_of_members(outputs) + (logits - target.detach()).square().mean()

    return replace(separate(architecture, place, lambda members: None), loss=loss)


@fault("members", "coupling")
def foreign_features(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """One member's head reads the features of another too, detached."""

    class Reading(Ensemble):
        def forward(self, x: Tensor) -> list[Tensor]:
            features = [member.features(x) for member in self.members]
            if broken:
                features[place.member] = features[place.member] + features[place.other].detach()
            return [member.head(seen) for member, seen in zip(self.members, features, strict=True)]

    return together(architecture, place, Reading)


@fault("members", "coupling")
def swapped_outputs(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The output that is called one member's is computed by another."""

    class Swapped(Ensemble):
        def forward(self, x: Tensor) -> list[Tensor]:
            outputs = [member(x) for member in self.members]
            if broken:
                one, two = place.member, place.other
                outputs[one], outputs[two] = outputs[two], outputs[one]
            return outputs

    return together(architecture, place, Swapped)


@fault("members", "coverage")
def list_members(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Members are in a Python list, so that parameters() lists none of theirs."""

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


FAULTS: tuple[Fault, ...] = (
    same_module,
    shared_layer,
    assigned_snapshots,
    overlapping_memory,
    shared_statistics,
    shared_mask,
    leaky_group,
    channel_shuffle,
    joint_norm,
    wrong_reshape,
    mixed_rows,
    coupled_loss,
    common_target,
    foreign_features,
    swapped_outputs,
    list_members,
)
