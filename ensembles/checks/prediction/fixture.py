"""Fixture `prediction_reduction`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from ensembles.checks.prediction.measurement import PredictionReduction
    from ensembles.subject import Members, Model, Outputs

__all__ = ["PredictionFixture", "prediction_reduction"]


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
        from ensembles.checks.prediction.measurement import measure_prediction_reduction

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
        from ensembles.checks.prediction.measurement import assert_prediction_reduced

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
        from ensembles.checks.prediction.measurement import assert_metric_of_prediction

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
