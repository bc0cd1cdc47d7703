"""Faults of cost: the predictions are right, but they cost more than they need."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ensembles.faults.architectures import WIDTH, Architecture, Network
from ensembles.faults.fault import Place, fault
from ensembles.faults.members import separate
from ensembles.subject import Subject


def _as_cheap_as(
    twin: Callable[[list[Network]], None],
    planted: Callable[[list[Network]], None],
    architecture: Architecture,
    place: Place,
) -> Subject:
    """Members that are claimed to cost no more than those without the defect."""
    from ensembles.checks.cost.measurement import measure_compute_cost

    healthy = separate(architecture, place, twin)
    cost = measure_compute_cost(healthy.make, architecture.batch)
    budgets = {"flops": cost.flops, "parameters": cost.parameters, "wasted": 0}
    subject = separate(architecture, place, planted)
    return replace(subject, claims={**subject.claims, "cost": budgets})


class _MaskedBlock(nn.Module):
    """The first channels of a layer of twice the width; a mask hides all that leads elsewhere."""

    mask: Tensor

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.conv = architecture.conv(2 * WIDTH, 2 * WIDTH)
        mask = torch.zeros_like(self.conv.weight)
        mask[:WIDTH, :WIDTH] = 1
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight * self.mask
        wide: Tensor = self.conv._conv_forward(torch.cat([x, torch.zeros_like(x)], 1), weight, None)
        return wide[:, :WIDTH]


@fault("cost", "cost")
def masked_at_full_width(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A narrow layer is computed as a wide, masked one: three of four products are zero."""

    def twin(members: list[Network]) -> None:
        members[place.member].blocks.insert(place.layer, architecture.conv(WIDTH, WIDTH))

    def wide(members: list[Network]) -> None:
        members[place.member].blocks.insert(place.layer, _MaskedBlock(architecture))

    return _as_cheap_as(twin, wide if broken else twin, architecture, place)


@fault("cost", "cost")
def tied_model_stored_twice(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A layer that the network uses twice is stored twice: the tie was lost in a copy."""

    def plant(members: list[Network], copied: bool) -> None:
        blocks = members[place.member].blocks
        layer = architecture.conv(WIDTH, WIDTH)
        blocks.insert(place.layer, layer)
        blocks.append(copy.deepcopy(layer) if copied else layer)

    return _as_cheap_as(
        lambda members: plant(members, False),
        lambda members: plant(members, broken),
        architecture,
        place,
    )


@fault("cost", "cost")
def computed_twice(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A block runs twice in a step, and the first result is dropped."""

    class Block(nn.Module):
        def __init__(self, repeated: bool) -> None:
            super().__init__()
            self.layer, self.repeated = architecture.conv(WIDTH, WIDTH), repeated

        def forward(self, x: Tensor) -> Tensor:
            if self.repeated:
                self.layer(x)
            y: Tensor = F.gelu(self.layer(x))
            return y

    def plant(members: list[Network], repeated: bool) -> None:
        members[place.member].blocks.insert(place.layer, Block(repeated))

    return _as_cheap_as(
        lambda members: plant(members, False),
        lambda members: plant(members, broken),
        architecture,
        place,
    )


@fault("cost", "cost")
def kept_zeros(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A block works on its group padded with zeros, which are kept for the backward pass."""
    from ensembles.checks.cost.measurement import measure_compute_cost

    class Padded(nn.Module):
        def __init__(self, padding: int) -> None:
            super().__init__()
            self.padding, self.gain = padding, nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            zeros = x.new_zeros(len(x), self.padding, *x.shape[2:])
            y = F.gelu(torch.cat([x, zeros], 1)) * self.gain
            return y[:, : x.shape[1]]

    def with_padding(padding: int) -> Subject:
        def plant(members: list[Network]) -> None:
            members[place.member].blocks.insert(place.layer, Padded(padding))

        return separate(architecture, place, plant)

    kept = measure_compute_cost(with_padding(0).make, architecture.batch).kept_bytes
    subject = with_padding(3 * WIDTH if broken else 0)
    return replace(subject, claims={**subject.claims, "cost": {"kept_bytes": kept}})
