"""Fixture `member_diversity`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from typing import Unpack

    from ensembles.case import Case
    from ensembles.checks.diversity.measurement import MemberDiversity
    from ensembles.subject import Model, Recipe

__all__ = ["DiversityFixture", "member_diversity"]


class DiversityFixture:
    """What `member_diversity` gives to a test.

    The model is a function that builds it; or the model itself, of which construction is not seen.
    """

    def measure(
        self,
        model: Case | Model | Callable[[], Model],
        batch: Any = None,
        **recipe: Unpack[Recipe],
    ) -> MemberDiversity:
        """What members have in common at the start: `measure_member_diversity`."""
        from ensembles.checks.diversity.measurement import measure_member_diversity

        return measure_member_diversity(model, batch, **recipe)

    def assert_independent(
        self,
        model: Case | Model | Callable[[], Model],
        batch: Any = None,
        *,
        alike: Sequence[str] = (),
        seeded: bool = False,
        **recipe: Unpack[Recipe],
    ) -> None:
        """Checks that members differ in every drawn parameter and in their outputs.

        Parameters of the names `alike` (`fnmatch`) are in common by design; `seeded` members have
        a seed each, so that every construction gives the same ensemble.
        """
        __tracebackhide__ = True
        from ensembles.checks.diversity.judgement import assert_members_diverse

        assert_members_diverse(self.measure(model, batch, **recipe), alike, seeded=seeded)


@pytest.fixture
def member_diversity() -> DiversityFixture:
    """Members start different in every parameter that is drawn, and in their outputs.

    Catches copies of one initialised network, a reset that misses a layer, a constructor that
    seeds, one state dict loaded into several members, and permuted twins. Zeros, ones and
    pretrained weights may be in common.

    Example::

        def test_members_start_different(member_diversity):
            member_diversity.assert_independent(
                lambda: [resnet18() for _ in range(4)], torch.randn(4, 3, 32, 32))

    Prints on failure::

        members 0, 1, 2, 3 are claimed to start different, but are alike

          blocks.0.conv1.weight   equal in members 0, 1
          ...
    """
    return DiversityFixture()
