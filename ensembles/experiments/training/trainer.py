"""Trains any network with any objective, on Lightning, and goes on where a killed run was.

The batch, the coin of the stochastic objective and the rate of every step are functions of the
seed and the number of the step; all else that a step depends on (weights, statistics, momentum,
generators, sums of the epoch) is in the checkpoint. The last checkpoint is the result: none is
chosen, and the test set is never seen.
"""

import logging
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from ensembles.experiments.data.draws import words
from ensembles.experiments.data.images import ImageSet
from ensembles.experiments.data.sources import split_validation
from ensembles.experiments.training.checkpoints import (
    WholeFileIO,
    checkpoint_path,
    last_checkpoint,
    prune_checkpoints,
    read_checkpoint,
)
from ensembles.experiments.training.member_training import MemberTraining
from ensembles.experiments.training.networks import Network, NetworkOptions, build_network
from ensembles.experiments.training.options import Execution, TrainingOptions
from ensembles.experiments.training.runs import Run, RunFolder, Table
from ensembles.handling.state import generators_kept, seed_generators

__all__ = ["Execution", "TrainingOptions", "train"]

FEW = 16
"""Images on a device; of fewer, BatchNorm's statistics cost accuracy.

Wu and He 2018, "Group Normalization" (arXiv 1803.08494), figure 1: as good at 16 as at 32.
"""

# Lightning's warnings that say nothing here, each by its words.
_NOISE = (
    "GPU available but not used",  # Execution(accelerator="cpu") was asked for
    "The number of training batches .* is smaller than the logging interval",  # we log ourselves
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # Lightning's own use of torch
    "find_unused_parameters=True was specified",  # the coin may ask for all members in a step
)


def train(
    network: NetworkOptions | Network,
    options: TrainingOptions,
    images: ImageSet,
    folder: Path | str,
    *,
    execution: Execution | None = None,
) -> Run:
    """Trains a network, or goes on with a run of the same options that was killed.

    The run that goes on ends with the bits of the run that was never killed: weights, statistics,
    optimizer state and tables. A run that is finished is returned as it is.

    In the folder there will be ``options.json``, ``checkpoints/``, ``epochs.csv``, ``steps.csv``
    (what every optimizer step asked for, and its losses), and TensorBoard's files.

    Args:
        network: What to build, or a network of one's own, which is trained in place.
        options: What to compute.
        images: The training set. The validation set is taken from it.
        folder: Of this run, and of no other.
        execution: How to compute it.

    Returns:
        The finished run.

    Raises:
        ValueError: If the images are a test set, the classes are not the network's, or the folder
            is another run's or holds other things.
        FloatingPointError: If a loss or gradient is NaN or infinite: before weights are moved by
            it, naming step and member. The last good checkpoint is kept.
        RuntimeError: If another process trains in the folder.
        OSError: If the disk is full. All that was written before is whole.
        KeyboardInterrupt: If it is interrupted, saying where the same call goes on.

    Example:
        >>> import tempfile
        >>> from ensembles.experiments.data.sources import load_images
        >>> run = train(
        ...     NetworkOptions(kind="ensemble", members=2, base_channels=2),
        ...     TrainingOptions(epochs=1, batch_size=50),
        ...     load_images("digits", "train").select(range(100)),
        ...     tempfile.mkdtemp(),
        ...     execution=Execution(accelerator="cpu", progress=False, tensorboard=False),
        ... )
        >>> run.steps, run.finished, run.epochs()[0]["train/member_1/n"]
        (1, True, 50)
    """
    execution = execution or Execution()
    if images.split == "test":
        raise ValueError(f"{images.name} is a test set: nothing is trained on it")
    description, module = _built(network, options, images)
    training, validation = images, None
    if options.validation:
        training, validation = split_validation(images, options.validation, options.split_seed)
    run_folder = RunFolder(folder, description)
    run = run_folder.description
    member_training = MemberTraining(module, options, training, validation, run=run)
    keeper = _Keeper(run_folder, execution)
    with ExitStack() as stack:
        stack.enter_context(generators_kept())
        stack.enter_context(_torch_settings_kept())
        stack.enter_context(_quiet())
        trainer = _trainer(member_training, keeper, run_folder, execution)
        if trainer.is_global_zero:
            stack.enter_context(run_folder.locked())
            run_folder.claim()
            run_folder.tidy()
        last = last_checkpoint(run_folder.checkpoints)
        if last is not None and (done := _run(run_folder, last)).finished:
            return done
        if trainer.is_global_zero:
            if few := _few_in_the_last_batch(member_training, trainer.world_size):
                warnings.warn(few, stacklevel=2)
            keeper.begin(member_training, 0 if last is None else read_checkpoint(last).step)
        # After the weights were drawn, which have seeds of their own.
        seed_generators(int(words(1, "training", options.seed, trainer.global_rank)[0]) >> 1)
        try:
            with _interrupts_raised():
                trainer.fit(member_training, ckpt_path=None if last is None else str(last))
        except FloatingPointError as error:
            good = last_checkpoint(run_folder.checkpoints)
            kept = f"The last good checkpoint is {good}" if good else "There is no checkpoint yet"
            raise FloatingPointError(f"{error}\n{kept}. Usual cause: too high a rate.") from error
        except KeyboardInterrupt as error:
            good = last_checkpoint(run_folder.checkpoints)
            raise KeyboardInterrupt(
                f"interrupted; given again, the same goes on {f'from {good}' if good else 'anew'}"
            ) from error
        last = last_checkpoint(run_folder.checkpoints)
        assert last is not None
        return _run(run_folder, last)


class _Keeper(CheckpointCallback):
    """Writes tables and checkpoints: first the rows of all steps so far, then their checkpoint."""

    def __init__(self, folder: RunFolder, execution: Execution) -> None:
        self._folder = folder
        self._execution = execution
        self._tables: list[Table] = []

    def begin(self, module: MemberTraining, step: int) -> None:
        """Cuts the tables back to where the run goes on."""
        self._tables = [
            Table(self._folder.path / "steps.csv", module.step_columns),
            Table(self._folder.path / "epochs.csv", module.epoch_columns),
        ]
        for table in self._tables:
            table.cut(step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes a checkpoint when it is time, except at an epoch's end, which has its own."""
        module = cast(MemberTraining, pl_module)
        self._append(0, module.step_row)
        in_epoch = trainer.global_step % len(module.batches)
        if in_epoch and trainer.global_step % self._execution.checkpoint_every == 0:
            self._save(trainer)

    # Lightning calls this for checkpoint callbacks after the module's own hook.
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the epoch's row, and its checkpoint."""
        row = cast(MemberTraining, pl_module).epoch_row
        self._append(1, row)
        for logger in trainer.loggers:
            logger.log_metrics({k: v for k, v in row.items() if k != "step"}, row["step"])
        self._save(trainer)

    def _append(self, table: int, row: dict[str, Any]) -> None:
        if self._tables:
            self._tables[table].append(row)

    def _save(self, trainer: Trainer) -> None:
        for table in self._tables:
            table.flush()
        for logger in trainer.loggers:
            logger.save()
        trainer.save_checkpoint(checkpoint_path(self._folder.checkpoints, trainer.global_step))
        if trainer.is_global_zero:
            prune_checkpoints(self._folder.checkpoints, keep=self._execution.keep)


class _ProgressBar(TQDMProgressBar):
    """Shows the loss and the last validation accuracies."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The numbers beside the bar; none of them waits for the device."""
        module = cast(MemberTraining, pl_module)
        shown = {"loss": f"{module.step_row.get('loss', float('nan')):.4f}"}
        accuracies = [
            value
            for name, value in module.epoch_row.items()
            if name.startswith("val/") and name.endswith("/accuracy")
        ]
        if accuracies:
            shown["val_acc"] = f"{accuracies[-1]:.4f}"
        return shown


def _built(
    network: NetworkOptions | Network, options: TrainingOptions, images: ImageSet
) -> tuple[dict[str, Any], Network]:
    """The run's description, and the network."""
    if isinstance(network, NetworkOptions):
        if hasattr(options.objective, "parent") and network.kind != "subnets":
            raise ValueError(
                f"the objective {options.to_dict()['objective']['name']} trains a parent and its "
                f"subnets, and a network of kind {network.kind!r} has none: set kind='subnets' "
                "(--network.kind subnets --network.width 2)"
            )
        if network.classes != len(images.classes):
            raise ValueError(
                f"the network has {network.classes} classes, and {images.name} has "
                f"{len(images.classes)}: set classes={len(images.classes)}"
            )
        about: dict[str, Any] = network.to_dict()
        built = build_network(network, seed=options.seed)
    else:
        built = network
        about = {
            "class": f"{type(network).__module__}.{type(network).__qualname__}",
            "members": list(network.member_names),
            "weights": _digest(cast(nn.Module, network)),
        }
    module = cast(nn.Module, built)
    if options.channels_last:
        module.to(memory_format=torch.channels_last)
    if options.compile is not None:
        try:
            module.compile(backend=options.compile)
        except RuntimeError as error:
            told = str(error).splitlines()[0]
            raise ValueError(f"compile={options.compile!r} cannot be used: {told}") from error
    data = {name: getattr(images, name) for name in ("name", "version", "split", "sha256")} | {
        "images": len(images)
    }
    return {"format": 1, "network": about, "training": options.to_dict(), "data": data}, built


def _trainer(
    module: MemberTraining, keeper: "_Keeper", folder: RunFolder, execution: Execution
) -> Trainer:
    options = module.options
    strategy: Any = "auto"
    if execution.devices * execution.nodes > 1:
        strategy = DDPStrategy(find_unused_parameters=_leaves_members_out(module))
    callbacks: list[Any] = [keeper, *([_ProgressBar()] if execution.progress else [])]
    logger: Any = False
    if execution.tensorboard:
        logger = TensorBoardLogger(folder.path, name="", version="tensorboard")
    try:
        return Trainer(
            accelerator=execution.accelerator,
            devices=execution.devices,
            num_nodes=execution.nodes,
            strategy=strategy,
            precision=options.precision,
            deterministic=options.deterministic,
            max_epochs=options.epochs,
            gradient_clip_val=options.clip_norm,
            plugins=[WholeFileIO()],
            callbacks=callbacks,
            logger=logger,
            default_root_dir=folder.path,
            limit_val_batches=None if module.validation is not None else 0,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_progress_bar=execution.progress,
        )
    except MisconfigurationException as error:
        raise ValueError(
            f"accelerator={execution.accelerator!r} with devices={execution.devices} cannot be "
            f"used: {str(error).splitlines()[0]} Take accelerator='cpu', or 'auto'."
        ) from error


def _leaves_members_out(module: MemberTraining) -> bool:
    """Whether some step computes not all members, so that parameters have no gradient in it."""
    options, names = module.options, module.names
    steps = options.epochs * -(-len(module.images) // options.batch_size)
    return any(
        len(options.objective.asked(names, step=step, seed=options.seed)) < len(names)
        for step in range(steps)
    )


def _few_in_the_last_batch(module: MemberTraining, devices: int) -> str:
    """Says that every epoch ends with far fewer images than BatchNorm needs; "" where it is not."""
    count, batch = len(module.images), module.options.batch_size
    last = 0 if module.options.drop_last else count % batch
    few = 0 < last < min(FEW * devices, batch / 2)
    if not few or not any(isinstance(part, BatchNorm) for part in module.modules()):
        return ""
    return (
        f"the last batch of every epoch has {last} of {count} images, the others {batch}: the "
        "statistics that BatchNorm takes of it are far from those of the others, and training may "
        "suffer. Set drop_last=True, or a batch_size that leaves no such rest"
    )


def _run(folder: RunFolder, last: Path) -> Run:
    checkpoint = read_checkpoint(last)
    return Run(folder.path, last, checkpoint.step, checkpoint.step >= checkpoint.steps)


def _digest(module: nn.Module) -> str:
    digest = sha256()
    for name, value in module.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _torch_settings_kept() -> Iterator[None]:
    """Undoes what Lightning sets for the whole process."""
    variable = "CUBLAS_WORKSPACE_CONFIG"
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        os.environ.get(variable),
    )
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = before[2]
        if before[3] is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = before[3]


@contextmanager
def _interrupts_raised() -> Iterator[None]:
    """Undoes that Lightning makes an interrupt a silent exit, and is deaf to all later ones."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as left:
        if isinstance(left.__context__, KeyboardInterrupt):
            raise left.__context__ from None
        raise
    finally:
        if signal.getsignal(signal.SIGINT) is not handler:
            signal.signal(signal.SIGINT, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's advice and notices of what it does."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            for message in _NOISE:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
