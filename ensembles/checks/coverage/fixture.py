"""Fixture `optimizer_coverage`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from typing import Unpack

    from ensembles.case import Case
    from ensembles.checks.coverage.measurement import OptimizerCoverage
    from ensembles.subject import Model, Recipe

__all__ = ["CoverageFixture", "optimizer_coverage"]


class CoverageFixture:
    """What `optimizer_coverage` gives to a test."""

    def measure(
        self, model: Case | Model, batch: Any = None, **recipe: Unpack[Recipe]
    ) -> OptimizerCoverage:
        """What training reaches, and what it does not: `measure_optimizer_coverage`."""
        from ensembles.checks.coverage.measurement import measure_optimizer_coverage

        return measure_optimizer_coverage(model, batch, **recipe)

    def assert_complete(
        self, model: Case | Model, batch: Any = None, **recipe: Unpack[Recipe]
    ) -> None:
        """Checks that every trainable parameter is stepped exactly once and has a gradient.

        `optimizer=` is an optimizer, a list of them, or a function of the model.
        """
        __tracebackhide__ = True
        from ensembles.checks.coverage.judgement import assert_optimizer_complete

        assert_optimizer_complete(self.measure(model, batch, **recipe))


@pytest.fixture
def optimizer_coverage() -> CoverageFixture:
    """The optimizer steps every trainable parameter exactly once, and each gets a gradient.

    Catches parameters in no group or in two, an optimizer that is older than the model, members
    in a Python list, `nn.Parameter(...).to(device)`, branches cut by detach or no_grad, and
    `module.requires_grad = False`. Zero-initialised branches and dead ReLUs are no findings.

    Example::

        def test_everything_is_trained(optimizer_coverage):
            model = resnet18()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            images = torch.randn(4, 3, 32, 32)
            optimizer_coverage.assert_complete(model, images, optimizer=optimizer)

    Prints on failure::

        every trainable parameter is claimed to get a gradient and exactly one step, but some are in
        no group of the optimizer

          model.fc.weight                     missing:   in no group
          optimizer 0, group 0, position 60   stale:     tensor of shape (5, 512), not in the model
          ...
    """
    return CoverageFixture()
