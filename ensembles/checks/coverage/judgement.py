"""Whether a measurement is what was claimed."""

from __future__ import annotations

from ensembles.checks.coverage.claim import CoverageClaim
from ensembles.checks.coverage.measurement import OptimizerCoverage, assert_optimizer_complete
from ensembles.findings import Findings

__all__ = ["assert_optimizer_complete", "judge"]


def judge(measurement: OptimizerCoverage, claim: CoverageClaim) -> Findings:
    """What is not as claimed."""
    __tracebackhide__ = True
    assert_optimizer_complete(measurement)
    return Findings(claim="")
