"""The checks on networks that nobody here wrote and on real images, healthy and with faults."""

import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torchvision.models.vgg import VGG, cfgs, make_layers

from ensembles import Subject, check_ensemble, parametrize_with_checks
from ensembles.experiments.evaluation.pretrained import PRETRAINED, CifarResNet, load_pretrained
from ensembles.registry import default_claims

DATA = Path(os.environ.get("ENSEMBLES_DATA", Path(__file__).parents[2] / "shared" / "data"))
IMAGES = DATA / "cifar10_raw_prefix.npz"
DEPTHS = (20, 32)
WEIGHTS = [DATA / "pretrained" / PRETRAINED[f"resnet{depth}"].file for depth in DEPTHS]

needs_cifar = pytest.mark.skipif(
    not IMAGES.is_file() or not all(file.is_file() for file in WEIGHTS),
    reason=f"CIFAR-10 images and pretrained ResNets are not in {DATA} (set ENSEMBLES_DATA)",
)


def digits(size: int = 32):
    """Eight handwritten digits, one of each class 0 to 7, as RGB images."""
    images, _ = load_digits(return_X_y=True)
    grey = torch.tensor(images[:8], dtype=torch.float32).view(8, 1, 8, 8) / 16
    return F.interpolate(grey, size=(size, size), mode="bilinear").expand(8, 3, size, size)


def loss_of_digits(outputs):
    _, labels = load_digits(return_X_y=True)
    return sum(F.cross_entropy(y, torch.tensor(labels[:8])) for y in outputs.values())


def sgd(members):
    return torch.optim.SGD(nn.ModuleList(members).parameters(), lr=0.1, momentum=0.9)


def on_digits(name, make, **more) -> Subject:
    given = {
        "batch": digits,
        "loss": loss_of_digits,
        "optimizer": sgd,
        "claims": default_claims("ensemble"),
    }
    return Subject(name=name, make=make, **{**given, **more})


def resnet18():
    return torchvision.models.resnet18(num_classes=10)


def vgg11_bn():
    """torchvision's vgg11_bn with the linear head that small images are trained with."""
    network = VGG(make_layers(cfgs["A"], batch_norm=True), num_classes=10, init_weights=False)
    network.avgpool, network.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 10)
    return network


def vision_transformer():
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32,
        num_classes=10,
    )  # fmt: skip


class PackedHead(nn.Conv1d):
    """A linear layer for each member, on its own share of the features."""

    def forward(self, x):
        return super().forward(x.unsqueeze(-1)).squeeze(-1)


class PackedInput(nn.Module):
    """Every member sees the same image."""

    def __init__(self, network: nn.Module, members: int) -> None:
        super().__init__()
        self.network, self.members = network, members

    def forward(self, x):
        return self.network(x.repeat(1, self.members, 1, 1)).chunk(self.members, 1)


def packed(network: nn.Module, members: int) -> nn.Module:
    """A network as a packed ensemble (Laurent et al. 2023, arXiv:2210.09184).

    Every convolution and linear layer becomes `members` groups of itself.
    """
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Conv2d):
            wide = nn.Conv2d(
                members * layer.in_channels, members * layer.out_channels, layer.kernel_size,
                layer.stride, layer.padding, layer.dilation, members * layer.groups,
                layer.bias is not None,
            )  # fmt: skip
        elif isinstance(layer, nn.BatchNorm2d):
            wide = nn.BatchNorm2d(members * layer.num_features, layer.eps, layer.momentum)
        elif isinstance(layer, nn.Linear):
            wide = PackedHead(
                members * layer.in_features, members * layer.out_features, 1, groups=members
            )
        else:
            continue
        parent, _, own = name.rpartition(".")
        setattr(network.get_submodule(parent), own, wide)
    return PackedInput(network, members)


def packed_subject(name, make) -> Subject:
    return on_digits(
        name,
        lambda: packed(make(num_classes=10), 2),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        claims={**default_claims("ensemble"), "sharing": "distinct"},
    )


# --- ensembles hold what they claim -------------------------------------------------------------


@parametrize_with_checks(
    [
        on_digits("three_resnet18", lambda: [resnet18() for _ in range(3)]),
        on_digits("two_vgg11_bn", lambda: [vgg11_bn() for _ in range(2)]),
        on_digits("two_vision_transformers", lambda: [vision_transformer() for _ in range(2)]),
        packed_subject("packed_mobilenet_v3", torchvision.models.mobilenet_v3_small),
        packed_subject("packed_mnasnet", torchvision.models.mnasnet0_5),
    ]
)
def test_ensembles_of_networks_that_nobody_here_wrote(subject, check):
    check(subject)


# --- planted faults are found -------------------------------------------------------------------


def fired(subject: Subject) -> dict[str, str]:
    """The checks that broke, with their messages."""
    results = check_ensemble(subject)
    assert {r.status for r in results} <= {"held", "broken", "not claimed"}, str(results)
    return {result.check: result.message for result in results if result.status == "broken"}


def test_two_resnets_that_share_a_stage_are_found():
    def make():
        members = [resnet18() for _ in range(3)]
        members[2].layer3 = members[0].layer3
        return members

    found = fired(on_digits("shared_stage", make))
    assert set(found) == {"sharing", "ownership", "coupling"}
    for message in found.values():
        assert "layer3.0.conv1.weight" in message or "moves 2:" in message


def test_an_optimizer_that_misses_a_member_is_found():
    subject = on_digits(
        "missed_member",
        lambda: [resnet18() for _ in range(3)],
        optimizer=lambda members: sgd(members[:2]),
        claims={"coverage": "complete"},
    )
    found = fired(subject)
    assert "2.conv1.weight" in found["coverage"]
    assert "are in no group of the optimizer" in " ".join(found["coverage"].split())


def test_one_transformer_twice_is_found():
    def make():
        return [vision_transformer()] * 2

    found = fired(on_digits("same_module", make))
    assert set(found) == {"sharing", "ownership", "coupling", "diversity"}


def test_an_encoder_layer_that_is_not_called_is_found():
    def make():
        members = [vision_transformer() for _ in range(2)]
        members[1].encoder.layers.forward = members[1].encoder.layers[0].forward
        return members

    found = fired(on_digits("skipped_layer", make))
    assert set(found) == {"ownership", "coverage"}
    assert "encoder_layer_1" in found["coverage"]


def test_a_packed_shufflenet_mixes_its_members():
    """Packed by the recipe, it leaks: its own channel shuffle goes across members."""
    found = fired(packed_subject("packed_shufflenet", torchvision.models.shufflenet_v2_x0_5))
    assert set(found) == {"ownership", "coupling"}
    assert "leak into other members" in found["ownership"]


def test_a_packed_network_with_one_dense_layer_is_found():
    def make():
        model = packed(torchvision.models.mobilenet_v3_small(num_classes=10), 2)
        last = model.network.features[-1]
        conv = last[0]
        last[0] = nn.Conv2d(conv.in_channels, conv.out_channels, 1, bias=False)
        return model

    healthy = packed_subject("packed", torchvision.models.mobilenet_v3_small)
    subject = Subject(
        name="dense_layer",
        make=make,
        batch=healthy.batch,
        claims={"ownership": "independent", "coupling": "independent"},
    )
    assert set(fired(subject)) == {"ownership", "coupling"}


# --- trained networks on natural images ---------------------------------------------------------


def pretrained(depth: int) -> nn.Module:
    network = load_pretrained(f"resnet{depth}", DATA / "pretrained")
    return network.networks[f"resnet{depth}"].train()


def cifar(count: int):
    """The first test images of CIFAR-10, lossless, normalised as the networks were trained."""
    with np.load(IMAGES) as file:
        images, labels = file["test_data"][:count], file["test_labels"][:count]
    pixels = torch.tensor(images).view(-1, 3, 32, 32) / 255
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return (pixels - mean) / deviation, torch.tensor(labels, dtype=torch.long)


def loss_of_cifar(outputs):
    return sum(F.cross_entropy(y, cifar(8)[1]) for y in outputs.values())


def on_cifar(name, make) -> Subject:
    return on_digits(name, make, batch=lambda: cifar(8)[0], loss=loss_of_cifar)


@needs_cifar
@parametrize_with_checks(
    [
        on_cifar("pretrained_resnet20_and_32", lambda: [pretrained(20), pretrained(32)]),
    ]
)
def test_pretrained_networks_are_an_ensemble(subject, check):
    check(subject)


@needs_cifar
def test_the_pretrained_networks_are_the_trained_ones():
    """Published test errors are 8.27 and 7.37 percent; 100 images have a standard error of 2.7."""
    images, labels = cifar(100)
    for depth in DEPTHS:
        with torch.no_grad():
            right = int((pretrained(depth).eval()(images).argmax(1) == labels).sum())
        assert right >= 84, f"ResNet-{depth} classifies {right} of 100 images"


@needs_cifar
def test_snapshots_by_reference_are_found_in_pretrained_networks():
    """Two members with the tensors of one state_dict are one network, whatever they are called."""

    def make():
        state = pretrained(20).state_dict()
        members = [CifarResNet(20) for _ in range(2)]
        for member in members:
            member.load_state_dict(state, assign=True)
        return members

    found = fired(on_cifar("snapshots", make))
    assert set(found) >= {"sharing", "coupling", "coverage", "diversity"}


@needs_cifar
def test_a_shared_stage_is_found_in_pretrained_networks():
    def make():
        members = [pretrained(20), pretrained(20)]
        members[1].layer2[1].conv1 = members[0].layer2[1].conv1
        return members

    found = fired(on_cifar("shared_conv", make))
    # And both are one checkpoint, which is what diversity says.
    assert set(found) == {"sharing", "ownership", "coupling", "diversity"}


@needs_cifar
def test_copies_of_trained_networks_share_nothing_and_are_one_network():
    """Equal values are no shared memory: what is wrong with a copy is that it is one."""

    def make():
        network = pretrained(20)
        return [network, copy.deepcopy(network)]

    found = fired(on_cifar("copies", make))
    assert set(found) == {"diversity"}
    assert "They are one network, however it was loaded." in found["diversity"]


@needs_cifar
def test_one_trained_trunk_with_a_new_head_for_each_member_is_healthy():
    """Fine-tuning begins so: what the checkpoint gives is in common, and is told apart."""

    def make():
        members = [pretrained(20) for _ in range(2)]
        for member in members:
            member.linear.reset_parameters()
        return members

    assert fired(on_cifar("fine_tuned", make)) == {}
    assert check_ensemble(make()).held
