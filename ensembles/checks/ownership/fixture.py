"""Fixture `ownership_map`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ensembles.checks.ownership.measurement import OwnershipMap, Statement
    from ensembles.subject import Model, Outputs

__all__ = ["OwnershipFixture", "ownership_map"]


class OwnershipFixture:
    """What `ownership_map` gives to a test."""

    def measure(self, model: Model, batch: Any, *, outputs: Outputs | None = None) -> OwnershipMap:
        """Which members every scalar weight reaches: `measure_ownership_map`."""
        from ensembles.checks.ownership.measurement import measure_ownership_map

        return measure_ownership_map(model, batch, outputs=outputs)

    def assert_independent(
        self, model: Model, batch: Any, *, outputs: Outputs | None = None
    ) -> None:
        """Checks that no weight moves more than one member."""
        __tracebackhide__ = True
        self.assert_owned(model, batch, "independent", outputs=outputs)

    def assert_tied(self, model: Model, batch: Any, *, outputs: Outputs | None = None) -> None:
        """Checks that every weight moves every member."""
        __tracebackhide__ = True
        self.assert_owned(model, batch, "tied", outputs=outputs)

    def assert_owned(
        self,
        model: Model,
        batch: Any,
        claim: Statement | Mapping[str, Statement],
        *,
        outputs: Outputs | None = None,
    ) -> None:
        """Checks a statement, or one for each pattern of names: `assert_ownership`."""
        __tracebackhide__ = True
        from ensembles.checks.ownership.measurement import assert_ownership

        assert_ownership(self.measure(model, batch, outputs=outputs), claim)


@pytest.fixture
def ownership_map() -> OwnershipFixture:
    """Promises that every scalar weight moves exactly the members that are claimed to own it.

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

        weights of members a, b are claimed independent, and leak into other members

          mix.weight   [:, 0:4]   expected one member   found members a, b
          ...
    """
    return OwnershipFixture()
