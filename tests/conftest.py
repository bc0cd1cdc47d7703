"""What tests share: goldens, and the networks that are recorded as a text and as a drawing."""

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from ensembles.models import SubnetResNet
from ensembles.models.resnet import ResidualBlock
from ensembles.registry import PROMISES

# PyTorch imports it when it is first needed, and can do so only once in a process.
import_module("torch._dynamo")
for _promise in PROMISES.values():  # pytester forgets what inner runs import: here once for all
    _promise.module("judgement")

RECORDED_WITH = ("2.14.", "2.15.")
MATS = Path(__file__).parent / "test_mats"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Compares a text with tests/test_mats/<name>; `--force-regen` records it anew.

    The name is a literal in the test, so that an unused golden can be found by its name. Other
    releases of torch round otherwise: there, measured figures are compared as figures only.
    """
    file_regression = request.getfixturevalue("file_regression")

    def check(text: str, name: str) -> None:
        path = MATS / name
        if torch.__version__.startswith(RECORDED_WITH) or not path.exists():
            file_regression.check(
                text, encoding="utf-8", extension=path.suffix, fullpath=path.resolve()
            )
        else:
            assert without_figures(text) == without_figures(path.read_text("utf-8"))

    return check


def without_figures(text: str) -> str:
    return re.sub(r"\d[\d,.]*(e[-+]\d+)?", "#", re.sub(r" +", " ", text)).strip()


@pytest.fixture
def small_resnet() -> Callable[[], nn.Module]:
    """Builds every kind of layer that a ResNet has, and few of each: its drawing can be read."""

    def make() -> nn.Module:
        block = ResidualBlock(
            [nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1)],
            downsample=nn.Conv2d(4, 8, 1, stride=2, bias=False),
        )
        stem = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        )
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        network = nn.Sequential()
        for name, module in (("stem", stem), ("block", block), ("head", head)):
            network.add_module(name, module)
        return network

    return make


@pytest.fixture
def parent_and_subnet() -> Callable[[], tuple[nn.Module, dict[str, object]]]:
    """Builds a network of width two, with the batch that calls its parent and one subnet."""

    def make() -> tuple[nn.Module, dict[str, object]]:
        network = SubnetResNet(
            18,
            num_classes=10,
            stem="cifar",
            width=2,
            base_channels=4,
            construction="zero_padded",
        )
        return network, {"x": torch.randn(2, 3, 8, 8), "members": ("parent", "subnet_0_1")}

    return make


class _Heads(nn.Module):
    def __init__(self, inputs: int, *, put_back: bool, trained: int = 3, leak: bool = False):
        super().__init__()
        self.put_back, self.leak = put_back, leak
        self.heads = nn.ModuleList(nn.Linear(inputs, 2) for _ in range(3))
        self.heads[trained:].requires_grad_(False)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        outputs: list[torch.Tensor] = []
        for head in self.heads:
            self.heads.requires_grad_(False)
            head.requires_grad_(True)
            outputs.append(head(x))
            if self.leak and head is self.heads[1]:
                outputs[0] = outputs[0] + head(x)
        if self.put_back:
            self.heads.requires_grad_(True)
        return outputs


@pytest.fixture
def freezing_heads() -> Callable[..., nn.Module]:
    """Builds adapters, of which forward makes only the one trainable that it runs.

    It may put the flags back before it returns; the first few may be trainable before; and the
    second may leak into the first.
    """
    return _Heads
