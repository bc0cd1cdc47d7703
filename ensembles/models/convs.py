"""A conv that is right on every CPU, in every layout."""

from torch import Tensor, nn

from ensembles.kernels import overruns_channels_last

__all__ = ["GuardedConv2d"]


class GuardedConv2d(nn.Conv2d):
    """A `torch.nn.Conv2d` that keeps out of the kernel of `ensembles.kernels`.

    Where that one would be used channels last, input and weight are made contiguous.

    Example:
        >>> conv = GuardedConv2d(4, 8, kernel_size=1, stride=2)
        >>> x = torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)
        >>> conv(x).is_contiguous()
        True

    Args:
        *args: As in `torch.nn.Conv2d`, like all that follow.
        **kwargs: The same.

    Shape:
        (N, in, H, W) to (N, out, H', W'), as in `torch.nn.Conv2d`; without N too.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, weight = self._guarded(input, weight, self.in_channels)
        y: Tensor = super()._conv_forward(x, weight, bias)
        return y

    def _guarded(self, x: Tensor, weight: Tensor, channels: int) -> tuple[Tensor, Tensor]:
        """Lays out an input of so many channels, and its weight."""
        if not overruns_channels_last(
            channels,
            self.kernel_size,
            self.stride,
            groups=self.groups,
            dtype=weight.dtype,
            device=x.device.type,
        ):
            return x, weight
        x = x.contiguous()
        # Of one channel, or one pixel, what is channels last counts as contiguous too, and the
        # strides alone tell. They are not asked for shapes: a trace would warn of that.
        return (
            _plain(x) if x.stride(-3) == 1 else x,
            _plain(weight) if weight.stride(-1) != 1 else weight,
        )


def _plain(x: Tensor) -> Tensor:
    """The same with the strides of a tensor that was never laid out in another way."""
    return x.flatten().reshape(x.shape)
