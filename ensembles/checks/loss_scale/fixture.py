"""Fixture `loss_scale`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest

from ensembles.checks.loss_scale.claim import STEPS

if TYPE_CHECKING:
    from typing import Unpack

    from ensembles.case import Given
    from ensembles.checks.loss_scale.claim import Multiples, Rates
    from ensembles.checks.loss_scale.measurement import LossScale
    from ensembles.subject import Recipe

__all__ = ["LossScaleFixture", "loss_scale"]


class LossScaleFixture:
    """What `loss_scale` gives to a test; every method needs `loss=` in the recipe."""

    def measure(
        self, model: Given, batch: Any = None, *, steps: int = STEPS, **recipe: Unpack[Recipe]
    ) -> LossScale:
        """The multiple of every member's gradient, and its rates: `measure_loss_scale`."""
        from ensembles.checks.loss_scale.measurement import measure_loss_scale

        return measure_loss_scale(model, batch, steps=steps, **recipe)

    def assert_scaled(
        self,
        model: Given,
        batch: Any = None,
        claim: Multiples = "sum",
        *,
        clipping: str | None = None,
        shared: Sequence[str] | None = None,
        **recipe: Unpack[Recipe],
    ) -> None:
        """Checks that the loss is the sum, the mean, joint, or has the claimed multiples."""
        __tracebackhide__ = True
        from ensembles.checks.loss_scale.judgement import assert_loss_scaled

        measured = self.measure(model, batch, **recipe)
        assert_loss_scaled(measured, claim, clipping=clipping, shared=shared)

    def assert_rates(
        self,
        model: Given,
        batch: Any = None,
        *,
        lr: Rates | None = None,
        weight_decay: float | None = None,
        warmup: float | None = None,
        steps: int = STEPS,
        **recipe: Unpack[Recipe],
    ) -> None:
        """Checks that every member trains as a single model at these rates does."""
        __tracebackhide__ = True
        from ensembles.checks.loss_scale.judgement import assert_rates_effective

        measured = self.measure(model, batch, steps=steps, **recipe)
        assert_rates_effective(measured, lr=lr, weight_decay=weight_decay, warmup=warmup)


@pytest.fixture
def loss_scale() -> LossScaleFixture:
    """Every member's gradient is the claimed multiple of its gradient alone, and it trains at the
    claimed learning rate.

    Catches a mean where the sum of losses is meant (under SGD: lr/M, and M times the weight
    decay), losses of the mean prediction, weights of members, parameters in common, clipping by one
    norm, and schedules with absolute rates, stepped for each member, or with a wrong warm-up.

    Example::

        def test_members_train_on_the_sum(loss_scale):
            members = [resnet18() for _ in range(4)]
            loss_scale.assert_scaled(members, torch.randn(4, 3, 32, 32), "sum", loss=sum_of_losses)

    Prints on failure::

        members 0, 1, 2, 3 are claimed to train on the sum of their losses, but train on their mean

          member 0   expected its gradient alone   found 1/4 of it: lr 0.1 acts as 0.025, ...
          ...
    """  # noqa: D205 (the promise takes two lines)
    return LossScaleFixture()
