"""Training curves of several runs: accuracy on training and validation images by epoch.

Read from the tables of this package's runs (`epochs.csv`) or from those that Lightning's
`CSVLogger` writes (`metrics.csv`).
"""

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ensembles.experiments.plots.robustness import COLOURS

__all__ = ["Curves", "plot_training_curves", "read_curves", "read_runs"]

TABLES = ("epochs.csv", "metrics.csv")

Curve = Mapping[int, float]
"""Accuracy, a fraction, by number of epochs trained, from 1."""


@dataclass(frozen=True)
class Curves:
    """Accuracies of one run by epoch.

    Args:
        training: Accuracy on the training images by number of epochs trained; a fraction. Empty
            where it was not measured: members that see images of their own have no mean prediction.
        validation: On the validation images; empty where none were kept.
        validation_n: Validation images, where the table says so.
    """

    training: Curve
    validation: Curve
    validation_n: int | None = None


def read_curves(
    run: str | Path, *, training: str | None = None, validation: str | None = None
) -> Curves:
    """Reads the curves of one run.

    Rows with an empty cell do not count, as `CSVLogger` writes training and validation in rows of
    their own. Several rows in an epoch count with their mean.

    Example::

        read_curves("runs/ensemble_sum")
        read_curves("lightning_logs/version_3", training="train_acc", validation="val_acc")

    Args:
        run: The run's folder, or its table.
        training: Column of the training accuracy. By default that of the ensemble, or of the only
            member: ``train/ensemble/accuracy``, ``train/single/accuracy``.
        validation: Column of the validation accuracy; by default likewise, ``val/...``.

    Returns:
        The curves.

    Raises:
        FileNotFoundError: If there is no table.
        ValueError: If a column is missing (the message names those that there are), no row has a
            value, a value is no fraction or no number, or the file is cut off or no text.
    """
    path = _table_of(Path(run))
    columns, rows = _table(path)
    if "epoch" not in columns:
        raise ValueError(f"{path} has no column 'epoch'{_listed(columns)}")
    given_training = training
    training = training or _default_column(columns, "train", path)
    if validation is None and given_training is None:
        has_validation = any(column.startswith("val/") for column in columns)
        validation = _default_column(columns, "val", path) if has_validation else None
    for column in (training, validation):
        if column is not None and column not in columns:
            raise ValueError(f"{path} has no column {column!r}{_listed(columns)}")
    size = validation.removesuffix("accuracy") + "n" if validation else None
    sizes = {row[size] for row in rows if row.get(size)} if size in columns else set()
    curves = Curves(
        training=_curve(rows, training, path),
        validation=_curve(rows, validation, path) if validation else {},
        validation_n=int(float(sizes.pop())) if len(sizes) == 1 else None,
    )
    for column, curve in ((training, curves.training), (validation, curves.validation)):
        if column and not curve and (column == given_training or not curves.validation):
            raise ValueError(f"{path} has no value in column {column!r}: has an epoch ended?")
    return curves


def read_runs(
    folder: str | Path, *, training: str | None = None, validation: str | None = None
) -> dict[str, Curves]:
    """Reads the curves of all runs in a folder.

    Args:
        folder: Its folders are runs, called by their names; those without a table are left out.
        training: As in `read_curves`.
        validation: As in `read_curves`.

    Returns:
        Curves by run, sorted by name.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no run, or a table is malformed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    runs = sorted(
        child for child in folder.iterdir() if any((child / table).is_file() for table in TABLES)
    )
    if not runs:
        raise ValueError(f"{folder} holds no runs: none of its folders has {' or '.join(TABLES)}")
    return {run.name: read_curves(run, training=training, validation=validation) for run in runs}


def plot_training_curves(
    runs: Mapping[str, Curves | Sequence[Curves]], *, title: str | None = None
) -> Figure:
    """Draws training and validation accuracy of several runs by epoch, side by side.

    Example:
        >>> rising = Curves({1: 0.4, 2: 0.6}, {1: 0.45, 2: 0.55}, validation_n=200)
        >>> figure = plot_training_curves({"single": rising})
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['training', 'validation (n = 200)']

    Args:
        runs: Curves by the name that the legend shows. A list of curves are runs that differ in
            their seed: drawn are their mean and, as a band, their range, in the epochs that all
            have reached.
        title: Above the panels.

    Returns:
        The figure. Where no run has a validation curve it has only one panel.

    Raises:
        ValueError: If there is no run, or runs of one name have no epoch in common.
    """
    grouped = {
        name: [given] if isinstance(given, Curves) else list(given) for name, given in runs.items()
    }
    if not grouped:
        raise ValueError("there is nothing to draw: give at least one run")
    for name, several in grouped.items():
        if not several:
            raise ValueError(f"{name!r} has no runs")
    validated = any(curves.validation for several in grouped.values() for curves in several)
    sides = ["training", "validation"] if validated else ["training"]
    figure = Figure(figsize=(4.6 * len(sides) + 2.2, 4.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(sides), sharex=True, sharey=True, squeeze=False)[0]
    for axes, side in zip(panels, sides, strict=True):
        for number, (name, several) in enumerate(grouped.items()):
            style = "-" if number < len(COLOURS) else "--"
            colour = COLOURS[number % len(COLOURS)]
            _draw_runs(axes, name, [getattr(c, side) for c in several], colour, style)
        absent = [n for n, several in grouped.items() if not any(getattr(c, side) for c in several)]
        if absent:
            told = "\n".join(["not measured:", *absent])
            axes.text(0.98, 0.02, told, transform=axes.transAxes, ha="right", color="#666666")
        axes.set_title(f"{side}{_size(grouped, side)}", loc="left")
        axes.set_xlabel("epochs trained")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy (%)")
    drawn = [axes.get_legend_handles_labels() for axes in panels]
    lines = {label: line for found in drawn for line, label in zip(*found, strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", frameon=False)
    if title:
        figure.suptitle(title, fontweight="bold")
    return figure


def _draw_runs(axes: Axes, name: str, curves: Sequence[Curve], colour: str, style: str) -> None:
    present = [curve for curve in curves if curve]
    if not present:
        return
    epochs = sorted(set.intersection(*(set(curve) for curve in present)))
    if not epochs:
        raise ValueError(f"the runs of {name!r} have no epoch in common")
    values = 100 * np.array([[curve[epoch] for epoch in epochs] for curve in present])
    label = name if len(present) == 1 else f"{name}\n(mean and range of {len(present)})"
    axes.plot(
        epochs,
        values.mean(axis=0),
        style,
        color=colour,
        linewidth=1.8,
        # A line through one point is invisible.
        marker="o" if len(epochs) <= 3 else None,
        markersize=4,
        label=label,
    )
    if len(present) > 1:
        axes.fill_between(
            epochs,
            values.min(axis=0),
            values.max(axis=0),
            color=colour,
            alpha=0.18,
            linewidth=0,
        )


def _size(grouped: Mapping[str, Sequence[Curves]], side: str) -> str:
    if side != "validation":
        return ""
    sizes = {c.validation_n for several in grouped.values() for c in several if c.validation}
    size = sizes.pop() if len(sizes) == 1 else None
    return f" (n = {size:,})" if size is not None else ""


def _table_of(run: Path) -> Path:
    if run.is_file():
        return run
    for name in TABLES:
        if (run / name).is_file():
            return run / name
    raise FileNotFoundError(f"{run} is no run: there is no {' or '.join(TABLES)} in it")


def _table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows, each whole: what is left of a number that was cut off may be a number."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no table: {error}") from error
    lines = text.splitlines(keepends=True)
    columns, *rows = csv.reader(lines) if lines else [[]]
    for number, cells in enumerate(rows, start=2):  # the header is line 1
        cut = number == len(lines) and not lines[-1].endswith("\n")
        if cells and (cut or len(cells) != len(columns)):
            raise ValueError(
                f"{path}, line {number}: {len(cells)} of {len(columns)} cells"
                f"{', cut off' if cut else ''}. Usual cause: a run that was killed while it wrote; "
                "one of `ensembles train` is mended by the same command given again"
            )
    return columns, [dict(zip(columns, cells, strict=True)) for cells in rows if cells]


def _default_column(columns: Sequence[str], phase: str, path: Path) -> str:
    """The accuracy of the ensemble, or of the only member."""
    accuracies = [c for c in columns if c.startswith(f"{phase}/") and c.endswith("/accuracy")]
    ensemble = f"{phase}/ensemble/accuracy"
    if ensemble in accuracies:
        return ensemble
    if len(accuracies) == 1:
        return accuracies[0]
    raise ValueError(
        f"{path}: which column is the accuracy? There is no {ensemble!r}; "
        f"pass training= and validation={_listed(columns)}"
    )


def _listed(columns: Sequence[str]) -> str:
    shown = ", ".join(columns[:12]) + (", ..." if len(columns) > 12 else "")
    return f". There are: {shown}" if columns else ". It is empty"


def _curve(rows: Sequence[Mapping[str, str]], column: str, path: Path) -> Curve:
    values: dict[int, list[float]] = {}
    for epoch, value in _numbers(rows, column, path):
        values.setdefault(epoch + 1, []).append(value)
    return {epoch: sum(found) / len(found) for epoch, found in sorted(values.items())}


def _numbers(
    rows: Sequence[Mapping[str, str]], column: str, path: Path
) -> Iterator[tuple[int, float]]:
    for number, row in enumerate(rows, start=2):  # the header is line 1
        if not row.get(column):
            continue
        try:
            epoch, value = int(float(row["epoch"])), float(row[column])
        except (TypeError, ValueError):
            raise ValueError(
                f"{path}, line {number}: epoch {row['epoch']!r} or {column} {row[column]!r} is no "
                "number"
            ) from None
        if not 0 <= value <= 1 or math.isnan(value):
            raise ValueError(
                f"{path}, line {number}: {column} must be a fraction in [0, 1], got {value:g}"
            )
        yield epoch, value
