"""Pretrained CIFAR-10 ResNets whose test errors are published: where an evaluation is checked.

The networks of He et al. 2015 (arXiv 1512.03385, section 4.2) with 20, 32, 44 and 56 layers,
trained by Y. Idelbayev (https://github.com/akamaster/pytorch_resnet_cifar10, BSD 2-Clause), whose
parameter names they have. The weight files are not part of this package; each is checked by its
digest before it is read.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ensembles.experiments.data.cifar10 import CLASSES
from ensembles.experiments.data.sources import data_folder

__all__ = ["PRETRAINED", "CifarResNet", "PretrainedNetwork", "Weights", "load_pretrained"]

SOURCE = "https://github.com/akamaster/pytorch_resnet_cifar10/raw/d5489e89/pretrained_models"

# Of ImageNet, and used for CIFAR-10 by the script that trained the networks (trainer.py there).
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

_CHANNELS = (16, 32, 64)
"""Of the three stages; section 4.2 of arXiv 1512.03385."""


@dataclass(frozen=True)
class Weights:
    """A file of pretrained weights.

    Attributes:
        file: Its name.
        sha256: Digest of its content; the source names the files by its first eight digits.
        depth: Layers of the network.
        test_error: Percent of the 10,000 CIFAR-10 test images, as the source's README gives it.
    """

    file: str
    sha256: str
    depth: int
    test_error: float


PRETRAINED: Mapping[str, Weights] = {
    "resnet20": Weights(
        "resnet20-12fca82f.th",
        "12fca82f0bebc4135bf1f32f6e3710e61d5108578464b84fd6d7f5c1b04036c8",
        depth=20,
        test_error=8.27,
    ),
    "resnet32": Weights(
        "resnet32-d509ac18.th",
        "d509ac1820d7f25398913559d7e81a13229b1e7adc5648e3bfa5e22dc137f850",
        depth=32,
        test_error=7.37,
    ),
    "resnet44": Weights(
        "resnet44-014dd654.th",
        "014dd6541728a1c700b1642ab640e211dc6eb8ed507d70697458dc8f8a0ae2e4",
        depth=44,
        test_error=6.90,
    ),
    "resnet56": Weights(
        "resnet56-4bfd9763.th",
        "4bfd97631478d6b638d2764fd2baff3edb1d7d82252d54439343b6596b9b5367",
        depth=56,
        test_error=6.61,
    ),
}
"""What `load_pretrained` knows, by name."""


class CifarResNet(nn.Module):
    """A ResNet of 6n + 2 layers for images of 32 x 32.

    Three stages of n basic blocks with 16, 32 and 64 channels; where the channels double, the
    shortcut takes every second pixel and adds channels of zeros (the paper's option A), so that it
    has no parameters.

    Example:
        >>> network = CifarResNet(20)
        >>> sum(parameter.numel() for parameter in network.parameters())
        269722
        >>> network(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Args:
        depth: 6n + 2: 20, 32, 44, 56, 110.
        classes: Number of logits.

    Shape:
        (N, 3, H, W) to (N, classes).

    Raises:
        ValueError: If there is no network of this depth.
    """

    def __init__(self, depth: int, *, classes: int = 10) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6n + 2 with n at least 1 (20, 32, ...), got {depth}")
        first, *_, last = _CHANNELS
        self.conv1 = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        into = first
        for stage, channels in enumerate(_CHANNELS, start=1):
            row = [_Block(into if place == 0 else channels, channels) for place in range(blocks)]
            self.add_module(f"layer{stage}", nn.Sequential(*row))
            into = channels
        self.linear = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Computes the logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(1, len(_CHANNELS) + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


class _Block(nn.Module):
    """Two 3x3 convs and a shortcut without parameters; the stride is that of the channels."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.stride = out // into
        self.added = (out - into) // 2
        self.conv1 = nn.Conv2d(into, out, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        main = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        # Half of the new channels below the old ones, half above.
        shortcut = F.pad(
            x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added, self.added)
        )
        return F.relu(main + shortcut)


class PretrainedNetwork(nn.Module):
    """Pretrained networks as the named members of one network.

    Example:
        >>> network = PretrainedNetwork({"a": CifarResNet(8), "b": CifarResNet(8)})
        >>> [(name, tuple(z.shape)) for name, z in network(torch.randn(2, 3, 8, 8)).items()]
        [('a', (2, 10)), ('b', (2, 10))]

    Args:
        networks: The members by name.

    Attributes:
        normalisation: Mean and standard deviation of each channel, on the scale from 0 to 1, that
            the images were normalised with in training; `evaluate` does likewise.
        class_names: What it classifies, by class number; `evaluate` refuses other classes.

    Raises:
        ValueError: If there are none.
    """

    normalisation = (MEAN, STD)
    class_names = CLASSES

    def __init__(self, networks: Mapping[str, CifarResNet]) -> None:
        super().__init__()
        if not networks:
            raise ValueError("a network has at least 1 member, got none")
        self.networks = nn.ModuleDict(networks)

    @property
    def member_names(self) -> tuple[str, ...]:
        """The names of all members, in the order of the logits."""
        return tuple(self.networks)

    def forward(self, x: Tensor, members: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Computes the logits (sample, class) by member; of the asked members only."""
        asked = set(self.networks if members is None else members)
        unknown = sorted(asked - set(self.networks))
        if unknown:
            raise ValueError(f"members must be some of {list(self.networks)}, got {unknown}")
        return {name: net(x) for name, net in self.networks.items() if name in asked}


def load_pretrained(
    names: str | Iterable[str], folder: str | os.PathLike[str] | None = None
) -> PretrainedNetwork:
    """Loads pretrained ResNets, one or several as an ensemble, in evaluation mode on the CPU.

    Example::

        load_pretrained("resnet20", "data/pretrained")
        load_pretrained(["resnet20", "resnet56"], "data/pretrained")

    Args:
        names: Keys of `PRETRAINED`.
        folder: Where the weight files are; by default the folder ``pretrained`` beside the image
            sets, see `ensembles.experiments.data.sources.data_folder`.

    Returns:
        The network; its members have these names.

    Raises:
        ValueError: If a name is unknown or there twice, or a file has another content than the
            published one.
        FileNotFoundError: If a file is missing; the message says where it is published.

    Source:
        https://github.com/akamaster/pytorch_resnet_cifar10, commit d5489e89.
    """
    listed = [names] if isinstance(names, str) else list(names)
    place = data_folder() / "pretrained" if folder is None else Path(folder)
    for name in listed:
        if name not in PRETRAINED:
            raise ValueError(f"there is no pretrained {name!r}; there are {', '.join(PRETRAINED)}")
        if listed.count(name) > 1:
            raise ValueError(
                f"{name} is there {listed.count(name)} times: one network is no ensemble"
            )
    return PretrainedNetwork({name: _loaded(PRETRAINED[name], place) for name in listed}).eval()


def _loaded(weights: Weights, folder: Path) -> CifarResNet:
    path = folder / weights.file
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"there are no weights {path}. They are published as {SOURCE}/{weights.file}; put the "
            "file there, or name the folder that has it."
        ) from error
    found = sha256(content).hexdigest()
    if found != weights.sha256:
        raise ValueError(
            f"{path} is not the published file: its sha256 is {found}, expected {weights.sha256} "
            f"({len(content):,} bytes were read). Fetch it anew from {SOURCE}/{weights.file}."
        )
    # Saved on a GPU, by data-parallel training: each name begins with "module.".
    saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)["state_dict"]
    network = CifarResNet(weights.depth)
    network.load_state_dict({name.removeprefix("module."): saved[name] for name in saved})
    return network
