"""One training run from a seed, recorded step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

from ensembles.case import Case
from ensembles.checks.trajectory.claim import STEPS
from ensembles.handling.numbers import checked_numbers
from ensembles.handling.state import generators_kept, seed_generators
from ensembles.instruments.recording import KINDS, Entry, RunOptions, digest, recorded
from ensembles.message import aligned, counted, listed
from ensembles.subject import Model, Recipe

__all__ = ["TrainingTrajectory", "measure_training_trajectory", "run_of"]


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
    model: Case | Model | Callable[[], Model],
    batch: Any = None,
    *,
    steps: int = STEPS,
    values: bool = False,
    **recipe: Unpack[Recipe],
) -> TrainingTrajectory:
    """Trains for some optimizer steps from a seed, and records every step.

    Every call of a member starts from the same random numbers, a function of the seed and the
    step: dropout draws for each member what it would draw if that member were trained alone.
    All steps see the same batch.

    Args:
        model: A function that builds the model, which is called after the seed was set; or the
            model itself, which is as before afterwards.
        batch: What the model is called with.
        steps: How many optimizer steps.
        values: Whether to keep copies of all tensors, which a comparison within a tolerance needs.
        **recipe: See `Subject`. By default the optimizer is SGD with momentum on all parameters,
            and the loss is the sum over members of the mean squared distance of their outputs to
            fixed random targets.

    Returns:
        The trajectory; without `values` it holds digests only, whatever the model's size.

    Raises:
        ValueError: If the model cannot be trained like this.

    Example:
        >>> print(measure_training_trajectory(lambda: nn.Linear(2, 1), torch.ones(3, 2), seed=0))
        3 steps of 1 member from seed 0, loss ...
          step   output   loss   gradient   parameter   state
          0      -        -      -          ...
    """
    return run_of(Case.of(model, batch, **recipe), steps=steps, values=values)


def run_of(case: Case, *, steps: int = STEPS, values: bool = False) -> TrainingTrajectory:
    """What `measure_training_trajectory` records of a case.

    Example:
        >>> run_of(Case.of(nn.Linear(2, 1), torch.ones(3, 2)), steps=2).steps
        2
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: a trajectory has at least 1 optimizer step.")
    checked_numbers(case.model)
    _ = case.batch
    with generators_kept():
        seed_generators(case.seed)
        entries = recorded(case, RunOptions(case.seed, steps, alike=True, values=values))
    names = dict.fromkeys(entry.member for entry in entries if entry.member)
    return TrainingTrajectory(case.seed, tuple(names), entries)


def _summary(entries: Sequence[Entry], kind: str) -> str:
    found = [entry for entry in entries if entry.kind == kind]
    if not found:
        return "-"
    if kind == "loss":
        return f"{found[0].norm:.9g}"
    return digest([entry.digest for entry in found])[:6]
