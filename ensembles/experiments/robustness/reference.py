"""What 30 published models get right on CIFAR-10 and CIFAR-10.1, as counts.

Source: B. Recht, R. Roelofs, L. Schmidt and V. Shankar, "Do CIFAR-10 Classifiers Generalize to
CIFAR-10?", arXiv:1806.00451; counted from the predictions that the authors publish in
github.com/modestyachts/CIFAR-10.1, commit d9982abb. `cifar10_1_accuracies.csv` holds
the counts: `published_models` reads it. The predictions themselves are not part of
this package: `published_predictions` reads them from a container (`cifar10_1_predictions.npz`).

Licence of the source: MIT License, Copyright (c) 2018 modestyachts. Permission is hereby granted,
free of charge, to any person obtaining a copy of this software and associated documentation files
(the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the
Software, and to permit persons to whom the Software is furnished to do so, subject to the
following conditions: The above copyright notice and this permission notice shall be included in
all copies or substantial portions of the Software. The Software is provided "as is", without
warranty of any kind, express or implied, including but not limited to the warranties of
merchantability, fitness for a particular purpose and noninfringement. In no event shall the
authors or copyright holders be liable for any claim, damages or other liability, whether in an
action of contract, tort or otherwise, arising from, out of or in connection with the Software or
the use or other dealings in the Software.
"""

import csv
import hashlib
import io
import os
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np

from ensembles.experiments.evaluation.counts import Counts
from ensembles.experiments.robustness.predictions import Predictions

__all__ = ["PublishedModel", "published_models", "published_predictions"]


@dataclass(frozen=True)
class PublishedModel:
    """A published model with what it gets right on the CIFAR-10 test set and on CIFAR-10.1.

    Args:
        name: Name in the source.
        cifar10: On the CIFAR-10 test set, 10,000 images.
        v4: On CIFAR-10.1 v4, 2,021 images.
        v6: On CIFAR-10.1 v6, 2,000 images, 200 of each class.
    """

    name: str
    cifar10: Counts
    v4: Counts
    v6: Counts


@cache
def published_models() -> tuple[PublishedModel, ...]:
    """The 30 published models, best on CIFAR-10 first.

    Example:
        >>> best = published_models()[0]
        >>> print(best.name, best.v6, sep=": ")
        shake_shake_26_2x64d_SSI_cutout16: 1862/2000 = 93.10 % (95 % interval 91.90 to 94.17 %)

    Returns:
        The models with their counts.

    Source:
        Recht et al. 2018, arXiv:1806.00451.
    """
    table = resources.files("ensembles.experiments.robustness").joinpath("cifar10_1_accuracies.csv")
    return tuple(
        PublishedModel(
            name=row["model"],
            **{
                images: Counts(int(row[f"{images}_correct"]), int(row[f"{images}_n"]))
                for images in ("cifar10", "v4", "v6")
            },
        )
        for row in csv.DictReader(table.read_text("utf-8").splitlines())
    )


CONTAINER = "cifar10_1_predictions.npz"
SHA256 = "281bff72023df35491534a6f4c7bb4e1d4708a3683f36bfe7ffb0695eb99f3ab"
SETS = {"cifar10": "original", "v4": "v4", "v6": "v6"}


def published_predictions(images: str, *, root: str | Path | None = None) -> Predictions:
    """Reads what the 30 published models predict for every image.

    Example::

        correct = published_predictions("v6").correct  # (30, 2000)
        dominance_matrix(correct)

    Args:
        images: ``"cifar10"`` (the test set), ``"v4"`` or ``"v6"`` (CIFAR-10.1).
        root: Folder with `cifar10_1_predictions.npz`; by default the one that the environment
            variable ``ENSEMBLES_DATA`` names.

    Returns:
        The predictions of the models, sorted by name.

    Raises:
        FileNotFoundError: If there is no such folder or file.
        ValueError: If ``images`` is another word, or the file is truncated or another one.

    Source:
        github.com/modestyachts/CIFAR-10.1, commit d9982abb; MIT.
    """
    if images not in SETS:
        raise ValueError(f"images must be one of {', '.join(SETS)}, got {images!r}")
    folder = root if root is not None else os.environ.get("ENSEMBLES_DATA")
    if not folder:
        raise FileNotFoundError(
            f"where is {CONTAINER}? Pass root=, or set ENSEMBLES_DATA to the folder that holds it"
        )
    path = Path(folder) / CONTAINER
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: root must be the folder that holds it")
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise ValueError(
            f"{path} is not the published container: expected sha256 {SHA256}, found {found} "
            f"({len(content)} bytes). Copy it anew"
        )
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        models = tuple(str(name) for name in arrays["models"])
        name = SETS[images]
        return Predictions(
            models=models,
            classes=np.stack([arrays[f"{model}/{name}"] for model in models]),
            labels=arrays[f"labels/{name}"],
        )
