"""Accuracy in against out of distribution, on logit axes: who is above the line?"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.special import expit, logit

from ensembles.experiments.evaluation.counts import Counts
from ensembles.experiments.plots.logit_axes import limits, logit_axes, with_diagonal
from ensembles.experiments.robustness.line import LINES, Line
from ensembles.experiments.robustness.reference import PublishedModel, published_models

__all__ = ["COLOURS", "Point", "plot_robustness"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Told apart with any kind of colour blindness: Okabe and Ito 2008, jfly.uni-koeln.de/color."""

MARKERS = "osD^vp*"
GREY = "#9a9a9a"


@dataclass(frozen=True)
class Point:
    """A model, or an ensemble with its members, in a picture of robustness.

    Example:
        >>> Point("ResNet-18", Counts(9307, 10_000), Counts(1695, 2000))
        Point(name='ResNet-18', in_dist=Counts(correct=9307, n=10000),
        out_dist=Counts(correct=1695, n=2000), members=())

    Args:
        name: As the legend has it.
        in_dist: In distribution: counts, which are drawn with their interval, or a fraction.
        out_dist: Out of distribution, likewise.
        members: Of an ensemble; drawn smaller and joined to it.
    """

    name: str
    in_dist: Counts | float
    out_dist: Counts | float
    members: tuple["Point", ...] = ()

    def __post_init__(self) -> None:
        for side in ("in_dist", "out_dist"):
            value = getattr(self, side)
            if not isinstance(value, Counts) and not 0 <= value <= 1:
                raise ValueError(
                    f"{side} of {self.name!r} must be counts or a fraction in [0, 1], got {value}"
                )


def plot_robustness(
    points: Sequence[Point],
    *,
    in_dist: str = "CIFAR-10 test",
    out_dist: str = "CIFAR-10.1 v6",
    line: Line | None = LINES["cifar10.1"],
    published: str | None = "v6",
    title: str | None = None,
) -> Figure:
    """Draws accuracy in against out of distribution on logit axes.

    With the line of effective robustness 0, y = x, 95 % Clopper-Pearson bars where counts are
    given, and published models in grey behind. An ensemble is joined to its members. The logit of
    0 and 1 is infinite: such an accuracy is drawn at the edge of the axes, as a triangle that
    points out of them.

    Example:
        >>> figure = plot_robustness([Point("ResNet-18", Counts(9307, 10_000), 0.85)])
        >>> figure.axes[0].get_xlabel()
        'accuracy on CIFAR-10 test (%, n = 10,000)'

    Args:
        points: What to show, at least one.
        in_dist: Name of the set in distribution, for the label.
        out_dist: Name of the shifted set.
        line: Effective robustness 0; None where no line is known for these two sets.
        published: ``"v4"`` or ``"v6"`` shows the 30 published models on CIFAR-10 and that version
            of CIFAR-10.1; None shows none.
        title: Above the axes.

    Returns:
        The figure.

    Raises:
        ValueError: If there is no point, two points have one name, or ``published`` is unknown.
    """
    points = list(points)
    if not points:
        raise ValueError("there is nothing to draw: give at least one point")
    names = [point.name for point in points]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"two points are called {name!r}: the legend could not tell them apart"
            )
    behind = _published_points(published)

    figure = Figure(figsize=(8.8, 5.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    x, y = (
        limits([*_ends(points, side), *(_accuracy(getattr(b, side)) for b in behind)])
        for side in ("in_dist", "out_dist")
    )
    y = with_diagonal(x, y)
    logit_axes(axes, x, y)
    _draw_lines(axes, x, line)
    if behind:
        axes.plot(
            [_accuracy(point.in_dist) for point in behind],
            [_accuracy(point.out_dist) for point in behind],
            linestyle="none",
            marker="o",
            markersize=4.5,
            color=GREY,
            alpha=0.75,
            markeredgewidth=0,
            zorder=1,
            label=f"{len(behind)} published models",
        )
    for number, point in enumerate(points):
        colour = COLOURS[number % len(COLOURS)]
        # The marker moves on when the colours are used up: 49 points can be told apart.
        marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
        for member in point.members:
            _join(axes, member, point, colour)
            _draw_point(axes, member, colour, marker, size=4.5, filled=False)
        _draw_point(axes, point, colour, marker, size=8.5, filled=True)
    axes.set_xlabel(f"accuracy on {in_dist} (%{_sizes(points, 'in_dist')})")
    axes.set_ylabel(f"accuracy on {out_dist} (%{_sizes(points, 'out_dist')})")
    if title:
        axes.set_title(title, loc="left", fontweight="bold")
    _legend(figure, axes, points)
    return figure


def _published_points(version: str | None) -> list[Point]:
    if version is None:
        return []
    if version not in ("v4", "v6"):
        raise ValueError(f"published must be 'v4', 'v6' or None, got {version!r}")

    def shifted(model: PublishedModel) -> Counts:
        return model.v4 if version == "v4" else model.v6

    return [Point(model.name, model.cifar10, shifted(model)) for model in published_models()]


def _all_points(points: Sequence[Point]) -> Iterator[Point]:
    for point in points:
        yield point
        yield from _all_points(point.members)


def _accuracy(value: Counts | float) -> float:
    return value.accuracy if isinstance(value, Counts) else float(value)


def _ends(points: Sequence[Point], side: str) -> Iterator[float]:
    """Accuracies of points and members, and the ends of their intervals."""
    for point in _all_points(points):
        value = getattr(point, side)
        yield _accuracy(value)
        if isinstance(value, Counts):
            yield from value.interval()


def _draw_lines(axes: Axes, x: tuple[float, float], line: Line | None) -> None:
    across = expit(np.linspace(logit(x[0]), logit(x[1]), 200))
    axes.plot(
        across, across, color="#444444", linestyle=":", linewidth=1.2, zorder=1, label="y = x"
    )
    if line is not None:
        axes.plot(
            across,
            line(across),
            color="#444444",
            linewidth=1.4,
            zorder=1,
            label="published baseline:\neffective robustness 0",
        )


def _inside(axes: Axes, side: str, value: float) -> float:
    """Where to draw an accuracy: 0 and 1 at the ends of the axis, others where they are."""
    low, high = axes.get_xlim() if side == "in_dist" else axes.get_ylim()
    return min(max(value, low), high) if value in (0, 1) else value


def _draw_point(
    axes: Axes, point: Point, colour: str, marker: str, *, size: float, filled: bool
) -> None:
    place = {s: _inside(axes, s, _accuracy(getattr(point, s))) for s in ("in_dist", "out_dist")}
    errors: dict[str, list[list[float]] | None] = {"in_dist": None, "out_dist": None}
    for side in errors:
        counts = getattr(point, side)
        if isinstance(counts, Counts):
            low, high = (_inside(axes, side, end) for end in counts.interval())
            errors[side] = [[max(place[side] - low, 0.0)], [max(high - place[side], 0.0)]]
    axes.errorbar(
        [place["in_dist"]],
        [place["out_dist"]],
        xerr=errors["in_dist"],
        yerr=errors["out_dist"],
        linestyle="none",
        marker=_outward(point) or marker,
        markersize=1.6 * size if marker == "*" else size,  # a star is mostly air
        color=colour,
        markerfacecolor=colour if filled else "white",
        markeredgecolor="white" if filled else colour,
        markeredgewidth=0.8 if filled else 1.1,
        elinewidth=1.3 if filled else 0.7,
        alpha=1.0 if filled else 0.8,
        clip_on=_outward(point) is None,
        zorder=4 if filled else 3,
        label=point.name if filled else f"_{point.name}",
    )


def _outward(point: Point) -> str | None:
    """Marker of a point whose logit is infinite: a triangle that shows where it is."""
    x, y = _accuracy(point.in_dist), _accuracy(point.out_dist)
    if y in (0, 1):
        return "^" if y else "v"
    if x in (0, 1):
        return ">" if x else "<"
    return None


def _join(axes: Axes, member: Point, ensemble: Point, colour: str) -> None:
    axes.plot(
        *(
            [_inside(axes, side, _accuracy(getattr(end, side))) for end in (member, ensemble)]
            for side in ("in_dist", "out_dist")
        ),
        color=colour,
        linewidth=0.9,
        alpha=0.55,
        zorder=2,
        label=f"_{member.name} of {ensemble.name}",
    )


def _sizes(points: Sequence[Point], side: str) -> str:
    """', n = 2,000' for the axis label; both ends where the numbers of samples differ."""
    given = (getattr(point, side) for point in _all_points(points))
    sizes = sorted({value.n for value in given if isinstance(value, Counts)})
    if not sizes:
        return ""
    return f", n = {sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else "")


def _legend(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Beside the axes, where it hides nothing: what the reader came for first."""
    background = [h for h in axes.lines if not str(h.get_label()).startswith("_")]
    listed: list[Artist] = [container.lines[0] for container in _labelled(axes)]
    labels = [str(container.get_label()) for container in _labelled(axes)]
    if any(point.members for point in points):
        listed.append(_symbol("o", markerfacecolor="white", markersize=4.5))
        labels.append("members, joined to\ntheir ensemble")
    if any(_outward(point) for point in _all_points(points)):
        listed.append(_symbol("^", markersize=7))
        labels.append("0 or 100 %: beyond\nthe end of the axis")
    listed += background
    labels += [str(line.get_label()) for line in background]
    figure.legend(
        listed,
        labels,
        loc="outside right upper",
        frameon=False,
        ncols=math.ceil(len(labels) / 24),
        labelspacing=0.7,
    )


def _labelled(axes: Axes) -> list[ErrorbarContainer]:
    return [
        container
        for container in axes.containers
        if isinstance(container, ErrorbarContainer)
        and not str(container.get_label()).startswith("_")
    ]


def _symbol(marker: str, **style: Any) -> Line2D:
    return Line2D([], [], linestyle="none", marker=marker, color="#444444", **style)
