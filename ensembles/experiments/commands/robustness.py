"""`ensembles robustness`: how accurate models are under shift, and which images they share."""

from __future__ import annotations

import json as json_format
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jsonargparse import ArgumentParser

from ensembles.experiments.commands.parsing import parser_of, values_of
from ensembles.message import aligned

if TYPE_CHECKING:
    from ensembles.experiments.evaluation.counts import Counts
    from ensembles.experiments.robustness.line import Line
    from ensembles.experiments.robustness.predictions import Predictions

__all__ = ["main", "parser", "run"]

EXAMPLE = "ensembles robustness results\n  ensembles robustness first.npz second.npz --json"

MATRICES = {
    "dominance": "the model of the row is right and that of the column wrong",
    "similarity": "both are right, or both wrong",
    "disagreement": "they predict different classes",
}

WIDTH = 100
"""Characters in a line; a table that is wider is divided where that is possible."""


class _Model(NamedTuple):
    """A row of the table of accuracies."""

    name: str
    inside: Counts
    shifted: Counts
    is_ensemble: bool


def run(
    places: list[str],
    *,
    reduction: Literal["arithmetic", "geometric", "vote"] = "arithmetic",
    json: bool = False,
) -> int:
    """Compares how accurate models are under distribution shift.

    For every shifted set, the report has accuracies (%) with 95 % Clopper-Pearson intervals. From
    CIFAR-10 to CIFAR-10.1 it also has the published baseline (%) and the effective robustness,
    which is the accuracy beyond the baseline (points). With three single models or more, a line is
    fitted through them: logit(out) = slope logit(in) + intercept, with 95 % intervals. A single
    model is one that is not an ensemble of others.

    If files of predictions are given, the report compares every two models on every set. It shows
    dominance, similarity and disagreement, as shares of the images (%), and their means over all
    pairs of single models. For every three single models, it measures how far the middle model is
    from the chord of the other two (points), and shows the bound on this distance.

    Args:
        places: Result files of `ensembles evaluate`, or folders of them. Or files of
            `ensembles evaluate --predictions`, which end in .npz and are on the same images.
        reduction: Which prediction of an ensemble is compared. This is for result files only: from
            files of predictions, all are compared.
        json: Prints JSON. Accuracies and shares are then fractions, effective robustness is in
            points, and matrices are in the order of the models.

    Returns:
        The exit status.
    """
    kinds = {Path(place).suffix == ".npz" for place in places}
    if len(kinds) > 1:
        raise ValueError(
            "give either results or predictions (.npz): they are compared in different ways"
        )
    report = _of_predictions(places) if kinds == {True} else _of_results(places, reduction)
    if json:
        print(json_format.dumps(report, indent=1))
        return 0
    blocks = [
        _matrix(matrix, report["sets"][place][matrix], report["models"], place)
        for place in report.get("sets", {})
        for matrix in MATRICES
        if len(report["models"]) > 1
    ]
    if "sets" in report:
        blocks.append(_means(report))
    blocks += [_shift(shift) for shift in report["shifts"]]
    print("\n\n".join(blocks))
    return 0


# --- measuring ----------------------------------------------------------------------------------


def _of_results(places: Sequence[str], reduction: str) -> dict[str, Any]:
    from ensembles.experiments.commands.plot import shifted_results
    from ensembles.experiments.plots.performance import shifts_of

    report = []
    for shift in shifts_of(shifted_results(places), reduction=reduction):
        models = []
        for point in shift.points:
            inner = [(f"{point.name}, {member.name}", member) for member in point.members]
            for name, one in [(point.name, point), *inner]:
                inside, shifted = one.in_dist, one.out_dist
                assert not isinstance(inside, float)
                assert not isinstance(shifted, float)
                models.append(_Model(name, inside, shifted, bool(one.members)))
        report.append(_compared(shift.inside.name, shift.shifted.name, models, shift.line))
    return {"shifts": report}


def _of_predictions(places: Sequence[str]) -> dict[str, Any]:
    from ensembles.experiments.evaluation.counts import Counts
    from ensembles.experiments.robustness.line import published_line
    from ensembles.experiments.robustness.predictions import joined_predictions, read_predictions

    for place in places:
        if places.count(place) > 1:
            raise ValueError(f"{place} is given {places.count(place)} times: give it once")
    stems = [Path(place).stem for place in places]
    names = stems if len(set(stems)) == len(stems) else places
    sets = joined_predictions(
        {name: read_predictions(place) for name, place in zip(names, places, strict=True)}
    )
    (inside, first), *others = sets.items()
    report = []
    for shifted, found in others:
        models = [
            _Model(
                name,
                Counts(int(here.sum()), here.size),
                Counts(int(there.sum()), there.size),
                name in first.ensembles,
            )
            for name, here, there in zip(first.models, first.correct, found.correct, strict=True)
        ]
        report.append(
            _compared(inside, shifted, models, published_line(inside, shifted))
            | {"triples": _triples(first, found)}
        )
    return {
        "models": list(first.models),
        "ensembles": list(first.ensembles),
        "sets": {name: _pairs(found) for name, found in sets.items()},
        "shifts": report,
    }


def _compared(
    inside: str, shifted: str, models: Sequence[_Model], line: Line | None
) -> dict[str, Any]:
    """Accuracies, the published line, and the line through the single models."""
    from ensembles.experiments.robustness.line import fit_line

    report: dict[str, Any] = {
        "in_distribution": inside,
        "shifted": shifted,
        "models": {
            model.name: {
                "ensemble": model.is_ensemble,
                "in_distribution": _counted(model.inside),
                "shifted": _counted(model.shifted),
                "baseline": line and line(model.inside.accuracy),
                "effective_robustness": line
                and line.residual(model.inside.accuracy, model.shifted.accuracy),
            }
            for model in models
        },
        "published_line": line and asdict(line),
        "refit": None,
        "no_refit": None,
    }
    single = [model for model in models if not model.is_ensemble]
    try:
        refit = fit_line(
            [model.inside.accuracy for model in single],
            [model.shifted.accuracy for model in single],
        )
    except ValueError as error:
        report["no_refit"] = str(error)
    else:
        report["refit"] = asdict(refit) | {"covers_published": line and refit.covers(line)}
    return report


def _counted(counts: Counts) -> dict[str, Any]:
    return {**asdict(counts), "accuracy": counts.accuracy, "interval": counts.interval()}


def _pairs(predictions: Predictions) -> dict[str, Any]:
    """The matrices of all models, and means over the pairs of single models."""
    import numpy as np

    from ensembles.experiments.robustness.dominance import (
        disagreement_matrix,
        dominance_matrix,
        independent_dominance,
        mean_dominance,
        similarity_matrix,
    )

    correct, single = predictions.correct, predictions.single
    matrices = {
        "dominance": dominance_matrix(correct),
        "similarity": similarity_matrix(correct),
        "disagreement": disagreement_matrix(predictions.classes),
    }
    means: dict[str, float | None] = dict.fromkeys((*MATRICES, "independent_dominance"))
    pairs = np.triu_indices(int(single.sum()), 1)
    if pairs[0].size:
        apart = independent_dominance(correct[single])
        means = {
            "dominance": mean_dominance(correct[single]),
            **{
                name: float(matrices[name][np.ix_(single, single)][pairs].mean())
                for name in ("similarity", "disagreement")
            },
            "independent_dominance": float(np.minimum(apart, apart.T)[pairs].mean()),
        }
    return {name: matrix.tolist() for name, matrix in matrices.items()} | {
        "images": correct.shape[1],
        "pairs": int(pairs[0].size),
        "means": means,
    }


def _triples(inside: Predictions, shifted: Predictions) -> dict[str, Any]:
    """How far the middle of three models is from the chord, over all single models."""
    import numpy as np

    from ensembles.experiments.robustness.dominance import triple_bounds

    single = inside.single
    try:
        found = triple_bounds(inside.correct[single], shifted.correct[single])
    except ValueError as error:
        return {"count": 0, "none": str(error)}
    apart = np.abs(found.deviation)
    names = [name for name, alone in zip(inside.models, single, strict=True) if alone]
    return {
        "count": len(apart),
        "mean_deviation": float(apart.mean()),
        "largest_deviation": float(apart.max()),
        "farthest": [names[model] for model in found.models[apart.argmax()]],
        "mean_bound": float(found.bound.mean()),
    }


# --- telling ------------------------------------------------------------------------------------


def _shift(shift: Mapping[str, Any]) -> str:
    """The accuracies of the models, best in distribution first, and the lines."""
    inside, shifted, line = shift["in_distribution"], shift["shifted"], shift["published_line"]
    models = sorted(
        shift["models"].items(), key=lambda model: -model[1]["in_distribution"]["accuracy"]
    )
    sizes = [sorted({m[side]["n"] for _, m in models}) for side in ("in_distribution", "shifted")]
    heads = [f"{name}, n = {n[0]:,}" for name, n in zip((inside, shifted), sizes, strict=True)]
    known = ["baseline", "effective robustness"] if line else []
    rows = [("correct, % (95 % interval)", *heads, *known)]
    for name, model in models:
        cells = [_percent(model[side]) for side in ("in_distribution", "shifted")]
        if line:
            cells += [f"{100 * model['baseline']:.2f}", f"{model['effective_robustness']:+.2f}"]
        rows.append((name, *cells))
    told = [f"from {inside} to {shifted}", *(f"  {row}" for row in aligned(rows)), ""]
    if line:
        told.append(f"  published baseline (arXiv 2106.15831): logit(out) = {_equation(line)}")
    else:
        told.append("  no line is published for these sets, so there is no effective robustness")
    told.append(_refitted(shift))
    triples = shift.get("triples")
    if triples and triples["count"]:
        told += [
            f"  {triples['count']:,} triple{'s' * (triples['count'] > 1)}: the middle model is "
            f"{100 * triples['mean_deviation']:.2f} points from the chord on average, and "
            f"{100 * triples['largest_deviation']:.2f} at most",
            f"    ({', '.join(triples['farthest'])}); the bound is "
            f"{100 * triples['mean_bound']:.2f} on average",
        ]
    elif triples:
        told.append(f"  no triples: {triples['none']}")
    return "\n".join(told)


def _percent(counts: Mapping[str, Any]) -> str:
    low, high = counts["interval"]
    return f"{100 * counts['accuracy']:.2f} ({100 * low:.2f} to {100 * high:.2f})"


def _equation(line: Mapping[str, Any]) -> str:
    sign = "-" if line["intercept"] < 0 else "+"
    return f"{line['slope']:.4f} logit(in) {sign} {abs(line['intercept']):.4f}"


def _refitted(shift: Mapping[str, Any]) -> str:
    refit = shift["refit"]
    if refit is None:
        return f"  no refit: {shift['no_refit']}"
    ends = " and ".join(
        f"{name} {low:.4f} to {high:.4f}"
        for name, (low, high) in (
            ("slope", refit["slope_interval"]),
            ("intercept", refit["intercept_interval"]),
        )
    )
    held = {
        None: "",
        True: "; the published line is within them",
        False: "; the published line is outside of them",
    }
    return (
        f"  refit: logit(out) = {_equation(refit)} through {refit['n_models']} single "
        f"models, R2 = {refit['r_squared']:.4f}\n"
        f"    (95 % intervals: {ends}{held[refit['covers_published']]})"
    )


def _matrix(name: str, matrix: Sequence[Sequence[float]], models: Sequence[str], place: str) -> str:
    """One matrix in percent, in parts that fit a line; a column has the number of its model."""
    digits = len(str(len(models)))
    labels = [f"{number:>{digits}} {model}" for number, model in enumerate(models, start=1)]
    cell = 6
    across = max(1, (WIDTH - max(map(len, labels))) // cell)
    told = [f"{name} on {place}, % of the images: {MATRICES[name]}"]
    for start in range(0, len(models), across):
        columns = range(start, min(start + across, len(models)))
        rows = [("", *(f"{column + 1:>5}" for column in columns))]
        rows += [
            (label, *(f"{100 * row[column]:5.1f}" for column in columns))
            for label, row in zip(labels, matrix, strict=True)
        ]
        told += [f"  {line}" for line in aligned(rows, gap=" ")]
    return "\n".join(told)


def _means(report: Mapping[str, Any]) -> str:
    """Means over pairs, one row for each set."""
    rows = [("set", "images", "dominance", "of independence", "similarity", "disagreement")]
    pairs = 0
    for place, found in report["sets"].items():
        means, pairs = found["means"], found["pairs"]
        if pairs:
            share = means["independent_dominance"]
            told = f"{means['dominance'] / share:.2f}" if share else "none"
            cells = [f"{100 * means[name]:.2f}" for name in MATRICES]
            rows.append((place, f"{found['images']:,}", cells[0], told, *cells[1:]))
    if not pairs:
        return "no means over pairs: there are fewer than 2 single models"
    head = (
        f"means over {pairs:,} pair{'s' * (pairs > 1)} of single models, % of the images; "
        "dominance is that of the weaker model"
    )
    return "\n".join([head, *(f"  {line}" for line in aligned(rows))])


def parser() -> ArgumentParser:
    """The command's options."""
    return parser_of("robustness", run, example=EXAMPLE)


def main(arguments: Sequence[str]) -> int:
    """Runs the command."""
    return run(**values_of(parser(), arguments))
