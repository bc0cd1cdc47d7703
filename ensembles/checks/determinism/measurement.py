"""What two runs from one seed have in common, and what they owe to the seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Unpack

import torch
from torch import Tensor

from ensembles.case import Case
from ensembles.checks.determinism.call_log import CallLog, first_unlike
from ensembles.checks.determinism.claim import STEPS, DeterminismClaim
from ensembles.checks.determinism.loaders import LoaderDeterminism, measure_loader_determinism
from ensembles.checks.determinism.processes import runs_in_processes
from ensembles.checks.determinism.seeding import later, seeded
from ensembles.handling.members import named_modules_of, new_model
from ensembles.handling.memory import numbers_in
from ensembles.handling.registered_tensors import registered
from ensembles.instruments.divergence import Divergence, divergences
from ensembles.instruments.recording import Entry, RunOptions, generator_entries, recorded_anew
from ensembles.message import aligned, counted, listed
from ensembles.subject import Model, Recipe, Subject

__all__ = ["Determinism", "measure", "measure_determinism"]


@dataclass(frozen=True)
class Determinism:
    """What two runs from one seed have in common, and what they owe to the seed.

    Attributes:
        seed: The seed of both.
        steps: How many optimizer steps were compared; 0 where only construction was.
        processes: 2 where two new processes were compared too, else 1.
        compared: How many values were recorded in a run.
        diverged: Every value that differs, in the order of computation; within one process, or else
            between the two.
        apart: Whether `diverged` is between two processes.
        refused: What PyTorch says of an operation that has no deterministic implementation.
        drawn: Parameters whose initial elements are not all one number.
        unseeded: Those of them that another seed leaves as they are.
        constant: The generators that construction leaves in one state whatever the seed.
        operation: The first operation of PyTorch whose result differs in two more runs, and the
            function that called it; "" where none does, or between two processes.
        loaders: By member, what its loader repeats; empty where loaders were not asked for.
    """

    seed: int
    steps: int
    processes: int
    compared: int
    diverged: tuple[Divergence, ...]
    apart: bool
    refused: str
    drawn: tuple[str, ...]
    unseeded: tuple[str, ...]
    constant: tuple[str, ...]
    operation: str = ""
    loaders: Mapping[int | str, LoaderDeterminism] = field(default_factory=dict)

    @property
    def firsts(self) -> list[tuple[Divergence, int]]:
        """The first value of every kind that differs, and how many of its kind do."""
        kinds = Counter(each.kind for each in self.diverged)
        return [
            (next(each for each in self.diverged if each.kind == kind), count)
            for kind, count in kinds.items()
        ]

    def __str__(self) -> str:
        what = f"construction and {counted(range(self.steps), 'step')}"
        where = " in one process" if self.processes == 1 else " in one process and in two"
        head = (
            f"{len(self.diverged) or 'none'} of {self.compared} values differ between two runs "
            f"from seed {self.seed}, {what if self.steps else 'construction only'}{where}"
        )
        rows = [(f"step {e.step}", e.what, f"{count} differ") for e, count in self.firsts]
        lines = aligned(rows)
        if self.refused:
            lines.append(f"refused: {self.refused}")
        if self.constant:
            lines.append(f"construction leaves generators in one state: {listed(self.constant)}")
        if self.unseeded:
            lines.append(
                f"{len(self.unseeded)} of {counted(self.drawn, 'parameter')} do not depend on the "
                f"seed: {listed(self.unseeded, 3)}"
            )
        return "\n".join([head, *(f"  {line}" for line in lines)])


def measure_determinism(
    model: Case | Callable[[], Model],
    batch: Any = None,
    *,
    steps: int = STEPS,
    factory: str | None = None,
    algorithms: bool = True,
    **recipe: Unpack[Recipe],
) -> Determinism:
    """Builds and trains the model twice from one seed, and compares everything bit by bit.

    Seeds of Python, numpy, torch and CUDA, `torch.use_deterministic_algorithms`, the cuDNN flags
    and CUBLAS_WORKSPACE_CONFIG are set for the runs, and afterwards all are as they were.

    Args:
        model: A function that builds the model anew at each call.
        batch: What the model is called with; or a function that returns it, which is called once in
            each run. Without it only construction is compared.
        steps: How many optimizer steps.
        factory: "package.module:factory": a function that two new processes import and call. It
            returns a model, which is trained with the default loss and optimizer, or a `Subject`.
        algorithms: Whether to set the flags of PyTorch and cuDNN; without them, what they would
            repair is found.
        **recipe: See `Subject`. By default the optimizer is SGD with momentum on all parameters,
            and the loss is a distance to fixed random targets.

    Returns:
        The measurement.

    Raises:
        ValueError: If the model is no function that builds it, a function returns one object twice,
            or the model cannot be trained like this.

    Example:
        >>> print(measure_determinism(lambda: nn.Linear(4, 2), torch.randn(3, 4), seed=0))
        none of ... values differ between two runs from seed 0, construction and 2 steps in one
        process
    """
    if steps < 0:
        raise ValueError(f"steps={steps}: it is a number of optimizer steps, 0 or more.")
    case = Case.of(model, batch, **recipe)
    return measure(case, DeterminismClaim(factory=factory, steps=steps), algorithms=algorithms)


def measure(case: Case, claim: DeterminismClaim, *, algorithms: bool = True) -> Determinism:
    """What two runs of a case's subject from its seed have in common, and its members' loaders."""
    if case.given:
        kind = type(case.model).__name__
        raise ValueError(
            f"the model is an object of type {kind}: determinism builds the model twice, so give a "
            "function that builds it, lambda: ..."
        )
    subject, seed = case.subject, case.seed
    run = RunOptions(seed, claim.steps if case.has_batch else 0, operations=True)
    first: tuple[Entry, ...] = ()
    second: tuple[Entry, ...] = ()
    refused = ""
    try:
        with seeded(seed, algorithms=algorithms):
            one, first = recorded_anew(subject, run)
        with seeded(seed, algorithms=algorithms), later():
            two, second = recorded_anew(subject, run)
        _checked_built_anew(one, two)
    except (ValueError, RuntimeError) as error:
        refused = _refusal(error)
        if not refused:
            raise
    diverged = tuple(divergences(first, second))
    operation = _first_operation(subject, run, algorithms) if diverged else ""
    apart = False
    if claim.factory is not None and not diverged and not refused:
        feed = subject.batch() if subject.batch is not None else None
        here, there = runs_in_processes(claim.factory, feed, run, algorithms=algorithms)
        diverged, apart = tuple(divergences(here, there)), True
    if not run.steps and not refused and not registered(one):
        raise ValueError(
            "the model has no parameters or buffers, and no batch was given: there is nothing to "
            "compare. Give a batch."
        )
    drawn, unseeded, constant = _owed_to_seed(subject.make, seed, algorithms)
    return Determinism(
        seed=seed,
        steps=run.steps,
        processes=1 if claim.factory is None else 2,
        compared=len(first),
        diverged=diverged,
        apart=apart and bool(diverged),
        refused=refused,
        drawn=drawn,
        unseeded=unseeded,
        constant=constant,
        operation=operation,
        loaders=_loaders(case, claim),
    )


def _loaders(case: Case, claim: DeterminismClaim) -> dict[int | str, LoaderDeterminism]:
    if claim.loaders is None:
        return {}
    return {
        member: measure_loader_determinism(ask, seed=case.seed) for member, ask in case.data.items()
    }


# --- what is looked at besides ------------------------------------------------------------------


def _checked_built_anew(one: Model, two: Model) -> None:
    """One object twice would be compared with itself."""
    ours = {id(entry.tensor) for entry in registered(one)}
    theirs = {id(entry.tensor) for entry in registered(two)}
    modules = [{id(m) for m in named_modules_of(model).values()} for model in (one, two)]
    if ours & theirs or modules[0] & modules[1]:
        raise ValueError(
            "make() returned the same module, or the same parameters, at both calls, so that "
            "construction cannot be looked at. Build the model inside it: make=lambda: Net()."
        )


def _first_operation(subject: Subject, run: RunOptions, algorithms: bool) -> str:
    """Runs twice more, and writes down every call: only where there is something to be found."""
    logs = []
    # What parts for another reason than the first two runs, or fails, tells nothing more.
    with suppress(Exception):
        for clock in (nullcontext(), later()):
            with seeded(run.seed, algorithms=algorithms), clock, CallLog() as log:
                recorded_anew(subject, run)
            logs.append(log.calls)
    return first_unlike(*logs) if len(logs) == 2 else ""


def _refusal(error: Exception) -> str:
    """The sentence in which PyTorch refuses an operation; "" for every other error."""
    told: BaseException | None = error
    while told is not None:
        text = str(told)
        if "deterministic" in text and isinstance(told, RuntimeError):
            return text.splitlines()[0].partition(". ")[0].partition(", but you set")[0]
        told = told.__cause__
    return ""


def _owed_to_seed(
    make: Callable[[], Model], seed: int, algorithms: bool
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Parameters that are drawn, those that another seed leaves, generators that it leaves."""
    states: list[dict[str, str]] = []
    found: list[list[tuple[str, Tensor]]] = []
    for each in (seed, seed + 1):
        with seeded(each, algorithms=algorithms):
            model = new_model(make)
            states.append({entry.name: entry.digest for entry in generator_entries()})
        named = [
            (e.names[0], numbers_in(e.tensor, f"parameter {e.names[0]}"))
            for e in registered(model)
            if e.kind == "parameter"
        ]
        found.append([(name, p) for name, p in named if _is_drawn(p)])
    other = dict(found[1])
    unseeded = tuple(
        name
        for name, tensor in found[0]
        if name in other and tensor.shape == other[name].shape and torch.equal(tensor, other[name])
    )
    constant = tuple(name for name, state in states[0].items() if states[1].get(name) == state)
    return tuple(name for name, _ in found[0]), unseeded, constant


def _is_drawn(tensor: Tensor) -> bool:
    """Whether it may have been drawn: zeros, ones, and what has two values (eye) are by design."""
    values = tensor.flatten()
    if not values.numel():
        return False
    return bool(((values != values.min()) & (values != values.max())).any())
