import copy
import os
import random
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from ensembles.checks.determinism.judgement import assert_deterministic
from ensembles.checks.determinism.measurement import measure_determinism
from ensembles.checks.determinism.seeding import CUBLAS, later, seeded
from ensembles.claims import ClaimError
from ensembles.gate.conformance import check_ensemble
from ensembles.subject import Subject

BATCH = torch.linspace(-1, 1, 6 * 3 * 16).sin().view(6, 3, 4, 4)
WEIGHTS = nn.Linear(48, 3).state_dict()


def classifier(bias: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=bias),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def with_layer(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), layer, nn.Flatten())


def assert_bitwise(make, batch=BATCH, **more) -> None:
    assert_deterministic(measure_determinism(make, batch, **more))


# --- it holds -------------------------------------------------------------------------------------


def test_a_network_with_batchnorm_and_dropout_repeats():
    measured = measure_determinism(classifier, BATCH, steps=3)
    assert_deterministic(measured)
    assert not measured.diverged
    assert measured.compared > 80


def test_members_repeat():
    assert_bitwise(lambda: {"a": classifier(), "b": classifier()})


def test_a_batch_that_is_drawn_from_the_seed_repeats():
    assert_bitwise(classifier, lambda: torch.randn(6, 3, 4, 4))


def test_construction_alone_can_be_looked_at():
    measured = measure_determinism(classifier)
    assert_deterministic(measured)
    assert "construction only" in str(measured)


def test_zeros_and_ones_by_design_need_not_depend_on_the_seed():
    assert_bitwise(lambda: nn.BatchNorm2d(3))


def test_an_identity_by_design_need_not_depend_on_the_seed():
    def identity() -> nn.Module:
        layer = nn.Linear(48, 48, bias=False)
        nn.init.eye_(layer.weight)
        return nn.Sequential(nn.Flatten(), layer)

    assert_bitwise(identity)


def test_what_is_compiled_is_looked_at_as_one_operation():
    def compiled() -> nn.Module:
        inner = nn.Sequential(nn.Linear(48, 3), nn.Dropout())
        return nn.Sequential(nn.Flatten(), torch.compile(inner, backend="eager"))

    assert_bitwise(compiled)


def test_a_frozen_backbone_with_a_new_head_need_not_depend_on_the_seed_as_a_whole():
    def pretrained() -> nn.Module:
        backbone = nn.Linear(48, 3)
        backbone.load_state_dict(WEIGHTS)
        return nn.Sequential(nn.Flatten(), backbone.requires_grad_(False), nn.Linear(3, 2))

    assert_bitwise(pretrained)


# --- it breaks ------------------------------------------------------------------------------------


class Noise(nn.Module):
    """Draws from a generator that no seed reaches."""

    generator = torch.Generator()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(x.shape, generator=self.generator)


def test_a_layer_with_a_generator_of_its_own_is_named(golden):
    # No bias before a norm: its gradient is a rounding, and whether it moves is up to the CPU.
    with pytest.raises(AssertionError) as broken:
        assert_bitwise(
            lambda: nn.Sequential(classifier(bias=False), nn.Sequential(nn.Linear(3, 3), Noise()))
        )
    golden(str(broken.value), "messages/determinism_noise.txt")


class FromTheThirdCall(Noise):
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x) if self.calls > 2 else x


class NoisyGradient(torch.autograd.Function):
    generator = torch.Generator()

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g + torch.rand(g.shape, generator=NoisyGradient.generator)


class Backward(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return NoisyGradient.apply(x)


def test_a_backward_pass_that_does_not_repeat_is_named():
    # The gradient that arrives behind the function is the same; that before it is the first
    # that differs.
    with pytest.raises(AssertionError) as broken:
        assert_bitwise(lambda: with_layer(Backward()))
    rows = [" ".join(line.split()) for line in str(broken.value).splitlines()[2:4]]
    assert rows == [
        "step 1, operation aten::rand in NoisyGradient.backward the first that differs",
        "step 1, operation gradient in the output of model.1 (BatchNorm2d) 12 differ",
    ]


class Functional(nn.Module):
    """Everything in one forward: no module inside it can be named."""

    generator = torch.Generator()

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(48, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.flatten(1).relu() @ self.weight
        return self.shaken(y).softmax(1)

    def shaken(self, y: torch.Tensor) -> torch.Tensor:
        return y * torch.empty_like(y).bernoulli_(generator=self.generator)


def test_the_first_operation_inside_one_forward_is_named():
    found = measure_determinism(Functional, BATCH)
    assert found.operation == "aten::bernoulli_ in Functional.shaken"
    assert measure_determinism(Functional, BATCH, algorithms=False).operation == found.operation
    assert measure_determinism(classifier, BATCH).operation == ""


def test_a_seed_from_the_clock_is_broken(golden):
    def from_clock() -> nn.Module:
        torch.manual_seed(int(time.time()))
        return classifier()

    with pytest.raises(AssertionError) as broken:
        assert_bitwise(from_clock)
    golden(str(broken.value), "messages/determinism_clock.txt")


CLOCKS = {
    "strftime": lambda: int(time.strftime("%d%H")),
    "localtime": lambda: time.localtime().tm_mday,
    "gmtime": lambda: time.gmtime().tm_mday,
    "ctime": lambda: sum(time.ctime().encode()),
    "asctime": lambda: sum(time.asctime().encode()),
    "perf_counter": lambda: int(time.perf_counter()) // 1000,
    "monotonic": lambda: time.monotonic_ns() // 10**12,
}


@pytest.mark.parametrize("clock", CLOCKS)
def test_one_layer_that_is_drawn_by_any_clock_is_broken(clock):
    def make() -> nn.Module:
        model = classifier()
        generator = torch.Generator().manual_seed(CLOCKS[clock]())
        nn.init.normal_(model[0].weight, generator=generator)
        return model

    with pytest.raises(AssertionError, match=r"parameter model\.0\.weight +\d+ differ"):
        assert_bitwise(make)


def test_times_that_are_given_stay_as_they_are():
    with later():
        assert time.gmtime(0).tm_year == 1970
        assert time.strftime("%Y", time.gmtime(0)) == "1970"
        assert time.asctime(time.gmtime(0)) == "Thu Jan  1 00:00:00 1970"


def test_a_factory_that_keeps_a_generator_between_calls_is_broken():
    generator = torch.Generator()

    def kept() -> nn.Module:
        layer = nn.Linear(3, 3)
        nn.init.normal_(layer.weight, generator=generator)
        return nn.Sequential(nn.Flatten(), nn.Linear(48, 3), layer)

    with pytest.raises(AssertionError, match=r"step 0, parameter model\.2\.weight +9 differ"):
        assert_bitwise(kept)


def test_one_bit_of_one_buffer_is_seen():
    calls = []

    def make() -> nn.Module:
        model = classifier()
        calls.append(model)
        if len(calls) == 2:
            mean = model[1].running_mean
            mean[1] = torch.nextafter(mean[1], torch.tensor(1.0))
        return model

    with pytest.raises(AssertionError, match=r"step 0, buffer model\.1\.running_mean"):
        assert_bitwise(make)


def test_construction_that_draws_a_varying_number_is_broken():
    calls = []

    def make() -> nn.Module:
        model = classifier()
        calls.append(torch.rand(len(calls) + 1))
        return model

    with pytest.raises(AssertionError, match="step 0, generator torch"):
        assert_bitwise(make)


def test_a_batch_that_differs_is_told():
    generator = torch.Generator()
    with pytest.raises(AssertionError, match="The batch itself differs"):
        assert_bitwise(classifier, lambda: torch.randn(6, 3, 4, 4, generator=generator))


def test_a_loss_that_draws_its_own_numbers_is_told():
    generator = torch.Generator()
    with pytest.raises(AssertionError, match="the loss draws random numbers of its own"):
        assert_bitwise(
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 3)),
            loss=lambda y: y["model"].square().mean() + torch.rand((), generator=generator),
        )


class NoisySGD(torch.optim.SGD):
    generator = torch.Generator()

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.data += torch.rand(p.shape, generator=self.generator)


def test_an_optimizer_that_draws_its_own_numbers_is_told():
    with pytest.raises(AssertionError, match="the optimizer draws random numbers"):
        assert_bitwise(
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 3)),
            optimizer=lambda model: NoisySGD(model.parameters(), lr=0.1),
            steps=1,
        )


class Put(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2)).sum()


@pytest.mark.parametrize("what", ["clip", "scheduler"])
def test_a_clip_or_a_schedule_that_draws_its_own_numbers_is_told(what):
    generator = torch.Generator()
    generator.seed()

    def clip(model):
        for parameter in model.parameters():
            parameter.grad.mul_(torch.rand((), generator=generator))

    def scheduler(optimizer):
        rate = float(torch.rand((), generator=generator))
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, rate)

    given = {what: {"clip": clip, "scheduler": scheduler}[what]}
    measured = measure_determinism(lambda: nn.Linear(4, 2), torch.ones(3, 4), **given)
    step = {"clip": 1, "scheduler": 2}[what]
    assert (measured.diverged[0].step, measured.diverged[0].kind) == (step, "parameter")


def test_an_operation_that_pytorch_refuses_is_named(golden):
    with pytest.raises(AssertionError) as broken:
        assert_bitwise(lambda: with_layer(Put()))
    golden(str(broken.value), "messages/determinism_refused.txt")
    assert_bitwise(lambda: with_layer(Put()), algorithms=False)


# --- the seed decides -----------------------------------------------------------------------------


def test_a_constructor_that_seeds_is_broken(golden):
    def seeds_itself() -> nn.Module:
        torch.manual_seed(0)
        return classifier()

    with pytest.raises(AssertionError) as broken:
        assert_bitwise(seeds_itself)
    golden(str(broken.value), "messages/determinism_constant_state.txt")


def test_a_constructor_that_seeds_afterwards_is_broken_too():
    def leaves_constant() -> nn.Module:
        model = classifier()
        random.seed(0)
        return model

    with pytest.raises(AssertionError, match="generator python   is in one state"):
        assert_bitwise(leaves_constant)


def test_weights_that_were_drawn_before_are_broken(golden):
    with pytest.raises(AssertionError) as broken:
        assert_bitwise(from_file)
    golden(str(broken.value), "messages/determinism_drawn_before.txt")


def from_file() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    model[1].load_state_dict(WEIGHTS)
    return model


def test_weights_that_are_claimed_loaded_hold():
    assert_deterministic(measure_determinism(from_file, BATCH), loaded=True)


def test_a_forked_generator_in_a_constructor_holds():
    def forked() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            code = torch.rand(48)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
        model.register_buffer("code", code)
        return model

    assert_bitwise(forked)


# --- two processes --------------------------------------------------------------------------------

MODULE = """
from collections import OrderedDict
import torch
from torch import nn
from ensembles import Subject

AT_IMPORT = torch.rand(4, 4)

def drawn_at_import():
    layer = nn.Linear(4, 4)
    layer.weight.data.copy_(AT_IMPORT)
    return layer

def in_the_order_of_a_set():
    names = {"a", "b", "c", "d", "e", "f"}
    return nn.Sequential(OrderedDict((name, nn.Linear(4, 4)) for name in names))

def members():
    return {
        "healthy": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)),
        "import": drawn_at_import(),
        "set": in_the_order_of_a_set(),
    }

def subject():
    return Subject(make=members)
"""


def test_two_processes_part_in_what_import_and_hashes_decide_and_in_nothing_else(
    tmp_path, monkeypatch, golden
):
    tmp_path.joinpath("factories_of_two_processes.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import factories_of_two_processes as found

    def measured(factory):  # construction only: an optimizer takes as long to import as torch
        return measure_determinism(found.members, factory=factory)

    assert_deterministic(measured(None))  # one process cannot tell
    between = measured("factories_of_two_processes:subject")
    assert between.processes == 2
    assert {p.place.partition(".")[0] for p in between.diverged} == {"import", "set"}
    assert {p.kind for p in between.diverged} == {"parameter"}
    at_import = tuple(p for p in between.diverged if p.place.startswith("import."))
    with pytest.raises(AssertionError) as broken:
        assert_deterministic(replace(between, diverged=at_import))
    golden(str(broken.value), "messages/determinism_at_import.txt")


def test_a_factory_that_fails_in_its_process_is_an_error(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"KeyError: 'no such layer'\" >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ValueError, match="failed in a process of its own: KeyError: 'no such"):
        assert_bitwise(classifier, factory="mypackage:build")


def test_a_factory_that_exits_in_its_process_is_an_error(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ValueError, match="of its own: exit status 0, and no answer"):
        assert_bitwise(classifier, factory="mypackage:build")


def test_a_factory_without_a_colon_is_an_error():
    with pytest.raises(ValueError, match="names no factory"):
        assert_bitwise(classifier, factory="mypackage.build")


# --- wrong use ------------------------------------------------------------------------------------


def test_a_model_in_place_of_a_function_is_an_error():
    with pytest.raises(ValueError, match="give a function that builds it"):
        assert_bitwise(classifier())


def test_one_object_at_both_calls_is_an_error():
    model = classifier()
    with pytest.raises(ValueError, match="make\\(\\) returned the same module"):
        assert_bitwise(lambda: model)


def test_one_layer_at_both_calls_is_an_error():
    layer = nn.Linear(48, 3)
    with pytest.raises(ValueError, match="or the same parameters, at both calls"):
        assert_bitwise(lambda: nn.Sequential(nn.Flatten(), layer))


def test_nothing_to_compare_is_an_error():
    with pytest.raises(ValueError, match="there is nothing to compare"):
        assert_bitwise(nn.ReLU, None)


def test_a_loss_that_is_not_finite_is_an_error():
    with pytest.raises(ValueError, match="is nan for this model"):
        assert_bitwise(classifier, loss=lambda y: y["model"].sum() * torch.nan)


class Loud(nn.Module):
    """Its outputs are large, and gradients are larger still: 1e24 times its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1e12 * self.layer(x.flatten(1))


def sgd(lr: float):
    return lambda model: torch.optim.SGD(model.parameters(), lr=lr)


def mean_square(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return outputs["model"].square().mean()


@pytest.mark.parametrize(
    "given",
    [{}, {"optimizer": sgd(1e-2)}, {"loss": mean_square}],
    ids=["nothing", "optimizer", "loss"],
)
def test_steps_of_the_check_itself_do_not_run_away(given):
    assert_bitwise(Loud, steps=4, **given)
    with pytest.raises(AssertionError, match="two runs from seed 1729 differ from step 1 on"):
        assert_bitwise(lambda: nn.Sequential(Noise(), Loud()), steps=4, **given)


def test_training_that_runs_away_says_so_and_what_to_do():
    given = {"loss": mean_square, "steps": 3}
    # Below the threshold: the same loss at a rate that its gradients allow.
    assert_bitwise(Loud, optimizer=sgd(1e-25), **given)
    with pytest.raises(ValueError) as raised:
        assert_bitwise(Loud, optimizer=sgd(1e-2), **given)
    assert str(raised.value) == (
        "the training loss became infinite in step 2: training runs away. Nothing can be concluded "
        "from it. Likely the learning rate is too large for this batch. Give a smaller one, or a "
        "batch of more rows."
    )


def test_weights_that_are_no_numbers_after_the_last_step_hold_nothing():
    # Bits of NaN are alike in two runs, whatever noise is in them.
    given = {"loss": lambda y: 1e30 * y["model"].sum(), "optimizer": sgd(1e30), "steps": 1}
    for make in (classifier, lambda: nn.Sequential(classifier(), Noise())):
        with pytest.raises(
            ValueError, match=r"^parameter model\..* became (NaN|infinite) in step 1:"
        ):
            assert_bitwise(make, **given)


def test_fewer_than_no_steps_are_an_error():
    with pytest.raises(ValueError, match="steps=-1"):
        assert_bitwise(classifier, steps=-1)


# --- looking, seeds and flags ---------------------------------------------------------------------


def switches() -> list[object]:
    return [
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        os.environ.get(CUBLAS),
    ]


def generators() -> list[object]:
    numpy = pytest.importorskip("numpy")
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        numpy.random.get_state()[1].tolist(),
        numpy.random.get_state()[2:],
    ]


def test_looking_changes_nothing():
    shared = classifier()
    state = copy.deepcopy(shared.state_dict())
    before = switches(), generators(), time.time
    assert_bitwise(lambda: copy.deepcopy(shared).apply(_reset))
    assert (switches(), generators(), time.time) == before
    assert all(torch.equal(state[name], tensor) for name, tensor in shared.state_dict().items())


def _reset(module: nn.Module) -> None:
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


@pytest.mark.parametrize("workspace", [None, ":16:8", ":0:0"])
def test_seeds_and_flags_are_set_and_restored(monkeypatch, workspace):
    monkeypatch.delenv(CUBLAS, raising=False)
    if workspace is not None:
        monkeypatch.setenv(CUBLAS, workspace)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        before = switches(), generators()
        with seeded(3):
            inside = generators()
            assert switches()[:4] == [True, False, True, False]
            assert os.environ[CUBLAS] == (":16:8" if workspace == ":16:8" else ":4096:8")
            torch.rand(3), random.random()
        assert (switches(), generators()) == before
        with seeded(3):
            assert generators() == inside
        with pytest.raises(KeyError), seeded(3):
            raise KeyError
        assert (switches(), generators()) == before
    finally:
        torch.use_deterministic_algorithms(False)


# --- fixture and gate -----------------------------------------------------------------------------


def test_the_fixture_seeds_the_test_and_checks(seeded_determinism):
    assert torch.are_deterministic_algorithms_enabled()
    with seeded(1729):
        drawn = torch.rand(3)
    assert torch.equal(torch.rand(3), drawn)
    seeded_determinism.assert_bitwise(classifier, BATCH)
    with pytest.raises(AssertionError, match=r"forward of model\.2 "):
        seeded_determinism.assert_bitwise(lambda: with_layer(Noise()), BATCH)


def test_the_fixture_restores_what_it_set(pytester):
    pytester.makepyfile("""
        import os, random, numpy, torch

        def state():
            cudnn = torch.backends.cudnn
            return (
                torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[2:],
                numpy.random.get_state()[1].tolist(), os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
                torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark,
            )

        before = []

        def test_before():
            before.append(state())

        def test_seeded(seeded_determinism):
            torch.rand(3), random.random(), numpy.random.rand(3)
            assert all(now != then for now, then in zip(state()[-4:-1], before[0][-4:-1]))

        def test_after():
            assert [state()] == before
    """)
    # The project's own seeding before each test would hide what a fixture leaves behind.
    pytester.runpytest_inprocess("-p", "no:randomly", "-p", "no:cacheprovider").assert_outcomes(
        passed=3
    )


@pytest.mark.parametrize(
    ("make", "claim", "status"),
    [
        (classifier, "bitwise", "held"),
        (from_file, {"weights": "loaded"}, "held"),
        (from_file, "bitwise", "broken"),
        (lambda: with_layer(Noise()), "bitwise", "broken"),
        (classifier, {"steps": 1}, "held"),
        (lambda: with_layer(FromTheThirdCall()), {"steps": 2}, "held"),
        (lambda: with_layer(FromTheThirdCall()), {"steps": 3}, "broken"),
    ],
)
def test_the_gate_tells_what_is_claimed(make, claim, status):
    results = check_ensemble(Subject(make=make, batch=lambda: BATCH, claims={"determinism": claim}))
    assert [result.status for result in results if result.check == "determinism"] == [status]


@pytest.mark.parametrize(
    "claim",
    [
        "roughly",
        {},
        {"weights": "new"},
        {"weights": "loaded", "speed": 3},
        {"steps": 0},
        {"loaders": "shuffled"},
    ],
)
def test_a_claim_that_cannot_be_read_is_refused(claim):
    subject = Subject(make=classifier, batch=lambda: BATCH, claims={"determinism": claim})
    with pytest.raises(ClaimError, match="determinism cannot be claimed to be"):
        check_ensemble(subject)


def shuffled_by(seed) -> list[torch.Tensor]:
    return list(torch.randperm(9, generator=torch.Generator().manual_seed(seed)).split(3))


@pytest.mark.parametrize(
    ("data", "claim", "status"),
    [
        (lambda member: torch.randperm(9).split(3), "plain", "held"),
        (lambda member: shuffled_by(int(member == "b") * torch.seed()), "plain", "broken"),
        (lambda member: torch.randperm(9).split(3), "augmented", "error"),
        (None, "plain", "error"),
    ],
)
def test_the_gate_reads_the_loaders_of_every_member(data, claim, status):
    subject = Subject(
        make=lambda: {"a": classifier(), "b": classifier()},
        batch=lambda: BATCH,
        data=data,
        claims={"determinism": {"loaders": claim}},
    )
    (result,) = (r for r in check_ensemble(subject) if r.check == "determinism")
    assert result.status == status, result.message
    if status == "broken":
        assert "batches are claimed to repeat" in result.message
