"""The Lightning module that trains the members of any network with any objective.

It knows nothing of folders: what a step and an epoch gave is offered as rows, which are written by
`ensembles.experiments.training.trainer`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)
from torch.optim import Optimizer

from ensembles.experiments.data.batches import MemberBatches, evaluation_batches
from ensembles.experiments.data.images import ImageSet
from ensembles.experiments.training.checkpoints import (
    PREFIX,
    RUN_KEY,
    generator_states,
    load_matching,
    restore_generators,
)
from ensembles.experiments.training.networks import Network, batch_names
from ensembles.experiments.training.options import TrainingOptions
from ensembles.experiments.training.schedules import make_scheduler
from ensembles.models.objectives import Labels
from ensembles.models.predictions import predict

__all__ = ["ENSEMBLE", "MemberTraining"]

ENSEMBLE = "ensemble"
"""The column of the members' arithmetic mean prediction, the parent left out."""

Batch: TypeAlias = tuple[Tensor | dict[str, Tensor], Tensor | dict[str, Tensor]]
"""Images and labels: one tensor for all members, or one for each."""

Sums: TypeAlias = dict[str, list[float]]
"""Samples, summed loss and correct predictions, by member."""


class MemberTraining(LightningModule):
    """Trains the members of a network.

    Args:
        network: What is trained.
        options: How.
        images: The training images.
        validation: Images to validate on after every epoch, or None.
        run: The run's description, which checkpoints carry.

    Attributes:
        step_row: What the last optimizer step gave, by column; see `step_columns`.
        epoch_row: What the last epoch gave; see `epoch_columns`.
    """

    def __init__(
        self,
        network: Network,
        options: TrainingOptions,
        images: ImageSet,
        validation: ImageSet | None,
        *,
        run: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.network = network
        self.options = options
        self.images = images
        self.validation = validation
        self.run = run
        self.names = tuple(network.member_names)
        if reserved := {"loss", ENSEMBLE} & set(self.names):
            raise ValueError(f"no member can be named {reserved.pop()!r}: it is a column of tables")
        options.objective.asked(self.names, step=0, seed=options.seed)  # refuses other members
        self._own = dict(zip(self.names, batch_names(network), strict=True))
        self.averaged = tuple(name for name in self.names if name != "parent")
        self.step_row: dict[str, Any] = {}
        self.epoch_row: dict[str, Any] = {}
        self._sums: Sums = {}
        self._validated: dict[str, Any] = {}
        self._totals: dict[str, Tensor] = {}
        self._record: tuple[tuple[str, ...], Tensor] | None = None
        self._generators: Mapping[str, Any] | None = None

    @property
    def step_columns(self) -> list[str]:
        """Step (taken so far), epoch, rate, loss, asked members, and the loss of each."""
        losses = [f"{name}/loss" for name in self.names]
        return ["step", "epoch", "lr", "gradient_norm", "asked", "loss", *losses]

    @property
    def epoch_columns(self) -> list[str]:
        """Step, epoch, rate, the objective, and of every member what was measured."""
        rows = [*self.names, *([ENSEMBLE] if len(self.averaged) > 1 else [])]
        phases = ["train", *(["val"] if self.validation is not None else [])]
        return ["step", "epoch", "lr", "train/loss"] + [
            f"{phase}/{name}/{value}"
            for phase in phases
            for name in rows
            for value in ("loss", "accuracy", "n")
        ]

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.options.epochs * len(self.batches)

    # --- set-up ---------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Puts the images where batches are made: on the device."""
        device = self.trainer.strategy.root_device
        own = "own" in (self.options.order, self.options.augment)
        self.batches = MemberBatches(
            self.images.to(device),
            batch_size=self.options.batch_size,
            seed=self.options.seed,
            members=batch_names(self.network) if own else (),
            order=self.options.order,
            augment=self.options.augment,
            drop_last=self.options.drop_last,
            replica=self.global_rank,
            replicas=self.trainer.world_size,
        )
        if self.validation is not None:
            self.validation = self.validation.to(device)

    def train_dataloader(self) -> "_Steps":
        """The batches from the present step to the end of its epoch."""
        return _Steps(self.batches, lambda: self.trainer.global_step)

    def val_dataloader(self) -> "_Evaluation":
        """The validation images, divided between the devices."""
        assert self.validation is not None
        rank, ranks = self.global_rank, self.trainer.world_size
        return _Evaluation(self.validation, self.options.batch_size, rank, ranks)

    def configure_optimizers(self) -> Any:
        """The optimizer and its schedule, which moves after every step."""
        options, parameters = self.options, self.parameters()
        optimizer: Optimizer
        if options.optimizer == "sgd":
            optimizer = torch.optim.SGD(
                parameters,
                lr=options.lr,
                momentum=options.momentum,
                nesterov=options.nesterov,
                weight_decay=options.weight_decay,
            )
        else:
            kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[options.optimizer]
            optimizer = kind(
                parameters, lr=options.lr, eps=options.eps, weight_decay=options.weight_decay
            )
        scheduler = make_scheduler(
            optimizer,
            options.schedule,
            epochs=options.epochs,
            steps_per_epoch=len(self.batches),
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    # --- steps ----------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The objective of one batch, computed from the members that it asks for."""
        x, labels = batch
        step, seed = self.trainer.global_step, self.options.seed
        asked = self.options.objective.asked(self.names, step=step, seed=seed)
        logits = self._logits(x, asked)
        if isinstance(labels, dict):
            labels = {name: labels[self._own[name]] for name in asked}
        try:
            loss = self.options.objective(logits, labels)
        except FloatingPointError as error:
            raise self._diverged(str(error)) from error
        self._record = (
            asked,
            self._measured(loss.detach(), logits, labels, shared=isinstance(x, Tensor)),
        )
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Stops before weights are moved by what is no number."""
        assert self._record is not None
        asked, record = self._record
        # All in one transfer: each one waits for the device.
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.parameters() if p.grad is not None]
        )
        values = self._over_devices(torch.cat([record, norm.detach().to(record)[None]])).tolist()
        norm_value = values.pop() / self.trainer.world_size
        names = ["loss", *asked, *([ENSEMBLE] if len(values) > 3 * (1 + len(asked)) else [])]
        found = {name: values[3 * i : 3 * i + 3] for i, name in enumerate(names)}
        losses = {name: total / n for name, (n, total, _) in found.items()}
        for name in (*asked, "loss"):
            if not math.isfinite(losses[name]):
                what = "the objective" if name == "loss" else f"the loss of {name}"
                raise self._diverged(f"{what} is {losses[name]}")
        if not math.isfinite(norm_value):
            self._require_finite_gradients()
        for name, row in found.items():
            sums = self._sums.setdefault(name, [0.0, 0.0, 0.0])
            self._sums[name] = [a + b for a, b in zip(sums, row, strict=True)]
        self.step_row = {
            "step": self.trainer.global_step + 1,
            "epoch": self.current_epoch,
            "lr": optimizer.param_groups[0]["lr"],
            "gradient_norm": norm_value,
            "asked": " ".join(asked),
            "loss": losses["loss"],
            **{f"{name}/loss": losses[name] for name in asked},
        }

    def on_validation_epoch_start(self) -> None:
        """Begins to count; every device evaluates the statistics that the checkpoint will hold."""
        self._totals = {}
        if self.trainer.world_size > 1:
            for buffer in self.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Counts what each member, and the mean of their predictions, gets right."""
        x, labels = batch
        if not len(labels):
            return
        logits = self._logits(x, self.names)
        for name, row in zip(
            self._measured_names(self.names), self._rows(logits, labels, shared=True), strict=True
        ):
            self._totals[name] = self._totals[name] + row if name in self._totals else row

    def on_validation_epoch_end(self) -> None:
        """Adds up over the devices."""
        names = self._measured_names(self.names)
        zeros = self._sum(torch.zeros(3, device=self.device))
        totals = self._over_devices(torch.stack([self._totals.get(name, zeros) for name in names]))
        self._validated = _shares("val", dict(zip(names, totals.tolist(), strict=True)))

    def on_train_epoch_end(self) -> None:
        """Closes the epoch."""
        sums = dict(self._sums)
        n, total, _ = sums.pop("loss")
        self.epoch_row = {
            "step": self.trainer.global_step,
            "epoch": self.current_epoch,
            "lr": self.step_row["lr"],
            "train/loss": total / n,
            **_shares("train", sums),
            **self._validated,
        }
        self._sums, self._validated = {}, {}

    # --- checkpoints ----------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Puts the generators where they were: nothing is drawn between here and the next step."""
        if self._generators is not None:
            restore_generators(self._generators, self.device)
            self._generators = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what a step depends on and Lightning does not keep."""
        ranks = self.trainer.world_size
        states: list[Any] = [generator_states(self.device)]
        if ranks > 1:
            own, states = states[0], [None] * ranks
            torch.distributed.all_gather_object(states, own)
        checkpoint[RUN_KEY] = {
            "run": dict(self.run),
            "steps": self.steps,
            "sums": {name: list(row) for name, row in self._sums.items()},
            "generators": states,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes it back.

        Raises:
            ValueError: If the network is another one, or the number of devices is.
        """
        own = checkpoint[RUN_KEY]
        ranks, before = self.trainer.world_size, len(own["generators"])
        if ranks != before:
            raise ValueError(
                f"the run began on {before} devices and cannot go on bit by bit on {ranks}: "
                "BatchNorm saw other parts of each batch. Use as many devices, or a new folder."
            )
        state = {n.removeprefix(PREFIX): value for n, value in checkpoint["state_dict"].items()}
        load_matching(cast(nn.Module, self.network), state, source="the checkpoint")
        self._sums = {name: list(row) for name, row in own["sums"].items()}
        self._generators = own["generators"][self.global_rank]

    # --- measures -------------------------------------------------------------------------------

    def _logits(self, x: Tensor | dict[str, Tensor], asked: Sequence[str]) -> dict[str, Tensor]:
        """The logits of some members, each of its own images where it has them."""
        if isinstance(x, Tensor):
            return self.network(self._laid_out(x), asked)
        logits: dict[str, Tensor] = {}
        for name in asked:
            logits |= self.network(self._laid_out(x[self._own[name]]), [name])
        return logits

    def _laid_out(self, x: Tensor) -> Tensor:
        layout = torch.channels_last if self.options.channels_last else torch.contiguous_format
        return x.contiguous(memory_format=layout)

    def _measured_names(self, asked: Iterable[str], *, shared: bool = True) -> list[str]:
        """The members with rows in a record, and their ensemble where it has a prediction."""
        asked = list(asked)
        whole = shared and len(self.averaged) > 1 and set(self.averaged) <= set(asked)
        return [*asked, ENSEMBLE] if whole else asked

    def _rows(self, logits: Mapping[str, Tensor], labels: Labels, *, shared: bool) -> list[Tensor]:
        """Samples, summed loss and correct ones, of each member and of their ensemble."""
        with torch.no_grad():
            rows = []
            for name in self._measured_names(logits, shared=shared):
                classes = labels if isinstance(labels, Tensor) else labels[name]
                if name == ENSEMBLE:
                    scores = predict({n: logits[n].detach() for n in self.averaged})
                    losses = F.nll_loss(scores, classes, reduction="sum")
                else:
                    scores = logits[name].detach()
                    kind = torch.promote_types(scores.dtype, torch.float32)
                    losses = F.cross_entropy(scores.to(kind), classes, reduction="sum")
                correct = (scores.argmax(1) == classes).sum()
                count = torch.tensor(len(classes), device=classes.device)
                rows.append(torch.stack([self._sum(value) for value in (count, losses, correct)]))
            return rows

    def _measured(
        self, loss: Tensor, logits: Mapping[str, Tensor], labels: Labels, *, shared: bool
    ) -> Tensor:
        """The objective's row and those of the members, as one vector."""
        rows = self._rows(logits, labels, shared=shared)
        n = rows[0][0]  # every member has as many samples
        return torch.cat([torch.stack([n, self._sum(loss) * n, torch.zeros_like(n)]), *rows])

    def _sum(self, value: Tensor) -> Tensor:
        """A number to be summed over an epoch: in float64, where the device has it."""
        return value.to(torch.float32 if value.device.type == "mps" else torch.float64)

    def _over_devices(self, values: Tensor) -> Tensor:
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

    # --- what went wrong ------------------------------------------------------------------------

    def _require_finite_gradients(self) -> None:
        for name, parameter in cast(nn.Module, self.network).named_parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                raise self._diverged(
                    f"the losses are finite, and the gradient of {name} is not, by which weights "
                    "would be moved"
                )

    def _diverged(self, what: str) -> FloatingPointError:
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        return FloatingPointError(
            f"training diverged in step {self.trainer.global_step + 1} (epoch "
            f"{self.current_epoch}) at a rate of {rate:.4g}: {what}"
        )


class _Steps:
    """The batches of the epoch in which the present step is, from there to its end.

    Which step it is, is asked for when the first batch is: the step says all, so that a run that
    goes on needs no other state.
    """

    def __init__(self, batches: MemberBatches, step: Callable[[], int]) -> None:
        self._batches = batches
        self._step = step

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        epoch, start = divmod(self._step(), len(self._batches))
        yield from self._batches.epoch(epoch, start=start)

    # Lightning takes what has these two for a loader that can go on in the middle of an epoch.
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class _Evaluation:
    """All validation images; each of several devices has its part of every batch."""

    def __init__(self, images: ImageSet, batch_size: int, rank: int, ranks: int) -> None:
        self._images = images
        self._batch_size = batch_size
        self._part = slice(rank, None, ranks)

    def __len__(self) -> int:
        return -(-len(self._images) // self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, labels in evaluation_batches(self._images, self._batch_size):
            yield x[self._part], labels[self._part]


def _shares(phase: str, sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {
        f"{phase}/{name}/{column}": value
        for name, (n, total, correct) in sums.items()
        for column, value in (("loss", total / n), ("accuracy", correct / n), ("n", int(n)))
    }
