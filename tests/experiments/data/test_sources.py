"""Sets by name, and the division of a training set."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from ensembles.experiments.data.sources import (
    CLASS_NAMES,
    SETS,
    data_folder,
    load_images,
    split_validation,
)


@pytest.fixture(scope="module")
def digits():
    return load_images("digits", "train"), load_images("digits", "test")


def test_the_digits_are_divided_without_rest_and_with_equal_shares(digits):
    train, test = digits
    assert (len(train), len(test)) == (1000, 797)
    assert sorted([*train.indices.tolist(), *test.indices.tolist()]) == list(range(1797))
    whole = load_digits().target
    for part in digits:
        shares = [(whole == c).sum() * len(part) / 1797 for c in range(10)]
        differences = zip(part.counts(), shares, strict=True)
        assert max(abs(found - share) for found, share in differences) < 1
        part.require_every_class()


def test_the_digits_are_scikit_learns(digits):
    stored = load_digits()
    for part in digits:
        rows = part.indices.numpy()
        expected = torch.tensor(stored.images[rows] * 255 / 16)
        for channel in range(3):
            assert (part.pixels[:, channel].double() - expected).abs().max() <= 0.5
        assert part.labels.tolist() == stored.target[rows].tolist()
        assert part.classes == CLASS_NAMES["digits"] == tuple(map(str, stored.target_names))
        assert not part.flippable


def test_the_division_of_the_digits_never_changes(digits):
    assert [part.sha256[:16] for part in digits] == ["3e0e25eb24183586", "5ec4f611542cbfa1"]


def test_the_digits_are_normalised_by_their_training_set(digits):
    train, test = digits
    pixels = train.normalised()
    assert abs(pixels.mean()) < 1e-3
    assert abs(pixels.std(correction=0) - 1) < 1e-3
    assert (train.mean, train.std) == (test.mean, test.std)


def test_unknown_names_and_splits_are_told_with_those_there_are():
    with pytest.raises(ValueError, match=r"'mnist'. There are: digits, cifar10, cifar10_1_v4, "):
        load_images("mnist", "test")
    for name in SETS:
        with pytest.raises(ValueError, match="'validation' is neither 'train' nor 'test'"):
            load_images(name, "validation")


def test_files_are_looked_for_where_the_caller_the_variable_or_the_cache_says(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("ENSEMBLES_DATA", raising=False)
    assert data_folder() == tmp_path / ".cache" / "ensembles"
    assert data_folder("~/data") == tmp_path / "data"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data_folder() == tmp_path / "cache" / "ensembles"
    monkeypatch.setenv("ENSEMBLES_DATA", str(tmp_path / "mine"))
    assert data_folder() == tmp_path / "mine"
    assert data_folder("other") == Path("other")
    with pytest.raises(FileNotFoundError, match=os.fspath(tmp_path / "mine")):
        load_images("cifar10_jpeg", "test")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 999), st.integers(-5, 2**40))
def test_a_validation_set_is_disjoint_stratified_and_of_the_size_asked(count, seed):
    whole = load_images("digits", "train")
    train, validation = split_validation(whole, count, seed)
    assert (len(train), len(validation)) == (1000 - count, count)
    together = [*train.indices.tolist(), *validation.indices.tolist()]
    assert sorted(together) == whole.indices.tolist()
    differences = zip(validation.counts(), whole.counts(), strict=True)
    assert max(abs(found - size * count / 1000) for found, size in differences) < 1
    assert (train.split, validation.split) == ("train", "validation")


def test_a_division_repeats_with_its_seed_and_with_no_other(digits):
    first, again, other = (split_validation(digits[0], 0.2, s)[1] for s in (1, 1, 2))
    assert first.sha256 == again.sha256
    assert set(first.indices.tolist()) != set(other.indices.tolist())
    torch.manual_seed(99)
    assert split_validation(digits[0], 0.2, 1)[1].sha256 == first.sha256


def test_a_share_is_rounded_to_images(digits):
    assert len(split_validation(digits[0], 0.0996, 0)[1]) == 100


def test_every_image_is_equally_often_chosen(digits):
    times = torch.zeros(1797)
    for seed in range(200):
        times[split_validation(digits[0], 0.5, seed)[1].indices] += 1
    seen = times[digits[0].indices]
    assert seen.min() > 100 - 6 * 50**0.5  # six standard deviations
    assert seen.max() < 100 + 6 * 50**0.5


@pytest.mark.parametrize(
    "share", [0, 0.0, 1.0, 1000, 1001, -1, 0.0004, 1.5, -0.1, float("nan"), True, False]
)
def test_a_division_that_leaves_one_set_empty_is_refused(digits, share):
    with pytest.raises(ValueError, match=r"validation=.* of 1000 images leaves one set empty"):
        split_validation(digits[0], share, 0)


def test_a_test_set_is_not_divided(digits):
    with pytest.raises(ValueError, match=r"^digits: this is a test set\. What is chosen on it"):
        split_validation(digits[1], 0.1, 0)
    assert len(split_validation(replace(digits[1], split=""), 0.1, 0)[1]) == 80
