"""Fixture `state_hygiene`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from ensembles.checks.hygiene.measurement import StateHygiene
    from ensembles.subject import Model, Outputs

__all__ = ["HygieneFixture", "state_hygiene"]


class HygieneFixture:
    """What `state_hygiene` gives to a test."""

    def measure(
        self,
        model: Model,
        batch: Any,
        *,
        outputs: Outputs | None = None,
        optimizer: Callable[[Any], Any] | None = None,
        loss: Callable[[dict[str, Any]], Tensor] | None = None,
    ) -> StateHygiene:
        """What a model keeps, and what moves: `measure_state_hygiene`."""
        from ensembles.checks.hygiene.measurement import measure_state_hygiene

        return measure_state_hygiene(model, batch, outputs=outputs, optimizer=optimizer, loss=loss)

    def assert_clean(
        self,
        model: Model,
        batch: Any,
        *,
        updates: int = 1,
        outputs: Outputs | None = None,
        optimizer: Callable[[Any], Any] | None = None,
        loss: Callable[[dict[str, Any]], Tensor] | None = None,
    ) -> None:
        """Checks that state is registered, and moves only when it should.

        `updates` is how often norms update their statistics in one training step.
        """
        __tracebackhide__ = True
        from ensembles.checks.hygiene.measurement import assert_state_clean

        measured = self.measure(model, batch, outputs=outputs, optimizer=optimizer, loss=loss)
        assert_state_clean(measured, updates=updates)

    def assert_detached(self, snapshot: Any, model: Model) -> None:
        """Checks that a snapshot of weights is a copy, and not the live weights."""
        __tracebackhide__ = True
        from ensembles.checks.hygiene.measurement import assert_snapshot_detached

        assert_snapshot_detached(snapshot, model)


@pytest.fixture
def state_hygiene() -> HygieneFixture:
    """Promises that state is where PyTorch finds it, and moves only when it is claimed to.

    Catches modules and masks that nothing registers, eval() that does not reach every member,
    dropout in eval mode, forward passes that seed, caches that outlive the weights that they were
    made of, norms that update several times a step or though they are frozen, weights
    that drift in steps that do not use them, and snapshots that alias live weights.

    Example::

        def test_evaluation_changes_nothing(state_hygiene):
            state_hygiene.assert_clean(resnet18(), torch.randn(4, 3, 32, 32))

    Prints on failure::

        the model is claimed to keep its state in order, and does not

          model.mask                hidden tensor:    shape (64, 64), a plain attribute
          outputs under two seeds   random in eval:   differ by 3e-01: dropout
          ...
    """
    return HygieneFixture()
