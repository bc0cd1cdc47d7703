"""Fixture `member_data`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ensembles.case import Case
    from ensembles.checks.data.measurement import MemberData

__all__ = ["DataFixture", "member_data"]


class DataFixture:
    """What `member_data` gives to a test.

    `data` is a function of the member's number (or name, where `members` are names) to sample
    indices, a sampler or a loader; `size` is the number of samples in the data set.
    """

    def measure(
        self,
        data: Case | Callable[[Any], Iterable[Any]],
        members: int | Sequence[str] = 2,
        *,
        size: int | None = None,
    ) -> MemberData:
        """Which samples every member sees: `measure_member_data`."""
        from ensembles.checks.data.measurement import measure_member_data

        return measure_member_data(data, members, size=size)

    def assert_bagged(
        self,
        data: Case | Callable[[Any], Iterable[Any]],
        members: int | Sequence[str] = 2,
        *,
        size: int | None = None,
    ) -> None:
        """Checks that every member sees a bootstrap of its own, drawn with replacement."""
        __tracebackhide__ = True
        from ensembles.checks.data.judgement import assert_members_bagged

        assert_members_bagged(self.measure(data, members, size=size))

    def assert_paired(
        self, data: Case | Callable[[Any], Iterable[Any]], members: int | Sequence[str] = 2
    ) -> None:
        """Checks that all members see the same samples in the same order."""
        __tracebackhide__ = True
        from ensembles.checks.data.judgement import assert_members_paired

        assert_members_paired(self.measure(data, members))

    def assert_shuffled(
        self, data: Case | Callable[[Any], Iterable[Any]], members: int | Sequence[str] = 2
    ) -> None:
        """Checks that members see the same samples, and no two of them in the same order."""
        __tracebackhide__ = True
        from ensembles.checks.data.judgement import assert_members_shuffled

        assert_members_shuffled(self.measure(data, members))


@pytest.fixture
def member_data() -> DataFixture:
    """Members see the samples that they claim to see, in the claimed order.

    Catches bagged members that all get the same indices, bootstraps without replacement or drawn
    anew in every epoch, paired members whose loaders shuffle by themselves, and shuffled members
    that read in one order.

    Example::

        def test_members_are_bagged(member_data):
            member_data.assert_bagged(lambda member: bootstrap_indices(seed=member), 4)

    Prints on failure::

        members 0, 1, 2, 3 are claimed bagged, but see the same samples

          members 0, 1   the same 50000 samples in the same order
          ...
    """
    return DataFixture()
