"""Whether a measurement is what was claimed."""

from __future__ import annotations

from ensembles.checks.hygiene.claim import HygieneClaim
from ensembles.checks.hygiene.measurement import (
    StateHygiene,
    assert_snapshot_detached,
    assert_state_clean,
)
from ensembles.findings import Findings

__all__ = ["assert_snapshot_detached", "assert_state_clean", "judge"]


def judge(measurement: StateHygiene, claim: HygieneClaim) -> Findings:
    """What is not as claimed."""
    __tracebackhide__ = True
    assert_state_clean(measurement, updates=claim.updates)
    return Findings(claim="")
