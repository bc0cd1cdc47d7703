"""Fixture `loss_scale`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from ensembles.checks.loss_scale.effective_rates import Rates
    from ensembles.checks.loss_scale.measurement import Claim, LossScale
    from ensembles.subject import Model, Outputs

__all__ = ["LossScaleFixture", "loss_scale"]


class LossScaleFixture:
    """What `loss_scale` gives to a test.

    Every method takes the same arguments: `loss` is a function of the dict of member outputs,
    `member_loss` one of a member's output, `optimizer` one of the model, `scheduler` one of the
    optimizer, and `clip` one of the model. `shared` are patterns of the parameters that members
    share by design, where their gradients add up.
    """

    def measure(
        self,
        model: Model,
        batch: Any,
        loss: Callable[[dict[str, Any]], Tensor],
        *,
        outputs: Outputs | None = None,
        member_loss: Callable[[Any], Tensor] | None = None,
        optimizer: Callable[[Any], Any] | None = None,
        scheduler: Callable[[Any], Any] | None = None,
        steps: int = 100,
        clip: Callable[[Any], Any] | None = None,
    ) -> LossScale:
        """The multiple of every member's gradient, and its rates: `measure_loss_scale`."""
        from ensembles.checks.loss_scale.measurement import measure_loss_scale

        return measure_loss_scale(
            model,
            batch,
            loss,
            outputs=outputs,
            member_loss=member_loss,
            optimizer=optimizer,
            scheduler=scheduler,
            steps=steps,
            clip=clip,
        )

    def assert_scaled(
        self,
        model: Model,
        batch: Any,
        loss: Callable[[dict[str, Any]], Tensor],
        claim: Claim = "sum",
        *,
        outputs: Outputs | None = None,
        member_loss: Callable[[Any], Tensor] | None = None,
        optimizer: Callable[[Any], Any] | None = None,
        clip: Callable[[Any], Any] | None = None,
        shared: Sequence[str] = (),
    ) -> None:
        """Checks that the loss is the sum, the mean, joint, or has the claimed multiples."""
        __tracebackhide__ = True
        from ensembles.checks.loss_scale.measurement import assert_loss_scaled

        measured = self.measure(
            model,
            batch,
            loss,
            outputs=outputs,
            member_loss=member_loss,
            optimizer=optimizer,
            clip=clip,
        )
        assert_loss_scaled(measured, claim, shared=shared)

    def assert_rates(
        self,
        model: Model,
        batch: Any,
        loss: Callable[[dict[str, Any]], Tensor],
        optimizer: Callable[[Any], Any],
        *,
        lr: Rates | None = None,
        weight_decay: float | None = None,
        warmup: float | None = None,
        outputs: Outputs | None = None,
        member_loss: Callable[[Any], Tensor] | None = None,
        scheduler: Callable[[Any], Any] | None = None,
        steps: int = 100,
    ) -> None:
        """Checks that every member trains as a single model at these rates does."""
        __tracebackhide__ = True
        from ensembles.checks.loss_scale.effective_rates import assert_rates_effective

        measured = self.measure(
            model,
            batch,
            loss,
            outputs=outputs,
            member_loss=member_loss,
            optimizer=optimizer,
            scheduler=scheduler,
            steps=steps,
        )
        assert_rates_effective(measured, lr=lr, weight_decay=weight_decay, warmup=warmup)


@pytest.fixture
def loss_scale() -> LossScaleFixture:
    """Promises that every member's gradient is the claimed multiple of its gradient alone.

    Catches a mean where the sum of losses is meant (under SGD: lr/M, and M times the weight
    decay), losses of the mean prediction, weights of members, parameters in common, clipping by one
    norm, and schedules with absolute rates, stepped for each member, or with a wrong warm-up.

    Example::

        def test_members_train_on_the_sum(loss_scale):
            members = [resnet18() for _ in range(4)]
            loss_scale.assert_scaled(members, torch.randn(4, 3, 32, 32), sum_of_losses, "sum")

    Prints on failure::

        members 0, 1, 2, 3 are claimed to train on the sum of their losses, and train on their mean

          0   expected 1   found 1/4   lr 0.1 acts as 0.025, weight decay 0.0005 as 0.002
          ...
    """
    return LossScaleFixture()
