"""Fixture `ownership_map`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from typing import Unpack

    from ensembles.case import Given
    from ensembles.checks.ownership.claim import Statement
    from ensembles.checks.ownership.measurement import OwnershipMap
    from ensembles.subject import Recipe

__all__ = ["OwnershipFixture", "ownership_map"]


class OwnershipFixture:
    """What `ownership_map` gives to a test."""

    def measure(self, model: Given, batch: Any = None, **recipe: Unpack[Recipe]) -> OwnershipMap:
        """Which members every scalar weight reaches: `measure_ownership_map`."""
        from ensembles.checks.ownership.measurement import measure_ownership_map

        return measure_ownership_map(model, batch, **recipe)

    def assert_independent(self, model: Given, batch: Any = None, **recipe: Unpack[Recipe]) -> None:
        """Checks that no weight moves more than one member."""
        __tracebackhide__ = True
        self.assert_owned(model, batch, "independent", **recipe)

    def assert_tied(self, model: Given, batch: Any = None, **recipe: Unpack[Recipe]) -> None:
        """Checks that every weight moves every member."""
        __tracebackhide__ = True
        self.assert_owned(model, batch, "tied", **recipe)

    def assert_owned(
        self,
        model: Given,
        batch: Any = None,
        claim: Statement | Mapping[str, Statement] = "independent",
        **recipe: Unpack[Recipe],
    ) -> None:
        """Checks a statement, or one for each pattern of names: `assert_ownership`."""
        __tracebackhide__ = True
        from ensembles.checks.ownership.judgement import assert_ownership

        assert_ownership(self.measure(model, batch, **recipe), claim)


@pytest.fixture
def ownership_map() -> OwnershipFixture:
    """Every scalar weight moves the outputs of exactly the members that own it.

    Catches members that mix inside packed and grouped layers, subnets that read another's block
    or an empty group, a stem that is not tied, weights that reach nobody. Right where storage is
    blind: masks, groups, low-rank factors; dead ReLUs and dropout hide nothing.

    Example::

        def test_subnets_partition_the_parent(ownership_map):
            ownership_map.assert_owned(subnet_resnet18(width=2), torch.randn(2, 3, 32, 32), {
                "parent.conv1.weight": Partition(times=2),
                "parent.layer*.conv?.weight": "partition",
                "parent.layer*.downsample.0.weight": "partition",
                "*": "independent",
            })

    Prints on failure::

        weights of members 0, 1 are claimed independent, but leak into other members

          mix.weight[:, 0:4]   expected one member   found members 0, 1 (32 elements)
          ...
    """
    return OwnershipFixture()
