"""A wide ResNet together with the k*k ResNets of ordinary width that share its convs.

Every conv weight is shared with the parent, also that of the stem. Each member has its own
BatchNorms, activations, biases and classifier. How the shared weights are computed with is the
construction; see `ensembles.models.constructions`.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn

from ensembles.models.constructions import (
    Construction,
    ConstructionName,
    known_construction,
    make_construction,
)
from ensembles.models.layers import ChannelSwitcher, SubnetConv2d
from ensembles.models.resnet import Layer, ResidualBlock, ResNet, ResNetOptions, Stem
from ensembles.models.routing import Block, ResidualRoute, all_subnets, subnet_route

__all__ = [
    "ParentResNet",
    "Subnet",
    "SubnetOptions",
    "SubnetResNet",
    "SubnetResidualBlock",
    "subnet_name",
    "subnet_resnet18",
    "subnet_resnet34",
    "subnet_resnet50",
]


class SubnetOptions(ResNetOptions, total=False):
    """The keyword arguments of `subnet_resnet18` and its like: those of `SubnetResNet`."""

    construction: ConstructionName


def subnet_name(start: int, shift: int) -> str:
    """Names subnet (start, shift), in `SubnetResNet.subnets` and in its outputs.

    Example:
        >>> subnet_name(0, 1)
        'subnet_0_1'

    Args:
        start: The group behind the stem.
        shift: By how many groups every conv moves the subnet.

    Returns:
        The name.
    """
    return f"subnet_{start}_{shift}"


class ParentResNet(ResNet):
    """A `ResNet` whose convs are `SubnetConv2d`: names, weights and outputs are those of `ResNet`.

    Example:
        >>> parent = ParentResNet(18, width=2, base_channels=4, num_classes=10, stem="cifar")
        >>> parent.conv1.subnets[1, 0].weight.shape
        torch.Size([4, 3, 3, 3])

    Args:
        depth: 18, 34 or 50.
        **options: The keyword arguments of `ResNet`.

    Shape:
        (N, image_channels, H, W) to (N, num_classes).

    Raises:
        ValueError: As `ResNet` does.
    """

    conv1: SubnetConv2d

    def _conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        is_stem: bool = False,
    ) -> SubnetConv2d:
        return SubnetConv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            bias=False,
            width=self.width,
            split_input=not is_stem,
        )


class SubnetResidualBlock(nn.Module):
    """One residual block of a subnet: the parent's convs, BatchNorms and activation of its own.

    Example:
        >>> parent = ParentResNet(18, width=2, base_channels=4)
        >>> block = Subnet(parent, start=0, shift=1).layer2[0]
        >>> block.conv1 is parent.layer2[0].conv1, block.bn1.num_features, block.route.downsample
        (True, 8, (1, 0))

    Args:
        block: The parent's residual block.
        route: The way of the subnet through it.
        width: The parent's width k.
        activation: A factory of modules, called once.
        construction: How the shared weights are computed with.

    Shape:
        (N, C, H, W) to (N, C', H', W'); in the ``zero_padded`` construction C and C' are the
        parent's, in ``sum_of_subnets`` those of ordinary width.
    """

    def __init__(
        self,
        block: ResidualBlock,
        route: ResidualRoute,
        *,
        width: int,
        activation: Callable[[], nn.Module] = nn.ReLU,
        construction: ConstructionName = "sum_of_subnets",
    ) -> None:
        super().__init__()
        self.route = route
        self.width = width
        self.construction = known_construction(construction)
        for number, (conv, bn) in enumerate(block.stages, start=1):
            self.add_module(f"conv{number}", conv)
            self.add_module(f"bn{number}", nn.BatchNorm2d(bn.num_features // width))
        self.activation = activation()
        self.downsample: nn.Sequential | None = None
        if block.downsample is not None:
            shared = cast(SubnetConv2d, block.downsample[0])
            self.downsample = nn.Sequential(shared, nn.BatchNorm2d(shared.out_channels // width))
        self.switcher = ChannelSwitcher(width, route.switch)

    def blocks(self) -> Iterator[tuple[str, Block]]:
        """Yields the name of every conv with the block that the subnet visits in it."""
        for number, block in enumerate(self.route.main, start=1):
            yield f"conv{number}", block
        if self.route.downsample is not None:
            yield "downsample.0", self.route.downsample

    def forward(self, x: Tensor, steps: Construction | None = None) -> Tensor:
        """Computes act(main(x) + switched shortcut(x)).

        Args:
            x: (N, C, H, W).
            steps: What this step shares with other members; None where it shares nothing.
        """
        steps = steps or make_construction(self.construction)
        out = x
        for number, block in enumerate(self.route.main, start=1):
            out = steps.conv(getattr(self, f"conv{number}"), out, block)
            own = [getattr(self, f"bn{number}")]
            if number < len(self.route.main):
                own.append(self.activation)
            out = steps.own(out, block[0], self.width, *own)
        shortcut = x
        if self.downsample is not None and self.route.downsample is not None:
            shared = cast(SubnetConv2d, self.downsample[0])
            shortcut = steps.conv(shared, x, self.route.downsample)
            group = self.route.downsample[0]
            shortcut = steps.own(shortcut, group, self.width, self.downsample[1])
        out = out + steps.switch(shortcut, self.switcher)
        return steps.own(out, self.route.exit, self.width, self.activation)


class Subnet(nn.Module):
    """Subnet (start, shift): a ResNet of ordinary width inside of a parent.

    Its convs ARE the parent's modules, under an ordinary ResNet's names (conv1, layer1.0.conv1,
    layer2.0.downsample.0), and its ``parameters()`` list the parent's weights, so that an
    optimizer built on a subnet moves the parent. (Weight decay then acts on the whole weights, not
    only on the subnet's blocks.) As the modules and not the tensors are shared, ``copy.deepcopy``
    of both, ``.double()``, ``to_empty`` and ``load_state_dict(assign=True)`` keep them together.

    Example:
        >>> parent = ParentResNet(18, width=2, base_channels=4, num_classes=10, stem="cifar")
        >>> subnet = Subnet(parent, start=0, shift=1).eval()
        >>> x = torch.randn(3, 3, 8, 8)
        >>> torch.allclose(subnet(x), subnet.extract()(x), atol=1e-5)
        True

    Args:
        parent: The wide network. It is not registered; its convs are.
        start: The group behind the stem, 0 to k-1.
        shift: By how many groups every conv moves the subnet, 0 to k-1.
        activation: A factory of modules, as in `ResNet`.
        construction: How the shared weights are computed with.

    Shape:
        (N, image_channels, H, W) to (N, num_classes).

    Raises:
        ValueError: If ``start`` or ``shift`` is outside of 0 to k-1, or ``construction`` is
            unknown.
    """

    def __init__(
        self,
        parent: ParentResNet,
        *,
        start: int,
        shift: int,
        activation: Callable[[], nn.Module] = nn.ReLU,
        construction: ConstructionName = "sum_of_subnets",
    ) -> None:
        super().__init__()
        width = parent.width
        shapes = [block.shape for layer in parent.residuals for block in layer]
        self.route = subnet_route(shapes, start=start, shift=shift, width=width)
        self.start = start
        self.shift = shift
        self.depth = parent.depth
        self.num_classes = parent.num_classes
        self.stem = parent.stem
        self.width = width
        self.base_channels = parent.base_channels
        self.image_channels = parent.image_channels
        self.construction = known_construction(construction)

        self.conv1 = parent.conv1
        self.bn1 = nn.BatchNorm2d(parent.bn1.num_features // width)
        self.activation = activation()
        self.maxpool = copy.deepcopy(parent.maxpool)
        routes = iter(self.route.residuals)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            Layer(
                *(
                    SubnetResidualBlock(
                        block,
                        next(routes),
                        width=width,
                        activation=activation,
                        construction=construction,
                    )
                    for block in layer
                )
            )
            for layer in parent.residuals
        )
        self.avgpool = copy.deepcopy(parent.avgpool)
        self.fc = nn.Linear(parent.fc.in_features // width, parent.num_classes)
        # The convs are there already; what is own follows them.
        self.to(device=self.conv1.weight.device, dtype=self.conv1.weight.dtype)

    @property
    def blocks(self) -> dict[str, Block]:
        """The block (i, j) that the subnet visits in every conv, by the conv's name."""
        blocks = {"conv1": self.route.stem}
        for name, module in self.named_modules():
            if isinstance(module, SubnetResidualBlock):
                blocks.update({f"{name}.{conv}": block for conv, block in module.blocks()})
        return blocks

    def forward(self, x: Tensor, steps: Construction | None = None) -> Tensor:
        """Computes the logits.

        Args:
            x: (N, image_channels, H, W).
            steps: What this step shares with other members; None where it shares nothing.
        """
        steps = steps or make_construction(self.construction)
        own = (self.bn1, self.activation, self.maxpool)
        x = steps.stem(x, self.conv1, self.start, self.width, *own)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x, steps)
        x = steps.leave(x, self.route.head, self.width)
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits

    def extract(self) -> ResNet:
        """Copies the subnet into an ordinary `ResNet`, which shares nothing with the parent.

        The conv weights are copies of the route's blocks; BatchNorms with their statistics,
        activations and the classifier are copied whole, with their modes. Nothing is drawn from
        the random number generators.

        Example:
            >>> parent = ParentResNet(18, width=2, base_channels=4)
            >>> narrow = Subnet(parent, start=1, shift=0).extract()
            >>> torch.equal(narrow.conv1.weight, parent.conv1.weight[4:])
            True

        Returns:
            The narrow network, on the subnet's device and in its dtype.
        """
        # On meta: every tensor is replaced, so neither memory nor random numbers are needed.
        with torch.device("meta"):
            narrow = ResNet(
                self.depth,
                num_classes=self.num_classes,
                stem=self.stem,
                base_channels=self.base_channels,
                image_channels=self.image_channels,
            )
        _copy_into(narrow, self, self.blocks, prefix="", memo={})
        return narrow


class SubnetResNet(nn.Module):
    """A parent of width k with its k*k subnets.

    Example:
        >>> network = SubnetResNet(18, width=2, base_channels=4, num_classes=10, stem="cifar")
        >>> outputs = network(torch.randn(3, 3, 8, 8))
        >>> list(outputs)
        ['parent', 'subnet_0_0', 'subnet_0_1', 'subnet_1_0', 'subnet_1_1']
        >>> outputs["subnet_1_0"].shape
        torch.Size([3, 10])
        >>> list(network(torch.randn(3, 3, 8, 8), members=["subnet_0_1"]))
        ['subnet_0_1']

    Args:
        depth: 18, 34 or 50.
        num_classes: Number of logits.
        stem: As in `ResNet`.
        width: The parent's width k.
        base_channels: Channels of a subnet behind the stem.
        image_channels: Channels of the images.
        activation: A factory of modules; parent and subnets each call it for their own.
        construction: How the shared weights are computed with. Parameters and state dict do not
            depend on it.

    Shape:
        (N, image_channels, H, W) to a dict of (N, num_classes).

    Attributes:
        parent: The `ParentResNet`.
        subnets: The k*k `Subnet`, by their names.

    Raises:
        ValueError: As `ResNet` does; if ``construction`` is unknown; in the call, if ``members``
            is empty or names a member that there is not.
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int = 1000,
        stem: Stem = "imagenet",
        width: int = 2,
        base_channels: int = 64,
        image_channels: int = 3,
        activation: Callable[[], nn.Module] = nn.ReLU,
        construction: ConstructionName = "sum_of_subnets",
    ) -> None:
        super().__init__()
        # Before the parent is built, which takes seconds at full size.
        self.construction = known_construction(construction)
        # The parent comes first: the same seed gives it the weights of an ordinary ResNet of its
        # width.
        self.parent = ParentResNet(
            depth,
            num_classes=num_classes,
            stem=stem,
            width=width,
            base_channels=base_channels,
            image_channels=image_channels,
            activation=activation,
        )
        self.subnets = nn.ModuleDict(
            {
                subnet_name(start, shift): Subnet(
                    self.parent,
                    start=start,
                    shift=shift,
                    activation=activation,
                    construction=construction,
                )
                for start, shift in all_subnets(width)
            }
        )

    @property
    def member_names(self) -> tuple[str, ...]:
        """The names of the parent and of all subnets, in the order of the outputs."""
        return ("parent", *self.subnets.keys())

    def forward(self, x: Tensor, members: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Computes the logits of the members, and of those only.

        Args:
            x: (N, image_channels, H, W).
            members: Names to compute, in any order; None for all.

        Returns:
            The logits by name, in the order of `member_names`.

        Raises:
            ValueError: If ``members`` is empty, or names a member that there is not.
        """
        names = self._selected(members)
        subnets = {name: cast(Subnet, self.subnets[name]) for name in names if name != "parent"}
        steps = make_construction(self.construction)
        steps.share(
            x,
            self.parent,
            with_parent="parent" in names,
            subnets=[(subnet.start, subnet) for subnet in subnets.values()],
        )
        return {
            name: subnets[name](x, steps)
            if name in subnets
            else self.parent(x, steps.whole, steps.whole_stem)
            for name in names
        }

    def _selected(self, members: Iterable[str] | None) -> list[str]:
        known = self.member_names
        if members is None:
            return list(known)
        if isinstance(members, str):
            raise ValueError(f"members must be a list of names, got the string {members!r}")
        asked = list(members)
        if not asked:
            raise ValueError("members is empty: name at least one member, or pass None for all")
        unknown = [name for name in asked if name not in known]
        if unknown:
            raise ValueError(f"no members named {unknown}; there are {list(known)}")
        return [name for name in known if name in asked]


def subnet_resnet18(**options: Unpack[SubnetOptions]) -> SubnetResNet:
    """Makes a wide ResNet-18 with its subnets.

    Example:
        >>> network = subnet_resnet18(width=3, base_channels=4, num_classes=10, stem="cifar")
        >>> len(network.subnets)
        9

    Args:
        **options: The keyword arguments of `SubnetResNet`.

    Returns:
        The network, in training mode.
    """
    return SubnetResNet(18, **options)


def subnet_resnet34(**options: Unpack[SubnetOptions]) -> SubnetResNet:
    """Makes a wide ResNet-34 with its subnets.

    Example:
        >>> network = subnet_resnet34(base_channels=4, num_classes=10, stem="cifar")
        >>> network.member_names[:2]
        ('parent', 'subnet_0_0')

    Args:
        **options: The keyword arguments of `SubnetResNet`.

    Returns:
        The network, in training mode.
    """
    return SubnetResNet(34, **options)


def subnet_resnet50(**options: Unpack[SubnetOptions]) -> SubnetResNet:
    """Makes a wide ResNet-50 with its subnets.

    Example:
        >>> network = subnet_resnet50(base_channels=4, num_classes=10, stem="cifar")
        >>> network.subnets["subnet_0_1"].layer1[0].switcher
        ChannelSwitcher(width=2, shift=0)

    Args:
        **options: The keyword arguments of `SubnetResNet`.

    Returns:
        The network, in training mode.
    """
    return SubnetResNet(50, **options)


def _copy_into(
    narrow: nn.Module,
    subnet: nn.Module,
    blocks: dict[str, Block],
    *,
    prefix: str,
    memo: dict[int, Any],
) -> None:
    """Copies shared blocks and own modules; a module that holds shared convs is descended into."""
    narrow.training = subnet.training
    for name, child in subnet.named_children():
        path = prefix + name
        if isinstance(child, SubnetConv2d):
            block = child.subnets[blocks[path]].weight
            conv = narrow.get_submodule(name)
            conv.weight = nn.Parameter(block.detach().clone(), block.requires_grad)
        elif any(isinstance(module, SubnetConv2d) for module in child.modules()):
            _copy_into(narrow.get_submodule(name), child, blocks, prefix=f"{path}.", memo=memo)
        elif not isinstance(child, ChannelSwitcher):
            setattr(narrow, name, copy.deepcopy(child, memo))
