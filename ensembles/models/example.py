"""The example subject of the suite: the wide ResNet-18 with its four subnets."""

import torch

from ensembles.models.subnets import SubnetResNet, subnet_resnet18
from ensembles.subject import Partition, Subject

SHARED = ("conv1.weight", "layer*.conv?.weight", "layer*.downsample.0.weight")
"""Every conv weight is the parent's; BatchNorms and the classifier are each member's own."""


def wide_resnet18_with_subnets(*, width: int = 2, base_channels: int = 64) -> Subject:
    """The parent of `width` and all its subnets, with everything that they claim.

    Args:
        width: How many times as wide as a subnet the parent is, k.
        base_channels: Channels of a subnet's first stage; 64 is ResNet-18.

    Returns:
        The subject; the model is new at each call of `make`.

    Example:
        >>> subject = wide_resnet18_with_subnets(base_channels=8)
        >>> subject.name, sorted(subject.claims)
        ('wide_resnet18_with_subnets', ['coupling', 'coverage', 'ownership', 'sharing'])
    """
    return Subject(
        name="wide_resnet18_with_subnets",
        make=lambda: subnet_resnet18(
            width=width,
            base_channels=base_channels,
            stem="cifar",
            num_classes=10,
            construction="sum_of_subnets",
        ),
        batch=lambda: torch.randn(2, 3, 32, 32),
        members=_members,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        claims={
            "sharing": SHARED,
            "ownership": {
                # The stem's input has no groups: the subnets that start in a group share its rows.
                "parent.conv1.weight": Partition(times=width),
                "parent.layer*.conv?.weight": Partition(),
                "parent.layer*.downsample.0.weight": Partition(),
                "*": "independent",
            },
            "coupling": {"parent": "parent"},
            "coverage": "complete",
        },
    )


def _members(model: SubnetResNet) -> dict[str, torch.nn.Module]:
    return {"parent": model.parent, **model.subnets}
