"""Faults of training: parameters that the optimizer or the gradient does not reach."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from ensembles.faults.architectures import (
    CLASSES,
    WIDTH,
    Architecture,
    Network,
    loss_of_members,
)
from ensembles.faults.fault import Place, fault
from ensembles.faults.members import Masked, separate
from ensembles.subject import Subject


def _healthy(architecture: Architecture, place: Place) -> Subject:
    return separate(architecture, place, lambda members: None)


# --- registration -------------------------------------------------------------------------------


class _Scaled(nn.Module):
    """A block whose output is scaled by a learned number."""

    def __init__(self, block: nn.Module, scale: Tensor) -> None:
        super().__init__()
        self.block, self.scale = block, scale

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = self.block(x) * self.scale
        return scaled


def _scaled(architecture: Architecture, place: Place, scale: Callable[[], Tensor]) -> Subject:
    def plant(members: list[Network]) -> None:
        blocks = members[place.member].blocks
        blocks[place.layer] = _Scaled(blocks[place.layer], scale())

    return separate(architecture, place, plant)


@fault("training", "coverage")
def unregistered(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A learned tensor is a plain attribute."""

    def scale() -> Tensor:
        return torch.ones(1, requires_grad=True) if broken else nn.Parameter(torch.ones(1))

    return _scaled(architecture, place, scale)


@fault("training", "coverage")
def lost_parameter(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """`nn.Parameter(...).to(...)` is computed from a Parameter, so it is not registered."""

    def scale() -> Tensor:
        number = torch.ones(1, dtype=torch.float64)
        return nn.Parameter(number).to(torch.float32) if broken else nn.Parameter(number.float())

    return _scaled(architecture, place, scale)


# --- gradients ----------------------------------------------------------------------------------


class _Cut(nn.Module):
    def __init__(self, block: nn.Module, how: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.block, self.how = block, how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.block, x)


def _through(
    architecture: Architecture, place: Place, how: Callable[[nn.Module, Tensor], Tensor]
) -> Subject:
    def plant(members: list[Network]) -> None:
        blocks = members[place.member].blocks
        blocks[place.layer] = _Cut(blocks[place.layer], how)

    return separate(architecture, place, plant)


@fault("training", "ownership", "coverage")
def detached_branch(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The output of a block is detached."""

    def how(block: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = block(x)
        return y.detach() if broken else y

    return _through(architecture, place, how)


@fault("training", "ownership", "coverage")
def no_grad_branch(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A block runs under no_grad, as in a forward pass that was copied from evaluation."""

    def how(block: nn.Module, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(not broken):
            y: Tensor = block(x)
        return y

    return _through(architecture, place, how)


@fault("training", "ownership", "coverage")
def reentrant_checkpoint(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The stem is under a re-entrant checkpoint, whose input, the batch, needs no gradient."""

    class Checkpointed(nn.Module):
        def __init__(self, stem: nn.Module) -> None:
            super().__init__()
            self.stem = stem

        def forward(self, x: Tensor) -> Tensor:
            with warnings.catch_warnings():  # PyTorch warns that no input needs a gradient
                warnings.simplefilter("ignore")
                y: Tensor = checkpoint(self.stem, x, use_reentrant=broken)
            return y

    def plant(members: list[Network]) -> None:
        members[place.member].stem = Checkpointed(members[place.member].stem)

    return separate(architecture, place, plant)


@fault("training", "ownership", "coverage")
def weight_by_data(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The head computes with `weight.data`, which has no gradient."""

    class Head(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.data if broken else self.weight, self.bias)

    def plant(members: list[Network]) -> None:
        members[place.member].head = Head(WIDTH, CLASSES)

    return separate(architecture, place, plant)


@fault("training", "ownership", "coverage")
def unused_layer(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A block is registered, but forward does not call it."""

    def plant(members: list[Network]) -> None:
        if broken:
            network = members[place.member]
            network.skipped = network.blocks[place.layer]
            network.blocks[place.layer] = nn.Identity()

    return separate(architecture, place, plant)


@fault("training", "ownership", "coverage")
def hidden_by_mask(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A mask hides the whole weight of a head: its gradient is zero, whatever its values."""

    def plant(members: list[Network]) -> None:
        network = members[place.member]
        mask = torch.zeros_like(network.head.weight)
        if not broken:
            mask[:, ::2] = 1
        network.head = Masked(network.head, mask)

    return separate(architecture, place, plant)


@fault("training", "coverage")
def member_without_loss(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The loss leaves out one member."""

    def loss(outputs: Mapping[str, Tensor]) -> Tensor:
        members: dict[str, Any] = dict(outputs)
        if broken:
            del members[str(place.member)]
        return loss_of_members(members)

    return replace(_healthy(architecture, place), loss=loss)


@fault("training", "coverage")
def false_freeze(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """`stem.requires_grad = False` sets an attribute of the module, but freezes nothing."""

    def plant(members: list[Network]) -> None:
        stem = members[place.member].stem
        if broken:
            stem.requires_grad = False  # type: ignore[assignment]
        else:
            stem.requires_grad_(False)

    return separate(architecture, place, plant)


@fault("training", "coverage")
def undone_freeze(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The stem is frozen, but the model's own train() makes all parameters trainable again."""

    class Thawing(Network):
        def train(self, mode: bool = True) -> Thawing:
            if broken and mode:
                self.requires_grad_(True)
            super().train(mode)
            return self

    def plant(members: list[Network]) -> None:
        network = members[place.member]
        thawing = Thawing(network.stem, list(network.blocks), network.head)
        thawing.stem.requires_grad_(False)
        members[place.member] = thawing

    return separate(architecture, place, plant)


@fault("training", "coverage")
def two_zero_factors(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Both factors of a low-rank correction start at zero, so neither gets a gradient."""

    class Corrected(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block
            self.down, self.up = architecture.conv(WIDTH, 1), architecture.conv(1, WIDTH)
            nn.init.zeros_(self.up.weight)
            if broken:
                nn.init.zeros_(self.down.weight)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.block(x + self.up(self.down(x)))
            return y

    def plant(members: list[Network]) -> None:
        blocks = members[place.member].blocks
        blocks[place.layer] = Corrected(blocks[place.layer])

    return separate(architecture, place, plant)
