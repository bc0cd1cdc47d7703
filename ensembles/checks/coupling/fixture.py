"""Fixture `gradient_coupling`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from ensembles.checks.coupling.measurement import GradientCoupling
    from ensembles.subject import Members, Model, Outputs

__all__ = ["CouplingFixture", "gradient_coupling"]


class CouplingFixture:
    """What `gradient_coupling` gives to a test.

    Every method takes the same arguments: `outputs` and `members` find the members in one module,
    `optimizer` is a function of the model, `loss` one of the dict of member outputs.
    """

    def measure(
        self,
        model: Model,
        batch: Any,
        *,
        outputs: Outputs | None = None,
        members: Members | None = None,
        optimizer: Callable[[Any], Any] | None = None,
        loss: Callable[[dict[str, Any]], Tensor] | None = None,
    ) -> GradientCoupling:
        """What a step on each member moves of the others: `measure_gradient_coupling`."""
        from ensembles.checks.coupling.measurement import measure_gradient_coupling

        return measure_gradient_coupling(
            model, batch, outputs=outputs, members=members, optimizer=optimizer, loss=loss
        )

    def assert_independent(
        self,
        model: Model,
        batch: Any,
        *,
        outputs: Outputs | None = None,
        members: Members | None = None,
        optimizer: Callable[[Any], Any] | None = None,
        loss: Callable[[dict[str, Any]], Tensor] | None = None,
    ) -> None:
        """Checks that a step on one member moves nothing of another: outputs, weights, buffers."""
        __tracebackhide__ = True
        from ensembles.checks.coupling.measurement import assert_members_uncoupled

        assert_members_uncoupled(
            self.measure(
                model, batch, outputs=outputs, members=members, optimizer=optimizer, loss=loss
            )
        )

    def assert_tied(
        self,
        model: Model,
        batch: Any,
        *,
        outputs: Outputs | None = None,
        members: Members | None = None,
        optimizer: Callable[[Any], Any] | None = None,
    ) -> None:
        """Checks that a step on any member moves all others."""
        __tracebackhide__ = True
        from ensembles.checks.coupling.measurement import assert_members_coupled

        assert_members_coupled(
            self.measure(model, batch, outputs=outputs, members=members, optimizer=optimizer)
        )

    def assert_tied_to(
        self,
        model: Model,
        batch: Any,
        parent: str,
        *,
        outputs: Outputs | None = None,
        members: Members | None = None,
        optimizer: Callable[[Any], Any] | None = None,
    ) -> None:
        """Checks that a step on any subnet moves the parent, and a step on the parent all."""
        __tracebackhide__ = True
        from ensembles.checks.coupling.measurement import assert_members_coupled_to

        assert_members_coupled_to(
            self.measure(model, batch, outputs=outputs, members=members, optimizer=optimizer),
            parent,
        )


@pytest.fixture
def gradient_coupling() -> CouplingFixture:
    """Promises that a training step on one member moves that member only, or all that are tied.

    Catches members that are one network, packed members that mix (groups=1, a channel shuffle, a
    norm over all channels), features read from another member even where they are detached,
    BatchNorm statistics of two members, and a loss on the mean prediction.

    Example::

        def test_members_train_independently(gradient_coupling):
            gradient_coupling.assert_independent(
                [resnet18() for _ in range(4)], torch.randn(4, 3, 32, 32))

    Prints on failure::

        members 0, 1 are claimed to train independently, and a training step on one moves another

          step on 0   moves 1:   buffer 1.running_mean by 3e-02, buffer 1.running_var by 9e-02
          ...
    """
    return CouplingFixture()
