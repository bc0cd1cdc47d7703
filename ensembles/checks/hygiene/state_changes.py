"""What moves in a model when it is called in eval mode, and when it is trained for a few steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ensembles.case import Case
from ensembles.checks.hygiene.averaged_norms import Averages
from ensembles.checks.hygiene.batchnorm_updates import NormUpdates
from ensembles.checks.hygiene.call_trace import Usage
from ensembles.checks.hygiene.hidden_state import memory_of
from ensembles.checks.hygiene.input_mutation import Writes
from ensembles.checks.hygiene.masks import masked_elements
from ensembles.findings import Finding
from ensembles.handling.memory import as_kind_of
from ensembles.handling.precision import autocasts, dtypes_of
from ensembles.handling.registered_tensors import Registered, registered
from ensembles.handling.state import Snapshot, copy_of, seed_generators
from ensembles.handling.training import gradients_of, projected_gradients, values_of
from ensembles.instruments.distances import distance
from ensembles.instruments.recording import generator_entries
from ensembles.instruments.tensor_locations import Location, Search, things_below
from ensembles.message import listed
from ensembles.tolerance import clear_change, tolerance_of
from ensembles.user_calls import ERRORS, raised

__all__ = ["Trained", "moved_in_eval", "moved_in_training"]

STEPS_LOOKED_AT = 3
"""A loss that is drawn leaves a member out in one of a few steps; momentum needs a step before."""

MOVED = 0.2
"""Least share by which the last weight of a row grows, to see whether outputs are those of before.
Those before it grow by less, because a norm would undo one factor for all."""


# --- in eval mode -------------------------------------------------------------------------------


def moved_in_eval(
    case: Case,
    hidden: Sequence[tuple[Location, nn.Module]],
    start: Snapshot,
    search: Search | None = None,
) -> tuple[set[int], list[Finding]]:
    """The modules that a call in eval mode uses, by id, and what it moves or draws.

    Args:
        case: The case.
        hidden: Modules that nothing registers, with their places.
        start: The state of all modules that every call begins from.
        search: Is told how far the search for hidden tensors came.

    Example:
        >>> net = nn.Dropout(0.5)
        >>> used, found = moved_in_eval(Case.of(net, torch.ones(2, 3)), [], Snapshot(net))
        >>> id(net) in used, found
        (True, [])
    """
    everything = [*case.modules.values(), *(module for _, module in hidden)]
    held = {id(t) for m in everything for t in (*m.parameters(), *m.buffers())}
    places: dict[int, tuple[Location, Tensor]] = {}
    for place, thing in things_below(case.model, search):
        if isinstance(thing, Tensor) and id(thing) not in held:
            places.setdefault(id(thing), (place, thing))
    named = [(e.names[0], e.tensor) for e in registered(case.model)]
    named += [(f"{place.path}.{n}", b) for place, m in hidden for n, b in m.named_buffers()]

    found: list[Finding] = []
    watched = {key: tensor for key, (_, tensor) in places.items()}
    with Usage(watched) as usage, Writes(case) as writes, autocasts() as cast:
        _set_eval(case)  # which may merge weights
        before = {name: copy_of(tensor) for name, tensor in named}
        _eval_call(case, case.seed, start.restore, writes.batch)
    found += _written(writes, "eval")
    for name, tensor in named:
        by = distance(before[name], tensor)
        if by:
            told = f"changes by {by:.0e} in one call"
            found.append(Finding(kind="moves in eval", place=name, found=told, amount=by))
    for key in usage.mixed:
        (path, how), tensor = places[key]
        told = f"shape {tuple(tensor.shape)}, kept {how}"
        found.append(Finding(kind="hidden tensor", place=path, found=told, amount=tensor.numel()))
    found += _left_otherwise(case, start)
    # Without the recorder, in whose presence PyTorch takes no fused kernels.
    first, again = (_eval_call(case, case.seed, start.restore) for _ in range(2))
    states = [_generators()]
    other = _eval_call(case, case.seed + 1, start.restore)
    states.append(_generators())
    found += _seeded_by(states, "eval")
    unlike = [_most(first, again), _most(first, other)]
    if by := max(unlike):
        drawn = f" because of {listed(list(usage.random), 3)}" if usage.random else ""
        which = "outputs of two calls" if unlike[0] else "outputs under two seeds"
        told = f"differ by {by:.0e}{drawn}"
        found.append(Finding(kind="random in eval", place=which, found=told, amount=by))
    elif not any(one.kind == "moves in eval" for one in found):
        dtypes = dtypes_of(case.model, case.batch, first, *cast)
        found += _kept_from_calls(case, first, start, dtypes)
    return set(usage.modules), found


def _set_eval(case: Case) -> None:
    for module in case.modules.values():
        module.eval()


def _set_train(case: Case) -> None:
    for module in case.modules.values():
        module.train()


def _eval_call(
    case: Case, seed: int, before: Callable[[], None], batch: Any = None
) -> list[Tensor]:
    """The outputs of a call in eval mode under a seed, after what is to be done before."""
    before()
    _set_eval(case)
    seed_generators(seed)
    return [y.detach().clone() for ys in case.call(batch=batch).values() for y in ys]


def _kept_from_calls(
    case: Case, first: list[Tensor], start: Snapshot, dtypes: set[torch.dtype]
) -> Iterator[Finding]:
    """What a call leaves in plain attributes, seen in the next one and after other weights.

    `first` are the outputs of a call that began from `start`; `dtypes` took part in it.
    """
    start.restore()
    _set_train(case)
    trainable = [e.tensor for e in registered(case.model) if e.tensor.requires_grad]

    def trained() -> None:
        """As by training: other weights, in their place."""
        _set_train(case)
        for p in trainable:
            if not (p.is_floating_point() and p.layout is torch.strided):
                continue
            # What is expanded is one number in several places, and cannot be written.
            if all(size < 2 or step for size, step in zip(p.shape, p.stride(), strict=True)):
                most, places = 1 + clear_change(MOVED, *dtypes), p.shape[-1] if p.ndim else 1
                factors = torch.linspace(1.0, most, places + 1)[1:]
                p.mul_(as_kind_of(factors.expand(p.shape) if p.ndim else factors[0], p)).add_(0.01)

    def trained_anew() -> None:
        start.restore()
        trained()

    _eval_call(case, case.seed, start.restore)
    before = _constants(case)
    with torch.enable_grad():
        second = _eval_call(case, case.seed, lambda: None)
        switched = not torch.is_grad_enabled()
    if switched:
        told = "switched off by a call in eval mode"
        yield Finding(kind="global state", place="gradients", found=told)
    by = _most(first, second)
    if by > _allowed(dtypes, first):
        told, place = f"differ by {by:.0e} from those of the first", "outputs of a second call"
        yield Finding(kind="moves in eval", place=place, found=told, amount=by)
        return
    for name, value in _constants(case).items():
        if value != before.get(name):
            told = f"changes from {before.get(name)} to {value} in one call"
            yield Finding(kind="moves in eval", place=name, found=told)
    with suppress(ValueError):  # a call that other weights make impossible tells nothing
        cached, anew = (_eval_call(case, case.seed, change) for change in (trained, trained_anew))
        by = _most(cached, anew)
        if by > _allowed(dtypes, anew):
            told = f"differ by {by:.0e} from those of a model that was not called before"
            place = "outputs after other weights"
            yield Finding(kind="stale", place=place, found=told, amount=by)


def _allowed(dtypes: set[torch.dtype], outputs: list[Tensor]) -> float:
    """Roundings: weights that are merged and taken apart again are not the same bit by bit."""
    greatest = max((float(y.abs().max()) for y in outputs if y.numel()), default=0.0)
    return tolerance_of("recomputed", *dtypes) * greatest


def _constants(case: Case) -> dict[str, Any]:
    """What layers declare as constants, such as the momentum of a norm or the rate of dropout."""
    return {
        ".".join(filter(None, (member, name, constant))): vars(inner)[constant]
        for member, module in case.modules.items()
        for name, inner in module.named_modules()
        for constant in getattr(type(inner), "__constants__", ())
        if isinstance(vars(inner).get(constant), (bool, int, float))
    }


def _written(writes: Writes, mode: str) -> Iterator[Finding]:
    for place, by, where in writes.found():
        told = f"changes by {by:.0e} in one call in {mode} mode"
        told += f", first in {where}" if where else ""
        yield Finding(kind="changes the batch", place=place, found=told, amount=by)


def _generators() -> dict[str, str]:
    return {entry.name: entry.digest for entry in generator_entries()}


def _seeded_by(states: Sequence[Mapping[str, str]], mode: str) -> Iterator[Finding]:
    """Generators that calls under different seeds leave in one state."""
    for name in states[0] if len(states) > 1 else ():
        if len({state.get(name) for state in states}) == 1:
            told = f"in one state after every call in {mode} mode, whatever the seed"
            yield Finding(kind="global state", place=f"generator {name}", found=told)


def _left_otherwise(case: Case, start: Snapshot) -> Iterator[Finding]:
    """Flags that a call in eval mode changed, and modules that it left in train mode.

    Modules without those inside them.
    """
    after, flags = _in_train_mode(case), _flags(case)
    start.restore()
    _set_eval(case)
    before = _in_train_mode(case)
    woken = [name for name in after if name not in before]
    for name in woken:
        if name.rpartition(".")[0] not in woken:
            told = "in train mode after a call in eval mode"
            yield Finding(kind="mode", place=name, found=told)
    yield from _switched(_flags(case), flags, "eval")


def _flags(case: Case) -> dict[str, bool]:
    entries = registered(case.model)
    return {e.names[0]: e.tensor.requires_grad for e in entries if e.kind == "parameter"}


def _switched(
    before: Mapping[str, bool], after: Mapping[str, bool], mode: str
) -> Iterator[Finding]:
    """Parameters that a call froze or made trainable."""
    for name, flag in after.items():
        if before.get(name, flag) is not flag:
            told = f"changes from {before[name]} to {flag} in one call in {mode} mode"
            yield Finding(kind="requires_grad", place=name, found=told)


def _in_train_mode(case: Case) -> list[str]:
    return [
        f"{member}.{name}" if name else member
        for member, module in case.modules.items()
        for name, inner in module.named_modules()
        if inner.training
    ]


def _most(one: list[Tensor], other: list[Tensor]) -> float:
    if len(one) != len(other):
        return math.inf
    return max((distance(a, b) for a, b in zip(one, other, strict=True)), default=0.0)


# --- in training --------------------------------------------------------------------------------


class Trained(NamedTuple):
    """What a few training steps showed.

    Attributes:
        steps: How many.
        updates: How often each norm updated its statistics in the first.
        findings: What moved without reason.
    """

    steps: int
    updates: Mapping[str, int]
    findings: Sequence[Finding]


def moved_in_training(case: Case, everything: Sequence[nn.Module], used: set[int]) -> Trained:
    """Trains for a few steps, and looks after each at what has moved; the model is left moved.

    Args:
        case: The case.
        everything: All modules, also those that nothing registers.
        used: The ids of modules that a call in eval mode uses.

    Raises:
        ValueError: If the model cannot be trained like this.

    Example:
        >>> net = nn.BatchNorm1d(3)
        >>> moved_in_training(Case.of(net, torch.randn(4, 3)), [net], {id(net)}).updates
        {'model': 1}
    """
    entries = registered(case.model)
    trainable = {e.names[0]: e.tensor for e in entries if e.tensor.requires_grad}
    steps = STEPS_LOOKED_AT if trainable else 1
    optimizers = _optimizers(case, trainable)
    averages = Averages(case.model, used)
    masked = _masked_in_eval(case, entries)
    updates: dict[str, int] = {}
    found: list[Finding] = []
    by_first: dict[str, float] = {}
    ever: set[str] = set()
    states: list[dict[str, str]] = []
    for step in range(steps):
        at_start = Snapshot(everything)
        before = _values(entries)
        norms = NormUpdates(_running_means(entries))
        _set_train(case)  # an own train() may freeze
        flags = _flags(case)
        with Writes(case) as writes, norms:
            yielded = _train_call(case, step, writes.batch)
        states.append(_generators())
        found += _written(writes, "train")
        found += _switched(flags, _flags(case), "train")
        by_forward = dict(_changed(entries, before))
        by_first = by_first or by_forward
        if masked:
            now = masked_elements(y for ys in yielded.values() for y in ys)
            masked = {k: mask & now[k] for k, mask in masked.items() if k in now}
        try:
            gradients = _gradients(case, yielded, list(trainable.values()), step + 1)
        except RuntimeError:
            if writes.found():  # autograd keeps the batch, and refuses another one
                break
            raise
        if step == 0:
            updates = _updates(entries, before, norms)
        between = _values(entries)
        for parameter, gradient in zip(trainable.values(), gradients, strict=True):
            parameter.grad = gradient
        case.parts.restrain(trainable.values())
        for each in optimizers:
            _step(each)
        case.parts.check_finite(trainable, step + 1)
        moved = dict(_changed(entries, between))
        found += _frozen_parameters(entries, moved, optimizers)
        ever |= {*by_forward, *moved}
        found += _behind_masks(entries, between, masked)
        averages.moved({n for n, g in zip(trainable, gradients, strict=True) if g is not None})
        zero = {
            name: trainable[name]
            for name, gradient in zip(trainable, gradients, strict=True)
            if name in moved and gradient is not None and not values_of(gradient).any()
        }
        if zero and case.subject.loss is not None:
            found += _drifting(case, step, zero, at_start, Snapshot(everything))
        del at_start, before, between, gradients  # of a large model, none lives beside its next
        for parameter in trainable.values():
            parameter.grad = None
    # At the end: a teacher that starts as its student's copy follows it from the second step on.
    found += _frozen_statistics(case, by_first, ever)
    found += _seeded_by(states, "train")
    found += averages.findings()
    first_of_each = {(one.kind, one.place): one for one in reversed(found)}
    return Trained(steps, updates, list(first_of_each.values()))


def _optimizers(case: Case, trainable: Mapping[str, Tensor]) -> tuple[Optimizer, ...]:
    if case.subject.optimizer is None and not trainable:
        return ()
    try:
        return case.optimizers()
    except ValueError:
        if trainable:
            raise
        return ()  # none can be built, and what hides the parameters is found


def _drifting(
    case: Case, step: int, zero: Mapping[str, Tensor], at_start: Snapshot, after: Snapshot
) -> Iterator[Finding]:
    """Parameters with gradient zero that would have one if the loss used every output."""
    at_start.restore()
    outputs = [y for ys in _train_call(case, step).values() for y in ys]
    reach = projected_gradients(outputs, list(zero.values()))
    after.restore()
    for name, gradient in zip(zero, reach, strict=True):
        if gradient is not None and values_of(gradient).any():
            told = f"moves in step {step + 1}, though its gradient is zero"
            yield Finding(kind="drifting", place=name, found=told)


def _gradients(
    case: Case, yielded: Mapping[str, tuple[Tensor, ...]], trainable: list[Tensor], step: int
) -> list[Tensor | None]:
    if case.subject.loss is None:
        return projected_gradients([y for ys in yielded.values() for y in ys], trainable)
    value = case.parts.loss_of(case.subject.loss, yielded, step)
    return gradients_of([value], [torch.ones_like(value)], trainable)


def _train_call(case: Case, step: int, batch: Any = None) -> dict[str, tuple[Tensor, ...]]:
    _set_train(case)
    seed_generators(case.seed + step)
    return case.call(batch=batch)


def _step(optimizer: Optimizer) -> None:
    try:
        optimizer.step()
    except ERRORS as error:
        then = "Give optimizer=a function that builds one whose step() needs no arguments."
        what = f"{type(optimizer).__name__}.step()"
        raise ValueError(raised(what, error, then, of=optimizer)) from error


def _values(entries: Sequence[Registered]) -> dict[str, Tensor]:
    return {e.names[0]: copy_of(e.tensor) for e in entries}


def _changed(
    entries: Sequence[Registered], before: Mapping[str, Tensor]
) -> Iterator[tuple[str, float]]:
    for entry in entries:
        by = distance(before[entry.names[0]], entry.tensor)
        if by:
            yield entry.names[0], by


def _running_means(entries: Sequence[Registered]) -> dict[str, Tensor]:
    """By the name of the norm."""
    return {
        _norm_of(e.names[0]): e.tensor
        for e in entries
        if e.names[0].rpartition(".")[2] == "running_mean" and e.tensor.numel()
    }


def _updates(
    entries: Sequence[Registered], before: Mapping[str, Tensor], norms: NormUpdates
) -> dict[str, int]:
    """Of norms that count, and of those whose statistics a call of batch_norm was given.

    Only counters know what a compiled model, or a checkpoint that is computed again, has done.
    """
    counted = {
        _norm_of(name): int(entry.tensor - before[name])
        for entry in entries
        if (name := entry.names[0]).rpartition(".")[2] == "num_batches_tracked"
    }
    seen = {name: norms.most(name) for name in _running_means(entries)}
    return counted | {
        name: max(often, counted.get(name, 0))
        for name, often in seen.items()
        if often or name in counted
    }


def _norm_of(name: str) -> str:
    return name.rpartition(".")[0] or "model"


# --- frozen, masked -----------------------------------------------------------------------------


def _frozen_statistics(
    case: Case, by_forward: Mapping[str, float], moved: set[str]
) -> Iterator[Finding]:
    """Buffers that a call moved in modules whose parameters are all frozen and at rest."""
    first = {id(e.tensor): e.names[0] for e in registered(case.model)}
    for module in case.modules.values():
        for name, inner in module.named_modules():
            own = _governing(module, name)
            if not own or any(p.requires_grad or first[id(p)] in moved for p in own):
                continue
            for _, buffer in inner.named_buffers(recurse=False):
                place = first[id(buffer)]
                if place in by_forward and not place.endswith("num_batches_tracked"):
                    told = "a call moves it, though its module is frozen"
                    yield Finding(kind="frozen moves", place=place, found=told)


def _governing(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters that tell whether a module is frozen: its own, or those around it."""
    own = list(module.get_submodule(name).parameters(recurse=False))
    while not own and name:
        name = name.rpartition(".")[0]
        own = list(module.get_submodule(name).parameters())
    return own


def _frozen_parameters(
    entries: Sequence[Registered], moved: Mapping[str, float], optimizers: Sequence[Optimizer]
) -> Iterator[Finding]:
    """Frozen parameters that an optimizer moves, and not a hook that averages into them."""
    held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    stepped = {memory_of(p) for p in held}
    for e in entries:
        by = moved.get(e.names[0])
        frozen = e.kind == "parameter" and not e.tensor.requires_grad
        if by and frozen and memory_of(e.tensor) in stepped:
            told = f"a step moves it by {by:.0e}"
            yield Finding(kind="frozen moves", place=e.names[0], found=told, amount=by)


def _masked_in_eval(case: Case, entries: Sequence[Registered]) -> dict[int, Tensor]:
    """Where masks hide elements in eval mode too: what drops weights at random does not."""
    if not any(e.tensor.requires_grad and e.tensor.ndim for e in entries):
        return {}
    start = Snapshot(case.model)
    _set_eval(case)
    found = masked_elements(y for ys in case.call().values() for y in ys)
    start.restore()
    return found


def _behind_masks(
    entries: Sequence[Registered], before: Mapping[str, Tensor], masked: Mapping[int, Tensor]
) -> Iterator[Finding]:
    for entry in entries:
        mask = masked.get(id(entry.tensor))
        if mask is None:
            continue
        then, now = before[entry.names[0]][mask], entry.tensor.detach()[mask]
        by = distance(then, now)
        if by:
            number = f"{int((then != now).sum())} of {mask.numel()} elements"
            told = f"{number} move, by up to {by:.0e}"
            yield Finding(kind="masked moves", place=entry.names[0], found=told, amount=by)
