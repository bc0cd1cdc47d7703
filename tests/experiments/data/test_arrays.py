"""Arrays from damaged files: an error that names the file, or the very content."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensembles.experiments.data.arrays import read_npy, read_npz, require_array, require_labels

ARRAYS = {
    "pixels": np.random.RandomState(0).randint(0, 256, 3000).astype(np.uint8),
    "labels": np.arange(50),
}


def packed(**arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


WHOLE = packed(**ARRAYS)


def test_the_arrays_asked_for_are_read(tmp_path):
    (tmp_path / "a.npz").write_bytes(WHOLE)
    found = read_npz(tmp_path / "a.npz", ["labels"])
    assert list(found) == ["labels"]
    assert np.array_equal(found["labels"], ARRAYS["labels"])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, len(WHOLE) - 1))
def test_a_file_that_was_cut_off_anywhere_is_refused_by_its_name(tmp_path_factory, end):
    path = tmp_path_factory.mktemp("cut") / "a.npz"
    path.write_bytes(WHOLE[:end])
    with pytest.raises(ValueError, match=r"a\.npz: the file cannot be read.*Fetch it anew"):
        read_npz(path, list(ARRAYS))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
def test_a_damaged_byte_is_told_or_does_no_harm(tmp_path_factory, place, change):
    path = tmp_path_factory.mktemp("damaged") / "a.npz"
    damaged = bytearray(WHOLE)
    damaged[place] ^= change
    path.write_bytes(damaged)
    try:
        found = read_npz(path, list(ARRAYS))
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert all(np.array_equal(found[key], array) for key, array in ARRAYS.items())


def test_a_damaged_array_is_named(tmp_path):
    damaged = bytearray(WHOLE)
    damaged[1500] ^= 1  # inside of the first array's compressed bytes
    (tmp_path / "a.npz").write_bytes(damaged)
    with pytest.raises(ValueError, match="array 'pixels' cannot be read"):
        read_npz(tmp_path / "a.npz", list(ARRAYS))


def test_a_missing_array_is_named_with_those_that_are_there(tmp_path):
    (tmp_path / "a.npz").write_bytes(WHOLE)
    with pytest.raises(ValueError, match="no array 'images': it has pixels, labels"):
        read_npz(tmp_path / "a.npz", ["labels", "images"])


def test_of_many_arrays_some_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", **{f"a{n}": np.zeros(1) for n in range(11)})
    told = re.escape("it has a0, a1, a2, a3, a4, a5, a6, a7, and 3 more. Usual cause: another file")
    with pytest.raises(ValueError, match=told):
        read_npz(tmp_path / "a.npz", ["images"])


def test_pickled_objects_are_not_loaded(tmp_path):
    (tmp_path / "a.npz").write_bytes(packed(labels=np.array([{}], dtype=object)))
    with pytest.raises(ValueError, match=r"array 'labels' cannot be read.*allow_pickle=False"):
        read_npz(tmp_path / "a.npz", ["labels"])
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"the file cannot be read.*allow_pickle=False"):
        read_npy(tmp_path / "a.npy")


def test_the_other_kind_of_file_is_told(tmp_path):
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, ARRAYS["labels"])
    with pytest.raises(ValueError, match="is a single array, expected an npz file with labels"):
        read_npz(tmp_path / "a.npz", ["labels"])
    (tmp_path / "a.npy").write_bytes(WHOLE)
    with pytest.raises(ValueError, match="is an npz file, expected an npy file"):
        read_npy(tmp_path / "a.npy")


@pytest.mark.parametrize("read", [read_npy, lambda path: read_npz(path, ["labels"])])
def test_a_missing_file_is_a_missing_file(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"nothing\.npz"):
        read(tmp_path / "nothing.npz")


def test_an_npy_file_that_was_cut_off_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", ARRAYS["labels"])
    whole = (tmp_path / "a.npy").read_bytes()
    assert np.array_equal(read_npy(tmp_path / "a.npy"), ARRAYS["labels"])
    for end in (0, 5, 100, len(whole) - 1):
        (tmp_path / "a.npy").write_bytes(whole[:end])
        with pytest.raises(ValueError, match=rf"a\.npy: .*the file has {end} bytes"):
            read_npy(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3), np.int8), r"'x' is int8 of the shape \(2, 3\), expected uint8 or int32"),
        (np.zeros((2, 4), np.uint8), r"shape \(2, 4\), expected .* of the shape \(any, 3\)"),
        (np.zeros(3, np.uint8), r"shape \(3,\), expected"),
    ],
)
def test_another_type_or_shape_is_told(array, message):
    fitting = np.zeros((2, 3), np.int32)
    assert require_array(fitting, ["uint8", "int32"], (None, 3), Path("a.npz"), "x") is fitting
    with pytest.raises(ValueError, match=message):
        require_array(array, ["uint8", "int32"], (None, 3), Path("a.npz"), "x")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 9, 10], np.uint8), "'y' has 10 at place 2, and labels are from 0 to 9"),
        (np.array([0, -1, 3], np.int32), "'y' has -1 at place 1"),
        (np.array([0.0, 1.0, 2.0]), "'y' is float64"),
        (np.array([0, 1], np.uint8), r"expected .* of the shape \(3\)"),
    ],
)
def test_labels_that_are_none_are_told_with_their_place(labels, message):
    with pytest.raises(ValueError, match=message):
        require_labels(labels, 3, 10, Path("a.npz"), "y")
    found = require_labels(np.array([0, 9, 5], np.uint8), 3, 10, Path("a.npz"), "y")
    assert found.dtype == np.int64
    assert found.tolist() == [0, 9, 5]
