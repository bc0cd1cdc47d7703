"""The product: every fixture with its promise, an example, and the failure that it prints.

Each fixture is a small object with `measure` and with one `assert_...` for each claim. The
assertions take the model itself, and print a message that says where, how much, the likely
cause, and the command that replays it.

This file is loaded in every pytest run on the machine: it imports nothing but pytest until a
fixture is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from ensembles.checks.alone import MemberTrajectories
    from ensembles.checks.batch import BatchIndependence
    from ensembles.checks.cost import ComputeCost
    from ensembles.checks.coupling import GradientCoupling
    from ensembles.checks.coverage import OptimizerCoverage
    from ensembles.checks.data import MemberData
    from ensembles.checks.determinism import Determinism
    from ensembles.checks.diversity import MemberDiversity
    from ensembles.checks.effective_rates import Rates
    from ensembles.checks.graph import AutogradGraph
    from ensembles.checks.hygiene import StateHygiene
    from ensembles.checks.loss_scale import Claim, LossScale
    from ensembles.checks.ownership import OwnershipMap, Statement
    from ensembles.checks.prediction import PredictionReduction
    from ensembles.checks.round_trips import RoundTrips
    from ensembles.checks.sharing import ParameterSharing
    from ensembles.checks.trajectory import TrainingTrajectory
    from ensembles.subject import Members, Model, Outputs

__all__ = [
    "BatchFixture",
    "CostFixture",
    "CouplingFixture",
    "CoverageFixture",
    "DataFixture",
    "DeterminismFixture",
    "DiversityFixture",
    "GraphFixture",
    "HygieneFixture",
    "LossScaleFixture",
    "OwnershipFixture",
    "PredictionFixture",
    "RoundTripFixture",
    "SharingFixture",
    "TrajectoryFixture",
    "autograd_graph",
    "batch_independence",
    "compute_cost",
    "gradient_coupling",
    "loss_scale",
    "member_data",
    "member_diversity",
    "optimizer_coverage",
    "ownership_map",
    "parameter_sharing",
    "prediction_reduction",
    "round_trip",
    "seeded_determinism",
    "state_hygiene",
    "training_trajectory",
]


class SharingFixture:
    """What `parameter_sharing` gives to a test."""

    def measure(self, model: Model, *, members: Members | None = None) -> ParameterSharing:
        """Which parameters and buffers are the same memory: `measure_parameter_sharing`."""
        from ensembles.checks.sharing import measure_parameter_sharing

        return measure_parameter_sharing(model, members=members)

    def assert_independent(self, model: Model, *, members: Members | None = None) -> None:
        """Checks that no two members share a parameter or buffer, not even in part."""
        __tracebackhide__ = True
        self.assert_shared(model, (), members=members)

    def assert_tied(self, model: Model, *, members: Members | None = None) -> None:
        """Checks that the members are one network: every parameter and buffer is shared."""
        __tracebackhide__ = True
        self.assert_shared(model, ("*",), members=members)

    def assert_shared(
        self, model: Model, names: Sequence[str], *, members: Members | None = None
    ) -> None:
        """Checks that members share the parameters of these names (`fnmatch`), and no others."""
        __tracebackhide__ = True
        from ensembles.checks.sharing import assert_members_share, assert_parameters_distinct

        measured = self.measure(model, members=members)
        assert_parameters_distinct(measured)
        assert_members_share(measured, names)

    def assert_distinct(self, model: Model) -> None:
        """Checks that no memory belongs to two parameter objects: ties are one object."""
        __tracebackhide__ = True
        from ensembles.checks.sharing import assert_parameters_distinct

        assert_parameters_distinct(self.measure(model))


@pytest.fixture
def parameter_sharing() -> SharingFixture:
    """Promises that members share exactly the memory that they claim to share.

    Catches one module under several names, "tied" weights that are copies, a layer that came
    from a default argument or a registry. Needs no batch; exact for views; works on meta.

    Example::

        def test_members_share_nothing(parameter_sharing):
            parameter_sharing.assert_independent([resnet18() for _ in range(4)])

    Prints on failure::

        members 0, 1, 2, 3 are claimed independent, and share parameters

          conv1.weight   one tensor in members 0, 1, 2, 3
          ...
    """
    return SharingFixture()


class OwnershipFixture:
    """What `ownership_map` gives to a test."""

    def measure(self, model: Model, batch: Any, *, outputs: Outputs | None = None) -> OwnershipMap:
        """Which members every scalar weight reaches: `measure_ownership_map`."""
        from ensembles.checks.ownership import measure_ownership_map

        return measure_ownership_map(model, batch, outputs=outputs)

    def assert_independent(
        self, model: Model, batch: Any, *, outputs: Outputs | None = None
    ) -> None:
        """Checks that no weight moves more than one member."""
        __tracebackhide__ = True
        self.assert_owned(model, batch, "independent", outputs=outputs)

    def assert_tied(self, model: Model, batch: Any, *, outputs: Outputs | None = None) -> None:
        """Checks that every weight moves every member."""
        __tracebackhide__ = True
        self.assert_owned(model, batch, "tied", outputs=outputs)

    def assert_owned(
        self,
        model: Model,
        batch: Any,
        claim: Statement | Mapping[str, Statement],
        *,
        outputs: Outputs | None = None,
    ) -> None:
        """Checks a statement, or one for each pattern of names: `assert_ownership`."""
        __tracebackhide__ = True
        from ensembles.checks.ownership import assert_ownership

        assert_ownership(self.measure(model, batch, outputs=outputs), claim)


@pytest.fixture
def ownership_map() -> OwnershipFixture:
    """Promises that every scalar weight moves exactly the members that are claimed to own it.

    Catches members that mix inside packed and grouped layers, subnets that read another's block
    or an empty group, a stem that is not tied, weights that reach nobody. Right where storage is
    blind: masks, groups, low-rank factors; dead ReLUs and dropout hide nothing.

    Example::

        def test_subnets_partition_the_parent(ownership_map):
            ownership_map.assert_owned(subnet_resnet18(width=2), torch.randn(2, 3, 32, 32), {
                "parent.conv1.weight": Partition(times=2),
                "parent.layer*.conv?.weight": "partition",
                "parent.layer*.downsample.0.weight": "partition",
                "*": "independent",
            })

    Prints on failure::

        weights of members a, b are claimed independent, and leak into other members

          mix.weight   [:, 0:4]   expected one member   found members a, b
          ...
    """
    return OwnershipFixture()


class CouplingFixture:
    """What `gradient_coupling` gives to a test.

    Every method takes the same arguments: `outputs` and `members` find the members in one module,
    `optimizer` is a function of the model, `loss` one of the dict of member outputs.
    """

    def measure(
        self,
        model: Model,
        batch: Any,
        *,
        outputs: Outputs | None = None,
        members: Members | None = None,
        optimizer: Callable[[Any], Any] | None = None,
        loss: Callable[[dict[str, Any]], Tensor] | None = None,
    ) -> GradientCoupling:
        """What a step on each member moves of the others: `measure_gradient_coupling`."""
        from ensembles.checks.coupling import measure_gradient_coupling

        return measure_gradient_coupling(
            model, batch, outputs=outputs, members=members, optimizer=optimizer, loss=loss
        )

    def assert_independent(
        self,
        model: Model,
        batch: Any,
        *,
        outputs: Outputs | None = None,
        members: Members | None = None,
        optimizer: Callable[[Any], Any] | None = None,
        loss: Callable[[dict[str, Any]], Tensor] | None = None,
    ) -> None:
        """Checks that a step on one member moves nothing of another: outputs, weights, buffers."""
        __tracebackhide__ = True
        from ensembles.checks.coupling import assert_members_uncoupled

        assert_members_uncoupled(
            self.measure(
                model, batch, outputs=outputs, members=members, optimizer=optimizer, loss=loss
            )
        )

    def assert_tied(
        self,
        model: Model,
        batch: Any,
        *,
        outputs: Outputs | None = None,
        members: Members | None = None,
        optimizer: Callable[[Any], Any] | None = None,
    ) -> None:
        """Checks that a step on any member moves all others."""
        __tracebackhide__ = True
        from ensembles.checks.coupling import assert_members_coupled

        assert_members_coupled(
            self.measure(model, batch, outputs=outputs, members=members, optimizer=optimizer)
        )

    def assert_tied_to(
        self,
        model: Model,
        batch: Any,
        parent: str,
        *,
        outputs: Outputs | None = None,
        members: Members | None = None,
        optimizer: Callable[[Any], Any] | None = None,
    ) -> None:
        """Checks that a step on any subnet moves the parent, and a step on the parent all."""
        __tracebackhide__ = True
        from ensembles.checks.coupling import assert_members_coupled_to

        assert_members_coupled_to(
            self.measure(model, batch, outputs=outputs, members=members, optimizer=optimizer),
            parent,
        )


@pytest.fixture
def gradient_coupling() -> CouplingFixture:
    """Promises that a training step on one member moves that member only, or all that are tied.

    Catches members that are one network, packed members that mix (groups=1, a channel shuffle, a
    norm over all channels), features read from another member even where they are detached,
    BatchNorm statistics of two members, and a loss on the mean prediction.

    Example::

        def test_members_train_independently(gradient_coupling):
            gradient_coupling.assert_independent(
                [resnet18() for _ in range(4)], torch.randn(4, 3, 32, 32))

    Prints on failure::

        members 0, 1 are claimed to train independently, and a training step on one moves another

          step on 0   moves 1:   buffer 1.running_mean by 3e-02, buffer 1.running_var by 9e-02
          ...
    """
    return CouplingFixture()


class CoverageFixture:
    """What `optimizer_coverage` gives to a test."""

    def measure(
        self,
        model: Model,
        optimizer: Any = None,
        batch: Any = None,
        *,
        outputs: Outputs | None = None,
        loss: Callable[[dict[str, Any]], Tensor] | None = None,
    ) -> OptimizerCoverage:
        """What training reaches, and what it does not: `measure_optimizer_coverage`."""
        from ensembles.checks.coverage import measure_optimizer_coverage

        return measure_optimizer_coverage(model, optimizer, batch, outputs=outputs, loss=loss)

    def assert_complete(
        self,
        model: Model,
        optimizer: Any = None,
        batch: Any = None,
        *,
        outputs: Outputs | None = None,
        loss: Callable[[dict[str, Any]], Tensor] | None = None,
    ) -> None:
        """Checks that every trainable parameter is stepped exactly once and has a gradient.

        `optimizer` is an optimizer, a list of them, or a function of the model.
        """
        __tracebackhide__ = True
        from ensembles.checks.coverage import assert_optimizer_complete

        assert_optimizer_complete(self.measure(model, optimizer, batch, outputs=outputs, loss=loss))


@pytest.fixture
def optimizer_coverage() -> CoverageFixture:
    """Promises that training reaches every trainable parameter, and steps each exactly once.

    Catches parameters in no group or in two, an optimizer that is older than the model, members
    in a Python list, `nn.Parameter(...).to(device)`, branches cut by detach or no_grad, and
    `module.requires_grad = False`. Zero-initialised branches and dead ReLUs are no findings.

    Example::

        def test_everything_is_trained(optimizer_coverage):
            model = resnet18()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            optimizer_coverage.assert_complete(model, optimizer, torch.randn(4, 3, 32, 32))

    Prints on failure::

        training is claimed to reach every trainable parameter exactly once, and does not

          model.fc.weight                      missing:   in no group
          optimizer 0, group 0, position 60    stale:     shape (1000, 512), not in the model
          ...
    """
    return CoverageFixture()


class GraphFixture:
    """What `autograd_graph` gives to a test."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._request = request

    def measure(
        self, model: Model, batch: Any, *, outputs: Outputs | None = None, training: bool = False
    ) -> AutogradGraph:
        """The graph in canonical form, whose `str` is the text: `measure_autograd_graph`."""
        from ensembles.checks.graph import measure_autograd_graph

        return measure_autograd_graph(model, batch, outputs=outputs, training=training)

    def assert_equals(
        self,
        model: Model,
        batch: Any,
        golden: str | Path,
        *,
        outputs: Outputs | None = None,
        training: bool = False,
    ) -> None:
        """Checks that the graph is the golden: its text, or the path of a file that holds it."""
        __tracebackhide__ = True
        from ensembles.checks.graph import assert_graph_equal

        graph = self.measure(model, batch, outputs=outputs, training=training)
        assert_graph_equal(graph, golden)

    def assert_recorded(
        self,
        model: Model,
        batch: Any,
        path: str | Path | None = None,
        *,
        outputs: Outputs | None = None,
        training: bool = False,
    ) -> None:
        """Checks that the graph is the one in the test's golden file.

        The first run writes the file, and fails; `--force-regen` writes it anew. It lies where
        pytest-regressions puts it, <test file>/<test name>.txt, or at `path`.
        """
        __tracebackhide__ = True
        from ensembles.checks.graph import assert_graph_equal

        try:
            file_regression = self._request.getfixturevalue("file_regression")
        except pytest.FixtureLookupError as error:
            raise pytest.UsageError(
                "autograd_graph.assert_recorded keeps golden files with pytest-regressions, which "
                'is not installed: pip install "pytest-ensembles[goldens]". Or give the golden to '
                "autograd_graph.assert_equals."
            ) from error
        graph = self.measure(model, batch, outputs=outputs, training=training)

        def compare(obtained: Path, expected: Path) -> None:
            __tracebackhide__ = True
            try:
                assert_graph_equal(graph, expected)
            except ValueError as error:
                # pytest-regressions writes a file anew only after an AssertionError.
                if self._request.config.getoption("force_regen"):
                    raise AssertionError(str(error)) from error
                raise

        file_regression.check(
            f"{graph}\n",
            encoding="utf-8",
            fullpath=None if path is None else Path(path).resolve(),
            check_fn=compare,
        )

    def draw(
        self,
        model: Model,
        batch: Any,
        path: str | Path,
        *,
        outputs: Outputs | None = None,
        training: bool = False,
        overwrite: bool = False,
    ) -> tuple[Path, Path]:
        """Draws the graph as path.pdf and path.svg: `draw_autograd_graph`."""
        from ensembles.drawings import draw_autograd_graph

        return draw_autograd_graph(
            model, batch, path, outputs=outputs, training=training, overwrite=overwrite
        )


@pytest.fixture
def autograd_graph(request: pytest.FixtureRequest) -> GraphFixture:
    """Promises that the autograd graph of the model is the recorded one.

    Catches a layer that is skipped, an activation that was lost, streams that run through one
    network, a subnet that does not read its parent's weight, a branch that was detached. The text
    is the same on every machine, for every batch size, and in every run.

    Example::

        def test_graph_of_resnet18(autograd_graph):
            autograd_graph.assert_recorded(resnet18(), torch.randn(2, 3, 32, 32))

    Prints on failure::

        the autograd graph is claimed to be the recorded one, and is another

          - layer2.1.bn1:Relu(:BatchNorm)
          - layer2.1.conv2:Convolution(layer2.1.bn1:Relu, .weight) padding=1
          + layer2.1.conv2:Convolution(layer2.1.bn1:BatchNorm, .weight) padding=1
          (- recorded: 2 of 136 lines; + found: 1 of 135)
          ...
    """
    return GraphFixture(request)


class CostFixture:
    """What `compute_cost` gives to a test."""

    def measure(
        self, model: Model, batch: Any, *, outputs: Outputs | None = None, training: bool = True
    ) -> ComputeCost:
        """FLOPs, parameters, bytes kept and zeros, by layer: `measure_compute_cost`."""
        from ensembles.checks.cost import measure_compute_cost

        return measure_compute_cost(model, batch, outputs=outputs, training=training)

    def assert_within(
        self,
        model: Model,
        batch: Any,
        *,
        outputs: Outputs | None = None,
        training: bool = True,
        **budgets: Any,
    ) -> None:
        """Checks that a call costs at most: flops, parameters, kept_bytes, wasted (a share)."""
        __tracebackhide__ = True
        from ensembles.checks.cost import assert_cost_within

        cost = self.measure(model, batch, outputs=outputs, training=training)
        assert_cost_within(cost, **budgets)

    def assert_exactly(
        self,
        model: Model,
        batch: Any,
        *,
        outputs: Outputs | None = None,
        training: bool = True,
        **claims: Any,
    ) -> None:
        """Checks that a call costs exactly this: the budgets, and forward, backward, buffers."""
        __tracebackhide__ = True
        from ensembles.checks.cost import assert_cost_equals

        cost = self.measure(model, batch, outputs=outputs, training=training)
        assert_cost_equals(cost, **claims)


@pytest.fixture
def compute_cost() -> CostFixture:
    """Promises that a call of the model costs what is claimed, in whole numbers, by layer.

    Catches a masked subnet that costs as much as its parent, masked copies of weights that are
    kept for the backward pass, a tied weight that is stored twice, a network that runs twice.
    What is zero by structure is found exactly, and not guessed from values.

    Example::

        def test_a_subnet_multiplies_no_zeros(compute_cost):
            compute_cost.assert_within(subnet, torch.randn(2, 3, 32, 32), wasted=0)

    Prints on failure::

        a training step is claimed to take at most 0 % of FLOPs on zeros, and takes more

          in all     expected at most 0 % of FLOPs on zeros   found 74.5 % of FLOPs on zeros
          layer1.0                                            75.0 % of 884,736 FLOPs
          ...
    """
    return CostFixture()


class DeterminismFixture:
    """What `seeded_determinism` gives to a test."""

    def measure(
        self,
        make: Callable[[], Model],
        batch: Any = None,
        *,
        outputs: Outputs | None = None,
        members: Members | None = None,
        optimizer: Callable[[Any], Any] | None = None,
        loss: Callable[[dict[str, Any]], Tensor] | None = None,
        steps: int = 2,
        factory: str | None = None,
    ) -> Determinism:
        """What two runs from one seed have in common: `measure_determinism`."""
        from ensembles.checks.determinism import measure_determinism

        return measure_determinism(
            make,
            batch,
            outputs=outputs,
            members=members,
            optimizer=optimizer,
            loss=loss,
            steps=steps,
            factory=factory,
        )

    def assert_bitwise(
        self,
        make: Callable[[], Model],
        batch: Any = None,
        *,
        outputs: Outputs | None = None,
        members: Members | None = None,
        optimizer: Callable[[Any], Any] | None = None,
        loss: Callable[[dict[str, Any]], Tensor] | None = None,
        steps: int = 2,
        factory: str | None = None,
        loaded: bool = False,
    ) -> None:
        """Checks that one seed gives the same bits, and another seed other weights.

        With `factory="package.module:factory"` also in two new processes, which import it. With
        `loaded` the weights come from a file, and need not depend on the seed.
        """
        __tracebackhide__ = True
        from ensembles.checks.determinism import assert_deterministic

        measured = self.measure(
            make,
            batch,
            outputs=outputs,
            members=members,
            optimizer=optimizer,
            loss=loss,
            steps=steps,
            factory=factory,
        )
        assert_deterministic(measured, loaded=loaded)

    def assert_loader(
        self,
        make_loader: Callable[[], Iterable[Any]],
        *,
        augmented: bool = True,
        epochs: int = 2,
    ) -> None:
        """Checks that batches repeat under the seed, and that no worker or epoch repeats another.

        Without `augmented`, nothing random is expected to happen to a sample.
        """
        __tracebackhide__ = True
        from ensembles.checks.loading import assert_loader_deterministic, measure_loader_determinism

        measured = measure_loader_determinism(make_loader, epochs=epochs)
        assert_loader_deterministic(measured, augmented=augmented)


@pytest.fixture
def seeded_determinism() -> Iterator[DeterminismFixture]:
    """Promises that one seed gives the same bits, in construction and in every training step.

    Catches weights drawn at import or before seeding, a factory that ignores the seed, a
    constructor that calls `torch.manual_seed(0)`, seeds from the clock, the order of sets,
    operations that do not repeat, and data loader workers that repeat one random stream. For the
    length of the test the seeds of Python, numpy, torch and CUDA, deterministic algorithms, the
    cuDNN flags and CUBLAS_WORKSPACE_CONFIG are set; afterwards all is as it was.

    Example::

        def test_one_seed_gives_the_same_bits(seeded_determinism):
            seeded_determinism.assert_bitwise(resnet18, torch.randn(4, 3, 32, 32))

    Prints on failure::

        one seed is claimed to give the same bits, and two runs from seed 1729 part in step 1

          step 1   operation forward of model.layer1.0.drop (NoiseLayer)   94 differ
          ...
    """
    from ensembles.message import seed
    from ensembles.probes.seeding import seeded

    with seeded(seed.get()):
        yield DeterminismFixture()


class TrajectoryFixture:
    """What `training_trajectory` gives to a test.

    `make` builds the model after the seed was set, or is the model itself; `optimizer` is a
    function of the model, `loss` one of the dict of member outputs.
    """

    def measure(
        self,
        make: Callable[[], Model] | Model,
        batch: Any,
        *,
        outputs: Outputs | None = None,
        members: Members | None = None,
        optimizer: Callable[[Any], Any] | None = None,
        loss: Callable[[dict[str, Any]], Tensor] | None = None,
        steps: int = 3,
        values: bool = False,
    ) -> TrainingTrajectory:
        """Some optimizer steps from the seed, recorded: `measure_training_trajectory`."""
        from ensembles.checks.trajectory import measure_training_trajectory

        return measure_training_trajectory(
            make,
            batch,
            outputs=outputs,
            members=members,
            optimizer=optimizer,
            loss=loss,
            steps=steps,
            values=values,
        )

    def assert_equal(
        self, one: TrainingTrajectory, two: TrainingTrajectory, *, tolerance: float = 0.0
    ) -> None:
        """Checks that two recorded runs are the same, bit by bit or within a tolerance."""
        __tracebackhide__ = True
        from ensembles.checks.trajectory import assert_trajectories_equal

        assert_trajectories_equal(one, two, tolerance=tolerance)

    def measure_members(
        self,
        make: Callable[[], Model] | Model,
        batch: Any,
        *,
        outputs: Outputs | None = None,
        members: Members | None = None,
        optimizer: Callable[[Any], Any] | None = None,
        loss: Callable[[dict[str, Any]], Tensor] | None = None,
        identical: bool = False,
        loss_is: Literal["sum", "mean"] = "sum",
        steps: int = 3,
        values: bool = False,
    ) -> MemberTrajectories:
        """Members trained together, and each trained alone: `measure_member_trajectories`."""
        from ensembles.checks.alone import measure_member_trajectories

        return measure_member_trajectories(
            make,
            batch,
            outputs=outputs,
            members=members,
            optimizer=optimizer,
            loss=loss,
            identical=identical,
            loss_is=loss_is,
            steps=steps,
            values=values,
        )

    def assert_members_single(
        self,
        make: Callable[[], Model] | Model,
        batch: Any,
        *,
        outputs: Outputs | None = None,
        members: Members | None = None,
        optimizer: Callable[[Any], Any] | None = None,
        loss: Callable[[dict[str, Any]], Tensor] | None = None,
        loss_is: Literal["sum", "mean"] = "sum",
        steps: int = 3,
        tolerance: float = 0.0,
    ) -> None:
        """Checks that members with the weights of the first each train as that single model.

        `loss_is="mean"` compares with the single model at the rates to which a mean amounts.
        """
        __tracebackhide__ = True
        from ensembles.checks.alone import assert_members_trained_alone

        measured = self.measure_members(
            make,
            batch,
            outputs=outputs,
            members=members,
            optimizer=optimizer,
            loss=loss,
            identical=True,
            loss_is=loss_is,
            steps=steps,
            values=bool(tolerance),
        )
        assert_members_trained_alone(measured, tolerance=tolerance)

    def assert_members_separate(
        self,
        make: Callable[[], Model] | Model,
        batch: Any,
        *,
        outputs: Outputs | None = None,
        members: Members | None = None,
        optimizer: Callable[[Any], Any] | None = None,
        loss: Callable[[dict[str, Any]], Tensor] | None = None,
        loss_is: Literal["sum", "mean"] = "sum",
        steps: int = 3,
        tolerance: float = 0.0,
    ) -> None:
        """Checks that members, as they are built, each train as in a separate run of their own."""
        __tracebackhide__ = True
        from ensembles.checks.alone import assert_members_trained_alone

        measured = self.measure_members(
            make,
            batch,
            outputs=outputs,
            members=members,
            optimizer=optimizer,
            loss=loss,
            loss_is=loss_is,
            steps=steps,
            values=bool(tolerance),
        )
        assert_members_trained_alone(measured, tolerance=tolerance)


@pytest.fixture
def training_trajectory() -> TrajectoryFixture:
    """Promises that training runs that are claimed to be one run are, step by step, bit by bit.

    Catches an ensemble whose members do not train as they would alone: averaged losses, one
    network under several names, a gradient norm clipped over all members, BatchNorm statistics
    that move several times a step. And any change of a training step that was to change nothing.

    Example::

        def test_the_ensemble_equals_the_single_model(training_trajectory):
            training_trajectory.assert_members_single(
                lambda: [resnet18() for _ in range(4)], images, optimizer=sgd, loss=summed_loss)

    Prints on failure::

        members 0, 1, 2, 3 are claimed to follow the single model, and do not

          member 0   step 1   gradient 0.conv1.weight   norm 0.25 times that alone   ...
          ...
          Every member's gradient is 1/4 of what it is alone: under SGD this is the learning
          rate divided by 4, and weight decay times 4.
    """
    return TrajectoryFixture()


class PredictionFixture:
    """What `prediction_reduction` gives to a test.

    Every method takes the same arguments: `predict` is a function of the model and the batch,
    `outputs` and `members` find the members in one module.
    """

    def measure(
        self,
        model: Model,
        batch: Any,
        predict: Callable[[Any, Any], Any],
        *,
        outputs: Outputs | None = None,
        members: Members | None = None,
        weights: Sequence[float] | None = None,
        evaluate: Callable[[Any, Any, Tensor], Any] | None = None,
        axis: int = 1,
    ) -> PredictionReduction:
        """Which reduction the prediction is: `measure_prediction_reduction`."""
        from ensembles.checks.prediction import measure_prediction_reduction

        return measure_prediction_reduction(
            model,
            batch,
            predict,
            outputs=outputs,
            members=members,
            weights=weights,
            evaluate=evaluate,
            axis=axis,
        )

    def assert_reduced(
        self,
        model: Model,
        batch: Any,
        predict: Callable[[Any, Any], Any],
        reduction: str = "arithmetic",
        *,
        outputs: Outputs | None = None,
        members: Members | None = None,
        weights: Sequence[float] | None = None,
        ties: str = "lowest",
        axis: int = 1,
    ) -> None:
        """Checks that the prediction is an arithmetic or geometric mean, a vote, or of logits."""
        __tracebackhide__ = True
        from ensembles.checks.prediction import assert_prediction_reduced

        measured = self.measure(
            model, batch, predict, outputs=outputs, members=members, weights=weights, axis=axis
        )
        assert_prediction_reduced(measured, reduction, ties=ties)

    def assert_metric(
        self,
        model: Model,
        batch: Any,
        predict: Callable[[Any, Any], Any],
        evaluate: Callable[[Any, Any, Tensor], Any],
        metric: str,
        *,
        outputs: Outputs | None = None,
        members: Members | None = None,
        axis: int = 1,
    ) -> None:
        """Checks that evaluate(model, batch, labels) is the accuracy, nll, ... of the prediction.

        Metrics are "accuracy", "error", "nll" and "brier".
        """
        __tracebackhide__ = True
        from ensembles.checks.prediction import assert_metric_of_prediction

        measured = self.measure(
            model, batch, predict, outputs=outputs, members=members, evaluate=evaluate, axis=axis
        )
        assert_metric_of_prediction(measured, metric)


@pytest.fixture
def prediction_reduction() -> PredictionFixture:
    """Promises that the ensemble's prediction is the reduction of its members' that it claims.

    Catches logits averaged for probabilities, softmax twice, geometric means that are not
    normalised, weights applied twice, rows that a reshape mixes, one member's metric that is
    called the ensemble's, and cross-entropy of probabilities. Works with untrained members.

    Example::

        def test_the_ensemble_averages_probabilities(prediction_reduction):
            members = [resnet18() for _ in range(3)]
            prediction_reduction.assert_reduced(members, torch.randn(4, 3, 32, 32), predict)

    Prints on failure::

        the prediction of members 0, 1, 2 is claimed to be the arithmetic mean of the
        probabilities, and is not

          prediction   expected the arithmetic mean ...   found the geometric mean ...
          ...
    """
    return PredictionFixture()


class LossScaleFixture:
    """What `loss_scale` gives to a test.

    Every method takes the same arguments: `loss` is a function of the dict of member outputs,
    `member_loss` one of a member's output, `optimizer` one of the model, `scheduler` one of the
    optimizer, and `clip` one of the model.
    """

    def measure(
        self,
        model: Model,
        batch: Any,
        loss: Callable[[dict[str, Any]], Tensor],
        *,
        outputs: Outputs | None = None,
        member_loss: Callable[[Any], Tensor] | None = None,
        optimizer: Callable[[Any], Any] | None = None,
        scheduler: Callable[[Any], Any] | None = None,
        steps: int = 100,
        clip: Callable[[Any], Any] | None = None,
    ) -> LossScale:
        """The multiple of every member's gradient, and its rates: `measure_loss_scale`."""
        from ensembles.checks.loss_scale import measure_loss_scale

        return measure_loss_scale(
            model,
            batch,
            loss,
            outputs=outputs,
            member_loss=member_loss,
            optimizer=optimizer,
            scheduler=scheduler,
            steps=steps,
            clip=clip,
        )

    def assert_scaled(
        self,
        model: Model,
        batch: Any,
        loss: Callable[[dict[str, Any]], Tensor],
        claim: Claim = "sum",
        *,
        outputs: Outputs | None = None,
        member_loss: Callable[[Any], Tensor] | None = None,
        optimizer: Callable[[Any], Any] | None = None,
        clip: Callable[[Any], Any] | None = None,
    ) -> None:
        """Checks that the loss is the sum, the mean, joint, or has the claimed multiples."""
        __tracebackhide__ = True
        from ensembles.checks.loss_scale import assert_loss_scaled

        measured = self.measure(
            model,
            batch,
            loss,
            outputs=outputs,
            member_loss=member_loss,
            optimizer=optimizer,
            clip=clip,
        )
        assert_loss_scaled(measured, claim)

    def assert_rates(
        self,
        model: Model,
        batch: Any,
        loss: Callable[[dict[str, Any]], Tensor],
        optimizer: Callable[[Any], Any],
        *,
        lr: Rates | None = None,
        weight_decay: float | None = None,
        warmup: float | None = None,
        outputs: Outputs | None = None,
        member_loss: Callable[[Any], Tensor] | None = None,
        scheduler: Callable[[Any], Any] | None = None,
        steps: int = 100,
    ) -> None:
        """Checks that every member trains as a single model at these rates does."""
        __tracebackhide__ = True
        from ensembles.checks.effective_rates import assert_rates_effective

        measured = self.measure(
            model,
            batch,
            loss,
            outputs=outputs,
            member_loss=member_loss,
            optimizer=optimizer,
            scheduler=scheduler,
            steps=steps,
        )
        assert_rates_effective(measured, lr=lr, weight_decay=weight_decay, warmup=warmup)


@pytest.fixture
def loss_scale() -> LossScaleFixture:
    """Promises that every member's gradient is the claimed multiple of its gradient alone.

    Catches a mean where the sum of losses is meant (under SGD: lr/M, and M times the weight
    decay), losses of the mean prediction, weights of members, clipping by one norm, and schedules
    with absolute rates, stepped for each member, or with a warm-up that is wrong.

    Example::

        def test_members_train_on_the_sum(loss_scale):
            members = [resnet18() for _ in range(4)]
            loss_scale.assert_scaled(members, torch.randn(4, 3, 32, 32), sum_of_losses, "sum")

    Prints on failure::

        members 0, 1, 2, 3 are claimed to train on the sum of their losses, and train on their mean

          0   expected 1   found 1/4   lr 0.1 acts as 0.025, weight decay 0.0005 as 0.002
          ...
    """
    return LossScaleFixture()


class DiversityFixture:
    """What `member_diversity` gives to a test.

    The model is a function that builds it, which is called twice; or the model itself, of which
    construction is not looked at.
    """

    def measure(
        self,
        model: Model | Callable[[], Model],
        batch: Any = None,
        *,
        outputs: Outputs | None = None,
        members: Members | None = None,
    ) -> MemberDiversity:
        """What members have in common at the start: `measure_member_diversity`."""
        from ensembles.checks.diversity import measure_member_diversity

        return measure_member_diversity(model, batch, outputs=outputs, members=members)

    def assert_independent(
        self,
        model: Model | Callable[[], Model],
        batch: Any = None,
        *,
        outputs: Outputs | None = None,
        members: Members | None = None,
        alike: Sequence[str] = (),
        seeded: bool = False,
    ) -> None:
        """Checks that members differ in every drawn parameter and in their outputs.

        Parameters of the names `alike` (`fnmatch`) are in common by design; `seeded` members have
        a seed each, so that every construction gives the same ensemble.
        """
        __tracebackhide__ = True
        from ensembles.checks.diversity import assert_members_diverse

        measured = self.measure(model, batch, outputs=outputs, members=members)
        assert_members_diverse(measured, alike, seeded=seeded)


@pytest.fixture
def member_diversity() -> DiversityFixture:
    """Promises that members start different, in every drawn parameter and in their outputs.

    Catches copies of one initialised network, copies whose reset does not reach every layer, a
    constructor that seeds, one state dict loaded into several members, and permuted twins. Zeros,
    ones and pretrained weights may be in common.

    Example::

        def test_members_start_different(member_diversity):
            member_diversity.assert_independent(
                lambda: [resnet18() for _ in range(4)], torch.randn(4, 3, 32, 32))

    Prints on failure::

        members 0, 1 are claimed to start different, and are alike

          blocks.0.conv1.weight   equal in members 0, 1
          ...
    """
    return DiversityFixture()


class DataFixture:
    """What `member_data` gives to a test.

    `data` is a function of the member's number (or name, where `members` are names) to sample
    indices, a sampler or a loader; `size` is the number of samples in the data set.
    """

    def measure(
        self,
        data: Callable[[Any], Iterable[Any]],
        members: int | Sequence[str] = 2,
        *,
        size: int | None = None,
    ) -> MemberData:
        """Which samples every member sees: `measure_member_data`."""
        from ensembles.checks.data import measure_member_data

        return measure_member_data(data, members, size=size)

    def assert_bagged(
        self,
        data: Callable[[Any], Iterable[Any]],
        members: int | Sequence[str] = 2,
        *,
        size: int | None = None,
    ) -> None:
        """Checks that every member sees a bootstrap of its own, drawn with replacement."""
        __tracebackhide__ = True
        from ensembles.checks.data import assert_members_bagged

        assert_members_bagged(self.measure(data, members, size=size))

    def assert_paired(
        self, data: Callable[[Any], Iterable[Any]], members: int | Sequence[str] = 2
    ) -> None:
        """Checks that all members see the same samples in the same order."""
        __tracebackhide__ = True
        from ensembles.checks.data import assert_members_paired

        assert_members_paired(self.measure(data, members))

    def assert_shuffled(
        self, data: Callable[[Any], Iterable[Any]], members: int | Sequence[str] = 2
    ) -> None:
        """Checks that members see the same samples, and no two of them in the same order."""
        __tracebackhide__ = True
        from ensembles.checks.data import assert_members_shuffled

        assert_members_shuffled(self.measure(data, members))


@pytest.fixture
def member_data() -> DataFixture:
    """Promises that members see the samples that they are claimed to see.

    Catches bagged members that all get the same indices, bootstraps without replacement, paired
    members whose loaders shuffle by themselves, and shuffled members that read in one order.

    Example::

        def test_members_are_bagged(member_data):
            member_data.assert_bagged(lambda member: bootstrap_indices(seed=member), 4)

    Prints on failure::

        members 0, 1, 2, 3 are claimed bagged, and see the same samples

          members 0, 1   the same 50000 samples   in the same order
          ...
    """
    return DataFixture()


class BatchFixture:
    """What `batch_independence` gives to a test.

    `axis` and `output_axis` are the axes of the rows in the batch and in each member's output.
    """

    def measure(
        self,
        model: Model,
        batch: Any,
        *,
        outputs: Outputs | None = None,
        training: bool = False,
        axis: int = 0,
        output_axis: int = 0,
    ) -> BatchIndependence:
        """Which rows of a batch reach which others: `measure_batch_independence`."""
        from ensembles.checks.batch import measure_batch_independence

        return measure_batch_independence(
            model, batch, outputs=outputs, training=training, axis=axis, output_axis=output_axis
        )

    def assert_rows(
        self,
        model: Model,
        batch: Any,
        *,
        outputs: Outputs | None = None,
        training: bool = False,
        axis: int = 0,
        output_axis: int = 0,
    ) -> None:
        """Checks that every row of the output depends on its own row of the input only.

        In eval mode; with `training` in training mode, but for BatchNorm, which mixes rows there.
        """
        __tracebackhide__ = True
        from ensembles.checks.batch import assert_rows_independent

        measured = self.measure(
            model, batch, outputs=outputs, training=training, axis=axis, output_axis=output_axis
        )
        assert_rows_independent(measured)


@pytest.fixture
def batch_independence() -> BatchFixture:
    """Promises that row i of the output depends on row i of the input, and on no other row.

    Catches a view where a permute is meant, a norm over the batch in eval mode, attention that
    takes the batch for the sequence, a softmax or maximum over all rows, and outputs that depend
    on the place of a row or on their number. By values bit by bit, and by gradients.

    Example::

        def test_samples_do_not_mix(batch_independence):
            batch_independence.assert_rows(PackedNet(members=4), torch.randn(4, 3, 32, 32))

    Prints on failure::

        rows of a batch are claimed independent, and reach each other in eval mode

          member 0   input row 0 reaches output rows 1, 2, 3   by 0.51 of the largest
          ...
          (12 of 12 pairs of different rows; first seen in encoder.attention (MultiheadAttention))
    """
    return BatchFixture()


class RoundTripFixture:
    """What `round_trip` gives to a test."""

    def measure(
        self,
        make: Callable[[], Model],
        batch: Any,
        *,
        outputs: Outputs | None = None,
        conversions: Sequence[str] | str = "all",
        factory: str | None = None,
    ) -> RoundTrips:
        """What is left of a model after every conversion: `measure_round_trips`."""
        from ensembles.checks.round_trips import measure_round_trips

        return measure_round_trips(
            make, batch, outputs=outputs, conversions=conversions, factory=factory
        )

    def assert_kept(
        self,
        make: Callable[[], Model],
        batch: Any,
        conversions: Sequence[str] | str = "all",
        *,
        outputs: Outputs | None = None,
        factory: str | None = None,
    ) -> None:
        """Checks that conversions keep ties, function, owners, parameters and the optimizer.

        Of "all", those that PyTorch itself breaks are let pass.
        """
        __tracebackhide__ = True
        from ensembles.checks.round_trips import assert_round_trips_kept

        measured = self.measure(
            make, batch, outputs=outputs, conversions=conversions, factory=factory
        )
        assert_round_trips_kept(measured, conversions)


@pytest.fixture
def round_trip() -> RoundTripFixture:
    """Promises that what is copied, saved, loaded, cast or wrapped is still the model that it was.

    Catches ties that come apart, masks that no state_dict holds, copies that compute with the
    weights of their original, and an optimizer that is left with parameters of before.

    Example::

        def test_checkpoints_keep_the_model(round_trip):
            round_trip.assert_kept(resnet18, torch.randn(2, 3, 32, 32), ["state_dict", "deepcopy"])

    Prints on failure::

        the model is claimed to survive state_dict, deepcopy, and does not

          state_dict   function: outputs differ by 4e-01 of the greatest (at most 1e-06)
          ...
    """
    return RoundTripFixture()


class HygieneFixture:
    """What `state_hygiene` gives to a test."""

    def measure(
        self,
        model: Model,
        batch: Any,
        *,
        outputs: Outputs | None = None,
        optimizer: Callable[[Any], Any] | None = None,
        loss: Callable[[dict[str, Any]], Tensor] | None = None,
    ) -> StateHygiene:
        """What a model keeps, and what moves: `measure_state_hygiene`."""
        from ensembles.checks.hygiene import measure_state_hygiene

        return measure_state_hygiene(model, batch, outputs=outputs, optimizer=optimizer, loss=loss)

    def assert_clean(
        self,
        model: Model,
        batch: Any,
        *,
        updates: int = 1,
        outputs: Outputs | None = None,
        optimizer: Callable[[Any], Any] | None = None,
        loss: Callable[[dict[str, Any]], Tensor] | None = None,
    ) -> None:
        """Checks that state is registered, and moves only when it should.

        `updates` is how often norms update their statistics in one training step.
        """
        __tracebackhide__ = True
        from ensembles.checks.hygiene import assert_state_clean

        measured = self.measure(model, batch, outputs=outputs, optimizer=optimizer, loss=loss)
        assert_state_clean(measured, updates=updates)

    def assert_detached(self, snapshot: Any, model: Model) -> None:
        """Checks that a snapshot of weights is a copy, and not the live weights."""
        __tracebackhide__ = True
        from ensembles.checks.hygiene import assert_snapshot_detached

        assert_snapshot_detached(snapshot, model)


@pytest.fixture
def state_hygiene() -> HygieneFixture:
    """Promises that state is where PyTorch finds it, and moves only when it is claimed to.

    Catches modules and masks that nothing registers, eval() that does not reach every member,
    dropout in eval mode, norms that update several times a step or though they are frozen, weights
    that drift in steps that do not use them, and snapshots that alias live weights.

    Example::

        def test_evaluation_changes_nothing(state_hygiene):
            state_hygiene.assert_clean(resnet18(), torch.randn(4, 3, 32, 32))

    Prints on failure::

        the model is claimed to keep its state in order, and does not

          model.mask                hidden tensor:    shape (64, 64), a plain attribute
          outputs under two seeds   random in eval:   differ by 3e-01: dropout
          ...
    """
    return HygieneFixture()
