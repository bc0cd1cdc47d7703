"""Faults of drifting state: weights behind a mask, and averages with wrong statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ensembles.faults.architectures import CLASSES, WIDTH, Architecture, Network
from ensembles.faults.fault import Place, fault
from ensembles.faults.state import MaskedHead, with_head
from ensembles.subject import Subject

# --- behind a mask ------------------------------------------------------------------------------


def _trained_behind_mask(
    architecture: Architecture, place: Place, head: Callable[[], nn.Module], *, decay: float = 0.0
) -> Subject:
    def optimizer(members: list[Network]) -> torch.optim.Optimizer:
        return torch.optim.SGD(nn.ModuleList(members).parameters(), lr=0.1, weight_decay=decay)

    return replace(with_head(architecture, place, head), optimizer=optimizer)


@fault("state", "hygiene")
def decay_behind_mask(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A mask is applied only in forward, but weight decay still trains what it hides."""

    def keep(head: MaskedHead, mask: Tensor) -> None:
        head.register_buffer("mask", mask)
        if not broken:
            with torch.no_grad():
                head.weight.mul_(mask)

    return _trained_behind_mask(architecture, place, lambda: MaskedHead(keep), decay=0.1)


@fault("state", "hygiene")
def norm_behind_mask(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A weight is normalised before it is masked, so its norm is that of the whole weight."""

    class Normed(MaskedHead):
        def forward(self, x: Tensor) -> Tensor:
            seen: Tensor = self.weight * (1.0 if broken else self.mask)
            unit = seen / seen.norm(dim=1, keepdim=True).clamp_min(1e-3)
            return F.linear(x, unit * self.mask, self.bias)

    def head() -> nn.Module:
        return Normed(lambda made, mask: made.register_buffer("mask", mask))

    return _trained_behind_mask(architecture, place, head)


# --- averages -----------------------------------------------------------------------------------


class _Averaged(nn.Module):
    """A head that is trained, and its moving average, which predicts."""

    def __init__(self, follow: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        norm: nn.Module = nn.BatchNorm1d(WIDTH)
        self.live = nn.Sequential(norm, nn.Linear(WIDTH, CLASSES))
        self.average = copy.deepcopy(self.live).requires_grad_(False)
        self.follow = follow

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = (self.live if self.training else self.average)(x)
        return logits

    def update(self) -> None:
        """As after every step of the optimizer."""
        with torch.no_grad():
            pairs = zip(self.average.parameters(), self.live.parameters(), strict=True)
            for mean, now in pairs:
                mean.lerp_(now, 0.1)
            buffers = zip(self.average.buffers(), self.live.buffers(), strict=True)
            for statistic, last in buffers:
                self.follow(statistic, last)


def _averaging(
    architecture: Architecture, place: Place, follow: Callable[[Tensor, Tensor], Any]
) -> Subject:
    def optimizer(members: list[Network]) -> torch.optim.Optimizer:
        every = nn.ModuleList(members).parameters()
        built = torch.optim.SGD([p for p in every if p.requires_grad], lr=0.1)
        average: Any = members[place.member].head
        built.register_step_post_hook(lambda *_: average.update())
        return built

    subject = with_head(architecture, place, lambda: _Averaged(follow))
    return replace(subject, optimizer=optimizer)


def _with_the_weights(mean: Tensor, now: Tensor) -> None:
    if mean.is_floating_point():
        mean.lerp_(now, 0.1)


@fault("state", "hygiene")
def average_of_first_statistics(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A moving average of the parameters predicts with the statistics of the first model."""
    return _averaging(
        architecture, place, (lambda mean, now: None) if broken else _with_the_weights
    )


@fault("state", "hygiene")
def average_of_last_statistics(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A moving average of the parameters predicts with the statistics of the last model."""
    return _averaging(
        architecture, place, (lambda mean, now: mean.copy_(now)) if broken else _with_the_weights
    )


@fault("state", "hygiene")
def average_swapped_in(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """eval() puts averaged weights into the model, but leaves the statistics of the last one."""

    class Swapping(_Averaged):
        def train(self, mode: bool = True) -> Swapping:
            if mode != self.training:
                live, average = self.live.state_dict(), copy.deepcopy(self.average.state_dict())
                kept = copy.deepcopy(live)
                for name, tensor in live.items():
                    if not broken or "running" not in name:
                        tensor.copy_(average[name])
                        self.average.state_dict()[name].copy_(kept[name])
            super().train(mode)
            return self

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.live(x)
            return logits

    subject = _averaging(architecture, place, _with_the_weights)
    swapping = with_head(architecture, place, lambda: Swapping(_with_the_weights))
    return replace(subject, make=swapping.make)
