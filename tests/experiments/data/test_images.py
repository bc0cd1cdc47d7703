"""Sets of images: what does not fit together is refused, with the row that is wrong."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from ensembles.experiments.data.images import ImageSet, normalise


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return ImageSet(
        name="dots",
        version="2",
        pixels=torch.randint(0, 256, (6, 3, 5, 4), dtype=torch.uint8, generator=generator),
        labels=torch.tensor([0, 1, 2, 0, 1, 2]),
        indices=torch.tensor([10, 11, 12, 13, 14, 15]),
        classes=("dot", "dash", "gap"),
        mean=(0.1, 0.2, 0.3),
        std=(0.5, 0.6, 0.7),
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("pixels", torch.zeros(6, 3, 5, 4), r"pixels are torch.float32, expected torch.uint8. Ima"),
        ("pixels", torch.zeros(6, 5, 4, 3).byte(), r"\(6, 5, 4, 3\), expected \(image, 3, height"),
        ("pixels", torch.zeros(6, 1, 5, 4).byte(), r"Repeat grey images three times"),
        ("pixels", torch.zeros(0, 3, 5, 4).byte(), r"at least one image"),
        ("labels", torch.zeros(6), r"labels are torch.float32, expected torch.int64\."),
        ("labels", torch.zeros(5).long(), r"labels have the shape \(5,\), expected \(6,\)"),
        ("labels", torch.zeros(6, 3).long(), r"labels have the shape \(6, 3\), expected \(6,\)"),
        ("labels", torch.tensor([0, 1, 3, 0, 9, 2]), r"row 2 has the label 3, and there are 3 cl"),
        ("labels", torch.tensor([0, 1, 2, 0, -1, 2]), r"row 4 has the label -1"),
        ("labels", torch.zeros(6, device="meta").long(), r"labels are on meta, and pixels on cpu"),
        ("indices", torch.zeros(7).long(), r"indices have the shape \(7,\), expected \(6,\)"),
        ("indices", torch.tensor([0, 1, 2, -3, 4, 5]), r"row 3 has the index -3"),
        ("mean", (0.5, 0.5), r"mean is \(0.5, 0.5\), expected three finite numbers"),
        ("mean", (0.5, float("nan"), 0.5), r"mean is .*nan"),
        ("std", (0.5, 0.0, 0.5), r"std is \(0.5, 0.0, 0.5\), expected .* above 0"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_name(images, field, value, message):
    with pytest.raises(ValueError, match=rf"^dots: .*{message}"):
        replace(images, **{field: value})


def test_an_array_instead_of_a_tensor_is_refused(images):
    with pytest.raises(TypeError, match="labels are of type ndarray, expected a tensor"):
        replace(images, labels=np.zeros(6, dtype=np.int64))


def test_equal_content_has_an_equal_digest_and_any_change_another(images):
    again = copy.deepcopy(images)
    assert images.sha256 == again.sha256
    again.pixels[5, 2, 4, 3] ^= 1
    assert images.sha256 != again.sha256
    labels = images.labels.clone()
    labels[0] = 1
    turned = images.pixels.reshape(6, 3, 4, 5)
    others = [replace(images, labels=labels), replace(images, pixels=turned)]
    assert len({s.sha256 for s in (images, *others)}) == 3


def test_the_digest_is_that_of_the_content_whatever_its_layout(images):
    last = images.pixels.contiguous(memory_format=torch.channels_last)
    assert replace(images, pixels=last).sha256 == images.sha256


@pytest.mark.parametrize(
    "rows", [[4, 1], torch.tensor([4, 1]), np.array([4, 1]), [-2, 1], slice(4, None, -3)]
)
def test_rows_are_selected_in_the_order_given(images, rows):
    chosen = images.select(rows)
    assert chosen.indices.tolist() == [14, 11]
    assert chosen.labels.tolist() == [1, 1]
    assert torch.equal(chosen.pixels, images.pixels[[4, 1]])
    assert torch.equal(images.normalised(rows), images.normalised()[[4, 1]])


def test_a_mask_and_a_slice_select_too(images):
    assert images.select(images.labels == 2).indices.tolist() == [12, 15]
    assert images.select(slice(1, 3)).indices.tolist() == [11, 12]


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([0, 6], IndexError, "row 6 is outside of the 6 images"),
        ([-7], IndexError, "row -7 is outside"),
        ([], ValueError, "no row was selected"),
        (slice(3, 3), ValueError, "no row was selected"),
        ([True, False], ValueError, r"a mask of the shape \(2,\) for 6 images"),
        ([0.5], ValueError, "expected a list of integers"),
        ([[0]], ValueError, "expected a list of integers"),
    ],
)
def test_rows_that_are_not_there_are_refused(images, rows, error, message):
    with pytest.raises(error, match=message):
        images.select(rows)


def test_a_missing_class_is_told_by_its_name(images):
    images.require_every_class()
    cut = images.select(images.labels == 0)
    assert cut.counts() == (2, 0, 0)
    with pytest.raises(ValueError, match="none of the 2 images is of class dash, gap"):
        cut.require_every_class()


def test_images_are_normalised_by_channel(images):
    mean, std = torch.tensor(images.mean).double(), torch.tensor(images.std).double()
    expected = images.pixels.double() / 255
    expected = (expected - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    found = images.normalised()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
    before = images.pixels.clone()
    normalise(images.pixels, images.mean, images.std).zero_()
    assert torch.equal(images.pixels, before)


def test_a_set_is_carried_to_other_processes_and_devices(images):
    again = pickle.loads(pickle.dumps(images))
    assert again.sha256 == images.sha256
    assert images.to("cpu").sha256 == images.sha256


def test_a_set_is_shown_by_its_size_and_not_its_pixels(images):
    assert repr(replace(images, split="train")) == (
        "ImageSet(dots (2), train: 6 images of 3 x 5 x 4, 3 classes)"
    )
    assert len(images) == 6
