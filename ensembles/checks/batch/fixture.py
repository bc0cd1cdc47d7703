"""Fixture `batch_independence`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ensembles.checks.batch.measurement import BatchIndependence
    from ensembles.subject import Model, Outputs

__all__ = ["BatchFixture", "batch_independence"]


class BatchFixture:
    """What `batch_independence` gives to a test.

    `axis` and `output_axis` are the axes of the rows in the batch and in each member's output.
    """

    def measure(
        self,
        model: Model,
        batch: Any,
        *,
        outputs: Outputs | None = None,
        training: bool = False,
        axis: int = 0,
        output_axis: int = 0,
    ) -> BatchIndependence:
        """Which rows of a batch reach which others: `measure_batch_independence`."""
        from ensembles.checks.batch.measurement import measure_batch_independence

        return measure_batch_independence(
            model, batch, outputs=outputs, training=training, axis=axis, output_axis=output_axis
        )

    def assert_rows(
        self,
        model: Model,
        batch: Any,
        *,
        outputs: Outputs | None = None,
        training: bool = False,
        axis: int = 0,
        output_axis: int = 0,
    ) -> None:
        """Checks that every row of the output depends on its own row of the input only.

        In eval mode; with `training` in training mode, but for BatchNorm, which mixes rows there.
        """
        __tracebackhide__ = True
        from ensembles.checks.batch.measurement import assert_rows_independent

        measured = self.measure(
            model, batch, outputs=outputs, training=training, axis=axis, output_axis=output_axis
        )
        assert_rows_independent(measured)


@pytest.fixture
def batch_independence() -> BatchFixture:
    """Promises that row i of the output depends on row i of the input, and on no other row.

    Catches a view where a permute is meant, a norm over the batch in eval mode, attention that
    takes the batch for the sequence, a softmax or maximum over all rows, and outputs that depend
    on the place of a row or on their number. By values bit by bit, and by gradients.

    Example::

        def test_samples_do_not_mix(batch_independence):
            batch_independence.assert_rows(PackedNet(members=4), torch.randn(4, 3, 32, 32))

    Prints on failure::

        rows of a batch are claimed independent, and reach each other in eval mode

          member 0   input row 0 reaches output rows 1, 2, 3   by 0.51 of the largest
          ...
          (12 of 12 pairs of different rows; first seen in encoder.attention (MultiheadAttention))
    """
    return BatchFixture()
