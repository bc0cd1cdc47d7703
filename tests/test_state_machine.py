"""Whatever is done to our models, in whatever order: their claims still hold afterwards."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn
from torch.testing import assert_close

from ensembles.checks.coverage.judgement import assert_optimizer_complete
from ensembles.checks.coverage.measurement import measure_optimizer_coverage
from ensembles.checks.ownership.judgement import assert_ownership
from ensembles.checks.ownership.measurement import measure_ownership_map
from ensembles.checks.sharing.judgement import assert_members_share, assert_parameters_distinct
from ensembles.checks.sharing.measurement import measure_parameter_sharing
from ensembles.models.example import SHARED, wide_resnet18_with_subnets
from ensembles.models.members import Ensemble, NStreams
from ensembles.models.subnets import SubnetResNet, subnet_resnet18

# The model and its replay do the same float32 arithmetic: what a rule must not change, it does not
# change by a bit. The slack is for kernels that sum by the alignment of memory.
TOLERANCE = 1e-5

SETTINGS = settings(
    stateful_step_count=5,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


class Claims(NamedTuple):
    """A model of ours: how it is made, its members, and the names that they claim to share."""

    make: Callable[[], nn.Module]
    members: Callable[[Any], dict[str, nn.Module]]
    shared: tuple[str, ...]
    ownership: Any = None
    compiled: bool = True
    programs: int = 8


def small_net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def subnets(construction):
    return subnet_resnet18(
        width=2, base_channels=2, num_classes=3, stem="cifar_maxpool", construction=construction
    )


def parent_and_subnets(model):
    return {"parent": model.parent, **model.subnets}


def members_of_ensemble(model):
    return {f"member {place}": member for place, member in enumerate(model.members)}


def streams(model):
    return {f"stream {place}": model.network for place in range(model.streams)}


PARTITION = wide_resnet18_with_subnets(base_channels=2).claims["ownership"]

MODELS = {
    # Five members of twenty convs each: tracing takes seconds, and programs are few.
    "zero_padded": Claims(
        lambda: subnets("zero_padded"), parent_and_subnets, SHARED, PARTITION, False, 3
    ),
    "sum_of_subnets": Claims(
        lambda: subnets("sum_of_subnets"), parent_and_subnets, SHARED, PARTITION, False, 3
    ),
    "ensemble": Claims(lambda: Ensemble.of(small_net, 3), members_of_ensemble, (), "independent"),
    "streams": Claims(lambda: NStreams(small_net(), 3), streams, ("*",), "tied"),
}


def made(claims, *, seed=0):
    """A new model; the same seed gives the same one. Its BatchNorms do not magnify roundings."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = claims.make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.1
    return model


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def images():
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def listed(outputs):
    return list(outputs.values()) if isinstance(outputs, dict) else list(outputs)


def step(model, optimizer):
    optimizer.zero_grad()
    labels = torch.arange(4) % 3
    sum(
        nn.functional.cross_entropy(logits, labels) for logits in listed(model(images()))
    ).backward()
    optimizer.step()


def evaluated(model, x=None):
    """The outputs in eval mode; the modes are set module by module, and so is their return."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        with torch.no_grad():
            return listed(model(images() if x is None else x))
    finally:
        for module, mode in modes.items():
            module.training = mode


class Life(RuleBasedStateMachine):
    """A model in use, and its replay: the same model, on which only what changes it is done."""

    def __init__(self, claims, programs):
        super().__init__()
        self.claims = claims
        self.model, self.replay = made(claims), made(claims)
        self.optimizer, self.replay_optimizer = sgd(self.model), sgd(self.replay)
        self.expected = evaluated(self.replay)
        self.compiled, self.saved = False, None
        self.program = []
        programs.append(self.program)

    # --- what changes the function, done to the replay too -------------------------------------

    @rule()
    def train(self):
        self.program.append("train")
        self.model.train()
        self.replay.train()

    @rule()
    def eval(self):
        self.program.append("eval")
        self.model.eval()
        self.replay.eval()

    @rule()
    def step(self):
        self.program.append("step")
        step(self.model, self.optimizer)
        step(self.replay, self.replay_optimizer)
        self.expected = evaluated(self.replay)
        assert all(parameter.grad is not None for parameter in self.model.parameters())

    # --- what must change nothing -----------------------------------------------------------------

    @rule()
    def zero_grad(self):
        self.program.append("zero_grad")
        self.optimizer.zero_grad()
        self.replay_optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in self.model.parameters())

    @rule()
    def save(self):
        self.program.append("save")
        file = io.BytesIO()
        torch.save([self.model.state_dict(), self.optimizer.state_dict()], file)
        self.saved = file.getvalue(), copy.deepcopy((self.replay, self.replay_optimizer))

    @precondition(lambda self: self.saved)
    @rule()
    def load(self):
        """Into a model that was drawn anew: whatever was done since is undone."""
        self.program.append("load")
        file, replay = self.saved
        state, optimizer_state = torch.load(io.BytesIO(file), weights_only=True)
        loaded = made(self.claims, seed=1).train(self.model.training)
        loaded.load_state_dict(state)
        self.model, self.optimizer = loaded, sgd(loaded)
        self.optimizer.load_state_dict(optimizer_state)
        self.replay, self.replay_optimizer = copy.deepcopy(replay)
        self.replay.train(self.model.training)
        self.replay_optimizer.zero_grad()  # no file holds gradients
        self.expected = evaluated(self.replay)

    @rule()
    def copy(self):
        self.program.append("copy")
        self.model, self.optimizer = copy.deepcopy((self.model, self.optimizer))
        self.replay_optimizer.zero_grad()  # PyTorch copies parameters without their gradients

    @rule()
    def pickle(self):
        self.program.append("pickle")
        self.model, self.optimizer = pickle.loads(pickle.dumps((self.model, self.optimizer)))
        self.replay_optimizer.zero_grad()  # nor does a pickle hold them

    @rule()
    def move(self):
        """To another precision and back: every tensor is replaced, as by a move to a device."""
        self.program.append("move")
        self.model.double()
        assert {parameter.dtype for parameter in self.model.parameters()} == {torch.float64}
        outputs = [output.float() for output in evaluated(self.model, images().double())]
        assert_close(outputs, self.expected, rtol=1e-3, atol=1e-3)
        self.assert_claims(sgd(self.model))
        self.model.float()
        # A conversion is no moment to keep an optimizer: both begin anew.
        self.optimizer, self.replay_optimizer = sgd(self.model), sgd(self.replay)
        self.optimizer.zero_grad()
        self.replay_optimizer.zero_grad()

    @precondition(lambda self: self.claims.compiled and not self.compiled)
    @rule()
    def compile(self):
        self.program.append("compile")
        self.compiled = True
        torch.compiler.reset()
        mine = listed(torch.compile(self.model, backend="eager")(images()))
        # In train mode BatchNorms move: the replay is called as often.
        assert_close(mine, listed(self.replay(images())), rtol=TOLERANCE, atol=TOLERANCE)
        self.expected = evaluated(self.replay)

    # --- what holds after every rule --------------------------------------------------------------

    def assert_claims(self, optimizer):
        sharing = measure_parameter_sharing(self.model, members=self.claims.members)
        assert_members_share(sharing, self.claims.shared)
        assert_parameters_distinct(sharing)
        assert_optimizer_complete(measure_optimizer_coverage(self.model, optimizer=optimizer))

    @invariant()
    def claims_hold(self):
        self.assert_claims(self.optimizer)

    @invariant()
    def outputs_and_state_are_those_of_the_replay(self):
        outputs = evaluated(self.model)
        assert all(output.isfinite().all() for output in outputs)
        assert_close(outputs, self.expected, rtol=TOLERANCE, atol=TOLERANCE)
        state, expected = self.model.state_dict(), self.replay.state_dict()
        assert list(state) == list(expected)
        close = {"rtol": TOLERANCE, "atol": TOLERANCE}
        assert not [name for name in state if not state[name].allclose(expected[name], **close)]
        modes = {name: module.training for name, module in self.model.named_modules()}
        assert modes == {name: module.training for name, module in self.replay.named_modules()}

    @invariant()
    def gradients_are_those_of_the_replay(self):
        mine, expected = (
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            for model in (self.model, self.replay)
        )
        assert_close(mine, expected, rtol=TOLERANCE, atol=TOLERANCE)

    def teardown(self):
        """At the end, what takes a backward pass for each member: who owns what."""
        if self.claims.ownership:
            owned = measure_ownership_map(self.model, images())
            assert_ownership(owned, self.claims.ownership)


@pytest.mark.parametrize("name", MODELS)
def test_claims_hold_whatever_is_done_to_a_model(name):
    claims, programs = MODELS[name], []
    run_state_machine_as_test(
        lambda: Life(claims, programs), settings=settings(SETTINGS, max_examples=claims.programs)
    )
    assert len(programs) >= claims.programs
    assert any(programs)


# --- the machine can fail, and says by which few steps -----------------------------------------


class StemComesApart(SubnetResNet):
    """One subnet's copy has a stem of its own: equal in value, and no longer the parent's."""

    def __deepcopy__(self, memo):
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        subnet = copied.subnets["subnet_0_0"]
        subnet.conv1 = copy.deepcopy(subnet.conv1)
        return copied


class ForgottenScale(Ensemble):
    """A part of the function that the state dict does not have, drawn at the start."""

    def __init__(self, members):
        super().__init__(members)
        self.register_buffer("scale", torch.rand(()), persistent=False)

    def forward(self, *inputs):
        return [self.scale * output for output in super().forward(*inputs)]


class GradientOfTheCopied(Ensemble):
    """A hook that a copy loses: the function is the same, and what it learns is not."""

    def __init__(self, members):
        super().__init__(members)
        self.members[0][-1].weight.register_hook(lambda gradient: gradient / 2)


class MaskThatMoves(Ensemble):
    """A plain tensor, left behind by a move: what it hides is seen, and the members couple."""

    def __init__(self, members):
        super().__init__(members)
        self.others = torch.zeros(1)

    def _apply(self, fn, recurse=True):
        self.others = self.others + 1
        return super()._apply(fn, recurse)

    def forward(self, *inputs):
        first, second = super().forward(*inputs)
        return [first + self.others * (second - second.detach()), second]


class NewWeightInEval(Ensemble):
    """As a layer that is fused for eval: a parameter of equal value, which no optimizer knows."""

    def train(self, mode=True):
        if self.training and not mode:
            head = self.members[0][-1]
            head.weight = nn.Parameter(head.weight.detach().clone())
        return super().train(mode)


def stem_comes_apart():
    return StemComesApart(18, width=1, base_channels=2, num_classes=3, stem="cifar")


PLANTED = {
    "copy": (
        Claims(stem_comes_apart, parent_and_subnets, SHARED, compiled=False),
        r"claimed to (be shared|share)[\s\S]*conv1\.weight",
    ),
    "load": (
        Claims(lambda: ForgottenScale.of(small_net, 2), members_of_ensemble, (), compiled=False),
        r"not close",
    ),
    "eval": (
        Claims(lambda: NewWeightInEval.of(small_net, 2), members_of_ensemble, (), compiled=False),
        r"members\.0\.5\.weight +missing:[\s\S]*stale:",
    ),
    "step": (
        Claims(
            lambda: GradientOfTheCopied.of(small_net, 2), members_of_ensemble, (), compiled=False
        ),
        r"not close[\s\S]*members\.0\.5\.weight",
    ),
    "move": (
        Claims(
            lambda: MaskThatMoves.of(small_net, 2), members_of_ensemble, (), "independent", False
        ),
        r"claimed[\s\S]*members\.1\.5\.weight",
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_is_found_and_shrunk_to_its_step(fault):
    claims, message = PLANTED[fault]
    programs = []
    planted = settings(SETTINGS, max_examples=50, derandomize=True, report_multiple_bugs=False)
    with pytest.raises(AssertionError, match=message):
        run_state_machine_as_test(lambda: Life(claims, programs), settings=planted)
    # The last program that hypothesis runs is the one that it reports.
    assert programs[-1][-1] == fault
    assert len(programs[-1]) <= 2
    assert max(map(len, programs)) <= SETTINGS.stateful_step_count
