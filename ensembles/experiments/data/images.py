"""Labelled images in memory: checked once, when they are put together, and immutable by intent.

A set knows what a result must say about its data: name, version, split, digest, and where each
image stood in the original set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

import torch
from torch import Tensor

__all__ = ["ImageSet", "normalise"]


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet:
    """Images of one size with a label each.

    Args:
        name: Name of the set, such as "digits".
        version: What tells it from others of this name: release, commit, or corruption and seed.
        pixels: uint8, (image, 3, height, width), red, green, blue.
        labels: int64, (image,), from 0 to below the number of classes.
        indices: int64, (image,), place of each image in the original set.
        classes: Names of the classes, by class number.
        mean: Mean of each channel for normalisation, on the scale from 0 to 1.
        std: Standard deviation of each channel, on the same scale.
        split: "train", "validation" or "test"; "" where it is not known.
        flippable: Whether a mirrored image keeps its label, as a cat does, and a digit does not.

    Raises:
        ValueError: If these do not fit together; the message names the first row that is wrong.
        TypeError: If pixels, labels or indices are not tensors.

    Example:
        >>> images = ImageSet("dots", "1", torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        ...     torch.tensor([0, 1]), torch.arange(2), ("dot", "dash"), (0.5,) * 3, (0.5,) * 3)
        >>> images
        ImageSet(dots (1): 2 images of 3 x 8 x 8, 2 classes)
        >>> images.counts()
        (1, 1)
        >>> ImageSet("dots", "1", images.pixels, torch.tensor([0, 2]), images.indices,
        ...     images.classes, images.mean, images.std)
        Traceback (most recent call last):
        ...
        ValueError: dots: row 1 has the label 2, and there are 2 classes: labels are from 0 to 1.
    """

    name: str
    version: str
    pixels: Tensor
    labels: Tensor
    indices: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    split: str = ""
    flippable: bool = False

    def __post_init__(self) -> None:
        for field, dtype in (("pixels", torch.uint8), ("labels", torch.int64)):
            _require_dtype(self, field, dtype)
        _require_dtype(self, "indices", torch.int64)
        if self.pixels.ndim != 4 or self.pixels.shape[1] != 3 or 0 in self.pixels.shape:
            raise ValueError(
                f"{self.name}: pixels have the shape {tuple(self.pixels.shape)}, expected "
                "(image, 3, height, width) with at least one image. Repeat grey images three "
                "times along dimension 1; permute(0, 3, 1, 2) where the channels come last."
            )
        count = self.pixels.shape[0]
        for field in ("labels", "indices"):
            shape = tuple(getattr(self, field).shape)
            if shape != (count,):
                raise ValueError(
                    f"{self.name}: {field} have the shape {shape}, expected ({count},): one for "
                    f"each of the {count} images."
                )
        for field in ("labels", "indices"):
            device = getattr(self, field).device
            if device != self.pixels.device:
                raise ValueError(
                    f"{self.name}: {field} are on {device}, and pixels on {self.pixels.device}. "
                    "Use ImageSet.to(device), which moves all three."
                )
        wrong = ((self.labels < 0) | (self.labels >= len(self.classes))).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"{self.name}: row {row} has the label {int(self.labels[row])}, and there are "
                f"{len(self.classes)} classes: labels are from 0 to {len(self.classes) - 1}."
            )
        negative = (self.indices < 0).nonzero()
        if len(negative):
            row = int(negative[0])
            raise ValueError(
                f"{self.name}: row {row} has the index {int(self.indices[row])}: places in the "
                "original set count from 0."
            )
        for field, least in (("mean", -math.inf), ("std", 0.0)):
            values = getattr(self, field)
            if len(values) != 3 or not all(math.isfinite(v) and v > least for v in values):
                raise ValueError(
                    f"{self.name}: {field} is {values}, expected three finite numbers"
                    + (" above 0, one for each channel." if field == "std" else ".")
                )

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.pixels.shape[1:]))
        about = ", ".join(filter(None, (f"{self.name} ({self.version})", self.split)))
        return f"ImageSet({about}: {len(self)} images of {size}, {len(self.classes)} classes)"

    @property
    def sha256(self) -> str:
        """Digest of shape, pixels and labels, in hexadecimal: equal sets have equal digests."""
        digest = sha256(repr(tuple(self.pixels.shape)).encode())
        for tensor in (self.pixels, self.labels):
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def select(self, rows: Tensor | Sequence[int] | slice) -> ImageSet:
        """The set of some rows, in the order given.

        Args:
            rows: Row numbers, a mask of one bool for each image, or a slice.

        Raises:
            IndexError: If a row is outside of the set.
            ValueError: If no row is left, or a mask has another length.

        Example:
            >>> from ensembles.experiments.data.sources import load_images
            >>> load_images("digits", "test").select([5, 2]).indices.tolist()
            [13, 5]
        """
        found = self._rows(rows)
        if not len(found):
            raise ValueError(f"{self.name}: no row was selected: a set has at least one image.")
        return replace(
            self,
            pixels=self.pixels[found],
            labels=self.labels[found],
            indices=self.indices[found],
        )

    def to(self, device: torch.device | str) -> ImageSet:
        """The set with its tensors on a device."""
        return replace(
            self,
            pixels=self.pixels.to(device),
            labels=self.labels.to(device),
            indices=self.indices.to(device),
        )

    def counts(self) -> tuple[int, ...]:
        """How many images each class has, by class number."""
        return tuple(torch.bincount(self.labels, minlength=len(self.classes)).tolist())

    def require_every_class(self) -> None:
        """Refuses a set that lacks a class: its accuracy would be that of another problem.

        Raises:
            ValueError: Naming the classes of which there is no image.
        """
        pairs = zip(self.classes, self.counts(), strict=True)
        missing = [name for name, count in pairs if not count]
        if missing:
            raise ValueError(
                f"{self.name}: none of the {len(self)} images is of class {', '.join(missing)}. "
                "Usual cause: a set that is stored class by class and was cut, by a slice or by a "
                "loader that drops its last batch. Use the whole set, or split_validation, which "
                "keeps the shares of the classes."
            )

    def normalised(self, rows: Tensor | Sequence[int] | slice | None = None) -> Tensor:
        """The images as a network takes them: (pixels / 255 - mean) / std, float32.

        Args:
            rows: As in `select`; all by default.

        Returns:
            (image, 3, height, width), on the device of the set.
        """
        pixels = self.pixels if rows is None else self.pixels[self._rows(rows)]
        return normalise(pixels, self.mean, self.std)

    def _rows(self, rows: Tensor | Sequence[int] | slice) -> Tensor:
        if isinstance(rows, slice):
            rows = range(len(self))[rows]
            return torch.tensor(rows, dtype=torch.int64, device=self.pixels.device)
        found = torch.as_tensor(rows, device=self.pixels.device)
        if found.dtype == torch.bool:
            if found.shape != (len(self),):
                raise ValueError(
                    f"{self.name}: a mask of the shape {tuple(found.shape)} for {len(self)} "
                    "images: one bool for each is needed."
                )
            return found.nonzero().flatten()
        if not found.numel():
            return found.flatten().long()
        if found.ndim != 1 or found.is_floating_point():
            raise ValueError(
                f"{self.name}: rows are {found.dtype} of the shape {tuple(found.shape)}, expected "
                "a list of integers."
            )
        outside = ((found < -len(self)) | (found >= len(self))).nonzero()
        if len(outside):
            raise IndexError(
                f"{self.name}: row {int(found[outside[0]])} is outside of the {len(self)} images."
            )
        return found.long()


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels on the scale from 0 to 255 as (pixels / 255 - mean) / std.

    Args:
        pixels: (image, channel, height, width), uint8.
        mean: For each channel, on the scale from 0 to 1.
        std: Likewise.

    Returns:
        float32 of the same shape, on the same device.

    Example:
        >>> normalise(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8), (0.5,) * 3, (0.25,) * 3
        ...     ).flatten().tolist()
        [2.0, 2.0, 2.0]
    """
    centre, scale = (torch.tensor(v, device=pixels.device).view(-1, 1, 1) for v in (mean, std))
    return pixels.float().div_(255).sub_(centre).div_(scale)


def _require_dtype(images: ImageSet, field: str, dtype: torch.dtype) -> None:
    tensor = getattr(images, field)
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{images.name}: {field} are of type {type(tensor).__name__}, expected a tensor: "
            "torch.as_tensor(...)."
        )
    if tensor.dtype != dtype:
        raise ValueError(
            f"{images.name}: {field} are {tensor.dtype}, expected {dtype}."
            + (" Images on the scale from 0 to 1: (255 * x).round()." * (field == "pixels"))
        )
