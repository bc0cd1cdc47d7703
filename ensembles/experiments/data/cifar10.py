"""CIFAR-10 as torchvision stores it, and what all versions of it have in common."""

from __future__ import annotations

import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ensembles.experiments.data.downloads import download_file, writing
from ensembles.experiments.data.images import ImageSet

__all__ = ["CLASSES", "MEAN", "STD", "cifar10_set", "load_cifar10"]

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""By channel over all pixels of the 50,000 training images, scale 0 to 1.

Every version of CIFAR-10 is normalised by these, so that a network sees a shifted set as it is.
"""

ARCHIVE_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
"""Of cifar-10-python.tar.gz, as Keras 3 checks it (keras/src/datasets/cifar10.py)."""


def cifar10_set(
    name: str,
    version: str,
    split: str,
    pixels: NDArray[np.uint8],
    labels: NDArray[np.int64],
    indices: NDArray[np.int64] | None = None,
) -> ImageSet:
    """A set with the classes and the normalisation of CIFAR-10.

    Args:
        name: Name of the set.
        version: Its version.
        split: "train" or "test".
        pixels: (image, 3, 32, 32).
        labels: (image,).
        indices: (image,), place in the original set; by default 0, 1, 2 and so on.
    """
    return ImageSet(
        name=name,
        version=version,
        pixels=torch.from_numpy(np.ascontiguousarray(pixels)),
        labels=torch.from_numpy(labels),
        indices=torch.arange(len(pixels)) if indices is None else torch.from_numpy(indices),
        classes=CLASSES,
        mean=MEAN,
        std=STD,
        split=split,
        flippable=True,
    )


def load_cifar10(split: str, root: Path, *, download: bool = False) -> ImageSet:
    """Loads CIFAR-10 from the batch files that torchvision reads.

    Args:
        split: "train" or "test".
        root: Folder that holds `cifar-10-batches-py`.
        download: Fetches and unpacks the archive (170 MB) where files are missing.

    Raises:
        FileNotFoundError: If a file is missing, and not to be fetched.
        ValueError: If a file holds other content than expected. It is left as it is.
        ConnectionError: If the download fails.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    folder = root / CIFAR10.base_folder
    known = [*CIFAR10.train_list, *CIFAR10.test_list]
    known.append([CIFAR10.meta["filename"], CIFAR10.meta["md5"]])
    missing = [name for name, _ in known if not (folder / name).exists()]
    for name, md5 in known:
        if name not in missing and not check_integrity(str(folder / name), md5):
            raise ValueError(
                f"{folder / name} holds other content than CIFAR-10's: its md5 is not {md5}. It "
                "was left as it is. Usual cause: a copy or an unpacking that was interrupted. "
                "Move it away and load with download=True (--download)."
            )
    if missing and not download:
        raise FileNotFoundError(
            f"CIFAR-10 is not in {folder.absolute()}: {', '.join(missing)} missing. Load with "
            f"download=True (--download, 170 MB), or name the folder that holds "
            f"{CIFAR10.base_folder} by root=... or the variable ENSEMBLES_DATA."
        )
    if missing:
        archive = download_file(CIFAR10.url, root / CIFAR10.filename, sha256=ARCHIVE_SHA256)
        _unpack(archive, [f"{CIFAR10.base_folder}/{name}" for name in missing])
    with warnings.catch_warnings():
        # The official files were pickled in 2009; NumPy 2.4 deprecates how they spell uint8.
        warnings.filterwarnings("ignore", r"dtype\(\): align should be passed")
        found: Any = CIFAR10(str(root), train=split == "train")
    pixels = found.data.transpose(0, 3, 1, 2)
    return cifar10_set(
        "cifar10", "torchvision", split, pixels, np.asarray(found.targets, dtype=np.int64)
    )


def _unpack(archive: Path, names: list[str]) -> None:
    """Unpacks what is missing, each file whole or not at all."""
    with tarfile.open(archive) as opened:
        for name in names:
            content = opened.extractfile(name)
            assert content is not None  # the archive's digest was checked
            path = archive.parent / name
            part = path.with_name(f"{path.name}.part")
            with content, writing(path):
                path.parent.mkdir(exist_ok=True)
                part.write_bytes(content.read())
                part.replace(path)
