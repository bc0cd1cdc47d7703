"""Fixture `parameter_sharing`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from typing import Unpack

    from ensembles.case import Case
    from ensembles.checks.sharing.measurement import ParameterSharing
    from ensembles.subject import Model, Recipe

__all__ = ["SharingFixture", "parameter_sharing"]


class SharingFixture:
    """What `parameter_sharing` gives to a test."""

    def measure(
        self, model: Case | Model, batch: Any = None, **recipe: Unpack[Recipe]
    ) -> ParameterSharing:
        """Which parameters and buffers are the same memory: `measure_parameter_sharing`."""
        from ensembles.checks.sharing.measurement import measure_parameter_sharing

        return measure_parameter_sharing(model, batch, **recipe)

    def assert_independent(
        self, model: Case | Model, batch: Any = None, **recipe: Unpack[Recipe]
    ) -> None:
        """Checks that no two members share a parameter or buffer, not even in part."""
        __tracebackhide__ = True
        self.assert_shared(model, (), batch, **recipe)

    def assert_tied(self, model: Case | Model, batch: Any = None, **recipe: Unpack[Recipe]) -> None:
        """Checks that the members are one network: every parameter and buffer is shared."""
        __tracebackhide__ = True
        self.assert_shared(model, ("*",), batch, **recipe)

    def assert_shared(
        self,
        model: Case | Model,
        names: Sequence[str],
        batch: Any = None,
        **recipe: Unpack[Recipe],
    ) -> None:
        """Checks that members share the parameters of these names (`fnmatch`), and no others."""
        __tracebackhide__ = True
        from ensembles.checks.sharing.judgement import assert_members_share

        assert_members_share(self.measure(model, batch, **recipe), names)

    def assert_distinct(
        self, model: Case | Model, batch: Any = None, **recipe: Unpack[Recipe]
    ) -> None:
        """Checks that no memory belongs to two parameter objects: ties are one object."""
        __tracebackhide__ = True
        from ensembles.checks.sharing.judgement import assert_parameters_distinct

        assert_parameters_distinct(self.measure(model, batch, **recipe))


@pytest.fixture
def parameter_sharing() -> SharingFixture:
    """Members share exactly the memory that they claim to share.

    Catches one module under several names, "tied" weights that are copies, and a layer that came
    from a default argument or a registry. It needs no batch, is exact for views, and works on meta.

    Example::

        def test_members_share_nothing(parameter_sharing):
            parameter_sharing.assert_independent([resnet18() for _ in range(4)])

    Prints on failure::

        members 0, 1, 2, 3 are claimed independent, but share parameters

          conv1.weight   one tensor in members 0, 1, 2, 3
          ...
    """
    return SharingFixture()
