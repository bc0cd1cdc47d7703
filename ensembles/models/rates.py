"""What an objective does to learning rate, weight decay and all that is tuned with them.

Objectives that differ only by a factor c have gradients that differ by c. A step of SGD is
lr (g + wd w) and what momentum makes of it, so that lr / c and c wd take the same steps with c g
as lr and wd with g; decoupled decay, lr wd w, is the same then too. A step of Adam is
lr m / (sqrt(v) + eps), where m and sqrt(v) grow with c: c eps takes the same steps, and lr stays.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from typing import Literal, get_args

from ensembles.models.objectives import (
    OBJECTIVES,
    Interpolated,
    Joint,
    Mean,
    MeanField,
    Objective,
    Stochastic,
    Sum,
)

__all__ = ["EquivalentHyperparameters", "equivalent_hyperparameters"]

Training = Objective | Literal["sum", "mean", "mean_field", "separate", "parent"]
"""An objective, its name where that says it all, or a training without one."""

OptimizerName = Literal["sgd", "adam", "adamw"]

_DEFAULTS: dict[str, tuple[float, float | None]] = {
    "sgd": (0.0, None),
    "adam": (0.0, 1e-8),
    "adamw": (1e-2, 1e-8),
}
"""Weight decay and eps that torch.optim.SGD, Adam and AdamW have where none is given."""


@dataclass(frozen=True)
class EquivalentHyperparameters:
    """The values for the wanted training. What is not here stays as it is.

    Example:
        >>> found = equivalent_hyperparameters(
        ...     "sum", "mean", members=4, optimizer="adam", lr=1e-3, eps=1e-8, clip_norm=6.0
        ... )
        >>> found.lr, found.eps, found.clip_norm, found.bitwise
        (0.001, 2.5e-09, 1.5, False)

    Attributes:
        lr: Learning rate.
        weight_decay: Weight decay.
        eps: Adam's and AdamW's eps; None for SGD.
        clip_norm: Greatest norm of all gradients together; None where there is none.
        clip_value: Greatest absolute value of a gradient's element; None where there is none.
        eta_min: Rate at which a cosine schedule ends.
        warmup_start: Rate at which a warm-up starts.
        gradient_factor: How many times the given training's gradient the wanted one's is.
        lr_factor: What any other absolute rate is to be multiplied by, such as ``max_lr``.
        bitwise: Whether the wanted training's weights are those of the given one bit by bit.
            Otherwise they are up to rounding, or nearly so with ``clip_norm``.
    """

    lr: float
    weight_decay: float
    eps: float | None
    clip_norm: float | None
    clip_value: float | None
    eta_min: float
    warmup_start: float
    gradient_factor: float
    lr_factor: float
    bitwise: bool


def equivalent_hyperparameters(
    given: Training,
    wanted: Training,
    *,
    members: int,
    optimizer: OptimizerName,
    lr: float,
    weight_decay: float | None = None,
    eps: float | None = None,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    eta_min: float = 0.0,
    warmup_start: float = 0.0,
) -> EquivalentHyperparameters:
    """Computes what makes one objective train as another does.

    Both trainings start from the same weights, with the same batches and a new optimizer. With c
    the factor between their gradients (sum to mean: 1/M; mean to sum or to M separate runs: M):

    =================================  ===============  ===============  ===============
    value                              SGD              Adam             AdamW
    =================================  ===============  ===============  ===============
    lr, eta_min, warmup_start          / c              stay             stay
    weight_decay                       * c              * c              stays
    eps                                                 * c              * c
    clip_norm, clip_value              * c              * c              * c
    momentum, dampening, Nesterov,     stay             stay             stay
    betas, amsgrad; start of a
    warm-up as a share of lr
    =================================  ===============  ===============  ===============

    The column of SGD holds for L2 decay and for decoupled decay of lr * weight_decay alike. Where
    c is a power of 2 the trainings are the same bit by bit, as long as no number falls below the
    normal range. ``clip_norm`` is the exception: `torch.nn.utils.clip_grad_norm_` adds 1e-6 to the
    norm, so that scaled gradients are clipped a little differently, by about 1e-6 relative to the
    norm. BatchNorm statistics know nothing of the loss and are no part of this.

    Example:
        >>> found = equivalent_hyperparameters(
        ...     "sum", "mean", members=4, optimizer="sgd", lr=0.1, weight_decay=5e-4, eta_min=1e-3
        ... )
        >>> found.lr, found.weight_decay, found.eta_min, found.bitwise
        (0.4, 0.000125, 0.004, True)
        >>> found = equivalent_hyperparameters("mean", "separate", members=4, optimizer="sgd",
        ...     lr=0.1, weight_decay=5e-4)
        >>> found.lr, found.weight_decay
        (0.025, 0.002)
        >>> found = equivalent_hyperparameters("sum", "mean", members=4, optimizer="adamw", lr=1e-3)
        >>> found.lr, found.weight_decay, found.eps
        (0.001, 0.01, 2.5e-09)
        >>> equivalent_hyperparameters("sum", Joint(0.5), members=4, optimizer="sgd", lr=0.1)
        Traceback (most recent call last):
        ...
        ValueError: no values make Joint(beta=0.5) train like Sum(): ...

    Args:
        given: What the values are for: an objective; ``sum``, ``mean`` or ``mean_field``;
            ``separate`` for M runs, each of one member with an optimizer of its own; ``parent``
            for a run of the parent alone.
        wanted: What values are wanted for. With ``separate`` on one side, the members of the other
            must share no parameters.
        members: Number of members M; the parent is one of them.
        optimizer: ``sgd`` (any momentum, dampening, Nesterov; any kind of decay), ``adam`` (decay
            as L2) or ``adamw`` (decoupled decay), as torch computes them.
        lr: Learning rate.
        weight_decay: None for torch's default.
        eps: Of Adam and AdamW; None for torch's default.
        clip_norm: Greatest norm of all gradients together; None for no such clipping.
        clip_value: Greatest absolute value of an element; None for no such clipping.
        eta_min: Rate at which a cosine schedule ends, or any other rate that is absolute.
        warmup_start: Rate at which a warm-up starts, as a rate.

    Returns:
        The values for ``wanted``.

    Raises:
        ValueError: If no such values exist, and why; or if a value is no such value.

    Source:
        Loshchilov and Hutter 2019 (arXiv 1711.05101) for L2 and decoupled decay; the identities
        follow from the updates as written, and are tested by training.
    """
    _check_values(members, lr, eta_min, warmup_start, clip_norm, clip_value)
    if optimizer not in _DEFAULTS:
        raise ValueError(
            f"optimizer must be one of {get_args(OptimizerName)}, got {optimizer!r}: of others it "
            "is not known what a factor of the loss does to their steps"
        )
    if optimizer == "sgd" and eps is not None:
        raise ValueError(f"SGD has no eps, got eps={eps!r}")
    default_decay, default_eps = _DEFAULTS[optimizer]
    decay = default_decay if weight_decay is None else weight_decay
    eps = default_eps if eps is None else eps
    _check_numbers(weight_decay=decay, eps=eps)

    members, one, other = int(members), _training(given), _training(wanted)
    factor, same_bits = _factor(one, other, members)
    if clip_norm is not None and members > 1 and (one == "separate") != (other == "separate"):
        raise _none_exist(
            one,
            other,
            "one norm over all members' gradients couples the members, and separate runs have one "
            "norm each. Clip each member's gradients by their own norm, or by value",
        )

    of_lr = 1 / factor if optimizer == "sgd" else Fraction(1)
    of_decay = factor if optimizer != "adamw" else Fraction(1)
    return EquivalentHyperparameters(
        lr=_times(lr, of_lr),
        weight_decay=_times(decay, of_decay),
        eps=None if eps is None else _times(eps, factor),
        clip_norm=None if clip_norm is None else _times(clip_norm, factor),
        clip_value=None if clip_value is None else _times(clip_value, factor),
        eta_min=_times(eta_min, of_lr),
        warmup_start=_times(warmup_start, of_lr),
        gradient_factor=float(factor),
        lr_factor=float(of_lr),
        bitwise=same_bits and (clip_norm is None or factor == 1),
    )


# --- objectives as weights of members -----------------------------------------------------------


@dataclass(frozen=True)
class _Weighted:
    """The loss as a weighted sum of member losses; the parent comes first where there is one.

    Attributes:
        weights: Of each member.
        way: How the sum is computed: in the same way, equal sums are rounded alike.
        by_powers: Whether only powers of 2 are multiplied with, which rounds nothing.
    """

    weights: tuple[Fraction, ...]
    way: Literal["sum", "mean", "interpolated", "joint"]
    by_powers: bool


def _training(asked: Training) -> Objective | str:
    """Makes an objective of its name; those without parameters are the same as their names."""
    plain: dict[str, Callable[[], Objective]] = {"sum": Sum, "mean": Mean, "mean_field": MeanField}
    if isinstance(asked, type):
        raise ValueError(f"{asked.__name__} is a class: give an objective, {asked.__name__}(...)")
    if not isinstance(asked, str):
        return asked
    if asked in plain:
        return plain[asked]()
    if asked in ("separate", "parent"):
        return asked
    if asked in OBJECTIVES:
        objective = OBJECTIVES[asked].__name__
        raise ValueError(
            f"{asked!r} does not say enough: give the objective with its value, {objective}(...)"
        )
    raise ValueError(
        f"unknown training {asked!r}: give an objective, or one of {[*plain, 'separate', 'parent']}"
    )


def _factor(given: Objective | str, wanted: Objective | str, members: int) -> tuple[Fraction, bool]:
    """Finds how many times the given gradient the wanted one is, and whether without rounding."""
    if given == wanted:
        return Fraction(1), True
    _check_separate(given, wanted, members)
    forms = []
    for training in (given, wanted):
        form = _weighted(training, members)
        if isinstance(form, str):
            raise _none_exist(given, wanted, form)
        forms.append(form)
    one, other = forms
    ratios = {
        b / a if a else None for a, b in zip(one.weights, other.weights, strict=True) if a or b
    }
    (factor, *rest) = ratios
    if rest or not factor:
        raise _none_exist(
            given,
            wanted,
            f"their weights of the {members} members are {_told(one)} and {_told(other)}, and a "
            "learning rate scales all members alike",
        )
    same_sums = (one.weights, one.way) == (other.weights, other.way)
    return factor, same_sums or (one.by_powers and other.by_powers)


def _weighted(training: Objective | str, members: int) -> _Weighted | str:
    """Writes the loss as a weighted sum of member losses; or says why it is none."""
    equal = (Fraction(1, members),) * members
    if training == "parent":
        return _Weighted((Fraction(1), *(Fraction(0),) * (members - 1)), "sum", by_powers=True)
    if training == "separate" or isinstance(training, Sum):
        return _Weighted((Fraction(1),) * members, "sum", by_powers=True)
    if isinstance(training, Mean | MeanField) or (
        isinstance(training, Joint) and not training.beta
    ):
        return _Weighted(equal, "mean", by_powers=_is_power_of_2(members))
    if isinstance(training, Interpolated):
        return _interpolated(training.lam, members)
    if isinstance(training, Stochastic):
        if training.p == 1 or (training.p == 0 and (training.subnets == "all" or members == 2)):
            return _interpolated(training.p, members)
        return (
            f"each step of {training} follows what was drawn for it; only averaged over the draws "
            f"its loss is that of {training.expectation}"
        )
    if isinstance(training, Joint):
        if members == 1:
            return _Weighted(equal, "joint", by_powers=False)
        return (
            f"{training} couples the members: the gradient of one depends on what the others "
            "predict, and is no multiple of its gradient alone"
        )
    return f"how {training} weighs the members is not known"


def _interpolated(lam: float, members: int) -> _Weighted | str:
    if members == 1:
        return "an interpolated loss needs the parent and at least one subnet, and members is 1"
    subnets = members - 1
    if lam == 1 / members:
        # Up to rounding the mean of all members, though 1 / members may be no binary number.
        equal = (Fraction(1, members),) * members
        return _Weighted(equal, "interpolated", by_powers=members == 2)
    share = Fraction(float(lam))
    weights = (share, *((1 - share) / subnets,) * subnets)
    by_powers = share == 1 or (share == 0 and _is_power_of_2(subnets))
    return _Weighted(weights, "interpolated", by_powers)


def _check_separate(given: Objective | str, wanted: Objective | str, members: int) -> None:
    """Refuses separate runs of members that share weights by what they are."""
    if "separate" not in (given, wanted) or members == 1:
        return
    other = wanted if given == "separate" else given
    if other == "parent":
        raise _none_exist(given, wanted, f"one trains a parent, the other {members} members")
    if isinstance(other, Interpolated | Stochastic | MeanField):
        what = "groups" if isinstance(other, MeanField) else "parent and subnets"
        raise _none_exist(
            given,
            wanted,
            f"{what} share weights, so that every step on one moves the others. "
            "Separate runs have members that share nothing",
        )


# --- numbers and messages -----------------------------------------------------------------------


def _is_power_of_2(number: int) -> bool:
    return number.bit_count() == 1


def _times(value: float, factor: Fraction) -> float:
    # Fractions are exact: one rounding at the end, none where the factor is a power of 2.
    return float(Fraction(float(value)) * factor)


def _told(form: _Weighted) -> str:
    return "(" + ", ".join(f"{float(weight):.4g}" for weight in form.weights) + ")"


def _none_exist(given: Objective | str, wanted: Objective | str, why: str) -> ValueError:
    names = {"separate": "separate runs", "parent": "the parent alone"}
    one, other = (
        names[training] if isinstance(training, str) else str(training)
        for training in (given, wanted)
    )
    return ValueError(f"no values make {other} train like {one}: {why}")


def _check_values(
    members: int,
    lr: float,
    eta_min: float,
    warmup_start: float,
    clip_norm: float | None,
    clip_value: float | None,
) -> None:
    if not isinstance(members, Integral) or members < 1:
        raise ValueError(f"members must be a whole number of at least 1, got {members!r}")
    _check_numbers(lr=lr, eta_min=eta_min, warmup_start=warmup_start)
    _check_numbers(clip_norm=clip_norm, clip_value=clip_value)


def _check_numbers(**values: float | None) -> None:
    for name, value in values.items():
        good = isinstance(value, Real) and math.isfinite(value) and value >= 0
        if value is not None and not good:
            raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
