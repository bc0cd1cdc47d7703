"""Whether a measurement is what was claimed."""

from __future__ import annotations

from ensembles.checks.diversity.claim import DiversityClaim
from ensembles.checks.diversity.measurement import (
    MemberDiversity,
    assert_members_distinct,
    assert_members_diverse,
)
from ensembles.findings import Findings

__all__ = ["assert_members_distinct", "assert_members_diverse", "judge"]


def judge(measurement: MemberDiversity, claim: DiversityClaim) -> Findings:
    """What is not as claimed."""
    __tracebackhide__ = True
    if claim.distinct:
        assert_members_distinct(measurement)
    else:
        assert_members_diverse(measurement, claim.alike, seeded=claim.seeded)
    return Findings(claim="")
