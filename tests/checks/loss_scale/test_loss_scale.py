"""The diary's question of 11/03: sum or mean, and what does the learning rate mean then?"""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, nll_loss
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from ensembles.checks.loss_scale.claim import STEPS, LossScaleClaim, parse
from ensembles.checks.loss_scale.judgement import assert_loss_scaled, judge
from ensembles.checks.loss_scale.measurement import measure_loss_scale
from ensembles.claims import ClaimError
from ensembles.findings import Count
from ensembles.gate.conformance import check_ensemble
from ensembles.message import rendered
from ensembles.models.example import wide_resnet18_with_subnets
from ensembles.subject import Partition, Subject, split_axis

ROWS, CLASSES = 6, 4
LABELS = torch.tensor([0, 1, 2, 3, 1, 2])


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(18, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 4)
    )


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 4))


def several(count: int = 4, make=mlp) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(make() for _ in range(count))


def batch() -> Tensor:
    return torch.randn(ROWS, 2, 3, 3, generator=torch.Generator().manual_seed(1))


def own(y: Tensor) -> Tensor:
    return cross_entropy(y, LABELS)


def sum_of_losses(outputs) -> Tensor:
    return sum(own(y) for y in outputs.values())


def mean_of_losses(outputs) -> Tensor:
    return torch.stack([own(y) for y in outputs.values()]).mean()


def of_mean_prediction(outputs) -> Tensor:
    p = torch.stack([y.softmax(1) for y in outputs.values()]).mean(0)
    return nll_loss(p.log(), LABELS)


def weighted(*weights: float):
    return lambda outputs: sum(w * own(y) for w, y in zip(weights, outputs.values(), strict=True))


def sgd(model) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)


def measured(loss, *, count: int = 4, make=mlp, **kinds):
    return measure_loss_scale(several(count, make), batch(), loss=loss, **kinds)


# --- sum or mean --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [mlp, conv])
@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_sum_or_mean_the_sum_gives_each_member_its_gradient_alone_bit_by_bit(make, count):
    scale = measured(sum_of_losses, count=count, make=make)
    assert [(m.multiple, m.exact) for m in scale.members] == [(1.0, True)] * count
    assert_loss_scaled(scale, "sum")


@pytest.mark.parametrize("make", [mlp, conv])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_sum_or_mean_the_mean_divides_each_gradient_by_the_members_bit_by_bit(make, count):
    scale = measured(mean_of_losses, count=count, make=make)
    assert [(m.multiple, m.exact) for m in scale.members] == [(1 / count, True)] * count
    assert_loss_scaled(scale, "mean")


@pytest.mark.parametrize("count", [3, 5, 7])
def test_sum_or_mean_the_mean_of_another_number_of_members_holds_up_to_rounding(count):
    assert_loss_scaled(measured(mean_of_losses, count=count), "mean")


def test_sum_or_mean_the_table_that_a_person_reads(golden):
    def cosine(optimizer):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100, eta_min=1e-3)

    scale = measured(mean_of_losses, optimizer=sgd, scheduler=cosine, steps=101)
    golden(str(scale), "messages/loss_scale_table.txt")


def test_sum_or_mean_a_mean_for_a_sum_is_broken(golden):
    with pytest.raises(AssertionError) as broken:
        assert_loss_scaled(measured(mean_of_losses, optimizer=sgd), "sum")
    golden(str(broken.value), "messages/loss_scale_mean_for_sum.txt")


def test_sum_or_mean_a_sum_for_a_mean_is_broken():
    with pytest.raises(AssertionError, match="on the mean of their losses, but train on their sum"):
        assert_loss_scaled(measured(sum_of_losses), "mean")


def test_sum_or_mean_a_division_by_a_number_that_is_written_down_is_seen():
    """Nothing in the code says "mean", and one member's loss is divided too."""
    with pytest.raises(AssertionError, match="expected its gradient alone   found 1/4 of it"):
        assert_loss_scaled(measured(lambda outputs: sum_of_losses(outputs) / 4), "sum")


def test_sum_or_mean_one_call_for_all_members_is_the_mean():
    def loss(outputs):
        return cross_entropy(torch.cat(list(outputs.values())), LABELS.repeat(4))

    assert_loss_scaled(measured(loss), "mean")


def test_sum_or_mean_adam_does_not_see_the_scale(golden):
    def adam(model):
        return torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=0.1)

    scale = measured(mean_of_losses, count=2, optimizer=adam)
    (rate,) = scale.members[0].rates
    assert (rate.effective[0], rate.effective_decay) == (1e-3, 0.2)
    with pytest.raises(AssertionError) as broken:
        assert_loss_scaled(scale, "sum")
    golden(str(broken.value), "messages/loss_scale_under_adam.txt")


# --- the rates that follow are those of a training ----------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p, lr, wd: torch.optim.SGD(p, lr=lr, weight_decay=wd),
    "momentum": lambda p, lr, wd: torch.optim.SGD(p, lr=lr, weight_decay=wd, momentum=0.9),
    "nesterov": lambda p, lr, wd: torch.optim.SGD(
        p, lr=lr, weight_decay=wd, momentum=0.9, nesterov=True
    ),
    "dampening": lambda p, lr, wd: torch.optim.SGD(
        p, lr=lr, weight_decay=wd, momentum=0.9, dampening=0.5
    ),
    "adam": lambda p, lr, wd: torch.optim.Adam(p, lr=lr / 10, weight_decay=wd),
    "adamw": lambda p, lr, wd: torch.optim.AdamW(p, lr=lr / 10, weight_decay=wd),
    "rmsprop": lambda p, lr, wd: torch.optim.RMSprop(p, lr=lr / 100, weight_decay=wd),
    "adagrad": lambda p, lr, wd: torch.optim.Adagrad(p, lr=lr / 10, weight_decay=wd),
}


def trained(models, loss, optimizer, steps: int = 12) -> list[Tensor]:
    x = batch()
    for _ in range(steps):
        optimizer.zero_grad()
        loss({str(i): model(x) for i, model in enumerate(models)}).backward()
        optimizer.step()
    return [p.detach() for model in models for p in model.parameters()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_single_model_at_the_effective_rates_trains_as_each_member_of_the_mean(name):
    """float64, so that eps of Adam and rounding are all that differs."""
    make = OPTIMIZERS[name]
    members = several(3, conv).double()
    x = batch().double()

    def build(model):
        return make(model.parameters(), 0.1, 0.1)

    scale = measure_loss_scale(members, x, loss=mean_of_losses, optimizer=build)
    together, alone = copy.deepcopy(members), copy.deepcopy(members)
    for i, member in enumerate(scale.members):
        (rate,) = member.rates
        single = build(alone[i])
        single.param_groups[0].update(lr=rate.effective[0], weight_decay=rate.effective_decay)
        for _ in range(12):
            single.zero_grad()
            own(alone[i](x)).backward()
            single.step()
    optimizer = build(together)
    for _ in range(12):
        optimizer.zero_grad()
        mean_of_losses({str(i): one(x) for i, one in enumerate(together)}).backward()
        optimizer.step()
    start = dict(members.named_parameters())
    for (place, one), two in zip(together.named_parameters(), alone.parameters(), strict=True):
        assert not torch.equal(one, start[place])
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov", "dampening"])
def test_the_mean_at_scaled_rates_is_the_sum_bit_by_bit(name, count):
    make = OPTIMIZERS[name]
    one, two = (several(count, conv) for _ in range(2))
    of_sum = trained(one, sum_of_losses, make(one.parameters(), 0.05, 1e-2))
    of_mean = trained(two, mean_of_losses, make(two.parameters(), 0.05 * count, 1e-2 / count))
    assert all(torch.equal(a, b) for a, b in zip(of_sum, of_mean, strict=True))


# --- other multiples ----------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=5))
def test_any_weights_of_members_are_measured(weights):
    scale = measured(weighted(*weights), count=len(weights))
    assert [m.multiple for m in scale.members] == pytest.approx(weights, rel=1e-4)
    assert_loss_scaled(scale, weights)
    assert_loss_scaled(scale, {str(i): w for i, w in enumerate(weights)})


def test_weights_that_are_not_as_claimed_are_broken(golden):
    with pytest.raises(AssertionError) as broken:
        assert_loss_scaled(measured(weighted(0.5, 0.3, 0.1), count=3), [0.5, 0.3, 0.2])
    golden(str(broken.value), "messages/loss_scale_weights.txt")


def test_a_member_that_the_loss_leaves_out_is_broken():
    with pytest.raises(AssertionError, match=r"member 1   expected its .* found nothing of it"):
        assert_loss_scaled(measured(weighted(1.0, 0.0), count=2), "sum")
    with pytest.raises(AssertionError, match=r"member 1   expected its .* found nothing of it"):
        assert_loss_scaled(measured(lambda outputs: own(outputs["0"]), count=2), "sum")
    with pytest.raises(AssertionError, match="The member is trained, but is claimed not to be"):
        assert_loss_scaled(measured(sum_of_losses, count=2), [1.0, 0.0])


def test_a_sum_over_rows_is_seen_as_the_number_of_rows():
    def loss(outputs):
        return sum(cross_entropy(y, LABELS, reduction="sum") for y in outputs.values())

    assert_loss_scaled(measured(loss), float(ROWS))
    with pytest.raises(AssertionError, match="expected its gradient alone   found 6 times it"):
        assert_loss_scaled(measured(loss), "sum")


def test_a_hook_on_gradients_is_part_of_training_alone_too():
    members = several(2)
    for p in members.parameters():
        p.register_hook(lambda g: g / 2)
    assert_loss_scaled(measure_loss_scale(members, batch(), loss=sum_of_losses), "sum")


def test_labels_of_bagged_members_differ():
    flipped = LABELS.flip(0)

    def loss(outputs):
        return own(outputs["0"]) + cross_entropy(outputs["1"], flipped)

    assert_loss_scaled(measured(loss, count=2), "sum")


def test_another_loss_of_members_is_given():
    target = torch.randn(ROWS, CLASSES)

    def loss(outputs):
        return sum(mse_loss(y, target) for y in outputs.values()) / 4

    scale = measured(loss, member_loss=lambda y: mse_loss(y, target))
    assert_loss_scaled(scale, "mean")
    with pytest.raises(ValueError, match="is no cross-entropy of each member's output"):
        measured(loss)


def test_a_penalty_on_the_weights_is_no_coupling():
    members = several(2)

    def loss(outputs):
        return sum_of_losses(outputs) + sum(p.square().sum() for p in members.parameters())

    assert_loss_scaled(measure_loss_scale(members, batch(), loss=loss), "sum")


class Packed(nn.Module):
    """Members in one weight, so that none has parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 18))

    def forward(self, x):
        return torch.einsum("mci,ni->mnc", self.weight, x.flatten(1))


def test_members_packed_in_one_weight_are_looked_at_in_their_outputs():
    scale = measure_loss_scale(
        Packed(), batch(), loss=mean_of_losses, outputs=split_axis(0), optimizer=sgd
    )
    assert_loss_scaled(scale, "mean")
    assert [len(member.rates) for member in scale.members] == [1, 1, 1]


def test_shared_weights_do_not_hide_the_scale():
    member = mlp()
    scale = measure_loss_scale([member, member], batch(), loss=sum_of_losses)
    assert_loss_scaled(scale, "sum", shared=["*"])
    with pytest.raises(AssertionError, match="but train on their sum"):
        assert_loss_scaled(scale, "mean", shared=["*"])


# --- weights in common, where gradients add up --------------------------------------------------


def broken_sum(model, **kinds) -> str:
    with pytest.raises(AssertionError, match="where their gradients add up") as broken:
        assert_loss_scaled(measure_loss_scale(model, batch(), loss=sum_of_losses, **kinds), "sum")
    return " ".join(str(broken.value).split())


def test_members_that_are_one_network_are_broken(golden):
    one = plain()
    scale = measure_loss_scale([one] * 3, batch(), loss=sum_of_losses)
    golden(str(scale), "messages/loss_scale_in_common.txt")
    with pytest.raises(AssertionError) as broken:
        assert_loss_scaled(scale, "sum")
    golden(str(broken.value), "messages/loss_scale_one_network.txt")
    # On one batch, the mean over copies of a member is its gradient alone.
    scale = measure_loss_scale([one] * 3, batch(), loss=mean_of_losses)
    with pytest.raises(AssertionError, match="1/3 of one gradient alone   found all of it"):
        assert_loss_scaled(scale, "mean")


def plain() -> nn.Module:
    """Draws nothing in the call, so that one network three times has one gradient."""
    return nn.Sequential(nn.Flatten(), nn.Linear(18, 8), nn.ReLU(), nn.Linear(8, 4))


def test_a_norm_of_several_members_is_broken():
    members = several(3, conv)
    members[2][1] = members[0][1]
    told = broken_sum(members)
    assert "0.1.weight expected one gradient alone found no multiple of it: members 0, 2" in told
    assert "(2 of 3 members, 2 parameters)" in told
    assert "a layer that was made once and passed to several members" in told
    assert "one network" not in told


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(18, 8)
        self.heads = nn.ModuleList(nn.Linear(8, CLASSES) for _ in range(2))

    def forward(self, x):
        features = self.trunk(x.flatten(1)).relu()
        return [head(features) for head in self.heads]


def test_a_trunk_is_claimed_as_shared_by_name():
    told = broken_sum(Heads())
    assert "trunk.weight expected one gradient alone found no multiple of it" in told
    assert "a trunk or a parent's weights under several members" in told
    scale = measure_loss_scale(Heads(), batch(), loss=sum_of_losses)
    assert_loss_scaled(scale, "sum", shared=["trunk.*"])
    with pytest.raises(AssertionError, match=r"trunk\.bias"):
        assert_loss_scaled(scale, "sum", shared=["trunk.weight", "heads.*"])


def test_a_frozen_trunk_is_nobodys():
    model = Heads()
    model.trunk.requires_grad_(False)
    assert_loss_scaled(measure_loss_scale(model, batch(), loss=sum_of_losses), "sum")


def test_a_member_that_the_loss_leaves_out_adds_nothing_to_shared_weights():
    scale = measure_loss_scale(Heads(), batch(), loss=weighted(2.0, 0.0))
    assert_loss_scaled(scale, [2.0, 0.0])


class Groups(nn.Module):
    """Two members in the channels; with one group in the middle they read each other."""

    def __init__(self, middle: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 1, groups=2)
        self.second = nn.Conv2d(8, 8, 1, groups=middle)

    def forward(self, x):
        y = self.second(self.first(x.repeat(1, 2, 1, 1)).relu()).mean((2, 3))
        return list(y.chunk(2, 1))


def test_groups_of_channels_are_apart_and_what_mixes_them_is_broken():
    assert_loss_scaled(measure_loss_scale(Groups(2), batch(), loss=sum_of_losses), "sum")
    told = broken_sum(Groups(1))
    assert "first.weight expected one gradient alone found no multiple of it" in told
    assert "second" not in told
    assert "features of one that another reads" in told


@pytest.mark.parametrize("sparse", [True, False])
def test_rows_of_an_embedding_that_members_read_are_shared(sparse):
    tokens = torch.arange(ROWS)[:, None]

    def measured_of(first, second):
        pair = [nn.Sequential(first, nn.Flatten()), nn.Sequential(second, nn.Flatten())]
        return measure_loss_scale(pair, tokens, loss=sum_of_losses)

    one, two = (nn.Embedding(ROWS, CLASSES, sparse=sparse) for _ in range(2))
    assert_loss_scaled(measured_of(one, two), "sum")
    with pytest.raises(AssertionError, match=r"0\.0\.weight   expected .* members 0, 1 add up"):
        assert_loss_scaled(measured_of(one, one), "sum")


@pytest.mark.parametrize(
    ("claims", "status"),
    [
        ({"loss_scale": "sum"}, "broken"),
        ({"loss_scale": "sum", "sharing": "distinct"}, "broken"),
        ({"loss_scale": "sum", "ownership": "independent"}, "broken"),
        ({"loss_scale": "sum", "ownership": {"heads.*": "independent", "*": "unused"}}, "broken"),
        ({"loss_scale": {"loss": "sum", "shared": ["heads.*"]}}, "broken"),
        ({"loss_scale": {"loss": "sum", "shared": ["trunk.*"]}}, "held"),
        ({"loss_scale": "sum", "ownership": {"trunk.*": "tied", "*": "independent"}}, "held"),
        ({"loss_scale": "sum", "ownership": "tied"}, "held"),
        ({"loss_scale": "sum", "ownership": Partition(parent="0")}, "held"),
        ({"loss_scale": "sum", "sharing": ["trunk.*"]}, "held"),
        ({"loss_scale": "sum", "sharing": "tied"}, "held"),
        ({"loss_scale": "sum", "ownership": {"trunk.*": "independent", "*": "tied"}}, "broken"),
    ],
)
def test_what_other_claims_call_shared_is_shared_by_design(claims, status):
    subject = Subject(make=Heads, batch=batch, loss=sum_of_losses, claims=claims)
    (result,) = (r for r in check_ensemble(subject) if r.check == "loss_scale")
    assert result.status == status, result.message


def test_subnets_share_the_parents_weights_by_design():
    def loss(outputs):
        return sum(cross_entropy(y, torch.arange(2)) for y in outputs.values())

    subject = replace(wide_resnet18_with_subnets(base_channels=2), loss=loss)

    def result_of(**claims):
        found = check_ensemble(replace(subject, claims={"loss_scale": "sum", **claims}))
        return next(result for result in found if result.check == "loss_scale")

    designed = result_of(ownership=subject.claims["ownership"])
    assert designed.status == "held", designed.message
    assert "but gradients add up in 20 shared parameters" in designed.found
    apart = result_of()
    assert apart.status == "broken"
    assert "parent.conv1.weight" in apart.message


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 3])
def test_precision_is_that_of_the_members(dtype, count):
    members, x = several(count).to(dtype), batch().to(dtype)
    assert_loss_scaled(measure_loss_scale(members, x, loss=mean_of_losses), "mean")
    with pytest.raises(AssertionError, match="but train on their mean"):
        assert_loss_scaled(measure_loss_scale(members, x, loss=mean_of_losses), "sum")


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = mlp()

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.network(x)


def test_autocast_computes_in_less_precision_than_parameters_have():
    assert_loss_scaled(measured(mean_of_losses, count=3, make=Autocast), "mean")


def test_a_loss_that_changes_its_outputs_in_place_is_measured_all_the_same():
    def own_cooled(y):
        return own(y.div_(2))

    def loss(outputs):
        return sum(own_cooled(y) for y in outputs.values()) / 2

    scale = measured(loss, count=2, member_loss=own_cooled)
    assert [(m.multiple, m.exact) for m in scale.members] == [(0.5, True)] * 2


def test_the_model_is_called_once_and_the_loss_a_few_times_for_each_member():
    calls = []

    class Counts(nn.Linear):
        def forward(self, x):
            calls.append("model")
            return super().forward(x.flatten(1))

    def loss(outputs):
        calls.append("loss")
        return sum_of_losses(outputs)

    measured(loss, count=5, make=lambda: Counts(18, CLASSES))
    assert calls.count("model") == 5
    assert calls.count("loss") == 3 + 5  # of the parameters, twice of the outputs, and each nudged


# --- what is found, as data ---------------------------------------------------------------------


def test_findings_say_who_gets_how_much():
    with pytest.raises(AssertionError) as broken:
        assert_loss_scaled(measured(weighted(0.5, 1.0, 1.0), count=3), "sum")
    findings = broken.value.findings
    (finding,) = findings
    assert (finding.kind, finding.members, finding.amount) == ("other multiple", ("0",), 0.5)
    assert findings.affected == (Count(1, "member", of=3),)
    assert findings.looked_at == ()


def test_all_kinds_are_told_together(golden):
    def loss(outputs):
        return sum(cross_entropy(p, LABELS) for p in outputs.values()) / 2

    def clip(model):
        clip_grad_norm_([p for member in model for p in member.parameters()], 1.0)

    members = [probable() for _ in range(2)]
    scale = measure_loss_scale(
        members,
        batch(),
        loss=loss,
        member_loss=own,
        clip=clip,
        optimizer=lambda model: sgd(nn.ModuleList(model)),
    )
    findings = judge(scale, LossScaleClaim("sum", lr=0.1, warmup=3))
    kinds = ("other multiple", "second softmax", "joint clipping", "other rates", "warm-up")
    assert findings.kinds == kinds
    assert findings.affected == (Count(2, "member", of=2),)
    golden(rendered(findings), "messages/loss_scale_several.txt")


def test_rates_that_are_not_known_are_counted_where_something_is_found():
    scale = measured(mean_of_losses, optimizer=lambda model: sgd(model[:3]))
    findings = judge(scale, LossScaleClaim("sum", lr=0.025))
    assert findings.kinds == ("other multiple",)
    assert findings.looked_at == (Count(3, "rate", of=4),)
    assert judge(scale, LossScaleClaim("sum")).looked_at == ()


def test_a_joint_loss_of_some_members_is_told_of_those():
    def loss(outputs):
        return own(outputs["0"] + outputs["1"]) + own(outputs["2"])

    with pytest.raises(AssertionError, match="the loss couples them") as broken:
        assert_loss_scaled(measured(loss, count=3), "sum")
    assert [finding.members for finding in broken.value.findings] == [("0",), ("1",)]
    with pytest.raises(AssertionError, match="but member 2 trains alone"):
        assert_loss_scaled(measured(loss, count=3), "joint")


# --- joint --------------------------------------------------------------------------------------


def test_a_loss_of_the_mean_prediction_is_joint():
    assert_loss_scaled(measured(of_mean_prediction), "joint")

    def interpolated(outputs):
        return (mean_of_losses(outputs) + of_mean_prediction(outputs)) / 2

    assert_loss_scaled(measured(interpolated), "joint")


def test_a_loss_of_the_mean_prediction_for_a_sum_is_broken(golden):
    with pytest.raises(AssertionError) as broken:
        assert_loss_scaled(measured(of_mean_prediction, count=3), "sum")
    golden(str(broken.value), "messages/loss_scale_joint.txt")


def test_a_mean_of_losses_for_a_joint_loss_is_broken(golden):
    with pytest.raises(AssertionError) as broken:
        assert_loss_scaled(measured(mean_of_losses, count=3), "joint")
    golden(str(broken.value), "messages/loss_scale_not_joint.txt")


def test_weights_that_depend_on_all_losses_couple_members():
    def loss(outputs):
        losses = torch.stack([own(y) for y in outputs.values()])
        return (losses * losses.detach().softmax(0)).sum()

    with pytest.raises(AssertionError, match="but the loss couples them"):
        assert_loss_scaled(measured(loss), "sum")


# --- probabilities taken for logits -------------------------------------------------------------


def probable(classes: int = 4) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(18, classes), nn.Softmax(1))


def smoothed(y):
    return cross_entropy(y, LABELS, label_smoothing=0.1)


def reweighted(y):
    return cross_entropy(y, LABELS, weight=torch.arange(1.0, 5.0), reduction="sum")


def distilled(y):
    return cross_entropy(y, torch.eye(4)[LABELS] * 0.8 + 0.05)


@pytest.mark.parametrize("loss", [own, smoothed, reweighted, distilled])
@pytest.mark.parametrize("how", ["each", "their mean", "both"])
def test_cross_entropy_of_probabilities_is_broken(loss, how):
    def of_all(outputs):
        each = sum(loss(y) for y in outputs.values())
        of_mean = loss(torch.stack(list(outputs.values())).mean(0))
        return {"each": each, "their mean": of_mean, "both": 0.3 * each + of_mean}[how]

    scale = measured(of_all, make=probable, member_loss=loss)
    assert [member.classes for member in scale.members] == [4] * 4
    with pytest.raises(AssertionError, match="but takes their probabilities for logits"):
        assert_loss_scaled(scale, "sum" if how == "each" else "joint")


def test_the_message_of_probabilities_taken_for_logits(golden):
    with pytest.raises(AssertionError) as broken:
        assert_loss_scaled(measured(sum_of_losses, count=2, make=probable), "sum")
    golden(str(broken.value), "messages/loss_scale_probabilities.txt")


@pytest.mark.parametrize("axis", [1, -1])
def test_probabilities_of_every_position_are_seen(axis):
    class Positions(nn.Conv2d):
        def forward(self, x):
            return super().forward(x).softmax(1).movedim(1, axis)

    labels = torch.arange(ROWS * 4).view(ROWS, 2, 2) % 4

    def loss(y):
        return cross_entropy(y.movedim(axis, 1), labels)

    scale = measured(
        lambda outputs: sum(loss(y) for y in outputs.values()),
        make=lambda: Positions(2, 4, 2),
        member_loss=loss,
    )
    assert [member.classes for member in scale.members] == [4] * 4


@pytest.mark.parametrize(
    "loss",
    [
        lambda p: nll_loss(p.log(), LABELS % p.shape[1]),
        lambda p: mse_loss(p, torch.eye(p.shape[1])[LABELS % p.shape[1]]),
        lambda p: nn.functional.multi_margin_loss(p, LABELS % p.shape[1]),
        lambda p: nn.functional.kl_div(
            p.log(), torch.full_like(p, 1 / p.shape[1]), reduction="batchmean"
        ),
        lambda p: -((1 - p) ** 2 * p.log()).gather(1, LABELS[:, None] % p.shape[1]).mean(),
        lambda p: -(1 - p).log().gather(1, LABELS[:, None] % p.shape[1]).mean(),
        lambda p: cross_entropy(p.log(), LABELS % p.shape[1]),
        lambda p: cross_entropy(p.logit(), LABELS % p.shape[1]),
    ],
    ids=["nll", "brier", "margin", "kl", "focal", "unlikelihood", "log first", "logit first"],
)
@pytest.mark.parametrize("classes", [2, 3])
def test_a_loss_that_takes_probabilities_as_such_is_healthy(loss, classes):
    scale = measured(
        lambda outputs: sum(loss(p) for p in outputs.values()),
        make=lambda: probable(classes),
        member_loss=loss,
    )
    assert [member.classes for member in scale.members] == [None] * 4
    assert_loss_scaled(scale, "sum")


def test_cross_entropy_of_log_probabilities_is_healthy():
    def logarithmic() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(18, 4), nn.LogSoftmax(1))

    assert_loss_scaled(measured(sum_of_losses, make=logarithmic), "sum")


# --- clipping -----------------------------------------------------------------------------------


def clip_all(model):
    clip_grad_norm_(model.parameters(), 1.0)


def clip_each(model):
    for member in model:
        clip_grad_norm_(member.parameters(), 1.0)


def test_one_clipping_norm_for_all_members_is_broken(golden):
    with pytest.raises(AssertionError) as broken:
        assert_loss_scaled(measured(sum_of_losses, clip=clip_all), "sum")
    golden(str(broken.value), "messages/loss_scale_clipping.txt")


def test_a_clipping_norm_that_this_batch_does_not_reach_couples_all_the_same():
    def clip(model):
        clip_grad_norm_(model.parameters(), 1e4)

    with pytest.raises(AssertionError, match="one norm couples them"):
        assert_loss_scaled(measured(sum_of_losses, clip=clip), "sum")


@pytest.mark.parametrize(
    "clip",
    [clip_each, lambda model: clip_grad_value_(model.parameters(), 1e-3), lambda model: None],
    ids=["norm_of_each", "value", "nothing"],
)
def test_clipping_that_couples_nothing_holds(clip):
    assert_loss_scaled(measured(sum_of_losses, clip=clip), "sum")


def test_clipping_that_is_claimed_but_not_there_is_an_error():
    with pytest.raises(ValueError, match="but there is none: give clip="):
        assert_loss_scaled(measured(sum_of_losses), "sum", clipping="member")
    assert_loss_scaled(measured(sum_of_losses, clip=clip_each), "sum", clipping="member")


def test_joint_clipping_can_be_claimed():
    assert_loss_scaled(measured(sum_of_losses, clip=clip_all), "sum", clipping="joint")


# --- wrong use ----------------------------------------------------------------------------------


def test_one_member_is_an_error():
    with pytest.raises(ValueError, match="only one was found"):
        measured(sum_of_losses, count=1)


def test_a_member_loss_that_raises_is_told_by_its_name():
    with pytest.raises(ValueError, match=r"^member_loss=\.\.\. raised ZeroDivisionError"):
        measured(sum_of_losses, member_loss=lambda y: 1 / 0)


def test_a_random_loss_is_an_error():
    def stochastic(outputs):
        names = list(outputs)
        return own(outputs[names[int(torch.randint(len(names), ()))]])

    with pytest.raises(ValueError, match="the loss draws random numbers"):
        measured(stochastic)


def test_a_loss_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="has no gradient in any member's output"):
        measured(lambda outputs: sum_of_losses(outputs).detach())


def test_a_gradient_of_zero_alone_is_an_error():
    with pytest.raises(ValueError, match="gradient of member 0 alone is zero"):
        measured(sum_of_losses, member_loss=lambda y: 0 * y.sum())


def test_a_scheduler_without_optimizer_is_an_error():
    with pytest.raises(ValueError, match="give optimizer= too"):
        measured(sum_of_losses, scheduler=lambda optimizer: None)


def test_clipping_of_members_without_own_parameters_is_an_error():
    with pytest.raises(ValueError, match="no parameters of its own"):
        measure_loss_scale(
            Packed(), batch(), loss=sum_of_losses, outputs=split_axis(0), clip=clip_all
        )
    with pytest.raises(ValueError, match=r"clip=\.\.\. raised ZeroDivisionError"):
        measured(sum_of_losses, clip=lambda model: 1 / 0)


@pytest.mark.parametrize("claim", ["average", [1.0, 1.0], {"0": 1.0}, {"a": 1, "b": 1}])
def test_claims_that_do_not_fit_are_errors(claim):
    with pytest.raises(ValueError, match=r"cannot be claimed|Give one for each"):
        assert_loss_scaled(measured(sum_of_losses), claim)
    with pytest.raises(ValueError, match="clipping cannot be claimed"):
        assert_loss_scaled(measured(sum_of_losses), "sum", clipping="none")


# --- looking changes nothing --------------------------------------------------------------------


def test_looking_changes_nothing():
    members = several(make=conv).eval()
    optimizer = sgd(members)
    trained(members, sum_of_losses, optimizer, steps=2)
    before, state = copy.deepcopy(members.state_dict()), copy.deepcopy(optimizer.state_dict())
    gradients = [p.grad.clone() for p in members.parameters()]
    attributes, generator = set(vars(optimizer)), torch.get_rng_state()

    def cosine(built):
        return torch.optim.lr_scheduler.CosineAnnealingLR(built, 10)

    arguments = {"optimizer": lambda model: optimizer, "scheduler": cosine, "clip": clip_all}
    scale = measure_loss_scale(members, batch(), loss=mean_of_losses, **arguments)
    assert scale == measure_loss_scale(members, batch(), loss=mean_of_losses, **arguments)
    assert not any(module.training for module in members.modules())
    assert torch.equal(torch.get_rng_state(), generator)
    assert set(vars(optimizer)) == attributes
    assert "step" not in attributes
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    for key, held in state["state"].items():
        assert torch.equal(after["state"][key]["momentum_buffer"], held["momentum_buffer"])
    for p, gradient in zip(members.parameters(), gradients, strict=True):
        assert torch.equal(p.grad, gradient)
    for name, tensor in members.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_model_is_looked_at_in_train_mode():
    modes = []

    class Remembers(nn.Linear):
        def forward(self, x):
            modes.append(self.training)
            return super().forward(x.flatten(1))

    members = several(2, lambda: Remembers(18, CLASSES)).eval()
    measure_loss_scale(members, batch(), loss=sum_of_losses)
    assert modes == [True, True]


# --- the fixture, and the gate ------------------------------------------------------------------


def test_the_fixture_asserts_multiples_and_rates(loss_scale):
    members, x = several(), batch()
    recipe = {"loss": mean_of_losses, "optimizer": sgd}
    loss_scale.assert_scaled(members, x, "mean", loss=mean_of_losses)
    loss_scale.assert_rates(members, x, lr=0.025, weight_decay=2e-3, **recipe)
    with pytest.raises(AssertionError, match="but train on their mean"):
        loss_scale.assert_scaled(members, x, loss=mean_of_losses)
    with pytest.raises(AssertionError, match=r"expected lr 0\.1"):
        loss_scale.assert_rates(members, x, lr=0.1, **recipe)


@pytest.mark.parametrize(
    ("claim", "status"),
    [
        ("mean", "held"),
        ("sum", "broken"),
        ("joint", "broken"),
        (0.25, "held"),
        ([0.25] * 4, "held"),
        (dict.fromkeys("0123", 0.25), "held"),
        ({"loss": "mean", "lr": 0.025, "weight_decay": 2e-3, "steps": 3}, "held"),
        ({"loss": "mean", "lr": 0.1}, "broken"),
    ],
)
def test_the_gate_reads_the_claim(claim, status):
    subject = Subject(
        make=several,
        batch=batch,
        loss=mean_of_losses,
        optimizer=sgd,
        claims={"loss_scale": claim},
    )
    (result,) = (r for r in check_ensemble(subject) if r.check == "loss_scale")
    assert result.status == status, result.message


@pytest.mark.parametrize(
    ("claim", "words"),
    [
        ("average", "It can be: sum, mean, joint, a number, one for each member or a dict"),
        ({"loss": "mean", "rate": 0.1}, "a dict of loss, clipping, shared, lr"),
        ({"loss": None, "lr": 0.1}, "It can be: sum, mean"),
        ({"lr": "fast"}, "It can be: sum, mean"),
        ({"loss": "mean", "lr": "fast"}, "lr cannot be claimed to be 'fast'. It can be: a number"),
        ({"loss": "mean", "clipping": "none"}, "clipping cannot .* It can be: member or joint"),
        ({"loss": "mean", "shared": "stem.*"}, "shared cannot .* a list of name patterns"),
        ({"loss": "mean", "warmup": "5"}, "warmup cannot .* a number of steps"),
        ({"loss": "mean", "weight_decay": [0.1]}, "weight_decay cannot .* a number"),
        ({"loss": "mean", "steps": 0}, "steps cannot .* at least one step"),
    ],
)
def test_a_claim_that_cannot_be_says_what_could(claim, words):
    with pytest.raises(ClaimError, match=words):
        parse(claim)


def test_rates_that_are_listed_say_how_many_steps_there_are():
    assert parse({"loss": "sum", "lr": [0.1, 0.2]}).steps == 2
    assert parse({"loss": "sum", "lr": 0.1}).steps == STEPS


def test_the_gate_asks_for_the_loss():
    subject = Subject(make=several, batch=batch, claims={"loss_scale": "sum"})
    (result,) = (r for r in check_ensemble(subject) if r.check == "loss_scale")
    assert result.status == "error"
    assert "Subject(loss=...)" in result.message
