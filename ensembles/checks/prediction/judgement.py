"""Whether a measurement is what was claimed."""

from __future__ import annotations

from ensembles.checks.prediction.claim import PredictionClaim
from ensembles.checks.prediction.measurement import (
    PredictionReduction,
    assert_metric_of_prediction,
    assert_prediction_reduced,
)
from ensembles.findings import Findings

__all__ = ["assert_metric_of_prediction", "assert_prediction_reduced", "judge"]


def judge(measurement: PredictionReduction, claim: PredictionClaim) -> Findings:
    """What is not as claimed."""
    __tracebackhide__ = True
    assert_prediction_reduced(measurement, claim.reduction, ties=claim.ties)
    if claim.metric is not None:
        assert_metric_of_prediction(measurement, claim.metric)
    return Findings(claim="")
