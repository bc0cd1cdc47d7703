"""Fixture `round_trip`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ensembles.checks.round_trips.measurement import RoundTrips
    from ensembles.subject import Model, Outputs

__all__ = ["RoundTripFixture", "round_trip"]


class RoundTripFixture:
    """What `round_trip` gives to a test."""

    def measure(
        self,
        make: Callable[[], Model],
        batch: Any,
        *,
        outputs: Outputs | None = None,
        conversions: Sequence[str] | str = "all",
        factory: str | None = None,
    ) -> RoundTrips:
        """What is left of a model after every conversion: `measure_round_trips`."""
        from ensembles.checks.round_trips.measurement import measure_round_trips

        return measure_round_trips(
            make, batch, outputs=outputs, conversions=conversions, factory=factory
        )

    def assert_kept(
        self,
        make: Callable[[], Model],
        batch: Any,
        conversions: Sequence[str] | str = "all",
        *,
        outputs: Outputs | None = None,
        factory: str | None = None,
    ) -> None:
        """Checks that conversions keep ties, function, owners, parameters and the optimizer.

        Of "all", those that PyTorch itself breaks are let pass.
        """
        __tracebackhide__ = True
        from ensembles.checks.round_trips.measurement import assert_round_trips_kept

        measured = self.measure(
            make, batch, outputs=outputs, conversions=conversions, factory=factory
        )
        assert_round_trips_kept(measured, conversions)


@pytest.fixture
def round_trip() -> RoundTripFixture:
    """Promises that what is copied, saved, loaded, cast or wrapped is still the model that it was.

    Catches ties that come apart, masks that no state_dict holds, copies that compute with the
    weights of their original, and an optimizer that is left with parameters of before.

    Example::

        def test_checkpoints_keep_the_model(round_trip):
            round_trip.assert_kept(resnet18, torch.randn(2, 3, 32, 32), ["state_dict", "deepcopy"])

    Prints on failure::

        the model is claimed to survive state_dict, deepcopy, and does not

          state_dict   function: outputs differ by 4e-01 of the greatest (at most 1e-06)
          ...
    """
    return RoundTripFixture()
