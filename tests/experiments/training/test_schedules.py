"""Schedules against closed forms, torch's own, and the suite's check of effective rates."""

import math
import warnings
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ensembles.checks.loss_scale.judgement import assert_rates_effective
from ensembles.checks.loss_scale.measurement import measure_loss_scale
from ensembles.experiments.training.schedules import Schedule, make_scheduler

EPOCHS, STEPS = 4, 5


def rates(schedule, *, lr=0.1, epochs=EPOCHS, steps_per_epoch=STEPS):
    """What an optimizer is really stepped at."""
    sgd = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=lr)
    scheduler = make_scheduler(sgd, schedule, epochs=epochs, steps_per_epoch=steps_per_epoch)
    found = []
    for _ in range(epochs * steps_per_epoch):
        found.append(sgd.param_groups[0]["lr"])
        sgd.step()
        scheduler.step()
    return found


def test_cosine_without_warm_up_is_torchs_own():
    sgd = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, EPOCHS * STEPS, eta_min=1e-3)
    expected = []
    for _ in range(EPOCHS * STEPS):
        expected.append(sgd.param_groups[0]["lr"])
        sgd.step()
        cosine.step()
    assert rates(Schedule(floor=0.01)) == pytest.approx(expected, rel=1e-12)


def test_step_falls_at_the_epochs_of_wide_resnets():
    """0.1, and a fifth of it from epochs 60, 120 and 160 of 200 on (arXiv 1605.07146)."""
    found = rates(Schedule(name="step"), epochs=200, steps_per_epoch=2)
    expected = [0.1] * 120 + [0.02] * 120 + [0.004] * 80 + [0.0008] * 80
    assert found == pytest.approx(expected, rel=1e-12)


def test_constant_is_constant():
    assert rates(Schedule(name="constant")) == [0.1] * 20


def test_warm_up_rises_in_equal_steps_from_its_start_to_the_full_rate():
    found = rates(Schedule(name="constant", warmup_epochs=1, warmup_start=0.2))
    assert found == pytest.approx([0.036, 0.052, 0.068, 0.084] + [0.1] * 16, rel=1e-12)


def test_cosine_falls_over_what_the_warm_up_leaves():
    found = rates(Schedule(warmup_epochs=2))
    assert found[:10] == pytest.approx([0.01 * (t + 1) for t in range(10)], rel=1e-12)
    fall = [0.05 * (1 + math.cos(math.pi * t / 10)) for t in range(10)]
    assert found[10:] == pytest.approx(fall, rel=1e-12)


def test_no_warm_up_gives_the_full_rate_at_once():
    for name in ("constant", "cosine", "step"):
        assert rates(Schedule(name=name, warmup_epochs=0))[0] == 0.1


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["constant", "cosine", "step"]),
    warmup=st.floats(0, EPOCHS),
    start=st.floats(0, 1),
    floor=st.floats(0, 1),
)
def test_any_length_of_warm_up_reaches_the_full_rate_and_never_exceeds_it(
    name, warmup, start, floor
):
    schedule = Schedule(name=name, warmup_epochs=warmup, warmup_start=start, floor=floor)
    shares = schedule.shares(epochs=EPOCHS, steps_per_epoch=STEPS)
    rising = math.ceil(warmup * STEPS)
    assert all(0 < share <= 1 for share in shares)
    assert shares[max(rising - 1, 0)] == 1
    assert all(a <= b for a, b in pairwise(shares[:rising]))
    assert all(a >= b for a, b in pairwise(shares[rising:]))
    if name == "cosine":
        assert all(share >= floor * (1 - 1e-12) for share in shares[rising:])


@pytest.mark.parametrize("warmup", [0.0, 0.02, 0.3, 1.0, 1.5, 4.0])
def test_the_suite_finds_the_claimed_warm_up(warmup):
    scale = scaled(Schedule(warmup_epochs=warmup), lr=0.1, reduce=sum)
    assert_rates_effective(scale, warmup=warmup * STEPS)


def test_the_suite_would_find_another_warm_up():
    scale = scaled(Schedule(warmup_epochs=2), lr=0.1, reduce=sum)
    with pytest.raises(AssertionError, match="a warm-up of 5 steps, but warm up in another way"):
        assert_rates_effective(scale, warmup=5)


@pytest.mark.parametrize("members", [2, 3])
@pytest.mark.parametrize("name", ["cosine", "step"])
def test_mean_loss_at_m_times_the_rate_goes_through_m_times_the_same_schedule(members, name):
    """Nothing in it is absolute: floor and start of the warm-up grow with the rate too."""
    schedule = Schedule(name=name, warmup_epochs=0.7, warmup_start=0.1, floor=0.2)
    scale = scaled(
        schedule, lr=0.1 * members, members=members, reduce=lambda losses: sum(losses) / members
    )
    assert_rates_effective(scale, lr=rates(schedule, lr=0.1))


def test_mean_loss_at_the_rate_of_one_is_found():
    scale = scaled(Schedule(), lr=0.1, reduce=lambda losses: sum(losses) / 2)
    with pytest.raises(AssertionError, match="but train at other rates"):
        assert_rates_effective(scale, lr=rates(Schedule(), lr=0.1))


def scaled(schedule, *, lr, reduce, members=2):
    labels = torch.tensor([0, 1, 1])

    def loss(outputs):
        return reduce([nn.functional.cross_entropy(y, labels) for y in outputs.values()])

    return measure_loss_scale(
        nn.ModuleList([nn.Linear(4, 2) for _ in range(members)]),
        torch.linspace(-1, 1, 12).view(3, 4),
        loss=loss,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=lr),
        scheduler=lambda sgd: make_scheduler(sgd, schedule, epochs=EPOCHS, steps_per_epoch=STEPS),
        steps=EPOCHS * STEPS,
    )


@pytest.mark.parametrize("at", [1, 7, 19])
def test_a_scheduler_goes_on_from_its_state(at):
    schedule = Schedule(warmup_epochs=1.5, floor=0.1)
    expected = rates(schedule)

    def made():
        sgd = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        return sgd, make_scheduler(sgd, schedule, epochs=EPOCHS, steps_per_epoch=STEPS)

    sgd, scheduler = made()
    for _ in range(at):
        sgd.step()
        scheduler.step()
    states = sgd.state_dict(), scheduler.state_dict()
    sgd, scheduler = made()
    sgd.load_state_dict(states[0])
    scheduler.load_state_dict(states[1])
    for step in range(at, EPOCHS * STEPS):
        assert sgd.param_groups[0]["lr"] == expected[step]
        sgd.step()
        scheduler.step()


@pytest.mark.parametrize("percent", [7, 28, 55, 57])
@pytest.mark.parametrize("epochs", [1, 3, 10, 30])
def test_a_milestone_falls_on_its_step_and_not_beside_it(percent, epochs):
    """0.55 * 100 is 55.00000000000001 in binary, and 0.57 * 100 is 56.99999999999999."""
    schedule = Schedule(name="step", milestones=(percent / 100,))
    shares = schedule.shares(epochs=epochs, steps_per_epoch=10)
    falls = [t for t in range(1, len(shares)) if shares[t] < shares[t - 1]]
    assert falls == [math.ceil(Fraction(percent, 100) * epochs * 10)]


def test_a_warm_up_that_is_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match=r"a warm-up of 4\.5 epochs is longer than the run of 4"):
        rates(Schedule(warmup_epochs=4.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "linear"}, "schedule must be one of"),
        ({"warmup_epochs": -1}, "warmup_epochs must be at least 0"),
        ({"warmup_epochs": float("nan")}, "warmup_epochs must be at least 0"),
        ({"floor": 1.5}, "floor is a share of the base rate, from 0 to 1, got 1.5"),
        ({"warmup_start": float("nan")}, "warmup_start is a share"),
        ({"milestones": (60, 120)}, "divide epochs by the number of epochs"),
        ({"milestones": (0.5, 0.5)}, "milestones are shares of the run, rising"),
        ({"decay": 0.0}, "decay must be above 0"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**options)


@pytest.mark.parametrize(("epochs", "steps"), [(0, 5), (5, 0)])
def test_a_run_without_steps_is_refused(epochs, steps):
    with pytest.raises(ValueError, match="a run has at least 1 epoch of 1 step"):
        Schedule().share(0, epochs=epochs, steps_per_epoch=steps)


def test_nothing_is_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rates(Schedule(warmup_epochs=EPOCHS))
