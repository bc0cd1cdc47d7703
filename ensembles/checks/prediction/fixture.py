"""Fixture `prediction_reduction`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from typing import Unpack

    from ensembles.case import Case
    from ensembles.checks.prediction.measurement import PredictionReduction
    from ensembles.subject import Model, Recipe

__all__ = ["PredictionFixture", "prediction_reduction"]


class PredictionFixture:
    """What `prediction_reduction` gives to a test.

    Every method takes `predict=`, a function of the model and the batch; `weights` are those of the
    members, and `axis` is the class axis.
    """

    def measure(
        self,
        model: Case | Model,
        batch: Any = None,
        *,
        weights: Sequence[float] | None = None,
        axis: int = 1,
        **recipe: Unpack[Recipe],
    ) -> PredictionReduction:
        """Which reduction the prediction is: `measure_prediction_reduction`."""
        from ensembles.checks.prediction.measurement import measure_prediction_reduction

        return measure_prediction_reduction(model, batch, weights=weights, axis=axis, **recipe)

    def assert_reduced(
        self,
        model: Case | Model,
        batch: Any = None,
        reduction: str = "arithmetic",
        *,
        weights: Sequence[float] | None = None,
        ties: str = "lowest",
        axis: int = 1,
        **recipe: Unpack[Recipe],
    ) -> None:
        """Checks that the prediction is an arithmetic or geometric mean, a vote, or of logits."""
        __tracebackhide__ = True
        from ensembles.checks.prediction.judgement import assert_prediction_reduced

        measured = self.measure(model, batch, weights=weights, axis=axis, **recipe)
        assert_prediction_reduced(measured, reduction, ties=ties)

    def assert_metric(
        self,
        model: Case | Model,
        batch: Any = None,
        metric: str = "accuracy",
        *,
        axis: int = 1,
        **recipe: Unpack[Recipe],
    ) -> None:
        """Checks that evaluate(model, batch, labels) is the accuracy, nll, ... of the prediction.

        Metrics are "accuracy", "error", "nll" and "brier".
        """
        __tracebackhide__ = True
        from ensembles.checks.prediction.judgement import assert_metric_of_prediction

        assert_metric_of_prediction(self.measure(model, batch, axis=axis, **recipe), metric)


@pytest.fixture
def prediction_reduction() -> PredictionFixture:
    """The ensemble's prediction is the claimed reduction of its members' outputs, row for row, and
    its metric is computed from it.

    Catches averaged logits where probabilities are claimed, a second softmax, geometric means that
    are not normalised, weights that are applied twice, rows that a reshape mixes, one member's
    metric that is called the ensemble's, and cross-entropy of probabilities. It works with members
    that were never trained.

    Example::

        def test_the_ensemble_averages_probabilities(prediction_reduction):
            members = [resnet18() for _ in range(3)]
            images = torch.randn(4, 3, 32, 32)
            prediction_reduction.assert_reduced(members, images, predict=predict)

    Prints on failure::

        the prediction of members 0, 1, 2 is claimed to be the arithmetic mean of the
        probabilities, but is not

          prediction   expected the arithmetic mean ...
                       found the geometric mean ...
          ...
    """  # noqa: D205
    return PredictionFixture()
