"""Faults of rates: members do not train at the rates, or on the gradients, that are claimed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler

from ensembles.faults.architectures import (
    Architecture,
    Ensemble,
    Network,
    cross_entropy,
    loss_of_members,
    sgd,
)
from ensembles.faults.fault import Place, fault
from ensembles.faults.members import separate, together
from ensembles.subject import Subject

SEPARATE: Mapping[str, Any] = {"members": "separate"}
SINGLE: Mapping[str, Any] = {"members": "single"}
RATE = 0.1
"""The learning rate of the single model."""
LENGTH = 10
"""Steps of a schedule."""


def _members(architecture: Architecture, place: Place, **claims: Any) -> Subject:
    """Healthy members with this claim."""
    subject = separate(architecture, place, lambda members: None)
    return replace(subject, claims={"sharing": "independent", **claims})


def _mean_of_members(outputs: Mapping[str, Tensor]) -> Tensor:
    return loss_of_members(outputs) / len(outputs)


# --- what a member's gradient is ----------------------------------------------------------------


@fault("training", "trajectory", "loss_scale")
def mean_for_sum(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Member losses are averaged where their sum is meant: every rate is divided by M."""
    subject = _members(architecture, place, trajectory=SEPARATE, loss_scale="sum")
    return replace(subject, loss=_mean_of_members if broken else loss_of_members)


@fault("training", "loss_scale")
def weighted_member(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The loss of one member counts twice: alone, it would be trained like that too."""

    def loss(outputs: Mapping[str, Tensor]) -> Tensor:
        heavy = str(place.member) if broken else None
        losses = [(1 + (name == heavy)) * cross_entropy(y) for name, y in outputs.items()]
        return torch.stack(losses).sum()

    return replace(_members(architecture, place, trajectory=SEPARATE, loss_scale="sum"), loss=loss)


@fault("training", "trajectory", "loss_scale")
def joint_clipping(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Gradients are clipped by one norm over all members: a large one shrinks the others."""

    def clip(members: Sequence[Network]) -> None:
        for clipped in [nn.ModuleList(members)] if broken else members:
            nn.utils.clip_grad_norm_(clipped.parameters(), 0.01)

    def optimizer(members: Sequence[Network]) -> Optimizer:
        built = sgd(members)
        built.register_step_pre_hook(lambda *_: clip(members))
        return built

    subject = _members(architecture, place, trajectory=SEPARATE, loss_scale="sum")
    return replace(subject, optimizer=optimizer, clip=clip)


# --- what a member becomes ----------------------------------------------------------------------


@fault("training", "trajectory")
def rate_by_count(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The learning rate is divided by the number of members, though their losses are added."""

    def optimizer(members: Sequence[Network]) -> Optimizer:
        count = len(members) if broken else 1
        return SGD(nn.ModuleList(members).parameters(), lr=RATE / count)

    subject = separate(architecture, place, lambda members: None)
    claims = {**subject.claims, "trajectory": SEPARATE, "loss_scale": "sum"}
    return replace(subject, optimizer=optimizer, claims=claims)


@fault("training", "trajectory")
def divided_logits(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The ensemble returns its members' logits divided by their number, and trains on these."""

    class Shares(Ensemble):
        def forward(self, x: Tensor) -> list[Tensor]:
            count = len(self.members) if broken else 1
            return [member(x) / count for member in self.members]

    subject = together(architecture, place, Shares)
    return replace(subject, claims={"sharing": "independent", "trajectory": SINGLE})


@fault("training", "trajectory")
def decay_of_one(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """In the ensemble's optimizer one member has a weight decay that it does not have alone."""

    def optimizer(members: Sequence[Network]) -> Optimizer:
        many = broken and len(members) > 1
        groups = [
            {"params": member.parameters(), "weight_decay": 0.1 * (many and i == place.member)}
            for i, member in enumerate(members)
        ]
        return SGD(groups, lr=RATE)

    subject = _members(architecture, place, trajectory=SINGLE, loss_scale="sum")
    return replace(subject, optimizer=optimizer)


@fault("training", "sharing", "trajectory", "loss_scale")
def streams_of_one(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """One network is run once for each member: its gradient is M times that of a single model."""

    def plant(members: list[Network]) -> None:
        if broken:
            members[:] = [members[0]] * len(members)

    subject = separate(architecture, place, plant)
    claims = {"sharing": "independent", "trajectory": SINGLE, "loss_scale": "sum"}
    return replace(subject, claims=claims)


# --- rates --------------------------------------------------------------------------------------


def _at(rate: float) -> Callable[[Sequence[Network]], Optimizer]:
    return lambda members: SGD(nn.ModuleList(members).parameters(), lr=rate)


def _cosine(optimizer: Optimizer, minimum: float) -> LRScheduler:
    return CosineAnnealingLR(optimizer, LENGTH, eta_min=minimum)


def _single(parameters: list[nn.Parameter]) -> LRScheduler:
    """The schedule of the single model."""
    return _cosine(SGD(parameters, lr=RATE), RATE / 10)


def _warm_up(optimizer: Optimizer, start: float, goal: float) -> LRScheduler:
    return LinearLR(optimizer, start / goal, 1.0, total_iters=LENGTH // 2)


def _warmed(parameters: list[nn.Parameter]) -> LRScheduler:
    """The warm-up of the single model."""
    return _warm_up(SGD(parameters, lr=RATE), RATE / 10, RATE)


@fault("training", "loss_scale")
def rate_of_the_sum(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Losses are averaged by design, and the learning rate is that of the single model."""
    subject = separate(architecture, place, lambda members: None)
    return replace(
        subject,
        loss=_mean_of_members,
        optimizer=_at(RATE if broken else RATE * place.members),
        claims={**subject.claims, "loss_scale": {"loss": "mean", "lr": RATE, "steps": 2}},
    )


@fault("training", "loss_scale")
def absolute_minimum(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The learning rate was multiplied for a mean, but the schedule's eta_min was not."""
    count = place.members
    minimum = RATE / 10 * (1 if broken else count)
    return replace(
        _members(
            architecture, place, loss_scale={"loss": "mean", "lr": _single, "steps": LENGTH + 1}
        ),
        loss=_mean_of_members,
        optimizer=_at(RATE * count),
        scheduler=lambda optimizer: _cosine(optimizer, minimum),
    )


@fault("training", "loss_scale")
def schedule_for_each_member(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The scheduler is stepped inside the loop over members."""

    def scheduler(optimizer: Optimizer) -> Callable[[], None]:
        schedule = _cosine(optimizer, RATE / 10)

        def after_step() -> None:
            for _ in range(place.members if broken else 1):
                schedule.step()

        return after_step

    claim = {"loss": "sum", "lr": _single, "steps": LENGTH + 1}
    return replace(
        _members(architecture, place, loss_scale=claim), optimizer=_at(RATE), scheduler=scheduler
    )


@fault("training", "loss_scale")
def fractional_warmup(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A warm-up of 2.5 steps: the third step's rate is 1.2 times the full one."""

    def scheduler(optimizer: Optimizer) -> LRScheduler:
        def factor(step: int) -> float:
            reached = (step + 1) / 2.5
            return reached if broken and step < 2.5 else min(1.0, reached)

        return LambdaLR(optimizer, factor)

    claim = {"loss": "sum", "warmup": 2.5, "steps": LENGTH}
    return replace(
        _members(architecture, place, loss_scale=claim), optimizer=_at(RATE), scheduler=scheduler
    )


@fault("training", "loss_scale")
def absolute_warmup_start(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The learning rate was multiplied for a mean, but the rate where warm-up starts was not."""
    count = place.members
    start, goal = RATE / 10 * (1 if broken else count), RATE * count

    return replace(
        _members(
            architecture, place, loss_scale={"loss": "mean", "lr": _warmed, "steps": LENGTH + 1}
        ),
        loss=_mean_of_members,
        optimizer=_at(goal),
        scheduler=lambda optimizer: _warm_up(optimizer, start, goal),
    )


@fault("training", "loss_scale")
def warmup_of_nothing(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A warm-up of length 0, which still spends its first step below the full rate."""

    def scheduler(optimizer: Optimizer) -> LRScheduler:
        return LambdaLR(optimizer, lambda step: 0.5 if broken and step == 0 else 1.0)

    claim = {"loss": "sum", "warmup": 0, "steps": LENGTH}
    return replace(
        _members(architecture, place, loss_scale=claim), optimizer=_at(RATE), scheduler=scheduler
    )
