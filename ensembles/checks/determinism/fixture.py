"""Fixture `seeded_determinism`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from ensembles.checks.determinism.measurement import Determinism
    from ensembles.subject import Members, Model, Outputs

__all__ = ["DeterminismFixture", "seeded_determinism"]


class DeterminismFixture:
    """What `seeded_determinism` gives to a test."""

    def measure(
        self,
        make: Callable[[], Model],
        batch: Any = None,
        *,
        outputs: Outputs | None = None,
        members: Members | None = None,
        optimizer: Callable[[Any], Any] | None = None,
        loss: Callable[[dict[str, Any]], Tensor] | None = None,
        clip: Callable[[Any], Any] | None = None,
        scheduler: Callable[[Any], Any] | None = None,
        steps: int = 2,
        factory: str | None = None,
    ) -> Determinism:
        """What two runs from one seed have in common: `measure_determinism`."""
        from ensembles.checks.determinism.measurement import measure_determinism

        return measure_determinism(
            make,
            batch,
            outputs=outputs,
            members=members,
            optimizer=optimizer,
            loss=loss,
            clip=clip,
            scheduler=scheduler,
            steps=steps,
            factory=factory,
        )

    def assert_bitwise(
        self,
        make: Callable[[], Model],
        batch: Any = None,
        *,
        outputs: Outputs | None = None,
        members: Members | None = None,
        optimizer: Callable[[Any], Any] | None = None,
        loss: Callable[[dict[str, Any]], Tensor] | None = None,
        clip: Callable[[Any], Any] | None = None,
        scheduler: Callable[[Any], Any] | None = None,
        steps: int = 2,
        factory: str | None = None,
        loaded: bool = False,
    ) -> None:
        """Checks that one seed gives the same bits, and another seed other weights.

        With `factory="package.module:factory"` also in two new processes, which import it. With
        `loaded` the weights come from a file, and need not depend on the seed.
        """
        __tracebackhide__ = True
        from ensembles.checks.determinism.measurement import assert_deterministic

        measured = self.measure(
            make,
            batch,
            outputs=outputs,
            members=members,
            optimizer=optimizer,
            loss=loss,
            clip=clip,
            scheduler=scheduler,
            steps=steps,
            factory=factory,
        )
        assert_deterministic(measured, loaded=loaded)

    def assert_loader(
        self,
        make_loader: Callable[[], Iterable[Any]],
        *,
        augmented: bool = True,
        epochs: int = 2,
    ) -> None:
        """Checks that batches repeat under the seed, and that no worker or epoch repeats another.

        Without `augmented`, nothing random is expected to happen to a sample, or to their order.
        """
        __tracebackhide__ = True
        from ensembles.checks.determinism.loaders import (
            assert_loader_deterministic,
            measure_loader_determinism,
        )

        measured = measure_loader_determinism(make_loader, epochs=epochs)
        assert_loader_deterministic(measured, augmented=augmented)


@pytest.fixture
def seeded_determinism() -> Iterator[DeterminismFixture]:
    """Promises that one seed gives the same bits, in construction and in every training step.

    Catches weights drawn at import or before seeding, a factory that ignores the seed, a
    constructor that calls `torch.manual_seed(0)`, seeds from the clock, the order of sets,
    operations that do not repeat, data loader workers that repeat one random stream, and epochs
    that repeat one shuffled order. For the length of the test the seeds of Python, numpy, torch and
    CUDA, deterministic algorithms, the cuDNN flags and CUBLAS_WORKSPACE_CONFIG are set; afterwards
    all is as it was.

    Example::

        def test_one_seed_gives_the_same_bits(seeded_determinism):
            seeded_determinism.assert_bitwise(resnet18, torch.randn(4, 3, 32, 32))

    Prints on failure::

        one seed is claimed to give the same bits, and two runs from seed 1729 part in step 1

          step 1   operation forward of model.layer1.0.drop (NoiseLayer)   94 differ
          ...
    """
    from ensembles.checks.determinism.seeding import seeded
    from ensembles.present_run import seed

    with seeded(seed.get()):
        yield DeterminismFixture()
