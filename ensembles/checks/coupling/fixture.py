"""Fixture `gradient_coupling`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from typing import Unpack

    from ensembles.case import Given
    from ensembles.checks.coupling.measurement import GradientCoupling
    from ensembles.subject import Recipe

__all__ = ["CouplingFixture", "gradient_coupling"]


class CouplingFixture:
    """What `gradient_coupling` gives to a test."""

    def measure(
        self, model: Given, batch: Any = None, **recipe: Unpack[Recipe]
    ) -> GradientCoupling:
        """What a step on each member moves of the others: `measure_gradient_coupling`."""
        from ensembles.checks.coupling.measurement import measure_gradient_coupling

        return measure_gradient_coupling(model, batch, **recipe)

    def assert_independent(self, model: Given, batch: Any = None, **recipe: Unpack[Recipe]) -> None:
        """Checks that a step on one member moves nothing of another: outputs, weights, buffers."""
        __tracebackhide__ = True
        from ensembles.checks.coupling.judgement import assert_members_uncoupled

        assert_members_uncoupled(self.measure(model, batch, **recipe))

    def assert_tied(self, model: Given, batch: Any = None, **recipe: Unpack[Recipe]) -> None:
        """Checks that a step on any member moves all others."""
        __tracebackhide__ = True
        from ensembles.checks.coupling.judgement import assert_members_coupled

        assert_members_coupled(self.measure(model, batch, **recipe))

    def assert_tied_to(
        self, model: Given, batch: Any = None, parent: str = "parent", **recipe: Unpack[Recipe]
    ) -> None:
        """Checks that a step on any subnet moves the parent, and a step on the parent all."""
        __tracebackhide__ = True
        from ensembles.checks.coupling.judgement import assert_members_coupled_to

        assert_members_coupled_to(self.measure(model, batch, **recipe), parent)


@pytest.fixture
def gradient_coupling() -> CouplingFixture:
    """A training step on one member moves that member only, or all that are tied to it.

    Catches members that are one network, packed members that mix (groups=1, a channel shuffle, a
    norm over all channels), features read from another member even where they are detached,
    BatchNorm statistics of two members, and a loss on the mean prediction.

    Example::

        def test_members_train_independently(gradient_coupling):
            gradient_coupling.assert_independent(
                [resnet18() for _ in range(4)], torch.randn(4, 3, 32, 32))

    Prints on failure::

        members 0, 1 are claimed to train independently, but a training step on one moves another

          step on 0   moves 1 by up to 2e-02 (output), 4e-02 (buffer 1.running_mean)
          ...
    """
    return CouplingFixture()
