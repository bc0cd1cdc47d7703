"""Whether a measurement is what was claimed."""

from __future__ import annotations

from ensembles.checks.determinism.claim import DeterminismClaim
from ensembles.checks.determinism.measurement import Determinism, assert_deterministic
from ensembles.findings import Findings

__all__ = ["assert_deterministic", "judge"]


def judge(measurement: Determinism, claim: DeterminismClaim) -> Findings:
    """What is not as claimed."""
    __tracebackhide__ = True
    assert_deterministic(measurement, loaded=claim.loaded)
    return Findings(claim="")
