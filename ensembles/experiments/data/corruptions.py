"""Shifted versions of a set: its images rotated, blurred, with noise, and so on, in five levels.

What happens to an image depends on the corruption, the level, the seed and the image's index in the
original set, and neither on the global generators nor on the other images: a subset of the
corrupted set is the corrupted subset. The random part is the same at every level, so that levels of
one image differ by their strength only.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from ensembles.experiments.data.draws import normals, words
from ensembles.experiments.data.images import ImageSet

__all__ = ["LEVELS", "corrupt"]

LEVELS = MappingProxyType(
    {
        "noise": (0.04, 0.06, 0.08, 0.09, 0.10),
        "blur": (0.4, 0.6, 0.7, 0.8, 1.0),
        "jpeg": (80, 65, 58, 50, 40),
        "brightness": (0.05, 0.10, 0.15, 0.20, 0.30),
        "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
        "rotation": (6.0, 12.0, 18.0, 24.0, 30.0),
    }
)
"""Strength of each corruption at the levels 1 to 5.

noise: standard deviation of the Gaussian, scale 0 to 1. blur: standard deviation of the Gaussian,
pixels. jpeg: quality. brightness: added to the value of the colour, scale 0 to 1. contrast: factor
on the distance from the image's mean. These are the strengths of CIFAR-10-C (Hendrycks and
Dietterich 2019, arXiv 1903.12261, `make_cifar_c.py` of github.com/hendrycks/robustness). rotation:
degrees, a fifth to the whole of the 30 degrees to either side of Engstrom et al. 2019,
arXiv 1712.02779.
"""

TRUNCATE = 4
"""Standard deviations after which the blur's kernel ends: SciPy's, which CIFAR-10-C uses."""

AT_ONCE = 256
"""Images that are computed together, in float64: 6 MB for 32x32."""


def corrupt(images: ImageSet, corruption: str, level: int, *, seed: int) -> ImageSet:
    """The set with every image corrupted; labels and indices stay.

    Against CIFAR-10-C: results are rounded, not cut off, to whole numbers; blur mirrors the image
    at its border. The corruptions work on images of 8x8 as of 32x32, with the same strength.

    Args:
        images: The set.
        corruption: "noise", "blur", "jpeg", "brightness", "contrast" or "rotation".
        level: From 1, weak, to 5, strong: see `LEVELS`.
        seed: Of the random part (noise; the direction of the rotation); others do not use it.

    Returns:
        A set whose name and version tell the corruption, level and seed.

    Raises:
        ValueError: If there is no such corruption or level, or the images are too small to blur.

    Example:
        >>> from ensembles.experiments.data.sources import load_images
        >>> corrupt(load_images("digits", "test"), "rotation", 3, seed=0)
        ImageSet(digits_rotation_3 (..., rotation 3, seed 0), test: 797 images of ...)

    Source:
        Hendrycks and Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions
        and Perturbations", arXiv 1903.12261.
    """
    if corruption not in LEVELS:
        raise ValueError(f"there is no corruption {corruption!r}. There are: {', '.join(LEVELS)}.")
    if isinstance(level, bool) or level not in range(1, 6):
        raise ValueError(f"level={level!r}: levels are the whole numbers from 1, weak, to 5.")
    strength = LEVELS[corruption][level - 1]
    change = _CHANGES[corruption]
    pixels, indices = images.pixels.cpu(), images.indices.tolist()
    parts = [
        change(pixels[start : start + AT_ONCE], strength, indices[start : start + AT_ONCE], seed)
        for start in range(0, len(images), AT_ONCE)
    ]
    return replace(
        images,
        name=f"{images.name}_{corruption}_{level}",
        version=f"{images.version}, {corruption} {level}, seed {seed}",
        pixels=torch.cat(parts).to(images.pixels.device),
    )


def _noise(pixels: Tensor, strength: float, indices: list[int], seed: int) -> Tensor:
    size = pixels[0].numel()
    drawn = np.stack([normals(size, "noise", seed, index) for index in indices])
    return _rounded(pixels + 255 * strength * torch.from_numpy(drawn).view(pixels.shape))


def _blur(pixels: Tensor, strength: float, indices: list[int], seed: int) -> Tensor:
    radius = int(TRUNCATE * strength + 0.5)
    if radius >= min(pixels.shape[2:]):
        raise ValueError(
            f"images of {pixels.shape[2]} x {pixels.shape[3]} are too small to be blurred with a "
            f"standard deviation of {strength} pixels: the kernel reaches {radius} to each side. "
            "Take a lower level, or images of at least "
            f"{radius + 1} x {radius + 1}."
        )
    # In float64 the last bit, which depends on how many images are computed together, is far from
    # what rounding to whole numbers sees.
    blurred = pixels.double()
    for kernel in ([2 * radius + 1, 1], [1, 2 * radius + 1]):  # a product of two kernels: faster
        blurred = transforms.gaussian_blur(blurred, kernel, [strength, strength])
    return _rounded(blurred)


def _jpeg(pixels: Tensor, strength: float, indices: list[int], seed: int) -> Tensor:
    changed = np.empty((len(pixels), *pixels.shape[2:], 3), dtype=np.uint8)
    for place, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(image)).save(file, "JPEG", quality=int(strength))
        changed[place] = np.asarray(Image.open(file))
    return torch.from_numpy(changed).permute(0, 3, 1, 2).contiguous()


def _brightness(pixels: Tensor, strength: float, indices: list[int], seed: int) -> Tensor:
    # Adding to the value of HSV, with hue and saturation kept, scales red, green and blue alike;
    # black, which has no hue, becomes grey.
    value = pixels.amax(1, keepdim=True).double()
    brighter = (value + 255 * strength).clamp(max=255)
    return _rounded(torch.where(value > 0, pixels * (brighter / value.clamp(min=1)), brighter))


def _contrast(pixels: Tensor, strength: float, indices: list[int], seed: int) -> Tensor:
    mean = pixels.double().mean((2, 3), keepdim=True)
    return _rounded((pixels - mean) * strength + mean)


def _rotation(pixels: Tensor, strength: float, indices: list[int], seed: int) -> Tensor:
    left = torch.tensor([bool(words(1, "rotation", seed, index)[0] & 1) for index in indices])
    changed = torch.empty_like(pixels)
    for angle, turned in ((strength, left), (-strength, ~left)):
        if turned.any():
            changed[turned] = _rounded(
                transforms.rotate(
                    pixels[turned].double(), angle, interpolation=InterpolationMode.BILINEAR
                )
            )
    return changed


def _rounded(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)


_CHANGES: dict[str, Callable[[Tensor, float, list[int], int], Tensor]] = {
    "noise": _noise,
    "blur": _blur,
    "jpeg": _jpeg,
    "brightness": _brightness,
    "contrast": _contrast,
    "rotation": _rotation,
}
