"""Every member trained together with the others, and by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Unpack

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from ensembles.case import Case
from ensembles.checks.trajectory.claim import STEPS, TrajectoryClaim
from ensembles.checks.trajectory.runs import TrainingTrajectory, run_of
from ensembles.handling.members import is_one_module
from ensembles.handling.state import generators_kept, seed_generators
from ensembles.handling.training import optimizers_of
from ensembles.instruments.divergence import Divergence, divergences
from ensembles.instruments.recording import KINDS
from ensembles.message import aligned, counted
from ensembles.subject import Model, Recipe

__all__ = ["MemberTrajectories", "measure", "measure_member_trajectories"]


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
        found = {name: self.divergences(name) for name in self.alone}
        follow = "the single model" if self.identical else "separate runs"
        bits = sum(not each for each in found.values())
        head = (
            f"{bits} of {counted(self.alone, 'member')} follow {follow} bit by bit for "
            f"{counted(range(self.together.steps), 'step')}"
        )
        rows = [
            (f"member {name}", f"step {each[0].step}", each[0].what, str(each[0]))
            for name, each in found.items()
            if each
        ]
        return "\n".join([head, *(f"  {line}" for line in aligned(rows))])

    def compared(self, name: str) -> tuple[TrainingTrajectory, TrainingTrajectory]:
        """A member's trajectory among the others and alone, as far as they are to be equal."""
        # Under a mean, gradients and an optimizer's memory of them are 1/M of the single model's.
        kinds = KINDS if self.loss == "sum" else ("output", "parameter", "buffer")
        return self.together.member(name).only(*kinds), self.alone[name].only(*kinds)

    def divergences(self, name: str, tolerance: float = 0.0) -> list[Divergence]:
        """Where a member leaves its own run."""
        mine, own = self.compared(name)
        return divergences(mine.entries, own.entries, tolerance)


def measure_member_trajectories(
    model: Case | Model | Callable[[], Model],
    batch: Any = None,
    *,
    identical: bool = False,
    loss_is: Literal["sum", "mean"] = "sum",
    steps: int = STEPS,
    values: bool = False,
    **recipe: Unpack[Recipe],
) -> MemberTrajectories:
    """Trains the ensemble, then every member by itself from the same state, and records both.

    Alone, a member module is called on the batch, its loss is `loss({name: output})`, and the
    optimizer is built for it as for an ensemble of one: for a list or dict with this one member,
    or for the member module where the ensemble is one module.

    Args:
        model: As for `measure_training_trajectory`.
        batch: What the ensemble, and every member alone, is called with.
        identical: Whether to give all members the weights of the first before training. Then the
            first is the single model that all are compared with.
        loss_is: "sum", where member losses are added; "mean", where they are averaged. A mean
            over M members of SGD at (lr, wd) is the single model at (lr / M, M wd), and of Adam
            and AdamW at M eps (and Adam's wd at M wd): so it is trained here.
        steps: How many optimizer steps.
        values: Whether to keep copies of all tensors, which a tolerance needs.
        **recipe: See `Subject`. The loss must accept the outputs of one member. A factor that does
            not depend on the number of members (`/ 4`) is a part of the single model's loss too.

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
    claim = TrajectoryClaim(identical, loss_is, steps=steps)
    return measure(Case.of(model, batch, **recipe), claim, values=values)


def measure(
    case: Case, claim: TrajectoryClaim, *, values: bool | None = None
) -> MemberTrajectories:
    """Both trajectories of every member of a case; values are kept where the claim needs them."""
    if not case.members_known:
        raise ValueError(
            "members are trained alone, but no member modules are known. Give a list or dict of "
            "modules, or members=a function that finds them inside the model."
        )
    values = bool(claim.tolerance) if values is None else values
    holders = case.members
    with generators_kept(), case.preserved():
        seed_generators(case.seed)
        if claim.identical:
            _make_identical(holders)
        together = run_of(case, steps=claim.steps, values=values)
        first = next(iter(holders))
        alone: dict[str, TrainingTrajectory] = {}
        for name in holders:
            if claim.identical and name != first:
                entries = (replace(entry, member=name) for entry in alone[first].entries)
                alone[name] = TrainingTrajectory(case.seed, (name,), tuple(entries))
            else:
                run = run_of(_alone(case, name, claim), steps=claim.steps, values=values)
                alone[name] = run.member(name)
    return MemberTrajectories(
        together=together,
        alone=alone,
        identical=claim.identical,
        loss=claim.loss,
        members_are_one=len({id(m) for m in holders.values()}) < len(holders),
    )


# --- one member alone ---------------------------------------------------------------------------


def _alone(case: Case, name: str, claim: TrajectoryClaim) -> Case:
    """One member as a case of its own, trained as an ensemble of one."""
    given, module = case.subject, case.members[name]
    one = _ensemble_of_one(case.model, name, module)
    count = 1 if claim.loss == "sum" else len(case.members)
    build = None
    if given.optimizer is not None or claim.loss == "mean":
        build = partial(_built, given.optimizer, one, count)
    clip = None if given.clip is None else partial(_clipped, given.clip, one)
    return case.having({name: module}, outputs=None, members=None, optimizer=build, clip=clip)


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
