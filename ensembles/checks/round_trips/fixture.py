"""Fixture `round_trip`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from typing import Unpack

    from ensembles.case import Given
    from ensembles.checks.round_trips.measurement import RoundTrips
    from ensembles.subject import Recipe

__all__ = ["RoundTripFixture", "round_trip"]


class RoundTripFixture:
    """What `round_trip` gives to a test."""

    def measure(
        self,
        model: Given,
        batch: Any = None,
        *,
        conversions: Sequence[str] | str = "all",
        factory: str | None = None,
        **recipe: Unpack[Recipe],
    ) -> RoundTrips:
        """What is left of a model after every conversion: `measure_round_trips`."""
        from ensembles.checks.round_trips.measurement import measure_round_trips

        return measure_round_trips(model, batch, conversions=conversions, factory=factory, **recipe)

    def assert_kept(
        self,
        model: Given,
        batch: Any = None,
        conversions: Sequence[str] | str = "all",
        *,
        factory: str | None = None,
        **recipe: Unpack[Recipe],
    ) -> None:
        """Checks that conversions keep ties, function, owners, parameters and the optimizer.

        Of "all", those that PyTorch itself breaks are let pass.
        """
        __tracebackhide__ = True
        from ensembles.checks.round_trips.judgement import assert_round_trips_kept

        measured = self.measure(model, batch, conversions=conversions, factory=factory, **recipe)
        assert_round_trips_kept(measured, conversions)


@pytest.fixture
def round_trip() -> RoundTripFixture:
    """What is copied, saved, loaded, cast, wrapped or compiled is still the model that it was.

    Catches ties that come apart, masks that no state_dict holds, copies that compute with the
    weights of their original, and an optimizer that is left with parameters of before.

    Example::

        def test_checkpoints_keep_the_model(round_trip):
            round_trip.assert_kept(resnet18, torch.randn(2, 3, 32, 32), ["state_dict", "deepcopy"])

    Prints on failure::

        the model is claimed to survive state_dict, deepcopy, but does not survive state_dict

          state_dict   outputs differ by 0.3 of the greatest (at most 8e-06 is rounding)
          (1 of 2 conversions)
          ...
    """
    return RoundTripFixture()
