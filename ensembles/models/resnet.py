"""ResNet-18, 34 and 50 of any width, for CIFAR and ImageNet images.

The networks of He et al. 2015, "Deep Residual Learning for Image Recognition" (arXiv 1512.03385),
with the stride of a bottleneck in its 3x3 conv as torchvision has it. Parameters are named,
ordered and drawn as in torchvision, so that state dicts load either way and the outputs are equal
bit by bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypedDict, Unpack, cast

import torch
from torch import Tensor, nn

from ensembles.kernels import overruns_channels_last
from ensembles.models.convs import GuardedConv2d
from ensembles.models.routing import ResidualShape

__all__ = [
    "Layer",
    "ResNet",
    "ResNetOptions",
    "ResidualBlock",
    "Stem",
    "resnet18",
    "resnet34",
    "resnet50",
]

Stem: TypeAlias = Literal["imagenet", "cifar", "cifar_maxpool"]

Convolve: TypeAlias = Callable[[nn.Conv2d, Tensor], Tensor]
"""How a conv is computed: ``convolve(conv, x)``."""


@dataclass(frozen=True)
class _StemForm:
    kernel_size: int
    stride: int
    pooled: bool


_STEMS: dict[str, _StemForm] = {
    "imagenet": _StemForm(kernel_size=7, stride=2, pooled=True),
    "cifar": _StemForm(kernel_size=3, stride=1, pooled=False),
    "cifar_maxpool": _StemForm(kernel_size=3, stride=1, pooled=True),
}

# Table 1 of arXiv 1512.03385: residual blocks in each of the four layers, and convs in each of
# them.
_LAYERS: dict[int, tuple[tuple[int, int, int, int], int]] = {
    18: ((2, 2, 2, 2), 2),
    34: ((3, 4, 6, 3), 2),
    50: ((3, 4, 6, 3), 3),
}

# A bottleneck's last conv has four times the channels of the others (the same table).
_EXPANSION = {2: 1, 3: 4}


class ResNetOptions(TypedDict, total=False):
    """The keyword arguments of `resnet18`, `resnet34` and `resnet50`: those of `ResNet`."""

    num_classes: int
    stem: Stem
    width: int
    base_channels: int
    image_channels: int
    activation: Callable[[], nn.Module]


EnterStem: TypeAlias = Callable[..., Tensor]
"""Computes everything before the first layer: ``enter(x, conv, norm, activation, pool)``."""


def _called(conv: nn.Conv2d, x: Tensor) -> Tensor:
    y: Tensor = conv(x)
    return y


def in_turn(x: Tensor, *modules: nn.Module) -> Tensor:
    """Calls one module after the other."""
    for module in modules:
        x = module(x)
    return x


class Layer(nn.Sequential):
    """A `torch.nn.Sequential` that passes what it gets beside ``x`` on to every module.

    Example:
        >>> layer = Layer(nn.Bilinear(2, 3, 2), nn.Bilinear(2, 3, 4))
        >>> layer(torch.ones(1, 2), torch.ones(1, 3)).shape
        torch.Size([1, 4])

    Args:
        *modules: As in `torch.nn.Sequential`.
    """

    def forward(self, x: Tensor, *beside: Any) -> Tensor:
        """Computes the modules in turn."""
        for module in self:
            x = module(x, *beside)
        return x


class _Downsample(nn.Sequential):
    """The shortcut's conv and its BatchNorm."""

    def forward(self, x: Tensor, convolve: Convolve = _called) -> Tensor:
        conv, bn = self
        y: Tensor = bn(convolve(cast(nn.Conv2d, conv), x))
        return y


class ResidualBlock(nn.Module):
    """A residual block, basic (two convs) or bottleneck (three): act(main(x) + shortcut(x)).

    Every conv is followed by a BatchNorm, every BatchNorm but the last by the activation.

    Example:
        >>> block = ResidualBlock([nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2)])
        >>> [name for name, _ in block.named_children()]
        ['conv1', 'bn1', 'conv2', 'bn2', 'activation']

    Args:
        convs: The convs of the main path, registered as conv1, conv2, ...
        downsample: The conv of the shortcut, registered as downsample.0, or None for the identity.
        activation: A factory of modules, called once.

    Shape:
        (N, C, H, W) to (N, C', H', W').
    """

    def __init__(
        self,
        convs: Sequence[nn.Conv2d],
        *,
        downsample: nn.Conv2d | None = None,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.convs = len(convs)
        for number, conv in enumerate(convs, start=1):
            self.add_module(f"conv{number}", conv)
            self.add_module(f"bn{number}", nn.BatchNorm2d(conv.out_channels))
        self.activation = activation()
        self.downsample: _Downsample | None = None
        if downsample is not None:
            self.downsample = _Downsample(downsample, nn.BatchNorm2d(downsample.out_channels))

    @property
    def shape(self) -> ResidualShape:
        """The form of the block, as far as routes depend on it."""
        return ResidualShape(convs=self.convs, downsample=self.downsample is not None)

    @property
    def stages(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """The pairs (conv1, bn1), (conv2, bn2), ... of the main path."""
        numbers = range(1, self.convs + 1)
        return [
            (getattr(self, f"conv{number}"), getattr(self, f"bn{number}")) for number in numbers
        ]

    def forward(self, x: Tensor, convolve: Convolve = _called) -> Tensor:
        """Computes act(main(x) + shortcut(x)); ``convolve`` may compute convs in another way."""
        out = x
        for number, (conv, bn) in enumerate(self.stages):
            if number > 0:
                out = self.activation(out)
            out = bn(convolve(conv, out))
        shortcut = x if self.downsample is None else self.downsample(x, convolve)
        result: Tensor = self.activation(out + shortcut)
        return result


class ResNet(nn.Module):
    """A ResNet of ``width`` times the channels in EVERY layer, the stem included.

    torchvision's ``wide_resnet50_2`` widens only the inner 3x3 conv of each bottleneck, and so do
    the bottlenecks of Wide ResNets (Zagoruyko and Komodakis 2016, arXiv 1605.07146); its stem, its
    1x1 convs' outer channels and its classifier are of ordinary width. Here width k multiplies all
    channels by k, so that the parent holds k*k subnets of ordinary width: ``resnet50(width=2)`` is
    not ``wide_resnet50_2``.

    With the defaults it is torchvision's network: the same names, the same initial weights from
    the same seed, the same outputs bit by bit.

    Example:
        >>> network = ResNet(18, num_classes=10, stem="cifar", width=2, base_channels=4)
        >>> network(torch.randn(3, 3, 8, 8)).shape
        torch.Size([3, 10])
        >>> network.conv1.weight.shape
        torch.Size([8, 3, 3, 3])

    Args:
        depth: 18, 34 or 50.
        num_classes: Number of logits.
        stem: "imagenet": 7x7 conv of stride 2, max-pool; "cifar": 3x3 conv; "cifar_maxpool": 3x3
            conv, max-pool.
        width: The number k by which all channels are multiplied.
        base_channels: Channels behind the stem at width 1; 64 in the paper.
        image_channels: Channels of the images.
        activation: A factory of modules, called once for the stem and once for every residual
            block.

    Shape:
        (N, image_channels, H, W) to (N, num_classes).

    Raises:
        ValueError: If ``depth`` or ``stem`` is unknown, or a number is less than 1.
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int = 1000,
        stem: Stem = "imagenet",
        width: int = 1,
        base_channels: int = 64,
        image_channels: int = 3,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        if depth not in _LAYERS:
            raise ValueError(f"depth must be one of {sorted(_LAYERS)}, got {depth}")
        if stem not in _STEMS:
            raise ValueError(f"stem must be one of {sorted(_STEMS)}, got {stem!r}")
        for name, number in (
            ("num_classes", num_classes),
            ("width", width),
            ("base_channels", base_channels),
            ("image_channels", image_channels),
        ):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        self.depth = depth
        self.num_classes = num_classes
        self.stem = stem
        self.width = width
        self.base_channels = base_channels
        self.image_channels = image_channels

        form = _STEMS[stem]
        counts, convs = _LAYERS[depth]
        channels = base_channels * width
        self.conv1 = self._conv(
            image_channels, channels, form.kernel_size, stride=form.stride, is_stem=True
        )
        self.bn1 = nn.BatchNorm2d(channels)
        self.activation = activation()
        self.maxpool = (
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1) if form.pooled else nn.Identity()
        )
        layers = []
        into = channels
        for index, count in enumerate(counts):
            inner = channels * 2**index
            out = inner * _EXPANSION[convs]
            residuals = []
            for number in range(count):
                stride = 2 if index > 0 and number == 0 else 1
                residuals.append(self._residual(into, inner, out, stride, convs, activation))
                into = out
            layers.append(Layer(*residuals))
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(into, num_classes)
        self._reset_convs()

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The four layers of residual blocks, in their order."""
        return (self.layer1, self.layer2, self.layer3, self.layer4)

    @property
    def residuals(self) -> tuple[tuple[ResidualBlock, ...], ...]:
        """The residual blocks, layer by layer."""
        return tuple(tuple(cast(ResidualBlock, block) for block in layer) for layer in self.layers)

    def forward(
        self, x: Tensor, convolve: Convolve = _called, enter: EnterStem = in_turn
    ) -> Tensor:
        """Computes the logits.

        Args:
            x: (N, image_channels, H, W).
            convolve: May compute convs behind the stem in another way.
            enter: May compute everything before the first layer in another way.
        """
        x = enter(x, self.conv1, self.bn1, self.activation, self.maxpool)
        for layer in self.layers:
            x = layer(x, convolve)
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits

    def _conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        is_stem: bool = False,
    ) -> nn.Conv2d:
        """Makes one conv; what has another kind of conv overrides this."""
        # Only where it matters: tools of others ask for the very type of a layer.
        overruns = overruns_channels_last(in_channels, (kernel_size,), (stride,))
        return (GuardedConv2d if overruns else nn.Conv2d)(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            bias=False,
        )

    def _residual(
        self,
        into: int,
        inner: int,
        out: int,
        stride: int,
        convs: int,
        activation: Callable[[], nn.Module],
    ) -> ResidualBlock:
        # The downsample conv comes first because torchvision draws it first: the same seed gives
        # the same weights.
        downsample = None
        if stride != 1 or into != out:
            downsample = self._conv(into, out, 1, stride=stride)
        if convs == 2:
            main = [self._conv(into, inner, 3, stride=stride), self._conv(inner, out, 3)]
        else:
            main = [
                self._conv(into, inner, 1),
                self._conv(inner, inner, 3, stride=stride),
                self._conv(inner, out, 1),
            ]
        return ResidualBlock(main, downsample=downsample, activation=activation)

    def _reset_convs(self) -> None:
        # As torchvision draws them; BatchNorm starts from ones and zeros by itself.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def resnet18(**options: Unpack[ResNetOptions]) -> ResNet:
    """Makes a ResNet-18 of basic blocks.

    Example:
        >>> network = resnet18(num_classes=10, stem="cifar")
        >>> sum(parameter.numel() for parameter in network.parameters())
        11173962

    Args:
        **options: The keyword arguments of `ResNet`.

    Returns:
        The network, in training mode.
    """
    return ResNet(18, **options)


def resnet34(**options: Unpack[ResNetOptions]) -> ResNet:
    """Makes a ResNet-34 of basic blocks.

    Example:
        >>> network = resnet34(num_classes=10, stem="cifar", base_channels=4)
        >>> [len(layer) for layer in network.layers]
        [3, 4, 6, 3]

    Args:
        **options: The keyword arguments of `ResNet`.

    Returns:
        The network, in training mode.
    """
    return ResNet(34, **options)


def resnet50(**options: Unpack[ResNetOptions]) -> ResNet:
    """Makes a ResNet-50 of bottlenecks.

    Example:
        >>> network = resnet50(num_classes=10, stem="cifar", base_channels=4)
        >>> network.layer1[0].shape
        ResidualShape(convs=3, downsample=True)

    Args:
        **options: The keyword arguments of `ResNet`.

    Returns:
        The network, in training mode.
    """
    return ResNet(50, **options)
