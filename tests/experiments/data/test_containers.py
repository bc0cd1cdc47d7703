"""CIFAR-10 in one file: the real ones, and small ones that are wrong."""

import hashlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from ensembles.experiments.data.cifar10 import CLASSES
from ensembles.experiments.data.containers import load_cifar10_jpeg, load_cifar10_lossless
from ensembles.experiments.data.sources import load_images

DATA = Path(os.environ.get("ENSEMBLES_DATA", Path(__file__).parents[4] / "shared" / "data"))
NAMES = ("cifar10_jpeg.npz", "cifar10_raw_prefix.npz")

needs_data = pytest.mark.skipif(
    not all((DATA / name).is_file() for name in NAMES),
    reason=f"{' or '.join(NAMES)} is not in {DATA} (set ENSEMBLES_DATA)",
)

DECODED = "b7018a062865e9348a704e72416eb53c816b43cc8ac42ab43276a2b967508ab6"
"""Of the 10,000 test images, (image, 32, 32, 3), by libjpeg-turbo 3.2 (the data's README)."""


@pytest.fixture(scope="module")
def jpeg_test():
    return load_images("cifar10_jpeg", "test", root=DATA)


@needs_data
def test_the_jpeg_images_are_those_of_the_data_set(jpeg_test):
    if features.version("libjpeg_turbo") not in ("3.1.0", "3.2.0"):
        pytest.skip(f"decodes otherwise, maybe: libjpeg {features.version('libjpeg_turbo')}")
    last = jpeg_test.pixels.permute(0, 2, 3, 1).contiguous().numpy()
    assert hashlib.sha256(last.tobytes()).hexdigest() == DECODED
    assert jpeg_test.counts() == (1000,) * 10
    assert np.array_equal(jpeg_test.labels.numpy(), np.load(DATA / "cifar10_test_labels.npy"))


@needs_data
@pytest.mark.parametrize("name", NAMES)
def test_classes_have_the_names_that_the_files_give(name):
    with np.load(DATA / name) as stored:
        assert tuple(stored["class_names"].tolist()) == CLASSES


@needs_data
def test_the_lossless_images_are_the_same_images_without_loss(jpeg_test):
    lossless = load_images("cifar10_lossless", "test", root=DATA)
    lossy = jpeg_test.select(lossless.indices)
    assert torch.equal(lossy.labels, lossless.labels)
    error = (lossy.pixels.double() - lossless.pixels.double()).abs().mean((1, 2, 3))
    # 5.786 on average, 2.02 to 11.81 for one image (the data's README)
    assert error.mean().item() == pytest.approx(5.786, abs=5e-4)
    assert error.min().item() == pytest.approx(2.02, abs=5e-3)
    assert error.max().item() == pytest.approx(11.81, abs=5e-3)


@needs_data
def test_the_lossless_training_images_know_their_place_and_have_the_published_mean():
    train = load_images("cifar10_lossless", "train", root=DATA)
    expected = [10_000 * batch + place for batch in range(5) for place in range(932)]
    assert train.indices.tolist() == expected
    pixels = train.pixels.double() / 255
    # within five standard errors of 4,660 images whose means vary by 0.13
    assert (pixels.mean((0, 2, 3)) - torch.tensor(train.mean)).abs().max() < 0.01
    assert (pixels.std((0, 2, 3)) - torch.tensor(train.std)).abs().max() < 0.005


def encoded(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95)
    return np.frombuffer(file.getvalue(), np.uint8)


def jpeg_arrays():
    images = np.random.RandomState(0).randint(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    files = [encoded(image) for image in images]
    return {
        "test_jpeg": np.concatenate(files),
        "test_offsets": np.cumsum([0, *map(len, files)]),
        "test_labels": np.array([3, 0, 9], np.uint8),
    }


def jpeg_arrays_and_cuts():
    arrays = jpeg_arrays()
    return arrays["test_jpeg"], arrays["test_offsets"][1:-1]


def raw_arrays():
    return {
        "train_data": np.random.RandomState(0).randint(0, 256, (3, 3072)).astype(np.uint8),
        "train_labels": np.array([3, 0, 9], np.uint8),
        "train_index": np.array([0, 10_000, 40_931], np.int32),
    }


def test_small_containers_of_the_same_form_are_read(tmp_path):
    np.savez(tmp_path / NAMES[0], **jpeg_arrays())
    np.savez(tmp_path / NAMES[1], **raw_arrays())
    lossy, exact = load_cifar10_jpeg("test", tmp_path), load_cifar10_lossless("train", tmp_path)
    assert lossy.labels.tolist() == exact.labels.tolist() == [3, 0, 9]
    assert exact.indices.tolist() == [0, 10_000, 40_931]
    assert np.array_equal(exact.pixels.numpy().reshape(3, -1), raw_arrays()["train_data"])
    for place, file in enumerate(np.split(*jpeg_arrays_and_cuts())):
        with Image.open(io.BytesIO(file.tobytes())) as image:
            expected = np.asarray(image).transpose(2, 0, 1)
        assert np.array_equal(lossy.pixels[place].numpy(), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_offsets": None}, "no array 'test_offsets': it has test_jpeg, test_labels"),
        ({"test_offsets": lambda a: a[:-1]}, r"'test_offsets' is from 0 to \d+, expected from 0"),
        ({"test_offsets": lambda a: a + 1}, r"'test_offsets' is from 1 to"),
        ({"test_offsets": lambda a: np.maximum(a, 1)}, r"'test_offsets' is from 1 to"),
        ({"test_offsets": lambda a: a[:0]}, r"'test_offsets' is empty, expected from 0 to"),
        ({"test_offsets": lambda a: a[[0, 2, 1, 3]]}, "does not increase at place 2"),
        ({"test_offsets": lambda a: a.astype(float)}, "'test_offsets' is float64"),
        (
            {"test_offsets": lambda a: a + np.array([0, 5, 0, 0])},
            r"image 1 of array 'test_jpeg' cannot be",
        ),
        ({"test_jpeg": lambda a: a[:-200]}, "expected from 0 to"),
        ({"test_jpeg": lambda a: np.zeros_like(a)}, "image 0 of array 'test_jpeg' cannot be dec"),
        ({"test_jpeg": lambda a: a.astype(int)}, r"'test_jpeg' is int64"),
        ({"test_labels": lambda a: a[1:]}, r"'test_labels' is uint8 of the shape \(2,\), expect"),
        ({"test_labels": lambda a: a + 1}, "'test_labels' has 10 at place 2"),
    ],
)
def test_a_jpeg_container_that_is_wrong_is_told_with_file_and_array(tmp_path, change, message):
    arrays = jpeg_arrays()
    for key, function in change.items():
        if function is None:
            del arrays[key]
        else:
            arrays[key] = function(arrays[key])
    np.savez(tmp_path / NAMES[0], **arrays)
    with pytest.raises(ValueError, match=rf"cifar10_jpeg\.npz.*{message}"):
        load_cifar10_jpeg("test", tmp_path)


def test_an_image_of_another_size_is_told(tmp_path):
    arrays = jpeg_arrays()
    small = encoded(np.zeros((16, 32, 3), np.uint8))
    arrays["test_jpeg"] = np.concatenate([arrays["test_jpeg"], small])
    arrays["test_offsets"] = np.append(arrays["test_offsets"], len(arrays["test_jpeg"]))
    arrays["test_labels"] = np.append(arrays["test_labels"], np.uint8(1))
    np.savez(tmp_path / NAMES[0], **arrays)
    with pytest.raises(ValueError, match=r"'test_jpeg\[image 3\]' is uint8 of the shape \(16, 32"):
        load_cifar10_jpeg("test", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_data": lambda a: a[:, 1:]}, r"'train_data' .*\(3, 3071\), expected uint8 of the"),
        ({"train_data": lambda a: a / 255}, "'train_data' is float64"),
        ({"train_labels": lambda a: a[:2]}, r"'train_labels' .* expected"),
        ({"train_labels": lambda a: a * 5}, "'train_labels' has 15 at place 0"),
        ({"train_index": lambda a: a - 1}, "'train_index' has negative or repeated places"),
        ({"train_index": lambda a: a * 0}, "'train_index' has negative or repeated places"),
    ],
)
def test_a_lossless_container_that_is_wrong_is_told(tmp_path, change, message):
    arrays = raw_arrays()
    for key, function in change.items():
        arrays[key] = function(arrays[key])
    np.savez(tmp_path / NAMES[1], **arrays)
    with pytest.raises(ValueError, match=rf"cifar10_raw_prefix\.npz.*{message}"):
        load_cifar10_lossless("train", tmp_path)


@pytest.mark.parametrize("name", ["cifar10_jpeg", "cifar10_lossless"])
def test_a_missing_container_is_told_with_folder_and_option(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=rf"npz is not in {tmp_path}.*root=.*ENSEMBLES_DAT"):
        load_images(name, "test", root=tmp_path)
