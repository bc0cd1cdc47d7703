"""Whether a measurement is what was claimed."""

from __future__ import annotations

from ensembles.checks.data.claim import DataClaim
from ensembles.checks.data.measurement import (
    MemberData,
    assert_members_bagged,
    assert_members_paired,
    assert_members_shuffled,
)
from ensembles.findings import Findings

__all__ = ["assert_members_bagged", "assert_members_paired", "assert_members_shuffled", "judge"]


def judge(measurement: MemberData, claim: DataClaim) -> Findings:
    """What is not as claimed."""
    __tracebackhide__ = True
    {
        "bagged": assert_members_bagged,
        "paired": assert_members_paired,
        "shuffled": assert_members_shuffled,
    }[claim.relation](measurement)
    return Findings(claim="")
