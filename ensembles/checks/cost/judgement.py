"""Whether a measurement is what was claimed."""

from __future__ import annotations

from ensembles.checks.cost.claim import CostClaim
from ensembles.checks.cost.measurement import ComputeCost, assert_cost_equals, assert_cost_within
from ensembles.findings import Findings

__all__ = ["assert_cost_equals", "assert_cost_within", "judge"]


def judge(measurement: ComputeCost, claim: CostClaim) -> Findings:
    """What is not as claimed."""
    __tracebackhide__ = True
    assert_cost_within(measurement, **vars(claim))
    return Findings(claim="")
