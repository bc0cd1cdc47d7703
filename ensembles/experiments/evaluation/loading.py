"""Networks to be evaluated, from what a user calls them by: a name, a run, a checkpoint, several.

What is loaded comes with where it is from, so that a result can say it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from ensembles.experiments.data.downloads import sha256_of
from ensembles.experiments.data.sources import CLASS_NAMES, data_folder
from ensembles.experiments.evaluation.pretrained import PRETRAINED, load_pretrained
from ensembles.experiments.evaluation.results import WeightFile
from ensembles.experiments.training.checkpoints import (
    last_checkpoint,
    load_network,
    read_checkpoint,
)
from ensembles.experiments.training.networks import Network

__all__ = ["CombinedNetwork", "LoadedNetwork", "checkpoint_of", "load_named"]


@dataclass(frozen=True)
class LoadedNetwork:
    """A network with where it is from.

    Attributes:
        name: What to call it.
        network: The network, in evaluation mode on the CPU.
        options: What it was built from, as plain values.
        weights: The files that its weights were read from.
    """

    name: str
    network: Network
    options: Mapping[str, Any]
    weights: tuple[WeightFile, ...]


class CombinedNetwork(nn.Module):
    """Networks that were trained apart, as the members of one ensemble.

    Example:
        >>> from ensembles.experiments.training.networks import NamedEnsemble, SingleNetwork
        >>> two = NamedEnsemble([nn.Linear(4, 2), nn.Linear(4, 2)])
        >>> CombinedNetwork({"a": SingleNetwork(nn.Linear(4, 2)), "b": two}).member_names
        ('a', 'b.member_0', 'b.member_1')

    Args:
        networks: By name. The members of those that have several are called name.member.

    Raises:
        ValueError: If they were trained on images that were normalised differently, or have other
            classes.
    """

    def __init__(self, networks: Mapping[str, Network]) -> None:
        super().__init__()
        found = [getattr(network, "normalisation", None) for network in networks.values()]
        if any(normalisation != found[0] for normalisation in found):
            raise ValueError(
                f"{', '.join(networks)} take images that are normalised differently: evaluate "
                "them one by one"
            )
        self.normalisation = found[0]
        classes = [known for n in networks.values() if (known := getattr(n, "class_names", None))]
        if any(known != classes[0] for known in classes):
            raise ValueError(
                f"{', '.join(networks)} classify different things: they are no ensemble"
            )
        self.class_names = classes[0] if classes else None
        self.labels = list(networks)
        self.networks = nn.ModuleList(cast(Iterable[nn.Module], networks.values()))

    @property
    def member_names(self) -> tuple[str, ...]:
        """The names of all members, in the order of the logits."""
        return tuple(name for names in self._names() for name in names.values())

    def forward(self, x: Tensor, members: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Computes the logits (sample, class) by member; of the asked members only."""
        asked = set(self.member_names if members is None else members)
        found: dict[str, Tensor] = {}
        for network, names in zip(self.networks, self._names(), strict=True):
            inner = [own for own, name in names.items() if name in asked]
            if inner:
                logits = network(x, inner)
                found |= {names[own]: logits[own] for own in inner}
        return found

    def _names(self) -> list[dict[str, str]]:
        """For each network, its own member names with their names here."""
        names = []
        for label, network in zip(self.labels, self.networks, strict=True):
            own = cast(Network, network).member_names
            names.append({n: label if len(own) == 1 else f"{label}.{n}" for n in own})
        return names


def load_named(names: Sequence[str], *, root: Path | str | None = None) -> LoadedNetwork:
    """Loads a network by name, or several as one ensemble.

    Args:
        names: Each a key of `PRETRAINED`, the folder of a run of `ensembles train`, whose last
            checkpoint is taken, or a checkpoint.
        root: The folder of data files, in which ``pretrained`` has the published weights; see
            `ensembles.experiments.data.sources.data_folder`.

    Returns:
        The network, in evaluation mode.

    Raises:
        ValueError: If a name is none of these or there twice, or a file is damaged.
        FileNotFoundError: If the file of a pretrained network is missing.
    """
    if not names:
        raise ValueError("name at least one model")
    for name in names:
        if list(names).count(name) > 1:
            raise ValueError(
                f"{name} is there {list(names).count(name)} times: one network is no ensemble"
            )
    parts = [_load(name, root) for name in names]
    if len(parts) == 1:
        return parts[0]
    labels = [part.name for part in parts]
    if len(set(labels)) < len(labels):  # runs of one name in several folders
        labels = [str(Path(name)) for name in names]
    return LoadedNetwork(
        "+".join(labels),
        CombinedNetwork({label: part.network for label, part in zip(labels, parts, strict=True)}),
        {label: dict(part.options) for label, part in zip(labels, parts, strict=True)},
        tuple(weights for part in parts for weights in part.weights),
    )


def checkpoint_of(place: Path | str) -> Path:
    """A checkpoint itself, or the last one of a run's folder.

    Raises:
        FileNotFoundError: If there is none.
    """
    place = Path(place)
    if not place.is_dir():
        return place
    found = last_checkpoint(place / "checkpoints") or last_checkpoint(place)
    if found is None:
        raise FileNotFoundError(
            f"{place} has no checkpoint: it is no folder of `ensembles train`, or its run was "
            "stopped before the first"
        )
    return found


def _load(name: str, root: Path | str | None) -> LoadedNetwork:
    if name in PRETRAINED:
        folder = data_folder(root) / "pretrained"
        weights = PRETRAINED[name]
        network = load_pretrained(name, folder)
        return LoadedNetwork(
            name,
            network,
            {"architecture": "CifarResNet", "depth": weights.depth, "classes": 10},
            (WeightFile(file=weights.file, sha256=weights.sha256),),
        )
    if not Path(name).exists():
        raise ValueError(
            f"there is no model {name!r}: name a pretrained network ({', '.join(PRETRAINED)}), or "
            "give the path of a run's folder or of a checkpoint"
        )
    path = checkpoint_of(name)
    checkpoint = read_checkpoint(path)
    run = path.parent.parent if path.parent.name == "checkpoints" else path.with_suffix("")
    trained = load_network(path)
    # A number of classes alone would let a network of digits be evaluated on airplanes.
    trained_on = checkpoint.run["data"]["name"]
    cast(Any, trained).class_names = CLASS_NAMES.get(trained_on)
    return LoadedNetwork(
        run.resolve().name,
        trained,
        {**checkpoint.run, "step": checkpoint.step},
        (WeightFile(file=path.name, sha256=sha256_of(path)),),
    )
