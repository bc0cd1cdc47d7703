"""ResNets are torchvision's, bit by bit, and of every width."""

import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ensembles.models.resnet import ResidualBlock, ResNet, resnet18, resnet34, resnet50
from ensembles.models.routing import ResidualShape

MAKERS = {18: resnet18, 34: resnet34, 50: resnet50}
DEPTHS = pytest.mark.parametrize("depth", MAKERS)


def parameters_of(network):
    return sum(parameter.numel() for parameter in network.parameters())


def on_meta(depth, **options):
    with torch.device("meta"):
        return MAKERS[depth](**options)


@pytest.fixture(scope="module")
def torchvision():
    return pytest.importorskip("torchvision", reason="torchvision's networks are the oracle")


@DEPTHS
def test_names_shapes_and_order_are_those_of_torchvision(depth, torchvision):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"resnet{depth}")()
        ours = MAKERS[depth]()
    assert [(name, tuple(tensor.shape)) for name, tensor in ours.state_dict().items()] == [
        (name, tuple(tensor.shape)) for name, tensor in theirs.state_dict().items()
    ]
    assert [name for name, _ in ours.named_parameters()] == [
        name for name, _ in theirs.named_parameters()
    ]


@DEPTHS
def test_weights_outputs_and_gradients_are_bitwise_those_of_torchvision(depth, torchvision):
    torch.manual_seed(7)
    theirs = getattr(torchvision.models, f"resnet{depth}")(num_classes=5)
    torch.manual_seed(7)
    ours = MAKERS[depth](num_classes=5)
    for (name, mine), other in zip(
        ours.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, other), name

    images = torch.randn(2, 3, 48, 48)
    logits, expected = ours(images), theirs(images)
    assert torch.equal(logits, expected)
    logits.square().sum().backward()
    expected.square().sum().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert mine.grad.abs().sum() > 0, name
        assert torch.equal(mine.grad, other.grad), name

    ours.eval()
    theirs.eval()
    evaluated = ours(images)
    assert torch.equal(evaluated, theirs(images))
    assert not torch.equal(evaluated, logits)


def test_a_state_dict_of_torchvision_loads_and_gives_its_outputs(torchvision):
    torch.manual_seed(1)
    theirs = torchvision.models.resnet18(num_classes=5)
    images = torch.randn(2, 3, 48, 48)
    theirs(images)
    ours = resnet18(num_classes=5)
    assert not torch.equal(ours.eval()(images), theirs.eval()(images))
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(images), theirs(images))
    theirs.load_state_dict(ours.state_dict())


# Parameter counts of the CIFAR networks with 10 classes; those of width 2 and 4 are not 4 and 16
# times as many because biases, BatchNorms and the classifier grow only linearly.
@pytest.mark.parametrize(
    ("depth", "width", "count"),
    [
        (18, 1, 11_173_962),
        (34, 1, 21_282_122),
        (50, 1, 23_520_842),
        (18, 2, 44_662_922),
        (18, 4, 178_585_866),
    ],
)
def test_the_cifar_networks_have_the_known_numbers_of_parameters(depth, width, count):
    assert parameters_of(on_meta(depth, num_classes=10, stem="cifar", width=width)) == count


@pytest.mark.parametrize(("width", "macs"), [(1, 140_186_624), (2, 557_197_312)])
def test_a_forward_pass_costs_the_known_number_of_multiplications(width, macs):
    network = on_meta(18, num_classes=10, stem="cifar_maxpool", width=width)
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, 32, 32, device="meta"))
    assert counter.get_total_flops() == 2 * macs


@DEPTHS
def test_the_imagenet_networks_cost_what_torchvision_publishes(depth, torchvision):
    weights = torchvision.models.get_model_weights(f"resnet{depth}").DEFAULT
    network = on_meta(depth)
    assert parameters_of(network) == weights.meta["num_params"]
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, 224, 224, device="meta"))
    # Published in units of 10^9 multiplications, rounded to three digits.
    assert round(counter.get_total_flops() / 2e9, 3) == weights.meta["_ops"]


@DEPTHS
@pytest.mark.parametrize("width", [2, 3])
def test_width_multiplies_the_channels_of_every_layer_and_of_the_stem(depth, width):
    plain = on_meta(depth, base_channels=4)
    wide = on_meta(depth, base_channels=4, width=width)
    for (name, narrow), tensor in zip(plain.named_parameters(), wide.parameters(), strict=True):
        expected = list(narrow.shape)
        if name != "fc.bias":
            expected[0] *= width if name != "fc.weight" else 1
        if narrow.ndim > 1 and name != "conv1.weight":
            expected[1] *= width
        assert list(tensor.shape) == expected, name


def test_wide_resnet50_2_of_torchvision_widens_the_inner_convs_alone(torchvision):
    with torch.device("meta"):
        theirs = torchvision.models.wide_resnet50_2()
    ours = on_meta(50, width=2)
    assert theirs.conv1.weight.shape[0] == 64
    assert ours.conv1.weight.shape[0] == 128
    assert theirs.layer1[0].conv3.weight.shape[:2] == (256, 128)
    assert ours.layer1[0].conv3.weight.shape[:2] == (512, 128)


@pytest.mark.parametrize(
    ("stem", "kernel", "into_layer1"),
    [("imagenet", 7, (8, 8)), ("cifar", 3, (32, 32)), ("cifar_maxpool", 3, (16, 16))],
)
def test_a_stem_shrinks_the_image_as_its_name_says(stem, kernel, into_layer1):
    network = on_meta(18, stem=stem, base_channels=4)
    assert network.conv1.kernel_size == (kernel, kernel)
    x = torch.empty(1, 3, 32, 32, device="meta")
    x = network.maxpool(network.conv1(x))
    assert x.shape == (1, 4, *into_layer1)


@DEPTHS
def test_the_forms_of_residual_blocks_are_told_to_routing(depth):
    network = on_meta(depth, base_channels=4)
    shapes = [[block.shape for block in layer] for layer in network.residuals]
    convs = 3 if depth == 50 else 2
    counts = [2, 2, 2, 2] if depth == 18 else [3, 4, 6, 3]
    assert [len(layer) for layer in shapes] == counts
    for index, layer in enumerate(shapes):
        # A basic block of layer1 keeps its channels, so its shortcut is the identity.
        first = ResidualShape(convs, downsample=depth == 50 or index > 0)
        assert layer == [first] + [ResidualShape(convs)] * (len(layer) - 1)


def test_images_may_have_one_channel():
    torch.manual_seed(0)
    network = resnet18(num_classes=10, stem="cifar", base_channels=4, image_channels=1)
    assert network(torch.randn(3, 1, 8, 8)).shape == (3, 10)


def test_the_activation_is_made_anew_for_stem_and_blocks():
    network = resnet18(num_classes=3, stem="cifar", base_channels=4, activation=nn.PReLU)
    slopes = [name for name, _ in network.named_parameters() if "activation" in name]
    layers = [f"layer{layer}.{block}" for layer in range(1, 5) for block in range(2)]
    assert slopes == ["activation.weight"] + [f"{layer}.activation.weight" for layer in layers]


def test_the_activation_is_used_everywhere():
    torch.manual_seed(0)
    calls = []

    class Recorded(nn.Module):
        def forward(self, x):
            calls.append(tuple(x.shape[1:]))
            return x.tanh()

    resnet50(stem="cifar", base_channels=4, activation=Recorded)(torch.randn(2, 3, 8, 8))
    # One behind the stem, three in each of the 3 + 4 + 6 + 3 bottlenecks.
    assert len(calls) == 1 + 3 * 16
    assert (calls[0], calls[-1]) == ((4, 8, 8), (128, 1, 1))


def test_a_residual_block_adds_its_shortcut():
    torch.manual_seed(0)
    convs = [nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2)]
    block = ResidualBlock(convs, activation=partial(nn.LeakyReLU, 0.5)).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x), nn.functional.leaky_relu(x, 0.5))


def test_an_unknown_depth_is_refused():
    with pytest.raises(ValueError, match=r"^depth must be one of \[18, 34, 50\], got 20$"):
        ResNet(20)


def test_an_unknown_stem_is_refused():
    message = "stem must be one of ['cifar', 'cifar_maxpool', 'imagenet'], got 'mnist'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ResNet(18, stem="mnist")


@pytest.mark.parametrize("name", ["num_classes", "width", "base_channels", "image_channels"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"^{name} must be at least 1, got 0$"):
        ResNet(18, **{name: 0})
