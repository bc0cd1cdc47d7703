"""Fixture `training_trajectory`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import pytest

if TYPE_CHECKING:
    from typing import Unpack

    from ensembles.case import Case
    from ensembles.checks.trajectory.measurement import MemberTrajectories
    from ensembles.checks.trajectory.runs import TrainingTrajectory
    from ensembles.subject import Model, Recipe
    from ensembles.tolerance import Kind

__all__ = ["TrajectoryFixture", "training_trajectory"]


class TrajectoryFixture:
    """What `training_trajectory` gives to a test.

    A model may be a function that builds it, which is called after the seed was set.
    """

    def measure(
        self,
        model: Case | Model | Callable[[], Model],
        batch: Any = None,
        *,
        steps: int = 3,
        values: bool = False,
        **recipe: Unpack[Recipe],
    ) -> TrainingTrajectory:
        """Some optimizer steps from the seed, recorded: `measure_training_trajectory`."""
        from ensembles.checks.trajectory.runs import measure_training_trajectory

        return measure_training_trajectory(model, batch, steps=steps, values=values, **recipe)

    def assert_equal(
        self, one: TrainingTrajectory, two: TrainingTrajectory, *, tolerance: float | Kind = 0.0
    ) -> None:
        """Checks that two recorded runs are the same, bit by bit or within a tolerance."""
        __tracebackhide__ = True
        from ensembles.checks.trajectory.judgement import assert_trajectories_equal

        assert_trajectories_equal(one, two, tolerance=tolerance)

    def measure_members(
        self,
        model: Case | Model | Callable[[], Model],
        batch: Any = None,
        *,
        identical: bool = False,
        loss_is: Literal["sum", "mean"] = "sum",
        steps: int = 3,
        values: bool = False,
        **recipe: Unpack[Recipe],
    ) -> MemberTrajectories:
        """Members trained together, and each trained alone: `measure_member_trajectories`."""
        from ensembles.checks.trajectory.measurement import measure_member_trajectories

        return measure_member_trajectories(
            model,
            batch,
            identical=identical,
            loss_is=loss_is,
            steps=steps,
            values=values,
            **recipe,
        )

    def assert_members_single(
        self,
        model: Case | Model | Callable[[], Model],
        batch: Any = None,
        *,
        loss_is: Literal["sum", "mean"] = "sum",
        steps: int = 3,
        tolerance: float | Kind = 0.0,
        **recipe: Unpack[Recipe],
    ) -> None:
        """Checks that members with the weights of the first each train as that single model.

        `loss_is="mean"` compares with the single model at the rates to which a mean amounts.
        """
        __tracebackhide__ = True
        self._assert_members(True, model, batch, loss_is, steps, tolerance, recipe)

    def assert_members_separate(
        self,
        model: Case | Model | Callable[[], Model],
        batch: Any = None,
        *,
        loss_is: Literal["sum", "mean"] = "sum",
        steps: int = 3,
        tolerance: float | Kind = 0.0,
        **recipe: Unpack[Recipe],
    ) -> None:
        """Checks that members, as they are built, each train as in a separate run of their own."""
        __tracebackhide__ = True
        self._assert_members(False, model, batch, loss_is, steps, tolerance, recipe)

    def _assert_members(
        self,
        identical: bool,
        model: Case | Model | Callable[[], Model],
        batch: Any,
        loss_is: Literal["sum", "mean"],
        steps: int,
        tolerance: float | Kind,
        recipe: Recipe,
    ) -> None:
        __tracebackhide__ = True
        from ensembles.checks.trajectory.judgement import assert_members_trained_alone

        measured = self.measure_members(
            model,
            batch,
            identical=identical,
            loss_is=loss_is,
            steps=steps,
            values=bool(tolerance),
            **recipe,
        )
        assert_members_trained_alone(measured, tolerance=tolerance)


@pytest.fixture
def training_trajectory() -> TrajectoryFixture:
    """Every member trains exactly as it would alone, and two runs that are claimed equal are equal
    at every step.

    Catches an ensemble whose members do not train as they would alone: averaged losses, one
    network under several names, a gradient norm that is clipped over all members, BatchNorm
    statistics that move several times a step. It also catches any change of a training step that
    should have changed nothing.

    Example::

        def test_the_ensemble_equals_the_single_model(training_trajectory):
            training_trajectory.assert_members_single(
                lambda: [resnet18() for _ in range(4)], images, optimizer=sgd, loss=summed_loss)

    Prints on failure::

        members 0, 1, 2, 3 are claimed to follow the single model, but do not

          member 0, step 1   gradient 0.conv1.weight: norm 0.25 times the other's; ...
          ...
          Every member's gradient is 1/4 of what it is alone. Under SGD this is the learning
          rate divided by 4, and weight decay times 4.
    """  # noqa: D205
    return TrajectoryFixture()
