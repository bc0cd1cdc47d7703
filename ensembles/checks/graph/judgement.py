"""Whether a measurement is what was claimed."""

from __future__ import annotations

from ensembles.checks.graph.claim import GraphClaim
from ensembles.checks.graph.measurement import AutogradGraph, assert_graph_equal
from ensembles.findings import Findings

__all__ = ["assert_graph_equal", "judge"]


def judge(measurement: AutogradGraph, claim: GraphClaim) -> Findings:
    """What is not as claimed."""
    __tracebackhide__ = True
    assert_graph_equal(measurement, claim.text)
    return Findings(claim="")
