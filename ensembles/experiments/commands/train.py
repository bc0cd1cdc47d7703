"""`ensembles train`: any network with any objective, in a folder from which a run goes on."""

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
    """Trains a network, or goes on with a run that was stopped.

    Validation images are taken from the training set; the test set is never seen. A run that was
    killed at any moment goes on when the same command is given again, and ends with the bits of
    one that was never killed. The folder then has options.json, epochs.csv (accuracies are
    fractions, losses nats), steps.csv, checkpoints, and TensorBoard's files.

    Args:
        folder: Where the run is kept. It holds one run: another one needs another folder.
        data: The training set: digits, cifar10, cifar10_lossless or cifar10_jpeg.
        objective: How member losses become one loss: their sum or mean; interpolated, lam * parent
            + (1 - lam) * mean of the subnets; stochastic, the parent with probability p and
            otherwise subnets; mean_field, the mean over the groups of one network; joint, with
            weight beta on the loss of the mean prediction.
        lam: For the objective interpolated only: the weight of the parent, 0 to 1.
        p: For the objective stochastic only: the probability of the parent, 0 to 1.
        beta: For the objective joint only: the weight of the mean prediction's loss, 0 to 1.
        subnets: For the objective stochastic only: whether all subnets are trained in a step, or
            one that is drawn; all by default.
        seed: Of initial weights, batches, augmentations, coins and dropout.
        deterministic: Refuses operations whose result is not the same each time; on a GPU a run
            goes on bit by bit only with it.
        root: Folder of images; by default that of the variable ENSEMBLES_DATA, else
            ~/.cache/ensembles.
        download: Fetches the set where it is missing (cifar10).
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
    # Lightning: after what may be refused.
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
    already = "this run was finished already, nothing was trained: " * (done.checkpoint == before)
    print(f"{already}{done.steps:,} steps, accuracies of the last epoch:")
    print("\n".join(f"  {line}" for line in aligned(rows)))
    print(f"{folder}: evaluate it by `ensembles evaluate --model {folder} --data ...`")
    return 0


def _objective(name: str, given: dict[str, Any]) -> Objective:
    """The objective with what was given for it."""
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
