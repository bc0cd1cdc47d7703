"""Which models are right together, pair by pair, as pictures of matrices."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from ensembles.experiments.robustness.dominance import (
    disagreement_matrix,
    dominance_matrix,
    similarity_matrix,
)

__all__ = ["plot_pairs"]

NUMBERED = 12
"""Most models of which every cell shows its number: more would not be legible."""


def plot_pairs(
    correct: ArrayLike,
    names: Sequence[str],
    *,
    predictions: ArrayLike | None = None,
    title: str | None = None,
) -> Figure:
    """Draws dominance, dissimilarity and disagreement of all pairs of models.

    Models are sorted by accuracy, weakest first. Dominance: row right, column wrong; strong models
    dominate where the upper right triangle (a weaker one right, a stronger one wrong) is pale.
    Dissimilarity is 1 - similarity: one right, the other wrong. Disagreement: different classes.

    Example:
        >>> figure = plot_pairs([[1, 0, 0], [1, 1, 0]], ["weak", "strong"])
        >>> [axes.get_title(loc="left").partition(":")[0] for axes in figure.axes[:2]]
        ['dominance', 'dissimilarity']

    Args:
        correct: Where each model is right, (model, sample), bool.
        names: One for each model.
        predictions: Predicted classes, (model, sample); without them there is no disagreement.
        title: Above the panels.

    Returns:
        The figure: two panels, or three, each with its scale.

    Raises:
        ValueError: If the numbers of models or samples differ, or an array is malformed.
    """
    dominance, similarity = dominance_matrix(correct), similarity_matrix(correct)
    if len(names) != len(dominance):
        raise ValueError(f"correct has {len(dominance)} models, and there are {len(names)} names")
    panels = {
        "dominance: row right, column wrong": dominance,
        "dissimilarity: exactly one right": 1 - similarity,
    }
    if predictions is not None:
        if np.shape(predictions) != np.shape(correct):
            raise ValueError(
                f"predictions have shape {np.shape(predictions)}, and correct {np.shape(correct)}"
            )
        panels["disagreement: different classes"] = disagreement_matrix(predictions)
    accuracy = np.asarray(correct).mean(axis=1)
    order = np.argsort(accuracy, kind="stable")
    labels = [f"{names[n]} {accuracy[n]:.1%}".replace("%", " %") for n in order]
    size = max(2.6, 0.2 * len(names))  # inches: at 0.2 a row is as high as its label
    across, below = (0.08 * max(map(len, texts)) for texts in (labels, names))
    figure = Figure(
        figsize=((size + 1.0) * len(panels) + across, size + below + (0.9 if title else 0.5)),
        dpi=150,
        layout="constrained",
    )
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (panel, matrix) in zip(every, panels.items(), strict=True):
        _draw_matrix(figure, axes, 100 * matrix[np.ix_(order, order)], panel)
        axes.set_xticks(range(len(names)), [names[n] for n in order], rotation=90)
        axes.tick_params(length=0)
    every[0].set_yticks(range(len(names)), labels)
    if title:
        figure.suptitle(title, fontweight="bold")
    return figure


def _draw_matrix(figure: Figure, axes: Axes, percent: NDArray[np.float64], title: str) -> None:
    # A model with itself is 0 by definition, which says nothing: the diagonal stays grey.
    shown = np.ma.masked_array(percent, mask=np.eye(len(percent), dtype=bool))
    highest = max(float(percent.max()), 1e-9)
    image = axes.imshow(shown, cmap="Blues", norm=PowerNorm(0.5, 0, highest), aspect="equal")
    axes.set_facecolor("#dddddd")
    axes.set_title(title, loc="left", fontsize="medium")
    for side in axes.spines.values():
        side.set_visible(False)
    if len(percent) <= NUMBERED:
        for row, column in np.ndindex(*percent.shape):
            if row != column:
                value = percent[row, column]
                axes.text(
                    column,
                    row,
                    f"{value:.1f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if value > 0.4 * highest else "black",
                )
    beside = axes.inset_axes((1.03, 0, 0.05, 1))  # as high as the matrix, whatever its labels need
    figure.colorbar(image, cax=beside, label="% of samples (square root scale)")
