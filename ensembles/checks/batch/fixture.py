"""Fixture `batch_independence`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from typing import Unpack

    from ensembles.case import Case
    from ensembles.checks.batch.measurement import BatchIndependence
    from ensembles.subject import Model, Recipe

__all__ = ["BatchFixture", "batch_independence"]


class BatchFixture:
    """What `batch_independence` gives to a test.

    `axis` and `output_axis` are the axes of the rows in the batch and in each member's output.
    """

    def measure(
        self,
        model: Case | Model,
        batch: Any = None,
        *,
        training: bool = False,
        axis: int = 0,
        output_axis: int = 0,
        **recipe: Unpack[Recipe],
    ) -> BatchIndependence:
        """Which rows of a batch reach which others: `measure_batch_independence`."""
        from ensembles.checks.batch.measurement import measure_batch_independence

        axes = {"axis": axis, "output_axis": output_axis}
        return measure_batch_independence(model, batch, training=training, **axes, **recipe)

    def assert_rows(
        self,
        model: Case | Model,
        batch: Any = None,
        *,
        training: bool = False,
        axis: int = 0,
        output_axis: int = 0,
        **recipe: Unpack[Recipe],
    ) -> None:
        """Checks that every row of the output depends on its own row of the input only.

        It looks in eval mode. With `training` it looks in training mode, except for BatchNorm,
        which mixes rows there by design.
        """
        __tracebackhide__ = True
        from ensembles.checks.batch.judgement import assert_rows_independent

        axes = {"axis": axis, "output_axis": output_axis}
        assert_rows_independent(self.measure(model, batch, training=training, **axes, **recipe))


@pytest.fixture
def batch_independence() -> BatchFixture:
    """Row i of the output depends on row i of the input only.

    Catches a view where a permute is meant, a norm over the batch in eval mode, attention that
    takes the batch for the sequence, a softmax or maximum over all rows, and outputs that depend
    on the place of a row or on their number. It compares values bit by bit, and gradients.

    Example::

        def test_samples_do_not_mix(batch_independence):
            batch_independence.assert_rows(PackedNet(members=4), torch.randn(4, 3, 32, 32))

    Prints on failure::

        rows of a batch are claimed independent, but reach each other in eval mode

          encoder.attention (MultiheadAttention)   is the first module that mixes them
          member 0, input row 0                    reaches output rows 1, 2, 3 by 0.51 of ...
          ...
    """
    return BatchFixture()
