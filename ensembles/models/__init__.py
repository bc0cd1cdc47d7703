"""Wide ResNets with their subnets, and ensembles. One is the default subject of the suite."""

from ensembles.models.heads import GroupedLinear
from ensembles.models.layers import BlockConv2d, ChannelSwitcher, SubnetConv2d, SubnetGrid
from ensembles.models.members import Ensemble, NStreams
from ensembles.models.objectives import (
    OBJECTIVES,
    Interpolated,
    Joint,
    Labels,
    Mean,
    MeanField,
    Objective,
    Stochastic,
    Sum,
    member_losses,
)
from ensembles.models.predictions import Reduction, log_probabilities, predict
from ensembles.models.rates import EquivalentHyperparameters, equivalent_hyperparameters
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
    "OBJECTIVES",
    "Block",
    "BlockConv2d",
    "ChannelSwitcher",
    "Ensemble",
    "EquivalentHyperparameters",
    "GroupedLinear",
    "Interpolated",
    "Joint",
    "Labels",
    "Mean",
    "MeanField",
    "NStreams",
    "Objective",
    "ParentResNet",
    "Reduction",
    "ResNet",
    "ResidualBlock",
    "ResidualRoute",
    "ResidualShape",
    "Route",
    "Stochastic",
    "Subnet",
    "SubnetConv2d",
    "SubnetGrid",
    "SubnetResNet",
    "SubnetResidualBlock",
    "Sum",
    "all_subnets",
    "equivalent_hyperparameters",
    "log_probabilities",
    "member_losses",
    "predict",
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
