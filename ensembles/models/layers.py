"""Layers of a parent whose weights are shared with its subnets.

`SubnetConv2d` is a `torch.nn.Conv2d` whose weight can be read in blocks; `ChannelSwitcher` moves
channel groups, so that a shortcut can follow its subnet.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ensembles.models.convs import GuardedConv2d
from ensembles.models.routing import Block

__all__ = ["BlockConv2d", "ChannelSwitcher", "SubnetConv2d", "SubnetGrid"]


class ChannelSwitcher(nn.Module):
    """Moves the content of channel group g to group g + shift (mod k), and has no parameters.

    With width 2 and shift 1 it swaps the halves and is its own inverse. It stands on the identity
    and downsample paths of a subnet, so that both arms of a residual sum arrive in one group.

    Example:
        >>> x = torch.arange(6.0).reshape(1, 6, 1, 1)
        >>> ChannelSwitcher(3)(x).flatten().tolist()
        [4.0, 5.0, 0.0, 1.0, 2.0, 3.0]

    Args:
        width: The number k of channel groups.
        shift: By how many groups the content moves; any integer, also a negative one.

    Shape:
        (N, C, ...) to (N, C, ...), where k divides C.

    Raises:
        ValueError: If ``width`` is less than 1; in the call, if k does not divide the channels.
    """

    def __init__(self, width: int, shift: int = 1) -> None:
        super().__init__()
        _require_width(width)
        self.width = width
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        """Moves the groups; where nothing moves, ``x`` itself is returned."""
        if x.ndim < 2:
            raise ValueError(f"ChannelSwitcher expects (N, C, ...), got shape {tuple(x.shape)}")
        _require_divisible("channels", x.shape[1], self.width)
        shift = self.shift % self.width
        if shift == 0:
            return x
        return torch.roll(x, shift * (x.shape[1] // self.width), dims=1)

    def extra_repr(self) -> str:
        """Shows the arguments."""
        return f"width={self.width}, shift={self.shift}"


class SubnetConv2d(GuardedConv2d):
    """A `torch.nn.Conv2d` of k times the width, whose blocks are the convs of its subnets.

    The channels are cut into k groups; ``conv.subnets[i, j]`` computes with block (i, j), the part
    of the weight that maps input group j to output group i::

        weight[i * out/k : (i + 1) * out/k,  j * in/k : (j + 1) * in/k]

    A block is a view of the weight, taken anew at every call. Nothing else refers to the weight,
    so a step on a subnet moves the parent and the other way round, and ``copy.deepcopy``,
    ``.double()``, ``to_empty`` and ``load_state_dict(assign=True)`` cannot part them. (Views that
    are kept as Parameters are parted by each of these, and an optimizer steps twice on them.)

    Weights are shared, but biases are not: with ``bias=True`` the parent keeps ``bias`` of shape
    (out,), and the blocks have ``subnet_bias`` of shape (k, k, out/k), drawn as that of a conv of
    ordinary width. With ``bias=False`` the names of the parameters are those of `torch.nn.Conv2d`.

    Example:
        >>> conv = SubnetConv2d(4, 6, kernel_size=3, padding=1, bias=False, width=2)
        >>> x = torch.randn(1, 2, 5, 5)
        >>> conv.subnets[1, 0](x).shape
        torch.Size([1, 3, 5, 5])
        >>> conv.subnets[1, 0](x).sum().backward()
        >>> conv.weight.grad[3:, :2].any().item(), conv.weight.grad[:3].any().item()
        (True, False)

    Args:
        in_channels: Channels of the parent's input.
        out_channels: Channels of the parent's output.
        kernel_size: As in `torch.nn.Conv2d`, like all that follow.
        stride: Stride.
        padding: Padding, also "same" and "valid".
        dilation: Dilation.
        groups: Only 1: the groups of a grouped conv would cross the blocks.
        bias: Whether parent and blocks have biases.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        device: Device of the parameters, also "meta".
        dtype: Type of the parameters.
        width: The number k of channel groups.
        split_input: Whether the input has groups too. False for a stem, whose input is the image:
            its blocks are the k row blocks (i, 0).

    Shape:
        (N, in, H, W) to (N, out, H', W'), as in `torch.nn.Conv2d`; without N too.

    Raises:
        ValueError: If ``width`` is less than 1, k does not divide the channels, or ``groups`` is
            not 1.
    """

    subnet_bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: Literal["valid", "same"] | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        width: int,
        split_input: bool = True,
    ) -> None:
        _require_width(width)
        if groups != 1:
            raise ValueError(
                f"SubnetConv2d has no grouped form, got groups={groups}: blocks (i, j) with i != j "
                "would cross the groups. Use groups=1 here, or torch.nn.Conv2d for a conv that no "
                "subnet shares."
            )
        _require_divisible("out_channels", out_channels, width)
        if split_input:
            _require_divisible("in_channels", in_channels, width)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        self.width = width
        self.split_input = split_input
        if bias:
            shape = (*self.grid, out_channels // width)
            self.subnet_bias = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self._reset_subnet_bias()
        else:
            self.register_parameter("subnet_bias", None)

    @property
    def grid(self) -> tuple[int, int]:
        """Numbers of output groups and of input groups: (k, k), or (k, 1) for a stem."""
        return (self.width, self.width if self.split_input else 1)

    @property
    def subnets(self) -> "SubnetGrid":
        """The blocks: ``conv.subnets[i, j]`` computes with block (i, j)."""
        return SubnetGrid(self)

    def reset_parameters(self) -> None:
        """Draws weight and bias as `torch.nn.Conv2d` does, then the biases of the blocks."""
        super().reset_parameters()
        # torch.nn.Conv2d calls this from its constructor, before there are biases of blocks.
        if self._parameters.get("subnet_bias") is not None:
            self._reset_subnet_bias()

    def narrow(
        self, x: Tensor, i: int, j: int, *, blocks: Mapping[Block, Tensor] | None = None
    ) -> Tensor:
        """Computes with block (i, j) at ordinary width, without zeros.

        Example:
            >>> conv = SubnetConv2d(4, 6, kernel_size=1, bias=False, width=2)
            >>> conv.narrow(torch.randn(1, 2, 5, 5), 1, 0).shape
            torch.Size([1, 3, 5, 5])

        Args:
            x: (N, in/k, H, W), input group j; the whole image for a stem.
            i: The output group.
            j: The input group; 0 for a stem.
            blocks: From `split_weight`, where several blocks of the conv are computed with.

        Returns:
            (N, out/k, H', W'), output group i.

        Raises:
            IndexError: If the parent has no block (i, j).
        """
        rows, columns = self._rows_and_columns(i, j)
        weight = self.weight[rows, columns] if blocks is None else blocks[i, j]
        bias = None if self.subnet_bias is None else self.subnet_bias[i, j]
        return self._computed_narrow(x, weight, bias)

    def zero_padded(self, x: Tensor, i: int, j: int) -> Tensor:
        """Computes with block (i, j) at full width: every other weight is masked with zeros.

        Equal to ``conv.subnets[i, j]`` on input group j, with zeros in the other output groups;
        the bias of the block is added to output group i alone. It costs as much as the whole conv.

        A mask is a product: where the weight holds inf or nan, in whatever block, 0 * inf is nan
        and every output of that output channel is nan.

        Example:
            >>> conv = SubnetConv2d(4, 6, kernel_size=1, bias=False, width=2)
            >>> y = conv.zero_padded(torch.randn(1, 4, 5, 5), 1, 0)
            >>> y.shape, y[:, :3].any().item()
            (torch.Size([1, 6, 5, 5]), False)

        Args:
            x: (N, in, H, W); only input group j is used.
            i: The output group.
            j: The input group; 0 for a stem.

        Returns:
            (N, out, H', W'), zero outside of output group i.

        Raises:
            IndexError: If the parent has no block (i, j).
        """
        rows, columns = self._rows_and_columns(i, j)
        weight = self.weight
        mask = weight.new_zeros(self.out_channels, self.in_channels, 1, 1)
        mask[rows, columns] = 1
        bias = None
        if self.subnet_bias is not None:
            around = (rows.start, self.out_channels - rows.stop)
            bias = nn.functional.pad(self.subnet_bias[i, j], around)
        return self._computed(x, weight * mask, bias)

    def split_weight(self) -> dict[Block, Tensor]:
        """Returns all blocks of the weight: views, made in one go.

        A block that is taken by itself gets a gradient buffer of the size of the whole weight in
        the backward pass. Blocks that are split off together are put into one buffer.

        Example:
            >>> conv = SubnetConv2d(4, 6, kernel_size=1, bias=False, width=2)
            >>> blocks = conv.split_weight()
            >>> list(blocks), torch.equal(blocks[1, 0], conv.weight[3:, :2])
            ([(0, 0), (0, 1), (1, 0), (1, 1)], True)

        Returns:
            Block (i, j) by its (i, j), row by row.
        """
        rows, columns = self.grid
        return {
            (i, j): block
            for i, row in enumerate(self.weight.chunk(rows, dim=0))
            for j, block in enumerate(row.chunk(columns, dim=1))
        }

    def forward(self, x: Tensor, blocks: Mapping[Block, Tensor] | None = None) -> Tensor:
        """Computes the whole conv: as `torch.nn.Conv2d` does, or as the sum of block products.

        Output group i is the sum over j of block (i, j) on input group j: the same in another
        order of summation.

        Example:
            >>> conv = SubnetConv2d(4, 6, kernel_size=3, width=2)
            >>> x = torch.randn(1, 4, 5, 5)
            >>> torch.allclose(conv(x, conv.split_weight()), conv(x), atol=1e-5)
            True

        Args:
            x: (N, in, H, W); without N too.
            blocks: From `split_weight`, to compute the sum of block products.

        Returns:
            (N, out, H', W').
        """
        if blocks is None:
            return super().forward(x)
        rows, columns = self.grid
        groups = x.chunk(columns, dim=-3)
        sums = []
        for i in range(rows):
            products = [
                self._computed_narrow(group, blocks[i, j], None) for j, group in enumerate(groups)
            ]
            sums.append(sum(products[1:], start=products[0]))
        y = torch.cat(sums, dim=-3)
        return y if self.bias is None else y + self.bias[:, None, None]

    def extra_repr(self) -> str:
        """Shows the arguments."""
        stem = "" if self.split_input else ", split_input=False"
        shown: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{shown}, width={self.width}{stem}"

    def _computed_narrow(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, weight = self._guarded(x, weight, self.in_channels // self.grid[1])
        return self._computed(x, weight, bias)

    def _computed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # torch.nn.Conv2d's own way: stride, padding and its modes, and dilation are all in here.
        y: Tensor = self._conv_forward(x, weight, bias)
        return y

    def _reset_subnet_bias(self) -> None:
        assert self.subnet_bias is not None
        fan_in = self.in_channels // self.grid[1] * math.prod(self.kernel_size)
        bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
        nn.init.uniform_(self.subnet_bias, -bound, bound)

    def _rows_and_columns(self, i: int, j: int) -> tuple[slice, slice]:
        rows, columns = self.grid
        if not (0 <= i < rows and 0 <= j < columns):
            raise IndexError(
                f"no block ({i}, {j}): i must be in 0..{rows - 1} and j in 0..{columns - 1}"
            )
        out, into = self.out_channels // rows, self.in_channels // columns
        return slice(i * out, (i + 1) * out), slice(j * into, (j + 1) * into)


class SubnetGrid:
    """The blocks of a `SubnetConv2d`: indexed by (i, j), and iterated in the order of rows.

    Example:
        >>> conv = SubnetConv2d(4, 6, kernel_size=3, width=2)
        >>> len(conv.subnets), [(block.i, block.j) for block in conv.subnets]
        (4, [(0, 0), (0, 1), (1, 0), (1, 1)])

    Args:
        conv: The parent.
    """

    def __init__(self, conv: SubnetConv2d) -> None:
        self._conv = conv

    def __getitem__(self, index: tuple[int, int]) -> "BlockConv2d":
        """Returns block (i, j); raises IndexError where the parent has none."""
        if not (isinstance(index, tuple) and len(index) == 2):
            rows, columns = self._conv.grid
            raise IndexError(
                f"expected two indices (i, j), got {index!r}: "
                f"i must be in 0..{rows - 1} and j in 0..{columns - 1}"
            )
        return BlockConv2d(self._conv, *index)

    def __iter__(self) -> Iterator["BlockConv2d"]:
        """Yields all blocks, row by row."""
        rows, columns = self._conv.grid
        return (BlockConv2d(self._conv, i, j) for i in range(rows) for j in range(columns))

    def __len__(self) -> int:
        """Counts the blocks."""
        return math.prod(self._conv.grid)

    def __repr__(self) -> str:
        """Shows the grid."""
        rows, columns = self._conv.grid
        return f"SubnetGrid({rows} x {columns} blocks of {self._conv!r})"


class BlockConv2d(nn.Module):
    """The conv of ordinary width that computes with block (i, j) of a `SubnetConv2d`.

    It is a module, so that it can stand in a `torch.nn.Sequential`, and the parent is its
    submodule, so that its ``parameters()`` are the parent's: an optimizer that gets this conv
    moves the weight itself. The parent does not list its blocks in turn. Two calls of
    ``conv.subnets[i, j]`` return two modules on one weight.

    Example:
        >>> conv = SubnetConv2d(4, 6, kernel_size=3, bias=False, width=2)
        >>> block = conv.subnets[0, 1]
        >>> torch.equal(block.weight, conv.weight[:3, 2:])
        True
        >>> [parameter is conv.weight for parameter in block.parameters()]
        [True]

    Args:
        conv: The parent.
        i: The output group.
        j: The input group; 0 for a stem.

    Shape:
        (N, in/k, H, W) to (N, out/k, H', W'); a stem's input is not divided.

    Raises:
        IndexError: If the parent has no block (i, j).
    """

    def __init__(self, conv: SubnetConv2d, i: int, j: int) -> None:
        super().__init__()
        self.conv = conv
        self.i = i
        self.j = j
        self._rows, self._columns = conv._rows_and_columns(i, j)

    @property
    def weight(self) -> Tensor:
        """Block (i, j) of the parent's weight: a view, (out/k, in/k, kernel, kernel)."""
        return self.conv.weight[self._rows, self._columns]

    @property
    def bias(self) -> Tensor | None:
        """The block's own bias, (out/k,), or None: a view of the parent's ``subnet_bias``."""
        bias = self.conv.subnet_bias
        return None if bias is None else bias[self.i, self.j]

    def forward(self, x: Tensor) -> Tensor:
        """Computes at ordinary width; see `SubnetConv2d.narrow`."""
        return self.conv.narrow(x, self.i, self.j)

    def zero_padded(self, x: Tensor) -> Tensor:
        """Computes the same at the parent's width; see `SubnetConv2d.zero_padded`."""
        return self.conv.zero_padded(x, self.i, self.j)

    def extra_repr(self) -> str:
        """Shows which block it is."""
        return f"i={self.i}, j={self.j}"


def _require_width(width: int) -> None:
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")


def _require_divisible(name: str, channels: int, width: int) -> None:
    if channels % width:
        raise ValueError(f"width {width} does not divide {channels} {name}")
