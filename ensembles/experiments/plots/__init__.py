"""The pictures of experiments.

Every function returns a `matplotlib.figure.Figure` that belongs to nobody else: `pyplot`, its
windows and its current figure stay out of it. `save_figure` writes one, and overwrites nothing.

* `performance`: how models do in and out of distribution, from results or from plain numbers.
* `robustness`: accuracy in against out of distribution.
* `curves`: training curves of several runs.
* `heatmaps`: which models are right together, pair by pair.
* `logit_axes`: axes on which accuracies are spaced by their logit.
* `saving`: pictures as files, whole and never over another.
"""

from ensembles.experiments.plots.curves import plot_training_curves, read_curves, read_runs
from ensembles.experiments.plots.heatmaps import plot_pairs
from ensembles.experiments.plots.performance import (
    SavedFigure,
    plot_model_performance,
    plot_results,
)
from ensembles.experiments.plots.robustness import Point, plot_robustness
from ensembles.experiments.plots.saving import save_figure

__all__ = [
    "Point",
    "SavedFigure",
    "plot_model_performance",
    "plot_pairs",
    "plot_results",
    "plot_robustness",
    "plot_training_curves",
    "read_curves",
    "read_runs",
    "save_figure",
]
