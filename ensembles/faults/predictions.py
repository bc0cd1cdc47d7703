"""Faults of evaluation: the prediction, or the metric, is not the one that is claimed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ensembles.faults.architectures import Architecture, Network, cross_entropy
from ensembles.faults.fault import Place, fault
from ensembles.faults.members import separate
from ensembles.subject import Subject

Members = Sequence[Network]


def _predicting(
    architecture: Architecture,
    place: Place,
    predict: Callable[[Members, Tensor], Tensor],
    claim: Any = "arithmetic",
    **more: Any,
) -> Subject:
    """Healthy members whose prediction is claimed to be this reduction."""
    subject = separate(architecture, place, lambda members: None)
    # The model is healthy: the other claims are those that do not look at training.
    claims = {"sharing": "independent", "prediction": claim}
    return replace(subject, predict=predict, claims=claims, **more)


def _probabilities(members: Members, x: Tensor) -> Tensor:
    return torch.stack([member(x).softmax(1) for member in members])


def _mean(members: Members, x: Tensor) -> Tensor:
    return _probabilities(members, x).mean(0)


# --- reductions ---------------------------------------------------------------------------------


@fault("members", "prediction")
def average_of_logits(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Logits are averaged where the mean of probabilities is claimed."""

    def predict(members: Members, x: Tensor) -> Tensor:
        logits = torch.stack([member(x) for member in members])
        return logits.mean(0).softmax(1) if broken else logits.softmax(2).mean(0)

    subject = _predicting(architecture, place, predict)
    healthy = separate(architecture, place, lambda members: None)
    return replace(subject, claims={**healthy.claims, **subject.claims})


@fault("members", "prediction")
def softmax_twice(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The mean of probabilities goes through softmax again, so it is nearly uniform."""

    def predict(members: Members, x: Tensor) -> Tensor:
        mean = _mean(members, x)
        return mean.softmax(1) if broken else mean

    return _predicting(architecture, place, predict)


@fault("members", "prediction")
def one_member_predicts(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """All members are called, but the prediction is that of one, the last of the loop."""

    def predict(members: Members, x: Tensor) -> Tensor:
        found = _probabilities(members, x)
        return found[place.member] if broken else found.mean(0)

    return _predicting(architecture, place, predict)


@fault("members", "prediction")
def mixed_predictions(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Probabilities (sample, member, class) are viewed as (member, sample, class) and averaged."""

    def predict(members: Members, x: Tensor) -> Tensor:
        found = torch.stack([member(x).softmax(1) for member in members], 1)
        return (found.view(len(members), len(x), -1) if broken else found.transpose(0, 1)).mean(0)

    return _predicting(architecture, place, predict)


@fault("members", "prediction")
def weights_twice(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Weights of the members are applied twice, and then the result is normalised."""
    shares = [i + 1.0 for i in range(place.members)]
    weights = torch.tensor(shares) / sum(shares)

    def predict(members: Members, x: Tensor) -> Tensor:
        found = _probabilities(members, x)
        once = found * weights[:, None, None]
        summed = (once * weights[:, None, None] if broken else once).sum(0)
        return summed / summed.sum(1, keepdim=True)

    claim = {"reduction": "arithmetic", "weights": weights.tolist()}
    return _predicting(architecture, place, predict, claim)


@fault("members", "prediction")
def unnormalised_geometric(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A geometric mean of probabilities, whose rows do not sum to 1."""

    def predict(members: Members, x: Tensor) -> Tensor:
        mean = _probabilities(members, x).log().mean(0)
        return mean.exp() if broken else mean.softmax(1)

    return _predicting(architecture, place, predict, "geometric")


@fault("members", "prediction")
def dropped_last_batch(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The evaluation goes through the rows in batches, but drops the last, which is not full."""

    def predict(members: Members, x: Tensor) -> Tensor:
        batches = [batch for batch in torch.split(x, 3) if len(batch) == 3 or not broken]
        return torch.cat([_mean(members, batch) for batch in batches])

    return _predicting(architecture, place, predict)


# --- metrics ------------------------------------------------------------------------------------


def _judged(
    architecture: Architecture, place: Place, evaluate: Callable[[Members, Tensor, Tensor], Tensor]
) -> Subject:
    claim = {"reduction": "arithmetic", "metric": "nll"}
    return _predicting(architecture, place, _mean, claim, evaluate=evaluate)


@fault("members", "prediction")
def loss_of_probabilities(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The reported loss is the cross_entropy of probabilities, in place of logits."""

    def evaluate(members: Members, x: Tensor, labels: Tensor) -> Tensor:
        mean = _mean(members, x)
        return F.cross_entropy(mean, labels) if broken else F.nll_loss(mean.log(), labels)

    return _judged(architecture, place, evaluate)


@fault("members", "prediction")
def metric_of_one(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The metric that is reported as the ensemble's is that of one member."""

    def evaluate(members: Members, x: Tensor, labels: Tensor) -> Tensor:
        found = _probabilities(members, x)
        judged = found[place.member] if broken else found.mean(0)
        return F.nll_loss(judged.log(), labels)

    return _judged(architecture, place, evaluate)


@fault("members", "prediction")
def mean_of_metrics(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The metric that is reported as the ensemble's is the mean over the members."""

    def evaluate(members: Members, x: Tensor, labels: Tensor) -> Tensor:
        found = _probabilities(members, x)
        judged = list(found) if broken else [found.mean(0)]
        return torch.stack([F.nll_loss(each.log(), labels) for each in judged]).mean()

    return _judged(architecture, place, evaluate)


# --- the training loss --------------------------------------------------------------------------


def _trained_on_probabilities(
    architecture: Architecture,
    place: Place,
    loss: Callable[[Sequence[Tensor]], Tensor],
    claim: Any,
    member_loss: Callable[[Tensor], Tensor],
) -> Subject:
    """Members that return probabilities, with a training loss of these."""

    class Probable(Network):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(1)

    def plant(members: list[Network]) -> None:
        members[:] = [Probable(m.stem, list(m.blocks), m.head) for m in members]

    return replace(
        separate(architecture, place, plant),
        loss=lambda outputs: loss(list(outputs.values())),
        member_loss=member_loss,
        claims={"sharing": "independent", "loss_scale": claim},
    )


def _likelihood(p: Tensor) -> Tensor:
    return F.nll_loss(p.log(), torch.arange(len(p)) % p.shape[1])


@fault("members", "loss_scale")
def softmax_in_members(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Members end with softmax, but the training loss is the cross_entropy of their outputs."""
    loss = cross_entropy if broken else _likelihood
    return _trained_on_probabilities(
        architecture, place, lambda ps: torch.stack([loss(p) for p in ps]).sum(), "sum", loss
    )


@fault("members", "loss_scale")
def softmax_of_the_mean(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Members are trained jointly, by the cross_entropy of the mean of their probabilities."""
    loss = cross_entropy if broken else _likelihood
    return _trained_on_probabilities(
        architecture, place, lambda ps: loss(torch.stack(list(ps)).mean(0)), "joint", loss
    )
