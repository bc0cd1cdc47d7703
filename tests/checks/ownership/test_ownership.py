import copy
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

from ensembles import Partition, Subject, check_ensemble, split_axis, split_batch
from ensembles.case import Case
from ensembles.checks.ownership.claim import parse
from ensembles.checks.ownership.judgement import assert_ownership, judge
from ensembles.checks.ownership.measurement import measure_ownership_map
from ensembles.checks.ownership.owner_sets import OwnerSets
from ensembles.models import (
    Ensemble,
    NStreams,
    SubnetResNet,
    subnet_resnet18,
    subnet_resnet50,
)
from ensembles.models.example import wide_resnet18_with_subnets
from ensembles.models.routing import ResidualRoute

IMAGES = (2, 3, 16, 16)


def owned(model, batch=None, claim="independent", outputs=None):
    batch = torch.randn(*IMAGES) if batch is None else batch
    measured = measure_ownership_map(model, batch, outputs=outputs)
    assert_ownership(measured, claim)
    return measured


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


class Grouped(nn.Module):
    """Two members side by side in the channels; `mix` is what stands between the layers."""

    def __init__(self, mix: nn.Module | None = None, groups: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(6, 4, 3, padding=1, groups=2)
        self.first = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.mix = mix or nn.Identity()
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
        self.head = nn.Conv2d(8, 10, 1, groups=2)

    def forward(self, x):
        x = F.relu(self.stem(torch.cat([x, x], 1)))
        x = self.mix(F.relu(self.first(x)))
        return self.head(F.relu(self.second(x))).mean((2, 3)).chunk(2, 1)


# --- independent --------------------------------------------------------------------------------


def test_members_of_their_own_are_independent():
    measured = owned([convnet() for _ in range(3)])
    assert {measured.statement(name) for name in measured.owners} == {"independent"}
    assert measured.owners["1.8.bias"] == {("1",): 5}


def test_groups_are_independent():
    assert owned(Grouped()).owners["model.second.weight"] == {("0",): 144, ("1",): 144}


def test_a_layer_that_is_not_grouped_is_broken(golden):
    with pytest.raises(AssertionError) as broken:
        owned(Grouped(groups=1))
    golden(str(broken.value), "messages/ownership_leaking.txt")


@pytest.mark.parametrize(
    "mix",
    [
        nn.ChannelShuffle(2),
        nn.GroupNorm(1, 8),
        nn.LayerNorm([8, 16, 16]),
        nn.Conv2d(8, 8, 1),
        nn.Softmax(dim=1),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_whatever_mixes_channels_between_groups_is_broken(mix):
    with pytest.raises(AssertionError, match="are claimed independent, but leak into other"):
        owned(Grouped(mix))


@pytest.mark.parametrize(
    "mix",
    [nn.GroupNorm(2, 8), nn.BatchNorm2d(8), nn.InstanceNorm2d(8), nn.PReLU(8), nn.Dropout(0.9)],
    ids=lambda layer: type(layer).__name__,
)
def test_whatever_keeps_groups_apart_holds(mix):
    owned(Grouped(mix))


def test_swapped_outputs_are_broken():
    class Swapped(nn.Module):
        def __init__(self, other):
            super().__init__()
            self.own = nn.Linear(3, 2)
            self.__dict__["other"] = other

        def forward(self, x):
            return self.other(x) + 0 * self.own(x).sum()

    one = nn.Linear(3, 2)
    with pytest.raises(
        AssertionError, match=r"0\.weight +leak: +expected member 0 +found members 0"
    ):
        owned([one, Swapped(one)], torch.randn(4, 3))


def test_findings_are_data_and_the_main_kind_comes_first():
    model = Grouped(groups=1)
    model.unused = nn.Linear(2, 2)
    measured = measure_ownership_map(model, torch.randn(*IMAGES))
    with pytest.raises(AssertionError) as broken:
        assert_ownership(measured)
    findings = broken.value.findings
    assert findings == judge(measured, parse("independent"))
    assert findings.kinds == ("leak", "unused")
    assert (findings[0].place, findings[0].members) == ("stem.weight", ("0", "1"))
    assert [finding.amount for finding in findings] == [108, 4, 144, 8, 4, 2]
    assert str(findings.affected[0]) == "6 of 10 parameters"
    assert findings.looked_at == ()
    told = str(broken.value)
    assert "They mix after first.bias" in told
    assert "Unused: No prediction depends on these weights" in told


# --- tied ---------------------------------------------------------------------------------------


class Side(nn.Module):
    """Members in a container of one module."""

    def __init__(self, *members: nn.Module) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x):
        return [member(x) for member in self.members]


def leaking(model) -> str:
    how = "but (leak into other|are shared between) members"
    with pytest.raises(AssertionError, match=how) as broken:
        owned(model)
    return str(broken.value)


def test_members_that_are_one_network_are_told_as_that(golden):
    golden(leaking([convnet()] * 3), "messages/ownership_one_network.txt")
    one = convnet()
    assert "Members 0, 1 are one network" in leaking(Side(one, one))


def test_two_of_three_members_that_are_one_network_are_told_as_that():
    one = convnet()
    assert "Members 0, 1 are one network" in leaking([one, one, convnet()])


def test_a_layer_of_several_members_is_no_mixing():
    first, second = convnet(), convnet()
    second[4] = first[4]
    for model in ([first, second], Side(first, second)):
        told = " ".join(leaking(model).split())
        assert "a layer that was made once and passed to several members" in told
        assert "They mix" not in told
        assert "one network" not in told


def test_members_that_also_mix_are_told_where():
    first, second = convnet(), convnet()
    second[4] = first[4]

    class Mixing(Side):
        def forward(self, x):
            one, two = super().forward(x)
            return one, two + one

    told = leaking(Mixing(first, second))
    assert "They mix after members.0.8.bias" in told
    assert "members.0.4.weight   shared:" in told

    class Swapped(nn.Module):
        def __init__(self, own, other):
            super().__init__()
            self.own, self.other = own, [other]

        def forward(self, x):
            return self.other[0](x)

    one, two = convnet(), convnet()
    assert "They mix after" in leaking([Swapped(one, two), Swapped(two, one)])


def test_streams_through_one_network_are_tied():
    measured = owned(NStreams(convnet(), 3), claim="tied")
    assert set(measured.owners["model.network.0.weight"]) == {("0", "1", "2")}


def test_a_member_that_is_not_tied_is_broken(golden):
    class Streams(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.head = convnet()[:-1], nn.Linear(8, 5)
            self.copied = copy.deepcopy(self.head)

        def forward(self, x):
            return [self.head(self.trunk(x)), self.copied(self.trunk(x))]

    with pytest.raises(AssertionError) as broken:
        owned(Streams(), claim="tied")
    golden(str(broken.value), "messages/ownership_untied.txt")


def test_batch_ensemble_factors_are_own_and_the_weight_is_tied():
    """BatchEnsemble (Wen et al. 2020): member i has weight W * outer(s_i, r_i)."""

    class BatchEnsemble(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6))
            self.r, self.s = nn.Parameter(torch.ones(3, 6)), nn.Parameter(torch.ones(3, 4))

        def forward(self, x):
            return torch.stack(
                [((x * r) @ self.weight.T) * s for r, s in zip(self.r, self.s, strict=True)], 1
            )

    measured = owned(
        BatchEnsemble(),
        torch.randn(5, 6),
        {"weight": "tied", "*": "independent"},
        outputs=split_axis(1),
    )
    assert measured.block("model.r", ("1",)).slices == "[1:2, :]"


# --- partition ----------------------------------------------------------------------------------

CLAIMS = wide_resnet18_with_subnets(width=2).claims["ownership"]


@pytest.mark.parametrize("width", [1, 2, 3])
def test_subnets_partition_every_parent_conv(width):
    subject = wide_resnet18_with_subnets(width=width, base_channels=2)
    measured = owned(subject.make(), claim=subject.claims["ownership"])
    conv = measured.owners["model.parent.layer2.0.conv1.weight"]
    assert len(conv) == width * width
    assert len(set(conv.values())) == 1
    assert {len(owners) for owners in conv} == {2}


def test_subnets_partition_every_parent_conv_of_bottlenecks():
    owned(subnet_resnet50(width=2, base_channels=2), claim=CLAIMS)


def test_a_block_is_named_by_its_slices():
    measured = owned(subnet_resnet18(width=2, base_channels=4), claim=CLAIMS)
    name = "model.parent.layer1.0.conv1.weight"
    assert measured.block(name, ("parent", "subnet_0_1")).slices == "[4:8, 0:4, :, :]"


def planted(change) -> SubnetResNet:
    model = subnet_resnet18(width=2, base_channels=4, construction="zero_padded")
    change(model)
    return model


def empty_shortcut(model):
    """The downsample of one subnet reads the group that is empty: its shortcut is always zero."""
    block = model.subnets["subnet_0_1"].layer2[0]
    i, j = block.route.downsample
    block.route = ResidualRoute(block.route.main, (i, 1 - j), block.route.switch)


def untied_stem(model):
    """The stem of one subnet is a copy of the parent's."""
    subnet = model.subnets["subnet_1_0"]
    subnet.conv1 = copy.deepcopy(subnet.conv1)


def test_a_shortcut_from_the_empty_group_is_broken(golden):
    with pytest.raises(AssertionError) as broken:
        owned(planted(empty_shortcut), claim=CLAIMS)
    golden(str(broken.value), "messages/ownership_empty_shortcut.txt")


def test_a_stem_that_is_not_tied_is_broken(golden):
    with pytest.raises(AssertionError) as broken:
        owned(planted(untied_stem), claim=CLAIMS)
    golden(str(broken.value), "messages/ownership_untied_stem.txt")


# --- nothing hides ------------------------------------------------------------------------------


class Wide(nn.Module):
    """A network in two members, by a function of its hidden layer."""

    def __init__(self, hide) -> None:
        super().__init__()
        self.first, self.hide = nn.Linear(4, 6), hide
        self.heads = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])

    def forward(self, x):
        h = self.hide(self.first(x))
        return [head(h) for head in self.heads]


HIDING = {
    "relu": F.relu,
    "relu_": lambda x: F.relu_(x.clone()),
    "relu6": F.relu6,
    "clamp": lambda x: x.clamp(min=0),
    "where": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "gate": lambda x: x * (x > 0),
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "centred_relu": lambda x: F.relu(F.layer_norm(x, (6,))),
    "crelu": lambda x: F.relu(x) - 2 * F.relu(-x),
    "hardsigmoid": lambda x: F.hardsigmoid(-9 - x),
    "saturated_softmax": lambda x: F.softmax(x, dim=-1),
    "saturated_sigmoid": lambda x: torch.sigmoid(x),
    "saturated_tanh": lambda x: torch.tanh(x),
    "dropout": lambda x: F.dropout(x, 0.9),
    "max": lambda x: x.view(-1, 3, 2).amax(-1).repeat(1, 2),
    "max_values": lambda x: x.view(-1, 3, 2).max(-1).values.repeat(1, 2),
    "max_pool": lambda x: F.max_pool1d(x, 3, 1, 1),
    "max_pool_ceil": lambda x: F.max_pool1d(x, 4, 3, ceil_mode=True).repeat(1, 3),
    "max_pool_dilated": lambda x: F.max_pool2d(x.view(-1, 1, 3, 2), 2, 1, 1, 2).flatten(1)[:, :6],
    "log_softmax": lambda x: F.log_softmax(x, dim=-1),
    "tanhshrink": F.tanhshrink,
    "x_minus_clamp": lambda x: x - x.clamp(-0.5, 0.5),
    "hat": lambda x: F.relu(x + 3) - F.relu(x - 3),
    "two_sided": lambda x: F.relu(x) + F.relu(-x),
    "x_minus_relu": lambda x: x - F.relu(x),
    "range": lambda x: (x.amax(-1) - x.amin(-1)).unsqueeze(-1) * torch.ones(6),
    "prelu": lambda x: F.prelu(-x, torch.tensor([0.1])),
}


@pytest.mark.parametrize("hide", HIDING)
def test_no_operation_hides_a_weight(hide):
    model = Wide(HIDING[hide])
    with torch.no_grad():
        model.first.weight.mul_(1e4)  # saturated for every input
        model.first.bias.fill_(-1e6)  # dead for every input
    width = model.hide(torch.zeros(1, 6)).shape[1]
    model.heads = nn.ModuleList([nn.Linear(width, 3), nn.Linear(width, 3)])
    measured = owned(model, torch.zeros(2, 4), {"first.*": "tied", "*": "independent"})
    assert {owners for counts in measured.owners.values() for owners in counts} == {
        ("0", "1"),
        ("0",),
        ("1",),
    }


def test_branches_that_start_at_zero_are_owned():
    class LowRank(nn.Module):
        """LoRA (Hu et al. 2021): B starts at zero, so that the gradient of A is zero."""

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.zeros(3, 2))

        def forward(self, x):
            return x @ (self.b @ self.a).T

    measured = owned([LowRank(), LowRank()], torch.randn(2, 4))
    assert measured.owners["0.a"] == {("0",): 8}


def test_weights_whose_gradient_underflows_are_owned():
    deep = [nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(200)]) for _ in range(2)]
    with torch.no_grad():
        for parameter in deep[0].parameters():
            parameter.mul_(1e-3)
    assert measured_sets(deep, torch.randn(2, 4)) == {("0",), ("1",)}


def measured_sets(model, batch):
    owners = measure_ownership_map(model, batch).owners
    return {found for counts in owners.values() for found in counts}


@pytest.mark.parametrize("recurrent", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_cells_are_owned_whole(recurrent):
    members = [recurrent(3, 4, num_layers=2, batch_first=True) for _ in range(2)]
    assert measured_sets(members, torch.randn(2, 5, 3)) == {("0",), ("1",)}


def test_attention_is_owned_whole():
    layer = lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)  # noqa: E731
    assert measured_sets([layer(), layer()], torch.randn(2, 5, 8)) == {("0",), ("1",)}


def test_rows_that_the_batch_does_not_look_up_are_no_finding():
    shared = nn.Embedding(50, 4)
    members = [nn.Sequential(shared, nn.Linear(4, 2)) for _ in range(2)]
    measured = measure_ownership_map(Ensemble(members), torch.tensor([[1, 2]]))
    assert_ownership(measured, {"*0.weight": "tied", "*": "independent"})
    assert measured.owners["model.members.0.0.weight"] == {("0", "1"): 8, (): 192}
    (looked_at,) = judge(measured, parse({"*0.weight": "tied", "*": "independent"})).looked_at
    assert str(looked_at) == "8 of 200 elements of embeddings"


def test_auxiliary_heads_are_found_in_training_mode():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.extra = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return (self.head(x), self.extra(x)) if self.training else self.head(x)

    owned([Auxiliary(), Auxiliary()], torch.randn(4, 3))


def test_a_layer_that_nothing_calls_is_broken(golden):
    members = [convnet(), convnet()]
    members[1].forward = lambda x: nn.Sequential.forward(members[1][:-1], x)
    with pytest.raises(AssertionError) as broken:
        owned(members)
    golden(str(broken.value), "messages/ownership_unused.txt")


def test_a_frozen_mask_is_kept():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.mask = nn.Parameter(torch.block_diag(*[torch.ones(2, 2)] * 2), False)

        def forward(self, x):
            return F.linear(x, self.weight * self.mask).chunk(2, -1)

    measured = measure_ownership_map(Masked(), torch.randn(2, 4))
    assert measured.owners["model.weight"] == {("0",): 4, ("1",): 4, (): 8}


# --- exactness ----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    members=st.integers(2, 3),
)
def test_owners_equal_reachability_by_brute_force(seed, sizes, members):
    generator = torch.Generator().manual_seed(seed)
    shapes = [*zip(sizes[1:], sizes[:-1], strict=True), (members, sizes[-1])]
    masks = [(torch.rand(shape, generator=generator) < 0.6).float() for shape in shapes]

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterList([torch.randn(shape) for shape in shapes])

        def forward(self, x):
            for weight, mask in zip(self.weights, masks, strict=True):
                x = (
                    F.relu(F.linear(x, weight * mask))
                    if weight is not self.weights[-1]
                    else (F.linear(x, weight * mask) + 1.0)
                )
            return x.unbind(-1)

    alive = [torch.ones(sizes[0])]
    for mask in masks:
        alive.append((mask @ alive[-1] > 0).float())
    expected = {}
    for layer, mask in enumerate(masks):
        reach = torch.eye(members)
        for later in reversed(masks[layer + 1 :]):
            reach = (reach @ later > 0).float()
        flow = mask * alive[layer]
        counts = Counter(
            tuple(str(m) for m in range(members) if reach[m, i]) if flow[i, j] else ()
            for i in range(mask.shape[0])
            for j in range(mask.shape[1])
        )
        expected[f"model.weights.{layer}"] = dict(counts)
    if not any(owners for counts in expected.values() for owners in counts):
        return
    assert measure_ownership_map(Masked(), torch.ones(2, sizes[0])).owners == expected


def test_equal_maps_are_equal_and_others_are_not():
    batch = torch.randn(*IMAGES)
    one, other = (measure_ownership_map(Grouped(), batch) for _ in range(2))
    assert one == other
    assert one != measure_ownership_map(Grouped(nn.ChannelShuffle(2)), batch)


def test_a_case_is_looked_at_whole_and_is_as_before():
    case = Case.of(lambda: [nn.Linear(4, 2), nn.Linear(4, 2)], lambda: torch.randn(3, 4))
    _ = case.batch
    before = case.digest()
    measured = measure_ownership_map(case)
    assert case.digest() == before
    assert measured == measure_ownership_map(case.model, case.batch)


def test_many_sets_of_owners_are_capped():
    told = str(measure_ownership_map(Pool(32), torch.randn(2, 3))).splitlines()
    assert len(told) == 10
    assert told[-1] == "  ... 56 more sets of members"


# --- every way to yield member outputs ----------------------------------------------------------


def test_every_form_of_member_outputs_gives_the_same_map():
    class Forms(nn.Module):
        def __init__(self, form):
            super().__init__()
            self.heads, self.form = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)]), form

        def forward(self, x):
            return self.form([head(x) for head in self.heads])

    forms = [
        (list, None),
        (tuple, None),
        (lambda ys: dict(zip("01", ys, strict=True)), None),
        (torch.stack, split_axis(0)),
        (lambda ys: torch.stack(ys, -1), split_axis(-1)),
        (torch.cat, split_batch(2)),
        (lambda ys: {"nested": ys}, lambda y: y["nested"]),
    ]
    maps = [measure_ownership_map(Forms(f), torch.randn(4, 3), outputs=o) for f, o in forms]
    assert all(found == maps[0] for found in maps)
    assert set(maps[0].owners["model.heads.1.weight"]) == {("1",)}


# --- it leaves everything as it was -------------------------------------------------------------


def test_looking_changes_nothing():
    model = subnet_resnet18(width=2, base_channels=2, construction="zero_padded")
    model.parent.bn1.eval()
    model.parent.fc.weight.requires_grad_(False)
    model.parent.fc.bias.grad = torch.full_like(model.parent.fc.bias, 7.0)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    draws = (torch.get_rng_state(), random.getstate())
    measure_ownership_map(model, torch.randn(*IMAGES, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(draws[0], torch.get_rng_state())
    assert draws[1] == random.getstate()
    assert [module.training for module in model.modules()] == modes
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not model.parent.fc.weight.requires_grad
    assert torch.equal(model.parent.fc.bias.grad, torch.full((1000,), 7.0))
    assert model.parent.conv1.weight.grad is None
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


# --- wrong use ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ("shared", "ownership cannot be claimed to be 'shared'. It can be: independent, tied"),
        ({"*": "untied"}, "ownership cannot be claimed to be 'untied'. Did you mean 'tied'?"),
        ({1: "tied"}, "ownership cannot be claimed to be {1: 'tied'}"),
        ({}, "ownership cannot be claimed to be {}"),
        (Partition(times=0), r"ownership cannot be claimed to be Partition\(.* times=0\)"),
        ({"trunk.*": "tied", "*": "tied"}, "no parameter is named 'trunk"),
        ({"first.*": "tied"}, "nothing is claimed about the ownership of stem.weight"),
        (Partition(parent="trunk"), "no member is named 'trunk'"),
    ],
)
def test_a_claim_that_means_nothing_is_an_error(claim, message):
    with pytest.raises(ValueError, match=message):
        owned(Grouped(), claim=claim)


def test_one_member_cannot_be_compared():
    with pytest.raises(ValueError, match="the model's output is one member's"):
        owned(convnet())


def test_outputs_without_a_graph_are_an_error():
    model = convnet()
    model.forward = torch.no_grad()(lambda x: [nn.Sequential.forward(model, x)] * 2)
    with pytest.raises(ValueError, match="no member's output depends on a parameter by autograd"):
        owned(model)


def test_reentrant_checkpointing_is_an_error():
    from torch.utils.checkpoint import checkpoint

    model = Wide(F.relu)
    run = model.forward
    model.forward = lambda x: list(
        checkpoint(lambda y: tuple(run(y)), x.requires_grad_(), use_reentrant=True)
    )
    with pytest.raises(ValueError, match="re-entrant activation checkpointing"):
        owned(model, torch.randn(2, 4))


MANY = (2, 8, 9, 31, 32, 33, 62, 63, 64, 65, 128, 256)


class Pool(nn.Module):
    """A parent that sums a pool of weights, and subnets with one row each.

    Beside it each has a row of `own` and of `late`, which training mode adds, and all of `common`.
    """

    def __init__(self, members: int, leak: bool = False) -> None:
        super().__init__()
        self.pool = nn.Parameter(torch.randn(members - 1, 3))
        self.own, self.late = (nn.Parameter(torch.randn(members, 3)) for _ in range(2))
        self.common = nn.Parameter(torch.randn(3))
        self.leak = leak

    def forward(self, x):
        pooled = torch.cat([self.pool.sum(0, keepdim=True), self.pool])
        weights = pooled + self.own + self.common + (self.late if self.training else 0.0)
        first = weights[:1] + (self.own[-1:] if self.leak else 0.0)
        ys = (x @ torch.cat([first, weights[1:]]).T).unbind(-1)
        return {"parent" if i == 0 else f"subnet {i}": y for i, y in enumerate(ys)}


POOLED = {"pool": "partition", "common": "tied", "*": "independent"}


@pytest.mark.parametrize("members", MANY)
def test_any_number_of_members_is_told_apart(members):
    measured = owned(Pool(members), torch.randn(2, 3), POOLED)
    parent, *subnets = measured.members
    assert measured.owners["model.common"] == {measured.members: 3}
    assert measured.owners["model.pool"] == {(parent, subnet): 3 for subnet in subnets}
    for name in ("model.own", "model.late"):
        assert measured.owners[name] == {(member,): 3 for member in measured.members}
    last = measured.block("model.own", (subnets[-1],))
    assert last == (f"[{members - 1}:{members}, :]", False, True)
    assert measured == measure_ownership_map(Pool(members), torch.randn(2, 3))


@pytest.mark.parametrize("members", MANY)
def test_a_leak_between_the_first_and_the_last_of_any_number_is_broken(members):
    with pytest.raises(AssertionError) as broken:
        owned(Pool(members, leak=True), torch.randn(2, 3), POOLED)
    last = members - 1
    found = f"expected one member   found members parent, subnet {last} (3 elements)"
    assert f"own[{last}:{members}, :]   {found}\n" in str(broken.value)
    assert "(1 of 4 parameters)" in str(broken.value)


@given(seed=st.integers(0, 2**31), members=st.integers(1, 80), size=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_sets_of_members_are_those_that_were_added(seed, members, size):
    """Whatever the sets; in two looks, of which the second adds where the first found nobody."""
    generator = torch.Generator().manual_seed(seed)
    names = tuple(map(str, range(members)))
    shares = torch.rand(2, 1, members, generator=generator)
    bits = torch.rand(2, size, members, generator=generator) < shares
    found, at_once = (OwnerSets(torch.empty(size), names) for _ in range(2))
    for look in bits:
        free = found.nobody()
        for i in range(members):
            found.add(i, look[:, i] & free)
    expected = torch.where(bits[0].any(1, keepdim=True), *bits)
    for i in reversed(range(members)):
        at_once.add(i, expected[:, i])
    sets = [tuple(n for n, bit in zip(names, row, strict=True) if bit) for row in expected.tolist()]
    assert found.counts() == Counter(sets)
    for owners in set(sets):
        assert found.mask(owners).tolist() == [one == owners for one in sets]
    assert found.digest() == at_once.digest()


@pytest.mark.parametrize("put_back", [True, False])
@pytest.mark.parametrize("trained", [3, 1, 0])
def test_what_forward_freezes_after_use_is_looked_at(put_back, trained, freezing_heads):
    model = freezing_heads(4, put_back=put_back, trained=trained)
    flags = [p.requires_grad for p in model.parameters()]
    measured = owned(model, torch.randn(3, 4))
    assert str(measured).startswith("3 members, 30 elements, parameters: 6 independent\n")
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("trained", [3, 1, 0])
def test_a_leak_of_what_forward_freezes_after_use_is_broken(trained, freezing_heads):
    model = freezing_heads(4, put_back=False, trained=trained, leak=True)
    with pytest.raises(AssertionError, match="leak into other members") as broken:
        owned(model, torch.randn(3, 4))
    found = "expected one member   found members 0, 1"
    told = f"heads.1.weight   {found} (8 elements)\n  heads.1.bias     {found} (2 elements)\n"
    assert told in str(broken.value)


def test_what_forward_freezes_before_use_may_be_common(freezing_heads):
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.heads = nn.Linear(4, 4), freezing_heads(4, put_back=True)

        def forward(self, x):
            self.trunk.requires_grad_(False)
            return self.heads(self.trunk(x))

    measured = owned(Frozen(), torch.randn(3, 4))
    assert measured.owners["model.trunk.weight"] == {(): 16}
    assert measured.frozen == {"model.trunk.weight", "model.trunk.bias"}


def test_members_may_have_dots_in_their_names():
    members = {"fold.0": nn.Linear(4, 2), "fold.1": nn.Linear(4, 2), "model": nn.Linear(4, 2)}
    assert owned(members, torch.randn(3, 4)).owners["fold.1.weight"] == {("fold.1",): 8}


def test_a_leak_through_a_shrinking_activation_is_broken():
    class Leaking(nn.Module):
        def __init__(self):
            super().__init__()
            self.p, self.q = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return [self.p(x), self.q(x) + F.tanhshrink(self.p(x))]

    with pytest.raises(AssertionError, match="leak into other members"):
        owned(Leaking(), torch.randn(3, 4))


def test_experts_that_the_batch_is_routed_to_are_reached():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(4, 3)
            self.experts = nn.ModuleList([nn.Linear(4, 2) for _ in range(3)])

        def forward(self, x):
            gate = self.gate(x).softmax(-1)
            ys = torch.stack([expert(x) for expert in self.experts], 1)
            best = gate.argmax(-1, keepdim=True)
            return ys.gather(1, best.unsqueeze(-1).expand(-1, -1, 2)).squeeze(1) * (
                gate.gather(1, best)
            )

    owned([Routed(), Routed()], torch.randn(64, 4))


def test_one_hot_inputs_are_not_taken_for_masks():
    batch = F.one_hot(torch.tensor([0, 1, 2, 1]), 6).float()
    owned(NStreams(nn.Linear(6, 2), 2), batch, "tied")


@pytest.mark.parametrize("closed", [float("-inf"), -1e4, torch.finfo(torch.float32).min])
def test_an_additive_mask_among_the_inputs_keeps_members_apart(closed):
    class Attended(nn.Module):
        def __init__(self):
            super().__init__()
            self.values = nn.Parameter(torch.randn(2, 3))

        def forward(self, mask):
            return (torch.softmax(mask, -1) @ self.values).unbind(0)

    mask = torch.zeros(2, 2).masked_fill(~torch.eye(2, dtype=torch.bool), closed)
    assert owned(Attended(), mask).owners["model.values"] == {("0",): 3, ("1",): 3}


def test_a_frozen_trunk_may_be_common():
    class Heads(nn.Module):
        def __init__(self, graph):
            super().__init__()
            self.trunk, self.graph = nn.Linear(4, 4).requires_grad_(False), graph
            self.heads = nn.ModuleList([nn.Linear(4, 2) for _ in range(2)])

        def forward(self, x):
            with torch.set_grad_enabled(self.graph):
                h = self.trunk(x)
            return [head(h) for head in self.heads]

    judged = {
        graph: judge(owned(Heads(graph), torch.randn(3, 4)), parse("independent"))
        for graph in (True, False)
    }
    assert judged[True].looked_at == ()
    assert [str(count) for count in judged[False].looked_at] == ["0 of 2 frozen parameters"]


def test_a_member_whose_part_of_a_packed_weight_is_cut_is_broken(golden):
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(3, 4, 4)), nn.Parameter(torch.randn(3, 4, 2))

        def forward(self, x):
            h = torch.einsum("bi,mio->mbo", x, self.a).relu()
            h = torch.cat([h[:2], h[2:].detach()])
            return torch.einsum("mbi,mio->mbo", h, self.b)

    with pytest.raises(AssertionError) as broken:
        owned(Packed(), torch.randn(5, 4), outputs=split_axis(0))
    golden(str(broken.value), "messages/ownership_cut_part.txt")


def test_sparse_gradients_and_empty_parameters_are_looked_at():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 3, sparse=True)
            self.empty = nn.Parameter(torch.empty(0, 3))
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.table(x) + self.empty.sum(0))

    owned([Odd(), Odd()], torch.tensor([1, 2]))


def test_outputs_of_members_of_their_own_may_be_found_by_a_function():
    class Answer:
        def __init__(self, logits):
            self.logits = logits

    class Answering(nn.Linear):
        def forward(self, x):
            return Answer(super().forward(x))

    owned([Answering(3, 2), Answering(3, 2)], torch.randn(2, 3), outputs=lambda out: out.logits)


def test_members_that_find_none_are_told_before_outputs():
    subject = Subject(
        make=lambda: nn.Linear(3, 2),
        batch=lambda: torch.randn(4, 3),
        members=lambda model: [],
        claims={"ownership": "independent"},
    )
    (result,) = (r for r in check_ensemble(subject) if r.check == "ownership")
    assert result.message == "members=... has no members: there is nothing to compare."


class Routed(nn.Module):
    """Every row goes to one expert of three."""

    def __init__(self) -> None:
        super().__init__()
        self.route = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))

    def forward(self, x):
        share, chosen = self.route(x).softmax(1).max(1)
        out = x.new_zeros(len(x), 2)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * share[rows, None])
        return out


@pytest.mark.parametrize("seed", range(5))
def test_experts_without_any_row_of_this_batch_are_reached_for_other_values(seed):
    torch.manual_seed(seed)
    members = [Routed(), Routed()]
    assert_ownership(measure_ownership_map(members, torch.randn(3, 4)), "independent")
    members[1].unused = nn.Linear(4, 2)
    found = measure_ownership_map(members, torch.randn(3, 4))
    assert [name for name in found.owners if found.statement(name) == "unused"] == [
        "1.unused.weight",
        "1.unused.bias",
    ]
