"""How parent and subnets are computed together: two constructions with the same parameters.

``zero_padded``, the reference: every activation of a subnet has the parent's width and is zero
outside of the group where the subnet is, and every conv runs at full width with all blocks but one
masked. It is slow (1 + k*k times the parent) and plain.

The zero part is held at zero and not merely expected to stay there: BatchNorm, activation and
max-pool see only the channels of the live group, and zeros are put around their result. So it does
not matter whether act(0) is 0 (softplus, sigmoid), whether act'(0) is 0 (GELU, ELU), or which of a
dead zero and a live negative value is larger.

What a mask cannot hide: it multiplies, and 0 * inf is nan. One inf or nan in block (i, j) of a
conv reaches every subnet that writes group i there, and not only the one that owns the block.

``sum_of_subnets``: activations of a subnet are narrow, its group is bookkeeping, and no zero is
computed. Let the parent's stem cost S, its other convs R, and its classifier F operations. The k*k
subnets partition the other convs, so together they cost R again. The stem is not divided at its
input, so the k subnets that start in a group need the same rows of the parent's own product: it is
computed once for all. A classifier is narrow, F/k, and there are k*k. A forward pass costs

    S + 2 R + (1 + k) F

and a forward and backward pass the same with 2 S, 3 R and 3 F (the image needs no gradient). Each
weight is split into its blocks once for all members. The parent computes with whole weights, or, on
a CPU where blocks are large, as the sum of block products. Only members that are asked for are
computed, and of the stem only the rows that they read.

Kept for the backward pass is 1 + k times what the parent keeps, less the stem's product, which is
kept once (from width 3 on a CPU twice, see below). Weights are not copied. An inf in a block
reaches the parent and the one subnet that owns the block.

A layout is no part of the function. On a CPU, unless the image or the stem's weight is channels
last already, members are computed channels last behind the stem for as long as the weights that
they compute with are small: normalisation, max-pool and convs of few channels are faster so, and
wide convs are not. From width 3 on the stem's product is channels last too, and each of its row
blocks is copied together for the k subnets that read it: normalising a row block of a wider
product takes three times as long. Elsewhere a layout changes only between a product and its
normalisation, or a normalisation and its activation, where the tensor that is left is not kept.
On other devices the layout is left as it is.

What the time cannot go below: only products are shared out, so they cost 2 whatever k. What is
done for each activation (normalisation, max-pool, sums) costs 1 + k, as there are 1 + k times as
many activations. One CPU thread, ResNet-18 of 16 channels, width 4, 32 images of 32x32: such work
is 15 % of a parent's train step and products are 85 %, so 0.85 * 2 + 0.15 * 5 = 2.45 is what k = 4
costs if narrow convs are as fast as wide ones; 2.46 is measured.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ensembles.models.layers import ChannelSwitcher, SubnetConv2d
from ensembles.models.resnet import ResNet
from ensembles.models.routing import Block

__all__ = ["Construction", "ConstructionName", "known_construction", "make_construction"]

# Where a block has more bytes, the parent too is computed block by block, on a CPU: where images
# are small, the time of such a conv is that of moving its weight. Measured on one core of an AMD
# EPYC with 1 MiB of L2 cache, batch 32, width 2, forward and backward: a 3x3 conv of 1024 channels
# on 2x2 images takes 0.5 of the time in blocks, on 4x4 images 1.0; one of 512 channels on 4x4
# images 0.85 to 1.05; one of 256 channels 1.05 to 1.2.
_LARGE_BLOCK = 2 * 2**20

# Where the weight that is computed with has more bytes, a CPU computes contiguous. Same machine,
# batch 32, ResNet-18, train step of parent and subnets in steps of the parent alone, all
# contiguous against subnets in this bound: 1.67 and 1.60 at width 2; at a quarter of the channels
# 2.57 and 2.21 at width 2, 3.18 and 2.59 at width 4. Without the bound 1.71, 2.19 and 2.69.
_SMALL_WEIGHT = 2**18

# From this width on the stem's rows are copied for the subnets. Same machine, a quarter of the
# channels, steps of the parent alone without and with: 2.29 and 2.07 at width 2, 2.52 and 2.34 at
# width 3, 2.67 and 2.47 at width 4. The copy is kept: 0.16 of what the parent alone keeps, at any
# width. At width 2 that is much (2.84 in place of 2.68), and there the stem is kept once.
_COPIED_STEM = 3

ConstructionName: TypeAlias = Literal["zero_padded", "sum_of_subnets"]


class Construction(Protocol):
    """The steps in which constructions differ; all else of a subnet is the same in each.

    One is made for every forward pass, and holds what the members share in it.
    """

    def share(self, x: Tensor, parent: ResNet, *, starts: Sequence[int], with_parent: bool) -> None:
        """Computes what members share: the subnets that start in ``starts``, and the parent."""

    def whole(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Computes with the whole weight of a parent's conv."""

    def conv(self, conv: SubnetConv2d, x: Tensor, block: Block) -> Tensor:
        """Computes with one block of a parent's conv."""

    def own(self, x: Tensor, group: int, width: int, *modules: nn.Module) -> Tensor:
        """Applies modules of ordinary width to the activations of a subnet that is in ``group``."""

    def switch(self, x: Tensor, switcher: ChannelSwitcher) -> Tensor:
        """Moves a shortcut to the group where the main path ends."""

    def leave(self, x: Tensor, group: int, width: int) -> Tensor:
        """Returns the activations at ordinary width."""


class _ZeroPadded:
    """Activations at the parent's width, zero outside of the live group; nothing is shared."""

    def share(self, x: Tensor, parent: ResNet, *, starts: Sequence[int], with_parent: bool) -> None:
        pass

    def whole(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        y: Tensor = conv(x)
        return y

    def conv(self, conv: SubnetConv2d, x: Tensor, block: Block) -> Tensor:
        return conv.zero_padded(x, *block)

    def own(self, x: Tensor, group: int, width: int, *modules: nn.Module) -> Tensor:
        live = self.leave(x, group, width)
        for module in modules:
            live = module(live)
        channels = live.shape[1]
        before, behind = group * channels, (width - 1 - group) * channels
        # pad counts from the last dimension: two numbers for W, two for H, two for the channels.
        return nn.functional.pad(live, (0, 0, 0, 0, before, behind))

    def switch(self, x: Tensor, switcher: ChannelSwitcher) -> Tensor:
        switched: Tensor = switcher(x)
        return switched

    def leave(self, x: Tensor, group: int, width: int) -> Tensor:
        channels = x.shape[1] // width
        return x.narrow(1, group * channels, channels)


class _SumOfSubnets:
    """Narrow activations; blocks and the stem's rows are shared by the members of a step."""

    def __init__(self) -> None:
        self._blocks: dict[nn.Module, Mapping[Block, Tensor]] = {}
        self._whole_stem: Tensor | None = None
        self._stems: dict[int, Tensor] = {}
        self._lays_out = False
        self._behind_stem = False

    # Everything is computed here and nothing on first use: a member that is recomputed in the
    # backward pass (activation checkpointing) must do what it did at first.
    def share(self, x: Tensor, parent: ResNet, *, starts: Sequence[int], with_parent: bool) -> None:
        stem = parent.conv1
        assert isinstance(stem, SubnetConv2d)
        if starts:
            convs = [module for module in parent.modules() if isinstance(module, SubnetConv2d)]
            self._blocks = {conv: conv.split_weight() for conv in convs}
        if not with_parent:
            self._stems = {start: self._stem(stem, x, (start, 0)) for start in starts}
            return
        self._lays_out = _layout_is_free(stem, x)
        copied = self._lays_out and bool(starts) and stem.width >= _COPIED_STEM
        self._whole_stem = stem(_channels_last(x) if copied else x)
        rows = self._whole_stem.chunk(stem.width, dim=1)
        self._stems = {
            start: _channels_last(rows[start]) if copied else rows[start] for start in starts
        }

    def whole(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        assert isinstance(conv, SubnetConv2d)
        if not conv.split_input and self._whole_stem is not None:
            return self._whole_stem
        blocks = self._blocks.get(conv)
        in_blocks = (
            blocks is not None
            and x.device.type == "cpu"
            and conv.weight.nbytes > _LARGE_BLOCK * len(blocks)
        )
        y: Tensor = conv(x, blocks) if in_blocks else conv(x)
        return self._laid_out(y, conv.weight.nbytes)

    def conv(self, conv: SubnetConv2d, x: Tensor, block: Block) -> Tensor:
        self._behind_stem = not conv.split_input
        if self._behind_stem:
            stem = self._stems.get(block[0])
            return self._stem(conv, x, block) if stem is None else stem
        return self._laid_out(
            self._block(conv, x, block), conv.weight.nbytes // math.prod(conv.grid)
        )

    def own(self, x: Tensor, group: int, width: int, *modules: nn.Module) -> Tensor:
        first, *others = modules
        x = first(x)
        # Not before the stem's BatchNorm, which keeps its input: that is shared, and a copy of it
        # is not.
        if self._behind_stem and self._lays_out:
            x = _channels_last(x)
        for module in others:
            x = module(x)
        return x

    def switch(self, x: Tensor, switcher: ChannelSwitcher) -> Tensor:
        return x

    def leave(self, x: Tensor, group: int, width: int) -> Tensor:
        return x

    def _stem(self, conv: SubnetConv2d, x: Tensor, block: Block) -> Tensor:
        self._lays_out = _layout_is_free(conv, x)
        return self._block(conv, _channels_last(x) if self._lays_out else x, block)

    def _block(self, conv: SubnetConv2d, x: Tensor, block: Block) -> Tensor:
        return conv.narrow(x, *block, blocks=self._blocks.get(conv))

    # What a conv computed and not what it computes with: its input is kept already, by the
    # activation, and a copy of it would be kept too.
    def _laid_out(self, y: Tensor, weight_bytes: int) -> Tensor:
        return y.contiguous() if self._lays_out and weight_bytes > _SMALL_WEIGHT else y


def _layout_is_free(stem: SubnetConv2d, x: Tensor) -> bool:
    """Whether nobody chose a layout, and another one than the usual is faster."""
    return x.device.type == "cpu" and x.is_contiguous() and stem.weight.is_contiguous()


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def make_construction(name: ConstructionName) -> Construction:
    """Makes the steps of one forward pass."""
    return _SumOfSubnets() if name == "sum_of_subnets" else _ZeroPadded()


def known_construction(name: ConstructionName) -> ConstructionName:
    """Returns the name; raises ValueError where there is no such construction."""
    names = get_args(ConstructionName)
    if name not in names:
        raise ValueError(f"construction must be one of {sorted(names)}, got {name!r}")
    return name
