"""Fixture `training_trajectory`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from ensembles.checks.trajectory.measurement import MemberTrajectories
    from ensembles.checks.trajectory.runs import TrainingTrajectory
    from ensembles.subject import Members, Model, Outputs
    from ensembles.tolerance import Kind

__all__ = ["TrajectoryFixture", "training_trajectory"]


class TrajectoryFixture:
    """What `training_trajectory` gives to a test.

    `make` builds the model after the seed was set, or is the model itself; `optimizer` is a
    function of the model, `loss` one of the dict of member outputs, `clip` one of the model whose
    gradients it clips, and `scheduler` one of an optimizer.
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
        clip: Callable[[Any], Any] | None = None,
        scheduler: Callable[[Any], Any] | None = None,
        steps: int = 3,
        values: bool = False,
    ) -> TrainingTrajectory:
        """Some optimizer steps from the seed, recorded: `measure_training_trajectory`."""
        from ensembles.checks.trajectory.runs import measure_training_trajectory

        return measure_training_trajectory(
            make,
            batch,
            outputs=outputs,
            members=members,
            optimizer=optimizer,
            loss=loss,
            clip=clip,
            scheduler=scheduler,
            steps=steps,
            values=values,
        )

    def assert_equal(
        self, one: TrainingTrajectory, two: TrainingTrajectory, *, tolerance: float | Kind = 0.0
    ) -> None:
        """Checks that two recorded runs are the same, bit by bit or within a tolerance."""
        __tracebackhide__ = True
        from ensembles.checks.trajectory.runs import assert_trajectories_equal

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
        clip: Callable[[Any], Any] | None = None,
        scheduler: Callable[[Any], Any] | None = None,
        identical: bool = False,
        loss_is: Literal["sum", "mean"] = "sum",
        steps: int = 3,
        values: bool = False,
    ) -> MemberTrajectories:
        """Members trained together, and each trained alone: `measure_member_trajectories`."""
        from ensembles.checks.trajectory.measurement import measure_member_trajectories

        return measure_member_trajectories(
            make,
            batch,
            outputs=outputs,
            members=members,
            optimizer=optimizer,
            loss=loss,
            clip=clip,
            scheduler=scheduler,
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
        clip: Callable[[Any], Any] | None = None,
        scheduler: Callable[[Any], Any] | None = None,
        loss_is: Literal["sum", "mean"] = "sum",
        steps: int = 3,
        tolerance: float | Kind = 0.0,
    ) -> None:
        """Checks that members with the weights of the first each train as that single model.

        `loss_is="mean"` compares with the single model at the rates to which a mean amounts.
        """
        __tracebackhide__ = True
        from ensembles.checks.trajectory.measurement import assert_members_trained_alone

        measured = self.measure_members(
            make,
            batch,
            outputs=outputs,
            members=members,
            optimizer=optimizer,
            loss=loss,
            clip=clip,
            scheduler=scheduler,
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
        clip: Callable[[Any], Any] | None = None,
        scheduler: Callable[[Any], Any] | None = None,
        loss_is: Literal["sum", "mean"] = "sum",
        steps: int = 3,
        tolerance: float | Kind = 0.0,
    ) -> None:
        """Checks that members, as they are built, each train as in a separate run of their own."""
        __tracebackhide__ = True
        from ensembles.checks.trajectory.measurement import assert_members_trained_alone

        measured = self.measure_members(
            make,
            batch,
            outputs=outputs,
            members=members,
            optimizer=optimizer,
            loss=loss,
            clip=clip,
            scheduler=scheduler,
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
