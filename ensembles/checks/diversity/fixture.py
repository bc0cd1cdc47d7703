"""Fixture `member_diversity`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ensembles.checks.diversity.measurement import MemberDiversity
    from ensembles.subject import Members, Model, Outputs

__all__ = ["DiversityFixture", "member_diversity"]


class DiversityFixture:
    """What `member_diversity` gives to a test.

    The model is a function that builds it, which is called twice; or the model itself, of which
    construction is not looked at.
    """

    def measure(
        self,
        model: Model | Callable[[], Model],
        batch: Any = None,
        *,
        outputs: Outputs | None = None,
        members: Members | None = None,
    ) -> MemberDiversity:
        """What members have in common at the start: `measure_member_diversity`."""
        from ensembles.checks.diversity.measurement import measure_member_diversity

        return measure_member_diversity(model, batch, outputs=outputs, members=members)

    def assert_independent(
        self,
        model: Model | Callable[[], Model],
        batch: Any = None,
        *,
        outputs: Outputs | None = None,
        members: Members | None = None,
        alike: Sequence[str] = (),
        seeded: bool = False,
    ) -> None:
        """Checks that members differ in every drawn parameter and in their outputs.

        Parameters of the names `alike` (`fnmatch`) are in common by design; `seeded` members have
        a seed each, so that every construction gives the same ensemble.
        """
        __tracebackhide__ = True
        from ensembles.checks.diversity.measurement import assert_members_diverse

        measured = self.measure(model, batch, outputs=outputs, members=members)
        assert_members_diverse(measured, alike, seeded=seeded)


@pytest.fixture
def member_diversity() -> DiversityFixture:
    """Promises that members start different, in every drawn parameter and in their outputs.

    Catches copies of one initialised network, copies whose reset does not reach every layer, a
    constructor that seeds, one state dict loaded into several members, and permuted twins. Zeros,
    ones and pretrained weights may be in common.

    Example::

        def test_members_start_different(member_diversity):
            member_diversity.assert_independent(
                lambda: [resnet18() for _ in range(4)], torch.randn(4, 3, 32, 32))

    Prints on failure::

        members 0, 1 are claimed to start different, and are alike

          blocks.0.conv1.weight   equal in members 0, 1
          ...
    """
    return DiversityFixture()
