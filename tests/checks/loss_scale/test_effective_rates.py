import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW
from torch.optim import lr_scheduler as schedules

from ensembles.checks.loss_scale.judgement import assert_rates_effective
from ensembles.checks.loss_scale.measurement import measure_loss_scale
from ensembles.instruments.learning_rates import response_of

STEPS = 40
LABELS = torch.tensor([0, 1, 1, 0, 1])
X = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))


def members(count: int = 4) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(3, 2) for _ in range(count))


def sum_of_losses(outputs) -> Tensor:
    return sum(cross_entropy(y, LABELS) for y in outputs.values())


def mean_of_losses(outputs) -> Tensor:
    return sum_of_losses(outputs) / len(outputs)


def sgd(lr: float = 0.1, wd: float = 1e-3):
    return lambda model: SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=wd)


def cosine(eta_min: float = 0.0):
    return lambda optimizer: schedules.CosineAnnealingLR(optimizer, STEPS - 1, eta_min=eta_min)


def warm_up(length: float):
    def rate(step: int) -> float:
        return (step + 1) / length if step < length else 1.0

    return lambda optimizer: schedules.LambdaLR(optimizer, rate)


def scale_of(loss=sum_of_losses, *, optimizer=None, scheduler=None, count: int = 4, **kinds):
    return measure_loss_scale(
        members(count),
        X,
        loss=loss,
        optimizer=optimizer or sgd(),
        scheduler=scheduler,
        **{"steps": STEPS, **kinds},
    )


def single(scheduler, lr: float = 0.1):
    return lambda parameters: scheduler(SGD(parameters, lr=lr))


PROPORTIONAL = {
    "constant": lambda optimizer: schedules.ConstantLR(optimizer, factor=1.0),
    "step": lambda optimizer: schedules.MultiStepLR(optimizer, [10, 20]),
    "cosine": cosine(),
    "warm-up": warm_up(5),
    "linear": lambda optimizer: schedules.LinearLR(optimizer, 0.1, total_iters=5),
    "sequence": lambda optimizer: schedules.SequentialLR(
        optimizer,
        [
            schedules.LinearLR(optimizer, 0.1, total_iters=5),
            schedules.CosineAnnealingLR(optimizer, 35),
        ],
        [5],
    ),
}


# --- it holds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROPORTIONAL)
def test_the_sum_trains_each_member_as_a_single_model(name):
    scale = scale_of(scheduler=PROPORTIONAL[name])
    assert_rates_effective(scale, lr=0.1, weight_decay=1e-3)
    assert_rates_effective(scale, lr=single(PROPORTIONAL[name]))


@pytest.mark.parametrize("name", PROPORTIONAL)
def test_the_mean_at_scaled_rates_trains_each_member_as_a_single_model(name):
    scale = scale_of(mean_of_losses, optimizer=sgd(0.4, 2.5e-4), scheduler=PROPORTIONAL[name])
    assert_rates_effective(scale, lr=0.1, weight_decay=1e-3)
    assert_rates_effective(scale, lr=single(PROPORTIONAL[name]))


@pytest.mark.parametrize(("kind", "decay"), [(Adam, 4e-3), (AdamW, 1e-3)])
def test_the_mean_under_adam_keeps_the_learning_rate(kind, decay):
    scale = scale_of(
        mean_of_losses,
        optimizer=lambda model: kind(model.parameters(), lr=0.1, weight_decay=1e-3),
        scheduler=cosine(1e-3),
    )
    assert_rates_effective(scale, lr=0.1, weight_decay=decay)
    assert_rates_effective(scale, lr=single(cosine(1e-3)))


def test_the_sum_keeps_absolute_rates_too():
    scale = scale_of(scheduler=cosine(1e-3))
    assert_rates_effective(scale, lr=0.1)
    assert_rates_effective(scale, lr=single(cosine(1e-3)))


def test_absolute_rates_that_were_scaled_too_hold():
    scale = scale_of(mean_of_losses, optimizer=sgd(0.4), scheduler=cosine(4e-3))
    assert_rates_effective(scale, lr=single(cosine(1e-3)))


def test_groups_without_decay_are_no_finding():
    def optimizer(model):
        biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
        weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
        return SGD([{"params": weights, "weight_decay": 1e-3}, {"params": biases}], lr=0.1)

    scale = scale_of(optimizer=optimizer)
    assert [rate.group for rate in scale.members[0].rates] == ["0", "1"]
    assert_rates_effective(scale, lr=0.1, weight_decay=1e-3)


def test_every_member_may_have_an_optimizer_of_its_own():
    def optimizers(model):
        return [SGD(member.parameters(), lr=0.1) for member in model]

    scale = scale_of(optimizer=optimizers, scheduler=cosine(1e-3))
    assert [[rate.group for rate in m.rates] for m in scale.members] == [
        [f"{i}.0"] for i in range(4)
    ]
    assert_rates_effective(scale, lr=single(cosine(1e-3)))


# --- it breaks ----------------------------------------------------------------------------------


def test_the_mean_at_the_rate_of_one_is_broken(golden):
    with pytest.raises(AssertionError) as broken:
        assert_rates_effective(scale_of(mean_of_losses), lr=0.1, weight_decay=1e-3)
    golden(str(broken.value), "messages/effective_rates_mean.txt")


def test_weight_decay_that_was_not_divided_is_broken():
    scale = scale_of(mean_of_losses, optimizer=sgd(0.4, 1e-3))
    assert_rates_effective(scale, lr=0.1)
    with pytest.raises(AssertionError, match=r"expected weight decay 0\.001   found 0\.004"):
        assert_rates_effective(scale, lr=0.1, weight_decay=1e-3)


def test_weight_decay_that_is_missing_is_broken():
    with pytest.raises(AssertionError, match=r"expected weight decay 0\.001   found 0"):
        assert_rates_effective(scale_of(optimizer=sgd(0.1, 0.0)), weight_decay=1e-3)


def test_absolute_rates_that_were_not_scaled_are_broken(golden):
    scale = scale_of(mean_of_losses, optimizer=sgd(0.4), scheduler=cosine(1e-3))
    with pytest.raises(AssertionError) as broken:
        assert_rates_effective(scale, lr=single(cosine(1e-3)))
    golden(str(broken.value), "messages/effective_rates_absolute.txt")


@settings(max_examples=15, deadline=None)
@given(count=st.sampled_from([2, 4, 8]), eta_min=st.sampled_from([1e-4, 1e-3, 1e-2]))
def test_the_error_of_an_absolute_minimum_is_that_of_all_members_but_one(count, eta_min):
    scale = scale_of(
        mean_of_losses, count=count, optimizer=sgd(0.1 * count), scheduler=cosine(eta_min)
    )
    step, by = scale.members[0].rates[0].absolute
    assert step == STEPS - 1
    assert by == pytest.approx(-(count - 1) * eta_min, rel=1e-6)


def test_an_absolute_maximum_is_broken():
    def one_cycle(optimizer):
        return schedules.OneCycleLR(optimizer, max_lr=0.1, total_steps=STEPS)

    scale = scale_of(mean_of_losses, optimizer=sgd(0.4), scheduler=one_cycle)
    with pytest.raises(AssertionError, match="expected lr"):
        assert_rates_effective(scale, lr=single(one_cycle))


def test_a_schedule_that_is_stepped_for_each_member_is_broken(golden):
    def for_each_member(optimizer):
        schedule = schedules.CosineAnnealingLR(optimizer, 4 * STEPS)
        return lambda: [schedule.step() for _ in range(4)]

    def alone(parameters):
        return schedules.CosineAnnealingLR(SGD(parameters, lr=0.1), 4 * STEPS)

    with pytest.raises(AssertionError) as broken:
        assert_rates_effective(scale_of(scheduler=for_each_member), lr=alone)
    golden(str(broken.value), "messages/effective_rates_steps.txt")


# --- warm-up ------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 5, 12])
def test_a_warm_up_of_a_whole_length_holds(length):
    assert_rates_effective(scale_of(scheduler=warm_up(length)), warmup=length)


def test_a_warm_up_that_starts_at_zero_holds():
    def schedule(optimizer):
        return schedules.LambdaLR(optimizer, lambda step: min(1.0, step / 5))

    assert_rates_effective(scale_of(scheduler=schedule), warmup=5)


def test_a_warm_up_of_fractional_length_that_is_bounded_holds():
    def schedule(optimizer):
        return schedules.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 2.5))

    assert_rates_effective(scale_of(scheduler=schedule), warmup=2.5)


def test_a_warm_up_of_fractional_length_that_overshoots_is_broken(golden):
    with pytest.raises(AssertionError) as broken:
        assert_rates_effective(scale_of(scheduler=warm_up(2.5)), warmup=2.5)
    golden(str(broken.value), "messages/effective_rates_warm_up.txt")


def test_a_warm_up_of_length_zero_that_does_not_start_at_the_full_rate_is_broken():
    def schedule(optimizer):
        return schedules.LambdaLR(optimizer, lambda step: min(1.0, step / max(1, 0)))

    with pytest.raises(AssertionError, match=r"step 0   expected lr 0\.1   found 0\n") as broken:
        assert_rates_effective(scale_of(scheduler=schedule), warmup=0)
    assert "no warm-up for a length of 0" in str(broken.value)


def test_a_warm_up_that_does_not_happen_or_end_is_broken():
    with pytest.raises(AssertionError, match="found the full rate at once"):
        assert_rates_effective(scale_of(), warmup=5)
    with pytest.raises(AssertionError, match=r"step 5   expected lr 0\.1   found 0\.06"):
        assert_rates_effective(scale_of(scheduler=warm_up(10)), warmup=5)


# --- wrong use ----------------------------------------------------------------------------------


def test_one_number_does_not_say_what_absolute_rates_are():
    scale = scale_of(mean_of_losses, optimizer=sgd(0.4), scheduler=cosine(1e-3))
    with pytest.raises(ValueError, match="the schedule holds absolute rates"):
        assert_rates_effective(scale, lr=0.1)


def test_nothing_claimed_is_an_error():
    with pytest.raises(ValueError, match="no rate is claimed"):
        assert_rates_effective(scale_of())


def test_no_optimizer_is_an_error():
    scale = measure_loss_scale(members(), X, loss=sum_of_losses)
    with pytest.raises(
        ValueError, match="no optimizer group holds parameters of member 0, 1, 2, 3"
    ):
        assert_rates_effective(scale, lr=0.1)


def test_a_member_that_no_optimizer_holds_is_an_error():
    scale = scale_of(optimizer=lambda model: SGD(model[:3].parameters(), lr=0.1))
    with pytest.raises(ValueError, match="parameters of member 3"):
        assert_rates_effective(scale, lr=0.1)


@pytest.mark.parametrize("kind", [torch.optim.RAdam, torch.optim.LBFGS])
def test_an_optimizer_that_is_neither_has_no_effective_rates(kind):
    def optimizer(model):
        return kind(model.parameters(), lr=0.1)

    with pytest.raises(ValueError, match="has no effective rates to compare"):
        assert_rates_effective(scale_of(mean_of_losses, optimizer=optimizer), lr=0.1)


@pytest.mark.parametrize(
    ("words", "scheduler"),
    [
        ("wait for a metric", schedules.ReduceLROnPlateau),
        ("an object of type int", lambda optimizer: 3),
        ("ZeroDivisionError", lambda optimizer: 1 / 0),
    ],
)
def test_a_scheduler_that_does_not_fit_is_an_error(words, scheduler):
    with pytest.raises(ValueError, match=r"^scheduler=\S+ raised") as refused:
        scale_of(scheduler=scheduler)
    assert words in str(refused.value)


def test_a_warm_up_of_any_optimizer_can_be_looked_at():
    def optimizer(model):
        return torch.optim.RAdam(model.parameters(), lr=0.1)

    scale = scale_of(mean_of_losses, optimizer=optimizer, scheduler=warm_up(5))
    assert_rates_effective(scale, warmup=5)
    with pytest.raises(AssertionError, match="but warm up in another way"):
        assert_rates_effective(scale, warmup=3)


def test_a_schedule_of_a_single_model_that_raises_is_told_by_its_name():
    with pytest.raises(ValueError, match=r"^lr=\.\.\. raised ZeroDivisionError"):
        assert_rates_effective(scale_of(), lr=lambda parameters: 1 / 0)


def test_optimizers_are_built_once_and_once_for_each_multiple():
    builds = []

    def optimizer(model):
        builds.append(model)
        return SGD(model.parameters(), lr=0.1)

    scale_of(sum_of_losses, optimizer=optimizer)
    assert len(builds) == 1
    scale_of(mean_of_losses, optimizer=optimizer)
    assert len(builds) == 1 + 2


def test_rates_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match="lr= has 3 rates, but 40 steps were measured"):
        assert_rates_effective(scale_of(), lr=[0.1, 0.1, 0.1])
    with pytest.raises(ValueError, match="an object of type int"):
        assert_rates_effective(scale_of(), lr=lambda parameters: 3)
    with pytest.raises(ValueError, match="at least one step"):
        scale_of(steps=0)


# --- what optimizers make of a scaled gradient --------------------------------------------------

RESPONSES = {
    "SGD": ("proportional", True),
    "ASGD": ("proportional", True),
    "Adam": ("invariant", False),
    "AdamW": ("invariant", True),
    "NAdam": ("invariant", False),
    "Adamax": ("invariant", False),
    "Adagrad": ("invariant", False),
    "Adadelta": ("invariant", False),
    "RMSprop": ("invariant", False),
    "Rprop": ("invariant", False),
    "RAdam": ("neither", False),
}


@pytest.mark.parametrize("name", RESPONSES)
def test_what_an_optimizer_makes_of_a_scaled_gradient_is_found_by_experiment(name):
    optimizer = getattr(torch.optim, name)([torch.ones(2, requires_grad=True)], lr=0.1)
    response = response_of(optimizer, optimizer.param_groups[0])
    assert (response.kind, response.decoupled) == RESPONSES[name]


def test_an_optimizer_of_the_users_own_is_looked_at_too():
    class Sign(torch.optim.Optimizer):
        def __init__(self, parameters, lr, *, name) -> None:
            super().__init__(parameters, {"lr": lr, "weight_decay": 0.0})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] * (p.grad.sign() + group["weight_decay"] * p))

    optimizer = Sign([torch.ones(2, requires_grad=True)], 0.1, name="mine")
    response = response_of(optimizer, optimizer.param_groups[0])
    assert (response.name, response.kind, response.decoupled) == ("Sign", "invariant", True)


@given(st.floats(1e-3, 1), st.integers(2, 8))
def test_the_product_of_rate_and_decay_is_kept(lr, count):
    response = response_of(SGD([torch.ones(1)], lr=lr), {"params": [], "lr": lr, "weight_decay": 0})
    effective, decay = response.lr(lr, 1 / count), response.decay(1e-2, 1 / count)
    assert math.isclose(effective * decay, lr * 1e-2, rel_tol=1e-12)
