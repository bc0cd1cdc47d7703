import copy
import math
from itertools import count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, nll_loss

from ensembles.case import Case
from ensembles.checks.coupling.claim import parse
from ensembles.checks.coupling.judgement import (
    assert_members_coupled,
    assert_members_coupled_to,
    assert_members_uncoupled,
    judge,
)
from ensembles.checks.coupling.measurement import measure_gradient_coupling
from ensembles.claims import ClaimError
from ensembles.gate.conformance import check_ensemble
from ensembles.subject import Subject, split_axis, split_batch


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
    )


def attention() -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 3))


SHAPES = {mlp: (5, 6), conv: (4, 2, 5, 5), attention: (4, 3, 8)}
architectures = pytest.mark.parametrize("make", SHAPES, ids=lambda make: make.__name__)


def batch_for(make) -> torch.Tensor:
    return torch.randn(SHAPES[make])


class Together(nn.Module):
    """Members in one module, which computes all of them in one call."""

    def __init__(self, members) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x):
        return [member(x) for member in self.members]


def members_of(model):
    return model.members


class Packed(nn.Module):
    """Three members in the channel groups of one network, as in packed ensembles.

    A bias before a norm would have a gradient that is a rounding, of another sign on each CPU.
    """

    def __init__(self, mix: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(6, 12, 3, groups=3, bias=False),
            nn.Conv2d(12, 12, 1, groups=3, bias=False),
            nn.BatchNorm2d(12),
            mix or nn.Identity(),
            nn.ReLU(),
            nn.Conv2d(12, 6, 3, groups=3),
        )

    def forward(self, x):
        y = self.layers(x.repeat(1, 3, 1, 1)).mean((2, 3))
        return list(y.chunk(3, 1))


PACKED_BATCH = (4, 2, 6, 6)


# --- members train independently ----------------------------------------------------------------


@architectures
def test_members_that_share_nothing_are_uncoupled(make):
    coupling = measure_gradient_coupling([make() for _ in range(3)], batch_for(make))
    assert coupling.moved == ()
    assert coupling.compared == ("output", "parameter", "buffer")
    assert_members_uncoupled(coupling)


@architectures
def test_members_in_one_module_are_uncoupled(make):
    model = Together([make() for _ in range(3)])
    coupling = measure_gradient_coupling(model, batch_for(make), members=members_of)
    assert coupling.moved == ()
    assert coupling.members == ("0", "1", "2")


@architectures
def test_one_module_three_times_is_coupled(make):
    coupling = measure_gradient_coupling([make()] * 3, batch_for(make))
    assert len(coupling.pairs) == 6
    with pytest.raises(AssertionError, match="claimed to train independently"):
        assert_members_uncoupled(coupling)
    assert_members_coupled(coupling)


def test_the_message_of_one_module_three_times(golden):
    with pytest.raises(AssertionError) as broken:
        assert_members_uncoupled(measure_gradient_coupling([mlp()] * 3, batch_for(mlp)))
    golden(str(broken.value), "messages/coupling_same_module.txt")


@architectures
@pytest.mark.parametrize("together", [False, True], ids=["list", "one_module"])
def test_a_shared_layer_is_seen_between_its_members_only(make, together):
    members = [make() for _ in range(3)]
    members[2][-1] = members[0][-1]
    model = Together(members) if together else members
    coupling = measure_gradient_coupling(
        model, batch_for(make), members=members_of if together else None
    )
    assert coupling.pairs == (("0", "2"), ("2", "0"))
    last = len(members[0]) - 1
    assert [moved.place for moved in coupling.places("0", "2")] == [
        "output",
        f"parameter {last}.weight",
        f"parameter {last}.bias",
    ]


def test_member_modules_with_other_names_than_the_outputs_are_compared_in_their_order():
    model = Together([mlp() for _ in range(3)])
    model.members[2][3] = model.members[0][3]
    coupling = measure_gradient_coupling(
        model,
        batch_for(mlp),
        members=lambda m: dict(zip("abc", m.members, strict=True)),
    )
    assert coupling.pairs == (("0", "2"), ("2", "0"))
    assert [moved.place for moved in coupling.places("2", "0")] == [
        "output",
        "parameter 3.weight",
        "parameter 3.bias",
    ]


@settings(max_examples=25, deadline=None)
@given(origin=st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=3, max_size=3))
def test_exactly_the_members_with_a_common_layer_are_coupled(origin):
    # Layer l of member m is the one that was made for member origin[l][m].
    made = [[nn.Linear(4, 4) for _ in range(4)] for _ in range(3)]
    members = [
        nn.Sequential(*(layers[places[m]] for layers, places in zip(made, origin, strict=True)))
        for m in range(4)
    ]
    expected = {
        (str(i), str(j))
        for i in range(4)
        for j in range(4)
        if i != j and any(places[i] == places[j] for places in origin)
    }
    assert set(measure_gradient_coupling(members, torch.randn(3, 4)).pairs) == expected


def test_the_message_of_a_shared_layer(golden):
    members = [conv() for _ in range(3)]
    members[2][4] = members[0][4]
    with pytest.raises(AssertionError) as broken:
        assert_members_uncoupled(measure_gradient_coupling(members, batch_for(conv)))
    golden(str(broken.value), "messages/coupling_shared_layer.txt")


def test_a_shared_batchnorm_buffer_is_broken(golden):
    members = [conv() for _ in range(2)]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        setattr(members[1][1], name, getattr(members[0][1], name))
    coupling = measure_gradient_coupling(members, batch_for(conv))
    assert [moved.place for moved in coupling.places("0", "1")] == [
        "output",
        "buffer 1.running_mean",
        "buffer 1.running_var",
        "buffer 1.num_batches_tracked",
    ]
    with pytest.raises(AssertionError) as broken:
        assert_members_uncoupled(coupling)
    golden(str(broken.value), "messages/coupling_shared_buffer.txt")


def test_detached_features_of_another_member_are_broken(golden):
    class Reader(nn.Module):
        def __init__(self, other):
            super().__init__()
            self.read = lambda x: other(x).detach()
            self.own = nn.Linear(3, 3)

        def forward(self, x):
            return self.own(self.read(x))

    first = mlp()
    coupling = measure_gradient_coupling([first, Reader(first)], batch_for(mlp))
    assert [(m.step, m.member, m.place) for m in coupling.moved] == [("0", "1", "output")]
    with pytest.raises(AssertionError) as broken:
        assert_members_uncoupled(coupling)
    golden(str(broken.value), "messages/coupling_detached_features.txt")


# --- packed members -----------------------------------------------------------------------------


def test_packed_members_are_uncoupled():
    coupling = measure_gradient_coupling(Packed(), torch.randn(PACKED_BATCH))
    assert coupling.moved == ()
    assert coupling.compared == ("output",)


@pytest.mark.parametrize(
    "mix",
    [
        lambda: nn.Conv2d(12, 12, 1),
        lambda: nn.ChannelShuffle(2),
        lambda: nn.GroupNorm(1, 12),
    ],
    ids=["one_group", "channel_shuffle", "norm_over_all_channels"],
)
def test_packed_members_that_mix_are_coupled(mix):
    coupling = measure_gradient_coupling(Packed(mix()), torch.randn(PACKED_BATCH))
    assert coupling.moved
    assert {moved.place for moved in coupling.moved} == {"output"}
    with pytest.raises(AssertionError, match="a layer that mixes packed members"):
        assert_members_uncoupled(coupling)


def test_a_shuffle_that_only_renames_channels_is_no_coupling():
    model = Packed()
    # Each channel here depends on its own weights and the input, which all members share.
    model.layers[1] = nn.ChannelShuffle(2)
    assert not measure_gradient_coupling(model, torch.randn(PACKED_BATCH)).moved


def test_the_message_of_a_leaky_group(golden):
    model = Packed(nn.GroupNorm(1, 12))
    with pytest.raises(AssertionError) as broken:
        assert_members_uncoupled(measure_gradient_coupling(model, torch.randn(PACKED_BATCH)))
    golden(str(broken.value), "messages/coupling_leaky_group.txt")


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop"])
def test_decay_of_packed_weights_is_no_coupling(name):
    def optimizer(model):
        return getattr(torch.optim, name)(model.parameters(), lr=0.1, weight_decay=0.1)

    batch = torch.randn(PACKED_BATCH)
    assert not measure_gradient_coupling(Packed(), batch, optimizer=optimizer).moved
    mixed = Packed(nn.GroupNorm(1, 12))
    assert measure_gradient_coupling(mixed, batch, optimizer=optimizer).moved


def test_an_optimizer_that_looks_at_whole_tensors_couples_packed_members():
    class Clipped(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.mul_(1 / (1 + p.norm()))

    coupling = measure_gradient_coupling(
        Packed(), torch.randn(PACKED_BATCH), optimizer=lambda m: Clipped(m.parameters(), lr=0.1)
    )
    assert len(coupling.pairs) == 6


def test_stacked_members_are_split_as_given():
    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 6, 2))

        def forward(self, x):
            return torch.einsum("ni,mio->mno", x, self.weight)

    stacked, x = Stacked(), torch.randn(4, 6)
    assert not measure_gradient_coupling(stacked, x, outputs=split_axis(0)).moved
    # Along the samples, every "member" is computed by all three.
    assert len(measure_gradient_coupling(stacked, x, outputs=split_axis(1)).pairs) == 12


def test_rows_of_one_network_are_tied():
    coupling = measure_gradient_coupling(conv(), batch_for(conv), outputs=split_batch(2))
    assert_members_coupled(coupling)


# --- the loss -----------------------------------------------------------------------------------

TARGET = torch.tensor([0, 1, 2, 0, 1])


def summed(outputs):
    return sum(cross_entropy(y, TARGET) for y in outputs.values())


def averaged(outputs):
    return torch.stack([cross_entropy(y, TARGET) for y in outputs.values()]).mean()


def of_mean_prediction(outputs):
    return cross_entropy(torch.stack(list(outputs.values())).mean(0), TARGET)


def of_a_random_member(outputs):
    chosen = list(outputs.values())[int(torch.randint(len(outputs), ()))]
    return cross_entropy(chosen, TARGET)


@pytest.mark.parametrize("loss", [summed, averaged, of_a_random_member])
def test_losses_of_members_do_not_couple(loss):
    coupling = measure_gradient_coupling([mlp() for _ in range(3)], batch_for(mlp), loss=loss)
    assert coupling.moved == ()
    assert coupling.compared[-1] == "loss"


def test_a_loss_of_the_mean_prediction_couples(golden):
    coupling = measure_gradient_coupling(
        [mlp() for _ in range(3)], batch_for(mlp), loss=of_mean_prediction
    )
    assert {moved.place for moved in coupling.moved} == {"loss"}
    assert len(coupling.pairs) == 6
    with pytest.raises(AssertionError) as broken:
        assert_members_uncoupled(coupling)
    golden(str(broken.value), "messages/coupling_mean_prediction.txt")
    with pytest.raises(AssertionError, match="claimed tied"):
        assert_members_coupled(coupling)


def test_a_zero_initialised_head_hides_no_coupled_loss():
    members = [mlp() for _ in range(2)]
    for member in members:
        nn.init.zeros_(member[-1].weight)
        nn.init.zeros_(member[-1].bias)
    coupling = measure_gradient_coupling(members, batch_for(mlp), loss=of_mean_prediction)
    assert len(coupling.pairs) == 2


def test_a_loss_of_probabilities_gets_probabilities():
    def negative_log_likelihood(outputs):
        assert all(((y >= 0) & (y <= 1)).all() for y in outputs.values())
        return sum(nll_loss(y.log(), TARGET) for y in outputs.values())

    members = [nn.Sequential(mlp(), nn.Softmax(-1)) for _ in range(2)]
    assert not measure_gradient_coupling(
        members, batch_for(mlp), loss=negative_log_likelihood
    ).moved


# --- penalties on weights -----------------------------------------------------------------------


def drawn_together(model):
    def loss(outputs):
        one, two, _ = (member[0].weight for member in model)
        return summed(outputs) + (one - two).square().sum()

    return loss


def decayed(model, *, together=False):
    """To zero and to where each member began: each by itself, or by one norm of all."""
    weights = [p for member in model for p in member.parameters()]
    start = [p.detach().clone() for p in weights]

    def loss(outputs):
        anchored = sum((p - 2 * q).abs().sum() for p, q in zip(weights, start, strict=True))
        norms = torch.stack([p.norm() for p in weights])
        return summed(outputs) + anchored + (norms.norm() if together else norms.sum())

    return loss


def test_a_penalty_on_the_distance_of_weights_couples(golden):
    members = [mlp() for _ in range(3)]
    coupling = measure_gradient_coupling(members, batch_for(mlp), loss=drawn_together(members))
    assert {moved.place for moved in coupling.moved} == {"penalty"}
    assert coupling.pairs == (("0", "1"), ("1", "0"))
    assert "step on 0   -         penalty   ." in str(coupling)
    with pytest.raises(AssertionError) as broken:
        assert_members_uncoupled(coupling)
    golden(str(broken.value), "messages/coupling_penalty.txt")


def test_a_penalty_couples_members_inside_one_module():
    model = Together([mlp() for _ in range(3)])
    coupling = measure_gradient_coupling(model, batch_for(mlp), loss=drawn_together(model.members))
    assert coupling.pairs == (("0", "1"), ("1", "0"))


def test_penalties_on_each_member_do_not_couple_and_one_norm_of_all_does():
    members = [mlp() for _ in range(2)]
    each, together = decayed(members), decayed(members, together=True)
    before = [p.clone() for member in members for p in member.parameters()]
    assert_members_uncoupled(measure_gradient_coupling(members, batch_for(mlp), loss=each))
    with pytest.raises(AssertionError, match="trains each by the weights of others"):
        assert_members_uncoupled(measure_gradient_coupling(members, batch_for(mlp), loss=together))
    after = [p for member in members for p in member.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))


def test_a_penalty_that_forward_keeps_for_the_loss_is_looked_at_anew():
    class Keeping(Together):
        def forward(self, x):
            outputs = super().forward(x)
            one, two = (member[0](x) for member in self.members)
            self.kept = (one * two).square().mean() if self.mixed else one.square().mean()
            return outputs

    def found(mixed):
        model = Keeping([mlp() for _ in range(2)])
        model.mixed = mixed
        return measure_gradient_coupling(
            model, batch_for(mlp), loss=lambda outputs: summed(outputs) + model.kept
        )

    assert_members_uncoupled(found(False))
    assert {moved.place for moved in found(True).moved} == {"penalty"}


# --- ties that are claimed ----------------------------------------------------------------------


@architectures
def test_copies_are_not_tied(make):
    first = make()
    with pytest.raises(AssertionError, match="are claimed tied"):
        assert_members_coupled(
            measure_gradient_coupling([first, copy.deepcopy(first)], batch_for(make))
        )


def test_the_message_of_copies_that_are_claimed_tied(golden):
    first = mlp()
    members = [first, first, copy.deepcopy(first)]
    with pytest.raises(AssertionError) as broken:
        assert_members_coupled(measure_gradient_coupling(members, batch_for(mlp)))
    golden(str(broken.value), "messages/coupling_untied.txt")


class Rows(nn.Module):
    """A subnet: some rows of the parent's first layer, and a head of its own."""

    def __init__(self, parent, rows, *, cut=False):
        super().__init__()
        self.parent, self.rows, self.cut = parent, rows, cut
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        weight = self.parent[0].weight[self.rows]
        return self.head(torch.relu(x @ (weight.detach() if self.cut else weight).T))


def test_subnets_are_coupled_to_their_parent():
    parent = mlp()
    family = {
        "parent": parent,
        "upper": Rows(parent, slice(0, 4)),
        "lower": Rows(parent, slice(4, 8)),
    }
    assert_members_coupled_to(measure_gradient_coupling(family, batch_for(mlp)), "parent")


def test_a_subnet_of_a_copy_is_broken(golden):
    parent = mlp()
    family = {
        "parent": parent,
        "upper": Rows(parent, slice(0, 4)),
        "lower": Rows(copy.deepcopy(parent), slice(4, 8)),
    }
    with pytest.raises(AssertionError) as broken:
        assert_members_coupled_to(measure_gradient_coupling(family, batch_for(mlp)), "parent")
    golden(str(broken.value), "messages/coupling_untied_subnet.txt")


def test_a_subnet_that_reads_detached_weights_does_not_move_its_parent():
    parent = mlp()
    family = {"parent": parent, "upper": Rows(parent, slice(0, 4), cut=True)}
    with pytest.raises(AssertionError, match=r"step on upper   leaves parent as it was"):
        assert_members_coupled_to(measure_gradient_coupling(family, batch_for(mlp)), "parent")


def test_subnets_of_a_wide_resnet_are_coupled_to_it():
    from ensembles.models.subnets import SubnetResNet

    model = SubnetResNet(18, width=2, base_channels=2, num_classes=3, stem="cifar").eval()
    coupling = measure_gradient_coupling(model, torch.randn(3, 3, 8, 8))
    assert len(coupling.members) == 5
    assert_members_coupled_to(coupling, "parent")


# --- how it is shown ----------------------------------------------------------------------------


def test_the_matrix_is_readable():
    members = [mlp() for _ in range(3)]
    members[2][3] = members[0][3]
    assert str(measure_gradient_coupling(members, batch_for(mlp))).splitlines() == [
        "3 members, a step on one moves another in 2 of 6 ordered pairs "
        "(output, parameter, buffer compared)",
        "              moves 0                moves 1   moves 2",
        "  step on 0   -                      .         output, 2 parameters",
        "  step on 1   .                      -         .",
        "  step on 2   output, 2 parameters   .         -",
    ]


def test_many_members_are_listed_and_capped():
    text = str(measure_gradient_coupling([nn.Linear(6, 2)] * 10, batch_for(mlp)))
    assert "step on 0   moves 1   output, 2 parameters" in text
    assert text.endswith("... 82 more pairs")


def test_measurements_compare():
    members, x = [mlp() for _ in range(2)], batch_for(mlp)
    one = measure_gradient_coupling(members, x)
    assert one == measure_gradient_coupling(members, x)
    members[1][3] = members[0][3]
    assert one != measure_gradient_coupling(members, x)


# --- nothing is changed, and nothing is drawn ---------------------------------------------------


def test_looking_changes_nothing():
    members = [conv() for _ in range(2)]
    members[0].eval()
    members[1][0].weight.requires_grad_(False)
    members[0][4].weight.grad = torch.ones_like(members[0][4].weight)
    x = batch_for(conv)
    before = [copy.deepcopy(member.state_dict()) for member in members]
    state, kept = torch.get_rng_state(), x.clone()
    measure_gradient_coupling(members, x, loss=lambda y: sum(v.sum() for v in y.values()))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, kept)
    assert [m.training for member in members for m in member] == [False] * 5 + [True] * 5
    assert torch.equal(members[0][4].weight.grad, torch.ones(3, 36))
    assert [p.grad is None for p in members[1].parameters()] == [True] * 6
    assert not members[1][0].weight.requires_grad
    for member, saved in zip(members, before, strict=True):
        for name, tensor in member.state_dict().items():
            assert torch.equal(tensor, saved[name])


@pytest.mark.parametrize("members", [None, members_of], ids=["outputs", "modules"])
def test_members_in_a_python_list_are_left_as_they_were(members):
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.members = [conv() for _ in range(2)]
            self.scales = [torch.ones(3, requires_grad=True) for _ in range(2)]

        def forward(self, x):
            return [m(x) * scale for m, scale in zip(self.members, self.scales, strict=True)]

        def trained(self, i):
            return [*self.members[i].parameters(), self.scales[i]]

    model = Listed()
    before = [copy.deepcopy(member.state_dict()) for member in model.members]
    coupling = measure_gradient_coupling(
        model,
        batch_for(conv),
        members=members,
        optimizer=lambda m: [torch.optim.SGD(m.trained(i), lr=0.1) for i in range(2)],
    )
    assert not coupling.moved
    assert all(torch.equal(scale, torch.ones(3)) for scale in model.scales)
    for member, saved in zip(model.members, before, strict=True):
        for name, tensor in member.state_dict().items():
            assert torch.equal(tensor, saved[name])


def test_a_model_that_works_in_place_keeps_the_batch():
    members = [nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 2)) for _ in range(2)]
    x = batch_for(mlp)
    kept = x.clone()
    assert not measure_gradient_coupling(members, x).moved
    assert torch.equal(x, kept)


def test_vanishing_gradients_hide_nothing():
    members = [nn.Sequential(mlp(), nn.Linear(3, 3)) for _ in range(2)]
    members[1][0] = members[0][0]
    with torch.no_grad():
        members[0][1].weight.mul_(1e-12)
    assert "parameter 0.0.weight" in {
        moved.place for moved in measure_gradient_coupling(members, batch_for(mlp)).moved
    }


# --- wrong use ----------------------------------------------------------------------------------


def deep() -> nn.Module:
    layers = [[nn.Linear(18, 18), nn.BatchNorm1d(18), nn.ReLU()] for _ in range(12)]
    return nn.Sequential(nn.Flatten(), *(layer for block in layers for layer in block))


@pytest.mark.parametrize("rate", [1.0, torch.tensor(1.0)], ids=["number", "tensor"])
def test_a_step_of_the_optimizer_blows_no_numbers_up(rate):
    """An untrained network of many layers would be thrown far off by its full learning rate."""
    torch.manual_seed(0)
    one = deep()
    kept = torch.optim.SGD(one.parameters(), lr=rate)
    x = torch.randn(8, 2, 3, 3)
    coupling = measure_gradient_coupling([one, one], x, optimizer=lambda members: kept)
    weights = [m.by for m in coupling.moved if m.place.startswith("parameter ")]
    assert max(weights) == pytest.approx(0.01, rel=1e-3)
    outputs = [m.by for m in coupling.moved if m.place == "output"]
    assert max(outputs) < 10
    assert kept.param_groups[0]["lr"] is rate


def test_one_member_cannot_be_compared():
    with pytest.raises(ValueError, match="only one was found"):
        measure_gradient_coupling(mlp(), batch_for(mlp))


def test_a_parent_that_does_not_exist_is_an_error():
    coupling = measure_gradient_coupling([mlp(), mlp()], batch_for(mlp))
    with pytest.raises(ValueError, match="no member is named 'parent'"):
        assert_members_coupled_to(coupling, "parent")


def test_frozen_members_are_an_error():
    members = [mlp(), mlp().requires_grad_(False)]
    with pytest.raises(ValueError, match="no training step on member 1"):
        measure_gradient_coupling(members, batch_for(mlp))


def test_a_model_without_registered_parameters_is_an_error():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.members = [mlp(), mlp()]

        def forward(self, x):
            return [member(x) for member in self.members]

    with pytest.raises(ValueError, match="members in a Python list"):
        measure_gradient_coupling(Listed(), batch_for(mlp))


def test_nan_weights_are_an_error():
    members = [mlp(), mlp()]
    members[1][0].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"parameter 1\.0\.weight holds NaN"):
        measure_gradient_coupling(members, batch_for(mlp))


def test_outputs_that_are_not_finite_are_an_error():
    class Log(nn.Module):
        def forward(self, x):
            return torch.log(x * 0)

    members = [mlp(), nn.Sequential(mlp(), Log())]
    with pytest.raises(ValueError, match="output of member 1 holds NaN or infinity"):
        measure_gradient_coupling(members, batch_for(mlp))


def test_a_model_that_is_not_deterministic_is_an_error():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.calls = nn.Linear(6, 2), count()

        def forward(self, x):
            return self.layer(x) + next(self.calls)

    with pytest.raises(ValueError, match="not deterministic: output of member 0 differs"):
        measure_gradient_coupling([Counting(), mlp()], batch_for(mlp))


def test_a_model_that_changes_its_parameters_is_an_error():
    class Renormed(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.weight.div_(2)
            return super().forward(x)

    with pytest.raises(ValueError, match="changes its own parameter"):
        measure_gradient_coupling([mlp(), Renormed(6, 2)], batch_for(mlp))


def broken_optimizer(model):
    raise RuntimeError("no such group")


def no_optimizer(model):
    return (p for member in model for p in member.parameters())


@pytest.mark.parametrize(
    ("optimizer", "told"),
    [
        (broken_optimizer, "optimizer=broken_optimizer raised RuntimeError: no such group"),
        (no_optimizer, "optimizer=no_optimizer returned an object of type generator"),
        (lambda m: [], "returned an object of type list"),
        (
            torch.optim.SGD(nn.Linear(2, 2).parameters()),
            "takes a function, but got an object of type SGD",
        ),
        (
            lambda m: torch.optim.LBFGS([p for each in m for p in each.parameters()]),
            "LBFGS.step.. raised TypeError",
        ),
    ],
    ids=["raises", "returns_no_optimizer", "returns_nothing", "is_an_optimizer", "closure"],
)
def test_an_optimizer_that_does_not_fit_is_an_error(optimizer, told):
    with pytest.raises(ValueError, match=told):
        measure_gradient_coupling([mlp(), mlp()], batch_for(mlp), optimizer=optimizer)


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (lambda y: 1.0, "returned an object of type float"),
        (lambda y: y["0"], "returned a tensor of shape"),
        (lambda y: y["0"].sum() * math.inf, r"is -?inf for this model"),
        (lambda y: y["first"].sum(), "raised KeyError"),
        (lambda y: y["0"].sum().detach(), "no gradient in any member's output"),
    ],
    ids=["number", "no_scalar", "not_finite", "raises", "detached"],
)
def test_a_loss_that_does_not_fit_is_an_error(loss, told):
    with pytest.raises(ValueError, match=told):
        measure_gradient_coupling([mlp(), mlp()], batch_for(mlp), loss=loss)


def test_member_modules_that_do_not_fit_the_outputs_are_an_error():
    model = Together([mlp(), mlp()])
    with pytest.raises(ValueError, match=r"finds 1 module \(0\), and the model yields 2 outputs"):
        measure_gradient_coupling(model, batch_for(mlp), members=lambda m: [m.members[0]])


# --- as a fixture and a claim -------------------------------------------------------------------


def test_the_fixture_asserts_each_claim(gradient_coupling):
    x, one = batch_for(mlp), mlp()
    gradient_coupling.assert_independent([mlp(), mlp()], x, loss=summed)
    gradient_coupling.assert_tied([one, one], x)
    gradient_coupling.assert_tied_to({"parent": one, "child": Rows(one, slice(4))}, x, "parent")
    with pytest.raises(AssertionError, match="the loss trains each by what others predict"):
        gradient_coupling.assert_independent([mlp(), mlp()], x, loss=of_mean_prediction)


@pytest.mark.parametrize(
    ("claim", "status"),
    [
        ("independent", "broken"),
        ("tied", "held"),
        ({"parent": "0"}, "held"),
        ({"parent": "9"}, "error"),
    ],
    ids=str,
)
def test_claims_are_checked(claim, status):
    one = mlp()
    subject = Subject(
        make=lambda: [one, one], batch=lambda: batch_for(mlp), claims={"coupling": claim}
    )
    (result,) = (r for r in check_ensemble(subject) if r.check == "coupling")
    assert result.status == status


@pytest.mark.parametrize("claim", ["loose", ["tied"], {"parent": 9}, {"subnet": "0"}, {}], ids=str)
def test_a_claim_that_means_nothing_is_an_error(claim):
    told = (
        "coupling cannot be claimed to be .* It can be: independent, tied or {.parent.: its name}"
    )
    with pytest.raises(ClaimError, match=told):
        parse(claim)


# --- findings -----------------------------------------------------------------------------------


def test_findings_are_data_and_every_kind_is_told():
    """Two of three members are one network, a third shares a layer, and the loss is of the mean."""
    members = [mlp() for _ in range(3)]
    members[1] = members[0]
    members[2][3] = members[0][3]
    coupling = measure_gradient_coupling(members, batch_for(mlp), loss=of_mean_prediction)
    with pytest.raises(AssertionError) as broken:
        assert_members_uncoupled(coupling)
    findings = broken.value.findings
    assert findings == judge(coupling, parse("independent"))
    assert findings.kinds == ("one network", "shared weight", "common loss")
    assert [len(findings.of_kind(kind)) for kind in findings.kinds] == [2, 4, 6]
    assert (findings[0].place, findings[0].members) == ("step on 0", ("0", "1"))
    assert findings[0].amount == max(moved.by for moved in coupling.places("0", "1")[:-1])
    assert str(findings.affected[0]) == "6 of 6 ordered pairs"
    told = " ".join(str(broken.value).split())
    assert "but a training step on one moves another" in told
    assert "One network: Members 0, 1 are one network" in told
    assert "Shared weight: A training step of one member moves the others." in told
    assert "Common loss: Each member is trained according to what the others predict" in told


def test_how_many_draws_were_looked_at_is_told():
    model = Together([mlp(), mlp()])
    coupling = measure_gradient_coupling(model, batch_for(mlp))
    assert "(output compared in 9 random draws)" in str(coupling)
    (looked_at,) = judge(coupling, parse("independent")).looked_at
    assert str(looked_at) == "9 random draws of a training call"
    assert not judge(
        measure_gradient_coupling(Packed(), torch.randn(PACKED_BATCH)), parse("tied")
    ).looked_at


def test_a_case_is_looked_at_whole_and_is_as_before():
    case = Case.of(
        lambda: Together([conv(), conv()]),
        lambda: batch_for(conv),
        members=members_of,
        optimizer=lambda model: torch.optim.AdamW(model.parameters()),
        loss=lambda outputs: sum(y.square().sum() for y in outputs.values()),
    )
    _ = case.batch
    before = case.digest()
    coupling = measure_gradient_coupling(case)
    assert coupling.compared == ("output", "parameter", "buffer", "loss")
    assert case.digest() == before


# --- what only training shows, and what only a decision couples ----------------------------------


class TwoInOne(nn.Module):
    """Two members in one weight, and what happens between their layers."""

    def __init__(self, between):
        super().__init__()
        self.first = nn.Parameter(torch.randn(2, 6, 4))
        self.second = nn.Parameter(torch.randn(2, 4, 3))
        self.between = between

    def forward(self, x):
        h = self.between(self, torch.einsum("bi,mio->mbo", x, self.first).relu())
        return list(torch.einsum("mbi,mio->mbo", h, self.second))


def test_a_mean_over_members_in_train_mode_only_is_broken():
    model = TwoInOne(lambda net, h: h - h.mean(0).detach() if net.training else h)
    with pytest.raises(AssertionError, match="a training step on one moves another"):
        assert_members_uncoupled(measure_gradient_coupling(model, torch.randn(5, 6)))


def test_statistics_that_members_of_one_module_share_are_broken():
    norm = nn.BatchNorm1d(4, affine=False)
    model = TwoInOne(lambda net, h: torch.stack([norm(one) for one in h]))
    model.norm = norm
    with pytest.raises(AssertionError, match="a training step on one moves another"):
        assert_members_uncoupled(measure_gradient_coupling(model, torch.randn(5, 6)))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD])
def test_a_fused_optimizer_gets_gradients_as_it_expects_them(make, fused):
    def build(net):
        return make(net.parameters(), lr=0.1, fused=fused)

    model = TwoInOne(lambda net, h: h)
    measured = measure_gradient_coupling(model, torch.randn(5, 6), optimizer=build)
    assert_members_uncoupled(measured)


def winner(outputs):
    losses = torch.stack([cross_entropy(y, LABELS, reduction="none") for y in outputs.values()])
    return losses.min(0).values.sum()


def pseudo_labels(outputs):
    best = torch.stack([y.softmax(-1) for y in outputs.values()]).mean(0).argmax(-1)
    return sum(cross_entropy(y, best) for y in outputs.values())


LABELS = torch.tensor([0, 1, 2, 0, 1])


@pytest.mark.parametrize("loss", [winner, pseudo_labels])
def test_a_loss_that_couples_by_a_decision_is_broken(loss):
    model = TwoInOne(lambda net, h: h)
    measured = measure_gradient_coupling(model, torch.randn(5, 6), loss=loss)
    with pytest.raises(AssertionError, match="the loss trains each by what others predict"):
        assert_members_uncoupled(measured)


def test_members_that_forward_freezes_after_use_cannot_be_looked_at(freezing_heads):
    batch = torch.randn(5, 6)
    with pytest.raises(ValueError, match="there is no training step on member 0: its output has"):
        measure_gradient_coupling(freezing_heads(6, put_back=False), batch)
    assert_members_uncoupled(measure_gradient_coupling(freezing_heads(6, put_back=True), batch))
