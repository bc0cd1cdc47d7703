"""Where a subnet goes: groups, blocks and routes, in integers only.

Groups are numbers modulo the width k. Subnet (a, s) is in group a after the stem, and every conv
takes it from group g to group g + s through block (i, j) = (g + s, g) of the parent's weight. For
a fixed conv the subnets that start in group a stand in group g = a + n s after n convs, so

    (a, s)  ->  (i, j) = (a + (n + 1) s, a + n s)

which is solved by s = i - j, a = j - n s: a bijection of the k*k subnets onto the k*k blocks. The
stem has no input groups; its k row blocks (i, 0) are shared by the k subnets that start in group
i.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

__all__ = [
    "Block",
    "ResidualRoute",
    "ResidualShape",
    "Route",
    "all_subnets",
    "residual_route",
    "subnet_route",
]

Block: TypeAlias = tuple[int, int]
"""Block (i, j): the part of a conv's weight that maps input group j to output group i."""


@dataclass(frozen=True)
class ResidualShape:
    """The form of one residual block, as far as routes depend on it.

    Example:
        >>> ResidualShape(convs=3, downsample=True)
        ResidualShape(convs=3, downsample=True)

    Args:
        convs: Number of convs on the main path: 2 for a basic block, 3 for a bottleneck.
        downsample: Whether the shortcut has a conv of its own.

    Raises:
        ValueError: If ``convs`` is less than 1.
    """

    convs: int
    downsample: bool = False

    def __post_init__(self) -> None:
        """Refuses a residual block without convs."""
        if self.convs < 1:
            raise ValueError(
                f"a residual block has at least 1 conv on its main path, got {self.convs}"
            )


@dataclass(frozen=True)
class ResidualRoute:
    """The blocks that a subnet visits in one residual block.

    Example:
        >>> route = residual_route(ResidualShape(convs=2), group=0, shift=1, width=3)
        >>> route.main
        ((1, 0), (2, 1))
        >>> route.entry, route.exit, route.switch
        (0, 2, 2)

    Attributes:
        main: One block for every conv of the main path.
        downsample: The block of the shortcut's conv, or None for an identity shortcut.
        switch: By how many groups the `ChannelSwitcher` moves the shortcut, so that both arms of
            the sum arrive in one group.
    """

    main: tuple[Block, ...]
    downsample: Block | None
    switch: int

    @property
    def entry(self) -> int:
        """The group in which the subnet enters."""
        return self.main[0][1]

    @property
    def exit(self) -> int:
        """The group in which the subnet leaves."""
        return self.main[-1][0]


@dataclass(frozen=True)
class Route:
    """All that a subnet visits, from the stem to the head.

    Example:
        >>> route = subnet_route([ResidualShape(convs=2)], start=1, shift=1, width=2)
        >>> route.stem, route.residuals[0].main, route.head
        ((1, 0), ((0, 1), (1, 0)), 1)

    Attributes:
        stem: The row block (i, 0) of the stem.
        residuals: One route for every residual block.
        head: The group that the classifier reads.
    """

    stem: Block
    residuals: tuple[ResidualRoute, ...]
    head: int


def all_subnets(width: int) -> tuple[tuple[int, int], ...]:
    """Lists the (start, shift) of the k*k subnets of a parent of width k.

    Example:
        >>> all_subnets(2)
        ((0, 0), (0, 1), (1, 0), (1, 1))

    Args:
        width: The parent's width k.

    Returns:
        k*k pairs (start, shift), ordered by start, then by shift.

    Raises:
        ValueError: If ``width`` is less than 1.
    """
    _require_width(width)
    return tuple((start, shift) for start in range(width) for shift in range(width))


def residual_route(shape: ResidualShape, *, group: int, shift: int, width: int) -> ResidualRoute:
    """Finds the way of a subnet through one residual block.

    A main path of n convs moves by n s. So must the shortcut: an identity is switched by n s; a
    downsample conv moves by s itself, through its own block, and leaves (n - 1) s to the switcher.

    Example:
        >>> residual_route(ResidualShape(convs=2, downsample=True), group=0, shift=1, width=2)
        ResidualRoute(main=((1, 0), (0, 1)), downsample=(1, 0), switch=1)

    Args:
        shape: The form of the residual block.
        group: The group in which the subnet enters, 0 to k-1.
        shift: By how many groups every conv moves the subnet, 0 to k-1.
        width: The parent's width k.

    Returns:
        The blocks of the main path and of the shortcut, and the switch.

    Raises:
        ValueError: If ``width`` is less than 1, or ``group`` or ``shift`` is outside of 0 to k-1.
    """
    _require_width(width)
    _require_group("group", group, width)
    _require_group("shift", shift, width)
    main = tuple(
        ((group + (conv + 1) * shift) % width, (group + conv * shift) % width)
        for conv in range(shape.convs)
    )
    if shape.downsample:
        downsample = ((group + shift) % width, group)
        return ResidualRoute(main, downsample, (shape.convs - 1) * shift % width)
    return ResidualRoute(main, None, shape.convs * shift % width)


def subnet_route(shapes: Iterable[ResidualShape], *, start: int, shift: int, width: int) -> Route:
    """Finds the way of subnet (start, shift) through a network.

    Example:
        >>> subnet_route([ResidualShape(2), ResidualShape(2)], start=0, shift=1, width=4).head
        0

    Args:
        shapes: The residual blocks in their order, possibly none.
        start: The group behind the stem, 0 to k-1.
        shift: By how many groups every conv moves the subnet, 0 to k-1.
        width: The parent's width k.

    Returns:
        The route from the stem to the head.

    Raises:
        ValueError: If ``width`` is less than 1, or ``start`` or ``shift`` is outside of 0 to k-1.
    """
    _require_width(width)
    _require_group("start", start, width)
    _require_group("shift", shift, width)
    group = start
    residuals = []
    for shape in shapes:
        residuals.append(residual_route(shape, group=group, shift=shift, width=width))
        group = residuals[-1].exit
    return Route(stem=(start, 0), residuals=tuple(residuals), head=group)


def _require_width(width: int) -> None:
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")


def _require_group(name: str, value: int, width: int) -> None:
    if not 0 <= value < width:
        raise ValueError(f"{name} must be in 0..{width - 1} for width {width}, got {value}")
