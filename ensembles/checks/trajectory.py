"""Promise: training runs that are claimed to be the same run are, step by step and bit by bit.

Catches what changes a training run that should have stayed the same: a loss that is averaged
where it was summed, an optimizer with other groups, statistics that are updated twice, another
construction of one network that is not quite the same. The first step and tensor are named.

A run is recorded as digests of everything that it computes and leaves behind, so that equality is
that of bits; within a tolerance, values are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ensembles.message import aligned, broken, counted, listed
from ensembles.message import seed as present_seed
from ensembles.probes.partings import partings
from ensembles.probes.recording import KINDS, Entry, Recipe, Run, digest, recorded
from ensembles.probes.state import generators_kept, seed_generators
from ensembles.probes.training import Loss
from ensembles.subject import (
    Members,
    Model,
    Outputs,
    checked_numbers,
    named_modules_of,
)

__all__ = [
    "TrainingTrajectory",
    "assert_trajectories_equal",
    "measure_training_trajectory",
]

STEPS = 3
"""Momentum, Adam's moments and BatchNorm's averages act from the second step on."""


@dataclass(frozen=True)
class TrainingTrajectory:
    """What some optimizer steps from a seed compute and leave behind.

    Attributes:
        seed: The seed of construction, and of every step's random numbers.
        members: The names of members that have something.
        entries: Everything recorded, in the order in which it happened; `==` compares the bits.
    """

    seed: int
    members: tuple[str, ...]
    entries: tuple[Entry, ...]

    @property
    def steps(self) -> int:
        """How many optimizer steps were recorded."""
        return max((entry.step for entry in self.entries), default=0)

    @property
    def losses(self) -> tuple[float, ...]:
        """The training loss of every step."""
        return tuple(entry.norm for entry in self.entries if entry.kind == "loss")

    def only(self, *kinds: str) -> TrainingTrajectory:
        """The same trajectory with these kinds of entries and no others."""
        return self._where(lambda entry: entry.kind in kinds)

    def member(self, name: str) -> TrainingTrajectory:
        """One member's trajectory, which can be compared with that of another, or of a model.

        Raises:
            ValueError: If no member has this name.
        """
        if name not in self.members:
            raise ValueError(f"no member is named {name!r}. Members are {listed(self.members)}.")
        return self._where(lambda entry: entry.member == name)

    def _where(self, wanted: Callable[[Entry], bool]) -> TrainingTrajectory:
        kept = tuple(entry for entry in self.entries if wanted(entry))
        found = {entry.member for entry in kept}
        return TrainingTrajectory(self.seed, tuple(m for m in self.members if m in found), kept)

    def __str__(self) -> str:
        losses = self.losses
        head = f"{counted(range(self.steps), 'step')} of {counted(self.members, 'member')}"
        head += f" from seed {self.seed}"
        head += f", loss {losses[0]:.6g} to {losses[-1]:.6g}" if losses else ""
        kinds = [kind for kind in KINDS if any(entry.kind == kind for entry in self.entries)]
        rows = [("step", *kinds)]
        for step in range(self.steps + 1):
            found = [entry for entry in self.entries if entry.step == step]
            rows.append((str(step), *(_summary(found, kind) for kind in kinds)))
        return "\n".join([head, *(f"  {line}" for line in aligned(rows))])


def measure_training_trajectory(
    make: Callable[[], Model] | Model,
    batch: Any,
    *,
    outputs: Outputs | None = None,
    members: Members | None = None,
    optimizer: Callable[[Any], Any] | None = None,
    loss: Loss | None = None,
    clip: Callable[[Any], Any] | None = None,
    scheduler: Callable[[Any], Any] | None = None,
    steps: int = STEPS,
    seed: int | None = None,
    values: bool = False,
) -> TrainingTrajectory:
    """Trains for some optimizer steps from a seed, and records every step.

    Every call of a member starts from the same random numbers, a function of the seed and the
    step: dropout draws for each member what it would draw if that member were trained alone.
    All steps see the same batch.

    Args:
        make: Builds the model, after the seed was set; or the model itself, which is as before
            afterwards.
        batch: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        outputs: Splits what one module returns into member outputs.
        members: Finds the member modules inside one module, so that each has its own trajectory.
        optimizer: Builds the optimizer, or a list of them, for the model. By default SGD with
            momentum on all parameters.
        loss: The training loss of the dict of member outputs. By default the sum over members of
            the mean squared distance of their outputs to fixed random targets. Unless both loss
            and optimizer are given, a gradient that is larger than its parameter is scaled down to
            its size before the step; recorded is what it was.
        clip: What training does to gradients before each step, a function of the model.
        scheduler: A function of one optimizer: its scheduler, a list of them, or a function to be
            called after each step.
        steps: How many optimizer steps.
        seed: Of construction and of every step; by default that of the present run.
        values: Whether to keep copies of all tensors, which a comparison within a tolerance needs.

    Returns:
        The trajectory; without `values` it holds digests only, whatever the model's size.

    Raises:
        ValueError: If the model cannot be trained like this: the loss, or a parameter, becomes NaN
            or infinite.

    Example:
        >>> print(measure_training_trajectory(lambda: nn.Linear(2, 1), torch.ones(3, 2), seed=0))
        3 steps of 1 member from seed 0, loss ...
          step   output   loss   gradient   parameter   state
          0      -        -      -          ...
    """
    recipe = Recipe(batch, outputs, members, optimizer, loss, clip, scheduler)
    seed = present_seed.get() if seed is None else seed
    _checked_steps(steps)
    with generators_kept():
        model = _made(make, seed)
        checked_numbers(model)
        entries = recorded(model, recipe, Run(seed, steps, alike=True, values=values))
    names = dict.fromkeys(entry.member for entry in entries if entry.member)
    return TrainingTrajectory(seed, tuple(names), entries)


def assert_trajectories_equal(
    one: TrainingTrajectory, two: TrainingTrajectory, *, tolerance: float = 0.0
) -> None:
    """Checks that two training runs are the same: bit by bit, or within a tolerance.

    Args:
        one: From `measure_training_trajectory`; also one member's, or some kinds of entries only.
        two: The other, of as many steps. Where both have one member, its name does not matter.
        tolerance: The greatest difference in a tensor, as a share of the greatest element of that
            kind (of gradients, of parameters) in that step. 0.0 compares bits; anything else needs
            trajectories with `values=True`.

    Raises:
        ValueError: If they have no entries in common, or are of different lengths.
        AssertionError: If they part; it names the step and the tensor.

    Example:
        >>> def run(momentum):
        ...     return measure_training_trajectory(
        ...         lambda: nn.Linear(2, 1), torch.ones(3, 2),
        ...         optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=momentum))
        >>> assert_trajectories_equal(run(0.9), run(0.9))
        >>> assert_trajectories_equal(run(0.9), run(0.8))
        Traceback (most recent call last):
        AssertionError: two training runs are claimed equal bit by bit, and part at step 2
        ...
    """
    __tracebackhide__ = True
    if one.steps != two.steps:
        raise ValueError(
            f"one trajectory has {counted(range(one.steps), 'step')} and the other "
            f"{counted(range(two.steps), 'step')}: record both with the same steps=..."
        )
    parted = partings(*_compared(one, two), tolerance)
    if parted:
        first = parted[0]
        raise AssertionError(
            broken(
                f"two training runs are claimed equal {_within(tolerance)}, and part at step "
                f"{first.step}",
                [parting.row for parting in parted],
                total=f"{len(parted)} of {counted(one.entries, 'recorded value')}",
                meaning="Everything before is the same; what comes later follows from the first "
                "difference.",
                remedy=_CAUSES[first.kind],
            )
        )


# --- where two trajectories part ----------------------------------------------------------------


_CAUSES = {
    "batch": "Usual cause: data drawn from a generator that the seed does not reach.",
    "output": "Parameters and buffers were the same: the data, the order of random numbers, the "
    "mode (train or eval) or the network's code differs.",
    "loss": "The outputs were the same: the loss, or its labels, differs.",
    "gradient": "The outputs were the same: the loss is scaled or reduced in another way (sum "
    "against mean), a branch is detached, or gradients are accumulated.",
    "parameter": "The gradients were the same: the optimizer, its rates or groups, clipping or "
    "the initial weights differ.",
    "buffer": "The parameters were the same: BatchNorm has another momentum, is updated more than "
    "once a step, or starts from other statistics.",
    "state": "Parameters were the same so far: the optimizer keeps another state.",
}


def _compared(one: TrainingTrajectory, two: TrainingTrajectory) -> tuple[list[Entry], list[Entry]]:
    """The entries of both, under one name where each has one member."""
    if len(one.members) == 1 == len(two.members):
        two = _renamed(two, one.members[0])
    if not {entry.key for entry in one.entries} & {entry.key for entry in two.entries}:
        raise ValueError(
            "the two trajectories have nothing in common to compare: members "
            f"{listed(one.members) or 'none'} and {listed(two.members) or 'none'}. Compare one "
            "member with one: trajectory.member(name)."
        )
    return list(one.entries), list(two.entries)


def _within(tolerance: float) -> str:
    return f"within {tolerance:g}" if tolerance else "bit by bit"


def _summary(entries: Sequence[Entry], kind: str) -> str:
    found = [entry for entry in entries if entry.kind == kind]
    if not found:
        return "-"
    if kind == "loss":
        return f"{found[0].norm:.9g}"
    return digest([entry.digest for entry in found])[:6]


# --- runs ---------------------------------------------------------------------------------------


def _checked_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps={steps}: a trajectory has at least 1 optimizer step.")


def _made(make: Callable[[], Model] | Model, seed: int) -> Model:
    seed_generators(seed)
    if isinstance(make, (nn.Module, Sequence, Mapping)):
        model = make
    elif callable(make):
        model = make()
    else:
        raise ValueError(
            f"make=... is an object of type {type(make).__name__}: give a function that builds "
            "the model, or the model."
        )
    named_modules_of(model)
    return model


def _renamed(trajectory: TrainingTrajectory, name: str) -> TrainingTrajectory:
    """The one member's trajectory under another name."""
    entries = (replace(e, member=name if e.member else "") for e in trajectory.entries)
    return TrainingTrajectory(trajectory.seed, (name,), tuple(entries))
