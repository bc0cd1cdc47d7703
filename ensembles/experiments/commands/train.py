"""`ensembles train`: any network with any objective, in a folder that can be continued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from ensembles.experiments.commands.parsing import parser_of, values_of
from ensembles.experiments.training.networks import NetworkOptions
from ensembles.experiments.training.options import Execution, TrainingOptions
from ensembles.message import aligned
from ensembles.models.objectives import OBJECTIVES, Objective

__all__ = ["main", "parser", "run"]

EXAMPLE = (
    "ensembles train runs/four --data digits --network.kind ensemble --network.members 4 \\\n"
    "    --network.base_channels 8 --training.epochs 10 --seed 1"
)


def run(
    folder: Path,
    *,
    data: str,
    objective: Literal["sum", "mean", "interpolated", "stochastic", "mean_field", "joint"] = "sum",
    lam: float | None = None,
    p: float | None = None,
    beta: float | None = None,
    subnets: Literal["all", "one"] | None = None,
    seed: int = 0,
    deterministic: bool = False,
    root: Path | None = None,
    download: bool = False,
    network: NetworkOptions,
    training: TrainingOptions,
    execution: Execution,
) -> int:
    """Trains a network, or continues a run that was stopped.

    Validation images are taken from the training set; the test set is never used. If a run was
    killed at any moment, give the same command again: the run continues, and it ends with the same
    bits as a run that was never killed. The folder then has options.json, epochs.csv (accuracies
    are fractions, losses are in nats), steps.csv, checkpoints, and TensorBoard's files.

    Args:
        folder: Where the run is kept. A folder holds one run: another run needs another folder.
        data: The training set: digits, cifar10, cifar10_lossless or cifar10_jpeg.
        objective: How member losses become one loss. "sum" and "mean" add or average them.
            "interpolated" is lam * parent + (1 - lam) * mean of the subnets. "stochastic" trains
            the parent with probability p, and otherwise subnets. "mean_field" is the mean over the
            groups of one network. "joint" puts the weight beta on the loss of the mean prediction.
        lam: For the objective "interpolated" only: the weight of the parent, 0 to 1.
        p: For the objective "stochastic" only: the probability of the parent, 0 to 1.
        beta: For the objective "joint" only: the weight of the mean prediction's loss, 0 to 1.
        subnets: For the objective "stochastic" only: "all" trains all subnets in a step, "one"
            trains one that is drawn. If not given, it is "all".
        seed: Seed of initial weights, batches, augmentations, coins and dropout.
        deterministic: Refuses operations that can give another result each time. On a GPU, only
            such a run continues bit by bit.
        root: Folder of images. If not given, it is the environment variable ENSEMBLES_DATA, or
            ~/.cache/ensembles if that is not set either.
        download: Downloads the set if it is missing (cifar10 only).
        network: What is built.
        training: What is computed.
        execution: How it is computed; changes no result.

    Returns:
        The exit status.
    """
    from ensembles.experiments.data.sources import load_images

    chosen = _objective(objective, {"lam": lam, "p": p, "beta": beta, "subnets": subnets})
    kept = training.validation
    if kept >= 1 and float(kept).is_integer():  # jsonargparse reads every number as a float
        training = replace(training, validation=int(kept))
    options = replace(training, objective=chosen, seed=seed, deterministic=deterministic)
    images = load_images(data, "train", root=root, download=download)
    # Imported late, because it imports Lightning: what can be refused is refused before.
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    from ensembles.experiments.training.checkpoints import last_checkpoint
    from ensembles.experiments.training.trainer import train

    before = last_checkpoint(folder / "checkpoints")
    done = train(network, options, images, folder, execution=execution)
    if getattr(rank_zero_only, "rank", 0):  # of several processes one tells
        return 0
    last = done.epochs()[-1]
    rows = [
        (name.removesuffix("/accuracy"), f"{100 * value:.2f} %")
        for name, value in last.items()
        if name.endswith("/accuracy")
    ]
    already = "this run was already finished, so nothing was trained: " * (
        done.checkpoint == before
    )
    print(f"{already}{done.steps:,} steps, accuracies of the last epoch:")
    print("\n".join(f"  {line}" for line in aligned(rows)))
    print(f"{folder}: evaluate it with `ensembles evaluate --model {folder} --data ...`")
    return 0


def _objective(name: str, given: dict[str, Any]) -> Objective:
    """The objective with the options that were given for it."""
    kind = OBJECTIVES[name]
    own = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    values = {key: value for key, value in given.items() if value is not None}
    for key in values:
        if key not in own:
            raise ValueError(f"--{key} has no meaning for the objective {name}: leave it out")
    for key, field in own.items():
        if field.default is MISSING and key not in values:
            raise ValueError(f"the objective {name} needs --{key}, a number from 0 to 1")
    return kind(**values)


def parser() -> ArgumentParser:
    """The command's options."""
    return parser_of(
        "train",
        run,
        example=EXAMPLE,
        classes={
            "network": (NetworkOptions, set()),
            "training": (TrainingOptions, {"objective", "seed", "deterministic"}),
            "execution": (Execution, set()),
        },
    )


def main(arguments: Sequence[str]) -> int:
    """Runs the command."""
    return run(**values_of(parser(), arguments))
