"""Fixture `state_hygiene`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from typing import Unpack

    from ensembles.case import Case
    from ensembles.checks.hygiene.measurement import StateHygiene
    from ensembles.subject import Model, Recipe

__all__ = ["HygieneFixture", "state_hygiene"]


class HygieneFixture:
    """What `state_hygiene` gives to a test."""

    def measure(
        self, model: Case | Model, batch: Any = None, **recipe: Unpack[Recipe]
    ) -> StateHygiene:
        """What a model keeps, and what moves: `measure_state_hygiene`."""
        from ensembles.checks.hygiene.measurement import measure_state_hygiene

        return measure_state_hygiene(model, batch, **recipe)

    def assert_clean(
        self,
        model: Case | Model,
        batch: Any = None,
        *,
        updates: int = 1,
        **recipe: Unpack[Recipe],
    ) -> None:
        """Checks that state is registered, and moves only when it should.

        `updates` is how often norms update their statistics in one training step.
        """
        __tracebackhide__ = True
        from ensembles.checks.hygiene.judgement import assert_state_clean

        assert_state_clean(self.measure(model, batch, **recipe), updates=updates)

    def assert_detached(self, snapshot: Any, model: Model) -> None:
        """Checks that a snapshot of weights is a copy, and not the live weights."""
        __tracebackhide__ = True
        from ensembles.checks.hygiene.judgement import assert_snapshot_detached

        assert_snapshot_detached(snapshot, model)


@pytest.fixture
def state_hygiene() -> HygieneFixture:
    """State is registered, and it moves only when it should.

    Catches modules and masks that nothing registers, eval() that does not reach every member,
    dropout in eval mode, forward passes that seed, caches that outlive the weights that they were
    made of, norms that update several times a step or though they are frozen, weights that drift in
    steps that do not use them, and snapshots that are the live weights.

    Example::

        def test_evaluation_changes_nothing(state_hygiene):
            state_hygiene.assert_clean(resnet18(), torch.randn(4, 3, 32, 32))

    Prints on failure::

        state is claimed to be registered and to move only when it should, but a call computes with
        tensors that are not registered

          model.mask                hidden tensor:    shape (64, 64), kept as a plain attribute
          outputs under two seeds   random in eval:   differ by 3e-01 because of dropout
          ...
    """
    return HygieneFixture()
