"""The stem that members share, max-pooled once for all of them.

The k subnets that start in a group, and the parent in the channels of that group, read one product
of the stem's conv. Over one batch that product has one mean and one variance, so in train mode
their BatchNorms differ in weight w and bias b alone. With z the normalised product,

    max-pool(act(w * z + b)) = act(w * max-pool(z) + b)    where act grows and w >= 0
                             = act(w * min-pool(z) + b)    where act grows and w < 0

So z and its max-pool are computed once, its min-pool only where a member has a negative weight, and
what is done for each member is done to pooled activations, which are a quarter. In eval mode every
norm has statistics of its own, and the product itself is what is pooled.

If the greatest value of a window occurs twice, the gradient may go to the other place. A weight of
0 makes a whole window equal: its own gradient is taken at the greatest of z, rather than at the
first. In half precision z is rounded, and so is the scaled z.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

__all__ = ["PooledStem", "Reader", "pooled_stem", "reads_pooled"]


class Reader(Protocol):
    """What reads the stem: the parent, or a subnet.

    Attributes:
        bn1: The norm behind the stem's conv.
        activation: The activation behind that.
        maxpool: The max-pool behind that, or an identity.
    """

    @property
    def bn1(self) -> nn.BatchNorm2d: ...  # noqa: D102

    @property
    def activation(self) -> nn.Module: ...  # noqa: D102

    @property
    def maxpool(self) -> nn.Module: ...  # noqa: D102


class PooledStem(NamedTuple):
    """The stem's product, in train mode normalised without weight and bias; then pooled.

    Attributes:
        greatest: The greatest of every window, (N, C, H, W).
        least: The least of every window, or None where no reader has a negative weight.
        mean: The mean of the product over the batch, (C,); None in eval mode.
        variance: Its variance as BatchNorms keep it, unbiased, (C,); None in eval mode.
    """

    greatest: Tensor
    least: Tensor | None
    mean: Tensor | None
    variance: Tensor | None

    def chunk(self, width: int) -> "list[PooledStem]":
        """Cuts the channels into groups."""
        parts = [
            [None] * width if tensor is None else tensor.chunk(width, dim=-3 if maps else 0)
            for tensor, maps in zip(self, (True, True, False, False), strict=True)
        ]
        return [PooledStem(*group) for group in zip(*parts, strict=True)]

    def read(self, norm: nn.BatchNorm2d, activation: nn.Module) -> Tensor:
        """Normalises and activates as a reader does; statistics move as its norm moves them."""
        weight, bias = norm.weight[:, None, None], norm.bias[:, None, None]
        pooled = self.greatest
        if self.least is not None:
            pooled = torch.where(weight < 0, self.least, pooled)
        if self.mean is None or self.variance is None:
            normalised = norm(pooled)
        else:
            _track(norm, self.mean, self.variance)
            normalised = torch.addcmul(bias, pooled, weight).to(pooled.dtype)
        activated: Tensor = activation(normalised)
        return activated


def _track(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """Moves running statistics as `torch.nn.BatchNorm2d` does in train mode."""
    if not norm.track_running_stats:
        return
    share = norm.momentum or 0.0
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # a cumulative average
            share = 1 / float(norm.num_batches_tracked)
    for kept, new in ((norm.running_mean, mean), (norm.running_var, variance)):
        if kept is not None:
            # As torch does, not counted as a write: what autograd saved at another call of the norm
            # would else be refused in the backward pass.
            kept.data.mul_(1 - share).add_(new, alpha=share)


def pooled_stem(product: Tensor, readers: Sequence[Reader]) -> PooledStem:
    """Normalises and pools once for all readers, each of which `reads_pooled` as the first.

    Example:
        >>> class Member(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.bn1 = nn.BatchNorm2d(4)
        ...         self.activation, self.maxpool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        >>> member, x = Member(), torch.randn(2, 4, 6, 6)
        >>> stem = pooled_stem(x, [member])
        >>> expected = member.maxpool(member.activation(member.bn1(x)))
        >>> torch.allclose(stem.read(member.bn1, member.activation), expected, atol=1e-5)
        True

    Args:
        product: What the stem's conv computes, (N, C, H, W).
        readers: At least one.

    Returns:
        What all of them read.
    """
    norm = readers[0].bn1
    # Not called as a module: what is done for all would be put down to one of them.
    pool = readers[0].maxpool.forward
    mean = variance = None
    if norm.training:
        # A momentum of 1 keeps the statistics of this batch, and nothing of before.
        # Not in half precision, in which a variance may be inf that a running one is not.
        dtype = torch.promote_types(norm.weight.dtype, torch.float32)
        mean, variance = torch.zeros((2, product.shape[1]), dtype=dtype, device=product.device)
        product = nn.functional.batch_norm(
            product, mean, variance, training=True, momentum=1.0, eps=norm.eps
        )
    least = -pool(-product) if _may_be_negative(readers) else None
    return PooledStem(pool(product), least, mean, variance)


def reads_pooled(reader: Reader, as_: Reader) -> bool:
    """Whether a reader may share what is pooled for another one.

    A reader with hooks may not: its hooks must get the same inputs as without sharing. A hook on
    all modules only hears of modules that are called, but the pool is not called, and in train mode
    the norm is not called either. A hook on the reader itself changes them too late.

    Args:
        reader: The parent, or a subnet.
        as_: Another one, or itself.
    """
    norm, pool = reader.bn1, reader.maxpool
    return (
        type(norm) is nn.BatchNorm2d
        and norm.weight is not None
        and norm.bias is not None
        and (norm.training or norm.running_mean is not None)
        and (norm.training, norm.eps) == (as_.bn1.training, as_.bn1.eps)
        and type(reader.activation) is nn.ReLU
        and type(pool) is nn.MaxPool2d
        and not pool.return_indices
        and pool.extra_repr() == as_.maxpool.extra_repr()
        and not any(map(_is_listened_to, (norm, reader.activation, pool)))
    )


def _may_be_negative(readers: Sequence[Reader]) -> bool:
    """Whether a norm has a negative weight, or numbers cannot be looked at."""
    try:
        return any(bool((reader.bn1.weight < 0).any()) for reader in readers)
    except RuntimeError:  # FakeTensors, vmap, a program that make_fx records
        return True


def _is_listened_to(module: nn.Module) -> bool:
    """Whether it has hooks, or a forward that somebody wrapped."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in vars(module) or any(getattr(module, kind) for kind in kinds)
