"""NumPy arrays from files, checked: an error names the file, the array, and what to do."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

__all__ = ["npz_keys", "read_npy", "read_npz", "require_array", "require_labels"]

SHOWN = 8
"""So many arrays of a file are named in an error."""


def npz_keys(path: Path) -> tuple[str, ...]:
    """The names of the arrays of an npz file, in their order.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no npz file, or is cut off or damaged.
    """
    with path.open("rb") as file:
        opened = _opened(file, path)
        if not isinstance(opened, NpzFile):
            raise ValueError(f"{path} is a single array, expected an npz file.")
        return tuple(opened)


def read_npz(path: Path, keys: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Reads some arrays of an npz file, each whole; pickled objects are refused.

    Args:
        path: The file.
        keys: The arrays that are needed.

    Returns:
        The arrays, by key.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no npz file, is cut off or damaged, or lacks a key.
    """
    arrays = {}
    with path.open("rb") as file:  # np.load leaves the files open that it cannot read
        opened = _opened(file, path)
        if not isinstance(opened, NpzFile):
            raise ValueError(
                f"{path} is a single array, expected an npz file with {', '.join(keys)}."
            )
        for key in keys:
            if key not in opened:
                there = ", ".join(list(opened)[:SHOWN]) or "none"
                hidden = f", and {len(opened) - SHOWN} more" if len(opened) > SHOWN else ""
                raise ValueError(
                    f"{path} has no array {key!r}: it has {there}{hidden}. Usual cause: another "
                    "file of the same name."
                )
            try:
                arrays[key] = np.asarray(opened[key])
            except Exception as error:
                _damaged(path, f"array {key!r}", error)
    return arrays


def read_npy(path: Path) -> NDArray[Any]:
    """Reads the array of an npy file; pickled objects are refused.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no npy file, or is cut off or damaged.
    """
    with path.open("rb") as file:
        found = _opened(file, path)
        if not isinstance(found, np.ndarray):
            raise ValueError(f"{path} is an npz file, expected an npy file with a single array.")
    return found


def require_array(
    array: NDArray[Any], dtypes: Sequence[str], shape: Sequence[int | None], path: Path, key: str
) -> NDArray[Any]:
    """Refuses an array of another type or shape.

    Args:
        array: The array, which is returned.
        dtypes: Names of the types that it may have.
        shape: Its shape; None stands for any size.
        path: File that it comes from, for the message.
        key: Its name there.

    Raises:
        ValueError: If it has another type or shape.

    Example:
        >>> require_array(np.zeros(3), ["uint8"], (None,), Path("a.npz"), "labels")
        Traceback (most recent call last):
        ...
        ValueError: a.npz: array 'labels' is float64 of the shape (3,), expected uint8 of ...
    """
    fits = array.ndim == len(shape) and all(
        wanted in (None, size) for wanted, size in zip(shape, array.shape, strict=True)
    )
    if array.dtype.name not in dtypes or not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{path}: array {key!r} is {array.dtype} of the shape {array.shape}, expected "
            f"{' or '.join(dtypes)} of the shape ({wanted})."
        )
    return array


def require_labels(
    labels: NDArray[Any], count: int, classes: int, path: Path, key: str
) -> NDArray[np.int64]:
    """Refuses labels that are not whole numbers from 0 to below the number of classes.

    Args:
        labels: The labels.
        count: How many there have to be.
        classes: Number of classes.
        path: File that they come from, for the message.
        key: Their name there.

    Returns:
        The labels as int64, (count,).

    Raises:
        ValueError: Naming the first place that is wrong.

    Example:
        >>> require_labels(np.array([3, 12], dtype=np.uint8), 2, 10, Path("a.npz"), "labels")
        Traceback (most recent call last):
        ...
        ValueError: a.npz: array 'labels' has 12 at place 1, and labels are from 0 to 9.
    """
    kinds = ["uint8", "int32", "int64"]
    found = require_array(labels, kinds, (count,), path, key).astype(np.int64)
    wrong = np.flatnonzero((found < 0) | (found >= classes))
    if wrong.size:
        raise ValueError(
            f"{path}: array {key!r} has {found[wrong[0]]} at place {wrong[0]}, and labels are "
            f"from 0 to {classes - 1}."
        )
    return found


def _opened(file: IO[bytes], path: Path) -> Any:
    try:
        return np.load(file, allow_pickle=False)
    except Exception as error:  # whatever zipfile, zlib and NumPy make of a damaged file
        _damaged(path, "the file", error)


def _damaged(path: Path, what: str, error: Exception) -> NoReturn:
    kind = " (it is no zip archive)" if isinstance(error, zipfile.BadZipFile) else ""
    raise ValueError(
        f"{path}: {what} cannot be read{kind}: {type(error).__name__}: {error}. Usual cause: a "
        f"copy that was cut off; the file has {path.stat().st_size} bytes. Fetch it anew."
    ) from error
