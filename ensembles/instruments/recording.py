"""A training run as a series of digests: what every step computes and leaves behind, bit by bit."""

from __future__ import annotations

import ctypes
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from ensembles.case import Case
from ensembles.handling.members import (
    is_one_module,
    named_members,
    named_modules_of,
    new_model,
)
from ensembles.handling.memory import as_kind_of, inner_tensors, is_shell, numbers_in
from ensembles.handling.state import generators_kept, seed_generators
from ensembles.handling.training import (
    NotFiniteError,
    optimizers_of,
    plain_sgd,
)
from ensembles.instruments.learning_rates import advances_of
from ensembles.message import counted, listed
from ensembles.subject import Members, Model, Subject
from ensembles.user_calls import ERRORS, asked, raised

__all__ = [
    "KINDS",
    "Entry",
    "RunOptions",
    "digest",
    "generator_entries",
    "recorded",
    "recorded_anew",
    "tensor_entries",
]

KINDS = (
    "batch",
    "generator",
    "operation",
    "output",
    "loss",
    "gradient",
    "parameter",
    "buffer",
    "state",
)
"""What is recorded, in the order in which a step computes it."""

MOMENTUM = 0.9
"""Of the default optimizer, so that it has a state that can differ."""

CLIP = (
    "the model whose gradients it clips, and of members that are trained alone an ensemble of one"
)

SCHEDULER = (
    "one optimizer, and returns its scheduler, a list of them, or a function; what it returns is "
    "called after each step, without arguments"
)


@dataclass(frozen=True)
class Entry:
    """Something that a step computed, or left behind.

    Attributes:
        step: 0 for what construction left, then the number of the optimizer step.
        kind: One of `KINDS`; "state" is the optimizer's.
        member: The member that has it; "" for what belongs to none, or to the model as a whole.
        name: Its name there.
        digest: Of dtype, shape and bits.
        norm: Euclidean norm; for a loss, its value.
        values: A copy, where values are kept.
    """

    step: int
    kind: str
    member: str
    name: str
    digest: str
    norm: float = field(default=0.0, compare=False)
    values: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def key(self) -> tuple[int, str, str, str]:
        """What a second run calls the same thing."""
        return self.step, self.kind, self.member, self.name

    @property
    def place(self) -> str:
        """Member and name, as far as there are any."""
        return ".".join(part for part in (self.member, self.name) if part)


@dataclass(frozen=True)
class RunOptions:
    """How a recorded run is done.

    Attributes:
        seed: Of the draws of every step.
        steps: How many optimizer steps.
        alike: Whether every member draws the same random numbers in a step, as it would alone.
        operations: Whether every module's output, and the gradient there, is recorded too.
        values: Whether to keep copies beside digests.
    """

    seed: int
    steps: int
    alike: bool = False
    operations: bool = False
    values: bool = False


def recorded(case: Case, run: RunOptions) -> tuple[Entry, ...]:
    """Trains the case's model for some steps and records them; the model is as before afterwards.

    Where the subject has none, the optimizer is SGD with momentum on everything, and the loss is
    the sum over members of the mean squared distance to fixed random targets.

    Args:
        case: The model and how it is trained; without a batch, only what it holds is recorded.
        run: How many steps, and what to record.

    Raises:
        ValueError: If the model cannot be trained like this.

    Example:
        >>> case = Case.of(nn.Linear(2, 1), torch.ones(3, 2))
        >>> entries = recorded(case, RunOptions(seed=0, steps=1))
        >>> [f"{e.step} {e.kind} {e.place}" for e in entries][:4]
        ['0 parameter model.weight', '0 parameter model.bias', '1 output model.0', '1 loss ']
    """
    return tuple(_train(case, run))


def recorded_anew(subject: Subject, run: RunOptions) -> tuple[Model, tuple[Entry, ...]]:
    """Makes the model with the present generators, and records construction, batch and run.

    Returns:
        The model, and its entries. A subject without a batch is constructed only.

    Example:
        >>> _, entries = recorded_anew(Subject(make=nn.Identity), RunOptions(seed=0, steps=3))
        >>> {entry.kind for entry in entries}
        {'generator'}
    """
    model = new_model(subject.make)
    named_modules_of(model)
    made = list(generator_entries())
    batch = None
    if subject.batch is not None:
        then = "It takes nothing, and returns what the model is called with."
        batch = asked("batch", subject.batch, then=then)
    made += [
        Entry(0, "batch", "", str(i), digest(leaf))
        for i, leaf in enumerate(pytree.tree_leaves(batch))
        if isinstance(leaf, Tensor)
    ]
    case = Case(replace(subject, make=lambda: model, batch=lambda: batch), seed=run.seed)
    run = run if batch is not None else replace(run, steps=0)
    return model, (*made, *recorded(case, run))


def digest(value: Any) -> str:
    """Of a tensor its dtype, shape and bits; of anything else its text.

    Raises:
        ValueError: If it is a tensor whose memory PyTorch does not show.

    Example:
        >>> digest(torch.zeros(2)) == digest(torch.zeros(2)), digest(torch.tensor([0.0, -0.0]))
        (True, ...)
        >>> digest(torch.zeros(2)) == digest(torch.tensor([0.0, -0.0]))
        False
    """
    if not isinstance(value, Tensor):
        return blake2b(repr(value).encode(), digest_size=8).hexdigest()
    inner = inner_tensors(value) if is_shell(value) else ()
    if inner:
        return digest((type(value).__name__, [digest(part) for part in inner]))
    dense = numbers_in(value).resolve_conj().resolve_neg().cpu().contiguous()
    found = blake2b(f"{dense.dtype} {tuple(dense.shape)}".encode(), digest_size=8)
    size = dense.numel() * dense.element_size()
    if size:
        found.update((ctypes.c_ubyte * size).from_address(dense.data_ptr()))
    return found.hexdigest()


def generator_entries() -> Iterator[Entry]:
    """The state of the global random generators of Python, torch and (where in use) numpy.

    Example:
        >>> [entry.name for entry in generator_entries()][:2]
        ['python', 'torch']
    """
    yield Entry(0, "generator", "", "python", digest(random.getstate()))
    yield Entry(0, "generator", "", "torch", digest(torch.get_rng_state()))
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        yield Entry(0, "generator", "", "numpy", digest((kind, keys.tolist(), rest)))


def tensor_entries(
    model: Model, members: Members | None, step: int = 0, *, values: bool = False
) -> Iterator[Entry]:
    """Every parameter and buffer, under the member that has it.

    Example:
        >>> [entry.place for entry in tensor_entries([nn.Linear(2, 2)], None)]
        ['0.weight', '0.bias']
    """
    yield from _Tensors(model, members, values).entries(step)


# --- the run ------------------------------------------------------------------------------------


def _train(case: Case, run: RunOptions) -> Iterator[Entry]:
    model, recipe, modules = case.model, case.subject, list(case.modules.values())
    # Generators too, because a step's draws are seeded where members are to draw alike.
    with (
        generators_kept(),
        torch.inference_mode(False),
        torch.enable_grad(),
        case.preserved(),
        ExitStack() as stack,
    ):
        tensors = _Tensors(model, recipe.members, run.values)
        holders = tensors.holders
        yield from tensors.entries(0)
        if not run.steps:
            return
        for module in modules:
            module.train()
        optimizers = optimizers_of(recipe.optimizer or _with_momentum, model)
        with _told("scheduler", SCHEDULER):
            advances = [step for o in optimizers for step in advances_of(o, recipe.scheduler)]
        clock = _Clock(run.seed)
        if run.alike and is_one_module(model) and recipe.members is not None:
            for member, module in holders.items():
                stack.enter_context(_hooked(member, module, clock))
        finite = tensors.finite_parameters()
        log: list[Entry] = []
        if run.operations:
            stack.enter_context(_watched(model, clock, log))
        for step in range(1, run.steps + 1):
            clock.step = step
            for p in {*_held(optimizers), *(p for m in modules for p in m.parameters())}:
                p.grad = None
            outputs: dict[str, tuple[Tensor, ...]] = {}
            for called in [model] if case.is_one_module else _each_alone(model):
                if run.alike:
                    clock.rewind()
                outputs |= case.call(called)
            # One output of several members, as their mean, is nobody's: only runs in which each
            # member is followed need to know whose it is.
            pair = len(outputs) > 1 or run.alike if recipe.members else not is_one_module(model)
            named = _paired(outputs, holders) if pair else {}
            found = [
                tensors.entry(step, "output", named.get(member, member), str(i), y)
                for member, ys in outputs.items()
                for i, y in enumerate(ys)
            ]
            if run.alike:
                clock.rewind()
            loss = _loss(case, outputs, step)
            _backward(loss, step)
            yield from log
            log.clear()
            yield from found
            yield replace(tensors.entry(step, "loss", "", "", loss), norm=float(loss.detach()))
            yield from tensors.gradients(step)
            _move(case, optimizers, advances)
            case.parts.check_finite(finite, step)
            yield from tensors.entries(step)
            yield from tensors.states(step, optimizers)


def _loss(case: Case, outputs: Mapping[str, tuple[Tensor, ...]], step: int) -> Tensor:
    try:
        return case.parts.loss_of(case.subject.loss or _distance, outputs, step)
    except NotFiniteError as error:
        if case.subject.loss is not None:
            raise
        raise ValueError(
            "the mean squared distance of the outputs to fixed random targets, which is the "
            f"check's own loss, is {float(error.value.detach())} before any step. Nothing can be "
            "concluded from it: give loss=... that the model is trained with."
        ) from error


def _backward(loss: Tensor, step: int) -> None:
    try:
        loss.backward()  # type: ignore[no-untyped-call]
    except ERRORS as error:
        raise ValueError(raised(f"in step {step}, the backward pass of the loss", error)) from error


def _move(
    case: Case, optimizers: Sequence[Optimizer], advances: Sequence[Callable[[], Any]]
) -> None:
    """What training does with gradients, from clipping to the schedule."""
    case.parts.restrain(_held(optimizers))
    if case.subject.clip is not None:
        with _told("clip", CLIP):
            case.subject.clip(case.model)
    for optimizer in optimizers:
        _step(optimizer)
    with _told("scheduler", SCHEDULER):
        for advance in advances:
            advance()


def _step(optimizer: Optimizer) -> None:
    try:
        optimizer.step()
    except ERRORS as error:
        what = f"{type(optimizer).__name__}.step()"
        then = "Runs are recorded by steps without a closure."
        raise ValueError(raised(what, error, then, of=optimizer)) from error


@contextmanager
def _told(what: str, takes: str) -> Iterator[None]:
    """Says whose function it is that raises inside."""
    try:
        yield
    except ERRORS as error:
        raise ValueError(raised(f"{what}=...", error, f"It takes {takes}.")) from error


def _with_momentum(model: Model) -> Optimizer:
    return plain_sgd(model, momentum=MOMENTUM)


def _distance(outputs: Mapping[str, Any]) -> Tensor:
    """The default loss: of every member alike, and with a gradient in every output."""
    losses = []
    for value in outputs.values():
        generator = torch.Generator().manual_seed(0)
        for y in value if isinstance(value, tuple) else (value,):
            target = as_kind_of(torch.randn(y.shape, generator=generator), y)
            losses.append((y - target).square().mean())
    return torch.stack(losses).sum()


def _held(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    return [p for o in optimizers for group in o.param_groups for p in group["params"]]


class _Clock:
    """Which step it is; `rewind` starts the step's random numbers anew."""

    def __init__(self, seed: int) -> None:
        self.seed, self.step = seed, 0

    def rewind(self, *_: Any) -> None:
        # Far apart, so that no step of one seed is a step of the next.
        seed_generators(self.seed + 1_000_003 * self.step)


def _each_alone(model: Model) -> Iterator[Model]:
    """Every member as an ensemble of one, under its own name."""
    yield from ({name: module} for name, module in named_modules_of(model).items())


@contextmanager
def _hooked(member: str, module: nn.Module, clock: _Clock) -> Iterator[None]:
    """Inside, the member draws the same random numbers at each call in a step."""
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f"member {member} is a ScriptModule inside another module, and takes no hook, so that "
            "its random numbers cannot be set. Give the members as a list."
        )
    with _removed(module.register_forward_pre_hook(clock.rewind)):
        yield


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _watched(model: Model, clock: _Clock, log: list[Entry]) -> Iterator[None]:
    """Records every module's output when it returns, and the gradient there when it arrives.

    Scripted modules take no hooks, and what is compiled is one operation: it has no modules.
    """
    names: dict[nn.Module, str] = {}
    for member, module in named_modules_of(model).items():
        for name, inner in module.named_modules():
            path = ".".join(filter(None, (member, name)))
            if not isinstance(inner, torch.jit.ScriptModule) and "_orig_mod" not in path:
                names.setdefault(inner, path)
    calls: Counter[tuple[int, str]] = Counter()

    def write(name: str, tensor: Tensor) -> None:
        calls[clock.step, name] += 1
        number = calls[clock.step, name]
        again = f", call {number}" if number > 1 else ""
        log.append(Entry(clock.step, "operation", "", name + again, digest(tensor)))

    def hook(module: nn.Module, _: Any, output: Any) -> None:
        told = f"of {names[module]} ({type(module).__name__})"
        for y in pytree.tree_leaves(output):
            if isinstance(y, Tensor):
                write(f"forward {told}", y)
                if y.requires_grad:
                    y.register_hook(  # type: ignore[no-untyped-call]
                        lambda g: write(f"gradient in the output {told}", g)
                    )

    with ExitStack() as stack:
        for module in names:
            stack.enter_context(_removed(module.register_forward_hook(hook)))
        yield


def _holders(model: Model, members: Members | None) -> dict[str, nn.Module]:
    return named_modules_of(model) if members is None else named_members(model, members)


def _paired(outputs: Mapping[str, Any], holders: Mapping[str, nn.Module]) -> dict[str, str]:
    """Output name to the name of the member module: the same one, or the same place."""
    if set(outputs) == set(holders):
        return {name: name for name in outputs}
    if len(outputs) != len(holders):
        raise ValueError(
            f"members=... finds {counted(holders, 'module')} ({listed(list(holders))}), and the "
            f"model yields {counted(outputs, 'output')} ({listed(list(outputs))}). Return one "
            "module for each member output, or give outputs=a function that splits them."
        )
    return dict(zip(outputs, holders, strict=True))


class _Tensors:
    """What the model registers, with the names that entries give it."""

    def __init__(self, model: Model, members: Members | None, values: bool) -> None:
        self.holders = _holders(model, members)
        self.whole = model if members is not None and is_one_module(model) else None
        self.values = values

    def entries(self, step: int) -> Iterator[Entry]:
        yield from self._each(step, "parameter", lambda tensor: tensor)
        yield from self._each(step, "buffer", lambda tensor: tensor)

    def finite_parameters(self) -> dict[str, Tensor]:
        """What is trained and holds numbers; tied parameters once, under their first name."""
        once = {
            id(p): (member, name, p) for member, name, p in reversed([*self._named("parameter")])
        }
        return {
            ".".join(filter(None, (member, name))): p
            for member, name, p in reversed(once.values())
            if p.requires_grad and p.detach().isfinite().all()
        }

    def gradients(self, step: int) -> Iterator[Entry]:
        yield from self._each(step, "gradient", lambda parameter: parameter.grad)

    def states(self, step: int, optimizers: Sequence[Optimizer]) -> Iterator[Entry]:
        for member, name, parameter in self._named("parameter"):
            for optimizer in optimizers:
                for key, value in optimizer.state.get(parameter, {}).items():
                    yield self.entry(step, "state", member, f"{name} {key}", value)

    def entry(self, step: int, kind: str, member: str, name: str, value: Any) -> Entry:
        if not isinstance(value, Tensor):
            return Entry(step, kind, member, name, digest(value))
        wide = numbers_in(value, f"{kind} {name}").cpu()
        number = wide if wide.is_floating_point() or wide.is_complex() else wide.double()
        accumulated = torch.complex128 if number.is_complex() else torch.float64
        norm = float(torch.linalg.vector_norm(number, dtype=accumulated))
        kept = wide.clone() if self.values else None
        return Entry(step, kind, member, name, digest(value), norm, kept)

    def _each(
        self, step: int, kind: str, look: Callable[[Tensor], Tensor | None]
    ) -> Iterator[Entry]:
        seen: dict[int, Entry] = {}  # tied tensors are read once
        for member, name, tensor in self._named("buffer" if kind == "buffer" else "parameter"):
            if id(tensor) not in seen:
                seen[id(tensor)] = self.entry(step, kind, member, name, look(tensor))
            yield replace(seen[id(tensor)], member=member, name=name)

    def _named(self, kind: str) -> Iterator[tuple[str, str, Tensor]]:
        seen: set[int] = set()
        for member, module in self.holders.items():
            listing = module.named_buffers if kind == "buffer" else module.named_parameters
            for name, tensor in listing(remove_duplicate=False):
                seen.add(id(tensor))
                yield member, name, tensor
        if self.whole is not None:  # what is no member's, such as a common stem
            listing = self.whole.named_buffers if kind == "buffer" else self.whole.named_parameters
            yield from (("", name, tensor) for name, tensor in listing() if id(tensor) not in seen)
