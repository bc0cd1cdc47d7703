"""Objectives: their values, their gradients, whom they ask, and what they refuse."""

import dataclasses
import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ensembles.models import (
    OBJECTIVES,
    Interpolated,
    Joint,
    Mean,
    MeanField,
    Objective,
    Stochastic,
    SubnetResNet,
    Sum,
    member_losses,
    predict,
)
from ensembles.models.layers import SubnetConv2d

few = settings(max_examples=60, deadline=None)
EVERY = [Sum(), Mean(), MeanField(), Interpolated(0.3), Joint(0.3)]
FAMILY = ("parent", "subnet_0_0", "subnet_0_1", "subnet_1_0", "subnet_1_1")
SHARES = st.floats(0, 1)


@st.composite
def families(draw):
    """Logits of a parent and its subnets, that gradients can reach, and labels."""
    shape = (draw(st.integers(2, 5)), draw(st.integers(1, 3)), draw(st.integers(2, 5)))
    logits = torch.from_numpy(draw(arrays(np.float64, shape, elements=st.floats(-20, 20))))
    labels = draw(arrays(np.int64, shape[1:2], elements=st.integers(0, shape[2] - 1)))
    names = ["parent", *(f"subnet_{number}" for number in range(1, shape[0]))]
    leaves = {name: one.clone().requires_grad_() for name, one in zip(names, logits, strict=True)}
    return leaves, torch.from_numpy(labels)


def gradients(loss: Tensor, logits: dict[str, Tensor]) -> Tensor:
    found = torch.autograd.grad(
        loss, list(logits.values()), retain_graph=True, materialize_grads=True
    )
    return torch.stack(found)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# --- values and gradients -----------------------------------------------------------------------


@few
@given(families(), SHARES, SHARES)
def test_losses_are_what_their_formulas_say(drawn, lam, beta):
    logits, labels = drawn
    each = [cross_entropy(found, labels) for found in logits.values()]
    of_subnets = sum(each[1:]) / len(each[1:])
    mean = torch.stack([found.softmax(1) for found in logits.values()]).mean(0)
    of_mean = -mean[range(len(labels)), labels].log().mean()
    expected = {
        Sum(): sum(each),
        Mean(): sum(each) / len(each),
        MeanField(): sum(each) / len(each),
        Interpolated(lam): lam * each[0] + (1 - lam) * of_subnets,
        Joint(beta): (1 - beta) * sum(each) / len(each) + beta * of_mean,
    }
    for objective, loss in expected.items():
        found = objective(logits, labels)
        close(found, loss)
        close(gradients(found, logits), gradients(loss, logits))


def test_member_losses_are_cross_entropy_bit_by_bit_by_name():
    torch.manual_seed(1)
    logits = {name: torch.randn(7, 4) for name in ("b", "a", "c")}
    labels = torch.randint(4, (7,))
    losses = member_losses(logits, labels)
    assert list(losses) == ["b", "a", "c"]
    for name, loss in losses.items():
        assert torch.equal(loss, cross_entropy(logits[name], labels))


@few
@given(families())
def test_the_sum_gives_every_member_the_gradient_it_has_alone_bit_by_bit(drawn):
    logits, labels = drawn
    alone = [gradients(cross_entropy(one, labels), {"": one})[0] for one in logits.values()]
    assert torch.equal(gradients(Sum()(logits, labels), logits), torch.stack(alone))
    shares = gradients(Mean()(logits, labels), logits) * len(logits)
    close(shares, torch.stack(alone), 1e-15)


@few
@given(families(), SHARES)
def test_the_joint_loss_lies_between_the_loss_of_the_mean_and_the_mean_loss(drawn, beta):
    logits, labels = drawn
    mean_loss, of_mean = Mean()(logits, labels), Joint(1)(logits, labels)
    close(of_mean, torch.nn.functional.nll_loss(predict(logits), labels))
    assert of_mean <= mean_loss + 1e-12
    close(Joint(beta)(logits, labels), mean_loss - beta * (mean_loss - of_mean))
    assert torch.equal(Joint(0)(logits, labels), mean_loss)


def test_the_joint_loss_couples_members_and_the_mean_loss_does_not():
    labels = torch.tensor([0])
    for objective, coupled in [(Mean(), False), (Joint(0), False), (Joint(0.5), True)]:
        of_first = []
        for other in (0.0, 4.0):
            first = torch.tensor([[1.0, 0.0]], requires_grad=True)
            logits = {"first": first, "second": torch.tensor([[other, 0.0]])}
            of_first.append(torch.autograd.grad(objective(logits, labels), first)[0])
        assert torch.equal(*of_first) is not coupled
        if coupled:  # a member that is right takes gradient from the other
            assert of_first[1].abs().sum() < of_first[0].abs().sum()


@pytest.mark.parametrize("objective", [*EVERY, Joint(1)], ids=str)
def test_extreme_logits_have_finite_losses_and_gradients(objective):
    rows = torch.tensor([[1e4, 0.0, -math.inf], [-1e4, 1e4, -math.inf]])
    logits = {name: rows.clone().requires_grad_() for name in ("parent", "subnet")}
    loss = objective(logits, torch.tensor([1, 0]))
    assert loss.isfinite()
    assert loss > 1e4
    assert gradients(loss, logits).isfinite().all()


def test_an_excluded_label_costs_infinitely_but_not_if_another_member_has_it():
    logits = {"a": torch.tensor([[0.0, -math.inf]]), "b": torch.tensor([[0.0, 0.0]])}
    label = torch.tensor([1])
    assert Mean()(logits, label) == math.inf
    assert Joint(1)(logits, label).item() == pytest.approx(math.log(4))
    nowhere = {"a": logits["a"], "b": logits["a"]}
    for beta in (0, 0.5, 1):  # and not the NaN of 0 times infinity
        assert Joint(beta)(nowhere, label) == math.inf


def test_labels_may_be_any_whole_numbers():
    torch.manual_seed(3)
    logits = {name: torch.randn(4, 3) for name in ("parent", "subnet")}
    labels = torch.tensor([2, 0, 1, 2])
    for objective in EVERY:
        for dtype in (torch.uint8, torch.int16, torch.int32):
            assert torch.equal(objective(logits, labels.to(dtype)), objective(logits, labels))


def test_members_may_see_batches_of_their_own():
    torch.manual_seed(2)
    logits = {name: torch.randn(6, 4) for name in ("parent", "subnet_0", "subnet_1")}
    labels = {name: torch.randint(4, (6,)) for name in reversed(logits)}
    each = [cross_entropy(logits[name], labels[name]) for name in logits]
    assert list(member_losses(logits, labels).values()) == each
    close(Sum()(logits, labels), sum(each), 1e-6)
    close(Interpolated(0.5)(logits, labels), each[0] / 2 + (each[1] + each[2]) / 4, 1e-6)
    same = dict.fromkeys(logits, labels["parent"])
    for objective in (Sum(), Mean(), MeanField(), Interpolated(0.3)):
        assert torch.equal(objective(logits, same), objective(logits, labels["parent"]))
    alone = {"parent": logits["parent"]}
    assert Stochastic(0.5)(alone, labels) == each[0]
    with pytest.raises(ValueError, match=r"^labels lack those of \['subnet_0'\]; there are \['pa"):
        Mean()(logits, {name: labels[name] for name in ("parent", "subnet_1")})
    labels["subnet_1"][4] = 4
    with pytest.raises(ValueError, match=r"^labels of subnet_1 must be 0 to 3, got 4 in row 4 \(1"):
        Mean()(logits, labels)
    with pytest.raises(ValueError, match=r"^a mean prediction needs members that predict the same"):
        Joint(0.5)(logits, labels)


# --- who is asked -------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [*EVERY, Joint(0), Joint(1)], ids=str)
def test_objectives_of_all_members_ask_all(objective):
    assert objective.asked(list(FAMILY), step=3, seed=4) == FAMILY
    assert isinstance(objective, Objective)


def test_members_that_count_for_nothing_are_not_asked_and_get_no_gradient():
    assert Interpolated(1).asked(FAMILY, step=0, seed=0) == FAMILY[:1]
    assert Interpolated(0).asked(FAMILY, step=0, seed=0) == FAMILY[1:]
    named_otherwise = Interpolated(1, parent="subnet_0_1")
    assert named_otherwise.asked(FAMILY, step=0, seed=0) == ("subnet_0_1",)
    logits = {name: torch.randn(2, 3, requires_grad=True) for name in FAMILY}
    labels = torch.tensor([0, 2])
    for lam, idle in [(1, FAMILY[1:]), (0, FAMILY[:1])]:
        for leaf in logits.values():
            leaf.grad = None
        Interpolated(lam)(logits, labels).backward()
        assert [name for name in FAMILY if logits[name].grad is None] == list(idle)
        asked = Interpolated(lam).asked(FAMILY, step=0, seed=0)
        only = {name: logits[name] for name in asked}
        assert torch.equal(Interpolated(lam)(only, labels), Interpolated(lam)(logits, labels))


def test_a_member_of_weight_zero_may_have_an_infinite_loss():
    infinite, finite = torch.tensor([[0.0, -math.inf]]), torch.zeros(1, 2)
    label = torch.tensor([1])
    assert Interpolated(0)({"parent": infinite, "subnet": finite}, label).isfinite()
    assert Interpolated(1)({"parent": finite, "subnet": infinite}, label).isfinite()


# --- coins --------------------------------------------------------------------------------------


@few
@given(families(), SHARES, st.sampled_from(["all", "one"]))
def test_over_all_coins_the_loss_and_its_gradient_average_to_the_interpolated_ones(
    drawn, p, subnets
):
    logits, labels = drawn
    objective = Stochastic(p, subnets)
    outcomes = objective.outcomes(list(logits))
    assert sum(outcomes.values()) == pytest.approx(1, rel=1e-15)
    losses, slopes = torch.zeros(()).double(), torch.zeros(len(logits), *logits["parent"].shape)
    for asked, probability in outcomes.items():
        loss = objective({name: logits[name] for name in asked}, labels)
        losses = losses + probability * loss
        slopes = slopes + probability * gradients(loss, logits)
    assert objective.expectation == Interpolated(p)
    expected = objective.expectation(logits, labels)
    close(losses, expected)
    close(slopes, gradients(expected, logits))


@pytest.mark.parametrize(
    ("p", "subnets"), [(0.5, "all"), (0.2, "one"), (0.75, "one"), (1 / 3, "all")]
)
def test_coins_fall_as_often_as_they_should_in_every_order(p, subnets):
    objective, steps = Stochastic(p, subnets), 4000
    outcomes = objective.outcomes(FAMILY)
    for draws in (
        [objective.asked(FAMILY, step=step, seed=0) for step in range(steps)],
        [objective.asked(FAMILY, step=7, seed=seed) for seed in range(steps)],
    ):
        counts = Counter(draws)
        assert counts.keys() == outcomes.keys()
        # 5 standard deviations: the draws are fixed, so that this holds always or never.
        for outcome, share in outcomes.items():
            assert abs(counts[outcome] - steps * share) < 5 * math.sqrt(steps * share)
        pairs = Counter(itertools.pairwise(draws))
        for (one, other), count in pairs.items():
            expected = steps * outcomes[one] * outcomes[other]
            assert abs(count - expected) < 5 * math.sqrt(expected) + 1


def test_a_coin_is_a_function_of_seed_and_step_alone():
    objective = Stochastic(0.5, "one")
    draws = [objective.asked(FAMILY, step=step, seed=3) for step in range(50)]
    torch.manual_seed(9)
    before = torch.get_rng_state()
    backwards = [objective.asked(list(FAMILY), step=step, seed=3) for step in reversed(range(50))]
    assert backwards[::-1] == draws
    assert torch.equal(torch.get_rng_state(), before)
    assert dataclasses.replace(objective).asked(FAMILY, step=np.int64(17), seed=3) == draws[17]
    others = [objective.asked(FAMILY, step=step, seed=4) for step in range(50)]
    assert others != draws
    shifted = [objective.asked(FAMILY, step=step + 1, seed=3) for step in range(50)]
    assert others != shifted


def test_coins_of_today_are_those_of_any_other_day():
    draws = [Stochastic(0.5, "one").asked(FAMILY, step=step, seed=0) for step in range(12)]
    assert [FAMILY.index(name) for (name,) in draws] == [0, 3, 3, 2, 1, 0, 0, 4, 4, 4, 0, 0]


def test_certain_coins_have_one_outcome():
    assert Stochastic(1).outcomes(FAMILY) == {FAMILY[:1]: 1}
    assert Stochastic(0).outcomes(FAMILY) == {FAMILY[1:]: 1}
    for step in range(20):
        assert Stochastic(1, "one").asked(FAMILY, step=step, seed=0) == FAMILY[:1]
        assert Stochastic(0).asked(FAMILY, step=step, seed=0) == FAMILY[1:]


# --- with the network itself --------------------------------------------------------------------


@pytest.fixture(scope="module", params=["zero_padded", "sum_of_subnets"])
def network(request):
    torch.manual_seed(0)
    return SubnetResNet(
        18, num_classes=3, stem="cifar", base_channels=2, construction=request.param
    )


@pytest.mark.parametrize(
    ("objective", "sides"),
    [
        (Stochastic(0.5), [FAMILY[:1], FAMILY[1:]]),
        (Stochastic(0.5, "one"), [(name,) for name in FAMILY]),
        (Interpolated(0), [FAMILY[1:]]),
        (Interpolated(1), [FAMILY[:1]]),
        (Interpolated(0.5), [FAMILY]),
    ],
    ids=str,
)
def test_only_asked_members_are_computed_and_only_they_get_gradients(network, objective, sides):
    images, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 2])
    members = {"parent": network.parent, **network.subnets}
    calls: Counter[str] = Counter()
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
        for name, module in members.items()
    ]
    seen = set()
    for step in range(20):
        asked = objective.asked(network.member_names, step=step, seed=0)
        if asked in seen:
            continue
        seen.add(asked)
        calls.clear()
        network.zero_grad(set_to_none=True)
        objective(network(images, members=asked), labels).backward()
        assert calls == Counter(asked)
        for name, member in members.items():
            shared = {id(p) for p in network.parent.parameters()} if name != "parent" else set()
            own = [p for p in member.parameters() if id(p) not in shared]
            if name == "parent":
                own = [p for n, p in member.named_parameters() if "bn" in n or n.startswith("fc")]
            assert own
            for parameter in own:
                assert (parameter.grad is not None) == (name in asked), name
        assert_gradients_in_blocks_of(network, asked)
    for hook in hooks:
        hook.remove()
    assert seen == set(sides)


def assert_gradients_in_blocks_of(network: SubnetResNet, asked: tuple[str, ...]) -> None:
    """In the shared convs, gradients are in the blocks that asked members visit, and no others."""
    for path, conv in network.parent.named_modules():
        if not isinstance(conv, SubnetConv2d):
            continue
        visited = torch.zeros_like(conv.weight, dtype=torch.bool)
        for name in asked:
            if name == "parent":
                visited[:] = True
                continue
            out, into = network.subnets[name].blocks[path]
            rows = visited.chunk(2)[out]
            (rows if path == "conv1" else rows.chunk(2, dim=1)[into])[:] = True
        assert not conv.weight.grad[~visited].any(), path
        assert conv.weight.grad[visited].any(), path


def test_a_run_that_is_resumed_has_the_weights_of_one_that_was_not(tmp_path):
    def members(names):
        return nn.ModuleDict({name: nn.Linear(3, 2) for name in names})

    def steps(network, optimizer, which):
        for step in which:
            generator = torch.Generator().manual_seed(step)
            x, y = torch.randn(4, 3, generator=generator), torch.tensor([0, 1, 1, 0])
            asked = Stochastic(0.4, "one").asked(FAMILY, step=step, seed=1)
            optimizer.zero_grad()
            Stochastic(0.4, "one")({name: network[name](x) for name in asked}, y).backward()
            optimizer.step()

    torch.manual_seed(0)
    whole = members(FAMILY)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    steps(whole, optimizer, range(10))
    torch.save(whole.state_dict(), tmp_path / "half.pt")
    steps(whole, optimizer, range(10, 20))
    resumed = members(FAMILY)
    resumed.load_state_dict(torch.load(tmp_path / "half.pt", weights_only=True))
    steps(resumed, torch.optim.SGD(resumed.parameters(), lr=0.1), range(10, 20))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor)


# --- wrong input --------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [-0.01, 1.01, math.nan, math.inf, "0.5", None])
@pytest.mark.parametrize(
    ("kind", "name"), [(Interpolated, "lam"), (Stochastic, "p"), (Joint, "beta")]
)
def test_shares_outside_of_zero_to_one_are_refused(kind, name, share):
    with pytest.raises(ValueError, match=f"^{name} must be a number from 0 to 1, got {share!r}$"):
        kind(share)


@pytest.mark.parametrize("objective", [*EVERY, Stochastic(0.5), Interpolated(1)], ids=str)
@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (3, [0, 5, -1], ValueError, "labels must be 0 to 3, got 5 in row 1 (2 of 3 labels"),
        (3, [0, 1, -100], ValueError, "labels must be 0 to 3, got -100 in row 2 (1 of 3"),
        (3, [0, 1], ValueError, "labels have shape (2,), and the logits of 3 samples need"),
        (3, [[0], [1], [2]], ValueError, "labels have shape (3, 1), and the logits of 3 samples"),
        (3, [0.0, 1.0, 2.0], ValueError, "labels must be whole numbers, the classes, got torch.f"),
        (3, [True, False, True], ValueError, "labels must be whole numbers, the classes, got to"),
        (0, torch.zeros(0).long(), ValueError, "there is no sample"),
        (math.nan, [0, 1, 2], FloatingPointError, "logits of parent are no distribution: NaN in"),
    ],
    ids=str,
)
def test_labels_and_logits_that_make_no_loss_are_refused(objective, logits, labels, error, message):
    if isinstance(logits, float):
        given_ = {"parent": torch.full((3, 4), logits), "subnet": torch.zeros(3, 4)}
    else:
        given_ = {name: torch.zeros(logits, 4) for name in ("parent", "subnet")}
    if isinstance(objective, Stochastic):
        del given_["subnet"]
    with pytest.raises(error, match=re.escape(message)):
        objective(given_, torch.as_tensor(labels))


@pytest.mark.parametrize("objective", EVERY, ids=str)
def test_labels_that_are_no_tensor_are_refused(objective):
    logits = {"parent": torch.zeros(1, 2), "subnet": torch.zeros(1, 2)}
    with pytest.raises(TypeError, match=r"^labels must be a tensor of classes, got a list$"):
        objective(logits, [0])


@pytest.mark.parametrize("objective", [*EVERY, Stochastic(0.5)], ids=str)
def test_no_members_are_refused(objective):
    with pytest.raises(ValueError, match=r"^logits is empty"):
        objective({}, torch.tensor([0]))
    with pytest.raises(TypeError, match=r"^logits must be a mapping"):
        objective(torch.zeros(5, 1, 2), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"^names is empty"):
        objective.asked([], step=0, seed=0)
    with pytest.raises(
        ValueError, match=r"^names must be a list of names, got the string 'parent'"
    ):
        objective.asked("parent", step=0, seed=0)
    with pytest.raises(ValueError, match=r"^names has \['a'\] more than once"):
        objective.asked(["parent", "a", "a"], step=0, seed=0)


def test_coins_need_whole_numbers():
    with pytest.raises(TypeError, match=r"^step must be a whole number, got 1\.5$"):
        Stochastic(0.5).asked(FAMILY, step=1.5, seed=0)
    with pytest.raises(TypeError, match=r"^seed must be a whole number, got None$"):
        Stochastic(0.5).asked(FAMILY, step=1, seed=None)


@pytest.mark.parametrize("objective", [Interpolated(0.5), Stochastic(0.5)], ids=str)
def test_a_family_without_parent_or_subnets_is_refused(objective):
    with pytest.raises(ValueError, match=r"^no member is named 'parent', .*\['a', 'b'\]$"):
        objective.asked(["a", "b"], step=0, seed=0)
    with pytest.raises(ValueError, match=r"^there is only the parent, 'parent'"):
        objective.asked(["parent"], step=0, seed=0)


@pytest.mark.parametrize(
    ("objective", "names", "message"),
    [
        (Interpolated(0.5), ["subnet"], "no member is named 'parent'"),
        (Interpolated(1), ["subnet"], "no member is named 'parent'"),
        (Interpolated(0.5), ["parent"], "there is only the parent"),
        (Interpolated(0), ["parent"], "there is only the parent"),
        (Stochastic(0.5), ["parent", "a"], "was given logits of ['parent', 'a']: give those of"),
        (Stochastic(0.5, "one"), ["a", "b"], "For the loss of all members, take .expectation"),
    ],
    ids=str,
)
def test_logits_of_other_members_than_asked_are_refused(objective, names, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        objective({name: torch.zeros(1, 2) for name in names}, torch.tensor([0]))


def test_an_unknown_choice_of_subnets_is_refused():
    with pytest.raises(ValueError, match=re.escape("one of ('all', 'one'), got 'two'")):
        Stochastic(0.5, "two")


def test_objectives_are_found_by_name_and_do_not_change():
    assert list(OBJECTIVES) == ["sum", "mean", "interpolated", "stochastic", "mean_field", "joint"]
    assert OBJECTIVES["interpolated"](lam=0.5) == Interpolated(0.5)
    with pytest.raises(TypeError):
        OBJECTIVES["sum"] = Mean
    with pytest.raises(dataclasses.FrozenInstanceError):
        Interpolated(0.5).lam = 2.0
    assert {Joint(0.5), Joint(0.5)} == {Joint(0.5)}
    assert repr(Stochastic(0.5)) == "Stochastic(p=0.5, subnets='all', parent='parent')"
