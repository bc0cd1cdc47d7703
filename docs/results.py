"""Trains and evaluates what `results.md` tells of, and writes its tables and pictures.

    ENSEMBLES_DATA=FOLDER python docs/results.py measure --runs FOLDER [--study digits] [--seed 0 1]
    python docs/results.py page

`measure` does what is not done yet: killed, it goes on where it was. It leaves the checkpoints in
the folder of runs, and each result with the table of its training in `docs/results/`. `page` makes
the tables of `results.md`, between their marks, and the pictures, from these files alone.
"""

import argparse
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from ensembles.experiments.data.corruptions import corrupt
from ensembles.experiments.data.images import ImageSet
from ensembles.experiments.data.sources import load_images
from ensembles.experiments.evaluation.counts import clopper_pearson
from ensembles.experiments.evaluation.loading import LoadedNetwork, load_named
from ensembles.experiments.evaluation.pretrained import PRETRAINED
from ensembles.experiments.evaluation.results import (
    EvaluatedData,
    Result,
    Score,
    read_result,
    write_result,
)
from ensembles.experiments.evaluation.scores import evaluate
from ensembles.experiments.plots import plot_training_curves, read_curves
from ensembles.experiments.training.networks import Kind, NetworkOptions
from ensembles.experiments.training.options import Execution, TrainingOptions
from ensembles.experiments.training.schedules import Schedule
from ensembles.experiments.training.trainer import train
from ensembles.models.objectives import Interpolated, Mean, MeanField, Objective, Stochastic, Sum
from ensembles.models.rates import equivalent_hyperparameters

DOCS = Path(__file__).parent
PAGE = DOCS / "results.md"
RESULTS = DOCS / "results"

MEMBERS = 4

SHOWN = {
    "single": "itself",
    "parent": "parent",
    "member": "one member",
    "subnet": "one subnet",
    "group": "one group",
    "arithmetic": "mean of probabilities",
    "geometric": "mean of logits",
    "vote": "vote",
}
"""Classifiers of a table: members, by the beginning of their names, and reductions."""


PRETRAINED_SETS = ("official pixels", "the same as JPEG", "all as JPEG")


@dataclass(frozen=True)
class Trained:
    """A network with the objective that trains it.

    Attributes:
        told: What it is, for the table.
        kind: Of `NetworkOptions`.
        objective: Of `TrainingOptions`.
        width: Of the network, or of the parent.
        members: Of an ensemble, or groups.
        shown: The rows of the table, keys of `SHOWN`.
        options: Of `TrainingOptions` too, where they are not the defaults.
    """

    told: str
    kind: Kind
    objective: Objective
    width: int
    members: int
    shown: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


DEFAULTS = TrainingOptions()

LIKE_SUM = equivalent_hyperparameters(
    "sum",
    "mean",
    members=MEMBERS,
    optimizer="sgd",
    lr=DEFAULTS.lr,
    weight_decay=DEFAULTS.weight_decay,
)
"""What makes the mean loss train as the sum does: four times the rate, a fourth of the decay."""


def _ensemble(objective: Objective, name: str, **options: Any) -> Trained:
    told, shown = f"ensemble of {MEMBERS}, {name}", ("member", "arithmetic")
    return Trained(told, "ensemble", objective, 1, MEMBERS, shown, options)


def _subnets(objective: Objective, name: str) -> Trained:
    shown = ("parent", "subnet", "arithmetic")
    return Trained(f"parent and 4 subnets, {name}", "subnets", objective, 2, 1, shown)


TRAINED = {
    "ensemble_sum": _ensemble(Sum(), "sum"),
    "ensemble_mean": _ensemble(Mean(), "mean"),
    "ensemble_mean_like_sum": _ensemble(
        Mean(),
        "mean, rescaled to train as the sum",
        lr=LIKE_SUM.lr,
        weight_decay=LIKE_SUM.weight_decay,
    ),
    "wide": Trained("wide ResNet-18-2 alone", "single", Sum(), 2, 1, ("single",)),
    "interpolated_0.25": _subnets(Interpolated(0.25), "interpolated, lam = 0.25"),
    "interpolated_0.5": _subnets(Interpolated(0.5), "interpolated, lam = 0.5"),
    "interpolated_0.75": _subnets(Interpolated(0.75), "interpolated, lam = 0.75"),
    "stochastic_0.5": _subnets(Stochastic(0.5, "one"), "stochastic, p = 0.5, one subnet a step"),
    "mean_field": Trained(
        "wide ResNet-18-2, mean field of 4 groups",
        "mean_field",
        MeanField(),
        2,
        MEMBERS,
        ("group", "geometric"),
    ),
}


@dataclass(frozen=True)
class Study:
    """Images, and what is common to all networks that are trained on them."""

    title: str
    training: Callable[[], ImageSet]
    test: Callable[[], ImageSet]
    shifts: Mapping[str, int]
    network: Mapping[str, Any]
    options: Mapping[str, Any]


STUDIES = {
    "digits": Study(
        title="Digits",
        training=lambda: load_images("digits", "train"),
        test=lambda: load_images("digits", "test"),
        shifts={"rotation": 5, "noise": 5, "blur": 5},
        network={"base_channels": 16, "stem": "cifar"},
        options={"epochs": 30, "batch_size": 50, "augment": None, "validation": 100},
    ),
    "cifar10_jpeg": Study(
        title="CIFAR-10 as JPEG",
        training=lambda: load_images("cifar10_jpeg", "train").select(range(5000)),
        test=lambda: load_images("cifar10_jpeg", "test"),
        shifts={"noise": 3, "blur": 3, "contrast": 3},
        network={"base_channels": 16, "stem": "cifar_maxpool"},
        options={"epochs": 20, "batch_size": 100, "validation": 500},
    ),
}


# --- measuring ----------------------------------------------------------------------------------


def measure(study: str, seed: int, runs: Path) -> None:
    """Trains and evaluates every network of a study that has no result yet."""
    chosen = STUDIES[study]
    for name, trained in TRAINED.items():
        result = RESULTS / study / f"{name}-seed{seed}.json"
        if result.exists():
            continue
        network = NetworkOptions(
            kind=trained.kind, width=trained.width, members=trained.members, **chosen.network
        )
        options = TrainingOptions(
            seed=seed,
            objective=trained.objective,
            schedule=Schedule(warmup_epochs=2),
            **chosen.options,
            **trained.options,
        )
        execution = Execution(accelerator="cpu", progress=False, tensorboard=False, keep=1)
        run = train(
            network, options, chosen.training(), runs / study / result.stem, execution=execution
        )
        test = chosen.test()
        shifted = (corrupt(test, shift, level, seed=0) for shift, level in chosen.shifts.items())
        result.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(run.folder / "epochs.csv", result.with_suffix(".csv"))
        _write(name, load_named([str(run.folder)]), [test, *shifted], result, seed)
        print(f"{study} {name} seed {seed}: done", flush=True)


def measure_pretrained() -> None:
    """Evaluates the published networks, on official pixels and on the same images as JPEG."""
    result = RESULTS / "pretrained.json"
    if result.exists():
        return
    lossless, jpeg = (load_images(f"cifar10_{kind}", "test") for kind in ("lossless", "jpeg"))
    places = {int(index): place for place, index in enumerate(jpeg.indices)}
    same = jpeg.select([places[int(index)] for index in lossless.indices])
    assert torch.equal(same.labels, lossless.labels)
    _write("pretrained", load_named(list(PRETRAINED)), [lossless, same, jpeg], result, None)


def _write(
    name: str, loaded: LoadedNetwork, sets: Sequence[ImageSet], path: Path, seed: int | None
) -> None:
    found = [evaluate(loaded.network, images) for images in sets]
    write_result(
        Result.of(found, model=name, options=loaded.options, weights=loaded.weights, seed=seed),
        path,
    )


# --- the page -----------------------------------------------------------------------------------


def pretrained_table(result: Result) -> list[str]:
    """Percent wrong by network and reduction, beside the published error."""
    sizes = " | ".join(
        f"{told}, n = {evaluated.data.n:,}"
        for told, evaluated in zip(PRETRAINED_SETS, result.evaluations, strict=True)
    )
    lines = [f"| network | published | {sizes} |", "|---|---:|---:|---:|---:|"]
    for name, weights in PRETRAINED.items():
        cells = " | ".join(_wrong(evaluated.members[name]) for evaluated in result.evaluations)
        lines.append(f"| ResNet-{weights.depth} | {weights.test_error:.2f} | {cells} |")
    for reduction in ("arithmetic", "geometric", "vote"):
        cells = " | ".join(_wrong(e.reductions[reduction]) for e in result.evaluations)
        lines.append(f"| all four, {SHOWN[reduction]} | | {cells} |")
    return lines


def study_table(results: Mapping[str, Sequence[Result]]) -> list[str]:
    """Percent correct, by classifier and set."""
    sets = [evaluated.data for evaluated in next(iter(results.values()))[0].evaluations]
    told = [
        "test images",
        *(f"{d.name.removeprefix(sets[0].name + '_').replace('_', ' ')}" for d in sets[1:]),
    ]
    lines = [
        f"| trained | classifier | networks | {' | '.join(told)} |",
        "|---|---|---:|" + "---:|" * len(sets),
    ]
    for name, found in results.items():
        for shown in TRAINED[name].shown:
            cells = [
                [score for result in found for score in _scores(result.evaluations[place], shown)]
                for place in range(len(sets))
            ]
            lines.append(
                f"| {TRAINED[name].told} | {SHOWN[shown]} | {len(cells[0])} | "
                f"{' | '.join(map(_correct, cells))} |"
            )
    return lines


def _scores(evaluated: EvaluatedData, shown: str) -> list[Score]:
    if shown in evaluated.reductions:
        return [evaluated.reductions[shown]]
    members = evaluated.members.items()
    return [score for name, score in members if name == shown or name.startswith(f"{shown}_")]


def _correct(scores: Sequence[Score]) -> str:
    """Of several networks mean and standard deviation, of one its exact interval."""
    if len(scores) == 1:
        low, high = clopper_pearson(scores[0].correct, scores[0].n)
        return f"{100 * scores[0].accuracy:.2f} [{100 * low:.2f}, {100 * high:.2f}]"
    percent = [100 * score.accuracy for score in scores]
    return f"{mean(percent):.2f} ± {stdev(percent):.2f}"


def _wrong(score: Score) -> str:
    low, high = clopper_pearson(score.n - score.correct, score.n)
    return f"{100 * (1 - score.accuracy):.2f} [{100 * low:.2f}, {100 * high:.2f}]"


def read_study(study: str) -> dict[str, list[Result]]:
    """The results of a study by what was trained, in the order of the table."""
    files = {name: sorted((RESULTS / study).glob(f"{name}-seed*.json")) for name in TRAINED}
    return {name: [read_result(file) for file in found] for name, found in files.items() if found}


def tables() -> dict[str, list[str]]:
    """The lines of every table, by the name of its marks."""
    return {
        "pretrained": pretrained_table(read_result(RESULTS / "pretrained.json")),
        **{study: study_table(read_study(study)) for study in STUDIES},
    }


def with_tables(text: str) -> str:
    """The text of the page with what stands between the marks made anew."""
    for name, lines in tables().items():
        start, end = f"<!-- table {name} -->", f"<!-- end of table {name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise SystemExit(f"{PAGE.name} needs the marks {start} and {end}, each once")
        pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
        text = pattern.sub("\n".join([start, "", *lines, "", end]), text)
    return text


def draw(study: str) -> None:
    """Draws accuracy on training and validation images, as the diary's two pictures show it."""
    folder = RESULTS / study
    runs = sorted(folder.glob("ensemble_sum-seed*.csv"))
    singles = [
        read_curves(
            run,
            training=f"train/member_{member}/accuracy",
            validation=f"val/member_{member}/accuracy",
        )
        for run in runs
        for member in range(MEMBERS)
    ]
    curves = {
        TRAINED[name].told: [read_curves(run) for run in sorted(folder.glob(f"{name}-seed*.csv"))]
        for name in ("ensemble_sum", "ensemble_mean", "wide")
    }
    curves = {"single ResNet-18": singles, **curves}
    figure = plot_training_curves(curves, title=STUDIES[study].title)
    figure.savefig(RESULTS / f"{study}.png")


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=["measure", "page"])
    parser.add_argument("--runs", type=Path, help="folder of checkpoints, for `measure`")
    parser.add_argument("--study", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    given = parser.parse_args()
    if given.command == "page":
        PAGE.write_text(with_tables(PAGE.read_text("utf-8")), "utf-8")
        for study in STUDIES:
            draw(study)
        return
    if given.runs is None:
        parser.error("measure needs --runs FOLDER")
    torch.set_num_threads(1)
    measure_pretrained()
    for seed in given.seed:
        for study in given.study:
            measure(study, seed, given.runs)


if __name__ == "__main__":
    main()
