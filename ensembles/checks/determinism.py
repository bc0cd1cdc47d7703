"""Promise: one seed gives the same bits, in construction and in every training step.

Catches weights drawn at import or before seeding, a factory that ignores the seed, a constructor
that leaves the global generators in one state for ever, seeds taken from the clock, sets whose
order is that of hashes, layers that draw from generators of their own, and operations that do not
repeat.

The model is built and trained twice from one seed, the second time with the clock a day ahead,
and once more from another seed, which must give other weights. Where runs part, two more with a log
of every call name the operation. On request the same is done in two
new processes, with other hash seeds and with generators in other states before the import.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ensembles.message import aligned, broken, counted, listed
from ensembles.message import seed as present_seed
from ensembles.probes.calls import CallLog, first_unlike
from ensembles.probes.partings import Parting, partings
from ensembles.probes.processes import runs_in_processes
from ensembles.probes.recording import Entry, Run, generator_entries, recorded_anew
from ensembles.probes.registers import registered
from ensembles.probes.seeding import later, seeded
from ensembles.probes.training import Loss
from ensembles.subject import Members, Model, Outputs, Subject, named_modules_of

__all__ = ["Determinism", "assert_deterministic", "measure_determinism"]

STEPS = 2
"""The second step is the first that sees what the first has left in optimizer and buffers."""


@dataclass(frozen=True)
class Determinism:
    """What two runs from one seed have in common, and what they owe to the seed.

    Attributes:
        seed: The seed of both.
        steps: How many optimizer steps were compared; 0 where only construction was.
        processes: 2 where two new processes were compared too, else 1.
        compared: How many values were recorded in a run.
        parted: Every value that differs, in the order of computation; within one process, or else
            between the two.
        apart: Whether `parted` is between two processes.
        refused: What PyTorch says of an operation that has no deterministic implementation.
        drawn: Parameters whose initial elements are not all one number.
        unseeded: Those of them that another seed leaves as they are.
        constant: The generators that construction leaves in one state whatever the seed.
        operation: The first operation of PyTorch whose result differs in two more runs, and the
            function that called it; "" where none does, or between two processes.
    """

    seed: int
    steps: int
    processes: int
    compared: int
    parted: tuple[Parting, ...]
    apart: bool
    refused: str
    drawn: tuple[str, ...]
    unseeded: tuple[str, ...]
    constant: tuple[str, ...]
    operation: str = ""

    def __str__(self) -> str:
        what = f"construction and {counted(range(self.steps), 'step')}"
        where = " in one process" if self.processes == 1 else " in one process and in two"
        head = (
            f"{len(self.parted)} of {self.compared} values differ between two runs from seed "
            f"{self.seed}, {what if self.steps else 'construction only'}{where}"
        )
        lines = aligned(_rows(self))
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
    make: Callable[[], Model],
    batch: Any = None,
    *,
    outputs: Outputs | None = None,
    members: Members | None = None,
    optimizer: Callable[[Any], Any] | None = None,
    loss: Loss | None = None,
    clip: Callable[[Any], Any] | None = None,
    scheduler: Callable[[Any], Any] | None = None,
    steps: int = STEPS,
    seed: int | None = None,
    factory: str | None = None,
    algorithms: bool = True,
) -> Determinism:
    """Builds and trains the model twice from one seed, and compares everything bit by bit.

    Seeds of Python, numpy, torch and CUDA, `torch.use_deterministic_algorithms`, the cuDNN flags
    and CUBLAS_WORKSPACE_CONFIG are set for the runs, and afterwards all are as they were.

    Args:
        make: Builds the model anew at each call.
        batch: A tensor, a tuple of positional arguments, a dict of keyword arguments; or a
            function that returns one, called once in each run. Without it only construction is
            compared.
        outputs: Splits what one module returns into member outputs.
        members: Finds the member modules inside one module, whose names are then told.
        optimizer: Builds the optimizer, or a list of them, for the model. By default SGD with
            momentum on all parameters.
        loss: The training loss of the dict of member outputs. By default a distance to fixed
            random targets. Unless both loss and optimizer are given, a gradient that is larger
            than its parameter is scaled down to its size before the step.
        clip: What training does to gradients before each step, a function of the model.
        scheduler: A function of one optimizer: its scheduler, a list of them, or a function to be
            called after each step.
        steps: How many optimizer steps.
        seed: Of both runs; by default that of the present run.
        factory: "package.module:factory": a function that two new processes import and call. It
            returns a model, which is trained with the default loss and optimizer, or a `Subject`.
        algorithms: Whether to set the flags of PyTorch and cuDNN; without them, what they would
            repair is found.

    Returns:
        The measurement.

    Raises:
        ValueError: If `make` is no function, returns one object twice, or the model cannot be
            trained like this: the loss, or a parameter, becomes NaN or infinite.

    Example:
        >>> print(measure_determinism(lambda: nn.Linear(4, 2), torch.randn(3, 4), seed=0))
        0 of ... values differ between two runs from seed 0, construction and 2 steps in one process
    """
    if not callable(make) or isinstance(make, torch.nn.Module):
        raise ValueError(
            f"make=... is an object of type {type(make).__name__}: determinism builds the model "
            "twice, so give a function that builds it, make=lambda: ..."
        )
    if steps < 0:
        raise ValueError(f"steps={steps}: it is a number of optimizer steps, 0 or more.")
    seed = present_seed.get() if seed is None else seed
    feed = batch if callable(batch) else lambda: batch
    subject = Subject(
        make=make,
        batch=feed,
        outputs=outputs,
        members=members,
        optimizer=optimizer,
        loss=loss,
        clip=clip,
        scheduler=scheduler,
    )
    run = Run(seed, 0 if batch is None else steps, operations=True)
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
    parted = tuple(partings(first, second))
    operation = _first_operation(subject, run, algorithms) if parted else ""
    apart = False
    if factory is not None and not parted and not refused:
        here, there = runs_in_processes(factory, feed(), run, algorithms=algorithms)
        parted, apart = tuple(partings(here, there)), True
    if not run.steps and not refused and not registered(one):
        raise ValueError(
            "the model has no parameters or buffers, and no batch was given: there is nothing to "
            "compare. Give a batch."
        )
    drawn, unseeded, constant = _owed_to_seed(make, seed, algorithms)
    return Determinism(
        seed=seed,
        steps=run.steps,
        processes=1 if factory is None else 2,
        compared=len(first),
        parted=parted,
        apart=apart and bool(parted),
        refused=refused,
        drawn=drawn,
        unseeded=unseeded,
        constant=constant,
        operation=operation,
    )


def assert_deterministic(determinism: Determinism, *, loaded: bool = False) -> None:
    """Checks that one seed gives the same bits, and that another seed gives other weights.

    Args:
        determinism: From `measure_determinism`.
        loaded: Whether all weights come from a file, so that they need not depend on the seed.

    Raises:
        AssertionError: If two runs part, naming the first step, tensor and operation; or if no
            weight depends on the seed; or if construction leaves a generator in one state.

    Example:
        >>> assert_deterministic(measure_determinism(lambda: nn.Linear(4, 2), torch.randn(3, 4)))
        >>> def seeds_itself():
        ...     torch.manual_seed(0)
        ...     return nn.Linear(4, 2)
        >>> assert_deterministic(measure_determinism(seeds_itself))
        Traceback (most recent call last):
        AssertionError: construction is claimed to draw from the seed, and does not
        ...
    """
    __tracebackhide__ = True
    if determinism.refused:
        raise AssertionError(
            broken(
                "training is claimed to repeat bit by bit, and an operation cannot",
                [(determinism.refused,)],
                total="PyTorch refused it under torch.use_deterministic_algorithms(True)",
                meaning="Two runs from one seed differ wherever it runs in parallel.",
                remedy="Use another operation (the message of PyTorch and its page on "
                "reproducibility name some).",
            )
        )
    if determinism.parted:
        first = determinism.parted[0]
        runs = "two processes" if determinism.apart else "two runs"
        raise AssertionError(
            broken(
                f"one seed is claimed to give the same bits, and {runs} from seed "
                f"{determinism.seed} part "
                + (f"in step {first.step}" if first.step else "at construction"),
                _rows(determinism),
                total=f"{len(determinism.parted)} of {determinism.compared} recorded values",
                meaning="Everything before is the same; what comes later follows from the first "
                "difference.",
                remedy=_cause(first, determinism.apart),
            )
        )
    if determinism.constant:
        raise AssertionError(
            broken(
                "construction is claimed to draw from the seed, and does not",
                [
                    (f"generator {name}", "in one state after construction, whatever the seed")
                    for name in determinism.constant
                ],
                total=f"{len(determinism.unseeded)} of "
                f"{counted(determinism.drawn, 'initialised parameter')} are the same too",
                meaning="Members that are built one after the other start alike, and so do runs "
                "with different seeds.",
                remedy="Usual cause: torch.manual_seed(0) inside a constructor. Seed once, "
                "outside; in a constructor use torch.random.fork_rng().",
            )
        )
    if determinism.drawn and determinism.unseeded == determinism.drawn and not loaded:
        raise AssertionError(
            broken(
                "initial weights are claimed to come from the seed, and do not",
                [(name, "the same from another seed") for name in determinism.unseeded],
                total=f"{len(determinism.unseeded)} of "
                f"{counted(determinism.drawn, 'initialised parameter')}",
                meaning="Runs with different seeds start from one network.",
                remedy="Usual cause: weights drawn at import or before seeding and then copied, "
                "or a generator with a seed of its own. Draw them in make(). Weights that come "
                "from a file are claimed as loaded.",
            )
        )


# --- how the assertion looks --------------------------------------------------------------------

_CAUSES = {
    "generator": "Construction draws a different number of random numbers: it depends on the "
    "clock, on the order of a set, or on what was built before.",
    "batch": "The batch itself differs: it is drawn from a generator that the seed does not "
    "reach (numpy.random.default_rng(), os.urandom).",
    "operation": "Usual cause: random numbers from a generator that the seed does not reach, the "
    "order of a set, state kept outside of buffers, or an operation that does not repeat.",
    "output": "Usual cause: random numbers from a generator that the seed does not reach, in "
    "the code between modules.",
    "loss": "The outputs were the same: the loss draws random numbers of its own.",
    "gradient": "Outputs and loss were the same: the backward pass of an operation does not "
    "repeat.",
    "state": "Gradients were the same: the optimizer draws random numbers, or keeps state "
    "between runs.",
}
_CONSTRUCTION = (
    "Usual cause: a seed from the clock, weights from numpy.random.default_rng() or os.urandom, or "
    "a factory that keeps a generator between calls. Draw them from torch's global generator."
)
_IMPORT = (
    "Usual cause: weights drawn while a module is imported, before seeding, or from numpy at "
    "import; or layers built in the order of a set, which is that of hashes. Draw in make(), and "
    "sort what is a set."
)
_STEP = "Gradients were the same: the optimizer draws random numbers, or keeps state between runs."


def _cause(first: Parting, apart: bool) -> str:
    if first.step == 0 and apart:
        return _IMPORT
    if first.step == 0 and first.kind in ("parameter", "buffer"):
        return _CONSTRUCTION
    return _CAUSES.get(first.kind, _STEP)


def _rows(determinism: Determinism) -> list[tuple[str, ...]]:
    """The first operation, and one row a kind: where it differs first, and how often in all."""
    parted = determinism.parted
    kinds = dict.fromkeys(parting.kind for parting in parted)
    rows: list[tuple[str, ...]] = []
    if determinism.operation:
        name = f"operation {determinism.operation}"
        rows.append((f"step {parted[0].step}", name, "the first that differs"))
    return rows + [
        (f"step {found[0].step}", f"{kind} {found[0].place}".strip(), f"{len(found)} differ")
        for kind in kinds
        for found in [[parting for parting in parted if parting.kind == kind]]
    ]


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


def _first_operation(subject: Subject, run: Run, algorithms: bool) -> str:
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
            model = make()
            states.append({entry.name: entry.digest for entry in generator_entries()})
        named = [
            (e.names[0], e.tensor.detach()) for e in registered(model) if e.kind == "parameter"
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
    values = tensor.detach().flatten()
    if not values.numel():
        return False
    return bool(((values != values.min()) & (values != values.max())).any())
