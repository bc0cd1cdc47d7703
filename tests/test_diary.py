"""The questions of the research diary that this project began with, each with its answer.

`docs/diary.md` tells them in words. Every run here is deterministic, and "the same" is said of
bits unless a tolerance is named.
"""

import copy
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from ensembles.checks.trajectory.judgement import (
    assert_members_trained_alone,
    assert_trajectories_equal,
)
from ensembles.checks.trajectory.measurement import measure_member_trajectories
from ensembles.checks.trajectory.runs import TrainingTrajectory, measure_training_trajectory
from ensembles.models import Ensemble, NStreams, resnet18, subnet_resnet18

STEPS = 3
MOMENTUM = 0.1
"""Of BatchNorm, as PyTorch has it by default."""

IMAGES = torch.linspace(-1, 1, 6 * 3 * 64).mul(40).sin().view(6, 3, 8, 8)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def network(momentum: float = MOMENTUM) -> nn.Module:
    """A residual network of the diary's kind, a sixteenth as wide."""
    model = resnet18(base_channels=4, stem="cifar", num_classes=3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    return model


def sgd(model) -> torch.optim.Optimizer:
    whole = model if isinstance(model, nn.Module) else nn.ModuleList(list(model))
    return torch.optim.SGD(
        whole.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
    )


def losses(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([nn.functional.cross_entropy(y, LABELS) for y in outputs.values()])


def summed(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return losses(outputs).sum()


def averaged(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return losses(outputs).mean()


def single_run(**more) -> TrainingTrajectory:
    """One network by itself: what every other run is compared with."""
    return run(network, **more)


def run(make, *, loss=averaged, **more) -> TrainingTrajectory:
    options = {"optimizer": sgd, "steps": STEPS, **more}
    return measure_training_trajectory(make, IMAGES, loss=loss, **options)


def stream_run(streams: int, *, momentum: float = MOMENTUM, **more) -> TrainingTrajectory:
    """The diary's run of 10/26: N streams through one network, seen as that network."""
    return run(
        lambda: NStreams(network(momentum), streams),
        members=lambda model: dict.fromkeys(map(str, range(streams)), model.network),
        **more,
    ).member("0")


# --- 10/24: gradients of the factory layer --------------------------------------------------------


class Factory(nn.Module):
    """The layer of 10/24: it makes its convolutions, and keeps them in a Python list."""

    def __init__(self, keep=list) -> None:
        super().__init__()
        self.convs = keep([nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(conv(x) for conv in self.convs).mean((2, 3))


def test_10_24_why_does_the_factory_layer_get_no_training(optimizer_coverage):
    with pytest.raises(AssertionError, match=r"convs\[0\]"):
        optimizer_coverage.assert_complete(
            nn.Sequential(Factory(), nn.Linear(4, 3)), IMAGES, optimizer=sgd
        )
    listed = nn.Sequential(Factory(nn.ModuleList), nn.Linear(4, 3))
    optimizer_coverage.assert_complete(listed, IMAGES, optimizer=sgd)


def test_10_24_does_a_conv_with_subnets_need_no_list_of_modules(optimizer_coverage):
    model = subnet_resnet18(width=2, base_channels=2, stem="cifar", num_classes=3)
    optimizer_coverage.assert_complete(model, IMAGES, optimizer=sgd)
    conv = model.parent.layer1[0].conv1
    assert isinstance(conv, nn.Conv2d)
    assert [name for name, _ in conv.named_parameters()] == ["weight"]
    for block in conv.subnets:
        (gradient,) = torch.autograd.grad(block(torch.ones(1, 2, 4, 4)).sum(), conv.weight)
        reached = gradient.ne(0).any(-1).any(-1)
        inside = torch.zeros(4, 4, dtype=torch.bool)
        inside[2 * block.i : 2 * block.i + 2, 2 * block.j : 2 * block.j + 2] = True
        assert torch.equal(reached, inside)


# --- 10/26: should be the exact same performance as a single model --------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_10_26_is_a_deterministic_ensemble_the_exact_same_as_a_single_model(count):
    assert_members_trained_alone(
        measure_member_trajectories(
            lambda: Ensemble.of(network, count),
            IMAGES,
            members=lambda model: list(model.members),
            optimizer=sgd,
            loss=summed,
            identical=True,
        )
    )


def test_10_26_is_its_prediction_the_single_models_too():
    torch.manual_seed(0)
    single = network()
    ensemble = Ensemble([copy.deepcopy(single) for _ in range(4)])
    for model, optimizer in ((single, sgd(single)), (ensemble, sgd(ensemble))):
        for _ in range(STEPS):
            optimizer.zero_grad()
            outputs = model(IMAGES) if model is ensemble else [model(IMAGES)]
            summed(dict(enumerate(outputs))).backward()
            optimizer.step()
        model.eval()
    alone = single(IMAGES)
    together = torch.stack(ensemble(IMAGES))
    assert all(torch.equal(output, alone) for output in together)
    assert torch.equal(together.mean(0), alone)


def test_10_26_are_independent_members_the_same_as_separate_runs():
    assert_members_trained_alone(
        measure_member_trajectories(
            lambda: [network() for _ in range(3)], IMAGES, optimizer=sgd, loss=summed
        )
    )


def test_10_26_does_seeding_everything_mean_the_same_weights():
    """No: every member draws on, and only a seed before each would make them the same."""
    torch.manual_seed(0)
    first, second = Ensemble.of(network, 2).members
    drawn = [name for name, p in first.named_parameters() if bool((p != p.flatten()[0]).any())]
    assert drawn
    assert {"conv1.weight", "fc.weight"} <= set(drawn)
    for name in drawn:
        assert not torch.equal(first.get_parameter(name), second.get_parameter(name))

    def seeded_anew() -> nn.Module:
        torch.manual_seed(0)
        return network()

    first, second = Ensemble.of(seeded_anew, 2).members
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name))


def test_10_26_does_seeding_everything_mean_the_same_ensemble(seeded_determinism):
    """Yes: the whole ensemble is the same in every run from one seed."""
    seeded_determinism.assert_bitwise(
        lambda: Ensemble.of(network, 2), IMAGES, optimizer=sgd, loss=summed
    )


# --- 10/27: the weight-shared run -----------------------------------------------------------------


@pytest.mark.parametrize("streams", [2, 4])
def test_10_27_are_the_weights_of_the_shared_run_those_of_the_single_model(streams):
    kinds = ("output", "gradient", "parameter", "state")
    shared, single = stream_run(streams).only(*kinds), single_run().only(*kinds)
    assert_trajectories_equal(shared, single)


@pytest.mark.parametrize("streams", [3, 5])
def test_10_27_are_they_so_for_every_number_of_streams(streams):
    """No: a third is no binary fraction. The weights are the same up to rounding only."""
    shared, single = (
        trajectory.only("parameter")
        for trajectory in (stream_run(streams, values=True), single_run(values=True))
    )
    with pytest.raises(AssertionError, match="claimed equal bit by bit, but differ from step"):
        assert_trajectories_equal(shared, single)
    # BatchNorm over six samples of one pixel makes much of a rounding.
    assert_trajectories_equal(shared, single, tolerance=1e-3)


@pytest.mark.parametrize("streams", [2, 3, 4, 5])
def test_10_27_what_does_a_summed_loss_make_of_the_shared_run(streams):
    """Its gradient is N times that of the single model: an N times greater learning rate."""
    first = {
        entry.name: entry.values
        for entry in stream_run(streams, loss=summed, values=True).only("gradient").entries
        if entry.step == 1
    }
    single = [e for e in single_run(values=True).only("gradient").entries if e.step == 1]
    assert len(single) == len(first) > 0
    for entry in single:
        assert torch.equal(first[entry.name], streams * entry.values), entry.name


@pytest.mark.parametrize("streams", [2, 4])
def test_10_27_why_is_its_test_accuracy_another(streams):
    """BatchNorm's statistics move N times a step: the weights are the same, evaluation is not."""
    shared, single = (
        {entry.name: entry.values for entry in trajectory.only("buffer").entries if entry.step == 1}
        for trajectory in (stream_run(streams, values=True), single_run(values=True))
    )
    acts_as = 1 - (1 - MOMENTUM) ** streams
    for name, before in single.items():
        if name.endswith("num_batches_tracked"):
            assert (int(shared[name]), int(before)) == (streams, 1)
        elif name.endswith("running_mean"):  # it starts from zero
            torch.testing.assert_close(
                shared[name], before * acts_as / MOMENTUM, rtol=1e-5, atol=1e-7
            )
            assert not torch.equal(shared[name], before)


def test_10_27_does_the_shared_run_predict_something_else():
    torch.manual_seed(0)
    single = network()
    shared = NStreams(copy.deepcopy(single), 4)
    for model, optimizer in ((single, sgd(single)), (shared, sgd(shared))):
        for _ in range(STEPS):
            optimizer.zero_grad()
            outputs = model(IMAGES) if model is shared else [model(IMAGES)]
            averaged(dict(enumerate(outputs))).backward()
            optimizer.step()
    for (name, one), two in zip(
        single.named_parameters(), shared.network.parameters(), strict=True
    ):
        assert torch.equal(one, two), name
    assert torch.equal(single(IMAGES), shared.network(IMAGES))  # with the batch's statistics
    single.eval(), shared.eval()
    apart = (single(IMAGES) - shared.network(IMAGES)).abs().amax(1)
    assert (apart > 1e-3).all()  # every image's prediction, and not merely one


@pytest.mark.parametrize("streams", [2, 4])
def test_10_27_which_momentum_repairs_the_statistics(streams):
    """1 - (1 - 0.1)^(1/N), so that N updates act as one."""
    repaired = 1 - (1 - MOMENTUM) ** (1 / streams)
    shared, single = (
        TrainingTrajectory(
            trajectory.seed,
            trajectory.members,
            tuple(e for e in trajectory.entries if not e.name.endswith("num_batches_tracked")),
        )
        for trajectory in (
            stream_run(streams, momentum=repaired, values=True),
            single_run(values=True),
        )
    )
    kinds = ("output", "gradient", "parameter", "state", "buffer")
    assert_trajectories_equal(shared.only(*kinds), single.only(*kinds), tolerance=5e-7)
    unrepaired = stream_run(streams, values=True).only("buffer")
    with pytest.raises(AssertionError, match=r"buffer 0\.bn1\.running_var +by"):
        assert_trajectories_equal(
            unrepaired, single_run(values=True).only("buffer"), tolerance=0.01
        )


def test_10_27_are_the_weights_of_two_streams_identical_at_initialization(parameter_sharing):
    """They are more: they are one tensor, which a comparison of values cannot tell."""
    streams = NStreams(network(), 2)
    parameter_sharing.assert_tied(streams, members=lambda model: [model.network] * 2)
    copies = [streams.network, copy.deepcopy(streams.network)]
    parameter_sharing.assert_independent(copies)


# --- 10/27: the order of minibatches --------------------------------------------------------------


def trained(members: list[nn.Module], orders: list[list[int]], size: int) -> None:
    """One epoch of each member, over its own order of the images in minibatches of `size`."""
    for member, order in zip(members, orders, strict=True):
        optimizer = torch.optim.SGD(member.parameters(), lr=0.1)
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            optimizer.zero_grad()
            nn.functional.cross_entropy(member(IMAGES[rows].double()), LABELS[rows]).backward()
            optimizer.step()


def apart(size: int, *, same_order: bool) -> float:
    """How far two members with the same weights come apart in an epoch, at most."""
    torch.manual_seed(0)
    first = network().double()
    second = copy.deepcopy(first)
    orders = [list(range(6)), [5, 3, 1, 0, 4, 2]]
    trained([first, second], [orders[0], orders[0 if same_order else 1]], size)
    return max(
        float((p - q).detach().abs().max())
        for p, q in zip(first.parameters(), second.parameters(), strict=True)
    )


def test_10_27_do_the_members_of_an_ensemble_share_the_order_of_minibatches():
    """Yes: every member is called on the same batch, the same tensor."""
    seen: list[torch.Tensor] = []
    ensemble = Ensemble.of(network, 3)
    for member in ensemble.members:
        member.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    ensemble(IMAGES)
    assert len(seen) == 3
    assert all(batch is IMAGES for batch in seen)


def test_10_27_is_the_order_of_minibatches_a_source_of_diversity():
    assert apart(2, same_order=True) == 0
    assert apart(2, same_order=False) > 1e-3


def test_10_27_does_it_vanish_as_the_batch_grows_to_the_whole_data_set():
    """Yes: one batch of everything has no order, but for the order of additions."""
    assert apart(6, same_order=False) < 1e-10


def test_10_27_do_two_loaders_with_one_seed_have_one_order():
    orders = [
        list(
            torch.utils.data.RandomSampler(range(20), generator=torch.Generator().manual_seed(seed))
        )
        for seed in (1, 1, 2)
    ]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert sorted(orders[2]) == list(range(20))


# --- 11/03: sum against mean, here only as far as a trajectory tells ------------------------------


COUNT = 2
KINDS = ("output", "parameter", "buffer")


def ensemble() -> list[nn.Module]:
    return [network() for _ in range(COUNT)]


def rescaled(model) -> torch.optim.Optimizer:
    optimizer = sgd(model)
    for group in optimizer.param_groups:
        group["lr"] *= COUNT
        group["weight_decay"] /= COUNT
    return optimizer


def test_11_03_is_a_mean_a_sum_at_a_lower_rate():
    """A mean at (M lr, wd / M) is the sum at (lr, wd), bit by bit for a power of two."""
    sums = run(ensemble, loss=summed).only(*KINDS)
    means = run(ensemble, loss=averaged, optimizer=rescaled)
    assert_trajectories_equal(means.only(*KINDS), sums)
    unscaled = run(ensemble, loss=averaged).only(*KINDS)
    with pytest.raises(AssertionError, match="differ from step 1"):
        assert_trajectories_equal(unscaled, sums)


def cosine(eta_min: float):
    return partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=2, eta_min=eta_min)


def warm_up(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 2))


@pytest.mark.parametrize(
    ("of_the_sum", "of_the_mean", "parts"),
    [
        (warm_up, warm_up, ""),
        (cosine(0.0), cosine(0.0), ""),
        (cosine(0.01), cosine(COUNT * 0.01), ""),
        (cosine(0.01), cosine(0.01), "differ from step 2"),
    ],
    ids=["warm-up", "cosine", "cosine to a scaled minimum", "cosine to one minimum"],
)
def test_11_03_do_warm_up_and_cosine_annealing_scale_with_the_rate(of_the_sum, of_the_mean, parts):
    """What is proportional to the base rate does; an absolute minimum has to be scaled too."""
    sums = run(ensemble, loss=summed, scheduler=of_the_sum).only(*KINDS)
    means = run(ensemble, loss=averaged, optimizer=rescaled, scheduler=of_the_mean).only(*KINDS)
    with pytest.raises(AssertionError, match=parts) if parts else nullcontext():
        assert_trajectories_equal(means, sums)


@pytest.mark.parametrize("count", [2, 4])
def test_11_03_which_single_model_does_a_mean_at_default_rates_train(count):
    """The one at (lr / M, M wd): the dark blue curve of the diary, and the reason for it."""
    assert_members_trained_alone(
        measure_member_trajectories(
            lambda: [network() for _ in range(count)],
            IMAGES,
            optimizer=sgd,
            loss=averaged,
            loss_is="mean",
        )
    )


# --- the page -------------------------------------------------------------------------------------


def test_the_page_names_every_test_of_this_file_and_none_that_is_not_there():
    page = Path(__file__).parents[1] / "docs" / "diary.md"
    named = set(re.findall(r"`(test_\d\d_\d\d_\w+)`", page.read_text()))
    assert named == {name for name in globals() if re.match(r"test_\d\d_\d\d_", name)}


def test_tests_of_other_files_that_the_page_names_are_there():
    root = Path(__file__).parents[1]
    page = (root / "docs" / "diary.md").read_text()
    links = set(re.findall(r"\]\(\.\./(tests/[\w/]+\.py)\)", page))
    assert {
        "tests/checks/trajectory/test_member_runs.py",
        "tests/checks/loss_scale/test_loss_scale.py",
    } <= links
    defined = "".join((root / link).read_text() for link in links)
    named = set(re.findall(r"`(test_\w+)`", page))
    assert {name for name in named if f"def {name}(" not in defined} == set()
