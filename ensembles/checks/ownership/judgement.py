"""Whether a measurement is what was claimed."""

from __future__ import annotations

from ensembles.checks.ownership.claim import OwnershipClaim
from ensembles.checks.ownership.measurement import OwnershipMap, assert_ownership
from ensembles.findings import Findings

__all__ = ["assert_ownership", "judge"]


def judge(measurement: OwnershipMap, claim: OwnershipClaim) -> Findings:
    """What is not as claimed."""
    __tracebackhide__ = True
    assert_ownership(measurement, claim.given)
    return Findings(claim="")
