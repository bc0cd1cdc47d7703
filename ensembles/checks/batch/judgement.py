"""Whether a measurement is what was claimed."""

from __future__ import annotations

from ensembles.checks.batch.claim import BatchClaim
from ensembles.checks.batch.measurement import BatchIndependence, assert_rows_independent
from ensembles.findings import Findings

__all__ = ["assert_rows_independent", "judge"]


def judge(measurement: BatchIndependence, claim: BatchClaim) -> Findings:
    """What is not as claimed."""
    __tracebackhide__ = True
    assert_rows_independent(measurement)
    return Findings(claim="")
