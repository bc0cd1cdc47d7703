"""Fixture `seeded_determinism`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from typing import Unpack

    from ensembles.case import Case
    from ensembles.checks.determinism.measurement import Determinism
    from ensembles.subject import Model, Recipe

__all__ = ["DeterminismFixture", "seeded_determinism"]


class DeterminismFixture:
    """What `seeded_determinism` gives to a test."""

    def measure(
        self,
        model: Case | Callable[[], Model],
        batch: Any = None,
        *,
        steps: int = 2,
        factory: str | None = None,
        **recipe: Unpack[Recipe],
    ) -> Determinism:
        """What two runs from one seed have in common: `measure_determinism`."""
        from ensembles.checks.determinism.measurement import measure_determinism

        return measure_determinism(model, batch, steps=steps, factory=factory, **recipe)

    def assert_bitwise(
        self,
        model: Case | Callable[[], Model],
        batch: Any = None,
        *,
        steps: int = 2,
        factory: str | None = None,
        loaded: bool = False,
        **recipe: Unpack[Recipe],
    ) -> None:
        """Checks that one seed gives the same bits, and another seed other weights.

        With `factory="package.module:factory"` also in two new processes, which import it. With
        `loaded` the weights come from a file, and need not depend on the seed.
        """
        __tracebackhide__ = True
        from ensembles.checks.determinism.judgement import assert_deterministic

        measured = self.measure(model, batch, steps=steps, factory=factory, **recipe)
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
        from ensembles.checks.determinism.judgement import assert_loader_deterministic
        from ensembles.checks.determinism.loaders import measure_loader_determinism

        measured = measure_loader_determinism(make_loader, epochs=epochs)
        assert_loader_deterministic(measured, augmented=augmented)


@pytest.fixture
def seeded_determinism() -> Iterator[DeterminismFixture]:
    """One seed gives the same bits in construction and in every training step, and another seed
    gives other weights.

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

        one seed is claimed to give the same bits, but two runs from seed 1729 differ from step 1 on

          step 1, operation forward of model.layer1.0.drop (NoiseLayer)   94 differ
          ...
    """  # noqa: D205
    from ensembles.checks.determinism.seeding import seeded
    from ensembles.present_run import seed

    with seeded(seed.get()):
        yield DeterminismFixture()
