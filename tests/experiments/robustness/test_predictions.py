"""Files of predictions: what is written is read, in the layout of the published ones."""

import errno
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ensembles.experiments.data.sources import load_images
from ensembles.experiments.evaluation.scores import evaluate
from ensembles.experiments.robustness.predictions import (
    Predictions,
    joined_predictions,
    read_predictions,
    write_predictions,
)
from ensembles.experiments.training.networks import NamedEnsemble, SingleNetwork


def linear(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))


@pytest.fixture(scope="module")
def evaluations():
    """Of an ensemble of three, on 60 digits and on 40 others."""
    network = NamedEnsemble(linear(seed) for seed in range(3))
    digits = load_images("digits", "test")
    sets = digits.select(range(60)), replace(digits.select(range(60, 100)), name="others")
    return [evaluate(network, images) for images in sets]


def test_a_file_has_the_layout_of_the_published_predictions(evaluations, tmp_path):
    write_predictions(evaluations, tmp_path / "new" / "p.npz", model="three")
    with np.load(tmp_path / "new" / "p.npz", allow_pickle=False) as arrays:
        models = ["member_0", "member_1", "member_2"]
        reductions = ["ensemble, arithmetic", "ensemble, geometric", "ensemble, vote"]
        assert arrays["models"].tolist() == models + reductions
        assert arrays["ensembles"].tolist() == reductions
        assert arrays["class_names"].tolist() == list("0123456789")
        for evaluation in evaluations:
            name = evaluation.images.name
            assert arrays[f"labels/{name}"].tolist() == evaluation.images.labels.tolist()
            for model in models:
                stored = arrays[f"{model}/{name}"]
                assert stored.dtype == np.uint8
                assert stored.tolist() == evaluation.members[model].predictions.tolist()
            vote = arrays[f"ensemble, vote/{name}"]
            assert vote.tolist() == evaluation.reductions["vote"].predictions.tolist()


def test_what_is_written_is_read_in_its_order(evaluations, tmp_path):
    write_predictions(evaluations, tmp_path / "p.npz", model="three")
    found = read_predictions(tmp_path / "p.npz")
    assert list(found) == ["digits", "others"]
    for evaluation, stored in zip(evaluations, found.values(), strict=True):
        assert stored.single.tolist() == [True] * 3 + [False] * 3
        assert stored.correct[1].tolist() == evaluation.members["member_1"].right.tolist()


def test_a_model_of_one_member_has_its_own_name(tmp_path):
    found = evaluate(SingleNetwork(linear(0)), load_images("digits", "test"))
    write_predictions([found], tmp_path / "p.npz", model="alone")
    stored = read_predictions(tmp_path / "p.npz")["digits"]
    assert (stored.models, stored.ensembles) == (("alone",), ())
    with pytest.raises(ValueError, match=r"cannot be called 'labels' in .*q\.npz: rename its fol"):
        write_predictions([found], tmp_path / "q.npz", model="labels")
    assert [path.name for path in tmp_path.iterdir()] == ["p.npz"]


def test_more_classes_than_a_byte_holds_are_kept(tmp_path):
    digits = load_images("digits", "test")
    many = replace(digits, classes=tuple(map(str, range(300))), labels=digits.labels + 280)
    torch.manual_seed(0)
    network = SingleNetwork(nn.Sequential(nn.Flatten(), nn.Linear(192, 300)))
    found = evaluate(network, many, allow_missing_classes=True)
    write_predictions([found], tmp_path / "p.npz", model="many")
    stored = read_predictions(tmp_path / "p.npz")["digits"]
    assert stored.labels.tolist() == many.labels.tolist()
    assert stored.classes[0].tolist() == found.members["single"].predictions.tolist()


def test_a_file_is_never_overwritten_and_written_whole_or_not_at_all(
    evaluations, tmp_path, monkeypatch
):
    (tmp_path / "p.npz").write_text("precious")
    with pytest.raises(FileExistsError, match=r"p\.npz exists, and is not overwritten"):
        write_predictions(evaluations, tmp_path / "p.npz", model="three")
    assert (tmp_path / "p.npz").read_text() == "precious"

    def full(descriptor):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device while writing .*q\.npz"):
        write_predictions(evaluations, tmp_path / "q.npz", model="three")
    assert [path.name for path in tmp_path.iterdir()] == ["p.npz"]


GOOD = {
    "models": np.array(["a", "b"]),
    "class_names": np.array(["cat", "dog"]),
    "labels/in": np.array([0, 1, 1], dtype=np.uint8),
    "a/in": np.array([0, 1, 0], dtype=np.uint8),
    "b/in": np.array([1, 1, 1], dtype=np.uint8),
}


def saved(path, **changes):
    arrays = {k: v for k, v in (GOOD | changes).items() if v is not None}
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"b/in": None}, "has no array 'b/in': it has models, class_names, labels/in, a/in"),
        ({"models": None}, "has no array 'models'"),
        ({"labels/in": None}, "has no predictions: expected models, and arrays labels/<set>"),
        ({"a/in": GOOD["a/in"][:2]}, r"array 'a/in' is uint8 of the shape \(2,\), expected"),
        ({"a/in": GOOD["a/in"] + 2}, "array 'a/in' has 2 at place 0, and labels are from 0 to 1"),
        ({"a/in": GOOD["a/in"] / 2}, "array 'a/in' is float64"),
        ({"models": np.array([0, 1])}, r"array 'models' is int64 of the shape \(2,\), expected na"),
    ],
)
def test_a_file_that_is_malformed_is_refused_with_the_place(changes, told, tmp_path):
    assert read_predictions(saved(tmp_path / "good.npz"))["in"].correct.sum() == 4
    with pytest.raises(ValueError, match=rf"bad\.npz.*{told}"):
        read_predictions(saved(tmp_path / "bad.npz", **changes))


def test_a_damaged_or_missing_file_is_refused(tmp_path):
    content = saved(tmp_path / "good.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[:-30])
    with pytest.raises(ValueError, match=r"cut\.npz: the file cannot be read"):
        read_predictions(tmp_path / "cut.npz")
    np.save(tmp_path / "single.npz.npy", np.zeros(2))
    with pytest.raises(ValueError, match="is a single array, expected an npz file"):
        read_predictions(tmp_path / "single.npz.npy")
    with pytest.raises(FileNotFoundError, match=r"none\.npz: `ensembles evaluate --predictions`"):
        read_predictions(tmp_path / "none.npz")


def predictions(*models, labels=(0, 1), ensembles=()):
    classes = np.arange(len(models) * 2).reshape(-1, 2)
    return Predictions(models, classes, np.array(labels), ensembles)


def test_models_of_several_files_stand_side_by_side_under_names_of_their_own():
    joined = joined_predictions(
        {
            "one": {"in": predictions("x", "e", ensembles=("e",))},
            "two": {"in": predictions("y", "e", ensembles=("e",))},
        }
    )["in"]
    assert joined.models == ("x", "one, e", "y", "two, e")
    assert joined.ensembles == ("one, e", "two, e")
    assert joined.classes.tolist() == [[0, 1], [2, 3], [0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"out": predictions("y")}, "one has predictions on in, and two on out: compare models on"),
        ({"in": predictions("y", labels=(1, 0))}, "the labels of in are others in one than in two"),
    ],
)
def test_files_of_other_images_are_not_put_together(other, told):
    with pytest.raises(ValueError, match=told):
        joined_predictions({"one": {"in": predictions("x")}, "two": other})
