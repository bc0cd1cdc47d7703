"""Faults of members side by side in one network: a layer mixes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ensembles.faults.architectures import WIDTH, Architecture, Ensemble, Packed
from ensembles.faults.fault import INDEPENDENT, Place, fault
from ensembles.faults.members import subject_of, together
from ensembles.subject import Subject, split_axis

__all__ = ["side_by_side"]


def side_by_side(
    architecture: Architecture, place: Place, plant: Callable[[Packed], Any]
) -> Subject:
    """Members in the channels of grouped layers, into which `plant` puts a defect.

    Storage cannot tell them apart, so sharing is claimed only of the whole model.

    Example:
        >>> from ensembles.faults.architectures import ARCHITECTURES
        >>> side_by_side(ARCHITECTURES["mlp"], Place(), lambda packed: None).claims["sharing"]
        'distinct'
    """

    def make() -> Packed:
        packed = Packed(architecture, place.members)
        plant(packed)
        return packed

    return subject_of(make, architecture, claims={**INDEPENDENT, "sharing": "distinct"})


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
    """Packed logits are read as (class, member), but they are stored as (member, class)."""

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
