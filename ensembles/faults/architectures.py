"""Three small architectures that every fault is planted into: MLP, conv net and attention.

Each comes in three forms: `network`, one member by itself; `Packed`, several members side by side
in the channels of grouped layers; and `Subnets`, a wide parent whose subnets share its weights.
Channels are axis 1 in all of them, so that a fault is written once. All weights are drawn anew at
each call, and a forward and backward pass takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Attention",
    "Ensemble",
    "Network",
    "Packed",
    "Subnets",
    "loss_of_members",
    "sgd",
]

WIDTH = 4
INPUTS = 3
CLASSES = 3
LAYERS = 2
"""Blocks of a network where nothing else is said; the place of a defect is one of them."""


@dataclass(frozen=True)
class Architecture:
    """One of the three architectures, by name.

    Attributes:
        name: "mlp", "convnet" or "attention".
        shape: The shape of a sample.
        convolution: The layer that maps channels to channels at every position.
        kernel: Its kernel size.
        layers: How many blocks a network has.

    Example:
        >>> network = ARCHITECTURES["convnet"].network()
        >>> network(ARCHITECTURES["convnet"].batch()).shape
        torch.Size([4, 3])
    """

    name: str
    shape: tuple[int, ...]
    convolution: type[nn.Conv1d] | type[nn.Conv2d] = field(repr=False)
    kernel: int = 1
    layers: int = LAYERS

    def batch(self) -> Tensor:
        """Four random samples."""
        return torch.randn(4, *self.shape)

    def conv(
        self, inputs: int, outputs: int, *, groups: int = 1, bias: bool = False
    ) -> nn.Conv1d | nn.Conv2d:
        """A layer that keeps the number of positions."""
        return self.convolution(
            inputs, outputs, self.kernel, padding=self.kernel // 2, groups=groups, bias=bias
        )

    def network(self, width: int = WIDTH) -> Network:
        """One classifier."""
        return Network(
            self.stem(width),
            [self.block(width, layer) for layer in range(self.layers)],
            nn.Linear(width, CLASSES),
        )

    def stem(self, width: int = WIDTH) -> nn.Module:
        """The first layer of a classifier."""
        if self.name == "attention":
            return Embedding(self.shape[-1], width)
        return nn.Sequential(self.conv(INPUTS, width, bias=True), *self.normalised(width))

    def block(self, width: int = WIDTH, layer: int = 0) -> nn.Module:
        """One block; every second residual block of the conv net has a downsample."""
        if self.name == "attention":
            return Attention(width)
        if self.name == "convnet":
            return Residual(self, width, 1 + layer % 2)
        return nn.Sequential(self.conv(width, width, bias=True), nn.GELU())

    def normalised(self, width: int) -> list[nn.Module]:
        """The activation, behind a norm in the conv net."""
        # With few units and no norm, whole networks would sometimes start dead if this were ReLU.
        return [nn.BatchNorm2d(width), nn.ReLU()] if self.name == "convnet" else [nn.GELU()]


class Network(nn.Module):
    """Stem, blocks, the mean over positions, and a linear head.

    Example:
        >>> network = ARCHITECTURES["mlp"].network()
        >>> network.features(ARCHITECTURES["mlp"].batch()).shape
        torch.Size([4, 4])
    """

    def __init__(self, stem: nn.Module, blocks: Sequence[nn.Module], head: nn.Linear) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.ModuleList(blocks), head

    def features(self, x: Tensor) -> Tensor:
        """What the head reads."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x.flatten(2).mean(-1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (sample, class)."""
        logits: Tensor = self.head(self.features(x))
        return logits


class Embedding(nn.Module):
    """Linear embedding of tokens with learned positions."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Conv1d(INPUTS, width, 1)
        self.positions = nn.Parameter(0.1 * torch.randn(width, tokens))

    def forward(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.tokens(x)
        return embedded + self.positions


class Residual(nn.Module):
    """A basic residual block, with a downsample where the stride is not 1."""

    def __init__(self, architecture: Architecture, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = architecture.conv(width, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = architecture.conv(width, width), nn.BatchNorm2d(width)
        self.conv1.stride = (stride, stride)
        self.downsample = (
            nn.Sequential(nn.Conv2d(width, width, 1, stride, bias=False), nn.BatchNorm2d(width))
            if stride > 1
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.downsample(x))


class Attention(nn.Module):
    """A transformer block over (sample, channel, token), in `groups` groups of two heads each.

    Example:
        >>> Attention(4)(torch.randn(2, 4, 5)).shape
        torch.Size([2, 4, 5])
    """

    def __init__(self, width: int, groups: int = 1) -> None:
        super().__init__()
        self.heads = 2 * groups
        self.norm1, self.norm2 = nn.GroupNorm(groups, width), nn.GroupNorm(groups, width)
        self.query, self.key, self.value, self.mix = (
            nn.Conv1d(width, width, 1, groups=groups) for _ in range(4)
        )
        self.widen = nn.Conv1d(width, 2 * width, 1, groups=groups)
        self.narrow = nn.Conv1d(2 * width, width, 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape, (sample, channel, token)."""
        normal = self.norm1(x)
        query, key, value = (
            layer(normal).unflatten(1, (self.heads, -1)).transpose(2, 3)
            for layer in (self.query, self.key, self.value)
        )
        seen = F.scaled_dot_product_attention(query, key, value).transpose(2, 3).flatten(1, 2)
        x = x + self.mix(seen)
        y: Tensor = x + self.narrow(F.gelu(self.widen(self.norm2(x))))
        return y


class Ensemble(nn.Module):
    """Members in one module, called on the same batch.

    Example:
        >>> ensemble = Ensemble([nn.Linear(4, 2), nn.Linear(4, 2)])
        >>> [tuple(y.shape) for y in ensemble(torch.randn(3, 4))]
        [(3, 2), (3, 2)]
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members: Any = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Any:
        """What every member returns."""
        return [member(x) for member in self.members]


class Packed(nn.Module):
    """Several members side by side in the channels of grouped layers.

    `between[i]` stands behind block i, and does nothing in a healthy network.

    Example:
        >>> packed = Packed(ARCHITECTURES["mlp"], members=2)
        >>> [tuple(y.shape) for y in packed(ARCHITECTURES["mlp"].batch())]
        [(4, 3), (4, 3)]
    """

    def __init__(self, architecture: Architecture, members: int) -> None:
        super().__init__()
        self.architecture, self.members = architecture, members
        wide = members * WIDTH
        self.stem = architecture.conv(members * INPUTS, wide, groups=members)
        self.blocks = nn.ModuleList([self._block(wide) for _ in range(architecture.layers)])
        self.between = nn.ModuleList([nn.Identity() for _ in range(architecture.layers)])
        self.head = architecture.convolution(wide, members * CLASSES, 1, groups=members)

    def _block(self, wide: int) -> nn.Module:
        if self.architecture.name == "attention":
            return Attention(wide, groups=self.members)
        conv = self.architecture.conv(wide, wide, groups=self.members)
        return nn.Sequential(conv, *self.architecture.normalised(wide))

    def forward(self, x: Tensor) -> Any:
        """Logits of every member."""
        x = self.stem(torch.cat([x] * self.members, 1))
        for block, between in zip(self.blocks, self.between, strict=True):
            x = between(block(x))
        return self.head(x).flatten(2).mean(-1).chunk(self.members, 1)


GROUPS = 2
"""Channel groups of the parent, k: it has k * k subnets."""


@dataclass
class Step:
    """What a subnet does in one layer: the block that it reads, and how far its shortcut moves."""

    into: int
    source: int
    switch: int


class Subnets(nn.Module):
    """A parent and its subnets in the zero-padded construction.

    Subnet (start, shift) begins in group `start`, and every layer moves it by `shift` groups.

    Attributes:
        steps: For each subnet, what it does in each layer.

    Example:
        >>> outputs = Subnets(ARCHITECTURES["mlp"])(ARCHITECTURES["mlp"].batch())
        >>> list(outputs)
        ['parent', 'subnet_0_0', 'subnet_0_1', 'subnet_1_0', 'subnet_1_1']
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        wide = GROUPS * WIDTH
        self.stem = architecture.conv(INPUTS, wide)
        depth = range(architecture.layers)
        self.blocks: Any = nn.ModuleList([architecture.conv(wide, wide) for _ in depth])
        self.starts: dict[str, int] = {}
        self.steps: dict[str, list[Step]] = {}
        for start, shift in product(range(GROUPS), repeat=2):
            name = f"subnet_{start}_{shift}"
            self.starts[name] = start
            groups = [(start + shift * layer) % GROUPS for layer in range(len(depth) + 1)]
            self.steps[name] = [Step(into, source, shift) for source, into in pairwise(groups)]
        names = ("parent", *self.steps)
        self.stems = nn.ModuleDict(dict.fromkeys(names, self.stem))
        self.norms: Any = nn.ModuleDict({name: self._norms(wide) for name in names})
        self.heads = nn.ModuleDict({name: nn.Linear(wide, CLASSES) for name in names})

    def _norms(self, wide: int) -> nn.ModuleList:
        norm = nn.BatchNorm2d if self.architecture.name == "convnet" else nn.Identity
        return nn.ModuleList([norm(wide) for _ in range(self.architecture.layers)])

    def only(self, x: Tensor, group: int, axis: int = 1) -> Tensor:
        """Zeros outside one channel group."""
        mask = x.new_zeros(GROUPS).index_fill(0, torch.tensor(group), 1.0)
        sides = [1] * x.ndim
        sides[axis] = x.shape[axis]
        return x * mask.repeat_interleave(x.shape[axis] // GROUPS).view(sides)

    def weight(self, name: str, layer: int) -> Tensor:
        """The weight that a member computes with in one layer."""
        weight: Tensor = self.blocks[layer].weight
        if name == "parent":
            return weight
        step = self.steps[name][layer]
        return self.only(self.only(weight, step.into, 0), step.source, 1)

    def switched(self, x: Tensor, shift: int) -> Tensor:
        """Channel groups moved by `shift`."""
        return x.roll(shift * WIDTH, 1) if shift else x

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits of the parent and of every subnet."""
        return {name: self._member(name, x) for name in ("parent", *self.steps)}

    def _member(self, name: str, x: Tensor) -> Tensor:
        x = self.stems[name](x)
        if name != "parent":
            x = self.only(x, self.starts[name])
        for layer, (block, norm) in enumerate(zip(self.blocks, self.norms[name], strict=True)):
            y = norm(block._conv_forward(self._seen(x), self.weight(name, layer), None))
            if name != "parent":
                step = self.steps[name][layer]
                y, x = self.only(y, step.into), self.switched(x, step.switch)
            x = F.gelu(x + y)
        logits: Tensor = self.heads[name](x.flatten(2).mean(-1))
        return logits

    def _seen(self, x: Tensor) -> Tensor:
        """Attention without weights: every token is a mean of those that are like it."""
        if self.architecture.name != "attention":
            return x
        return x @ F.softmax(x.transpose(1, 2) @ x, -1).transpose(1, 2)


def sgd(model: nn.Module | Sequence[nn.Module]) -> torch.optim.Optimizer:
    """The optimizer of every subject here. It gets all parameters, each once.

    Example:
        >>> len(sgd([nn.Linear(2, 2), nn.Linear(2, 2)]).param_groups[0]["params"])
        4
    """
    whole = model if isinstance(model, nn.Module) else nn.ModuleList(model)
    return torch.optim.SGD(whole.parameters(), lr=0.1)


def loss_of_members(outputs: Mapping[str, Tensor]) -> Tensor:
    """The sum of the members' own losses, for the labels 0, 1, 2, 0, ...

    Example:
        >>> loss_of_members({"0": torch.zeros(4, 3), "1": torch.zeros(4, 3)})
        tensor(2.1972)
    """
    return torch.stack([cross_entropy(y) for y in outputs.values()]).sum()


def cross_entropy(logits: Tensor) -> Tensor:
    """The mean loss for the labels 0, 1, 2, 0, ...

    Example:
        >>> cross_entropy(torch.zeros(4, 3))
        tensor(1.0986)
    """
    return F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1])


ARCHITECTURES: Mapping[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture("mlp", (INPUTS, 1), nn.Conv1d),
        Architecture("convnet", (INPUTS, 6, 6), nn.Conv2d, kernel=3),
        Architecture("attention", (INPUTS, 5), nn.Conv1d),
    )
}
