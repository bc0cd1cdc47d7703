"""Whether a measurement is what was claimed."""

from __future__ import annotations

from ensembles.checks.loss_scale.claim import LossScaleClaim
from ensembles.checks.loss_scale.effective_rates import assert_rates_effective
from ensembles.checks.loss_scale.measurement import LossScale, assert_loss_scaled
from ensembles.findings import Findings

__all__ = ["assert_loss_scaled", "assert_rates_effective", "judge"]


def judge(measurement: LossScale, claim: LossScaleClaim) -> Findings:
    """What is not as claimed."""
    __tracebackhide__ = True
    assert_loss_scaled(
        measurement, claim.multiples, clipping=claim.clipping, shared=claim.shared or ()
    )
    rates = {k: v for k in ("lr", "weight_decay", "warmup") if (v := getattr(claim, k)) is not None}
    if rates:
        assert_rates_effective(measurement, **rates)
    return Findings(claim="")
