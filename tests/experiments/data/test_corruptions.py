"""Corruptions: what they do, how strongly, and what they depend on."""

import io
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from scipy.ndimage import gaussian_filter

from ensembles.experiments.data.corruptions import LEVELS, corrupt
from ensembles.experiments.data.images import ImageSet
from ensembles.experiments.data.sources import load_images

DATA = Path(os.environ.get("ENSEMBLES_DATA", Path(__file__).parents[4] / "shared" / "data"))


def smooth(size, count=40):
    """Coloured images with structure at every scale, black and white among them."""
    random = np.random.RandomState(0)
    noise = random.standard_normal((count, 3, size, size))
    values = 128 + 250 * gaussian_filter(noise, (0, 0.5, 1, 1), mode="wrap")
    pixels = torch.from_numpy(values.clip(0, 255).astype(np.uint8))
    pixels[0], pixels[1] = 0, 255
    return ImageSet(
        name="smooth",
        version="1",
        pixels=pixels,
        labels=torch.arange(count) % 10,
        indices=torch.arange(count) * 7,
        classes=tuple("0123456789"),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        split="test",
        flippable=True,
    )


SIZES = {size: smooth(size) for size in (8, 32)}


@pytest.fixture(params=SIZES, ids="{0}x{0}".format)
def images(request):
    return SIZES[request.param]


def moved(one, two):
    return (one.pixels.double() - two.pixels.double()).abs().mean().item()


@pytest.mark.parametrize("corruption", LEVELS)
def test_each_level_moves_the_pixels_further(images, corruption):
    distances = [moved(images, corrupt(images, corruption, n, seed=0)) for n in range(1, 6)]
    assert distances[0] > 0
    assert all(one < two for one, two in pairwise(distances)), distances


@pytest.mark.parametrize("corruption", LEVELS)
def test_an_image_is_corrupted_alike_in_every_subset(images, corruption):
    whole = corrupt(images, corruption, 3, seed=5)
    rows = [7, 31, 2, 7]
    part = corrupt(images.select(rows), corruption, 3, seed=5)
    assert torch.equal(part.pixels, whole.pixels[rows])
    for row in (0, 1, 13):
        alone = corrupt(images.select([row]), corruption, 3, seed=5)
        assert torch.equal(alone.pixels[0], whole.pixels[row])


@pytest.mark.parametrize("corruption", LEVELS)
def test_many_images_are_corrupted_like_few(corruption):
    # more than are computed together
    digits = load_images("digits", "train")
    whole = corrupt(digits, corruption, 2, seed=1)
    part = corrupt(digits.select(slice(250, 270)), corruption, 2, seed=1)
    assert torch.equal(part.pixels, whole.pixels[250:270])


@pytest.mark.parametrize("corruption", LEVELS)
def test_global_generators_are_neither_read_nor_moved(images, corruption):
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = corrupt(images, corruption, 4, seed=3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    torch.manual_seed(2)
    np.random.seed(2)
    assert corrupt(images, corruption, 4, seed=3).sha256 == first.sha256


@pytest.mark.parametrize("corruption", LEVELS)
def test_only_noise_and_rotation_depend_on_the_seed(images, corruption):
    same = (
        corrupt(images, corruption, 3, seed=1).sha256
        == corrupt(images, corruption, 3, seed=2).sha256
    )
    assert same == (corruption not in ("noise", "rotation"))


def test_an_image_is_known_by_its_index_and_not_its_row(images):
    moved_on = replace(images, indices=images.indices + 1)
    first, second = (corrupt(s, "noise", 3, seed=0) for s in (images, moved_on))
    assert first.sha256 != second.sha256


@pytest.mark.parametrize("corruption", LEVELS)
def test_name_and_version_tell_what_was_done_and_the_rest_stays(images, corruption):
    before = images.sha256
    found = corrupt(images, corruption, 2, seed=9)
    assert found.name == f"smooth_{corruption}_2"
    assert found.version == f"1, {corruption} 2, seed 9"
    assert torch.equal(found.labels, images.labels)
    assert torch.equal(found.indices, images.indices)
    assert (found.split, found.flippable, found.mean) == ("test", True, images.mean)
    assert images.sha256 == before


@pytest.mark.parametrize("level", range(1, 6))
def test_noise_has_the_level_s_deviation_and_is_independent_by_pixel(level):
    grey = replace(SIZES[32], pixels=torch.full((40, 3, 32, 32), 128, dtype=torch.uint8))
    noise = corrupt(grey, "noise", level, seed=0).pixels.double() - 128
    wanted = 255 * LEVELS["noise"][level - 1]
    # rounding adds a variance of 1/12; 120,000 numbers tell a deviation to 0.2 %
    assert noise.std().item() == pytest.approx((wanted**2 + 1 / 12) ** 0.5, rel=0.01)
    assert abs(noise.mean().item()) < 5 * wanted / noise.numel() ** 0.5
    neighbours = torch.corrcoef(torch.stack([noise[..., 1:].flatten(), noise[..., :-1].flatten()]))
    channels = torch.corrcoef(noise.transpose(0, 1).flatten(1))
    others = torch.corrcoef(noise.flatten(1)).fill_diagonal_(0)
    assert abs(neighbours[0, 1]) < 0.02
    assert channels.fill_diagonal_(0).abs().max() < 0.03
    assert others.abs().max() < 0.1


@pytest.mark.parametrize("value", [0, 255])
def test_noise_on_black_and_white_ends_at_black_and_white(value):
    flat = replace(SIZES[8], pixels=torch.full((40, 3, 8, 8), value, dtype=torch.uint8))
    found = corrupt(flat, "noise", 5, seed=0).pixels.double()
    assert (found - value).abs().max() < 6 * 255 * LEVELS["noise"][4]
    assert 0.4 < (found == value).double().mean() < 0.6


def test_noise_is_the_same_at_every_level_but_for_its_strength():
    grey = replace(SIZES[32], pixels=torch.full((40, 3, 32, 32), 128, dtype=torch.uint8))
    weak, strong = (corrupt(grey, "noise", n, seed=0).pixels.double() - 128 for n in (1, 5))
    scale = LEVELS["noise"][4] / LEVELS["noise"][0]
    assert (strong - scale * weak).abs().max() <= 0.5 + 0.5 * scale


@pytest.mark.parametrize("level", range(1, 6))
def test_blur_is_scipys(images, level):
    sigma = LEVELS["blur"][level - 1]
    expected = gaussian_filter(images.pixels.double().numpy(), (0, 0, sigma, sigma), mode="mirror")
    found = corrupt(images, "blur", level, seed=0).pixels.double().numpy()
    assert np.abs(found - expected).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("level", range(1, 6))
def test_jpeg_is_pillows(images, level):
    found = corrupt(images, "jpeg", level, seed=0).pixels
    for row in (0, 1, 2, 39):
        file = io.BytesIO()
        image = Image.fromarray(images.pixels[row].permute(1, 2, 0).contiguous().numpy())
        image.save(file, "JPEG", quality=LEVELS["jpeg"][level - 1])
        with Image.open(file) as again:
            expected = torch.from_numpy(np.array(again)).permute(2, 0, 1)
        assert torch.equal(found[row], expected)


@pytest.mark.parametrize("level", range(1, 6))
def test_brightness_is_added_to_the_value_of_the_colour(images, level):
    colours = rgb_to_hsv(images.pixels.permute(0, 2, 3, 1).double().numpy() / 255)
    colours[..., 2] = np.clip(colours[..., 2] + LEVELS["brightness"][level - 1], 0, 1)
    expected = 255 * hsv_to_rgb(colours)
    found = corrupt(images, "brightness", level, seed=0).pixels.permute(0, 2, 3, 1).double().numpy()
    assert np.abs(found - expected).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("level", range(1, 6))
def test_contrast_shrinks_the_distance_from_the_mean_of_each_channel(images, level):
    values = images.pixels.double().numpy()
    mean = values.mean((2, 3), keepdims=True)
    expected = mean + LEVELS["contrast"][level - 1] * (values - mean)
    found = corrupt(images, "contrast", level, seed=0).pixels.double().numpy()
    assert np.abs(found - expected).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("level", range(1, 6))
def test_rotation_turns_half_of_the_images_to_each_side_by_the_level_s_angle(level):
    size = 32
    # one bright spot to the right of the centre: where it goes tells the angle
    pixels = torch.zeros(200, 3, size, size, dtype=torch.uint8)
    pixels[:, :, 15:17, 25:27] = 255
    spots = ImageSet(
        "spots", "1", pixels, torch.zeros(200).long(), torch.arange(200), ("spot",), (0.5,) * 3,
        (0.5,) * 3,
    )  # fmt: skip
    found = corrupt(spots, "rotation", level, seed=0).pixels[:, 0].double()
    place = torch.arange(size) - (size - 1) / 2
    down = (found.sum(2) * place).sum(1) / found.sum((1, 2))
    right = (found.sum(1) * place).sum(1) / found.sum((1, 2))
    angles = torch.rad2deg(torch.atan2(-down, right))
    wanted = LEVELS["rotation"][level - 1]
    assert (angles.abs() - wanted).abs().max() < 0.5
    left = (angles > 0).sum().item()
    assert 60 < left < 140  # six standard deviations of 200 coins


def test_a_direction_of_rotation_is_the_same_at_every_level():
    digits = load_images("digits", "test").select(slice(0, 60))
    one, five = (corrupt(digits, "rotation", n, seed=0).pixels.double() for n in (1, 5))
    other = corrupt(digits, "rotation", 5, seed=1).pixels.double()
    same = (one - five).abs().mean((1, 2, 3))
    assert (same <= (one - other).abs().mean((1, 2, 3))).all()
    assert (five != other).any()


@pytest.mark.parametrize("level", [0, 6, -1, 2.5, True, "3", None])
def test_levels_are_one_to_five(images, level):
    with pytest.raises(ValueError, match=r"levels are the whole numbers from 1, weak, to 5"):
        corrupt(images, "noise", level, seed=0)


def test_an_unknown_corruption_is_told_with_those_there_are(images):
    with pytest.raises(ValueError, match=r"'fog'. There are: noise, blur, jpeg, brightness, contr"):
        corrupt(images, "fog", 1, seed=0)


def test_images_that_are_too_small_to_blur_are_told(images):
    small = replace(images, pixels=images.pixels[:, :, :4, :4])
    assert corrupt(small, "blur", 3, seed=0).pixels.shape == small.pixels.shape
    with pytest.raises(ValueError, match=r"images of 4 x 4 are too small .* at least 5 x 5"):
        corrupt(small, "blur", 5, seed=0)


@pytest.mark.skipif(not (DATA / "cifar10_raw_prefix.npz").is_file(), reason=f"no images in {DATA}")
def test_jpeg_of_real_images_loses_what_the_data_s_readme_measured():
    images = load_images("cifar10_lossless", "test", root=DATA).select(slice(0, 200))
    errors = [moved(images, corrupt(images, "jpeg", n, seed=0)) for n in (1, 2)]
    # quality 75 costs 5.79 on all 846 images: between the qualities 80 and 65
    assert errors[0] < 5.79 < errors[1]
