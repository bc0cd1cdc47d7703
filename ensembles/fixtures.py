"""The product: every fixture with its promise, an example, and the failure that it prints.

Each fixture is a small object with `measure` and with one `assert_...` for each claim. The
assertions take the model itself, and print a message that says where, how much, the likely
cause, and the command that replays it.

This file is loaded in every pytest run on the machine: it imports nothing but pytest until a
fixture is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ensembles.checks.sharing import ParameterSharing
    from ensembles.subject import Members, Model

__all__ = ["SharingFixture", "parameter_sharing"]


class SharingFixture:
    """What `parameter_sharing` gives to a test."""

    def measure(self, model: Model, *, members: Members | None = None) -> ParameterSharing:
        """Which parameters and buffers are the same memory: `measure_parameter_sharing`."""
        from ensembles.checks.sharing import measure_parameter_sharing

        return measure_parameter_sharing(model, members=members)

    def assert_independent(self, model: Model, *, members: Members | None = None) -> None:
        """Checks that no two members share a parameter or buffer, not even in part."""
        __tracebackhide__ = True
        self.assert_shared(model, (), members=members)

    def assert_tied(self, model: Model, *, members: Members | None = None) -> None:
        """Checks that the members are one network: every parameter and buffer is shared."""
        __tracebackhide__ = True
        self.assert_shared(model, ("*",), members=members)

    def assert_shared(
        self, model: Model, names: Sequence[str], *, members: Members | None = None
    ) -> None:
        """Checks that members share the parameters of these names (`fnmatch`), and no others."""
        __tracebackhide__ = True
        from ensembles.checks.sharing import assert_members_share, assert_parameters_distinct

        measured = self.measure(model, members=members)
        assert_parameters_distinct(measured)
        assert_members_share(measured, names)

    def assert_distinct(self, model: Model) -> None:
        """Checks that no memory belongs to two parameter objects: ties are one object."""
        __tracebackhide__ = True
        from ensembles.checks.sharing import assert_parameters_distinct

        assert_parameters_distinct(self.measure(model))


@pytest.fixture
def parameter_sharing() -> SharingFixture:
    """Promises that members share exactly the memory that they claim to share.

    Catches one module under several names, "tied" weights that are copies, a layer that came
    from a default argument or a registry. Needs no batch; exact for views; works on meta.

    Example::

        def test_members_share_nothing(parameter_sharing):
            parameter_sharing.assert_independent([resnet18() for _ in range(4)])

    Prints on failure::

        members 0, 1, 2, 3 are claimed independent, and share parameters

          conv1.weight   one tensor in members 0, 1, 2, 3
          ...
    """
    return SharingFixture()
