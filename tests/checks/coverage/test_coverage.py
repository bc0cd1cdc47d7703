import copy
import math
import warnings

import pytest
import torch
import torch.nn.utils.prune
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from ensembles.case import Case
from ensembles.checks.coverage.claim import CoverageClaim, parse
from ensembles.checks.coverage.judgement import _KINDS, assert_optimizer_complete, judge
from ensembles.checks.coverage.measurement import KINDS, measure, measure_optimizer_coverage
from ensembles.claims import ClaimError
from ensembles.findings import Count
from ensembles.gate.conformance import check_ensemble
from ensembles.message import Broken
from ensembles.subject import Subject, whole


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
    )


def attention() -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.ReLU(), nn.Linear(8, 3))


SHAPES = {mlp: (5, 6), conv: (4, 2, 5, 5), attention: (4, 3, 8)}
architectures = pytest.mark.parametrize("make", SHAPES, ids=lambda make: make.__name__)


def batch_for(make) -> torch.Tensor:
    return torch.randn(SHAPES[make])


def sgd(*models, **options) -> torch.optim.Optimizer:
    parameters = {id(p): p for model in models for p in model.parameters()}
    return torch.optim.SGD(list(parameters.values()), lr=0.1, **options)


def message_of(*args, **kwargs) -> str:
    with pytest.raises(AssertionError) as broken:
        assert_optimizer_complete(measure_optimizer_coverage(*args, **kwargs))
    return str(broken.value)


class Net(nn.Module):
    """A trunk and a head, whose forward is given."""

    def __init__(self, forward, **parts) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        for name, part in parts.items():
            setattr(self, name, part)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def plain(net, x):
    return net.head(net.trunk(x).relu())


# --- everything is trained ----------------------------------------------------------------------


@architectures
def test_an_optimizer_of_all_parameters_holds(make):
    model = make()
    coverage = measure_optimizer_coverage(model, batch_for(make), optimizer=sgd(model))
    assert coverage.findings == ()
    assert len(coverage.trainable) == len(list(model.parameters()))
    assert_optimizer_complete(coverage)


@architectures
def test_one_optimizer_for_each_member_holds(make):
    members = [make() for _ in range(3)]
    optimizers = [sgd(member) for member in members]
    assert_optimizer_complete(
        measure_optimizer_coverage(members, batch_for(make), optimizer=optimizers)
    )
    assert_optimizer_complete(measure_optimizer_coverage(members, optimizer=sgd(*members)))


def test_a_tied_weight_listed_once_holds():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    model[1].weight = model[0].weight
    coverage = measure_optimizer_coverage(model, torch.tensor([[0, 3]]), optimizer=sgd(model))
    assert (coverage.findings, coverage.trainable) == ((), ("model.0.weight",))


def test_without_an_optimizer_only_registration_and_gradients_are_looked_at():
    coverage = measure_optimizer_coverage(mlp(), batch=batch_for(mlp))
    assert (coverage.findings, coverage.optimizers) == ((), 0)
    assert str(coverage) == "4 trainable parameters, 0 findings (gradients looked at)"


def test_frozen_parameters_may_be_in_a_group_or_not():
    model = mlp()
    optimizer = sgd(model)
    model[0].requires_grad_(False)
    assert_optimizer_complete(
        measure_optimizer_coverage(model, batch_for(mlp), optimizer=optimizer)
    )
    assert_optimizer_complete(
        measure_optimizer_coverage(model, batch_for(mlp), optimizer=sgd(model[2]))
    )


# --- groups -------------------------------------------------------------------------------------


@architectures
def test_a_member_missing_from_the_optimizer_is_broken(make):
    members = [make() for _ in range(3)]
    coverage = measure_optimizer_coverage(members, batch_for(make), optimizer=sgd(*members[:2]))
    assert coverage.places("missing") == tuple(f"2.{n}" for n, _ in members[2].named_parameters())
    assert len(coverage.findings) == len(coverage.places("missing"))


def test_the_message_of_a_missing_member(golden):
    members = [mlp() for _ in range(3)]
    golden(
        message_of(members, batch_for(mlp), optimizer=sgd(*members[:2])),
        "messages/coverage_missing.txt",
    )


def test_an_optimizer_older_than_a_layer_is_broken(golden):
    model = conv()
    optimizer = sgd(model)
    model[4] = nn.Linear(36, 5)
    golden(message_of(model, batch_for(conv), optimizer=optimizer), "messages/coverage_stale.txt")


def test_a_layer_that_the_function_of_the_optimizer_replaces_is_broken():
    """A training set-up in one function: the optimizer first, and then another head."""
    model = conv()
    head = model[4]

    def set_up(found):
        optimizer = sgd(found)
        found[4] = nn.Linear(36, 5)
        return optimizer

    coverage = measure_optimizer_coverage(model, batch_for(conv), optimizer=set_up)
    assert coverage.places("missing") == ("model.4.weight", "model.4.bias")
    assert len(coverage.places("stale")) == len(coverage.findings) - 2 == 2
    assert model[4] is head


def test_an_optimizer_that_the_model_keeps_is_no_home_of_what_it_lists():
    """A layer that was replaced after it is stale, and no container would mend that."""

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = conv()
            self.optimizer = sgd(self.net)
            self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
            self.net[4] = nn.Linear(36, 5)

        def forward(self, x):
            return self.net(x)

    message = message_of(Keeps(), batch_for(conv), optimizer=lambda model: model.optimizer)
    assert "optimizer 0, group 0, position 4   stale:" in message
    assert "layers that were replaced, or members that were added" in " ".join(message.split())
    assert "nn.ModuleList" not in message


@architectures
def test_an_optimizer_of_a_copy_is_stale(make):
    model = make()
    coverage = measure_optimizer_coverage(model, optimizer=sgd(copy.deepcopy(model)))
    number = len(list(model.parameters()))
    assert len(coverage.places("missing")) == len(coverage.places("stale")) == number


def test_a_parameter_listed_twice_is_broken(golden):
    model = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = torch.optim.SGD([*model.parameters(), model[0].weight], lr=0.1)
    second = torch.optim.Adam(model[2].parameters())
    golden(
        message_of(model, batch_for(mlp), optimizer=[optimizer, second]),
        "messages/coverage_repeated.txt",
    )


@architectures
def test_one_module_with_several_optimizers_is_repeated(make):
    one = make()
    coverage = measure_optimizer_coverage(
        [one] * 2, batch_for(make), optimizer=[sgd(one), sgd(one)]
    )
    assert coverage.places("repeated") == coverage.trainable


def all_of(members) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for member in members for p in member.parameters()], lr=0.1)


def test_members_that_are_one_network_are_told_as_that(golden):
    golden(
        message_of([mlp()] * 3, batch_for(mlp), optimizer=all_of),
        "messages/coverage_one_network.txt",
    )


def test_a_layer_of_several_members_is_told_as_that():
    members = [mlp(), mlp()]
    members[1][0] = members[0][0]
    told = " ".join(message_of(members, batch_for(mlp), optimizer=all_of).split())
    assert "0.0.weight listed 2 times: optimizer 0, group 0, positions 0, 4" in told
    assert "a layer that was made once and passed to several members" in told
    assert "Make it in each member, or list it once." in told
    assert "one network" not in told
    assert "assigning the Parameter" not in told


def test_duplicates_from_a_function_are_reported_and_not_warned_of():
    def twice(model):
        return torch.optim.SGD([*model.parameters(), *model.parameters()], lr=0.1)

    assert len(measure_optimizer_coverage(mlp(), optimizer=twice).places("repeated")) == 4


def test_two_parameters_over_one_memory_are_broken(golden):
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.detach())
    golden(
        message_of(model, torch.tensor([[0, 3]]), optimizer=sgd(model)),
        "messages/coverage_two_leaves.txt",
    )
    model[1].weight.requires_grad_(False)
    assert measure_optimizer_coverage(model, optimizer=sgd(model)).findings == ()


@settings(max_examples=25, deadline=None)
@given(uses=st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_exactly_the_parameters_with_other_than_one_use_are_found(uses):
    model = conv()
    named = list(zip(model.named_parameters(), uses, strict=True))
    groups = [p for (_, p), times in named for _ in range(times)]
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in groups] or [sgd(nn.Linear(1, 1))]
    coverage = measure_optimizer_coverage(model, optimizer=optimizers)
    expected = {n: [] for n in (0, 1, 2)}
    for (name, _), times in named:
        expected[times].append(f"model.{name}")
    assert coverage.places("missing") == tuple(expected[0])
    assert sorted(coverage.places("repeated")) == sorted(expected[2])


# --- registration -------------------------------------------------------------------------------


def test_members_in_a_python_list_are_broken(golden):
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.members = nn.Linear(6, 6), [mlp() for _ in range(2)]

        def forward(self, x):
            return [member(self.trunk(x)) for member in self.members]

    model = Listed()
    golden(
        message_of(model, batch_for(mlp), optimizer=sgd(model)),
        "messages/coverage_list_members.txt",
    )


def test_a_list_of_members_alone_is_broken_too():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.members = {"a": conv(), "b": conv()}

        def forward(self, x):
            return {name: member(x) for name, member in self.members.items()}

    model = Listed()
    before = copy.deepcopy(model.members)
    coverage = measure_optimizer_coverage(model, batch_for(conv))
    assert len(coverage.places("unregistered")) == 12
    assert "model.members['b'].0.weight" in coverage.places("unregistered")
    for name, member in model.members.items():
        for key, tensor in member.state_dict().items():
            assert torch.equal(tensor, before[name].state_dict()[key])


def scaled(net, x):
    return plain(net, x) * net.scale


def test_a_parameter_that_was_converted_is_broken(golden):
    # As .to(device) does, a conversion returns a tensor that is no Parameter.
    model = Net(scaled, scale=nn.Parameter(torch.ones(3)).to(torch.float64))
    golden(
        message_of(model, batch_for(mlp), optimizer=sgd(model)), "messages/coverage_converted.txt"
    )
    assert (
        len(measure_optimizer_coverage(model, batch_for(mlp), optimizer=sgd(model)).findings) == 1
    )


GLOBAL_SCALE = torch.ones(3, requires_grad=True)


def hidden_in_attribute():
    return Net(scaled, scale=torch.ones(3, requires_grad=True))


def hidden_in_tuple():
    return Net(lambda net, x: plain(net, x) * net.both[1], both=(1, nn.Parameter(torch.ones(3))))


def hidden_in_closure():
    scale = nn.Parameter(torch.ones(3))
    return Net(lambda net, x: plain(net, x) * scale)


def hidden_in_global():
    return Net(lambda net, x: plain(net, x) * GLOBAL_SCALE)


def hidden_in_object():
    class Options:
        def __init__(self):
            self.scale = torch.ones(3, requires_grad=True)

    return Net(lambda net, x: plain(net, x) * net.options.scale, options=Options())


@pytest.mark.parametrize(
    ("make", "place", "found"),
    [
        (hidden_in_attribute, "model.scale", "tensor of shape (3,), kept as a plain attribute"),
        (hidden_in_tuple, "model.both[1]", "Parameter of shape (3,), kept in a Python tuple"),
        (
            hidden_in_closure,
            "scale of model._forward",
            "Parameter of shape (3,), kept in a closure",
        ),
        (
            hidden_in_global,
            "GLOBAL_SCALE of model._forward",
            "tensor of shape (3,), kept as a global variable",
        ),
        (
            hidden_in_object,
            "model.options.scale",
            "tensor of shape (3,), kept in an object of type Options",
        ),
    ],
)
def test_unregistered_tensors_are_named_by_where_they_are(make, place, found):
    (one,) = measure_optimizer_coverage(make(), batch_for(mlp)).findings
    assert (one.kind, one.place, one.found, one.amount) == ("unregistered", place, found, 3)


def test_a_leaf_that_lives_nowhere_is_told_by_its_shape():
    model = Net(lambda net, x: plain(net, x) * torch.ones(3, requires_grad=True))
    (one,) = measure_optimizer_coverage(model, batch_for(mlp)).findings
    assert (one.kind, one.place) == ("unregistered", "a leaf of shape (3,)")
    assert one.found == "tensor of shape (3,), kept in a place that was not found"


def test_unregistered_members_in_the_optimizer_are_not_stale():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.members = [mlp(), mlp()]

        def forward(self, x):
            return [member(x) for member in self.members]

    model = Listed()
    called = measure_optimizer_coverage(model, batch_for(mlp), optimizer=sgd(*model.members))
    model.extra = nn.Parameter(torch.ones(1))  # without a call, something must be registered
    at_rest = measure_optimizer_coverage(
        model, optimizer=sgd(*model.members, nn.ParameterList([model.extra]))
    )
    for coverage in (called, at_rest):
        assert len(coverage.places("unregistered")) == 8
        assert len(coverage.findings) == 8
        assert all("though the optimizer has it" in found.found for found in coverage.findings)


def test_an_input_that_requires_gradients_is_no_finding():
    model, x = mlp(), batch_for(mlp).requires_grad_()
    assert measure_optimizer_coverage(model, x).findings == ()
    assert x.grad is None


def test_weights_of_the_loss_are_not_stale():
    model, weights = mlp(), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([*model.parameters(), weights], lr=0.1)
    coverage = measure_optimizer_coverage(
        model,
        batch_for(mlp),
        optimizer=optimizer,
        loss=lambda y: (y["model"] * weights).square().sum(),
    )
    assert coverage.findings == ()


# --- gradients ----------------------------------------------------------------------------------


def under_no_grad(net, x):
    with torch.no_grad():
        hidden = net.trunk(x).relu()
    return net.head(hidden)


def from_data(net, x):
    return net.head(nn.functional.linear(x, net.trunk.weight.data, net.trunk.bias.data))


def from_checkpoint(net, x):
    return net.head(checkpoint(net.trunk, x, use_reentrant=True))


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.head(net.trunk(x).detach()),
        under_no_grad,
        from_data,
        from_checkpoint,
        lambda net, x: net.head(torch.nn.functional.pad(x, (0, 2))),
    ],
    ids=["detach", "no_grad", "data", "reentrant_checkpoint", "unused"],
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_branch_that_is_cut_is_broken(forward):
    model = Net(forward)
    coverage = measure_optimizer_coverage(model, batch_for(mlp), optimizer=sgd(model))
    assert coverage.places("without gradient") == ("model.trunk.weight", "model.trunk.bias")
    assert len(coverage.findings) == 2


@architectures
def test_a_cut_member_is_broken(make):
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.members = nn.ModuleList([make(), make()])

        def forward(self, x):
            return [self.members[0](x), self.members[1](x).detach()]

    coverage = measure_optimizer_coverage(Cut(), batch_for(make))
    cut = tuple(f"model.members.1.{name}" for name, _ in make().named_parameters())
    assert coverage.places("without gradient") == cut


def test_the_message_of_a_cut_branch(golden):
    model = Net(under_no_grad)
    golden(
        message_of(model, batch_for(mlp), optimizer=sgd(model)), "messages/coverage_cut_branch.txt"
    )


def test_a_model_that_runs_without_gradients_is_broken():
    model = torch.no_grad()(lambda net, x: plain(net, x))
    coverage = measure_optimizer_coverage(Net(model), batch_for(mlp))
    assert len(coverage.places("without gradient")) == 4


def empty_group(net, x):
    """The head reads channels that are always zero."""
    hidden = net.trunk(x).relu()
    return net.head(torch.cat([hidden * 0, hidden], -1)[..., :8]) + hidden[..., :3]


def test_a_layer_that_reads_an_empty_group_is_broken(golden):
    model = Net(empty_group)
    golden(
        message_of(model, batch_for(mlp), optimizer=sgd(model)), "messages/coverage_empty_group.txt"
    )


def test_a_frozen_mask_hides_no_cut_branch():
    model = Net(lambda net, x: net.head(net.trunk(x) * net.mask) + x[..., :3])
    model.mask = nn.Parameter(torch.zeros(8), requires_grad=False)
    assert measure_optimizer_coverage(model, batch_for(mlp), optimizer=sgd(model)).places(
        "zero gradient"
    ) == ("model.trunk.weight", "model.trunk.bias", "model.head.weight")


def test_a_loss_that_leaves_a_member_out_is_broken(golden):
    members = [mlp() for _ in range(2)]
    target = torch.tensor([0, 1, 2, 0, 1])
    golden(
        message_of(
            members,
            batch_for(mlp),
            optimizer=sgd(*members),
            loss=lambda y: cross_entropy(y["0"], target),
        ),
        "messages/coverage_loss_of_one.txt",
    )


def test_a_loss_of_a_random_member_is_complete():
    members = [mlp() for _ in range(3)]
    target = torch.tensor([0, 1, 2, 0, 1])

    def loss(outputs):
        return cross_entropy(outputs[str(int(torch.randint(3, ())))], target)

    assert not measure_optimizer_coverage(members, batch_for(mlp), loss=loss).findings


# --- freezes ------------------------------------------------------------------------------------


@architectures
def test_a_freeze_that_froze_nothing_is_broken(make):
    model = make()
    model[0].requires_grad = False
    coverage = measure_optimizer_coverage(model, batch_for(make), optimizer=sgd(model))
    assert coverage.places("false freeze") == ("model.0.requires_grad = False",)
    model[0].requires_grad_(False)
    assert measure_optimizer_coverage(model, batch_for(make), optimizer=sgd(model)).findings == ()


def test_the_message_of_a_false_freeze(golden):
    model = conv()
    model[0].requires_grad = False
    model[1].requires_grad_ = False
    model[4].weight.requires_grad_ = False
    golden(
        message_of(model, batch_for(conv), optimizer=sgd(model)),
        "messages/coverage_false_freeze.txt",
    )


# --- healthy networks ---------------------------------------------------------------------------


class LowRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(6, 6).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.zeros(6, 2))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


class ReZero(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch, self.alpha = nn.Linear(6, 6), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x + self.alpha * self.branch(x).relu()


class SingleHead(nn.Module):
    """Attention with a key bias, which the softmax cancels."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        return torch.softmax(q @ k.T, -1) @ v


class Auxiliary(nn.Module):
    """A head that is used in one of the modes only."""

    def __init__(self, training):
        super().__init__()
        self.trunk, self.main, self.aux = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 3)
        self.used = training

    def forward(self, x):
        x = self.trunk(x)
        return self.main(x) + self.aux(x) if self.training == self.used else self.main(x)


class DropsAll(nn.Module):
    """A residual block that stochastic depth leaves out, half of the time."""

    def __init__(self):
        super().__init__()
        self.block = nn.Linear(6, 6)

    def forward(self, x):
        return x if self.training and torch.rand(()) < 0.5 else x + self.block(x)


class Experts(nn.Module):
    """Hard routing: every row goes to one expert of four."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 4), nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        weights, chosen = self.gate(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = chosen == number
            if rows.any():
                out[rows] = expert(x[rows]) * weights[rows, None]
        return out


def dead_relus():
    model = mlp()
    nn.init.constant_(model[0].bias, -100.0)
    return model


def zero_head():
    model = mlp()
    nn.init.zeros_(model[2].weight)
    return model


def dropped():
    return nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.999), nn.Linear(6, 3))


def weight_normed():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 3))


def pruned():
    model = mlp()
    nn.utils.prune.l1_unstructured(model[0], "weight", amount=0.5)
    return model


def with_a_teacher():
    def forward(net, x):
        with torch.no_grad():
            soft = net.teacher[0](x)
        return plain(net, x) + soft

    return Net(forward, teacher=[mlp()])


@pytest.mark.parametrize(
    "make",
    [
        LowRank,
        ReZero,
        SingleHead,
        lambda: Auxiliary(True),
        DropsAll,
        Experts,
        dead_relus,
        zero_head,
        dropped,
        weight_normed,
        pruned,
        with_a_teacher,
    ],
    ids=[
        "low_rank", "re_zero", "key_bias", "auxiliary_in_training", "stochastic_depth",
        "experts", "dead_relus", "zero_head", "dropout", "weight_norm",
        "pruned", "teacher",
    ],
)  # fmt: skip
def test_healthy_networks_are_complete(make):
    model = make()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert measure_optimizer_coverage(model, batch_for(mlp), optimizer=optimizer).findings == ()


def test_a_reentrant_checkpoint_in_the_middle_is_healthy():
    model = Net(lambda net, x: checkpoint(net.head, net.trunk(x), use_reentrant=True))
    assert measure_optimizer_coverage(model, batch_for(mlp), optimizer=sgd(model)).findings == ()
    assert [p.grad for p in model.parameters()] == [None] * 4


def test_sparse_embeddings_are_complete():
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 2))
    assert not measure_optimizer_coverage(
        model, torch.tensor([[1, 2]]), optimizer=sgd(model)
    ).findings


def resnet18(models):
    return models.resnet18(num_classes=3, zero_init_residual=True)


def googlenet(models):
    return models.googlenet(num_classes=3, init_weights=False, aux_logits=True)


def vision_transformer(models):
    return models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16
    )


def convnext(models):
    from torchvision.models.convnext import CNBlockConfig

    return models.ConvNeXt(
        [CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 2)], stochastic_depth_prob=0.9
    )


def efficientnet_b0(models):
    return models.efficientnet_b0(num_classes=3, stochastic_depth_prob=0.9)


@pytest.mark.parametrize(
    ("make", "side"),
    [
        (resnet18, 32),
        (googlenet, 32),
        (vision_transformer, 32),
        (convnext, 32),
        (efficientnet_b0, 32),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_published_networks_are_complete(make, side):
    models = pytest.importorskip("torchvision.models")
    model = make(models)
    x = torch.randn(2, 3, side, side)
    coverage = measure_optimizer_coverage(model, x, optimizer=sgd(model), outputs=whole)
    assert coverage.findings == ()
    assert len(coverage.trainable) == len(list(model.parameters()))


# --- how it is shown ----------------------------------------------------------------------------


def test_the_measurement_is_readable():
    model = mlp()
    optimizer = sgd(model[0])
    model[0].requires_grad = False
    assert str(
        measure_optimizer_coverage(model, batch_for(mlp), optimizer=optimizer)
    ).splitlines() == [
        "4 trainable parameters, 3 findings (1 optimizer and gradients looked at)",
        "  model.2.weight                  missing        in no group",
        "  model.2.bias                    missing        in no group",
        "  model.0.requires_grad = False   false freeze   "
        "2 parameters below it still require gradients",
    ]


def test_several_kinds_of_findings_are_one_message(golden):
    def forward(net, x):
        return net.head(net.trunk(x).detach()) + net.extra[0](x)

    model = Net(forward, extra=[nn.Linear(6, 3)])
    optimizer = sgd(model.trunk, nn.Linear(2, 2))
    golden(message_of(model, batch_for(mlp), optimizer=optimizer), "messages/coverage_several.txt")


def test_findings_are_data():
    members = [mlp(), mlp()]
    members[1][0] = members[0][0]
    coverage = measure_optimizer_coverage(members, optimizer=all_of)
    with pytest.raises(Broken) as broken:
        assert_optimizer_complete(coverage)
    findings = broken.value.findings
    assert findings.kinds == ("repeated",)
    assert [(one.place, one.members, one.amount) for one in findings] == [
        ("0.0.weight", ("0", "1"), 2),
        ("0.0.bias", ("0", "1"), 2),
    ]
    assert findings[0].cause.startswith("a layer that was made once")
    assert findings.affected == (Count(2, "trainable parameter", of=6),)


def test_gradients_that_were_not_looked_at_are_told():
    model = mlp()
    at_rest = judge(measure_optimizer_coverage(model, optimizer=sgd), CoverageClaim())
    assert at_rest.held
    assert at_rest.looked_at == (Count(0, "gradient", of=4),)
    text = message_of(model, optimizer=sgd(model[0]))
    assert "(2 of 4 trainable parameters)\n  looked at 0 of 4 gradients" in text
    called = judge(measure_optimizer_coverage(model, batch_for(mlp)), CoverageClaim())
    assert called.looked_at == ()


def test_every_kind_of_finding_is_explained():
    assert tuple(_KINDS) == KINDS


def test_an_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match="'lost' is no kind of finding"):
        measure_optimizer_coverage(mlp(), batch=batch_for(mlp)).places("lost")


# --- nothing is changed -------------------------------------------------------------------------


def test_looking_changes_nothing():
    model = conv().eval()
    optimizer = torch.optim.Adam(model.parameters())
    model(batch_for(conv)).sum().backward()
    optimizer.step()
    nn.init.zeros_(model[4].weight)  # so that influence is looked at
    x = batch_for(conv)
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    grads = [p.grad.clone() for p in model.parameters()]
    state, kept = torch.get_rng_state(), x.clone()
    measure_optimizer_coverage(
        model, x, optimizer=optimizer, loss=lambda y: y["model"].square().mean()
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, kept)
    assert not any(module.training for module in model.modules())
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert torch.equal(parameter.grad, grad)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[0][name])
    for key, entry in optimizer.state_dict()["state"].items():
        for name, value in entry.items():
            assert torch.equal(value, before[1]["state"][key][name])


def test_a_graph_that_the_user_holds_stays_usable():
    weight = nn.Parameter(torch.ones(3))
    model = Net(scaled, scale=weight.exp())
    measure_optimizer_coverage(model, batch_for(mlp))
    model.scale.sum().backward()
    assert torch.allclose(weight.grad, torch.full((3,), math.e))


# --- wrong use ----------------------------------------------------------------------------------


def test_nothing_to_look_at_is_an_error():
    with pytest.raises(ValueError, match="neither an optimizer nor a batch"):
        measure_optimizer_coverage(mlp())


@pytest.mark.parametrize("batch", [None, torch.ones(2, 6)], ids=["no_batch", "batch"])
def test_a_model_without_trainable_parameters_is_an_error(batch):
    model = mlp().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        measure_optimizer_coverage(model, batch, optimizer=sgd(model))


def test_numbers_are_needed():
    for model, told in [
        (nn.Linear(6, 2, device="meta"), "is on the meta device"),
        (nn.Linear(6, 2, dtype=torch.complex64), "has dtype torch.complex64"),
        (nn.LazyLinear(2), "is lazy"),
    ]:
        with pytest.raises(ValueError, match=told):
            measure_optimizer_coverage(model, batch_for(mlp))


def test_outputs_that_are_not_finite_are_an_error():
    model = Net(lambda net, x: plain(net, x) / 0)
    with pytest.raises(ValueError, match="output of member model holds NaN or infinity"):
        measure_optimizer_coverage(model, batch_for(mlp))


def test_a_model_that_changes_its_parameters_is_an_error():
    def forward(net, x):
        with torch.no_grad():
            net.trunk.weight.div_(2)
        return plain(net, x)

    with pytest.raises(ValueError, match=r"changes its own parameter model\.trunk\.weight"):
        measure_optimizer_coverage(Net(forward), batch_for(mlp))


def broken_optimizer(model):
    raise RuntimeError("no such group")


def no_optimizer(model):
    return model.parameters()


@pytest.mark.parametrize(
    ("optimizer", "told"),
    [
        (broken_optimizer, "optimizer=broken_optimizer raised RuntimeError: no such group"),
        (no_optimizer, "optimizer=no_optimizer returned an object of type generator"),
        ([], "a list with something else than optimizers .it is empty."),
        ([1], "a list with something else than optimizers .int."),
        ("adam", "an object of type str"),
    ],
    ids=["raises", "returns_no_optimizer", "empty", "list_of_numbers", "string"],
)
def test_an_optimizer_that_does_not_fit_is_an_error(optimizer, told):
    with pytest.raises(ValueError, match=told):
        measure_optimizer_coverage(mlp(), batch_for(mlp), optimizer=optimizer)


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (lambda y: 1.0, "returned an object of type float"),
        (lambda y: y["model"], "returned a tensor of shape"),
        (lambda y: y["model"].square().sum() / 0, "is inf for this model"),
        (lambda y: y["0"].sum(), "raised KeyError"),
        (lambda y: y["model"].sum().detach(), "no gradient in any member's output"),
    ],
    ids=["number", "no_scalar", "not_finite", "raises", "detached"],
)
def test_a_loss_that_does_not_fit_is_an_error(loss, told):
    with pytest.raises(ValueError, match=told):
        measure_optimizer_coverage(mlp(), batch_for(mlp), loss=loss)


# --- as a fixture and a claim -------------------------------------------------------------------


def test_the_fixture_asserts_completeness(optimizer_coverage):
    model = mlp()
    optimizer_coverage.assert_complete(model, batch_for(mlp), optimizer=sgd(model))
    optimizer_coverage.assert_complete(model, batch_for(mlp), optimizer=sgd)
    with pytest.raises(AssertionError, match="in no group"):
        optimizer_coverage.assert_complete(model, batch_for(mlp), optimizer=sgd(model[0]))


@pytest.mark.parametrize(
    ("claim", "optimizer", "status"),
    [
        ("complete", sgd, "held"),
        ("complete", None, "held"),
        ("complete", lambda model: sgd(model[0]), "broken"),
        ("complete", broken_optimizer, "error"),
    ],
    ids=["held", "no_optimizer", "broken", "raises"],
)
def test_claims_are_checked(claim, optimizer, status):
    subject = Subject(
        make=mlp, batch=lambda: batch_for(mlp), optimizer=optimizer, claims={"coverage": claim}
    )
    assert check_ensemble(subject)["coverage"].status == status


def test_a_claim_without_a_batch_cannot_be_checked():
    with pytest.raises(ValueError, match="has no batch"):
        measure(Case.of(mlp(), optimizer=sgd), CoverageClaim())


def test_a_claim_that_is_not_known_is_refused():
    with pytest.raises(ClaimError, match=r"'partial'\. It can be: complete"):
        parse("partial")


# --- what trains is what the loss uses, in train mode -------------------------------------------


def found_in(model, **options):
    found = measure_optimizer_coverage(model, batch_for(mlp), optimizer=sgd, **options).findings
    return [(finding.kind, finding.place) for finding in found]


def cut_in_training(net, x):
    with torch.set_grad_enabled(not net.training):
        hidden = net.trunk(x).relu()
    return net.head(hidden)


def other_head_in_training(net, x):
    head = net.head if net.training else net.spare
    return head(net.trunk(x))


def test_a_trunk_that_is_cut_in_train_mode_only_is_broken():
    assert found_in(Net(cut_in_training)) == [
        ("without gradient", "model.trunk.weight"),
        ("without gradient", "model.trunk.bias"),
    ]


def test_a_head_that_predicts_and_is_never_trained_is_broken():
    assert found_in(Net(other_head_in_training, spare=nn.Linear(6, 3))) == [
        ("without gradient", "model.spare.weight"),
        ("without gradient", "model.spare.bias"),
    ]
    assert {kind for kind, _ in found_in(Auxiliary(False))} == {"without gradient"}


def test_dropout_of_everything_is_broken():
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(1.0), nn.Linear(6, 3))
    assert ("zero gradient", "model.0.weight") in found_in(model)


def test_a_member_with_weight_zero_in_the_loss_is_broken():
    def loss(outputs):
        return sum(w * y.square().mean() for w, y in zip((1.0, 0.0), outputs.values(), strict=True))

    found = measure_optimizer_coverage(
        [mlp(), mlp()], batch_for(mlp), optimizer=lambda two: [sgd(one) for one in two], loss=loss
    )
    assert found.places("unused output") == ("output of member 1",)


def test_an_output_that_the_loss_leaves_out_is_broken():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.head, self.extra = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.trunk(x)), self.extra(self.trunk(x))

    options = {"outputs": lambda out: {"model": out}}
    assert found_in(TwoHeads(), loss=lambda ys: ys["model"][0].square().mean(), **options) == [
        ("without gradient", "model.extra.weight"),
        ("without gradient", "model.extra.bias"),
    ]
    both = lambda ys: sum(y.square().mean() for y in ys["model"])  # noqa: E731
    assert found_in(TwoHeads(), loss=both, **options) == []


def test_a_loss_that_is_flat_at_the_present_predictions_is_no_finding():
    hinge = lambda ys: (ys["model"].abs() - 5).clamp(min=0).mean()  # noqa: E731
    assert found_in(mlp(), loss=hinge) == []


def test_what_the_optimizers_function_freezes_is_frozen():
    def of_head(net):
        net.trunk.requires_grad_(False)
        return torch.optim.SGD(net.head.parameters(), lr=0.1)

    model = Net(lambda net, x: net.head(net.trunk(x)))
    assert measure_optimizer_coverage(model, batch_for(mlp), optimizer=of_head).findings == ()
    assert all(p.requires_grad for p in model.parameters())


# --- what stays as it is ------------------------------------------------------------------------


class Factors(nn.Module):
    """A layer and a low-rank correction, whose factors are drawn or zero."""

    def __init__(self, *zeros, gate=None) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.a, self.b = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
        self.gate = None if gate is None else nn.Parameter(torch.full((1,), gate))
        for name in zeros:
            nn.init.zeros_(getattr(self, name).weight)

    def forward(self, x):
        correction = self.b(self.a(x))
        return self.layer(x) + (correction if self.gate is None else self.gate * correction)


def test_two_factors_that_are_both_zero_are_broken(golden):
    golden(message_of(Factors("a", "b"), batch=batch_for(mlp)), "messages/coverage_stuck.txt")


@pytest.mark.parametrize(
    ("model", "stuck"),
    [
        (lambda: Factors("a"), ()),
        (lambda: Factors("b"), ()),
        (lambda: Factors(gate=0.0), ()),
        (lambda: Factors("b", gate=0.0), ("model.gate", "model.b.weight")),
        (lambda: Factors("a", gate=0.0), ("model.gate", "model.a.weight")),
        (lambda: Factors("a", "b", gate=1.0), ("model.a.weight", "model.b.weight")),
        # The gate has a gradient only where both factors are not zero.
        (lambda: [Factors("b"), Factors("a", "b")], ("1.a.weight", "1.b.weight")),
    ],
)
def test_exactly_the_factors_without_a_way_out_are_stuck(model, stuck):
    coverage = measure_optimizer_coverage(model(), batch=batch_for(mlp))
    assert set(coverage.places("stuck at zero")) == set(stuck)
    assert len(coverage.findings) == len(stuck)


def test_a_network_of_zeros_is_stuck_but_for_its_last_bias():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    found = measure_optimizer_coverage(net, batch=batch_for(mlp)).places("stuck at zero")
    assert set(found) == {"model.0.weight", "model.0.bias", "model.2.weight"}
    net[1] = nn.Sigmoid()  # one half at zero, so that the second layer gets a gradient
    assert measure_optimizer_coverage(net, batch=batch_for(mlp)).findings == ()


def test_query_and_key_of_zeros_are_stuck():
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8, bias=False) for _ in range(3))

        def forward(self, x):
            return torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), -1) @ self.v(x)

    net = Attends()
    nn.init.zeros_(net.q.weight)
    assert measure_optimizer_coverage(net, batch=torch.randn(2, 3, 8)).findings == ()
    nn.init.zeros_(net.k.weight)
    found = measure_optimizer_coverage(net, batch=torch.randn(2, 3, 8)).places("stuck at zero")
    assert found == ("model.q.weight", "model.k.weight")


def test_an_expert_that_starts_at_zero_and_gets_no_row_is_healthy():
    class Routed(nn.Module):
        """Low-rank experts behind hard routing; the batch sends all its rows to one of them."""

        def __init__(self) -> None:
            super().__init__()
            self.route = nn.Linear(6, 2)
            self.a = nn.ModuleList(nn.Linear(6, 2, bias=False) for _ in range(2))
            self.b = nn.ModuleList(nn.Linear(2, 3, bias=False) for _ in range(2))
            for layer in self.b:
                nn.init.zeros_(layer.weight)

        def forward(self, x):
            scores = self.route(x).softmax(1)
            best = scores.argmax(1)
            out = x.new_zeros(len(x), 3)
            for i, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
                rows = (best == i).nonzero()[:, 0]
                out = out.index_add(0, rows, (b(a(x[rows])) + 1) * scores[rows, i : i + 1])
            return out

    net = Routed()
    nn.init.constant_(net.route.bias, 0.0)
    with torch.no_grad():
        net.route.bias[0] = 2.0
    assert measure_optimizer_coverage(net, batch=batch_for(mlp)).findings == ()


def test_a_group_with_rate_zero_is_broken(golden):
    model = mlp()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    text = message_of(model, batch_for(mlp), optimizer=torch.optim.SGD(groups, lr=0.1))
    golden(text, "messages/coverage_rate_zero.txt")


def test_a_warm_up_from_zero_and_a_frozen_group_with_rate_zero_are_complete():
    model = mlp()
    optimizer = sgd(model)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    assert optimizer.param_groups[0]["lr"] == 0.0
    assert_optimizer_complete(measure_optimizer_coverage(model, optimizer=optimizer))
    model[0].requires_grad_(False)
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    assert_optimizer_complete(
        measure_optimizer_coverage(model, optimizer=torch.optim.SGD(groups, lr=0.1))
    )


@pytest.mark.parametrize("where", ["train", "forward"])
def test_a_freeze_that_is_undone_is_broken(where):
    class Thaws(nn.Sequential):
        def train(self, mode=True):
            if where == "train":
                self.requires_grad_(mode)
            return super().train(mode)

        def forward(self, x):
            if where == "forward":
                self.requires_grad_(True)
            return super().forward(x)

    model = Thaws(*mlp())
    model[0].requires_grad_(False)
    text = message_of(model, batch=batch_for(mlp))
    assert "model.0.weight   train() or forward() makes it trainable" in text
    assert not model[0].weight.requires_grad


def test_what_forward_freezes_after_use_is_broken(golden, freezing_heads):
    model = freezing_heads(6, put_back=False)
    text = message_of(model, torch.randn(5, 6), optimizer=sgd)
    golden(text, "messages/coverage_frozen_in_forward.txt")
    assert all(p.requires_grad for p in model.parameters())
    assert_optimizer_complete(
        measure_optimizer_coverage(
            freezing_heads(6, put_back=True), torch.randn(5, 6), optimizer=sgd
        )
    )


def test_what_forward_thaws_and_freezes_again_is_counted_as_frozen(freezing_heads):
    text = message_of(freezing_heads(6, put_back=False, trained=1), torch.randn(5, 6))
    assert "model.heads.1.weight   frozen in forward:   forward() uses it, and then fr" in text
    assert "(2 of 2 trainable parameters, 2 undone freezes, 2 frozen parameters)" in text


def test_what_forward_freezes_before_use_is_cut():
    def forward(net, x):
        net.trunk.requires_grad_(False)
        return net.head(net.trunk(x))

    text = message_of(Net(forward), batch=torch.randn(5, 6))
    assert "model.trunk.weight   cut from every output, or unused" in text
    assert "frozen in forward" not in text


def test_a_model_that_freezes_itself_in_eval_mode_is_complete():
    class Sleeps(nn.Sequential):
        def train(self, mode=True):
            self.requires_grad_(mode)
            return super().train(mode)

    # It was handed over as a file was loaded: in eval mode, and with everything frozen but a head.
    model = Sleeps(*mlp()).eval()
    model[2].requires_grad_(True)
    assert_optimizer_complete(measure_optimizer_coverage(model, batch=batch_for(mlp)))
