"""`ensembles evaluate`: a model on a set of images and on shifted sets, as a result file."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

from ensembles.experiments.commands.parsing import parser_of, values_of
from ensembles.message import aligned

if TYPE_CHECKING:
    import torch

    from ensembles.experiments.data.images import ImageSet
    from ensembles.experiments.evaluation.results import Result
    from ensembles.experiments.evaluation.scores import Evaluation

__all__ = ["main", "parser", "run"]

EXAMPLE = (
    "ensembles evaluate --model resnet20 --data cifar10_lossless --shifted cifar10_jpeg "
    "--same_images"
)


def run(
    *,
    model: str | list[str],
    data: str,
    shifted: str | list[str] = "",
    split: str = "test",
    same_images: bool = False,
    allow_missing_classes: bool = False,
    root: Path | None = None,
    download: bool = False,
    batch_size: int = 256,
    device: str = "auto",
    seed: int = 0,
    out: Path = Path("results"),
    predictions: Path | None = None,
    command: Sequence[str] = (),
) -> int:
    """Evaluates a model on a set of images and on shifted sets, and writes a result.

    The result is a JSON file. It has the number of correct predictions with an exact 95 % interval,
    and the negative log-likelihood in nats. Both are given for every member, and for every
    reduction of the members (arithmetic, geometric, vote). The file also has digests of weights and
    images, the command, and the versions of packages.

    Args:
        model: A pretrained network (resnet20, resnet32, resnet44, resnet56), the folder of a run of
            `ensembles train`, or a checkpoint. Several, separated by commas, form one ensemble.
        data: The set in distribution: digits, cifar10, cifar10_lossless or cifar10_jpeg.
        shifted: Shifted sets, separated by commas. A shifted set is another set of images, such as
            cifar10_1_v4, cifar10_1_v6 or cifar10_jpeg. Or it is a corruption of the set in
            distribution, with its level, such as rotation:3. Corruptions are noise, blur, jpeg,
            brightness, contrast and rotation; levels go from 1 (weak) to 5.
        split: Which images of each set: test or train.
        same_images: From shifted sets that are named, takes only the images that are also in the
            set in distribution. Images are matched by their index in the original set.
        allow_missing_classes: Accepts sets in which a class has no image.
        root: Folder of images. Pretrained weights are in its subfolder `pretrained`. If not given,
            it is the environment variable ENSEMBLES_DATA, or ~/.cache/ensembles if that is not set
            either.
        download: Downloads image sets that are missing (cifar10, cifar10_1_v4, cifar10_1_v6).
        batch_size: How many images are computed together.
        device: cpu, cuda, cuda:1, ... With auto, a GPU is used if there is one.
        seed: Seed of corruptions that are random.
        out: Folder of results, or the name of a new .json file. Nothing is overwritten.
        predictions: A new .npz file for the predicted classes of every member and reduction.
            `ensembles robustness` compares such files.
        command: The command line, for the result.

    Returns:
        The exit status.
    """
    import torch

    from ensembles.experiments.evaluation.loading import load_named
    from ensembles.experiments.evaluation.results import Result, write_result
    from ensembles.experiments.evaluation.scores import evaluate
    from ensembles.experiments.robustness.predictions import write_predictions
    from ensembles.experiments.training.runs import make_folder

    if predictions is not None and predictions.suffix != ".npz":
        raise ValueError(f"{predictions}: predictions are an .npz file, such as predictions.npz")
    for path in (out, predictions):  # before hours of computing
        if path is not None and path.suffix in (".json", ".npz") and path.exists():
            raise FileExistsError(f"{path} exists, and is not overwritten: choose another name")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = _device(device)
    sets = _sets(
        data, _listed(shifted), split, root=root, download=download, seed=seed, paired=same_images
    )
    loaded = load_named(_listed(model), root=root)
    make_folder(out.parent if out.suffix == ".json" else out)
    if predictions is not None:
        make_folder(predictions.parent)
    evaluations = []
    for images in sets:
        print(f"{loaded.name} on {images}, {device}", file=sys.stderr)
        evaluations.append(
            evaluate(
                loaded.network,
                images,
                batch_size=batch_size,
                device=place,
                allow_missing_classes=allow_missing_classes,
            )
        )
    result = Result.of(
        evaluations,
        model=loaded.name,
        options=loaded.options,
        weights=loaded.weights,
        seed=seed,
        command=command,
        device=place,
    )
    path = write_result(result, out)
    if predictions is not None:
        write_predictions(evaluations, predictions, model=loaded.name)
    for line in _copies(evaluations[0]):
        print(line, file=sys.stderr)
    print(_table(result))
    print(path)
    if predictions is not None:
        print(predictions)
    return 0


def _device(name: str) -> torch.device:
    """The device, if it is available; asked before data and weights are loaded."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {name!r} is not available: {str(error).splitlines()[0]}"
        ) from error
    return device


def _sets(
    data: str,
    shifted: list[str],
    split: str,
    *,
    root: Path | None,
    download: bool,
    seed: int,
    paired: bool,
) -> list[ImageSet]:
    from ensembles.experiments.data.corruptions import LEVELS, corrupt
    from ensembles.experiments.data.sources import SETS, load_images

    def load(name: str) -> ImageSet:
        return load_images(name, split, root=root, download=download)

    inside = load(data)
    sets = [inside]
    for name in shifted:
        corruption, colon, level = name.partition(":")
        if colon:
            sets.append(corrupt(inside, corruption, _level(name, level), seed=seed))
        elif name in LEVELS:
            raise ValueError(f"shifted={name} needs a level from 1 to 5, such as {name}:3")
        elif name not in SETS:
            raise ValueError(
                f"there is no set of images {name!r}. There are {', '.join(SETS)}, and "
                f"corruption:level with the corruptions {', '.join(LEVELS)}"
            )
        else:
            found = load(name)
            if found.classes != inside.classes:
                raise ValueError(
                    f"{name} has other classes ({', '.join(found.classes)}) than {data} "
                    f"({', '.join(inside.classes)}): it is not a shifted set of {data}"
                )
            sets.append(_same(inside, found) if paired else found)
    names = [images.name for images in sets]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is given {names.count(name)} times: give it once")
    return sets


def _level(name: str, level: str) -> int:
    if not level.isdecimal():
        raise ValueError(f"shifted={name}: a level is a whole number from 1 (weak) to 5")
    return int(level)


def _same(inside: ImageSet, outside: ImageSet) -> ImageSet:
    """The images of a shifted set that are those of the set in distribution, in its order."""
    rows = {index: row for row, index in enumerate(outside.indices.tolist())}
    missing = [index for index in inside.indices.tolist() if index not in rows]
    if missing:
        raise ValueError(
            f"{outside.name} lacks {len(missing)} of the {len(inside)} images of {inside.name}, "
            f"the first is image {missing[0]}: the sets cannot be compared image by image"
        )
    found = outside.select([rows[index] for index in inside.indices.tolist()])
    different = (found.labels != inside.labels).nonzero()
    if len(different):
        raise ValueError(
            f"image {int(inside.indices[different[0]])} has another label in {outside.name} than "
            f"in {inside.name}: the same index means different images in the two sets"
        )
    return found


def _copies(evaluation: Evaluation) -> Iterator[str]:
    """Says which members are one network: copies of a run, or members with one number and seed."""
    for one, other in combinations(evaluation.reduced, 2):
        if evaluation.members[one].log_probabilities.equal(
            evaluation.members[other].log_probabilities
        ):
            yield (
                f"{one} and {other} give the same probabilities for every image: they are one "
                "network, and one network is no ensemble. Train them with different seeds."
            )


def _listed(names: str | list[str]) -> list[str]:
    given = names.split(",") if isinstance(names, str) else names
    return [name.strip() for name in given if name.strip()]


def _table(result: Result) -> str:
    """Percent correct with intervals, one row for each classifier, one column for each set."""
    heads = [f"{e.data.name}, n = {e.data.n:,}" for e in result.evaluations]
    rows = [("correct, % (95 % interval)", *heads)]
    first = result.evaluations[0]
    for kind in ("members", "reductions"):
        for name in getattr(first, kind):
            scores = [getattr(evaluation, kind)[name] for evaluation in result.evaluations]
            cells = [
                f"{100 * s.accuracy:.2f} ({100 * s.interval[0]:.2f} to {100 * s.interval[1]:.2f})"
                for s in scores
            ]
            rows.append((name if kind == "members" else f"ensemble, {name}", *cells))
    return "\n".join(aligned(rows))


def parser() -> ArgumentParser:
    """The command's options."""
    return parser_of("evaluate", run, example=EXAMPLE, hidden=["command"])


def main(arguments: Sequence[str]) -> int:
    """Runs the command."""
    return run(**values_of(parser(), arguments), command=["ensembles", "evaluate", *arguments])
