"""Whether a measurement is what was claimed."""

from __future__ import annotations

from ensembles.checks.trajectory.claim import TrajectoryClaim
from ensembles.checks.trajectory.measurement import MemberTrajectories, assert_members_trained_alone
from ensembles.findings import Findings

__all__ = ["assert_members_trained_alone", "judge"]


def judge(measurement: MemberTrajectories, claim: TrajectoryClaim) -> Findings:
    """What is not as claimed."""
    __tracebackhide__ = True
    assert_members_trained_alone(measurement, tolerance=claim.tolerance)
    return Findings(claim="")
