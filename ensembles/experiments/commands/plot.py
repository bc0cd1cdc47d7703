"""`ensembles plot`: pictures of results and of training curves."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser

from ensembles.experiments.commands.parsing import parser_of, values_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ensembles.experiments.evaluation.results import Result
    from ensembles.experiments.plots.curves import Curves

__all__ = ["main", "parser", "run", "shifted_results"]

EXAMPLE = (
    "ensembles plot robustness results --out robustness.png\n"
    "  ensembles plot curves runs/single runs/sum mean=runs/mean_0,runs/mean_1 --out curves.pdf"
)


def run(
    kind: Literal["robustness", "curves"],
    places: list[str],
    *,
    out: Path = Path("plots"),
    reduction: Literal["arithmetic", "geometric", "vote"] = "arithmetic",
    training: str | None = None,
    validation: str | None = None,
    title: str | None = None,
) -> int:
    """Draws results, or the training curves of runs.

    `robustness` draws one picture for each shifted set. It shows the accuracy (%) on the shifted
    set against the accuracy in distribution, on logit axes, with 95 % Clopper-Pearson bars and the
    line y = x. Each ensemble is joined to its members. From CIFAR-10 to CIFAR-10.1, the picture
    also has the line of effective robustness 0 and 30 published models.

    `curves` draws the training and validation accuracy (%) of several runs by epoch.

    Args:
        kind: What is drawn: robustness or curves.
        places: For robustness: result files of `ensembles evaluate`, or folders of them. For
            curves: folders of runs, or a folder that holds several runs. NAME=RUN,RUN draws the
            mean and range of several runs under one name.
        out: Folder of pictures, or the name of a new file that ends in .png, .pdf or .svg. Nothing
            is overwritten.
        reduction: For robustness: which prediction of an ensemble is drawn.
        training: For curves: the column of the training accuracy. If not given, it is that of the
            ensemble.
        validation: For curves: the column of the validation accuracy. If not given, it is that of
            the ensemble.
        title: For curves: the title above the picture.

    Returns:
        The exit status.
    """
    from ensembles.experiments.plots import save_figure

    if kind == "robustness":
        if training or validation or title:
            raise ValueError(
                "training, validation and title are options of `ensembles plot curves`"
            )
        figures = _robustness(places, reduction)
    else:
        figures = {"curves": _curves(places, training, validation, title)}
    if out.suffix and len(figures) > 1:
        raise ValueError(
            f"there are {len(figures)} pictures, one for each shifted set ({', '.join(figures)}): "
            "give a folder, such as --out plots"
        )
    paths = [out if out.suffix else out / f"{name}.png" for name in figures]
    for path in paths:  # all or none
        if path.exists():
            raise FileExistsError(f"{path} exists, and is not overwritten: choose another name")
    for figure, path in zip(figures.values(), paths, strict=True):
        print(save_figure(figure, path))
    return 0


def _robustness(places: Sequence[str], reduction: str) -> dict[str, Figure]:
    from ensembles.experiments.plots import plot_results

    results = shifted_results(places)
    inside = results[0].evaluations[0].data.name
    drawn = plot_results(results, reduction=reduction)
    return {f"{inside}_to_{shifted}": figure for shifted, figure in drawn.items()}


def shifted_results(places: Sequence[str]) -> list[Result]:
    """The results that have a shifted set; prints which have none.

    Raises:
        ValueError: If there are none, or one is malformed.
        OSError: If there is no such file or folder.
    """
    from ensembles.experiments.evaluation.results import read_results

    results = []
    for result in read_results(places):
        if len(result.evaluations) > 1:
            results.append(result)
        else:
            inside = result.evaluations[0].data.name
            print(f"{result.identifier}: left out, because it is on {inside} only", file=sys.stderr)
    if not results:
        raise ValueError("no result has a shifted set: `ensembles evaluate --shifted ...` adds one")
    return results


def _curves(
    places: Sequence[str], training: str | None, validation: str | None, title: str | None
) -> Figure:
    from ensembles.experiments.plots.curves import (
        TABLES,
        plot_training_curves,
        read_curves,
        read_runs,
    )

    runs: dict[str, list[Curves]] = {}
    for place in places:
        name, equals, several = place.partition("=")
        if equals and not (name and several):
            raise ValueError(
                f"{place!r} is not of the form NAME=RUN,RUN: give a name and folders of runs"
            )
        if equals:
            found = {
                name: [
                    read_curves(run, training=training, validation=validation)
                    for run in several.split(",")
                ]
            }
        else:
            path = Path(place)
            is_run = path.is_file() or any((path / table).is_file() for table in TABLES)
            if is_run or not path.is_dir():
                one = read_curves(path, training=training, validation=validation)
                found = {path.resolve().name: [one]}
            else:
                held = read_runs(path, training=training, validation=validation)
                found = {run: [curves] for run, curves in held.items()}
        for run, curves in found.items():
            if run in runs:
                raise ValueError(
                    f"two runs are called {run!r}: give them names, such as first={place}, or "
                    f"draw them as one with {run}=RUN,RUN"
                )
            runs[run] = curves
    return plot_training_curves(runs, title=title)


def parser() -> ArgumentParser:
    """The command's options."""
    return parser_of("plot", run, example=EXAMPLE)


def main(arguments: Sequence[str]) -> int:
    """Runs the command."""
    return run(**values_of(parser(), arguments))
