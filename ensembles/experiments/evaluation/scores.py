"""What a network gets right on a set of images: every member, and every reduction of them.

Every sample counts once: no batch is dropped, and a set that lacks a class is refused. Accuracies
are counts, of which nothing is lost in rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast, get_args

import torch
from torch import Tensor, nn

from ensembles.experiments.data.batches import evaluation_batches
from ensembles.experiments.data.images import ImageSet
from ensembles.experiments.training.networks import Network
from ensembles.message import listed
from ensembles.models.predictions import Reduction, log_probabilities, predict

__all__ = ["Evaluation", "Scores", "evaluate"]

PARENT = "parent"
"""The member that is no member of the ensemble: its subnets are."""


def _is_parent(name: str) -> bool:
    """Also of a network that is combined with others, whose members are called network.member."""
    return name.rpartition(".")[2] == PARENT


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    """What one classifier makes of a set of images.

    Attributes:
        log_probabilities: (sample, class), in nats. -inf is possible for a vote.
        predictions: (sample,), int64: the most probable class, the lowest of several.
        labels: (sample,), int64.

    Example:
        >>> p = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
        >>> scores = Scores(p.log(), p.argmax(1), torch.tensor([0, 1]))
        >>> scores
        1 of 2 correct, 0.4904 nats
    """

    log_probabilities: Tensor
    predictions: Tensor
    labels: Tensor

    def __repr__(self) -> str:
        return f"{self.correct} of {self.n} correct, {self.nll:.4f} nats"

    @property
    def right(self) -> Tensor:
        """(sample,), bool: where the predicted class is the label."""
        return self.predictions == self.labels

    @property
    def correct(self) -> int:
        """How many samples are classified correctly."""
        return int(self.right.sum())

    @property
    def n(self) -> int:
        """How many samples there are."""
        return len(self.labels)

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of the labels, in nats; infinite where a label has none."""
        chosen = self.log_probabilities.double().gather(1, self.labels[:, None])
        return float(-chosen.mean())


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a network makes of a set of images.

    Attributes:
        images: The set.
        members: Scores by member, in the network's order.
        reductions: Scores of the ensemble by reduction; empty where there is one member only.
        reduced: Names of the members that the reductions are of.
    """

    images: ImageSet
    members: Mapping[str, Scores]
    reductions: Mapping[str, Scores]
    reduced: tuple[str, ...]


def evaluate(
    network: Network,
    images: ImageSet,
    *,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    reduced: Sequence[str] | None = None,
    allow_missing_classes: bool = False,
) -> Evaluation:
    """Evaluates every member of a network, and their reductions, on every sample of a set.

    In evaluation mode, without gradients, in float32 proper (TF32 and autocast are off), or in
    float64 where the network is. The modes of all modules and the place of the parameters are
    as before when it returns. Sums in another order round differently: batches of another size
    give log-probabilities that agree to about 1e-5.

    Example:
        >>> from ensembles.experiments.training.networks import NetworkOptions, build_network
        >>> from ensembles.experiments.data.sources import load_images
        >>> options = NetworkOptions(kind="ensemble", members=2, base_channels=1)
        >>> found = evaluate(build_network(options), load_images("digits", "test"))
        >>> list(found.members), list(found.reductions), found.members["member_0"].n
        (['member_0', 'member_1'], ['arithmetic', 'geometric', 'vote'], 797)

    Args:
        network: Returns logits (sample, class) by member name. Images are normalised by its
            attribute ``normalisation`` (mean and standard deviation of each channel) where it has
            one, and otherwise as the set says. A network with an attribute ``class_names`` (by
            class number) is evaluated on sets of these classes only.
        images: The set.
        batch_size: Samples that are computed together.
        device: Where to compute; by default where the network is.
        reduced: The members that the reductions are of; by default all but a parent, whose
            subnets they are.
        allow_missing_classes: Accept a set that has no sample of some class.

    Returns:
        The evaluation, on the CPU.

    Raises:
        ValueError: If a class is missing, the network has other classes than the set, or another
            number of them, a name in ``reduced`` is unknown, ``batch_size`` is less than 1, or the
            network computes in less than float32.
        TypeError: If the network is no module with ``member_names``.
        FloatingPointError: If a member's logits are no distribution, naming member and row.
    """
    if not isinstance(network, nn.Module) or not hasattr(network, "member_names"):
        raise TypeError(
            f"network must be a torch.nn.Module with member_names, got a {type(network).__name__}: "
            "SingleNetwork(module) makes one of any module"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not allow_missing_classes:
        images.require_every_class()
    known = getattr(network, "class_names", None)
    if known is not None and tuple(known) != images.classes:
        raise ValueError(
            f"the network classifies {listed(known, 3)}, and {images.name} is of "
            f"{listed(images.classes, 3)}: evaluate it on images of its classes"
        )
    names = tuple(network.member_names)
    chosen = tuple(n for n in names if not _is_parent(n)) if reduced is None else tuple(reduced)
    unknown = [name for name in chosen if name not in names]
    if unknown:
        raise ValueError(f"reduced names {unknown[0]!r}, and the members are {', '.join(names)}")
    normalisation = getattr(network, "normalisation", None)
    if normalisation is not None:
        mean, std = normalisation
        images = replace(images, mean=mean, std=std)
    logits = _logits(network, images, batch_size, device)
    labels = images.labels.cpu()
    members = {
        name: Scores(found, logits[name].argmax(dim=1), labels)
        for name, found in log_probabilities(logits).items()
    }
    reductions: dict[str, Scores] = {}
    if len(chosen) > 1:
        for reduction in cast(tuple[Reduction, ...], get_args(Reduction)):
            mixed = predict({name: logits[name] for name in chosen}, reduction)
            reductions[reduction] = Scores(mixed, mixed.argmax(dim=1), labels)
    return Evaluation(images, members, reductions, chosen)


def _logits(
    network: Network, images: ImageSet, batch_size: int, device: torch.device | str | None
) -> dict[str, Tensor]:
    """The logits of all samples by member, on the CPU."""
    assert isinstance(network, nn.Module)  # which a protocol cannot say
    place, dtype = _place(network)
    rows: dict[str, list[Tensor]] = {name: [] for name in network.member_names}
    target = torch.device(device) if device is not None else place
    with _evaluating(network, place, target), torch.autocast(target.type, enabled=False):
        for x, _ in evaluation_batches(images, batch_size):
            found = network(x.to(target, dtype))
            for name, batch in rows.items():
                batch.append(_of_classes(found, name, len(x), images).cpu())
    return {name: torch.cat(batches) for name, batches in rows.items()}


def _of_classes(logits: object, name: str, count: int, images: ImageSet) -> Tensor:
    if not isinstance(logits, Mapping) or name not in logits:
        raise ValueError(
            f"the network returned no logits of {name}: it has this in member_names, and returns "
            "logits by member name"
        )
    expected = (count, len(images.classes))
    if logits[name].shape != expected:
        raise ValueError(
            f"the logits of {name} have shape {tuple(logits[name].shape)}, expected {expected}: "
            f"{images.name} has {len(images.classes)} classes"
        )
    return cast(Tensor, logits[name])


def _place(network: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a network; of one without parameters, what torch makes by default."""
    for parameter in network.parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"the network computes in {parameter.dtype}, and evaluation is in float32: "
                "use network.float(), or its weights as they were before they were rounded"
            )
        return parameter.device, parameter.dtype
    return torch.get_default_device(), torch.float32


@contextmanager
def _evaluating(network: nn.Module, place: torch.device, target: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients on a device; everything is as before afterwards."""
    modes = {module: module.training for module in network.modules()}
    cudnn = torch.backends.cudnn
    tf32, matmul = cudnn.allow_tf32, torch.get_float32_matmul_precision()
    network.eval()
    try:
        if target != place:
            network.to(target)
        cudnn.allow_tf32 = False  # convolutions of float32 have it by default
        torch.set_float32_matmul_precision("highest")
        with torch.no_grad():
            yield
    finally:
        cudnn.allow_tf32 = tf32
        torch.set_float32_matmul_precision(matmul)
        if target != place:
            network.to(place)
        for module, training in modes.items():
            module.training = training
