"""Trainings with the values that are said to be equivalent: they take the same steps."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from ensembles.models import (
    EquivalentHyperparameters,
    Interpolated,
    Joint,
    Mean,
    MeanField,
    Stochastic,
    Sum,
    equivalent_hyperparameters,
)
from ensembles.models.objectives import Objective

STEPS = 20
WARMUP = 5

VALUES: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.02}
ADAPTIVE: dict[str, Any] = {**VALUES, "lr": 0.01, "eps": 0.01}  # so large that it moves weights


class DecoupledSGD(SGD):
    """SGD whose decay is decoupled, as in SGDW with lr * weight_decay."""

    def __init__(self, parameters: Any, *, weight_decay: float, **kinds: Any) -> None:
        super().__init__(parameters, **kinds)
        self.decay = weight_decay

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(1 - group["lr"] * self.decay)
        return super().step(closure)


OPTIMIZERS: dict[str, tuple[str, Callable[..., torch.optim.Optimizer]]] = {
    "plain": ("sgd", SGD),
    "momentum": ("sgd", functools.partial(SGD, momentum=0.9)),
    "dampening": ("sgd", functools.partial(SGD, momentum=0.9, dampening=0.3)),
    "nesterov": ("sgd", functools.partial(SGD, momentum=0.9, nesterov=True)),
    "decoupled": ("sgd", functools.partial(DecoupledSGD, momentum=0.9)),
    "adam": ("adam", Adam),
    "amsgrad": ("adam", functools.partial(Adam, amsgrad=True)),
    "adamw": ("adamw", AdamW),
}


def network(member: int, dtype: torch.dtype) -> nn.Module:
    generator = torch.Generator().manual_seed(member)
    made = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False))
    made.to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return made


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    images = torch.randn(6, 4, generator=generator)
    return images.to(dtype), torch.randint(3, (6,), generator=generator)


def scheduled(optimizer: torch.optim.Optimizer, values: EquivalentHyperparameters) -> Any:
    """Warm-up from an absolute rate where there is one, else cosine down to one."""
    if values.warmup_start:
        start, lr = values.warmup_start, values.lr
        return LambdaLR(optimizer, lambda step: (start + (lr - start) * min(1, step / WARMUP)) / lr)
    return CosineAnnealingLR(optimizer, STEPS, eta_min=values.eta_min)


def run(
    members: dict[str, nn.Module],
    objective: Objective,
    make: Callable[..., torch.optim.Optimizer],
    values: EquivalentHyperparameters,
    dtype: torch.dtype,
) -> Tensor:
    """Trains, and returns all weights after every step: (step, weight)."""
    parameters = list(dict.fromkeys(p for module in members.values() for p in module.parameters()))
    kinds = {} if values.eps is None else {"eps": values.eps}
    optimizer = make(parameters, lr=values.lr, weight_decay=values.weight_decay, **kinds)
    schedule = scheduled(optimizer, values)
    trajectory = []
    for step in range(STEPS):
        images, labels = batch(step, dtype)
        asked = objective.asked(list(members), step=step, seed=0)
        optimizer.zero_grad()
        objective({name: members[name](images) for name in asked}, labels).backward()
        if values.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, values.clip_norm)
        if values.clip_value is not None:
            nn.utils.clip_grad_value_(parameters, values.clip_value)
        optimizer.step()
        schedule.step()
        trajectory.append(torch.cat([p.detach().flatten() for p in parameters]))
    return torch.stack(trajectory)


@functools.cache
def trained(
    training: Any, count: int, kind: str, values: EquivalentHyperparameters, dtype: torch.dtype
) -> Tensor:
    """The weights of an ensemble of independent members: (step, weight)."""
    make = OPTIMIZERS[kind][1]
    members = {f"member_{m}": network(m, dtype) for m in range(count)}
    if training == "separate":
        runs = [run({name: m}, Sum(), make, values, dtype) for name, m in members.items()]
        return torch.cat(runs, dim=1)
    objective = {"sum": Sum(), "mean": Mean()}.get(training, training)
    return run(members, objective, make, values, dtype)


def unchanged(kind: str, **values: Any) -> EquivalentHyperparameters:
    """The values as they were given."""
    same = equivalent_hyperparameters(
        "sum", "sum", members=2, optimizer=OPTIMIZERS[kind][0], **values
    )
    assert same.gradient_factor == same.lr_factor == 1
    return same


def values_for(kind: str, **more: Any) -> dict[str, Any]:
    return {**(VALUES if OPTIMIZERS[kind][0] == "sgd" else ADAPTIVE), **more}


def both(
    given_: Any, wanted: Any, count: int, kind: str, dtype: torch.dtype, **more: Any
) -> tuple[EquivalentHyperparameters, Tensor, Tensor]:
    values = values_for(kind, **more)
    found = equivalent_hyperparameters(
        given_, wanted, members=count, optimizer=OPTIMIZERS[kind][0], **values
    )
    one = trained(given_, count, kind, unchanged(kind, **values), dtype)
    return found, one, trained(wanted, count, kind, found, dtype)


def distance(one: Tensor, other: Tensor) -> float:
    """The greatest relative distance between the weights, over all steps."""
    return float(((one - other).norm(dim=1) / one.norm(dim=1)).max())


WAYS = [
    ("sum", "mean"),
    ("mean", "sum"),
    ("sum", "separate"),
    ("separate", "sum"),
    ("mean", "separate"),
    ("separate", "mean"),
]


@pytest.mark.parametrize(("given_", "wanted"), WAYS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_four_members_train_alike_bit_by_bit_in_every_way(kind, given_, wanted):
    found, one, other = both(given_, wanted, 4, kind, torch.float32)
    assert found.bitwise
    assert torch.equal(one, other)
    assert not torch.equal(one[0], one[-1])


@pytest.mark.parametrize("kind", ["nesterov", "adam", "adamw"])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_other_powers_of_two_train_alike_bit_by_bit(kind, count):
    for way in WAYS[:2] + WAYS[4:]:
        found, one, other = both(*way, count, kind, torch.float32)
        assert found.bitwise
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("count", [3, 5])
def test_the_sum_trains_as_separate_runs_do_bit_by_bit_for_any_number(kind, count):
    found, one, other = both("sum", "separate", count, kind, torch.float32)
    assert found.bitwise
    assert found == unchanged(kind, **values_for(kind))
    assert torch.equal(one, other)


@pytest.mark.parametrize(("given_", "wanted"), [WAYS[0], WAYS[1], WAYS[4], WAYS[5]])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_three_members_train_alike_up_to_rounding(kind, given_, wanted):
    found, one, other = both(given_, wanted, 3, kind, torch.float64)
    assert not found.bitwise
    assert distance(one, other) < 1e-13


@pytest.mark.parametrize("kind", ["plain", "momentum", "nesterov"])
def test_three_members_differ_by_float32_rounding(kind):
    found, one, other = both("sum", "mean", 3, kind, torch.float32)
    assert not found.bitwise
    assert 0 < distance(one, other) < 1e-6


@pytest.mark.parametrize("dropped", ["lr", "weight_decay", "eps"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_value_that_is_not_converted_is_seen(kind, dropped):
    values = unchanged(kind, **values_for(kind))
    found, one, _ = both("sum", "mean", 4, kind, torch.float32)
    kept = getattr(values, dropped)
    if kept == getattr(found, dropped):
        assert (OPTIMIZERS[kind][0], dropped) in [
            *(("sgd", name) for name in ["eps"]),
            *(("adam", name) for name in ["lr"]),
            *(("adamw", name) for name in ["lr", "weight_decay"]),
        ]
        return
    wrong = dataclasses.replace(found, **{dropped: kept})
    assert distance(one, trained("mean", 4, kind, wrong, torch.float32)) > 1e-3


def test_the_mean_at_the_same_values_is_training_alone_at_a_quarter_of_the_rate():
    found = equivalent_hyperparameters(
        "mean", "separate", members=4, optimizer="sgd", lr=0.05, weight_decay=0.02
    )
    assert (found.lr, found.weight_decay, found.gradient_factor) == (0.05 / 4, 0.08, 4)


@pytest.mark.parametrize("kind", ["nesterov", "adamw"])
@pytest.mark.parametrize("absolute", ["eta_min", "warmup_start"])
def test_schedules_with_absolute_rates_train_alike_when_those_are_converted(kind, absolute):
    rate = {absolute: 0.004}
    found, one, other = both("sum", "mean", 4, kind, torch.float32, **rate)
    assert found.bitwise
    assert torch.equal(one, other)
    if kind == "adamw":
        assert getattr(found, absolute) == 0.004
    else:
        assert getattr(found, absolute) == 0.016
        wrong = dataclasses.replace(found, **rate)
        assert distance(one, trained("mean", 4, kind, wrong, torch.float32)) > 1e-3


def test_an_eta_min_that_is_not_converted_leaves_m_minus_1_times_its_rate():
    values = equivalent_hyperparameters(
        "sum", "mean", members=4, optimizer="sgd", lr=0.1, eta_min=0.001
    )
    rates = []
    for eta_min in (values.eta_min, 0.001):
        optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=values.lr)
        schedule = CosineAnnealingLR(optimizer, STEPS, eta_min=eta_min)
        for _ in range(STEPS):
            optimizer.step()
            schedule.step()
        rates.append(schedule.get_last_lr()[0])
    assert rates[0] - rates[1] == pytest.approx(3 * 0.001)


@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_clipping_by_norm_is_nearly_equal_and_couples_members(kind):
    found, one, other = both("sum", "mean", 4, kind, torch.float64, clip_norm=0.3)
    assert (found.clip_norm, found.bitwise) == (0.3 / 4, False)
    assert 1e-9 < distance(one, other) < 1e-5
    wrong = dataclasses.replace(found, clip_norm=0.3)
    assert distance(one, trained("mean", 4, kind, wrong, torch.float64)) > 1e-2
    alone = trained("separate", 4, kind, unchanged(kind, **values_for(kind, clip_norm=0.3)),
                    torch.float64)  # fmt: skip
    assert distance(one, alone) > 1e-2


@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_clipping_by_value_trains_alike_bit_by_bit_also_separately(kind):
    for way in WAYS:
        found, one, other = both(*way, 4, kind, torch.float32, clip_value=0.05)
        assert found.bitwise
        assert torch.equal(one, other)
    free = trained("sum", 4, kind, unchanged(kind, **values_for(kind)), torch.float32)
    clipped = unchanged(kind, **values_for(kind, clip_value=0.05))
    assert distance(free, trained("sum", 4, kind, clipped, torch.float32)) > 1e-3


# --- parents and subnets ------------------------------------------------------------------------


class Slice(nn.Module):
    """A subnet of a linear parent: some of its input weights, and a bias of its own."""

    def __init__(self, parent: nn.Linear, start: int) -> None:
        super().__init__()
        self.parent, self.start = parent, start
        self.bias = nn.Parameter(torch.zeros(3, dtype=parent.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        part = slice(self.start % 4, self.start % 4 + 2)
        return x[:, part] @ self.parent.weight[:, part].T + self.bias


def shared(training: Any, count: int, values: EquivalentHyperparameters, dtype: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    parent = nn.Linear(4, 3).to(dtype)
    with torch.no_grad():
        for parameter in parent.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    subnets = {f"subnet_{start}": Slice(parent, start) for start in range(count - 1)}
    members: dict[str, nn.Module] = {"parent": parent}
    if training != "parent":
        members |= subnets
    objective = {"parent": Sum(), "sum": Sum(), "mean": Mean()}.get(training, training)
    trajectory = run(members, objective, OPTIMIZERS["nesterov"][1], values, dtype)
    return trajectory[:, :15]  # the parent's weights, which come first


@pytest.mark.parametrize(
    ("given_", "wanted", "count", "bitwise", "factor"),
    [
        (Sum(), Interpolated(0.5), 2, True, 1 / 2),
        (Interpolated(0.2), Sum(), 5, False, 5),
        (Mean(), Interpolated(0.25), 4, False, 1),
        (Interpolated(1.0), "parent", 5, True, 1),
        ("parent", Stochastic(1.0), 3, True, 1),
        (Interpolated(0.0), Stochastic(0.0), 4, True, 1),
        (Stochastic(0.0, "one"), Interpolated(0), 2, True, 1),
        ("sum", "mean", 3, False, 1 / 3),
        (Stochastic(0.5), Stochastic(0.5), 3, True, 1),
        (Joint(0.5), Joint(0.5), 3, True, 1),
    ],
    ids=str,
)
def test_parent_and_subnets_train_alike(given_, wanted, count, bitwise, factor):
    found = equivalent_hyperparameters(given_, wanted, members=count, optimizer="sgd", **VALUES)
    assert found.bitwise == bitwise
    assert found.gradient_factor == pytest.approx(factor, rel=1e-15)
    dtype = torch.float32 if bitwise else torch.float64
    one = shared(given_, count, unchanged("nesterov", **VALUES), dtype)
    other = shared(wanted, count, found, dtype)
    if bitwise:
        assert torch.equal(one, other)
    else:
        assert distance(one, other) < 1e-13


def test_a_joint_loss_without_its_joint_part_is_the_mean():
    found, one, other = both(Joint(0.0), "mean", 3, "momentum", torch.float32)
    assert found.bitwise
    assert torch.equal(one, other)
    found, one, other = both(Joint(0.3), "separate", 1, "momentum", torch.float64)
    assert (found.bitwise, found.gradient_factor) == (False, 1)
    assert distance(one, other) < 1e-14


# --- where no values exist ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_", "wanted", "reason"),
    [
        ("sum", Joint(0.5), "Joint(beta=0.5) couples the members"),
        (Joint(0.5), Joint(0.6), "Joint(beta=0.5) couples the members"),
        (
            Stochastic(0.5),
            "sum",
            "averaged over the draws its loss is that of Interpolated(lam=0.5",
        ),
        (Stochastic(0.5), Interpolated(0.5), "follows what was drawn for it"),
        (Stochastic(0.0, "one"), Interpolated(0), "follows what was drawn for it"),
        (Interpolated(0.5), "parent", "(0.5, 0.1667, 0.1667, 0.1667) and (1, 0, 0, 0)"),
        (Interpolated(0.5), Interpolated(0.25), "a learning rate scales all members alike"),
        (Interpolated(0.5), "sum", "a learning rate scales all members alike"),
        (Interpolated(0.0), "parent", "(0, 0.3333, 0.3333, 0.3333) and (1, 0, 0, 0)"),
        (Interpolated(0.25), "separate", "parent and subnets share weights"),
        ("separate", Stochastic(0.0), "parent and subnets share weights"),
        ("separate", "mean_field", "groups share weights"),
        ("separate", "parent", "one trains a parent, the other 4 members"),
        ("sum", "parent", "a learning rate scales all members alike"),
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_where_no_values_exist_the_reason_is_given(optimizer, given_, wanted, reason):
    with pytest.raises(ValueError, match=f"^no values make .* train like .*{re.escape(reason)}"):
        equivalent_hyperparameters(given_, wanted, members=4, optimizer=optimizer, lr=0.1)


@pytest.mark.parametrize("wanted", ["sum", "mean"])
def test_separate_runs_have_no_common_norm_to_clip_by(wanted):
    values = {"members": 4, "optimizer": "sgd", "lr": 0.1, "clip_norm": 1.0}
    message = f"^no values make {wanted.title()}\\(\\) train like separate runs: one norm over all"
    with pytest.raises(ValueError, match=message):
        equivalent_hyperparameters("separate", wanted, **values)
    assert equivalent_hyperparameters(
        "separate", wanted, **{**values, "members": 1}
    ).clip_norm == 1.0  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"members": 0}, "members must be a whole number of at least 1, got 0"),
        ({"members": 2.5}, "members must be a whole number of at least 1, got 2.5"),
        ({"optimizer": "lamb"}, "optimizer must be one of ('sgd', 'adam', 'adamw'), got 'lamb'"),
        ({"eps": 1e-8}, "SGD has no eps"),
        ({"lr": -0.1}, "lr must be a finite number of at least 0, got -0.1"),
        ({"lr": math.nan}, "lr must be a finite number of at least 0, got nan"),
        ({"lr": "0.1"}, "lr must be a finite number of at least 0, got '0.1'"),
        ({"weight_decay": math.inf}, "weight_decay must be a finite number"),
        ({"clip_norm": -1.0}, "clip_norm must be a finite number"),
        ({"wanted": "stochastic"}, "give the objective with its value, Stochastic(...)"),
        ({"wanted": "median"}, "unknown training 'median': give an objective, or one of ['sum'"),
        ({"wanted": Interpolated(1.0), "members": 1}, "needs the parent and at least one subnet"),
        ({"wanted": Mean}, "Mean is a class: give an objective, Mean(...)"),
        ({"wanted": nn.Identity()}, "how Identity() weighs the members is not known"),
    ],
    ids=str,
)
def test_values_that_are_none_are_refused(changed, message):
    values = {"given": "sum", "wanted": "mean", "members": 4, "optimizer": "sgd", "lr": 0.1}
    with pytest.raises(ValueError, match=re.escape(message)):
        equivalent_hyperparameters(**(values | changed))


# --- laws ---------------------------------------------------------------------------------------

RATES = st.floats(1e-6, 10)


@settings(max_examples=60, deadline=None)
@given(
    way=st.sampled_from(WAYS),
    members=st.integers(1, 9),
    optimizer=st.sampled_from(["sgd", "adam", "adamw"]),
    lr=RATES,
    weight_decay=RATES,
    eta_min=RATES,
)
def test_the_way_back_is_the_inverse(way, members, optimizer, lr, weight_decay, eta_min):
    values = {"lr": lr, "weight_decay": weight_decay, "eta_min": eta_min}
    kinds = {"members": members, "optimizer": optimizer}
    there = equivalent_hyperparameters(*way, **kinds, **values)
    back = equivalent_hyperparameters(
        *reversed(way), **kinds, **{name: getattr(there, name) for name in values}
    )
    for name, value in values.items():
        assert getattr(back, name) == pytest.approx(value, rel=4e-16)
        if there.bitwise:
            assert getattr(back, name) == value
    assert there.gradient_factor * back.gradient_factor == pytest.approx(1)


def test_names_and_objectives_are_the_same_and_defaults_are_those_of_torch():
    kinds = {"members": 4, "lr": 0.1}
    for optimizer, made in [
        ("sgd", SGD([nn.Parameter(torch.zeros(1))], lr=0.1)),
        ("adam", Adam([nn.Parameter(torch.zeros(1))])),
        ("adamw", AdamW([nn.Parameter(torch.zeros(1))])),
    ]:
        found = equivalent_hyperparameters("mean_field", "mean", optimizer=optimizer, **kinds)
        assert found == equivalent_hyperparameters(
            MeanField(), Mean(), optimizer=optimizer, **kinds
        )
        assert found.weight_decay == made.defaults["weight_decay"]
        assert found.eps == made.defaults.get("eps")
        assert found.bitwise
