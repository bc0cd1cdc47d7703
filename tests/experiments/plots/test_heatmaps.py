"""Pictures of pairs of models: the matrices, sorted, in per cent."""

import re

import numpy as np
import pytest

from ensembles.experiments.plots.heatmaps import plot_pairs
from ensembles.experiments.robustness.dominance import (
    disagreement_matrix,
    dominance_matrix,
    similarity_matrix,
)

LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 1])
CLASSES = np.array([[0, 1, 2, 0, 1, 2, 0, 0], [0, 2, 1, 0, 0, 0, 1, 2], [0, 1, 2, 1, 1, 0, 2, 1]])
CORRECT = CLASSES == LABELS
NAMES = ["strong", "weak", "middle"]
ORDER = [1, 2, 0]


def panels(figure):
    return {
        axes.get_title(loc="left").partition(":")[0]: axes.images[0].get_array()
        for axes in figure.axes
        if axes.images
    }


def test_each_panel_shows_its_matrix_in_per_cent_weakest_first():
    found = panels(plot_pairs(CORRECT, NAMES, predictions=CLASSES))
    expected = {
        "dominance": dominance_matrix(CORRECT),
        "dissimilarity": 1 - similarity_matrix(CORRECT),
        "disagreement": disagreement_matrix(CLASSES),
    }
    assert list(found) == list(expected)
    for name, matrix in expected.items():
        np.testing.assert_allclose(found[name].data, 100 * matrix[np.ix_(ORDER, ORDER)])
        np.testing.assert_array_equal(found[name].mask, np.eye(3, dtype=bool))


def test_models_are_labelled_with_their_accuracy_in_the_same_order():
    axes = plot_pairs(CORRECT, NAMES, title="three").axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == [
        "weak 25.0 %",
        "middle 62.5 %",
        "strong 87.5 %",
    ]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["weak", "middle", "strong"]


def test_cells_of_few_models_show_their_numbers_and_those_of_many_do_not():
    axes = plot_pairs(CORRECT, NAMES).axes[0]
    matrix = 100 * dominance_matrix(CORRECT)[np.ix_(ORDER, ORDER)]
    shown = {t.get_position(): t.get_text() for t in axes.texts}
    assert shown == {
        (column, row): f"{matrix[row, column]:.1f}"
        for row, column in np.ndindex(3, 3)
        if row != column
    }
    many = np.random.default_rng(0).random((13, 50)) < 0.8
    assert len(plot_pairs(many, list("abcdefghijklm")).axes[0].texts) == 0


def test_without_predictions_there_is_no_disagreement():
    assert list(panels(plot_pairs(CORRECT, NAMES))) == ["dominance", "dissimilarity"]


def test_equal_models_can_be_drawn():
    figure = plot_pairs([[1, 0], [1, 0]], ["a", "b"])
    figure.savefig(__import__("io").BytesIO())
    assert panels(figure)["dominance"].data.max() == 0


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["a"], {}, "correct has 3 models, and there are 1 names"),
        (NAMES, {"predictions": CLASSES[:, :2]}, "predictions have shape (3, 2), and correct"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(names, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plot_pairs(CORRECT, names, **options)
