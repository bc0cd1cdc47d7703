"""Whether a measurement is what was claimed."""

from __future__ import annotations

from ensembles.checks.coupling.claim import CouplingClaim
from ensembles.checks.coupling.measurement import (
    GradientCoupling,
    assert_members_coupled,
    assert_members_coupled_to,
    assert_members_uncoupled,
)
from ensembles.findings import Findings

__all__ = [
    "assert_members_coupled",
    "assert_members_coupled_to",
    "assert_members_uncoupled",
    "judge",
]


def judge(measurement: GradientCoupling, claim: CouplingClaim) -> Findings:
    """What is not as claimed."""
    __tracebackhide__ = True
    if claim.relation == "parent":
        assert_members_coupled_to(measurement, claim.parent)
    elif claim.relation == "tied":
        assert_members_coupled(measurement)
    else:
        assert_members_uncoupled(measurement)
    return Findings(claim="")
