import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from ensembles.checks.trajectory.judgement import (
    assert_members_trained_alone,
    assert_trajectories_equal,
)
from ensembles.checks.trajectory.measurement import measure_member_trajectories
from ensembles.checks.trajectory.runs import measure_training_trajectory
from ensembles.claims import ClaimError
from ensembles.gate.conformance import check_ensemble
from ensembles.models import Ensemble, NStreams
from ensembles.subject import Subject

BATCH = torch.linspace(-1, 1, 6 * 3 * 16).sin().view(6, 3, 4, 4)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(48, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)
    )


class Residual(nn.Module):
    """A block with dropout inside, a layer that is used twice, and in-place activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout2d(0.2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu_()
        x = x + self.norm(self.drop(x)).relu_()
        return self.head(x.mean((2, 3)))


def several(count: int) -> list[nn.Module]:
    return [mlp() for _ in range(count)]


ARCHITECTURES = {"convnet": convnet, "mlp": mlp, "residual": Residual}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "nesterov and decay": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
    ),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.01),
}


def for_all(build):
    """An optimizer of one module, or of a list or dict of them."""

    def optimizer(model):
        if isinstance(model, nn.Module):
            return build(list(model.parameters()))
        modules = model.values() if isinstance(model, dict) else model
        return build([p for module in modules for p in module.parameters()])

    return optimizer


def losses(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([nn.functional.cross_entropy(y, LABELS) for y in outputs.values()])


def summed(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return losses(outputs).sum()


def averaged(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return losses(outputs).mean()


def of_mean_prediction(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(torch.stack(list(outputs.values())).mean(0), LABELS)


def assert_alone(make, *, tolerance: float = 0.0, **more) -> None:
    recipe = {"optimizer": for_all(OPTIMIZERS["nesterov and decay"]), "loss": summed, **more}
    assert_members_trained_alone(
        measure_member_trajectories(make, BATCH, values=bool(tolerance), **recipe),
        tolerance=tolerance,
    )


# --- the ensemble equals the single model ---------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_identical_members_of_a_summed_loss_follow_the_single_model_bit_by_bit(count, optimizer):
    assert_alone(
        lambda: [convnet() for _ in range(count)],
        identical=True,
        optimizer=for_all(OPTIMIZERS[optimizer]),
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("architecture", ["mlp", "residual"])
def test_so_they_do_in_other_architectures(architecture, count, optimizer):
    assert_alone(
        lambda: [ARCHITECTURES[architecture]() for _ in range(count)],
        identical=True,
        optimizer=for_all(OPTIMIZERS[optimizer]),
    )


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_independent_members_of_a_summed_loss_follow_their_own_separate_runs(architecture, count):
    assert_alone(lambda: [ARCHITECTURES[architecture]() for _ in range(count)])


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_so_they_do_under_every_optimizer(architecture, optimizer):
    assert_alone(
        lambda: [ARCHITECTURES[architecture]() for _ in range(3)],
        optimizer=for_all(OPTIMIZERS[optimizer]),
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("architecture", ["mlp", "residual"])
def test_a_mean_of_two_is_the_single_model_at_rescaled_rates_in_other_architectures(
    architecture, optimizer
):
    assert_alone(
        lambda: [ARCHITECTURES[architecture]() for _ in range(2)],
        identical=True,
        optimizer=for_all(OPTIMIZERS[optimizer]),
        loss=averaged,
        loss_is="mean",
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("count", [2, 4, 8])
def test_a_mean_over_a_power_of_two_is_the_single_model_at_rescaled_rates(count, optimizer):
    assert_alone(
        lambda: [convnet() for _ in range(count)],
        identical=True,
        optimizer=for_all(OPTIMIZERS[optimizer]),
        loss=averaged,
        loss_is="mean",
    )


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "nesterov and decay"])
@pytest.mark.parametrize("count", [3, 5])
def test_a_mean_over_another_number_is_so_up_to_rounding(count, optimizer):
    assert_alone(
        lambda: [convnet() for _ in range(count)],
        identical=True,
        optimizer=for_all(OPTIMIZERS[optimizer]),
        loss=averaged,
        loss_is="mean",
        tolerance=1e-6,
    )


@pytest.mark.parametrize("kind", ["dict", "module list", "one module"])
def test_members_may_be_given_in_any_form(kind):
    def make():
        members = [mlp() for _ in range(3)]
        if kind == "dict":
            return {f"m{i}": member for i, member in enumerate(members)}
        return nn.ModuleList(members) if kind == "module list" else Ensemble(members)

    found = (lambda model: list(model.members)) if kind == "one module" else None
    assert_alone(make, members=found, identical=True)
    assert_alone(make, members=found)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_scripted_members_follow_in_a_list_and_are_an_error_inside_a_module():
    def scripted() -> nn.Module:
        return torch.jit.script(nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(48, 3)))

    assert_alone(lambda: [scripted(), scripted()])
    with pytest.raises(ValueError, match="member 0 is a ScriptModule inside another module"):
        assert_alone(
            lambda: Ensemble([scripted(), scripted()]), members=lambda model: list(model.members)
        )


def test_the_default_loss_and_optimizer_follow_too():
    measured = measure_member_trajectories(lambda: [convnet(), convnet()], BATCH)
    assert_members_trained_alone(measured)
    assert str(measured) == "2 of 2 members follow separate runs bit by bit for 3 steps"


# --- it does not ----------------------------------------------------------------------------------


def test_an_averaged_loss_is_broken(golden):
    with pytest.raises(AssertionError) as broken:
        assert_alone(lambda: [convnet() for _ in range(4)], identical=True, loss=averaged)
    golden(str(broken.value), "messages/alone_averaged.txt")


def test_a_sum_that_is_claimed_a_mean_is_broken():
    with pytest.raises(AssertionError, match="at the rates of a mean loss, but do not"):
        assert_alone(lambda: [convnet() for _ in range(2)], loss=summed, loss_is="mean")


def test_one_network_under_four_names_is_broken(golden):
    with pytest.raises(AssertionError) as broken:
        assert_alone(lambda: [convnet()] * 4, identical=True)
    golden(str(broken.value), "messages/alone_one_network.txt")


def test_the_mean_of_streams_through_one_network_is_broken_by_its_buffers():
    with pytest.raises(AssertionError, match=r"step 1   buffer 0\.1\.running_mean"):
        assert_alone(
            lambda: NStreams(convnet(), 2),
            members=lambda model: [model.network] * 2,
            loss=averaged,
        )


def clip_all(model) -> None:
    modules = [model] if isinstance(model, nn.Module) else model
    nn.utils.clip_grad_norm_([p for m in modules for p in m.parameters()], 0.1)


def clip_each(model) -> None:
    for member in model:
        clip_all(member)


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4, eta_min=1e-3)


@pytest.mark.parametrize("identical", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_members_that_are_clipped_one_by_one_on_a_schedule_follow(count, identical):
    make = partial(several, count)
    assert_alone(make, identical=identical, clip=clip_each, scheduler=cosine)
    by_hand, plain = (
        measure_training_trajectory(
            make, BATCH, optimizer=for_all(OPTIMIZERS["sgd"]), loss=summed, **more
        ).only("parameter")
        for more in ({"clip": clip_each, "scheduler": cosine}, {})
    )
    with pytest.raises(AssertionError, match="differ from step 1 on"):
        assert_trajectories_equal(by_hand, plain)


def test_an_absolute_rate_of_a_schedule_is_not_that_of_a_mean():
    """The single model at lr / M goes down to the same least rate, which a mean divides too."""
    more = {"loss": averaged, "loss_is": "mean", "optimizer": for_all(OPTIMIZERS["sgd"])}
    relative = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=4)
    assert_alone(partial(several, 2), scheduler=relative, **more)
    with pytest.raises(AssertionError, match="step 2   parameter"):
        assert_alone(partial(several, 2), scheduler=cosine, **more)


def test_one_norm_that_is_told_as_clip_is_broken():
    with pytest.raises(AssertionError, match="step 1   parameter") as broken:
        assert_alone(partial(several, 2), clip=clip_all)
    assert "one gradient norm that is clipped over all members" in str(broken.value)


@pytest.mark.parametrize(("clip", "status"), [(clip_each, "held"), (clip_all, "broken")])
def test_the_gate_clips_as_training_does(clip, status):
    given = replace(subject(summed, {"members": "separate"}), clip=clip, scheduler=cosine)
    assert [r.status for r in check_ensemble(given) if r.claim] == [status]


@pytest.mark.parametrize("what", ["clip", "scheduler"])
def test_what_cannot_be_called_so_is_an_error(what):
    def fails(_):
        raise TypeError("no such thing")

    with pytest.raises(
        ValueError, match=rf"{what}=\.\.\. raised TypeError: no such thing \(.*\)\. It takes"
    ):
        assert_alone(partial(several, 2), **{what: fails})


class ClippedSGD(torch.optim.SGD):
    """Clips one gradient norm over everything that it holds."""

    def step(self, closure=None):
        held = [p for group in self.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(held, 0.1)
        return super().step(closure)


def test_a_norm_clipped_over_all_members_is_broken(golden):
    with pytest.raises(AssertionError) as broken:
        # No bias before a norm: its gradient is a rounding, and whether it moves is up to the CPU.
        assert_alone(
            lambda: [convnet(), convnet()], optimizer=for_all(lambda p: ClippedSGD(p, lr=0.1))
        )
    golden(str(broken.value), "messages/alone_clipped.txt")


def test_the_loss_of_the_mean_prediction_is_broken(golden):
    with pytest.raises(AssertionError) as broken:
        assert_alone(lambda: [mlp(), mlp()], loss=of_mean_prediction)
    golden(str(broken.value), "messages/alone_mean_prediction.txt")


class Reads(nn.Module):
    """A member that sees another's detached features from the second step on."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.own = mlp()
        self.other = [other]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.own(x) + self.other[0](x).detach()


def test_a_member_that_reads_another_is_broken(golden):
    def make():
        first = mlp()
        return [first, Reads(first)]

    with pytest.raises(AssertionError) as broken:
        assert_alone(make)
    golden(str(broken.value), "messages/alone_reads_another.txt")


@pytest.mark.parametrize("layer", ["norm", "stem"])
def test_a_layer_in_common_is_broken(layer):
    def make():
        members = [Residual() for _ in range(2)]
        setattr(members[1], layer, getattr(members[0], layer))
        return members

    with pytest.raises(AssertionError, match="are claimed to train as they do alone"):
        assert_alone(make)


# --- wrong use ------------------------------------------------------------------------------------


def test_a_module_without_known_members_is_an_error():
    with pytest.raises(ValueError, match="no member modules are known"):
        assert_alone(lambda: Ensemble([mlp(), mlp()]))


def test_members_of_two_architectures_cannot_be_identical():
    with pytest.raises(ValueError, match=r'claim \{"members": "separate"\}'):
        assert_alone(lambda: [mlp(), convnet()], identical=True)
    assert_alone(lambda: [mlp(), convnet()])


def test_a_mean_needs_an_optimizer_whose_rates_are_known():
    with pytest.raises(ValueError, match="give optimizer"):
        assert_alone(lambda: [mlp(), mlp()], optimizer=None, loss_is="mean")
    with pytest.raises(ValueError, match="known for SGD, Adam and AdamW, and not for RMSprop"):
        assert_alone(lambda: [mlp(), mlp()], optimizer=for_all(torch.optim.RMSprop), loss_is="mean")


def test_an_unknown_reduction_is_an_error():
    with pytest.raises(ValueError, match="loss_is='median' is unknown"):
        assert_alone(lambda: [mlp(), mlp()], loss_is="median")


def test_a_loss_that_wants_all_members_is_an_error():
    with pytest.raises(ValueError, match="KeyError"):
        assert_alone(lambda: [mlp(), mlp()], loss=lambda y: (y["0"] + y["1"]).square().sum())


# --- where gradients are larger than weights ------------------------------------------------------


class Loud(nn.Module):
    """Its gradients are 1e24 times as large as its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1e12 * self.layer(x.flatten(1))


def test_members_take_the_small_steps_of_the_check_together_as_alone():
    own = {"optimizer": None, "loss": None}
    assert_alone(lambda: [Loud(), convnet(), Loud()], **own)
    assert_alone(lambda: [Loud(), Loud()], identical=True, **own)


def test_small_steps_of_the_check_hide_no_mean():
    def mean_square(outputs):
        return torch.stack([y.square().mean() for y in outputs.values()]).mean()

    with pytest.raises(AssertionError, match=r"gradient 0\.layer\.weight: norm 0\.5 times"):
        assert_alone(lambda: [Loud(), Loud()], loss=mean_square, optimizer=None)
    with pytest.raises(AssertionError, match="Members are one network"):
        assert_alone(lambda: [Loud()] * 2, loss=None, optimizer=None)


def test_training_that_runs_away_is_told():
    fast = for_all(OPTIMIZERS["sgd"])
    with pytest.raises(ValueError, match=r"^the training loss became infinite in step 2: training"):
        assert_alone(
            lambda: [Loud(), Loud()],
            optimizer=fast,
            loss=lambda outputs: sum(y.square().mean() for y in outputs.values()),
        )


# --- looking --------------------------------------------------------------------------------------


def test_looking_changes_nothing():
    members = [convnet(), convnet().eval()]
    before = [copy.deepcopy(m.state_dict()) for m in members]
    state = torch.get_rng_state()
    assert_alone(members, identical=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in members] == [True, False]
    assert all(p.grad is None for m in members for p in m.parameters())
    for member, saved in zip(members, before, strict=True):
        for name, tensor in member.state_dict().items():
            assert torch.equal(tensor, saved[name])


# --- fixture and gate -----------------------------------------------------------------------------


def test_the_fixture_compares_members(training_trajectory):
    recipe = {"optimizer": for_all(OPTIMIZERS["adam"]), "loss": summed}
    members = [mlp(), mlp()]
    training_trajectory.assert_members_single(members, BATCH, **recipe)
    training_trajectory.assert_members_separate(members, BATCH, **recipe)
    with pytest.raises(AssertionError, match="to follow the single model, but do not"):
        training_trajectory.assert_members_single([members[0]] * 2, BATCH, **recipe)
    with pytest.raises(AssertionError, match="by 3e-02 of the greatest gradient"):
        training_trajectory.assert_members_separate(
            [members[0]] * 2, BATCH, **recipe, tolerance=1e-6
        )


def subject(loss, claim) -> Subject:
    return Subject(
        make=lambda: [mlp(), mlp()],
        batch=lambda: BATCH,
        optimizer=for_all(OPTIMIZERS["momentum"]),
        loss=loss,
        claims={"trajectory": claim},
    )


@pytest.mark.parametrize(
    ("loss", "claim"),
    [
        (summed, {"members": "single"}),
        (summed, {"members": "separate"}),
        (averaged, {"members": "single", "loss": "mean"}),
        (averaged, {"members": "separate", "loss": "mean", "tolerance": 1e-6}),
    ],
)
def test_the_gate_holds_what_is_claimed(loss, claim):
    assert check_ensemble(subject(loss, claim)).held


@pytest.mark.parametrize(
    ("loss", "claim"),
    [(averaged, {"members": "single"}), (summed, {"members": "separate", "loss": "mean"})],
)
def test_the_gate_breaks_what_is_not(loss, claim):
    assert {r.status for r in check_ensemble(subject(loss, claim)) if r.claim} == {"broken"}


class MeetsInTheFourthStep(torch.optim.SGD):
    """Averages the two members that it holds, once."""

    steps = 0

    def step(self, closure=None):
        super().step(closure)
        self.steps += 1
        held = self.param_groups[0]["params"]
        if self.steps == 4 and len(held) > 6:  # both
            with torch.no_grad():
                for one, two in zip(held[: len(held) // 2], held[len(held) // 2 :], strict=True):
                    one.lerp_(two, 0.5)


@pytest.mark.parametrize(("steps", "status"), [(3, "held"), (5, "broken")])
def test_the_gate_takes_as_many_steps_as_are_claimed(steps, status):
    given = replace(
        subject(summed, {"members": "separate", "steps": steps}),
        optimizer=for_all(lambda p: MeetsInTheFourthStep(p, lr=0.1)),
    )
    assert [r.status for r in check_ensemble(given) if r.claim] == [status]


@pytest.mark.parametrize(
    "claim",
    [
        "single",
        {},
        {"members": "alike"},
        {"members": "single", "speed": 3},
        {"members": "single", "steps": 0},
    ],
)
def test_the_gate_refuses_a_claim_that_it_does_not_know(claim):
    with pytest.raises(ClaimError, match="trajectory cannot be claimed to be"):
        check_ensemble(subject(summed, claim))
