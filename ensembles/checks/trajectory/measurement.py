"""The measurement of `trajectory`, and its assertions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from ensembles.case import Case
from ensembles.checks.trajectory.claim import TrajectoryClaim
from ensembles.checks.trajectory.runs import (
    STEPS,
    TrainingTrajectory,
    measure_training_trajectory,
)
from ensembles.handling.members import is_one_module, named_members, named_modules_of, new_model
from ensembles.handling.state import generators_kept, preserved, seed_generators
from ensembles.handling.training import hidden_modules, optimizers_of
from ensembles.instruments.divergence import Parting, partings, tolerated
from ensembles.instruments.recording import KINDS
from ensembles.message import aligned, broken, counted, listed
from ensembles.present_run import seed as present_seed
from ensembles.subject import Loss, Members, Model, Outputs
from ensembles.tolerance import Kind

__all__ = [
    "MemberTrajectories",
    "assert_members_trained_alone",
    "measure",
    "measure_member_trajectories",
]

MEAN = 1e-2
"""How far a gradient's norm may be from 1/M to be told as that of a mean: bfloat16 rounds 1/M by up
to 4e-3."""


@dataclass(frozen=True)
class MemberTrajectories:
    """The trajectories of members that were trained together, and of each trained alone.

    Attributes:
        together: Of the whole ensemble.
        alone: By member: the trajectory of that member by itself, or of the single model.
        identical: Whether all members were given the weights of the first: the single model.
        loss: "sum", or "mean" where the single model was trained at the rates to which a mean
            over the members amounts.
        members_are_one: Whether members are one object, and not only of one value.
    """

    together: TrainingTrajectory
    alone: Mapping[str, TrainingTrajectory]
    identical: bool
    loss: str
    members_are_one: bool

    def __str__(self) -> str:
        parted = [name for name in self.alone if self._partings(name, 0.0)]
        follow = "the single model" if self.identical else "separate runs"
        bits = len(self.alone) - len(parted)
        head = (
            f"{bits} of {counted(self.alone, 'member')} follow {follow} bit by bit for "
            f"{counted(range(self.together.steps), 'step')}"
        )
        rows = [_row(name, self._partings(name, 0.0)) for name in parted]
        return "\n".join([head, *(f"  {line}" for line in aligned(rows))])

    def _partings(self, name: str, tolerance: float) -> list[Parting]:
        # Under a mean, gradients and an optimizer's memory of them are 1/M of the single model's.
        kinds = KINDS if self.loss == "sum" else ("output", "parameter", "buffer")
        mine, own = self.together.member(name).only(*kinds), self.alone[name].only(*kinds)
        return partings(mine.entries, own.entries, tolerance, other="that alone")


def measure_member_trajectories(
    make: Callable[[], Model] | Model,
    batch: Any,
    *,
    outputs: Outputs | None = None,
    members: Members | None = None,
    optimizer: Callable[[Any], Any] | None = None,
    loss: Loss | None = None,
    clip: Callable[[Any], Any] | None = None,
    scheduler: Callable[[Any], Any] | None = None,
    identical: bool = False,
    loss_is: Literal["sum", "mean"] = "sum",
    steps: int = STEPS,
    seed: int | None = None,
    values: bool = False,
) -> MemberTrajectories:
    """Trains the ensemble, then every member by itself from the same state, and records both.

    Alone, a member module is called on the batch, its loss is `loss({name: output})`, and the
    optimizer is built for it as for an ensemble of one: for a list or dict with this one member,
    or for the member module where the ensemble is one module.

    Args:
        make: As for `measure_training_trajectory`; so are the others that are not listed.
        batch: What the ensemble, and every member alone, is called with.
        outputs: Splits what one module returns into member outputs.
        members: Finds the member modules inside one module.
        optimizer: Builds the optimizer of the ensemble, and of an ensemble of one.
        loss: The ensemble's loss; it must accept the outputs of one member. A factor that does
            not depend on the number of members (`/ 4`) is a part of the single model's loss too.
        clip: What training does to gradients before each step: a function of the ensemble, and of
            an ensemble of one.
        scheduler: As for `measure_training_trajectory`.
        identical: Whether to give all members the weights of the first before training. Then the
            first is the single model that all are compared with.
        loss_is: "sum", where member losses are added; "mean", where they are averaged. A mean
            over M members of SGD at (lr, wd) is the single model at (lr / M, M wd), and of Adam
            and AdamW at M eps (and Adam's wd at M wd): so it is trained here.
        steps: How many optimizer steps.
        seed: Of construction and of every step.
        values: Whether to keep copies of all tensors, which a tolerance needs.

    Returns:
        Both trajectories of every member.

    Raises:
        ValueError: If there are no member modules, they cannot be given the same weights, or
            nothing can be trained like this.

    Example:
        >>> print(measure_member_trajectories(
        ...     lambda: [nn.Linear(4, 2) for _ in range(3)], torch.randn(5, 4)))
        3 of 3 members follow separate runs bit by bit for 3 steps
    """
    if loss_is not in ("sum", "mean"):
        raise ValueError(f'loss_is={loss_is!r} is unknown: it is "sum" or "mean".')
    seed = present_seed.get() if seed is None else seed
    record = partial(
        measure_training_trajectory,
        loss=loss,
        scheduler=scheduler,
        steps=steps,
        seed=seed,
        values=values,
    )
    with generators_kept():
        seed_generators(seed)
        model = new_model(make) if callable(make) and not isinstance(make, nn.Module) else make
        holders = _members_of(model, members)
        modules = [*named_modules_of(model).values(), *holders.values()]
        with preserved([*modules, *hidden_modules(modules)]):
            if identical:
                _make_identical(holders)
            together = record(
                model, batch, outputs=outputs, members=members, optimizer=optimizer, clip=clip
            )
            first = next(iter(holders))
            alone: dict[str, TrainingTrajectory] = {}
            for name, module in holders.items():
                if identical and name != first:
                    entries = (replace(entry, member=name) for entry in alone[first].entries)
                    alone[name] = TrainingTrajectory(seed, (name,), tuple(entries))
                    continue
                build, one = None, _ensemble_of_one(model, name, module)
                if optimizer is not None or loss_is == "mean":
                    build = partial(_built, optimizer, one, 1 if loss_is == "sum" else len(holders))
                # Without the loss, which the ensemble has in common.
                clipped = None if clip is None else partial(_clipped, clip, one)
                alone[name] = record({name: module}, batch, optimizer=build, clip=clipped).member(
                    name
                )
    return MemberTrajectories(
        together=together,
        alone=alone,
        identical=identical,
        loss=loss_is,
        members_are_one=len({id(m) for m in holders.values()}) < len(holders),
    )


def assert_members_trained_alone(
    trajectories: MemberTrajectories, *, tolerance: float | Kind = 0.0
) -> None:
    """Checks that every member of an ensemble trains as it does alone.

    Args:
        trajectories: From `measure_member_trajectories`.
        tolerance: As in `assert_trajectories_equal`: 0.0 compares bits; a number or a word, such as
            "recomputed", needs `values=True`.

    Raises:
        AssertionError: If a member leaves its own run; it names the step and the tensor.

    Example:
        >>> one = nn.Linear(4, 2)
        >>> assert_members_trained_alone(measure_member_trajectories([one, one], torch.ones(5, 4)))
        Traceback (most recent call last):
        AssertionError: members 0, 1 are claimed to train as they do alone, and do not
        ...
    """
    __tracebackhide__ = True
    runs = (trajectories.together, *trajectories.alone.values())
    allowed = tolerated(tolerance, *(run.entries for run in runs))
    parted = {
        name: found
        for name in trajectories.alone
        if (found := trajectories._partings(name, allowed))
    }
    if not parted:
        return
    first = min((found[0] for found in parted.values()), key=_rank)
    meaning, remedy = _told(trajectories, first)
    claim = "to follow the single model" if trajectories.identical else "to train as they do alone"
    if trajectories.loss == "mean":
        claim += " at the rates of a mean loss"
    raise AssertionError(
        broken(
            f"members {listed(list(trajectories.alone))} are claimed {claim}, and do not",
            [_row(name, found) for name, found in parted.items()],
            total=f"{len(parted)} of {counted(trajectories.alone, 'member')}, compared "
            f"{f'within {allowed:.3g}' if allowed else 'bit by bit'}",
            meaning=meaning,
            remedy=remedy,
        )
    )


# --- what is told ------------------------------------------------------------------------------


def _rank(parting: Parting) -> tuple[int, int]:
    """What was computed first explains what came later, also in other members."""
    return parting.step, KINDS.index(parting.kind)


def _row(name: str, parted: Sequence[Parting]) -> tuple[str, ...]:
    return f"member {name}", *parted[0].row, f"{len(parted)} values differ"


def _told(trajectories: MemberTrajectories, first: Parting) -> tuple[str, str]:
    """What it means, and the usual cause."""
    count = len(trajectories.alone)
    if trajectories.members_are_one:
        return (
            "Members are one network: the gradients of all streams add up, and BatchNorm is "
            f"updated {count} times a step.",
            "Usual cause: [model] * n, or one network run n times. Build each member anew.",
        )
    if first.kind == "gradient" and abs(first.ratio * count - 1) < MEAN:
        return (
            f"Every member's gradient is 1/{count} of what it is alone: under SGD this is the "
            f"learning rate divided by {count}, and weight decay times {count}.",
            "Usual cause: the mean over members. Sum their losses, or train at lr times "
            f"{count} and weight decay divided by {count}, and claim the mean.",
        )
    causes = {
        "output": "Usual cause: members that read each other, a layer or statistics in common, "
        "or an ensemble that feeds its members, or returns of them, something else than their "
        "own call does.",
        "gradient": "Usual cause: a loss that couples the members (the loss of the mean "
        "prediction), weights in common, or a factor on the loss.",
        "parameter": "Usual cause: one gradient norm clipped over all members, a weight in "
        "common, or groups with other rates. Clip each member by itself.",
        "buffer": "Usual cause: a BatchNorm that several members update. Give each its own.",
    }
    return (
        "The members of this ensemble become other models than they would be alone.",
        causes.get(
            first.kind,
            "Usual cause: optimizer state that members have in common.",
        ),
    )


# --- the runs ----------------------------------------------------------------------------------


def _members_of(model: Model, members: Members | None) -> dict[str, nn.Module]:
    if is_one_module(model) and members is None:
        raise ValueError(
            "members are trained alone, and no member modules are known. Give a list or dict of "
            "modules, or members=a function that finds them inside the model."
        )
    return named_members(model, members)


def _make_identical(holders: Mapping[str, nn.Module]) -> None:
    (first, source), *rest = holders.items()
    given = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    for name, module in rest:
        taken = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        shapes = [{n: t.shape for n, t in tensors.items()} for tensors in (given, taken)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"members {first} and {name} cannot be given the same weights, because their "
                "parameters or buffers have other names or shapes. Compare each with its own "
                'run: claim {"members": "separate"}.'
            )
        with torch.no_grad():
            for place, tensor in taken.items():
                if tensor is not given[place]:
                    tensor.copy_(given[place])


def _ensemble_of_one(model: Model, name: str, module: nn.Module) -> Any:
    """What the ensemble's own optimizer function takes, with one member."""
    if is_one_module(model):
        return module
    if isinstance(model, nn.ModuleList):
        return nn.ModuleList([module])
    if isinstance(model, nn.ModuleDict):
        return nn.ModuleDict({name: module})
    return {name: module} if isinstance(model, Mapping) else [module]


def _clipped(clip: Callable[[Any], Any], one: Any, _: Model) -> None:
    """Clips the gradients of one member as those of an ensemble of one."""
    clip(one)


def _built(
    optimizer: Callable[[Any], Any] | None, one: Any, count: int, _: Model
) -> list[Optimizer]:
    """The optimizer of one member, at the rates to which a mean over `count` members amounts."""
    if optimizer is None:
        raise ValueError("a mean loss rescales the optimizer's rates: give optimizer=...")
    built = optimizers_of(optimizer, one)
    for each in built if count > 1 else ():
        if type(each) not in (SGD, Adam, AdamW):
            raise ValueError(
                "what a mean loss amounts to is known for SGD, Adam and AdamW, and not for "
                f"{type(each).__name__}. Compare trajectories at rates of your own: "
                "assert_trajectories_equal."
            )
        for group in each.param_groups:
            if isinstance(each, SGD):
                group["lr"] /= count
            else:
                group["eps"] *= count
            if not isinstance(each, AdamW):
                group["weight_decay"] *= count
    return list(built)


def measure(case: Case, claim: TrajectoryClaim) -> MemberTrajectories:
    """What `trajectory` looks at, for this claim."""
    __tracebackhide__ = True
    given = case.subject
    return measure_member_trajectories(
        case.model,
        case.batch,
        outputs=given.outputs,
        members=given.members,
        optimizer=given.optimizer,
        loss=given.loss,
        clip=given.clip,
        scheduler=given.scheduler,
        steps=claim.steps,
        identical=claim.identical,
        loss_is=claim.loss,
        values=bool(claim.tolerance),
    )
