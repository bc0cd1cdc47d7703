"""How models do in and out of distribution, from results or from plain numbers."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from matplotlib.figure import Figure

from ensembles.experiments.evaluation.counts import Counts, as_counts
from ensembles.experiments.plots.robustness import Point, plot_robustness
from ensembles.experiments.plots.saving import save_figure
from ensembles.experiments.robustness.line import LINES, Line, published_line

if TYPE_CHECKING:
    from ensembles.experiments.evaluation.results import Data, EvaluatedData, Result, Score

__all__ = ["SavedFigure", "plot_model_performance", "plot_results"]


class SavedFigure(NamedTuple):
    """A figure and the file that it was written to."""

    figure: Figure
    path: Path


def plot_model_performance(
    performance: Mapping[str, Any],
    dataset: str,
    *,
    version: str = "v6",
    path: str | Path | None = None,
) -> SavedFigure:
    """Draws the accuracies of a model, or of several by name, and writes the picture as PNG.

    Accuracies are all fractions (each at most 1) or all percent (each above 1, at most 100). A
    mixture is an error rather than a guess. With ``in_dist_n`` and ``out_dist_n``, the numbers of
    samples, accuracies must be counts of them, and bars are drawn.

    Example::

        plot_model_performance({"in_dist_acc": 93.07, "out_dist_acc": 84.9}, "cifar10")
        plot_model_performance(
            {
                "single": {"in_dist_acc": 0.9307, "out_dist_acc": 0.849},
                "ensemble": {"in_dist_acc": 0.9471, "out_dist_acc": 0.874},
            },
            "cifar10",
        )

    Args:
        performance: ``in_dist_acc`` and ``out_dist_acc``, each a number, perhaps with ``in_dist_n``
            and ``out_dist_n``; or such a mapping for each name.
        dataset: ``"cifar10"`` (CIFAR-10.1 is the shifted set) or ``"imagenet"`` (ImageNetV2).
        version: Of CIFAR-10.1, ``"v4"`` or ``"v6"``.
        path: File to write. By default `<dataset>_performance.png` in the current folder, with a
            number where that exists.

    Returns:
        The figure and the path of the picture.

    Raises:
        ValueError: If a key is missing or unknown, a number is out of range, fractions and percent
            are mixed, an accuracy is no count of its ``n``, or ``dataset`` is unknown.
        FileExistsError: If ``path`` exists.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {dataset!r}")
    points = _performance_points(performance)
    if dataset == "cifar10":
        if version not in ("v4", "v6"):
            raise ValueError(f"version of CIFAR-10.1 must be 'v4' or 'v6', got {version!r}")
        figure = plot_robustness(points, out_dist=f"CIFAR-10.1 {version}", published=version)
    else:
        figure = plot_robustness(points, published=None, **DATASETS[dataset])
    if path is not None:
        return SavedFigure(figure, save_figure(figure, path))
    for name in _free_names(f"{dataset}_performance", ".png"):
        try:
            return SavedFigure(figure, save_figure(figure, name))
        except FileExistsError:
            continue  # somebody was faster, or it was there
    raise AssertionError("names do not end")


def plot_results(
    results: Sequence["Result"], *, reduction: str = "arithmetic"
) -> dict[str, Figure]:
    """Draws results of evaluations: one picture for each shifted set.

    A single model is one point. An ensemble is one point, its prediction by ``reduction``, joined
    to its members; a parent, which is no member of the ensemble, is a point by itself. The
    published baseline and the 30 published models are shown where they apply: from CIFAR-10 with
    its official pixels to CIFAR-10.1.

    Example::

        for shifted, figure in plot_results(read_results(["results"])).items():
            save_figure(figure, f"{shifted}.png")

    Args:
        results: Each with a set in distribution, which all share, and at least one shifted set.
        reduction: ``"arithmetic"``, ``"geometric"`` or ``"vote"``.

    Returns:
        Figures by the name of the shifted set. A picture shows the results that have its set.

    Raises:
        ValueError: If there are no results, one has no shifted set, they were measured on
            different images under one name, their sets in distribution differ, or the reduction
            is unknown.
    """
    return {
        shift.shifted.name: plot_robustness(
            shift.points,
            in_dist=_set_name(shift.inside),
            out_dist=_set_name(shift.shifted),
            line=shift.line,
            published=PUBLISHED_SHIFTS[shift.shifted.name] if shift.line else None,
        )
        for shift in shifts_of(results, reduction=reduction)
    }


class Shift(NamedTuple):
    """What several models get right on a set in distribution and on a shifted one.

    Attributes:
        inside: The set in distribution.
        shifted: The shifted set.
        points: The models.
        line: The line that is published for these two sets, effective robustness 0.
    """

    inside: "Data"
    shifted: "Data"
    points: list[Point]
    line: Line | None


def shifts_of(results: Sequence["Result"], *, reduction: str = "arithmetic") -> list[Shift]:
    """Takes results together, by shifted set.

    Args:
        results: As in `plot_results`.
        reduction: Likewise.

    Returns:
        The shifts, in the order in which results have them.

    Raises:
        ValueError: As `plot_results` does.
    """
    if not results:
        raise ValueError("there are no results")
    if reduction not in ("arithmetic", "geometric", "vote"):
        raise ValueError(
            f"reduction must be 'arithmetic', 'geometric' or 'vote', got {reduction!r}"
        )
    first = results[0].evaluations[0].data
    shifted: dict[str, Data] = {}
    points: dict[str, list[Point]] = {}
    for result, name in zip(results, _result_names(results), strict=True):
        here, *there = result.evaluations
        _require_same(here.data, first)
        if not there:
            raise ValueError(
                f"the result of {name!r} has accuracies on {here.data.name} only: evaluate it on a "
                "shifted set too"
            )
        for evaluation in there:
            known = shifted.setdefault(evaluation.data.name, evaluation.data)
            _require_same(evaluation.data, known)
            points.setdefault(known.name, []).extend(
                _result_points(name, here, evaluation, reduction)
            )
    return [
        Shift(first, data, points[place], published_line(first.name, data.name))
        for place, data in shifted.items()
    ]


DATASETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "cifar10": {},  # as plot_robustness has it by default
        "imagenet": {
            "in_dist": "ImageNet validation",
            "out_dist": "ImageNetV2",
            "line": LINES["imagenetv2"],
        },
    }
)


def _performance_points(performance: Mapping[str, Any]) -> list[Point]:
    if not isinstance(performance, Mapping) or not performance:
        raise ValueError(
            "performance must be {'in_dist_acc': ..., 'out_dist_acc': ...}, or such a mapping for "
            f"each name; got {performance!r}"
        )
    several = all(isinstance(value, Mapping) for value in performance.values())
    named = performance if several else {"model": performance}
    accuracies: dict[str, float] = {}
    for name, given in named.items():
        where = f"{name}: " if several else ""
        keys = {"in_dist_acc", "out_dist_acc"}
        if missing := sorted(keys - set(given)):
            raise ValueError(f"{where}{missing[0]} is missing; given are {', '.join(given)}")
        if unknown := sorted(set(given) - keys - {"in_dist_n", "out_dist_n"}):
            raise ValueError(f"{where}unknown key {unknown[0]!r}")
        for key in sorted(keys):
            value = given[key]
            try:
                value = float(value)
            except (TypeError, ValueError):
                raise ValueError(f"{where}{key} must be a number, got {value!r}") from None
            if not 0 <= value <= 100:
                raise ValueError(
                    f"{where}{key} must be a fraction in [0, 1] or percent up to 100, got {value:g}"
                )
            accuracies[f"{where}{key}"] = value
    fractions = [place for place, value in accuracies.items() if value <= 1]
    percents = [place for place, value in accuracies.items() if value > 1]
    if fractions and percents:
        raise ValueError(
            f"{fractions[0]} = {accuracies[fractions[0]]:g} reads as a fraction and "
            f"{percents[0]} = {accuracies[percents[0]]:g} as percent: give all as fractions"
        )
    return [
        Point(
            name,
            _side(given, "in_dist", bool(percents)),
            _side(given, "out_dist", bool(percents)),
        )
        for name, given in named.items()
    ]


def _side(given: Mapping[str, Any], side: str, percent: bool) -> Counts | float:
    accuracy = float(given[f"{side}_acc"]) / (100 if percent else 1)
    n = given.get(f"{side}_n")
    return accuracy if n is None else as_counts(accuracy, n)


def _free_names(stem: str, ending: str) -> Iterator[str]:
    yield f"{stem}{ending}"
    number = 2
    while True:
        yield f"{stem}_{number}{ending}"
        number += 1


PUBLISHED_SHIFTS = MappingProxyType({"cifar10_1_v4": "v4", "cifar10_1_v6": "v6"})

SET_NAMES = MappingProxyType(
    {
        "cifar10": "CIFAR-10",
        "cifar10_lossless": "lossless CIFAR-10",
        "cifar10_jpeg": "JPEG CIFAR-10",
        "cifar10_1_v4": "CIFAR-10.1 v4",
        "cifar10_1_v6": "CIFAR-10.1 v6",
    }
)


def _set_name(data: "Data") -> str:
    if data.name in PUBLISHED_SHIFTS:
        return SET_NAMES[data.name]
    # A corrupted set is called by the set that it was made from: cifar10_jpeg_blur_3.
    base = max((known for known in SET_NAMES if data.name.startswith(known)), key=len, default="")
    name = SET_NAMES.get(base, "") + data.name.removeprefix(base).replace("_", " ")
    return f"{name} {data.split}"


def _require_same(data: "Data", other: "Data") -> None:
    if data.name != other.name:
        raise ValueError(
            f"the results start from different sets, {other.name} and {data.name}: give them apart"
        )
    if data.sha256 != other.sha256:
        raise ValueError(
            f"the results were measured on different images that are both called {data.name}: "
            f"sha256 {other.sha256[:12]}..., n = {other.n} ({other.version}), and "
            f"{data.sha256[:12]}..., n = {data.n} ({data.version})"
        )


def _result_names(results: Sequence["Result"]) -> list[str]:
    """Model names; those that several results have, told apart by seed or else by number."""
    names = [result.model.name for result in results]
    seeds = [
        f"{name}, seed {result.seed}" if names.count(name) > 1 and result.seed is not None else name
        for name, result in zip(names, results, strict=True)
    ]
    return [
        f"{name} ({seeds[: number + 1].count(name)})" if seeds.count(name) > 1 else name
        for number, name in enumerate(seeds)
    ]


def _result_points(
    name: str, here: "EvaluatedData", there: "EvaluatedData", reduction: str
) -> Iterator[Point]:
    if list(here.members) != list(there.members) or here.reduced != there.reduced:
        raise ValueError(
            f"the result of {name!r} has members {', '.join(here.members)} on {here.data.name} and "
            f"{', '.join(there.members)} on {there.data.name}: it is not one network"
        )

    def point(title: str, one: "Score", other: "Score", members: tuple[Point, ...] = ()) -> Point:
        return Point(
            title, Counts(one.correct, one.n), Counts(other.correct, other.n), members=members
        )

    singles = {
        member: point(member, here.members[member], there.members[member])
        for member in here.members
    }
    if here.reductions:
        if missing := [e for e in (here, there) if reduction not in e.reductions]:
            raise ValueError(
                f"the result of {name!r} has no {reduction} prediction on {missing[0].data.name}"
            )
        yield point(
            name,
            here.reductions[reduction],
            there.reductions[reduction],
            members=tuple(singles[member] for member in here.reduced),
        )
    for member, alone in singles.items():
        if not here.reductions or member not in here.reduced:
            title = name if len(singles) == 1 else f"{name}, {member}"
            yield Point(title, alone.in_dist, alone.out_dist)
