"""Fixture `optimizer_coverage`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from ensembles.checks.coverage.measurement import OptimizerCoverage
    from ensembles.subject import Model, Outputs

__all__ = ["CoverageFixture", "optimizer_coverage"]


class CoverageFixture:
    """What `optimizer_coverage` gives to a test."""

    def measure(
        self,
        model: Model,
        optimizer: Any = None,
        batch: Any = None,
        *,
        outputs: Outputs | None = None,
        loss: Callable[[dict[str, Any]], Tensor] | None = None,
    ) -> OptimizerCoverage:
        """What training reaches, and what it does not: `measure_optimizer_coverage`."""
        from ensembles.checks.coverage.measurement import measure_optimizer_coverage

        return measure_optimizer_coverage(model, optimizer, batch, outputs=outputs, loss=loss)

    def assert_complete(
        self,
        model: Model,
        optimizer: Any = None,
        batch: Any = None,
        *,
        outputs: Outputs | None = None,
        loss: Callable[[dict[str, Any]], Tensor] | None = None,
    ) -> None:
        """Checks that every trainable parameter is stepped exactly once and has a gradient.

        `optimizer` is an optimizer, a list of them, or a function of the model.
        """
        __tracebackhide__ = True
        from ensembles.checks.coverage.measurement import assert_optimizer_complete

        assert_optimizer_complete(self.measure(model, optimizer, batch, outputs=outputs, loss=loss))


@pytest.fixture
def optimizer_coverage() -> CoverageFixture:
    """Promises that training reaches every trainable parameter, and steps each exactly once.

    Catches parameters in no group or in two, an optimizer that is older than the model, members
    in a Python list, `nn.Parameter(...).to(device)`, branches cut by detach or no_grad, and
    `module.requires_grad = False`. Zero-initialised branches and dead ReLUs are no findings.

    Example::

        def test_everything_is_trained(optimizer_coverage):
            model = resnet18()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            optimizer_coverage.assert_complete(model, optimizer, torch.randn(4, 3, 32, 32))

    Prints on failure::

        training is claimed to reach every trainable parameter exactly once, and does not

          model.fc.weight                      missing:   in no group
          optimizer 0, group 0, position 60    stale:     shape (1000, 512), not in the model
          ...
    """
    return CoverageFixture()
