"""How member losses become the one loss that is trained.

Every objective is a pure function of the members' logits, and says which members it needs in a
step, so that the others are not computed. What an objective does to the learning rate is in
`ensembles.models.rates`.
"""

import math
import operator
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from types import MappingProxyType
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (its usual name)

from ensembles.models.predictions import log_probabilities

__all__ = [
    "OBJECTIVES",
    "Interpolated",
    "Joint",
    "Labels",
    "Mean",
    "MeanField",
    "Objective",
    "Stochastic",
    "Sum",
    "member_losses",
]

Labels = Tensor | Mapping[str, Tensor]
"""Classes (sample,): of all members, or by name where members see batches of their own."""


@runtime_checkable
class Objective(Protocol):
    """What a training loop knows of an objective.

    Example:
        >>> objective: Objective = Stochastic(p=0.5)
        >>> names = ("parent", "subnet_0_0", "subnet_0_1")
        >>> objective.asked(names, step=0, seed=1), objective.asked(names, step=1, seed=1)
        (('subnet_0_0', 'subnet_0_1'), ('parent',))
    """

    def asked(self, names: Sequence[str], *, step: int, seed: int) -> tuple[str, ...]:
        """Names the members that a step needs.

        Args:
            names: Of all members, in their order.
            step: Number of the step, counted over the whole training.
            seed: Of the training.

        Returns:
            Their names, in the order of ``names``: the same whenever step and seed are.
        """
        ...

    def __call__(self, logits: Mapping[str, Tensor], labels: Labels) -> Tensor:
        """Computes the loss.

        Args:
            logits: Of the asked members, by name, each of shape (sample, class).
            labels: Classes (sample,), whole numbers: one tensor, or one for each member where
                they see batches of their own.

        Returns:
            The loss in nats per sample, a scalar: in float32, or in float64 where logits are.
        """
        ...


def member_losses(logits: Mapping[str, Tensor], labels: Labels) -> dict[str, Tensor]:
    """Computes every member's own cross-entropy, averaged over the samples.

    Example:
        >>> logits = {"member_0": torch.zeros(1, 2), "member_1": torch.tensor([[0.0, 1.0]])}
        >>> member_losses(logits, torch.tensor([1]))
        {'member_0': tensor(0.6931), 'member_1': tensor(0.3133)}

    Args:
        logits: Of each member, by its name, of shape (sample, class).
        labels: Classes (sample,), whole numbers: one tensor, or one for each member, by name.

    Returns:
        The losses in nats per sample, scalars, by the names of the members: what
        `torch.nn.functional.cross_entropy` gives, in float32 at least.

    Raises:
        TypeError: If ``logits`` is no mapping of tensors.
        ValueError: If there is no sample, a label is none of the classes, or shapes do not fit.
        FloatingPointError: If a member's logits are no distribution, as with NaN.
    """
    normalised = log_probabilities(logits)
    if isinstance(labels, Mapping):
        missing = [name for name in normalised if name not in labels]
        if missing:
            raise ValueError(f"labels lack those of {missing}; there are {list(labels)}")
        classes = {
            name: _checked_labels(labels[name], found, f"labels of {name}")
            for name, found in normalised.items()
        }
    else:
        first = next(iter(normalised.values()))
        classes = dict.fromkeys(normalised, _checked_labels(labels, first, "labels"))
    return {name: F.nll_loss(found, classes[name]) for name, found in normalised.items()}


@dataclass(frozen=True)
class Sum:
    """The sum of the member losses: every member trains as it would alone, at the same rates.

    Example:
        >>> logits = {"member_0": torch.zeros(1, 2), "member_1": torch.zeros(1, 2)}
        >>> Sum()(logits, torch.tensor([0]))
        tensor(1.3863)
    """

    def asked(self, names: Sequence[str], *, step: int, seed: int) -> tuple[str, ...]:
        """Names all members."""
        return _checked_names(names)

    def __call__(self, logits: Mapping[str, Tensor], labels: Labels) -> Tensor:
        """Adds the member losses."""
        return torch.stack(list(member_losses(logits, labels).values())).sum()


@dataclass(frozen=True)
class Mean:
    """The mean of M member losses: under SGD, training alone at lr / M and M times the decay.

    Example:
        >>> logits = {"member_0": torch.zeros(1, 2), "member_1": torch.zeros(1, 2)}
        >>> Mean()(logits, torch.tensor([0]))
        tensor(0.6931)
    """

    def asked(self, names: Sequence[str], *, step: int, seed: int) -> tuple[str, ...]:
        """Names all members."""
        return _checked_names(names)

    def __call__(self, logits: Mapping[str, Tensor], labels: Labels) -> Tensor:
        """Averages the member losses."""
        return _mean(member_losses(logits, labels).values())


@dataclass(frozen=True)
class MeanField:
    """The ensemble's loss on one big network: the mean of the losses of its M groups.

    The members are the logits z_m that groups of the last features give, each through its slice of
    the head (`ensembles.models.heads.GroupedLinear`). With p_m = softmax z_m, zbar the mean of z_m
    and geo = softmax zbar, this loss bounds the cross-entropy of zbar, whatever the label is::

        mean_m CE(z_m) - CE(zbar) = mean_m KL(geo || p_m)
        0 <= mean_m KL(geo || p_m) <= 1/4 mean_m |z_m - zbar|^2

    The gap is 0 only where all p_m are the same. There is no such bound for an ordinary linear
    head, which is the sum of its groups' logits.

    Example:
        >>> logits = {"group_0": torch.tensor([[2.0, 0.0]]), "group_1": torch.zeros(1, 2)}
        >>> label = torch.tensor([0])
        >>> MeanField()(logits, label), Mean()({"zbar": torch.tensor([[1.0, 0.0]])}, label)
        (tensor(0.4100), tensor(0.3133))

    Source:
        Saul, Jaakkola and Jordan 1996, "Mean field theory for sigmoid belief networks"; the bound
        is Jensen's, as the log-sum-exp is convex with a Hessian of norm 1/2 at most.
    """

    def asked(self, names: Sequence[str], *, step: int, seed: int) -> tuple[str, ...]:
        """Names all groups."""
        return _checked_names(names)

    def __call__(self, logits: Mapping[str, Tensor], labels: Labels) -> Tensor:
        """Averages the groups' losses."""
        return _mean(member_losses(logits, labels).values())


@dataclass(frozen=True)
class Interpolated:
    """lam * (the parent's loss) + (1 - lam) * (the mean of the subnets' losses).

    A member of weight 0 is not computed: no subnet at lam = 1, and no parent at lam = 0.

    Example:
        >>> objective = Interpolated(0.25)
        >>> logits = {"parent": torch.tensor([[1.0, 0.0]]), "subnet_0_0": torch.zeros(1, 2)}
        >>> objective(logits, torch.tensor([0]))
        tensor(0.5982)
        >>> Interpolated(1).asked(["parent", "subnet_0_0"], step=0, seed=0)
        ('parent',)

    Args:
        lam: Weight of the parent, 0 to 1.
        parent: The parent's name; every other member is a subnet.

    Raises:
        ValueError: If ``lam`` is outside of 0 to 1; if the parent or any subnet is missing that
            the loss needs.
    """

    lam: float
    parent: str = "parent"

    def __post_init__(self) -> None:
        _check_share("lam", self.lam)

    def asked(self, names: Sequence[str], *, step: int, seed: int) -> tuple[str, ...]:
        """Names the members whose weight is not 0."""
        subnets = _subnets(names, self.parent, needs=("parent", "subnets"))
        return tuple(name for name in names if (self.lam < 1 if name in subnets else self.lam > 0))

    def __call__(self, logits: Mapping[str, Tensor], labels: Labels) -> Tensor:
        """Weighs the parent's loss and the subnets' mean loss."""
        losses = member_losses(logits, labels)
        if self.lam == 1:
            _subnets(logits, self.parent, needs=("parent",))
            return losses[self.parent]
        if self.lam == 0:
            # Not 0 * parent: an infinite loss would make NaN of it, and zeros would be gradients.
            subnets = _subnets(logits, self.parent, needs=("subnets",))
            return _mean(losses[name] for name in subnets)
        subnets = _subnets(logits, self.parent, needs=("parent", "subnets"))
        mean = _mean(losses[name] for name in subnets)
        return self.lam * losses[self.parent] + (1 - self.lam) * mean


@dataclass(frozen=True)
class Stochastic:
    """A coin for each step: the parent's loss with probability p, and the subnets' otherwise.

    Only the members that the coin chose are computed, and only they get gradients. The coin depends
    only on seed and step, so a run that is resumed, or that stops to evaluate, has the same coins.
    The average of the loss over the coins is `expectation`.

    Example:
        >>> objective = Stochastic(p=0.5, subnets="one")
        >>> names = ("parent", "subnet_0_0", "subnet_0_1")
        >>> for outcome, probability in objective.outcomes(names).items():
        ...     print(outcome, probability)
        ('parent',) 0.5
        ('subnet_0_0',) 0.25
        ('subnet_0_1',) 0.25
        >>> [objective.asked(names, step=step, seed=1)[0] for step in range(4)]
        ['subnet_0_1', 'parent', 'parent', 'parent']

    Args:
        p: Probability of the parent, 0 to 1.
        subnets: ``all`` for the mean of the subnets' losses, ``one`` for the loss of one that is
            drawn, each with the same probability.
        parent: The parent's name; every other member is a subnet.

    Raises:
        ValueError: If ``p`` is outside of 0 to 1 or ``subnets`` is unknown; if parent or subnets
            are missing among the names; in the call, if the logits are not those of one outcome.
    """

    p: float
    subnets: Literal["all", "one"] = "all"
    parent: str = "parent"

    def __post_init__(self) -> None:
        _check_share("p", self.p)
        choices = get_args(Literal["all", "one"])
        if self.subnets not in choices:
            raise ValueError(f"subnets must be one of {choices}, got {self.subnets!r}")

    @property
    def expectation(self) -> Interpolated:
        """The loss that this one averages to: for validation, where no coin is thrown."""
        return Interpolated(self.p, parent=self.parent)

    def outcomes(self, names: Sequence[str]) -> dict[tuple[str, ...], float]:
        """Lists what a step can ask for, with the probabilities, which add up to 1.

        Args:
            names: Of all members, in their order.

        Returns:
            The probability of each choice of members; none is 0.
        """
        subnets = _subnets(names, self.parent, needs=("parent", "subnets"))
        choices = [subnets] if self.subnets == "all" else [(name,) for name in subnets]
        outcomes: dict[tuple[str, ...], float] = {(self.parent,): float(self.p)}
        outcomes.update((choice, float(1 - self.p) / len(choices)) for choice in choices)
        return {choice: share for choice, share in outcomes.items() if share > 0}

    def asked(self, names: Sequence[str], *, step: int, seed: int) -> tuple[str, ...]:
        """Throws the coin of a step, and draws the subnet where one is to be drawn."""
        *choices, last = outcomes = self.outcomes(names)
        # A generator of its own, for each step: of the global ones nothing is used or changed.
        draw = random.Random(f"{_whole('seed', seed)}/{_whole('step', step)}").random()
        reached = 0.0
        for choice in choices:
            reached += outcomes[choice]
            if draw < reached:
                return choice
        return last

    def __call__(self, logits: Mapping[str, Tensor], labels: Labels) -> Tensor:
        """Computes the loss of the members that were asked for: their mean."""
        several = isinstance(logits, Mapping) and len(logits) > 1
        if several and (self.subnets == "one" or self.parent in logits):
            raise ValueError(
                f"{self} was given logits of {list(logits)}: give those of the members in "
                "asked(...) only. For the loss of all members, take .expectation"
            )
        return _mean(member_losses(logits, labels).values())


@dataclass(frozen=True)
class Joint:
    """(1 - beta) * (the mean of member losses) + beta * (the loss of the mean prediction).

    The mean prediction is the arithmetic one, computed in log space. If beta > 0, members depend on
    each other: a member that is right reduces the gradients of the others.

    Example:
        >>> logits = {"member_0": torch.tensor([[2.0, 0.0]]), "member_1": torch.zeros(1, 2)}
        >>> label = torch.tensor([0])
        >>> Joint(0)(logits, label), Joint(0.5)(logits, label), Joint(1)(logits, label)
        (tensor(0.4100), tensor(0.3903), tensor(0.3705))

    Args:
        beta: Weight of the loss of the mean prediction, 0 to 1.

    Raises:
        ValueError: If ``beta`` is outside of 0 to 1.

    Source:
        Jeffares et al. 2023, "Joint training of deep ensembles fails due to learner collusion"
        (arXiv 2301.11323).
    """

    beta: float

    def __post_init__(self) -> None:
        _check_share("beta", self.beta)

    def asked(self, names: Sequence[str], *, step: int, seed: int) -> tuple[str, ...]:
        """Names all members."""
        return _checked_names(names)

    def __call__(self, logits: Mapping[str, Tensor], labels: Labels) -> Tensor:
        """Weighs the members' mean loss and the loss of their arithmetic mean."""
        if isinstance(labels, Mapping):
            raise ValueError(
                "a mean prediction needs members that predict the same samples: give one tensor of "
                f"labels, not one for each of {list(labels)}"
            )
        normalised = log_probabilities(logits)
        classes = _checked_labels(labels, next(iter(normalised.values())), "labels")
        mean_loss = _mean(F.nll_loss(found, classes) for found in normalised.values())
        if self.beta == 0:
            return mean_loss
        # Of the labels' classes only: logsumexp has no gradient where all members are at -inf.
        of_labels = [found.gather(1, classes[:, None])[:, 0] for found in normalised.values()]
        log_total = torch.stack(of_labels).logsumexp(dim=0)
        loss_of_mean = (math.log(len(of_labels)) - log_total).mean()
        if self.beta == 1:
            return loss_of_mean
        return (1 - self.beta) * mean_loss + self.beta * loss_of_mean


OBJECTIVES: Mapping[str, type[Objective]] = MappingProxyType(
    {
        "sum": Sum,
        "mean": Mean,
        "interpolated": Interpolated,
        "stochastic": Stochastic,
        "mean_field": MeanField,
        "joint": Joint,
    }
)
"""The objectives by the names that command lines and configuration files use."""


def _mean(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(losses)).mean()


def _check_share(name: str, share: float) -> None:
    # Written so that NaN is refused too.
    if not (isinstance(share, Real) and 0 <= share <= 1):
        raise ValueError(f"{name} must be a number from 0 to 1, got {share!r}")


def _whole(name: str, number: int) -> int:
    try:
        return operator.index(number)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {number!r}") from None


def _checked_names(names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise ValueError(f"names must be a list of names, got the string {names!r}")
    if not names:
        raise ValueError("names is empty: name at least one member")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"names has {twice} more than once: every member has a name of its own")
    return tuple(names)


def _subnets(names: Iterable[str], parent: str, *, needs: Sequence[str]) -> tuple[str, ...]:
    """Names the subnets; of parent and subnets, those must be there that are needed."""
    listed = _checked_names(names if isinstance(names, str) else tuple(names))
    subnets = tuple(name for name in listed if name != parent)
    if "parent" in needs and len(subnets) == len(listed):
        raise ValueError(f"no member is named {parent!r}, as the parent is; there are {[*listed]}")
    if "subnets" in needs and not subnets:
        raise ValueError(f"there is only the parent, {parent!r}: at least one subnet is needed")
    return subnets


def _checked_labels(labels: Tensor, logits: Tensor, what: str) -> Tensor:
    samples, classes = logits.shape
    if not isinstance(labels, Tensor):
        raise TypeError(f"{what} must be a tensor of classes, got a {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{what} must be whole numbers, the classes, got {labels.dtype}")
    if labels.shape != (samples,):
        raise ValueError(
            f"{what} have shape {tuple(labels.shape)}, and the logits of {samples} samples need "
            f"labels of shape ({samples},)"
        )
    if samples == 0:
        raise ValueError("there is no sample: the loss of an empty batch is not defined")
    outside = (labels < 0) | (labels >= classes)
    # Before they are used: an accelerator stops for good at an index that there is not.
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"{what} must be 0 to {classes - 1}, got {int(labels[row])} in row {row} "
            f"({int(outside.sum())} of {samples} labels are none of the {classes} classes)"
        )
    return labels.long()
