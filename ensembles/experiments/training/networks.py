"""Networks with named members: what is trained and evaluated, built from options and a seed.

Every network returns its logits by member name and computes only the members that it is asked
for. What belongs to member i, its initial weights first of all, is a function of the seed and of i
alone: a member that is trained alone starts as it does in its ensemble.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Protocol, TypeAlias, cast, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from ensembles.experiments.data.draws import words
from ensembles.models.constructions import ConstructionName
from ensembles.models.heads import GroupedLinear
from ensembles.models.members import Ensemble, NStreams
from ensembles.models.resnet import ResNet, ResNetOptions, Stem
from ensembles.models.subnets import SubnetResNet

__all__ = [
    "Kind",
    "MeanFieldNetwork",
    "NamedEnsemble",
    "NamedStreams",
    "Network",
    "NetworkOptions",
    "SingleNetwork",
    "batch_names",
    "build_network",
    "member_module",
    "member_seed",
]

Kind: TypeAlias = Literal["single", "ensemble", "streams", "subnets", "mean_field"]

_COUNTED = ("ensemble", "streams", "mean_field")
"""The kinds of network whose number of members is chosen."""


@runtime_checkable
class Network(Protocol):
    """A `torch.nn.Module` whose members have names.

    Example:
        >>> options = NetworkOptions(kind="ensemble", members=2, base_channels=4)
        >>> isinstance(build_network(options), Network), isinstance(nn.Linear(2, 2), Network)
        (True, False)
    """

    @property
    def member_names(self) -> tuple[str, ...]:
        """The names of all members, in the order of the logits."""

    def __call__(self, x: Tensor, members: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Computes the logits (sample, class) of the members, and of those only; None is all."""


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """Which network is built.

    These plain values are stored in results and checkpoints.

    Args:
        kind: "single" is one ResNet. "ensemble" has independent ResNets. "streams" is one ResNet
            that is run several times, which is not an ensemble. "subnets" is a wide ResNet with its
            width*width subnets. "mean_field" is one wide ResNet whose features are in groups; each
            group has its slice of the head.
        depth: 18, 34 or 50.
        width: The number by which all channels are multiplied; for "subnets", those of the parent.
        members: How many members "ensemble" has, how many streams "streams" has, or how many groups
            "mean_field" has.
        first_member: The number of the first member. Seeds and batches depend on a member's number.
            So the kind "single" with first_member 2 trains member 2 of an ensemble alone.
        base_channels: Channels behind the stem at width 1; 64 in the paper.
        stem: "imagenet" is a 7x7 conv of stride 2 and a max-pool, "cifar" is a 3x3 conv, and
            "cifar_maxpool" is a 3x3 conv and a max-pool.
        classes: Number of classes.
        image_channels: Channels of the images.
        dropout: Probability of dropout behind every activation; 0 for none.
        construction: How "subnets" are computed. "sum_of_subnets" computes no zeros.
            "zero_padded" computes every subnet at the parent's width with masked weights; it is the
            slow reference.

    Raises:
        ValueError: If a value is out of range, or has no meaning for this kind.

    Example:
        >>> options = NetworkOptions(kind="ensemble", members=3, depth=34)
        >>> NetworkOptions.from_dict(options.to_dict()) == options
        True
        >>> NetworkOptions(kind="single", members=3)
        Traceback (most recent call last):
        ...
        ValueError: members=3 has no meaning for kind 'single': leave it at 1, or choose kind ...
    """

    kind: Kind = "single"
    depth: int = 18
    width: int = 1
    members: int = 1
    first_member: int = 0
    base_channels: int = 64
    stem: Stem = "cifar"
    classes: int = 10
    image_channels: int = 3
    dropout: float = 0.0
    construction: ConstructionName = "sum_of_subnets"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {list(get_args(Kind))}, got {self.kind!r}")
        if self.members < 1:
            raise ValueError(f"members must be at least 1, got {self.members}")
        if self.kind not in _COUNTED and self.members != 1:
            raise ValueError(
                f"members={self.members} has no meaning for kind {self.kind!r}: leave it at 1, or "
                f"choose kind {' or '.join(_COUNTED)}"
            )
        if self.kind == "subnets" and self.width < 2:
            raise ValueError(
                f"width={self.width} leaves no subnets beside the parent: kind 'subnets' needs a "
                "width of at least 2"
            )
        if self.first_member < 0:
            raise ValueError(f"first_member must be at least 0, got {self.first_member}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be a probability below 1, got {self.dropout}")

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values by name."""
        return asdict(self)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "NetworkOptions":
        """The options from plain values by name.

        Raises:
            ValueError: If a name is unknown, or a value is refused.
        """
        unknown = sorted(set(options) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(
                f"unknown network option {', '.join(unknown)}: it was written by another version"
            )
        return cls(**options)


class SingleNetwork(nn.Module):
    """One network as the only member, "single".

    Example:
        >>> list(SingleNetwork(nn.Linear(4, 2))(torch.ones(3, 4)))
        ['single']

    Args:
        network: From (N, ...) to (N, class).
        number: Which member of an ensemble it is, where it is one that is trained alone.
    """

    member_names = ("single",)

    def __init__(self, network: nn.Module, *, number: int = 0) -> None:
        super().__init__()
        self.network = network
        self.number = number

    def forward(self, x: Tensor, members: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Computes the logits by member name."""
        return {name: self.network(x) for name in _asked(self.member_names, members)}


class NamedEnsemble(Ensemble):
    """An `Ensemble` with names, which computes only the members that it is asked for.

    Example:
        >>> ensemble = NamedEnsemble([nn.Linear(4, 2), nn.Linear(4, 2)])
        >>> list(ensemble(torch.ones(3, 4))), list(ensemble(torch.ones(3, 4), ["member_1"]))
        (['member_0', 'member_1'], ['member_1'])

    Args:
        members: As in `Ensemble`.
        first_member: The number of the first, which names count from.
    """

    def __init__(self, members: Iterable[nn.Module], *, first_member: int = 0) -> None:
        super().__init__(members)
        self.first_member = first_member

    @property
    def member_names(self) -> tuple[str, ...]:
        """member_0, member_1, ..."""
        return _numbered("member", len(self.members), self.first_member)

    # An Ensemble returns a list: this one is called by name, by what knows that it has names.
    def forward(  # type: ignore[override]
        self, x: Tensor, members: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """Computes the logits by member name."""
        modules = dict(zip(self.member_names, self.members, strict=True))
        return {name: modules[name](x) for name in _asked(self.member_names, members)}


class NamedStreams(NStreams):
    """`NStreams` with names: the streams are called members, as in the accident.

    Example:
        >>> streams = NamedStreams(nn.Linear(4, 2), 3)
        >>> streams.member_names, len(list(streams.parameters()))
        (('member_0', 'member_1', 'member_2'), 2)

    Args:
        network: The one network.
        streams: How often the input goes through it.
    """

    @property
    def member_names(self) -> tuple[str, ...]:
        """member_0, member_1, ..."""
        return _numbered("member", self.streams)

    def forward(  # type: ignore[override]
        self, x: Tensor, members: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """Computes the logits by member name, every one anew."""
        return {name: self.network(x) for name in _asked(self.member_names, members)}


class MeanFieldNetwork(nn.Module):
    """One network whose head reads the features in groups: every group is a member.

    Example:
        >>> network = MeanFieldNetwork(ResNet(18, stem="cifar", base_channels=4), groups=4)
        >>> {name: tuple(z.shape) for name, z in network(torch.randn(2, 3, 8, 8)).items()}
        {'group_0': (2, 1000), 'group_1': (2, 1000), 'group_2': (2, 1000), 'group_3': (2, 1000)}

    Args:
        network: Its classifier is replaced by a `GroupedLinear` head.
        groups: Number of groups M, which divides the number of features.

    Raises:
        ValueError: If the features cannot be divided into so many groups.
    """

    def __init__(self, network: ResNet, groups: int) -> None:
        super().__init__()
        self.network = network
        self.groups = groups
        # The head takes the classifier's place, and its name in the state dict.
        head = GroupedLinear(network.fc.in_features, network.fc.out_features, groups)
        network.fc = cast(nn.Linear, head)

    @property
    def member_names(self) -> tuple[str, ...]:
        """group_0, group_1, ..."""
        return _numbered("group", self.groups)

    def forward(self, x: Tensor, members: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Computes the logits by group; the features are computed once."""
        logits = dict(zip(self.member_names, self.network(x).unbind(1), strict=True))
        return {name: logits[name] for name in _asked(self.member_names, members)}


def build_network(options: NetworkOptions, *, seed: int = 0) -> Network:
    """Builds a network from a seed; the global random generators are neither read nor moved.

    Member i is drawn from `member_seed(seed, i)`. What is one network (single, streams, subnets,
    mean_field) is drawn as member `first_member`; of "subnets", the parent then starts as a ResNet
    of its width.

    Example:
        >>> four = build_network(NetworkOptions(kind="ensemble", members=4, base_channels=4))
        >>> third = build_network(NetworkOptions(first_member=2, base_channels=4))
        >>> torch.equal(four.members[2].conv1.weight, third.network.conv1.weight)
        True

    Args:
        options: What to build.
        seed: The seed of the run.

    Returns:
        The network, on the CPU and in training mode.
    """
    arguments: ResNetOptions = {
        "num_classes": options.classes,
        "stem": options.stem,
        "width": options.width,
        "base_channels": options.base_channels,
        "image_channels": options.image_channels,
        "activation": _Activation(options.dropout),
    }

    def one() -> ResNet:
        return ResNet(options.depth, **arguments)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(member_seed(seed, options.first_member))
        if options.kind == "subnets":
            return SubnetResNet(options.depth, construction=options.construction, **arguments)
        if options.kind == "streams":
            return NamedStreams(one(), options.members)
        if options.kind == "mean_field":
            return MeanFieldNetwork(one(), options.members)
        if options.kind == "single":
            return SingleNetwork(one(), number=options.first_member)
        members = []
        for number in range(options.members):
            torch.manual_seed(member_seed(seed, options.first_member + number))
            members.append(one())
        return NamedEnsemble(members, first_member=options.first_member)


def member_seed(seed: int, member: int) -> int:
    """The seed of what belongs to one member, a function of the run's seed and its number.

    Member 1 of seed 0 has nothing to do with member 0 of seed 1.

    Example:
        >>> len({member_seed(seed, member) for seed in range(3) for member in range(3)})
        9

    Args:
        seed: The run's seed.
        member: The number of the member.

    Returns:
        A number from 0 to below 2**63.
    """
    return int(words(1, "initial weights", seed, member)[0]) >> 1


def batch_names(network: Network) -> tuple[str, ...]:
    """The names under which members have their own batches: what is drawn follows the name.

    A single network sees what the member of its number sees.

    Example:
        >>> batch_names(build_network(NetworkOptions(first_member=2, base_channels=4)))
        ('member_2',)

    Args:
        network: The network.

    Returns:
        A name for each member, in the order of `member_names`.
    """
    if isinstance(network, SingleNetwork):
        return _numbered("member", 1, network.number)
    return network.member_names


def member_module(network: Network, name: str) -> nn.Module:
    """A member as an ordinary network of its own: from (N, ...) to (N, class).

    A subnet is extracted (see `ensembles.models.Subnet.extract`) and shares nothing with
    ``network``; any other member is the module itself.

    Example:
        >>> network = build_network(NetworkOptions(kind="subnets", width=2, base_channels=4))
        >>> sum(p.numel() for p in member_module(network, "subnet_0_1").parameters())
        44622
        >>> type(member_module(network, "parent")).__name__
        'ParentResNet'

    Args:
        network: The network.
        name: The member's name.

    Returns:
        The module.

    Raises:
        ValueError: If there is no such member, or it is a group of one network's features.
    """
    _asked(network.member_names, [name])
    if isinstance(network, SubnetResNet):
        return network.parent if name == "parent" else network.subnets[name].extract()  # type: ignore[operator]
    if isinstance(network, NamedEnsemble):
        return network.members[network.member_names.index(name)]
    if isinstance(network, (SingleNetwork, NamedStreams)):
        return network.network
    raise ValueError(
        f"member {name} is no network of its own: it shares all features with the other members of "
        f"a {type(network).__name__}. Take the whole network."
    )


class _Activation:
    """A factory of activations: ReLU, with dropout behind it where there is any."""

    def __init__(self, dropout: float) -> None:
        self.dropout = dropout

    def __call__(self) -> nn.Module:
        return nn.Sequential(nn.ReLU(), nn.Dropout(self.dropout)) if self.dropout else nn.ReLU()


def _numbered(word: str, count: int, first: int = 0) -> tuple[str, ...]:
    return tuple(f"{word}_{number}" for number in range(first, first + count))


def _asked(names: Sequence[str], members: Iterable[str] | None) -> list[str]:
    """The names that were asked for, in the order of the members."""
    if members is None:
        return list(names)
    if isinstance(members, str):
        raise ValueError(f"members must be a list of names, got the string {members!r}")
    asked = set(members)
    unknown = sorted(asked - set(names))
    if unknown or not asked:
        raise ValueError(f"members must be some of {list(names)}, got {unknown}")
    return [name for name in names if name in asked]
