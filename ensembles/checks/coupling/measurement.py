"""What a training step on each member moves of every other."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import nn

from ensembles.case import Case, Given
from ensembles.checks.coupling.claim import CouplingClaim
from ensembles.checks.coupling.loss_effects import loss_effects
from ensembles.checks.coupling.step_effects import Moved, step_effects
from ensembles.findings import Count
from ensembles.handling.numbers import checked_numbers
from ensembles.message import SHOWN_ROWS, aligned, counted
from ensembles.subject import Recipe

__all__ = ["GradientCoupling", "measure", "measure_gradient_coupling"]


@dataclass(frozen=True)
class GradientCoupling:
    """What a training step on each member moves of every other.

    Attributes:
        members: The members' names.
        compared: The kinds of places that were looked at: "output"; "parameter" and "buffer"
            where member modules are known; "loss" where a loss was given.
        moved: Everything that moved, in the order of steps and members.
        same: Groups of members that register the same parameters, so that they are one network.
        draws: How many draws of what training draws were looked at.
    """

    members: tuple[str, ...]
    compared: tuple[str, ...]
    moved: tuple[Moved, ...]
    same: tuple[tuple[str, ...], ...] = ()
    draws: int = 1

    def places(self, step: str, member: str) -> tuple[Moved, ...]:
        """What a step on one member moves of another."""
        return tuple(m for m in self.moved if (m.step, m.member) == (step, member))

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Every pair (step, member) in which something moved."""
        return tuple(dict.fromkeys((m.step, m.member) for m in self.moved))

    @property
    def share(self) -> Count:
        """In how many of all pairs something moved."""
        return Count(
            len(self.pairs), "ordered pair", of=len(self.members) * (len(self.members) - 1)
        )

    def __str__(self) -> str:
        drawn = f" in {self.draws} random draws" if self.draws > 1 else ""
        head = (
            f"{counted(self.members, 'member')}, a step on one moves another in {self.share} "
            f"({', '.join(self.compared)} compared{drawn})"
        )
        if not self.moved:
            return head
        if len(self.members) > SHOWN_ROWS:
            rows = [(f"step on {i}", f"moves {j}", self._cell(i, j)) for i, j in self.pairs]
            lines = aligned(rows[:SHOWN_ROWS])
            if len(rows) > SHOWN_ROWS:
                lines.append(f"... {len(rows) - SHOWN_ROWS} more pairs")
        else:
            columns = [f"moves {j}" for j in self.members]
            cells = [
                (f"step on {i}", *(self._cell(i, j) for j in self.members)) for i in self.members
            ]
            lines = aligned([("", *columns), *cells])
        return "\n".join([head, *(f"  {line}" for line in lines)])

    def _cell(self, step: str, member: str) -> str:
        if step == member:
            return "-"
        kinds = Counter(moved.kind for moved in self.places(step, member))
        words = [
            str(Count(number, kind)) if kind in ("parameter", "buffer") else kind
            for kind, number in kinds.items()
        ]
        return ", ".join(words) or "."


def measure_gradient_coupling(
    model: Given, batch: Any = None, **recipe: Unpack[Recipe]
) -> GradientCoupling:
    """Takes one training step on each member alone, and finds what it moves of the others.

    The step on member i descends a fixed random projection of i's output in train mode. Then
    the outputs of all members in eval mode, and the parameters and buffers of the member modules,
    are compared bit by bit with a control:

    - members that are a list or dict of modules: only i is called for the step, and the control
      is the untouched state, so a BatchNorm buffer that j shares with i is seen to move;
    - one module that computes all members: the control is the same call without the step, because
      buffers move by the call. An optimizer that also moves what has gradient zero (weight decay
      of a packed weight) is compared with its step on zero gradients.

    Where there is a loss, the gradient that it sends to member j must not change with what member
    i predicts, nor, where it holds a penalty on weights, with the weights that are i's alone.

    Args:
        model: One module, or the members as a list or dict of modules.
        batch: What the model is called with.
        **recipe: See `Subject`. Without `members`, only outputs of one module can be compared; they
            have the names, or the order, of the outputs. Of the `optimizer`, learning rates above
            0.01 are lowered to that, and gradients are scaled to a largest element of 1, tensor by
            tensor, so that vanishing ones hide nothing.

    Returns:
        The measurement. The model, its gradients and the random generators are as before.

    Raises:
        ValueError: If there are fewer than two members, the model is not deterministic, the
            optimizer cannot train a member at all, or something given does not fit.

    Example:
        >>> first, second = nn.Linear(4, 4), nn.Linear(4, 4)
        >>> head = nn.Linear(4, 2)
        >>> two = [nn.Sequential(first, head), nn.Sequential(second, head)]
        >>> print(measure_gradient_coupling(two, torch.randn(3, 4)))
        2 members, a step on one moves another in 2 of 2 ordered pairs (output, ... compared)
                      moves 0                moves 1
          step on 0   -                      output, 2 parameters
          step on 1   output, 2 parameters   -
    """
    return measure(Case.of(model, batch, **recipe))


def measure(case: Case, claim: CouplingClaim | None = None) -> GradientCoupling:
    """What `measure_gradient_coupling` finds in a case; no claim asks for less."""
    __tracebackhide__ = True
    checked_numbers(case.model)
    with torch.inference_mode(False), torch.enable_grad():
        steps = step_effects(case)
        by_loss = loss_effects(case, steps.members)
    ranks = {name: rank for rank, name in enumerate(steps.members)}
    moved = sorted((*steps.moved, *by_loss), key=lambda m: (ranks[m.step], ranks[m.member]))
    return GradientCoupling(
        members=steps.members,
        compared=(
            "output",
            *(("parameter", "buffer") if steps.modules else ()),
            *(("loss",) if case.subject.loss is not None else ()),
        ),
        moved=tuple(moved),
        same=_same(steps.modules),
        draws=steps.draws,
    )


def _same(modules: Mapping[str, nn.Module]) -> tuple[tuple[str, ...], ...]:
    groups: defaultdict[frozenset[int], list[str]] = defaultdict(list)
    for member, module in modules.items():
        groups[frozenset(id(parameter) for parameter in module.parameters())].append(member)
    return tuple(tuple(group) for held, group in groups.items() if held and len(group) > 1)
