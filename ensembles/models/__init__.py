"""Wide ResNets with their subnets, and ensembles: the suite's default subject."""

from ensembles.models.layers import BlockConv2d, ChannelSwitcher, SubnetConv2d, SubnetGrid
from ensembles.models.members import Ensemble, NStreams
from ensembles.models.resnet import ResidualBlock, ResNet, resnet18, resnet34, resnet50
from ensembles.models.routing import (
    Block,
    ResidualRoute,
    ResidualShape,
    Route,
    all_subnets,
    residual_route,
    subnet_route,
)
from ensembles.models.subnets import (
    ParentResNet,
    Subnet,
    SubnetResidualBlock,
    SubnetResNet,
    subnet_name,
    subnet_resnet18,
    subnet_resnet34,
    subnet_resnet50,
)

__all__ = [
    "Block",
    "BlockConv2d",
    "ChannelSwitcher",
    "Ensemble",
    "NStreams",
    "ParentResNet",
    "ResNet",
    "ResidualBlock",
    "ResidualRoute",
    "ResidualShape",
    "Route",
    "Subnet",
    "SubnetConv2d",
    "SubnetGrid",
    "SubnetResNet",
    "SubnetResidualBlock",
    "all_subnets",
    "residual_route",
    "resnet18",
    "resnet34",
    "resnet50",
    "subnet_name",
    "subnet_resnet18",
    "subnet_resnet34",
    "subnet_resnet50",
    "subnet_route",
]
