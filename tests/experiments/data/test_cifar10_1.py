"""CIFAR-10.1: its digests, its classes, and what a dropped last batch costs."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader, TensorDataset

from ensembles.experiments.data.batches import evaluation_batches
from ensembles.experiments.data.cifar10_1 import CIFAR10_1
from ensembles.experiments.data.sources import load_images

DATA = Path(os.environ.get("ENSEMBLES_DATA", Path(__file__).parents[4] / "shared" / "data"))
PREDICTIONS = DATA / "cifar10_1_predictions.npz"

needs_labels = pytest.mark.skipif(
    not PREDICTIONS.is_file(), reason=f"no {PREDICTIONS.name} in {DATA} (set ENSEMBLES_DATA)"
)


def with_random_images(version, folder):
    """The published labels, random images of the published shape, and their digest."""
    with np.load(PREDICTIONS) as stored:
        labels = stored[f"labels/{version}"].astype(np.int32)
    published = CIFAR10_1[version]
    pixels = np.random.RandomState(0).randint(0, 256, (len(labels), 32, 32, 3)).astype(np.uint8)
    folder.mkdir(exist_ok=True)
    images, answers = (folder / name for name in published.files)
    np.save(images, pixels)
    np.save(answers, labels)
    digests = {**published.sha256, images.name: hashlib.sha256(images.read_bytes()).hexdigest()}
    return replace(published, sha256=digests), pixels, labels


@needs_labels
@pytest.mark.parametrize("version", ["v4", "v6"])
def test_the_labels_of_the_published_predictions_have_the_published_digest(version, tmp_path):
    _, _, labels = with_random_images(version, tmp_path)
    name = CIFAR10_1[version].files[1]
    found = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert found == CIFAR10_1[version].sha256[name]
    assert tuple(np.bincount(labels)) == CIFAR10_1[version].counts


@needs_labels
@pytest.mark.parametrize(("version", "size"), [("v4", 2021), ("v6", 2000)])
def test_a_version_is_loaded_whole(version, size, tmp_path):
    known, pixels, labels = with_random_images(version, tmp_path)
    images = known.load(tmp_path)
    assert (images.name, images.version, images.split) == (f"cifar10_1_{version}", version, "test")
    assert np.array_equal(images.pixels.numpy(), pixels.transpose(0, 3, 1, 2))
    assert np.array_equal(images.labels.numpy(), labels)
    assert len(images) == size == sum(images.counts())
    images.require_every_class()


@needs_labels
@pytest.mark.parametrize(("version", "lost"), [("v4", "airplane"), ("v6", "truck")])
def test_a_loader_that_drops_its_last_batch_loses_a_class_and_ours_does_not(
    version, lost, tmp_path
):
    known, _, _ = with_random_images(version, tmp_path)
    images = known.load(tmp_path)
    loader = DataLoader(TensorDataset(images.indices), batch_size=256, drop_last=True)
    seen = [int(row) for (rows,) in loader for row in rows]
    with pytest.raises(ValueError, match=f"images is of class {lost}\\."):
        images.select(seen).require_every_class()
    labels = [label for _, batch in evaluation_batches(images, 256) for label in batch.tolist()]
    assert labels == images.labels.tolist()


@needs_labels
def test_a_version_is_fetched_when_asked_and_only_then(tmp_path, served):
    known, pixels, _ = with_random_images("v6", tmp_path / "origin")
    known = replace(known, url=served.url)
    for name in known.files:
        served.files[f"/{name}"] = (tmp_path / "origin" / name).read_bytes()
    home = tmp_path / "new"
    with pytest.raises(FileNotFoundError) as caught:
        known.load(home)
    assert f"is not in {home}: {', '.join(known.files)} missing" in str(caught.value)
    assert "download=True" in str(caught.value)
    assert served.asked == []
    assert not home.exists()
    images = known.load(home, download=True)
    assert np.array_equal(images.pixels.numpy(), pixels.transpose(0, 3, 1, 2))
    assert known.load(home, download=True).sha256 == images.sha256
    assert len(served.asked) == 2


@needs_labels
def test_a_file_that_was_changed_is_refused_at_every_load(tmp_path):
    known, _, _ = with_random_images("v6", tmp_path)
    path = tmp_path / known.files[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cifar10\.1_v6_data\.npy holds other content"):
        known.load(tmp_path)


def test_files_of_another_form_are_refused_even_where_their_digest_is_given(tmp_path):
    published = CIFAR10_1["v6"]
    images, answers = (tmp_path / name for name in published.files)

    def given(pixels, labels):
        np.save(images, pixels)
        np.save(answers, labels)
        return replace(
            published,
            sha256={p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (images, answers)},
        )

    pixels, labels = np.zeros((2000, 32, 32, 3), np.uint8), np.arange(2000) % 10
    assert given(pixels, labels).load(tmp_path).counts() == (200,) * 10
    with pytest.raises(ValueError, match=r"'images' is float32 .* expected uint8 of the shape \(2"):
        given(pixels.astype(np.float32), labels).load(tmp_path)
    with pytest.raises(ValueError, match=r"'images' .*\(1999, 32, 32, 3\)"):
        given(pixels[1:], labels).load(tmp_path)
    with pytest.raises(ValueError, match="'labels' has 10 at place 9"):
        given(pixels, np.where(labels == 9, 10, labels)).load(tmp_path)
    with pytest.raises(ValueError, match=r"the classes have \(201, 199, 200.*expected \(200, 200"):
        given(pixels, np.where(np.arange(2000) == 1, 0, labels)).load(tmp_path)


def test_offline_the_message_tells_what_to_put_where(tmp_path):
    known = replace(CIFAR10_1["v4"], url="http://127.0.0.1:9")
    with pytest.raises(ConnectionError) as caught:
        known.load(tmp_path, download=True)
    told = str(caught.value)
    assert f"put it into the folder {tmp_path} as cifar10.1_v4_data.npy (sha256 5aaedc26" in told


def test_there_is_no_training_set(tmp_path):
    with pytest.raises(ValueError, match="a test set only"):
        load_images("cifar10_1_v6", "train", root=tmp_path)
