"""Where state hides, and what moves in calls in eval mode and in training."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Unpack

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ensembles.case import Case
from ensembles.checks.hygiene.claim import HygieneClaim
from ensembles.checks.hygiene.hidden_state import (
    left_behind,
    live_snapshots,
    stale_gradients,
    unlisted_modules,
    wrong_modes,
)
from ensembles.checks.hygiene.state_changes import moved_in_eval, moved_in_training
from ensembles.findings import Finding
from ensembles.handling.numbers import checked_numbers
from ensembles.handling.registered_tensors import registered
from ensembles.handling.state import generators_kept, preserved
from ensembles.instruments.tensor_locations import Search
from ensembles.message import aligned, counted
from ensembles.subject import Model, Recipe

__all__ = ["KINDS", "StateHygiene", "measure", "measure_state_hygiene"]

KINDS = (
    *("hidden module", "hidden tensor", "stays behind", "mode", "requires_grad"),
    *("moves in eval", "stale", "random in eval", "global state", "changes the batch"),
    *("norm updates", "frozen moves", "drifting", "masked moves", "averaged norm", "alias"),
)
"""Of findings, in the order in which they are told; "norm updates" depend on the claim."""


@dataclass(frozen=True)
class StateHygiene:
    """What a model keeps, and what moves.

    Attributes:
        modules: How many modules are registered.
        tensors: How many parameters and buffers are registered; a tied one once.
        steps: How many training steps were taken.
        updates: How often each norm updated its statistics in one training step, as its counter
            or the calls of batch_norm say.
        findings: All that is not in order whatever is claimed, kind by kind.
        searched: How many objects below the model were searched for what is hidden.
        all_searched: Whether there are no more.
    """

    modules: int
    tensors: int
    steps: int
    updates: tuple[tuple[str, int], ...]
    findings: tuple[Finding, ...]
    searched: int = field(default=0, compare=False)
    all_searched: bool = True

    def places(self, kind: str) -> tuple[str, ...]:
        """The places of one kind of finding, such as "hidden tensor".

        Raises:
            ValueError: If there is no such kind.
        """
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is no kind of finding: {', '.join(KINDS)}.")
        return tuple(found.place for found in self.findings if found.kind == kind)

    def __str__(self) -> str:
        norms = f"; {_often({count for _, count in self.updates})}" if self.updates else ""
        more = f"; searched {self.searched:,} objects, but there are more"
        head = (
            f"{counted(range(self.modules), 'module')}, {self.tensors} parameters and buffers, "
            f"{counted(self.findings, 'finding')}{norms}{'' if self.all_searched else more}"
        )
        rows = aligned([(found.place, found.kind, found.found) for found in self.findings])
        return "\n".join([head, *(f"  {row}" for row in rows)])


def _often(counts: Collection[int]) -> str:
    """How often norms update their statistics, in words."""
    times = [{1: "once", 2: "twice"}.get(n, f"{n} times") for n in sorted(counts) if n]
    if not times:
        return "norms do not update their statistics in a step"
    never = " or not at all" if 0 in counts else ""
    return f"norms update their statistics {' or '.join(times)} a step{never}"


def measure_state_hygiene(
    model: Case | Model, batch: Any = None, **recipe: Unpack[Recipe]
) -> StateHygiene:
    """Looks for state in hidden places, and for state that moves when it should not.

    Args:
        model: One module, or the members as a list or dict of modules.
        batch: What the model is called with.
        **recipe: The default optimizer is plain SGD, and the default loss a fixed random
            projection of all outputs.

    Returns:
        The measurement. The model, its gradients and the random generators are as before.

    Raises:
        ValueError: If the model cannot be called or trained so.

    Example:
        >>> class Masked(nn.Linear):
        ...     def forward(self, x):
        ...         return nn.functional.linear(x, self.weight * self.mask)
        >>> net = Masked(3, 2)
        >>> net.mask = torch.ones(2, 3)
        >>> print(measure_state_hygiene(net, torch.randn(4, 3)))
        1 module, 2 parameters and buffers, 1 finding
          model.mask   hidden tensor   shape (2, 3), kept as a plain attribute
    """
    return measure(Case.of(model, batch, **recipe))


def measure(case: Case, claim: HygieneClaim | None = None) -> StateHygiene:
    """What `measure_state_hygiene` finds in a case; no claim asks for less."""
    __tracebackhide__ = True
    checked_numbers(case.model)
    _ = case.batch  # is made here, where gradients are as the user has them
    search = Search()
    hidden = unlisted_modules(case.model, search)
    everything = [*case.modules.values(), *(module for _, module in hidden)]
    found = [*live_snapshots(case.model), *stale_gradients(case)]
    with torch.inference_mode(False), generators_kept(), preserved(everything) as start:
        found += left_behind(case.model)
        start.restore()  # what is bound to the original moves that
        found += wrong_modes(case.modules)
        start.restore()
        with torch.no_grad():
            used, in_eval = moved_in_eval(case, hidden, start, search)
        found += in_eval
        start.restore()
        with torch.enable_grad():
            trained = moved_in_training(case, everything, used)
        known = {(one.kind, one.place) for one in found}
        found += [one for one in trained.findings if (one.kind, one.place) not in known]
    for place, module in hidden:
        if _matters(module) and any(id(inner) in used for inner in module.modules()):
            told = f"{type(module).__name__}, kept {place.how}"
            found.append(Finding(kind="hidden module", place=place.path, found=told))
    found = sorted(dict.fromkeys(found), key=lambda one: (KINDS.index(one.kind), one.place))
    return StateHygiene(
        modules=len({id(inner) for module in case.modules.values() for inner in module.modules()}),
        tensors=len(registered(case.model)),
        steps=trained.steps,
        updates=tuple(trained.updates.items()),
        findings=tuple(found),
        searched=search.objects,
        all_searched=search.ended,
    )


def _matters(module: nn.Module) -> bool:
    """Whether it has state, or does something else in train mode."""
    state = next(module.parameters(), None) is not None or next(module.buffers(), None) is not None
    return state or any(isinstance(inner, _DropoutNd) and inner.p for inner in module.modules())
