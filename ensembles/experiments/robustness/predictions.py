"""Predicted classes of several models on several sets of images, as one file.

An npz file with the arrays ``models`` and ``class_names`` (names), ``labels/<set>`` (sample,) and
``<model>/<set>`` (sample,), the set in distribution first: that of the 30 published models
(`cifar10_1_predictions.npz`). Ours has ``ensembles`` besides: which of the models are predictions
of several others.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ensembles.experiments.data.arrays import npz_keys, read_npz, require_labels
from ensembles.experiments.training.runs import make_folder, write_whole

if TYPE_CHECKING:
    from ensembles.experiments.evaluation.scores import Evaluation

__all__ = ["Predictions", "joined_predictions", "read_predictions", "write_predictions"]

LABELS = "labels"
"""What the arrays of labels are called by, and so no model."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predicted classes of several models on one set of images.

    Example:
        >>> classes = np.array([[0, 1], [0, 0]])
        >>> found = Predictions(("a", "vote"), classes, np.array([0, 1]), ("vote",))
        >>> found.correct.tolist(), found.single.tolist()
        ([[True, True], [True, False]], [True, False])

    Args:
        models: Names.
        classes: Predicted classes, (model, sample), integers from 0.
        labels: (sample,), likewise.
        ensembles: The models that are predictions of several others.
    """

    models: tuple[str, ...]
    classes: NDArray[Any]
    labels: NDArray[Any]
    ensembles: tuple[str, ...] = ()

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Where each model is right, (model, sample)."""
        correct: NDArray[np.bool_] = self.classes == self.labels
        return correct

    @property
    def single(self) -> NDArray[np.bool_]:
        """Which models are no ensembles, (model,)."""
        return np.array([name not in self.ensembles for name in self.models])


def write_predictions(evaluations: Sequence[Evaluation], path: Path | str, *, model: str) -> None:
    """Writes what every member, and every reduction of them, predicts for every image.

    Members have their names, and one that is alone that of the model; reductions are called
    "ensemble, arithmetic", and so on.

    Example::

        write_predictions([evaluate(network, images)], "predictions.npz", model="four")

    Args:
        evaluations: Of one network, one for each set, in distribution first.
        path: A new file, which ends in .npz; its folder is made where it is missing.
        model: The model's name.

    Raises:
        FileExistsError: If there is such a file; it is left as it is.
        ValueError: If a member is called as labels are.
        OSError: If it cannot be written, as on a full disk: no part of it is left.
    """
    first, path = evaluations[0], Path(path)
    reductions = {f"ensemble, {name}": name for name in first.reductions}
    members = {model if len(first.members) == 1 else name: name for name in first.members}
    if LABELS in members:
        raise ValueError(f"a model cannot be called {LABELS!r} in {path}: rename its folder")
    arrays: dict[str, NDArray[Any]] = {
        "models": np.array([*members, *reductions]),
        "class_names": np.array(first.images.classes),
        "ensembles": np.array([*reductions], dtype=np.str_),
    }
    kind = np.uint8 if len(first.images.classes) <= 256 else np.int32
    for evaluation in evaluations:
        place = evaluation.images.name
        arrays[f"{LABELS}/{place}"] = evaluation.images.labels.cpu().numpy().astype(kind)
        scored = {name: evaluation.members[own] for name, own in members.items()}
        scored |= {name: evaluation.reductions[own] for name, own in reductions.items()}
        for name, scores in scored.items():
            arrays[f"{name}/{place}"] = scores.predictions.numpy().astype(kind)
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    make_folder(path.parent)
    write_whole(path, content.getbuffer(), replace=False)


def read_predictions(path: Path | str) -> dict[str, Predictions]:
    """Reads a file of predictions.

    Example::

        read_predictions("cifar10_1_predictions.npz")["v6"].correct  # (30, 2000)

    Args:
        path: The file, of `write_predictions` or with the same arrays.

    Returns:
        The predictions by set, in the order of the file: in distribution first.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or no such file, naming the array that is missing or wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there are no predictions {path}: `ensembles evaluate --predictions` writes them"
        )
    keys = npz_keys(path)
    sets = [key.removeprefix(f"{LABELS}/") for key in keys if key.startswith(f"{LABELS}/")]
    names = read_npz(path, ["models", "class_names", *(["ensembles"] * ("ensembles" in keys))])
    models, classes = (_names(names[key], path, key) for key in ("models", "class_names"))
    mixed = _names(names["ensembles"], path, "ensembles") if "ensembles" in names else ()
    if not sets or not models:
        raise ValueError(f"{path} has no predictions: expected models, and arrays {LABELS}/<set>")
    wanted = [f"{name}/{place}" for place in sets for name in (LABELS, *models)]
    arrays = read_npz(path, wanted)
    found = {}
    for place in sets:
        count = arrays[f"{LABELS}/{place}"].size
        rows = {
            name: require_labels(
                arrays[f"{name}/{place}"], count, len(classes), path, f"{name}/{place}"
            )
            for name in (LABELS, *models)
        }
        found[place] = Predictions(
            models, np.stack([rows[name] for name in models]), rows[LABELS], mixed
        )
    return found


def joined_predictions(
    files: Mapping[str, Mapping[str, Predictions]],
) -> dict[str, Predictions]:
    """Puts the models of several files side by side.

    Example:
        >>> found = {"digits": Predictions(("single",), np.array([[0, 1]]), np.array([0, 1]))}
        >>> joined_predictions({"one": found, "two": found})["digits"].models
        ('one, single', 'two, single')

    Args:
        files: By the file's name, what `read_predictions` returned.

    Returns:
        The predictions by set; names of models that several files have begin with the file's.

    Raises:
        ValueError: If the files have other sets, or other images in a set.
    """
    first, *_ = files
    for file, sets in files.items():
        if list(sets) != list(files[first]):
            raise ValueError(
                f"{first} has predictions on {', '.join(files[first])}, and {file} on "
                f"{', '.join(sets)}: compare models on the same sets"
            )
        for place, found in sets.items():
            if not np.array_equal(found.labels, files[first][place].labels):
                raise ValueError(
                    f"the labels of {place} are others in {first} than in {file}: compare models "
                    "on the same images"
                )
    every = [name for sets in files.values() for name in next(iter(sets.values())).models]

    def called(file: str, name: str) -> str:
        return f"{file}, {name}" if every.count(name) > 1 else name

    return {
        place: Predictions(
            tuple(
                called(file, name) for file, sets in files.items() for name in sets[place].models
            ),
            np.concatenate([sets[place].classes for sets in files.values()]),
            one.labels,
            tuple(
                called(file, name) for file, sets in files.items() for name in sets[place].ensembles
            ),
        )
        for place, one in files[first].items()
    }


def _names(array: NDArray[Any], path: Path, key: str) -> tuple[str, ...]:
    if array.ndim != 1 or array.dtype.kind != "U":
        raise ValueError(
            f"{path}: array {key!r} is {array.dtype} of the shape {array.shape}, expected names"
        )
    return tuple(map(str, array))
