import copy

import pytest
import torch
from torch import nn

from ensembles.checks.trajectory.judgement import assert_trajectories_equal
from ensembles.checks.trajectory.runs import TrainingTrajectory, measure_training_trajectory

BATCH = torch.linspace(-1, 1, 6 * 3 * 16).sin().view(6, 3, 4, 4)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def classifier(momentum: float = 0.1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, momentum=momentum),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def cross_entropy(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([nn.functional.cross_entropy(y, LABELS) for y in outputs.values()]).sum()


def sgd(model: nn.Module, momentum: float = 0.9) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)


class Exact(nn.Module):
    """Weights, and what a few steps make of them, have few digits: nothing is rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 0.5]))
        self.shift = nn.Parameter(torch.tensor([0.5]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0, 0, :3].sign() * self.scale + self.shift


def squares(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return outputs["model"].square().sum() / 16


def exact_sgd(model: nn.Module, momentum: float = 0.5) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.25, momentum=momentum)


def exact_trajectory(**more) -> TrainingTrajectory:
    """Every CPU computes the same figures, in whatever order it adds."""
    return trajectory(Exact, **{"optimizer": exact_sgd, "loss": squares, **more})


def trajectory(make=classifier, **more) -> TrainingTrajectory:
    return measure_training_trajectory(
        make, BATCH, **{"optimizer": sgd, "loss": cross_entropy, **more}
    )


# --- equal ----------------------------------------------------------------------------------------


def test_two_runs_from_one_seed_are_equal():
    one, two = trajectory(), trajectory()
    assert one == two
    assert_trajectories_equal(one, two)


def test_another_seed_is_another_run():
    assert trajectory(seed=1) != trajectory(seed=2)


def test_the_series_has_every_step_and_every_kind():
    recorded = trajectory(steps=4)
    assert recorded.steps == len(recorded.losses) == 4
    for step in range(1, 5):
        kinds = {entry.kind for entry in recorded.entries if entry.step == step}
        assert kinds == {"output", "loss", "gradient", "parameter", "buffer", "state"}


def test_the_series_reads_as_a_table():
    recorded = measure_training_trajectory(
        lambda: nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1)),
        torch.zeros(4, 2),
        loss=lambda outputs: 0 * outputs["model"].square().sum(),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.0),
        steps=2,
        seed=0,
    )
    lines = str(recorded).splitlines()
    assert lines[0] == "2 steps of 1 member from seed 0, loss 0 to 0"
    assert lines[1].split() == ["step", "output", "loss", "gradient", "parameter", "buffer"]
    assert [line.split()[0] for line in lines[2:]] == ["0", "1", "2"]


def test_a_member_of_an_ensemble_can_be_compared_with_a_single_model():
    single = trajectory()
    ensemble = trajectory(lambda: [classifier()], optimizer=lambda m: sgd(nn.ModuleList(m)))
    assert_trajectories_equal(ensemble.member("0"), single.member("model"))


# --- parted ---------------------------------------------------------------------------------------


def test_another_momentum_of_the_optimizer_parts_in_the_second_step(golden):
    with pytest.raises(AssertionError, match="differ from step 2 on"):
        assert_trajectories_equal(
            trajectory().only("output", "parameter"),
            trajectory(optimizer=lambda model: sgd(model, 0.8)).only("output", "parameter"),
        )
    with pytest.raises(AssertionError) as broken:
        assert_trajectories_equal(
            exact_trajectory().only("output", "parameter"),
            exact_trajectory(optimizer=lambda model: exact_sgd(model, 0.25)).only(
                "output", "parameter"
            ),
        )
    golden(str(broken.value), "messages/trajectory_momentum.txt")


def test_another_momentum_of_batchnorm_parts_in_its_buffers_only(golden):
    with pytest.raises(AssertionError) as broken:
        assert_trajectories_equal(trajectory(), trajectory(lambda: classifier(momentum=0.2)))
    golden(str(broken.value), "messages/trajectory_buffers.txt")


def test_a_doubled_loss_parts_in_the_gradients(golden):
    with pytest.raises(AssertionError, match=r"step 1, gradient model\.0\.weight   norm 2 times"):
        assert_trajectories_equal(
            trajectory(loss=lambda outputs: 2 * cross_entropy(outputs)).only("gradient", "output"),
            trajectory().only("gradient", "output"),
        )
    with pytest.raises(AssertionError) as broken:
        assert_trajectories_equal(
            exact_trajectory(loss=lambda y: 2 * squares(y)).only("gradient", "output"),
            exact_trajectory().only("gradient", "output"),
        )
    golden(str(broken.value), "messages/trajectory_doubled_loss.txt")


def test_one_changed_bit_of_one_weight_is_seen():
    def nudged() -> nn.Module:
        model = classifier()
        with torch.no_grad():
            weight = model[5].weight[2, 3]
            weight.copy_(torch.nextafter(weight, torch.tensor(1.0)))
        return model

    with pytest.raises(AssertionError, match=r"step 0, parameter model\.5\.weight   same norm"):
        assert_trajectories_equal(trajectory(), trajectory(nudged))


def test_a_run_with_a_tensor_more_is_broken():
    with pytest.raises(AssertionError, match=r"model\.0\.bias +in the first run only"):
        assert_trajectories_equal(
            trajectory(lambda: nn.Sequential(nn.Conv2d(3, 3, 4), nn.Flatten())),
            trajectory(lambda: nn.Sequential(nn.Conv2d(3, 3, 4, bias=False), nn.Flatten())),
        )


# --- within a tolerance ---------------------------------------------------------------------------


def test_a_tolerance_lets_roundings_pass_and_nothing_else():
    exact = trajectory(values=True)
    rounded = trajectory(lambda: changed(classifier(), 1e-7), values=True)
    other = trajectory(lambda: changed(classifier(), 1e-2), values=True)
    assert exact != rounded
    assert_trajectories_equal(exact, rounded, tolerance=1e-3)
    with pytest.raises(
        AssertionError, match=r"claimed equal within 0\.001, but differ from step 0"
    ):
        assert_trajectories_equal(exact, other, tolerance=1e-3)


def changed(model: nn.Module, by: float) -> nn.Module:
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] += by
    return model


def test_what_is_not_a_number_is_within_no_tolerance():
    def holding(value: float) -> TrainingTrajectory:
        return trajectory(
            lambda: _Holder(value),
            values=True,
            loss=lambda outputs: outputs["model"].square().sum(),
        )

    assert_trajectories_equal(holding(float("nan")), holding(float("nan")), tolerance=0.1)
    with pytest.raises(AssertionError, match=r"buffer model\.kept"):
        assert_trajectories_equal(holding(float("nan")), holding(0.0), tolerance=0.1)


class _Holder(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("kept", torch.tensor([1.0, value]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


# --- wrong use ------------------------------------------------------------------------------------


def test_a_tolerance_without_values_is_an_error():
    with pytest.raises(ValueError, match="record both runs with values=True"):
        assert_trajectories_equal(trajectory(seed=1), trajectory(seed=2), tolerance=0.1)


def test_runs_of_different_lengths_are_an_error():
    with pytest.raises(ValueError, match="has 1 step, but the other has 2 steps"):
        assert_trajectories_equal(trajectory(steps=1), trajectory(steps=2))


def test_runs_without_a_member_in_common_are_an_error():
    two = trajectory(
        lambda: {"a": classifier(), "b": classifier()},
        optimizer=lambda model: sgd(nn.ModuleDict(model)),
    )
    with pytest.raises(ValueError, match="nothing in common to compare: members a, b and model"):
        assert_trajectories_equal(two.only("parameter"), trajectory().only("parameter"))


def test_a_member_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match=r"no member is named '7'\. Members are model"):
        trajectory().member("7")


def test_no_steps_are_an_error():
    with pytest.raises(ValueError, match="at least 1 optimizer step"):
        trajectory(steps=0)


def test_a_loss_that_is_not_finite_is_an_error():
    with pytest.raises(ValueError, match="is inf for this model"):
        trajectory(loss=lambda outputs: outputs["model"].sum() * torch.inf)


def test_a_detached_loss_is_an_error():
    with pytest.raises(ValueError, match="the backward pass of the loss raised RuntimeError"):
        trajectory(loss=lambda outputs: outputs["model"].detach().sum())


def test_what_is_no_model_is_an_error():
    with pytest.raises(ValueError, match="the model is an object of type int"):
        trajectory(3)


# --- looking --------------------------------------------------------------------------------------


def test_looking_changes_nothing():
    model = classifier().eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    batch = BATCH.clone()
    trajectory(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert bool((model[0].weight.grad == 1).all())
    assert model[5].weight.grad is None
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert torch.equal(batch, BATCH)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_model_is_recorded_alike_as_often_as_one_looks():
    model = classifier()
    assert trajectory(model) == trajectory(model)


def test_a_tied_weight_is_recorded_under_both_names():
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 48), nn.Linear(48, 48))
        model[2].weight = model[1].weight
        return model

    names = {e.place for e in trajectory(tied, loss=None).entries if e.kind == "gradient"}
    assert {"model.1.weight", "model.2.weight"} <= names


def test_a_common_stem_is_recorded_too():
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(4, 4)
            self.heads = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [head(self.stem(x)) for head in self.heads]

    recorded = trajectory(TwoHeads, members=lambda model: list(model.heads), loss=None)
    gradients = {entry.place for entry in recorded.entries if entry.kind == "gradient"}
    assert gradients == {
        "stem.weight", "stem.bias", "0.weight", "0.bias", "1.weight", "1.bias",
    }  # fmt: skip


def test_the_fixture_compares_two_runs(training_trajectory):
    runs = [training_trajectory.measure(classifier, BATCH) for _ in range(2)]
    training_trajectory.assert_equal(*runs)
