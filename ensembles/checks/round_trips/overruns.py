"""Which convs of a call would be trained with a kernel that writes past its buffer.

A forward pass is safe; the weight gradient is not. So what a model would do in training is told
from its forward pass, before a backward pass of a check's own ends the process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ensembles.kernels import is_channels_last, overruns_channels_last

__all__ = ["OverrunLog"]


class OverrunLog(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, convs that `ensembles.kernels` is about are written down.

    Example:
        >>> conv = torch.nn.Conv2d(4, 8, kernel_size=1, stride=2)
        >>> x = torch.randn(2, 4, 8, 8)
        >>> with OverrunLog() as log:
        ...     y = conv(x)
        ...     y = conv(x.to(memory_format=torch.channels_last))
        >>> log.convs
        ['a 1x1 conv of stride 2x2 with 4 channels']
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.convs: list[str] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would wrap every call to keep the compiler off, and import it for that: seconds.
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten.convolution.default:
            x, weight, _, stride, *_, groups = args
            if _overruns(x, weight, stride, groups):
                self.convs.append(
                    f"a {_times(weight.shape[2:])} conv of stride {_times(stride)} with "
                    f"{weight.shape[1]} channels"
                )
        return func(*args, **(kwargs or {}))


def _overruns(x: Tensor, weight: Tensor, stride: Sequence[int], groups: int) -> bool:
    if x.ndim == 3:  # PyTorch computes it as an image of one row
        x, weight = x.unsqueeze(2), weight.unsqueeze(2)
    return overruns_channels_last(
        weight.shape[1],
        weight.shape[2:],
        stride,
        groups=groups,
        dtype=weight.dtype,
        device=x.device.type,
    ) and (is_channels_last(x) or is_channels_last(weight))


def _times(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
