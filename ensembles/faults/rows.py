"""Faults of the batch: a sample's prediction depends on what else is in the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ensembles.faults.architectures import WIDTH, Architecture, Network
from ensembles.faults.fault import Place, fault
from ensembles.faults.members import separate
from ensembles.subject import Subject


def _with_layer(
    architecture: Architecture, place: Place, layer: Callable[[], nn.Module]
) -> Subject:
    """One member has this layer before a block; its rows are claimed independent."""

    def plant(members: list[Network]) -> None:
        members[place.member].blocks.insert(place.layer, layer())

    subject = separate(architecture, place, plant)
    return replace(subject, claims={**subject.claims, "batch": "rows"})


class _Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@fault("members", "batch")
def viewed_rows(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Channels are brought to the front by view in place of transpose, and back by transpose."""

    def function(x: Tensor) -> Tensor:
        samples, channels, *positions = x.shape
        front = x.reshape(channels, samples, *positions) if broken else x.transpose(0, 1)
        return front.tanh().transpose(0, 1)

    return _with_layer(architecture, place, lambda: _Function(function))


@fault("members", "batch")
def batch_statistics(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A norm takes the statistics of the batch in eval mode too."""

    def layer() -> nn.Module:
        norm = nn.BatchNorm2d if architecture.name == "convnet" else nn.BatchNorm1d
        return norm(WIDTH, track_running_stats=False) if broken else nn.GroupNorm(1, WIDTH)

    return _with_layer(architecture, place, layer)


class _Attention(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        seen: Tensor = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return x + seen.transpose(1, 2).reshape(x.shape)


# With one position, as in the MLP, attention of a healthy twin has nothing to choose from.
@fault("members", "batch", architectures=("convnet", "attention"))
def batch_for_sequence(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Attention without batch_first takes the batch for the sequence."""
    return _with_layer(architecture, place, lambda: _Attention(not broken))


@fault("members", "batch")
def softmax_over_batch(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A gate is a softmax over axis 0, which is the batch, in place of the channels."""
    axis = 0 if broken else 1
    return _with_layer(architecture, place, lambda: _Function(lambda x: x + x * x.softmax(axis)))


@fault("members", "batch")
def scaled_by_batch(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Activations are divided by their maximum over the whole batch, as quantisation does."""

    def function(x: Tensor) -> Tensor:
        dims = tuple(range(0 if broken else 1, x.ndim))
        return x / (1 + x.abs().amax(dims, keepdim=True))

    return _with_layer(architecture, place, lambda: _Function(function))


class _Context(nn.Module):
    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis, self.gain = axis, nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * x.mean(self.axis, keepdim=True)


@fault("members", "batch")
def dormant_mean(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A branch whose gain starts at zero adds the mean over the batch, not over the channels."""
    return _with_layer(architecture, place, lambda: _Context(0 if broken else 1))


class _Positions(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(rows, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.positions[: len(x)].view(-1, WIDTH, *[1] * (x.ndim - 2))


@fault("members", "batch")
def positions_of_rows(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Learned positions are added along the batch: a sample changes with its place in the batch."""
    rows = len(architecture.batch()) if broken else 1
    return _with_layer(architecture, place, lambda: _Positions(rows))
