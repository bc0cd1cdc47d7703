"""CIFAR-10.1: a new test set for CIFAR-10's classes, in its two published versions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from ensembles.experiments.data.arrays import read_npy, require_array, require_labels
from ensembles.experiments.data.cifar10 import CLASSES, cifar10_set
from ensembles.experiments.data.downloads import download_file, require_digest
from ensembles.experiments.data.images import ImageSet

__all__ = ["CIFAR10_1", "CIFAR10Point1"]


@dataclass(frozen=True)
class CIFAR10Point1:
    """A version of CIFAR-10.1: its files, what is known of them, and how to load them.

    Stored class by class: a loader that drops its last batch of 256 leaves out every airplane of
    v4, and every truck of v6.

    Example:
        >>> CIFAR10_1["v6"].files
        ('cifar10.1_v6_data.npy', 'cifar10.1_v6_labels.npy')
        >>> sum(CIFAR10_1["v4"].counts)
        2021

    Args:
        version: "v4" or "v6".
        counts: Images of each class, by class number.
        sha256: Digest of each file, by its name. Another copy of the data is loaded with
            `dataclasses.replace(CIFAR10_1["v6"], sha256=...)`.
        url: Folder on the network that holds the files.

    Source:
        Recht, Roelofs, Schmidt, Shankar 2018, "Do CIFAR-10 Classifiers Generalize to CIFAR-10?",
        arXiv 1806.00451; github.com/modestyachts/CIFAR-10.1.
    """

    version: str
    counts: tuple[int, ...]
    sha256: Mapping[str, str] = field(repr=False)
    url: str = "https://raw.githubusercontent.com/modestyachts/CIFAR-10.1/master/datasets"

    @property
    def files(self) -> tuple[str, str]:
        """Names of the files with the images and with the labels."""
        return f"cifar10.1_{self.version}_data.npy", f"cifar10.1_{self.version}_labels.npy"

    def load(self, root: Path | str, *, download: bool = False) -> ImageSet:
        """Loads the version from a folder.

        Args:
            root: Folder of the two files.
            download: Fetches what is missing.

        Returns:
            The set, on the CPU.

        Raises:
            FileNotFoundError: If a file is missing, and not to be fetched.
            ValueError: If a file holds other content than expected. It is left as it is.
            ConnectionError: If the download fails.
        """
        images, answers = (Path(root) / name for name in self.files)
        missing = [path.name for path in (images, answers) if not path.exists()]
        if missing and not download:
            raise FileNotFoundError(
                f"CIFAR-10.1 {self.version} is not in {images.parent.absolute()}: "
                f"{', '.join(missing)} missing. Load with download=True (--download, 6 MB), name "
                "the folder by root=... or the variable ENSEMBLES_DATA, or put there what is at "
                f"{self.url}."
            )
        for path in (images, answers):
            if path.name in missing:
                download_file(f"{self.url}/{path.name}", path, sha256=self.sha256[path.name])
            else:
                require_digest(path, self.sha256[path.name])
        count = sum(self.counts)
        pixels = require_array(read_npy(images), ["uint8"], (count, 32, 32, 3), images, "images")
        labels = require_labels(read_npy(answers), count, len(CLASSES), answers, "labels")
        name = f"cifar10_1_{self.version}"
        found = cifar10_set(name, self.version, "test", pixels.transpose(0, 3, 1, 2), labels)
        if found.counts() != self.counts:
            raise ValueError(
                f"{answers}: the classes have {found.counts()} images, expected {self.counts}."
            )
        return found


CIFAR10_1: Mapping[str, CIFAR10Point1] = MappingProxyType(
    {
        "v4": CIFAR10Point1(
            "v4",
            (208, 212, 202, 212, 204, 218, 192, 210, 161, 202),
            MappingProxyType(
                {
                    "cifar10.1_v4_data.npy": (
                        "5aaedc268df8f4cffca2ac0cf9e608ae1897a8cddb630c7a850a2ea8f6558e75"
                    ),
                    "cifar10.1_v4_labels.npy": (
                        "1f9544300ded199539b6662364ce7fe6c2e1ea9f87408f06db4b1a6184cffb18"
                    ),
                }
            ),
        ),
        "v6": CIFAR10Point1(
            "v6",
            (200,) * 10,
            MappingProxyType(
                {
                    "cifar10.1_v6_data.npy": (
                        "2997188e5816f5bd545dc77771b6227828c28146049fcecf3fa10775474cacc6"
                    ),
                    "cifar10.1_v6_labels.npy": (
                        "ae40beda001693674edc94d925ee8268cfe68905f8f9aff800c8dcdfcd6c9448"
                    ),
                }
            ),
        ),
    }
)
"""The published versions.

The digests are those that TensorFlow Datasets 4.9 checks (url_checksums/cifar10_1.txt). The labels
of the predictions in `cifar10_1_predictions.npz`, saved as int32, have the same digests.
"""
