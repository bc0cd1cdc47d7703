"""How parent and subnets are computed together: two constructions with the same parameters.

``zero_padded``, the reference: every activation of a subnet has the parent's width and is zero
outside of the group where the subnet is, and every conv runs at full width with all blocks but one
masked. It is slow (1 + k*k times the parent) and plain.

The zero part is set to zero in every step: BatchNorm, activation and max-pool see only the channels
of the live group, and zeros are put around their result. So it does not matter whether act(0) is 0
(softplus, sigmoid), whether act'(0) is 0 (GELU, ELU), or whether a dead zero is larger than a live
negative value.

A mask cannot hide inf or nan: it multiplies, and 0 * inf is nan. One inf or nan in block (i, j) of
a conv reaches every subnet that writes group i there, also those that do not own the block.

``sum_of_subnets``: activations of a subnet are narrow, only the number of its group is kept, and no
zeros are computed. Let the parent's stem cost S, its other convs R, and its classifier F
operations. The k*k
subnets partition the other convs, so together they cost R again. The stem is not divided at its
input, so the k subnets that start in a group need the same rows of the parent's own product: it is
computed once for all. A classifier is narrow, F/k, and there are k*k. A forward pass costs

    S + 2 R + (1 + k) F

and a forward and backward pass the same with 2 S, 3 R and 3 F (the image needs no gradient). Each
weight is split into its blocks once for all members. The parent computes with whole weights, or, on
a CPU where blocks are large, as the sum of block products. Only members that are asked for are
computed, and of the stem only the rows that they read.

A max-pool behind the stem, and the normalisation before it, are computed once for all too; see
`ensembles.models.stems`. That is for eager execution on a CPU, and needs BatchNorm and ReLU.

Kept for the backward pass is 1 + k times what the parent keeps, less the stem's product, which is
kept once, and less all up to the pool where that is shared. Weights are not copied. An inf in a
block reaches the parent and the one subnet that owns the block.

The layout does not change the function. On a CPU, unless the image or the stem's weight is channels
last already, members are computed channels last behind the stem for as long as the weights that
they compute with are small: normalisation, max-pool and convs of few channels are faster so, and
wide convs are not. A stem whose pool is shared is channels last as well. Elsewhere a layout changes
only between a product and its normalisation, or a normalisation and its activation, where the
tensor that is left is not kept; but the input of a strided 1x1 conv of less than 16 channels is
copied, see `ensembles.kernels`. On other devices the layout is left as it is.

There is a lower bound of the time. Only products are divided between subnets, so they cost 2 for
every k. Work on each activation behind the stem (normalisation, sums) costs 1 + k, because there
are 1 + k times as many activations. An example is ResNet-18 of 16 channels, width 4, with 32 images
of 32x32 on one CPU thread. Of a parent's train step, 80 % are products, 9 % the rest of the stem,
and 11 % the rest. So k = 4 costs 0.80 * 2 + 0.09 + 0.11 * 5 = 2.24 if narrow convs are as fast as
wide ones; 2.3 is measured.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn

from ensembles.models.layers import ChannelSwitcher, SubnetConv2d
from ensembles.models.resnet import ResNet, in_turn
from ensembles.models.routing import Block
from ensembles.models.stems import PooledStem, Reader, pooled_stem, reads_pooled

__all__ = ["Construction", "ConstructionName", "known_construction", "make_construction"]

# Where a block has more bytes, the parent too is computed block by block, on a CPU: where images
# are small, the time of such a conv is that of moving its weight. Measured on one core of an AMD
# EPYC with 1 MiB of L2 cache, batch 32, width 2, forward and backward: a 3x3 conv of 1024 channels
# on 2x2 images takes 0.5 of the time in blocks, on 4x4 images 1.0; one of 512 channels on 4x4
# images 0.85 to 1.05; one of 256 channels 1.05 to 1.2.
_LARGE_BLOCK = 2 * 2**20

# Where the weight that is computed with has more bytes, a CPU computes contiguous. Same machine,
# batch 32, ResNet-18, train step of parent and subnets in steps of the parent alone, all
# contiguous, in this bound, and without it: 1.63, 1.60 and 1.62 at width 2; at a quarter of the
# channels 2.09, 1.89 and 1.92 at width 2, 2.64, 2.36 and 2.31 at width 4.
_SMALL_WEIGHT = 2**18

ConstructionName: TypeAlias = Literal["zero_padded", "sum_of_subnets"]

Starting: TypeAlias = Sequence[tuple[int, Reader]]
"""Subnets, each behind the group that it starts in."""


class Construction(Protocol):
    """The steps in which constructions differ; all else of a subnet is the same in each.

    One is made for every forward pass, and holds what the members share in it.
    """

    def share(self, x: Tensor, parent: ResNet, *, with_parent: bool, subnets: Starting) -> None:
        """Computes what members share: subnets, and the parent where it is asked for."""

    def whole_stem(self, x: Tensor, conv: nn.Conv2d, *modules: nn.Module) -> Tensor:
        """Computes with the parent's stem, and applies what is between it and the first layer."""

    def whole(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """Computes with the whole weight of a parent's conv behind the stem."""

    def stem(
        self, x: Tensor, conv: SubnetConv2d, group: int, width: int, *modules: nn.Module
    ) -> Tensor:
        """Computes with the stem's rows of a group, and applies a subnet's modules behind them."""

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

    def share(self, x: Tensor, parent: ResNet, *, with_parent: bool, subnets: Starting) -> None:
        pass

    def whole_stem(self, x: Tensor, conv: nn.Conv2d, *modules: nn.Module) -> Tensor:
        return in_turn(x, conv, *modules)

    def whole(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        y: Tensor = conv(x)
        return y

    def stem(
        self, x: Tensor, conv: SubnetConv2d, group: int, width: int, *modules: nn.Module
    ) -> Tensor:
        return self.own(self.conv(conv, x, (group, 0)), group, width, *modules)

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
        # By what reads it: the group, or None for the parent, and the modules.
        self._pooled: dict[tuple[object, ...], PooledStem] = {}
        self._lays_out = False

    # Everything is computed here and nothing on first use: a member that is recomputed in the
    # backward pass (activation checkpointing) must do what it did at first.
    def share(self, x: Tensor, parent: ResNet, *, with_parent: bool, subnets: Starting) -> None:
        stem = parent.conv1
        assert isinstance(stem, SubnetConv2d)
        starts = sorted({start for start, _ in subnets})
        if starts:
            convs = [module for module in parent.modules() if isinstance(module, SubnetConv2d)]
            self._blocks = {conv: conv.split_weight() for conv in convs}
        pooling = _pooling(x, [reader for _, reader in subnets])
        if not with_parent:
            self._stems = {start: self._stem(stem, x, start) for start in starts}
            for start, product in self._stems.items():
                here = {reader: 0 for at, reader in subnets if at == start and reader in pooling}
                self._pool(product, 1, here)
            return
        self._lays_out = _layout_is_free(stem, x)
        self._whole_stem = stem(_channels_last(x) if self._lays_out and pooling else x)
        rows = self._whole_stem.chunk(stem.width, dim=1)
        self._stems = {start: rows[start] for start in starts}
        groups = {reader: start for start, reader in subnets if reader in pooling}
        self._pool(self._whole_stem, stem.width, groups, parent)

    def whole_stem(self, x: Tensor, conv: nn.Conv2d, *modules: nn.Module) -> Tensor:
        assert self._whole_stem is not None
        pooled = self._pooled.get((None, *modules))
        if pooled is not None:
            return pooled.read(cast(nn.BatchNorm2d, modules[0]), modules[1])
        return in_turn(self._whole_stem, *modules)

    def whole(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        assert isinstance(conv, SubnetConv2d)
        blocks = self._blocks.get(conv)
        in_blocks = (
            blocks is not None
            and x.device.type == "cpu"
            and conv.weight.nbytes > _LARGE_BLOCK * len(blocks)
        )
        y: Tensor = conv(x, blocks) if in_blocks else conv(x)
        return self._laid_out(y, conv.weight.nbytes)

    def stem(
        self, x: Tensor, conv: SubnetConv2d, group: int, width: int, *modules: nn.Module
    ) -> Tensor:
        norm, activation, *others = modules
        pooled = self._pooled.get((group, *modules))
        if pooled is not None:
            return pooled.read(cast(nn.BatchNorm2d, norm), activation)
        product = self._stems.get(group)
        y: Tensor = norm(self._stem(conv, x, group) if product is None else product)
        # Not before the BatchNorm, which keeps its input: that is shared, and a copy of it is not.
        return in_turn(_channels_last(y) if self._lays_out else y, activation, *others)

    def conv(self, conv: SubnetConv2d, x: Tensor, block: Block) -> Tensor:
        y = conv.narrow(x, *block, blocks=self._blocks.get(conv))
        return self._laid_out(y, conv.weight.nbytes // math.prod(conv.grid))

    def own(self, x: Tensor, group: int, width: int, *modules: nn.Module) -> Tensor:
        return in_turn(x, *modules)

    def switch(self, x: Tensor, switcher: ChannelSwitcher) -> Tensor:
        return x

    def leave(self, x: Tensor, group: int, width: int) -> Tensor:
        return x

    def _pool(
        self,
        product: Tensor,
        width: int,
        groups: Mapping[Reader, int],
        parent: Reader | None = None,
    ) -> None:
        """Pools a product for the subnets that read it, and for the parent where it may share."""
        if not groups:
            return
        readers = list(groups)
        if parent is not None and reads_pooled(parent, readers[0]):
            readers.append(parent)
        whole = pooled_stem(product, readers)
        parts = whole.chunk(width)
        for reader in readers:
            group = groups.get(reader)
            modules = (reader.bn1, reader.activation, reader.maxpool)
            self._pooled[group, *modules] = whole if group is None else parts[group]

    def _stem(self, conv: SubnetConv2d, x: Tensor, group: int) -> Tensor:
        self._lays_out = _layout_is_free(conv, x)
        x = _channels_last(x) if self._lays_out else x
        return conv.narrow(x, group, 0, blocks=self._blocks.get(conv))

    # What a conv computed and not what it computes with: its input is kept already, by the
    # activation, and a copy of it would be kept too.
    def _laid_out(self, y: Tensor, weight_bytes: int) -> Tensor:
        return y.contiguous() if self._lays_out and weight_bytes > _SMALL_WEIGHT else y


def _layout_is_free(stem: SubnetConv2d, x: Tensor) -> bool:
    """Whether nobody chose a layout, and another one than the usual is faster."""
    is_map = x.device.type == "cpu" and x.ndim == 4
    return is_map and x.is_contiguous() and stem.weight.is_contiguous()


def _pooling(x: Tensor, readers: Sequence[Reader]) -> list[Reader]:
    """Those for which the stem's product may be pooled at once.

    Whether weights are negative must be looked at: on a CPU that costs nothing, another device
    would have to be waited for, and what is compiled or traced cannot depend on it.
    """
    if x.device.type != "cpu" or x.ndim != 4:
        return []
    is_traced = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    if torch.compiler.is_compiling() or is_traced:
        return []
    able = [reader for reader in readers if reads_pooled(reader, reader)]
    return [reader for reader in able if reads_pooled(reader, able[0])]


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
