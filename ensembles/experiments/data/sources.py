"""The image sets by name, and the division of a training set.

All but the digits are files in a folder: the one given, else that of the variable ENSEMBLES_DATA,
else `~/.cache/ensembles`. Nothing is fetched unless asked for, and nothing there is overwritten.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ensembles.experiments.data.cifar10 import CLASSES, load_cifar10
from ensembles.experiments.data.cifar10_1 import CIFAR10_1
from ensembles.experiments.data.containers import load_cifar10_jpeg, load_cifar10_lossless
from ensembles.experiments.data.draws import permutation
from ensembles.experiments.data.images import ImageSet

__all__ = ["CLASS_NAMES", "SETS", "data_folder", "load_images", "split_validation"]

SPLITS = ("train", "test")

DIGITS_TEST = 797
"""Of the 1,797 digits, so that 1,000 are left for training."""

DIGITS_CLASSES = tuple("0123456789")

DIGITS_MEAN, DIGITS_STD = (0.3060, 0.3060, 0.3060), (0.3761, 0.3761, 0.3761)
"""Over all pixels of the 1,000 training digits, scale 0 to 1."""


def load_images(
    name: str, split: str, *, root: Path | str | None = None, download: bool = False
) -> ImageSet:
    """Loads a set of images by its name.

    ==================  =========================================================================
    name                content
    ==================  =========================================================================
    "digits"            1,797 handwritten digits of 8x8 that ship with scikit-learn, grey; divided
                        into 1,000 for training and 797 for testing, classes in equal shares,
                        always the same
    "cifar10"           CIFAR-10 as torchvision stores it: 50,000 and 10,000 images of 32x32
    "cifar10_1_v4"      CIFAR-10.1 v4, 2,021 test images (see `cifar10_1.CIFAR10Point1`)
    "cifar10_1_v6"      CIFAR-10.1 v6, 2,000 test images, 200 of each class
    "cifar10_jpeg"      `cifar10_jpeg.npz`: all 60,000 images, as lossy JPEG
    "cifar10_lossless"  `cifar10_raw_prefix.npz`: 4,660 and 846 images, official pixels
    ==================  =========================================================================

    Args:
        name: Name of the set.
        split: "train" or "test".
        root: Folder of the files; by default that of ENSEMBLES_DATA, or `~/.cache/ensembles`.
        download: Fetches what is missing (cifar10 and CIFAR-10.1). An interrupted download
            is continued.

    Returns:
        The set, on the CPU.

    Raises:
        ValueError: If there is no such set or split, or a file holds other content than expected.
        FileNotFoundError: If a file is missing: names folder, file, and what to do.
        ConnectionError: If a download fails.

    Example:
        >>> load_images("digits", "train")
        ImageSet(digits (scikit-learn, 1,000 + 797), train: 1000 images of 3 x 8 x 8, 10 classes)
    """
    if name not in SETS:
        raise ValueError(f"there is no set of images {name!r}. There are: {', '.join(SETS)}.")
    if split not in SPLITS:
        raise ValueError(
            f"split={split!r} is neither 'train' nor 'test'. A validation set is taken from the "
            "training set by split_validation."
        )
    return SETS[name](split, data_folder(root), download=download)


def data_folder(root: Path | str | None = None) -> Path:
    """The folder of the data files: the one given, that of ENSEMBLES_DATA, or the user's cache.

    Example:
        >>> data_folder("data")
        PosixPath('data')
    """
    if root is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        root = os.environ.get("ENSEMBLES_DATA") or cache / "ensembles"
    return Path(root).expanduser()


def split_validation(
    images: ImageSet, share_or_count: float, seed: int
) -> tuple[ImageSet, ImageSet]:
    """Divides a training set into training and validation, each class in its share.

    Args:
        images: A training set.
        share_or_count: Of the validation set: a float is a share between 0 and 1, an int a number
            of images.
        seed: Seed of the draw.

    Returns:
        Training and validation set, disjoint, each in the order of the original.

    Raises:
        ValueError: If the set is a test set, or one of the two would be empty.

    Example:
        >>> train, validation = split_validation(load_images("digits", "train"), 0.1, seed=0)
        >>> len(train), len(validation), validation.counts()
        (900, 100, (10, 10, 10, 10, 10, 10, 10, 10, 10, 10))
    """
    if images.split == "test":
        raise ValueError(
            f"{images.name}: this is a test set. What is chosen on it, such as a checkpoint, is "
            'fitted to it: take the validation set from load_images(..., "train").'
        )
    whole = isinstance(share_or_count, int) and not isinstance(share_or_count, bool)
    if whole:
        count = int(share_or_count)
    else:
        count = round(len(images) * share_or_count) if 0 < share_or_count < 1 else 0
    if not 0 < count < len(images):
        raise ValueError(
            f"validation={share_or_count!r} of {len(images)} images leaves one set empty: "
            "training and validation need at least one image each. A float is a share "
            "between 0 and 1, an int a number of images."
        )
    chosen = _stratified(images.labels.cpu(), len(images.classes), count, ("validation", seed))
    return (
        replace(images.select(~chosen), split="train"),
        replace(images.select(chosen), split="validation"),
    )


def _stratified(labels: Tensor, classes: int, count: int, key: tuple[int | str, ...]) -> Tensor:
    """A mask of `count` images, each class in its share by the method of largest remainders."""
    sizes = torch.bincount(labels, minlength=classes)
    exact = [size * count / len(labels) for size in sizes.tolist()]
    quota = [int(share) for share in exact]
    by_remainder = sorted(range(classes), key=lambda c: (quota[c] - exact[c], c))
    for place in by_remainder[: count - sum(quota)]:
        quota[place] += 1
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for number, wanted in enumerate(quota):
        rows = (labels == number).nonzero().flatten()
        chosen[rows[permutation(len(rows), *key, number)[:wanted]]] = True
    return chosen


# --- digits -------------------------------------------------------------------------------------


def _digits(split: str, root: Path, *, download: bool) -> ImageSet:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # Stored as counts from 0 to 16.
    grey = torch.from_numpy((bunch.images * 255 / 16).round().astype(np.uint8))
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    digits = ImageSet(
        name="digits",
        version=f"scikit-learn, {len(labels) - DIGITS_TEST:,} + {DIGITS_TEST}",
        pixels=grey[:, None].repeat(1, 3, 1, 1),
        labels=labels,
        indices=torch.arange(len(labels)),
        classes=DIGITS_CLASSES,
        mean=DIGITS_MEAN,
        std=DIGITS_STD,
        split=split,
    )
    test = _stratified(labels, 10, DIGITS_TEST, ("digits",))
    return digits.select(test if split == "test" else ~test)


# --- by name ------------------------------------------------------------------------------------


class _Source(Protocol):
    def __call__(self, split: str, root: Path, *, download: bool) -> ImageSet: ...


def _jpeg(split: str, root: Path, *, download: bool) -> ImageSet:
    return load_cifar10_jpeg(split, root)


def _lossless(split: str, root: Path, *, download: bool) -> ImageSet:
    return load_cifar10_lossless(split, root)


def _cifar10_1(version: str) -> _Source:
    def load(split: str, root: Path, *, download: bool) -> ImageSet:
        if split != "test":
            raise ValueError(f'CIFAR-10.1 is a test set only: there is no split "{split}".')
        return CIFAR10_1[version].load(root, download=download)

    return load


SETS: Mapping[str, _Source] = MappingProxyType(
    {
        "digits": _digits,
        "cifar10": load_cifar10,
        "cifar10_1_v4": _cifar10_1("v4"),
        "cifar10_1_v6": _cifar10_1("v6"),
        "cifar10_jpeg": _jpeg,
        "cifar10_lossless": _lossless,
    }
)
"""Loader of each set by its name, called with the split, the folder, and `download=`."""

CLASS_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {name: DIGITS_CLASSES if name == "digits" else CLASSES for name in SETS}
)
"""What each set has images of, by class number: known without its files."""
