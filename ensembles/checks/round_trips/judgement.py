"""Whether a measurement is what was claimed."""

from __future__ import annotations

from ensembles.checks.round_trips.claim import RoundTripsClaim
from ensembles.checks.round_trips.measurement import RoundTrips, assert_round_trips_kept
from ensembles.findings import Findings

__all__ = ["assert_round_trips_kept", "judge"]


def judge(measurement: RoundTrips, claim: RoundTripsClaim) -> Findings:
    """What is not as claimed."""
    __tracebackhide__ = True
    assert_round_trips_kept(measurement, "all" if claim.conversions is None else claim.conversions)
    return Findings(claim="")
