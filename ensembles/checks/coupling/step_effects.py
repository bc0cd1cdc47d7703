"""What one training step on one member moves of everything that the others have.

Every step starts from the same state and random numbers, and what is seen after it is compared,
bit by bit, with a control without it:

- members that are a list or dict of modules: only the member that is trained is called in train
  mode, and the control is the untouched state, so a buffer that another shares is seen to move;
- one module that computes all members: the control is the same call without the step, because
  buffers move by the call. One call serves all members; each has a backward pass of its own.
  A call that draws random numbers is looked at in other draws too.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ensembles.case import Case
from ensembles.handling.state import (
    Snapshot,
    copy_of,
    generators_kept,
    graph_kept,
    parameters_kept,
    preserved,
    seed_generators,
)
from ensembles.handling.training import (
    LEARNING_RATE,
    hidden_modules,
    projected_gradients,
    set_training,
    values_of,
)
from ensembles.instruments.distances import distance
from ensembles.message import counted, listed
from ensembles.subject import SPLIT, Model
from ensembles.user_calls import ERRORS, raised

__all__ = ["Moved", "StepEffects", "other_members", "step_effects"]


DRAWS = 8
"""Other draws of what a call draws itself: members that mix in one call of three are missed with a
probability of (2/3)^9 = 3 %."""


@dataclass(frozen=True)
class Moved:
    """Something of one member that a change of another moved.

    Attributes:
        step: The member that was changed: by a training step, or for the loss only.
        member: The member that moved.
        kind: "output", "parameter" or "buffer"; "loss" where the gradient that the training loss
            gives to `member` depends on what `step` predicts, or "penalty" where it depends on
            the weights of `step` by themselves.
        name: Of the parameter or buffer.
        by: The greatest absolute change; not compared, since its last digits are the machine's.
    """

    step: str
    member: str
    kind: str
    name: str
    by: float = field(compare=False)

    @property
    def place(self) -> str:
        """Kind and name."""
        return f"{self.kind} {self.name}".rstrip()


@dataclass(frozen=True)
class StepEffects:
    """What a step on each member moves of the others.

    Attributes:
        members: The members' names.
        modules: By these, the member modules whose parameters and buffers were compared beside
            outputs; empty where they are not known.
        moved: Everything that moved, in the order of steps and members.
        draws: How many draws of what a training call draws were looked at.
    """

    members: tuple[str, ...]
    modules: Mapping[str, nn.Module]
    moved: tuple[Moved, ...]
    draws: int = 1


def step_effects(case: Case) -> StepEffects:
    """Takes one step on each member alone, along a fixed random projection of its output.

    Gradients are scaled to a largest element of 1, tensor by tensor, and learning rates above 0.01
    are lowered to that. What the optimizer moves where gradients are zero (weight decay of a packed
    weight) is no effect. The model, its gradients and the random generators are as before.

    Raises:
        ValueError: If there are fewer than two members, the model is not deterministic, the
            optimizer cannot train a member at all, or something given does not fit.

    Example:
        >>> one = nn.Linear(4, 2, bias=False)
        >>> found = step_effects(Case.of([one, nn.Sequential(one)], torch.ones(3, 4)))
        >>> [(moved.step, moved.member, moved.place) for moved in found.moved][:2]
        [('0', '1', 'output'), ('0', '1', 'parameter 0.weight')]
    """
    holders = case.members if case.members_known else {}
    modules = [*case.modules.values(), *holders.values()]
    modules += hidden_modules(modules)
    with preserved(modules):
        held = _held_by(case.optimizers())
    registered = {id(p) for module in modules for p in module.parameters()}
    # An optimizer may also hold tensors that no module registers: they are stepped too.
    modules.append(_Keep([p for p in held if id(p) not in registered]))
    with preserved(modules) as start:
        if case.is_one_module:
            _train_call(case, case.model)
        with parameters_kept(case.model):
            found = _yielded(case)
        _check_members(found)
        bench = _Bench(case, _named_as(list(found), holders), modules)
        control = _Seen(found, bench.tensors()).copied()
        start.restore()
        if case.is_one_module:
            moved, draws = _steps_of_one(bench, control)
        else:
            moved, draws = list(_steps_of_several(bench, control, start)), 1
    return StepEffects(tuple(control.outputs), bench.holders, tuple(moved), draws)


def other_members(in_eval: Iterable[str], in_training: Iterable[str]) -> ValueError:
    """The error of a model that yields other members in train mode than in eval mode.

    Example:
        >>> raise other_members(["0", "1"], ["0"])
        Traceback (most recent call last):
        ValueError: the model yields members 0, 1 in eval mode and 0 in train mode. ...
    """
    return ValueError(
        f"the model yields members {listed(list(in_eval))} in eval mode and "
        f"{listed(list(in_training))} in train mode. Give outputs=a function that finds the same "
        "members in both."
    )


# --- what is seen -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """What a step can move of each member: outputs in eval mode, and registered tensors."""

    outputs: Mapping[str, tuple[Tensor, ...]]
    tensors: Mapping[str, Mapping[tuple[str, str], Tensor]]

    def copied(self) -> _Seen:
        """The same values in memory of their own, each tied tensor once."""
        copies = {id(t): copy_of(t) for held in self.tensors.values() for t in held.values()}
        return _Seen(
            {member: tuple(y.clone() for y in ys) for member, ys in self.outputs.items()},
            {
                member: {place: copies[id(t)] for place, t in held.items()}
                for member, held in self.tensors.items()
            },
        )


@dataclass(frozen=True)
class _Bench:
    """A case, and where a step on one of its members is looked for."""

    case: Case
    holders: Mapping[str, nn.Module]
    """The member modules, where they are known."""
    everything: list[nn.Module]
    """All that a call or a step may change."""

    def see(self) -> _Seen:
        """What the model now yields and holds; the tensors are the model's own."""
        return _Seen(_yielded(self.case), self.tensors())

    def tensors(self) -> dict[str, dict[tuple[str, str], Tensor]]:
        once: dict[int, Tensor] = {}
        return {
            member: {
                (kind, name): once.setdefault(id(tensor), tensor.detach())
                for kind, named in (
                    ("parameter", module.named_parameters(remove_duplicate=False)),
                    ("buffer", module.named_buffers(remove_duplicate=False)),
                )
                for name, tensor in named
            }
            for member, module in self.holders.items()
        }


def _yielded(case: Case) -> dict[str, tuple[Tensor, ...]]:
    """Outputs in eval mode, and of one module in train mode before.

    Members of one module may also mix in train mode only, or by what it leaves in buffers.
    """
    trained = _train_call(case, case.model).outputs if case.is_one_module else {}
    for module in case.modules.values():
        module.eval()
    return {
        member: tuple(y.detach() for y in (*ys, *trained.get(member, ())))
        for member, ys in case.call().items()
    }


def _differences(before: _Seen, after: _Seen, step: str) -> Iterator[Moved]:
    """All that differs of other members than the one that was stepped, outputs first in each."""
    distances: dict[tuple[int, int], float] = {}  # tied tensors are compared once
    for member, outputs in before.outputs.items():
        if member == step:
            continue
        others = after.outputs.get(member, ())
        if len(others) != len(outputs):
            yield Moved(step, member, "output", "", math.inf)
        elif by := max(distance(a, b) for a, b in zip(outputs, others, strict=True)):
            yield Moved(step, member, "output", "", by)
        held = after.tensors.get(member, {})
        for place, tensor in before.tensors.get(member, {}).items():
            other = held.get(place)
            key = (id(tensor), id(other))
            if key not in distances:
                distances[key] = distance(tensor, other)
            if distances[key]:
                yield Moved(step, member, *place, distances[key])


# --- controls -----------------------------------------------------------------------------------


def _check_members(found: Mapping[str, Sequence[Tensor]]) -> None:
    if len(found) < 2:
        raise ValueError(
            f"coupling compares members, and only one was found ({listed(list(found))}). {SPLIT}"
        )
    for name, tensors in found.items():
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise ValueError(
                f"the output of member {name} holds NaN or infinity before any step. Nothing can "
                "be concluded from it."
            )


def _named_as(names: list[str], holders: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
    """The member modules by the names of the outputs, which they have or whose order they have."""
    if holders and len(holders) != len(names):
        raise ValueError(
            f"members=... finds {counted(holders, 'module')} ({listed(list(holders))}), and the "
            f"model yields {counted(names, 'output')} ({listed(names)}). Return one module for "
            "each member output."
        )
    if not holders or set(holders) == set(names):
        return holders
    return dict(zip(names, holders.values(), strict=True))


def _check_repeated(control: _Seen, again: _Seen) -> None:
    """Only a model that repeats can be judged."""
    for differs in _differences(control, again, ""):
        raise ValueError(
            f"the model is not deterministic: {differs.place} of member {differs.member} differs "
            f"by {differs.by:.0e} between two runs from the same state and random numbers, so that "
            "what a step moves cannot be told. Use torch.use_deterministic_algorithms(True), or "
            "one thread, and keep no state outside parameters and buffers."
        )


# --- steps --------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """A call in train mode: all that the optimizer trains, what members yield, what was drawn."""

    trained: list[Tensor]
    outputs: Mapping[str, tuple[Tensor, ...]]
    drawn: bool


def _steps_of_several(bench: _Bench, control: _Seen, start: Snapshot) -> Iterator[Moved]:
    _check_repeated(control, bench.see())
    for step, module in bench.case.modules.items():
        start.restore()
        call = _train_call(bench.case, {step: module})
        _take_step(bench.case, _gradients(step, call))
        yield from _differences(control, bench.see(), step)


def _steps_of_one(bench: _Bench, control: _Seen) -> tuple[list[Moved], int]:
    """What moved, and in how many draws of the call that was looked for."""
    with graph_kept(bench.everything):
        call = _train_call(bench.case, bench.case.model)
    if not control.outputs.keys() <= call.outputs.keys():
        raise other_members(control.outputs, call.outputs)
    touched: dict[str, _Touched] = {}
    moved: list[Moved] = []
    with preserved(bench.everything) as called:
        _check_repeated(control, bench.see())
        for step in control.outputs:
            called.restore()
            gradients = _gradients(step, call)
            touched[step] = _touched(gradients)
            _take_step(bench.case, gradients)
            seen = bench.see()
            found = list(_differences(control, seen, step))
            if found and bench.case.subject.optimizer is not None:
                # What the same step makes of zero gradients (decay) is no effect.
                seen = seen.copied()
                called.restore()
                _take_step(bench.case, [(p, torch.zeros_like(g)) for p, g in gradients])
                if called.changed():
                    found = list(_differences(bench.see(), seen, step))
            moved += found
    if not call.drawn:
        return moved, 1
    moved += _steps_by_chance(bench, touched, {(m.step, m.member) for m in moved})
    return moved, 1 + DRAWS


# --- members that mix in some draws -------------------------------------------------------------

_Touched = Mapping[int, Tensor]
"""By the id of a parameter, the elements that have a gradient."""


def _touched(gradients: Iterable[tuple[Tensor, Tensor]]) -> _Touched:
    return {id(p): (g.to_dense() if g.is_sparse else g) != 0 for p, g in gradients}


def _steps_by_chance(
    bench: _Bench, touched: Mapping[str, _Touched], known: set[tuple[str, str]]
) -> Iterator[Moved]:
    """What steps move in other draws of the call, if its gradient reaches what is another's.

    Where a member's gradient stays within what it had before, or within what is nobody's or is
    known to move, no step is taken.
    """
    known = set(known)
    for draw in range(1, DRAWS + 1):
        with preserved(bench.everything):
            seed_generators(bench.case.seed + draw)
            with graph_kept(bench.everything):
                call = _train_call(bench.case, bench.case.model)
            gradients = {step: _gradients(step, call, draw=draw) for step in touched}
            reached = {step: _touched(each) for step, each in gradients.items()}
            suspects = [step for step in touched if _reaches_another(step, reached, touched, known)]
            if not suspects:
                continue
            with preserved(bench.everything) as called:
                control = bench.see().copied()
                for step in suspects:
                    called.restore()
                    _take_step(bench.case, gradients[step])
                    found = list(_differences(control, bench.see(), step))
                    found = [moved for moved in found if (step, moved.member) not in known]
                    known |= {(step, moved.member) for moved in found}
                    yield from found


def _generator_states() -> tuple[Any, ...]:
    return random.getstate(), bytes(torch.get_rng_state().tolist())


def _reaches_another(
    step: str,
    reached: Mapping[str, _Touched],
    touched: Mapping[str, _Touched],
    moved: set[tuple[str, str]],
) -> bool:
    """Whether a gradient is where another member's is, and was not there before."""
    for key, elements in reached[step].items():
        new = elements & ~touched[step][key] if key in touched[step] else elements
        for other, known in touched.items():
            if other == step or (step, other) in moved or key not in known:
                continue
            if bool((new & known[key]).any()):
                return True
    return False


def _train_call(case: Case, model: Model) -> _Call:
    with generators_kept():
        held = _held_by(case.optimizers())  # before the call, because building may freeze
        trained = [tensor for tensor in held if tensor.requires_grad]
    set_training(case.model, model)
    with generators_kept(), parameters_kept(model):
        before = _generator_states()
        outputs = case.call(model)
        return _Call(trained, outputs, before != _generator_states())


def _gradients(step: str, call: _Call, *, draw: int = 0) -> list[tuple[Tensor, Tensor]]:
    """What a step on one member descends. Without any, every member would look independent."""
    with generators_kept():
        gradients = projected_gradients(call.outputs[step], call.trained)
    found = [(p, g) for p, g in zip(call.trained, gradients, strict=True) if g is not None]
    # A member may be dropped in one of several draws.
    if not draw and not any(bool(values_of(gradient).any()) for _, gradient in found):
        raise ValueError(
            f"there is no training step on member {step}: its output has no gradient (None or "
            "zero) in anything that the optimizer holds, so that nothing can be concluded. "
            "Usual cause: members in a Python list, frozen parameters, detach, or an "
            "optimizer of another model; the coverage check says which."
        )
    return [(p, _scaled(g)) for p, g in found]


def _take_step(case: Case, gradients: Sequence[tuple[Tensor, Tensor]]) -> None:
    with generators_kept():
        optimizers = case.optimizers()
        for parameter, gradient in gradients:
            parameter.grad = _laid_out(gradient, parameter)
        for optimizer in optimizers:
            try:
                with _at_most(optimizer, LEARNING_RATE):
                    optimizer.step()
            except ERRORS as error:
                then = "The check steps without a closure, on gradients that it has set."
                what = f"{type(optimizer).__name__}.step()"
                raise ValueError(raised(what, error, then, of=optimizer)) from error


def _held_by(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return list({id(p): p for group in groups for p in group["params"]}.values())


def _laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    """As backward() accumulates it: fused optimizers read memory, and trust the strides."""
    if gradient.layout is not torch.strided:
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


@contextmanager
def _at_most(optimizer: Optimizer, rate: float) -> Iterator[None]:
    """Learning rates are capped, so that a step on a deep network does not blow numbers up."""
    before = [group.get("lr") for group in optimizer.param_groups]
    try:
        for group, lr in zip(optimizer.param_groups, before, strict=True):
            if isinstance(lr, Tensor):
                group["lr"] = lr.clamp(max=rate)
            elif lr is not None:
                group["lr"] = min(lr, rate)
        yield
    finally:
        for group, lr in zip(optimizer.param_groups, before, strict=True):
            if lr is not None:
                group["lr"] = lr


def _scaled(gradient: Tensor) -> Tensor:
    gradient = gradient.coalesce() if gradient.is_sparse else gradient
    largest = values_of(gradient).abs().max()
    return gradient / largest if largest > 0 and largest.isfinite() else gradient


class _Keep(nn.Module):
    """Registers tensors that no module of the user's registers, so that they are preserved."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        for number, tensor in enumerate(tensors):
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(f"held{number}", tensor)
            else:
                self.register_buffer(f"held{number}", tensor)
