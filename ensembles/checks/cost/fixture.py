"""Fixture `compute_cost`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from typing import Unpack

    from ensembles.case import Given
    from ensembles.checks.cost.claim import Budgets
    from ensembles.checks.cost.measurement import ComputeCost
    from ensembles.subject import Recipe

    class BudgetsAndRecipe(Budgets, Recipe, total=False):
        """Budgets as `assert_cost_within` takes them, and the recipe."""


__all__ = ["CostFixture", "compute_cost"]


class CostFixture:
    """What `compute_cost` gives to a test."""

    def measure(
        self, model: Given, batch: Any = None, *, training: bool = True, **recipe: Unpack[Recipe]
    ) -> ComputeCost:
        """FLOPs, parameters, bytes kept and zeros, by layer: `measure_compute_cost`."""
        from ensembles.checks.cost.measurement import measure_compute_cost

        return measure_compute_cost(model, batch, training=training, **recipe)

    def assert_within(
        self,
        model: Given,
        batch: Any = None,
        *,
        training: bool = True,
        **options: Unpack[BudgetsAndRecipe],
    ) -> None:
        """Checks that a call costs at most: flops, parameters, kept_bytes, wasted (a share), ..."""
        __tracebackhide__ = True
        self._check(model, batch, training, options, exact=False)

    def assert_exactly(
        self,
        model: Given,
        batch: Any = None,
        *,
        training: bool = True,
        **options: Unpack[BudgetsAndRecipe],
    ) -> None:
        """Checks that a call costs exactly this; budgets are those of `assert_within`."""
        __tracebackhide__ = True
        self._check(model, batch, training, options, exact=True)

    def _check(self, model: Any, batch: Any, training: bool, options: Any, *, exact: bool) -> None:
        __tracebackhide__ = True
        from ensembles.checks.cost.claim import BUDGETS, CostClaim
        from ensembles.checks.cost.judgement import judge
        from ensembles.message import assert_held

        claim = CostClaim({n: options.pop(n) for n in BUDGETS if n in options}, exact=exact)
        assert_held(judge(self.measure(model, batch, training=training, **options), claim))


@pytest.fixture
def compute_cost() -> CostFixture:
    """A call costs what is claimed: FLOPs, parameters, bytes kept for backward, and
    multiplications by structural zeros.

    Catches a masked subnet that costs as much as its parent, masked copies of weights that are
    kept for the backward pass, a tied weight that is stored twice, a network that runs twice.
    What is zero by structure is found exactly, and not guessed from values.

    Example::

        def test_a_subnet_multiplies_no_zeros(compute_cost):
            compute_cost.assert_within(subnet, torch.randn(2, 3, 32, 32), wasted=0)

    Prints on failure::

        a training step is claimed to spend at most 0 % of FLOPs on zeros, but spends 74.5 %

          in all     expected at most 0 % of FLOPs on zeros   found 74.5 % of FLOPs on zeros
          layer1.0                                            75.0 % of 884,736 FLOPs
          ...
    """  # noqa: D205 (the promise takes two lines)
    return CostFixture()
