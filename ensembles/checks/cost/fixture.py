"""Fixture `compute_cost`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ensembles.checks.cost.measurement import ComputeCost
    from ensembles.subject import Model, Outputs

__all__ = ["CostFixture", "compute_cost"]


class CostFixture:
    """What `compute_cost` gives to a test."""

    def measure(
        self, model: Model, batch: Any, *, outputs: Outputs | None = None, training: bool = True
    ) -> ComputeCost:
        """FLOPs, parameters, bytes kept and zeros, by layer: `measure_compute_cost`."""
        from ensembles.checks.cost.measurement import measure_compute_cost

        return measure_compute_cost(model, batch, outputs=outputs, training=training)

    def assert_within(
        self,
        model: Model,
        batch: Any,
        *,
        outputs: Outputs | None = None,
        training: bool = True,
        **budgets: Any,
    ) -> None:
        """Checks that a call costs at most: flops, parameters, kept_bytes, wasted (a share)."""
        __tracebackhide__ = True
        from ensembles.checks.cost.measurement import assert_cost_within

        cost = self.measure(model, batch, outputs=outputs, training=training)
        assert_cost_within(cost, **budgets)

    def assert_exactly(
        self,
        model: Model,
        batch: Any,
        *,
        outputs: Outputs | None = None,
        training: bool = True,
        **claims: Any,
    ) -> None:
        """Checks that a call costs exactly this: the budgets, and forward, backward, buffers."""
        __tracebackhide__ = True
        from ensembles.checks.cost.measurement import assert_cost_equals

        cost = self.measure(model, batch, outputs=outputs, training=training)
        assert_cost_equals(cost, **claims)


@pytest.fixture
def compute_cost() -> CostFixture:
    """Promises that a call of the model costs what is claimed, in whole numbers, by layer.

    Catches a masked subnet that costs as much as its parent, masked copies of weights that are
    kept for the backward pass, a tied weight that is stored twice, a network that runs twice.
    What is zero by structure is found exactly, and not guessed from values.

    Example::

        def test_a_subnet_multiplies_no_zeros(compute_cost):
            compute_cost.assert_within(subnet, torch.randn(2, 3, 32, 32), wasted=0)

    Prints on failure::

        a training step is claimed to take at most 0 % of FLOPs on zeros, and takes more

          in all     expected at most 0 % of FLOPs on zeros   found 74.5 % of FLOPs on zeros
          layer1.0                                            75.0 % of 884,736 FLOPs
          ...
    """
    return CostFixture()
