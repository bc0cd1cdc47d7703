"""Fixture `autograd_graph`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from typing import Unpack

    from ensembles.case import Given
    from ensembles.checks.graph.measurement import AutogradGraph
    from ensembles.subject import Recipe

__all__ = ["GraphFixture", "autograd_graph"]


class GraphFixture:
    """What `autograd_graph` gives to a test."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._request = request

    def measure(
        self, model: Given, batch: Any = None, *, training: bool = False, **recipe: Unpack[Recipe]
    ) -> AutogradGraph:
        """The graph in canonical form, whose `str` is the text: `measure_autograd_graph`."""
        from ensembles.checks.graph.measurement import measure_autograd_graph

        return measure_autograd_graph(model, batch, training=training, **recipe)

    def assert_equals(
        self,
        model: Given,
        batch: Any,
        golden: str | Path,
        *,
        training: bool = False,
        **recipe: Unpack[Recipe],
    ) -> None:
        """Checks that the graph is the golden: its text, or the path of a file that holds it."""
        __tracebackhide__ = True
        from ensembles.checks.graph.judgement import assert_graph_equal

        graph = self.measure(model, batch, training=training, **recipe)
        assert_graph_equal(graph, golden)

    def assert_recorded(
        self,
        model: Given,
        batch: Any,
        path: str | Path | None = None,
        *,
        training: bool = False,
        **recipe: Unpack[Recipe],
    ) -> None:
        """Checks that the graph is the one in the test's golden file.

        The first run writes the file, and fails; `--force-regen` writes it anew. It lies where
        pytest-regressions puts it, <test file>/<test name>.txt, or at `path`.
        """
        __tracebackhide__ = True
        from ensembles.checks.graph.judgement import assert_graph_equal

        try:
            file_regression = self._request.getfixturevalue("file_regression")
        except pytest.FixtureLookupError as error:
            raise pytest.UsageError(
                "autograd_graph.assert_recorded keeps golden files with pytest-regressions, which "
                'is not installed: pip install "pytest-ensembles[goldens]". Or give the golden to '
                "autograd_graph.assert_equals."
            ) from error
        graph = self.measure(model, batch, training=training, **recipe)

        def compare(obtained: Path, expected: Path) -> None:
            __tracebackhide__ = True
            try:
                assert_graph_equal(graph, expected)
            except ValueError as error:
                # pytest-regressions writes a file anew only after an AssertionError.
                if self._request.config.getoption("force_regen"):
                    raise AssertionError(str(error)) from error
                raise

        try:
            file_regression.check(
                f"{graph}\n",
                encoding="utf-8",
                fullpath=None if path is None else Path(path).resolve(),
                check_fn=compare,
            )
        except pytest.fail.Exception as written:  # for the first time, or anew
            pytest.fail(f"{written} Look at it, commit it, and run again.", pytrace=False)

    def draw(
        self,
        model: Given,
        batch: Any,
        path: str | Path,
        *,
        training: bool = False,
        overwrite: bool = False,
        **recipe: Unpack[Recipe],
    ) -> tuple[Path, Path]:
        """Draws the graph as path.pdf and path.svg: `draw_autograd_graph`."""
        from ensembles.checks.graph.drawing import draw_autograd_graph

        return draw_autograd_graph(
            model, batch, path, training=training, overwrite=overwrite, **recipe
        )


@pytest.fixture
def autograd_graph(request: pytest.FixtureRequest) -> GraphFixture:
    """The autograd graph is the recorded one.

    Catches a layer that is skipped, an activation that was lost, streams that run through one
    network, a subnet that does not read its parent's weight, a branch that was detached. The text
    is the same on every machine, for every batch size, and in every run.

    Example::

        def test_graph_of_resnet18(autograd_graph):
            autograd_graph.assert_recorded(resnet18(), torch.randn(2, 3, 32, 32))

    Prints on failure::

        the autograd graph is claimed to be the recorded one, but it is another

          layer2.1.bn1:Relu            expected (:BatchNorm)
                                       found    nothing
          layer2.1.conv2:Convolution   expected (layer2.1.bn1:Relu, .weight) padding=1
                                       found    (layer2.1.bn1:BatchNorm, .weight) padding=1
          (2 of 133 lines)
          ...
    """
    return GraphFixture(request)
