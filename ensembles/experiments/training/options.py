"""What a training run computes, and how it is executed: two sets of plain values.

`TrainingOptions` are part of a run's identity: a folder belongs to one set of them. `Execution` may
change when a run goes on, and changes no result.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, Literal, TypeAlias, get_args

from ensembles.experiments.training.schedules import Schedule
from ensembles.models.objectives import OBJECTIVES, Joint, Objective, Sum

__all__ = ["Execution", "OptimizerName", "Precision", "TrainingOptions"]

OptimizerName: TypeAlias = Literal["sgd", "adam", "adamw"]
Precision: TypeAlias = Literal["32-true", "64-true", "bf16-mixed"]


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How a run is trained.

    The defaults are the common practice on CIFAR-10: SGD with Nesterov momentum from a rate of 0.1,
    batches of 128 images, 200 epochs, weight decay on all parameters.

    Args:
        seed: Seed of initial weights, batches, augmentations, coins and dropout.
        epochs: How many epochs the run has.
        batch_size: How many images one optimizer step has, on all devices together.
        objective: How member losses become one loss. See
            `ensembles.models.rates.equivalent_hyperparameters` for what it does to the rates.
        optimizer: "sgd", "adam" or "adamw".
        lr: The base rate, which the schedule multiplies.
        momentum: The momentum of "sgd".
        nesterov: Whether "sgd" uses Nesterov momentum.
        weight_decay: The weight decay: an L2 penalty for "sgd" and "adam", decoupled for "adamw".
        eps: The eps of "adam" and "adamw".
        clip_norm: The greatest global norm of the gradient; a larger one is scaled down to it. None
            means no clipping.
        schedule: The rates of all steps, as shares of the base rate.
        order: The order of the images: "shared" is one order for all members, and with "own" each
            member has its own order.
        augment: How images are augmented. "shared": in an epoch, an image looks the same to all
            members. "own": each member sees it differently. None: images are not changed.
        drop_last: Leaves out the images that do not fill a batch; in every epoch these are other
            images. BatchNorm works badly on a last batch of a few images. Validation and evaluation
            leave out no image.
        validation: How many images are kept from training, to validate on after every epoch: a
            share of the set, a whole number of images, or 0 for none.
        split_seed: Seed that chooses the validation images. It is not the seed of the run, so that
            runs with different seeds are validated on the same images.
        precision: "32-true", "64-true", or "bf16-mixed" (bfloat16 autocast).
        channels_last: Stores images and weights with the channels last.
        compile: The backend of torch.compile, such as "inductor"; None means no compilation.
        deterministic: Whether operations that can give another result each time are refused. On a
            CPU, no operation that is used here does that. On a GPU, only a deterministic run
            continues bit by bit.

    Source:
        Zagoruyko and Komodakis 2016, "Wide Residual Networks" (arXiv 1605.07146), section 3: rate,
        momentum, weight decay, batch size and epochs.

    Raises:
        ValueError: If values are out of range or do not fit together.

    Example:
        >>> from ensembles.models.objectives import Interpolated
        >>> options = TrainingOptions(objective=Interpolated(0.5), epochs=10)
        >>> options.to_dict()["objective"]
        {'name': 'interpolated', 'lam': 0.5, 'parent': 'parent'}
        >>> TrainingOptions.from_dict(options.to_dict()) == options
        True
        >>> TrainingOptions(lr=-1)
        Traceback (most recent call last):
        ...
        ValueError: lr must be a finite number above 0, got -1
    """

    seed: int = 0
    epochs: int = 200
    batch_size: int = 128
    objective: Objective = field(default_factory=Sum)
    optimizer: OptimizerName = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    eps: float = 1e-8
    clip_norm: float | None = None
    schedule: Schedule = field(default_factory=Schedule)
    order: Literal["shared", "own"] = "shared"
    augment: Literal["shared", "own"] | None = "shared"
    drop_last: bool = True
    validation: float | int = 0.1
    split_seed: int = 0
    precision: Precision = "32-true"
    channels_last: bool = False
    compile: str | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        for name, kinds in (
            ("optimizer", OptimizerName),
            ("precision", Precision),
            ("order", Literal["shared", "own"]),
            ("augment", Literal["shared", "own", None]),
        ):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(
                    f"{name} must be one of {list(get_args(kinds))}, got {getattr(self, name)!r}"
                )
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        _require(self, "lr", "eps", above=0.0)
        _require(self, "momentum", "weight_decay", "validation", least=0.0)
        if self.clip_norm is not None:
            _require(self, "clip_norm", above=0.0)
        if self.nesterov and not self.momentum and self.optimizer == "sgd":
            raise ValueError("nesterov=True needs a momentum above 0: set nesterov=False")
        if isinstance(self.objective, Joint) and self.order == "own":
            raise ValueError(
                "the joint objective compares the members' predictions of the same images: it "
                'needs order="shared"'
            )
        # A warm-up that is longer than the run is refused now, before the data is loaded.
        self.schedule.share(0, epochs=self.epochs, steps_per_epoch=1)

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values by name, nested."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        names = {kind: name for name, kind in OBJECTIVES.items()}
        kind = type(self.objective)
        name = names.get(kind, f"{kind.__module__}.{kind.__qualname__}")
        values: dict[str, Any] = asdict(self.objective) if is_dataclass(self.objective) else {}
        return found | {
            "objective": {"name": name, **values},
            "schedule": asdict(self.schedule),
        }

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "TrainingOptions":
        """The options from plain values by name.

        Raises:
            ValueError: If a name is unknown, the objective is none of `OBJECTIVES`, or a value is
                refused.
        """
        unknown = sorted(set(options) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(f"unknown training option {', '.join(unknown)}")
        values = dict(options)
        if "objective" in values:
            objective = dict(values["objective"])
            name = objective.pop("name")
            if name not in OBJECTIVES:
                raise ValueError(f"objective must be one of {list(OBJECTIVES)}, got {name!r}")
            values["objective"] = OBJECTIVES[name](**objective)
        if "schedule" in values:
            values["schedule"] = Schedule(**values["schedule"])
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a run is executed.

    Nothing here changes what the run computes, except the number of devices.

    Args:
        accelerator: "auto", "cpu", "gpu" or "mps", as Lightning names them.
        devices: How many devices each host has. Each batch is divided between all of them, and
            BatchNorm sees only its part. A run must continue with as many as it began with.
        nodes: How many hosts there are.
        checkpoint_every: How many optimizer steps are between two checkpoints. The end of every
            epoch has a checkpoint too.
        keep: How many checkpoints stay in the folder.
        progress: Shows a progress bar.
        tensorboard: Logs epochs to TensorBoard too. They are always logged to a CSV file.

    Raises:
        ValueError: If a number is out of range.
    """

    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    checkpoint_every: int = 1000
    keep: int = 2
    progress: bool = True
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name in ("devices", "nodes", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def _require(
    options: TrainingOptions, *names: str, above: float = -math.inf, least: float = -math.inf
) -> None:
    bound = f"above {above:g}" if above > least else f"of at least {least:g}"
    for name in names:
        value = getattr(options, name)
        if not (math.isfinite(value) and value > above and value >= least):
            raise ValueError(f"{name} must be a finite number {bound}, got {value}")
