"""Which convs PyTorch trains with a kernel that writes past its buffer.

On a CPU, PyTorch 2.14 computes convs in float32 with oneDNN 3.12. The weight gradient of a 1x1 conv
of stride above 1 first copies the pixels that it reads. Channels last, the buffer has room for
the input channels of every pixel, but parts of an image are placed at multiples of a block: 8
channels with AVX2, 16 with AVX-512. With fewer channels, all parts but the first are placed too far
back. They overwrite other memory, and the process dies or hangs, or goes on for a while.

Whether an image is cut into parts depends on its size, on threads and on caches. With one thread
and 4 channels, 8x8 pixels are enough with AVX2; with AVX-512, 56x56 are and 48x48 are not. That is
why neither sizes nor the processor are asked for here.

Measured with memory that is guarded at its end: it is written past with 1 to 7 channels with AVX2
and 1 to 15 with AVX-512; with every stride above 1 in either dimension, of images and of rows; with
any number of outputs and images; where the input or the weight alone is channels last; and in
transposed convs of so few output channels. It is not with 8 and 16 channels and more, where input
and weight are contiguous, in half precisions, in groups, or with a larger kernel; nor ever in the
forward pass.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["BLOCK", "is_channels_last", "overruns_channels_last"]

BLOCK = 16
"""Channels from which on every kernel is right."""


def overruns_channels_last(
    channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    *,
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> bool:
    """Whether the weight gradient of a conv may write past a buffer, where it is channels last.

    Example:
        >>> overruns_channels_last(15, (1, 1), (2, 1)), overruns_channels_last(16, (1, 1), (2, 1))
        (True, False)

    Args:
        channels: Input channels, as the weight has them: ``weight.shape[1]``.
        kernel_size: One number for each dimension of the image.
        stride: The same.
        groups: Groups of channels.
        dtype: What it is computed in.
        device: The type of the device.
    """
    return (
        channels < BLOCK
        and max(kernel_size) == 1
        and max(stride) > 1
        and groups == 1
        and dtype == torch.float32
        and device == "cpu"
    )


def is_channels_last(x: Tensor) -> bool:
    """Whether PyTorch computes channels last with a tensor of four dimensions.

    It is a guess from the strides: of one channel, or of one pixel, ``is_contiguous`` says yes to
    both layouts.

    Example:
        >>> weight = torch.ones(4, 2, 1, 1)
        >>> weight.is_contiguous(memory_format=torch.channels_last), is_channels_last(weight)
        (True, False)
        >>> is_channels_last(weight.to(memory_format=torch.channels_last))
        True
    """
    if x.ndim != 4 or x.stride(1) == 0:
        return False
    least = 0
    for dimension in (1, 3, 2, 0):
        step = x.stride(dimension)
        if step < least or (dimension == 0 and least == x.stride(1)):
            return False
        least = step * x.shape[dimension]
    return x.numel() > 0
