"""No conv of ours is trained with the kernel that writes past its buffer."""

import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ensembles.checks.round_trips.overruns import OverrunLog
from ensembles.kernels import is_channels_last
from ensembles.models import ResNet, subnet_resnet18
from ensembles.models.convs import GuardedConv2d
from ensembles.models.layers import SubnetConv2d

ROOT = Path(__file__).parents[2]
LAST = torch.channels_last
LAYOUTS = pytest.mark.parametrize("last", ["", "input", "weight", "input and weight"])


def laid_out(conv, x, last):
    """The conv and its input, and what of them is channels last."""
    if "weight" in last:
        conv.to(memory_format=LAST)
    return conv, x.to(memory_format=LAST) if "input" in last else x


def overruns(network, *args):
    with OverrunLog() as log:
        network(*args)
    return log.convs


# --- the conv -------------------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("channels", [1, 4, 15])
def test_a_guarded_conv_of_few_channels_is_contiguous(channels, last):
    x = torch.randn(2, channels, 8, 8)
    conv, x = laid_out(GuardedConv2d(channels, 8, 1, 2), x, last)
    assert overruns(conv, x) == []
    assert not is_channels_last(conv(x))
    plain = nn.Conv2d(channels, 8, 1, 2)
    plain.weight = conv.weight
    # Of one channel, a weight has one layout only.
    told = last and (channels > 1 or "input" in last)
    assert len(overruns(plain, x)) == (1 if told else 0)


@LAYOUTS
def test_a_block_of_few_channels_is_contiguous(last):
    conv = SubnetConv2d(30, 8, 1, 2, width=2, bias=False)
    conv, x = laid_out(conv, torch.randn(2, 30, 8, 8), last)
    assert overruns(lambda: conv.narrow(x[:, 15:], 0, 1)) == []
    assert overruns(conv, x, conv.split_weight()) == []
    assert overruns(conv, x) == []
    # At full width there are 30 channels, for which every layout is right.
    assert is_channels_last(conv(x)) is bool(last)


@pytest.mark.parametrize("form", [(16, 1, 2), (4, 3, 2), (4, 1, 1)], ids=str)
def test_every_other_conv_keeps_its_layout(form):
    channels, kernel, stride = form
    conv = GuardedConv2d(channels, 8, kernel, stride)
    x = torch.randn(2, channels, 8, 8).to(memory_format=LAST)
    assert is_channels_last(conv(x))
    halves = GuardedConv2d(4, 8, 1, 2, groups=2)
    assert is_channels_last(halves(x[:, :4].contiguous(memory_format=LAST)))


@LAYOUTS
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (3, 8, 8)], ids=["batch", "image"])
def test_values_and_gradients_are_those_of_a_plain_conv(shape, last):
    torch.manual_seed(0)
    conv, x = GuardedConv2d(3, 4, 1, 2), torch.randn(shape)
    plain = nn.Conv2d(3, 4, 1, 2)
    plain.load_state_dict(conv.state_dict())
    found = []
    for one, given in ((plain, x), laid_out(conv, x, last if len(shape) == 4 else "")):
        leaf = given.detach().requires_grad_()
        y = one(leaf)
        y.square().sum().backward()
        found.append([y, leaf.grad, one.weight.grad, one.bias.grad])
    for expected, y in zip(*found, strict=True):
        torch.testing.assert_close(y, expected)


def test_it_is_compiled_traced_and_mapped():
    conv = GuardedConv2d(4, 3, 1, 2).to(memory_format=LAST)
    x = torch.randn(2, 4, 8, 8).to(memory_format=LAST)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=torch.jit.TracerWarning)
        for deprecated in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=deprecated)
        compiled = torch.compile(conv, backend="eager", fullgraph=True)
        traced = torch.jit.trace(conv, x)
        for made in (compiled, traced):
            torch.testing.assert_close(made(x), conv(x))
    stacked = {name: torch.stack([p, 2 * p]) for name, p in conv.named_parameters()}
    mapped = torch.vmap(lambda tensors: torch.func.functional_call(conv, tensors, (x,)))(stacked)
    torch.testing.assert_close(mapped, torch.stack([conv(x), 2 * conv(x)]))


# --- the networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("construction", ["zero_padded", "sum_of_subnets"])
@pytest.mark.parametrize("channels", [2, 4, 7])
@pytest.mark.parametrize("last", [False, True], ids=["as it comes", "channels last"])
def test_no_member_of_few_channels_runs_the_kernel(construction, channels, last, monkeypatch):
    network = subnet_resnet18(
        base_channels=channels, num_classes=3, stem="cifar", construction=construction
    )
    x = torch.randn(2, 3, 16, 16)
    if last:
        network.to(memory_format=LAST)
        x = x.to(memory_format=LAST)
    assert overruns(network, x) == []
    narrow = network.subnets["subnet_0_1"].extract()
    assert overruns(narrow, x) == []
    monkeypatch.setattr(GuardedConv2d, "_guarded", lambda self, x, weight, channels: (x, weight))
    runs = last or construction == "sum_of_subnets"
    assert bool(overruns(network, x)) is runs
    assert bool(overruns(narrow, x)) is last


class Layouts(TorchDispatchMode):
    """Input channels and layout of every strided 1x1 conv."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            x, weight, _, stride, *_ = args
            if weight.shape[2:] == (1, 1) and max(stride) > 1:
                self.found.add((weight.shape[1], is_channels_last(x)))
        return func(*args, **(kwargs or {}))


def test_subnets_of_16_channels_are_channels_last_throughout():
    network = subnet_resnet18(base_channels=16, num_classes=3, stem="cifar")
    with Layouts() as layouts:
        network(torch.randn(2, 3, 16, 16), members=["subnet_0_0"])
    assert layouts.found == {(16, True), (32, True), (64, True)}
    with Layouts() as layouts:
        subnet_resnet18(base_channels=8, num_classes=3, stem="cifar")(
            torch.randn(2, 3, 16, 16), members=["subnet_0_0"]
        )
    assert layouts.found == {(8, False), (16, True), (32, True)}


def test_a_resnet_of_usual_width_has_the_layers_of_torch_only():
    def kinds(channels):
        network = ResNet(18, base_channels=channels, stem="cifar")
        return {
            name: type(module)
            for name, module in network.named_modules()
            if isinstance(module, nn.Conv2d) and type(module) is not nn.Conv2d
        }

    assert kinds(16) == {}
    assert kinds(8) == {"layer2.0.downsample.0": GuardedConv2d}
    assert list(kinds(2)) == [f"layer{number}.0.downsample.0" for number in (2, 3, 4)]


# --- the kernel itself ----------------------------------------------------------------------------

STEPS = """
import torch
from ensembles.models import resnet18, subnet_resnet18

torch.set_num_threads(1)


def train(network, x, steps):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        y = network(x)
        sum(y.square().mean() for y in (y.values() if isinstance(y, dict) else [y])).backward()
        optimizer.step()


def subnets(channels, construction="sum_of_subnets"):
    options = {"base_channels": channels, "num_classes": 3, "stem": "cifar"}
    return subnet_resnet18(construction=construction, **options)


x = torch.randn(2, 3, 32, 32)
last = {"memory_format": torch.channels_last}
for channels in (4, 7, 16):
    train(subnets(channels), x, steps=3)
train(subnets(3, "zero_padded").to(**last), x.to(**last), steps=3)
train(resnet18(base_channels=4, num_classes=3, stem="cifar").to(**last), x, steps=3)
print("trained")
"""


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="other processors have other kernels"
)
def test_training_ends_with_the_kernels_of_a_processor_without_avx512():
    """A heap that was written to ends the process sooner or later, with a signal."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", STEPS], env=environment, capture_output=True, text=True, timeout=300
    )
    assert (ran.returncode, ran.stdout) == (0, "trained\n"), ran.stderr
