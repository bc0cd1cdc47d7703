"""Checkpoints from which a run goes on bit by bit, and the plain networks that are in them.

A checkpoint is written whole or not at all, is verified before it is used (torch itself does not
notice flipped bits), and is read with ``weights_only=True``: reading one executes nothing.
"""

import io
import random
import re
import sys
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor, nn

from ensembles.experiments.training.networks import (
    Network,
    NetworkOptions,
    build_network,
    member_module,
)
from ensembles.experiments.training.runs import make_folder, write_whole

__all__ = [
    "RUN_KEY",
    "Checkpoint",
    "WholeFileIO",
    "checkpoint_path",
    "convert",
    "generator_states",
    "last_checkpoint",
    "load_matching",
    "load_network",
    "prune_checkpoints",
    "read_checkpoint",
    "restore_generators",
]

RUN_KEY = "ensembles"
"""Where our part is in Lightning's dict."""

PREFIX = "network."
"""The network's place in the training module, and in the state dict of a checkpoint."""

_NAME = re.compile(r"step_(\d+)\.ckpt")
_SHOWN = 5


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, besides what only training needs.

    Attributes:
        path: The file.
        step: Optimizer steps that were taken.
        steps: Optimizer steps of the whole run.
        run: The run's description, as in its folder's options.json.
        state: The network's state dict.
    """

    path: Path
    step: int
    steps: int
    run: Mapping[str, Any]
    state: Mapping[str, Tensor]


class WholeFileIO(CheckpointIO):
    """Writes Lightning's checkpoints whole or not at all, and reads only plain values.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "step_1.ckpt")
        >>> WholeFileIO().save_checkpoint({"state_dict": {"w": torch.ones(2)}}, path)
        >>> WholeFileIO().load_checkpoint(path)
        {'state_dict': {'w': tensor([1., 1.])}}
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Writes beside the file, waits for the disk, and then takes the file's name.

        Raises:
            OSError: If it cannot be written; earlier checkpoints are as they were.
        """
        path = Path(path)
        make_folder(path.parent)
        # In memory first: errors of a file under torch's zip writer end in others of its own.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_whole(path, buffer.getbuffer(), replace=True)

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Reads a file that is whole, as tensors and plain values, whatever is asked for."""
        return _loaded(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Removes the file."""
        Path(path).unlink(missing_ok=True)


def checkpoint_path(folder: Path, step: int) -> Path:
    """The name of the checkpoint after so many steps.

    Example:
        >>> checkpoint_path(Path("checkpoints"), 12).name
        'step_00000012.ckpt'
    """
    return folder / f"step_{step:08d}.ckpt"


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that is whole; None where there is none.

    Args:
        folder: Where checkpoints are. Damaged ones are passed over with a warning: the run then
            goes on from an earlier one, with the same result.
    """
    for _, path in sorted(_numbered(folder), reverse=True):
        fault = _fault(path)
        if fault is None:
            return path
        warnings.warn(f"{path} is damaged ({fault}) and is passed over", stacklevel=2)
    return None


def prune_checkpoints(folder: Path, *, keep: int) -> None:
    """Removes all but the last checkpoints.

    Args:
        folder: Where checkpoints are.
        keep: How many stay: more than one, where a damaged one shall not end the run.
    """
    for _, path in sorted(_numbered(folder), reverse=True)[keep:]:
        path.unlink(missing_ok=True)


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Reads a checkpoint of a training run.

    Args:
        path: The file.

    Returns:
        Its content, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or no checkpoint of a training run.
    """
    path = Path(path)
    loaded = _loaded(path)
    if RUN_KEY not in loaded or "state_dict" not in loaded:
        raise ValueError(
            f"{path} is no checkpoint of `ensembles train`: it holds "
            f"{', '.join(map(str, list(loaded)[:_SHOWN])) or 'nothing'}. Give one from the folder "
            "`checkpoints` of a run, or the run's folder."
        )
    state = {
        name.removeprefix(PREFIX): value
        for name, value in loaded["state_dict"].items()
        if name.startswith(PREFIX)
    }
    own = loaded[RUN_KEY]
    return Checkpoint(path, int(loaded["global_step"]), own["steps"], own["run"], state)


def load_network(path: Path | str) -> Network:
    """Builds the network of a checkpoint and gives it the trained weights.

    Args:
        path: The checkpoint.

    Returns:
        The network on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or its network was not built from `NetworkOptions`.
    """
    checkpoint = read_checkpoint(path)
    options = checkpoint.run["network"]
    if "kind" not in options:
        raise ValueError(
            f"{path} holds a network of the class {options['class']}, which only its own code can "
            "build: build it, and give it to load_matching(network, read_checkpoint(path).state)"
        )
    network = build_network(NetworkOptions.from_dict(options))
    assert isinstance(network, nn.Module)
    load_matching(network, checkpoint.state, source=path)
    network.eval()
    return network


def load_matching(
    module: nn.Module, state: Mapping[str, Tensor], *, source: Path | str = "the state dict"
) -> None:
    """Loads a state dict that has exactly the module's keys and shapes.

    Example:
        >>> load_matching(nn.Linear(2, 3), nn.Linear(2, 4, bias=False).state_dict())
        Traceback (most recent call last):
        ...
        ValueError: the state dict is of another architecture than Linear: 2 of 2 keys differ
          weight  (3, 2) in the network, (4, 2) in the file
          bias    (3,) in the network, missing in the file
        Build the network with the options that it was trained with.

    Args:
        module: Unchanged where they do not match.
        state: The values.
        source: Named in the error.

    Raises:
        ValueError: If keys or shapes differ, naming the first that do.
    """
    own = module.state_dict()
    names = dict.fromkeys([*own, *state])
    differing = [
        (name, _shape(own, name), _shape(state, name))
        for name in names
        if _shape(own, name) != _shape(state, name)
    ]
    if differing:
        shown = differing[:_SHOWN]
        width = max(len(name) for name, *_ in shown)
        lines = [
            f"  {name:<{width}}  {here} in the network, {there} in the file"
            for name, here, there in shown
        ]
        if len(differing) > len(shown):
            lines.append(f"  ... {len(differing) - len(shown)} more")
        raise ValueError(
            f"{source} is of another architecture than {type(module).__name__}: {len(differing)} "
            f"of {len(names)} keys differ\n"
            + "\n".join(lines)
            + "\nBuild the network with the options that it was trained with."
        )
    module.load_state_dict(dict(state))


def convert(checkpoint: Path | str, out: Path | str, *, member: str | None = None) -> None:
    """Writes the network of a training checkpoint as a plain state dict.

    ``torch.load(out, weights_only=True)`` reads it, without Lightning and without this package.

    Args:
        checkpoint: Of a training run.
        out: The new file; an existing one is never overwritten.
        member: Only this member, as a network of its own: the state dict of a plain ResNet. A
            subnet is cut out of its parent.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        FileExistsError: If ``out`` exists.
        ValueError: If the checkpoint is damaged, or there is no such member.
        OSError: If ``out`` cannot be written.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists, and is not overwritten: choose another name")
    state: Mapping[str, Tensor]
    if member is None:
        state = read_checkpoint(checkpoint).state
    else:
        state = member_module(load_network(checkpoint), member).state_dict()
    buffer = io.BytesIO()
    # Contiguous copies: a view would take all of its storage with it.
    torch.save({name: value.contiguous().clone() for name, value in state.items()}, buffer)
    make_folder(out.parent)
    write_whole(out, buffer.getbuffer(), replace=False)


def generator_states(device: torch.device) -> dict[str, Any]:
    """Where this process's global random generators are, as plain values.

    Args:
        device: Whose generator is kept beside those of the CPU.

    Returns:
        What `restore_generators` takes.
    """
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        states["numpy"] = (name, [int(key) for key in keys], *rest)
    return states


def restore_generators(states: Mapping[str, Any], device: torch.device) -> None:
    """Returns the global random generators to where they were.

    Example:
        >>> cpu = torch.device("cpu")
        >>> states = generator_states(cpu)
        >>> first = torch.rand(2)
        >>> restore_generators(states, cpu)
        >>> torch.equal(first, torch.rand(2))
        True

    Args:
        states: From `generator_states`.
        device: As it was there.
    """
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    if "numpy" in states:
        import numpy as np

        np.random.set_state(states["numpy"])


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    named = ((_NAME.fullmatch(path.name), path) for path in folder.glob("step_*.ckpt"))
    return [(int(match[1]), path) for match, path in named if match]


def _shape(state: Mapping[str, Tensor], name: str) -> str:
    return str(tuple(state[name].shape)) if name in state else "missing"


def _fault(path: Path) -> str | None:
    """What is wrong with a file; None if nothing is."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        return str(error)
    return damaged and f"wrong checksum of {damaged}"


def _refused(error: Exception) -> str:
    """What torch refused; the rest of its text is advice to load it all the same."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    return f" ({named[1]})" if named else ""


def _loaded(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    fault = _fault(path)
    if fault is not None:
        raise ValueError(
            f"{path} is no whole checkpoint: {fault}. It was cut off or damaged: take an earlier "
            "one; or it is another file than one of `ensembles train`."
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} holds more than tensors and plain values{_refused(error)}, or is no file of "
            "torch.save, and is not loaded: it might execute something. Save a state dict alone."
        ) from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds an object of type {type(loaded).__name__}, and no dict")
    return loaded
