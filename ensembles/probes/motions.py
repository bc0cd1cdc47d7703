"""What moves in a model when it is called in eval mode, and when it is trained for a few steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ensembles.calling import raised
from ensembles.message import listed
from ensembles.message import seed as present_seed
from ensembles.probes.averages import Averages
from ensembles.probes.disorders import Disorder, memory_of
from ensembles.probes.homes import things_below
from ensembles.probes.masks import masked_elements
from ensembles.probes.norms import NormUpdates
from ensembles.probes.precision import autocasts, dtypes_of
from ensembles.probes.recording import generator_entries
from ensembles.probes.registers import Registered, registered
from ensembles.probes.state import Snapshot, copy_of, seed_generators
from ensembles.probes.steps import distance
from ensembles.probes.training import (
    Loss,
    fresh,
    gradients_of,
    loss_of,
    optimizers_of,
    plain_sgd,
    projected_gradients,
    values_of,
)
from ensembles.probes.usage import Usage
from ensembles.probes.writes import Writes
from ensembles.subject import Model, Outputs, member_outputs, named_modules_of
from ensembles.tolerance import clear_change, tolerance_of

__all__ = ["Trained", "moved_in_eval", "moved_in_training"]

STEPS = 3
"""A loss that is drawn leaves a member out in one of a few steps; momentum needs a step before."""

MOVED = 0.2
"""Least share by which the last weight of a row grows, to see whether outputs are those of before;
those before it grow by less, because a norm would undo one factor for all."""


# --- in eval mode -------------------------------------------------------------------------------


def moved_in_eval(
    model: Model,
    batch: Any,
    outputs: Outputs | None,
    hidden: list[tuple[str, nn.Module]],
    everything: list[nn.Module],
    start: Snapshot,
) -> tuple[set[int], list[Disorder]]:
    """The modules that a call in eval mode uses, by id, and what it moves or draws.

    Args:
        model: One module, or the members as a list or dict of modules.
        batch: What the model is called with.
        outputs: Splits what one module returns into member outputs.
        hidden: Modules that nothing registers, with their places.
        everything: All modules, those too.
        start: The state that every call begins from.

    Example:
        >>> net = nn.Dropout(0.5)
        >>> used, found = moved_in_eval(net, torch.ones(2, 3), None, [], [net], Snapshot(net))
        >>> id(net) in used, found
        (True, [])
    """
    held = {id(t) for m in everything for t in (*m.parameters(), *m.buffers())}
    places: dict[int, tuple[str, str, Tensor]] = {}
    for path, how, thing in things_below(model):
        if isinstance(thing, Tensor) and id(thing) not in held:
            places.setdefault(id(thing), (path, how, thing))
    named = [(e.names[0], e.tensor) for e in registered(model)]
    named += [(f"{place}.{n}", b) for place, m in hidden for n, b in m.named_buffers()]

    def called(seed: int, given: Any, *, after: Callable[[], None] = start.restore) -> list[Tensor]:
        after()
        for module in named_modules_of(model).values():
            module.eval()
        seed_generators(seed)
        yielded = member_outputs(model, given, outputs=outputs)
        return [y.detach().clone() for ys in yielded.values() for y in ys]

    found = []
    seed = present_seed.get()
    watched = {key: tensor for key, (_, _, tensor) in places.items()}
    with Usage(watched) as usage, Writes(model, batch) as writes, autocasts() as cast:
        for module in named_modules_of(model).values():
            module.eval()  # which may merge weights
        before = {name: copy_of(tensor) for name, tensor in named}
        called(seed, writes.batch)
    found += _written(writes, "eval")
    for name, tensor in named:
        by = distance(before[name], tensor)
        if by:
            found.append(Disorder("moves in eval", name, f"by {by:.0e} in one call"))
    for key in usage.mixed:
        path, how, tensor = places[key]
        what = f"shape {tuple(tensor.shape)}, {how or 'a plain attribute'}"
        found.append(Disorder("hidden tensor", path, what))
    found += _woken(model, start)
    # Without the recorder, in whose presence PyTorch takes no fused kernels.
    first, again = (called(seed, fresh(batch)) for _ in range(2))
    states = [_generators()]
    other = called(seed + 1, fresh(batch))
    states.append(_generators())
    found += _seeded_by(states, "eval")
    unlike = [_most(first, again), _most(first, other)]
    if any(unlike):
        drawn = f": {listed(list(usage.random), 3)}" if usage.random else ""
        which = "outputs of two calls" if unlike[0] else "outputs under two seeds"
        found.append(Disorder("random in eval", which, f"differ by {max(unlike):.0e}{drawn}"))
    elif not any(one.kind == "moves in eval" for one in found):
        dtypes = dtypes_of(model, batch, first, *cast)
        found += _kept_from_calls(
            model, first, lambda after: called(seed, fresh(batch), after=after), start, dtypes
        )
    return set(usage.modules), found


def _kept_from_calls(
    model: Model,
    first: list[Tensor],
    called: Callable[[Callable[[], None]], list[Tensor]],
    start: Snapshot,
    dtypes: set[torch.dtype],
) -> Iterator[Disorder]:
    """What a call leaves in plain attributes, seen in the next one and after other weights.

    Args:
        model: One module, or the members as a list or dict of modules.
        first: The outputs of a first call.
        called: Calls the model in eval mode under the seed of the first, after what it is given.
        start: The state that the first call began from.
        dtypes: What takes part in a call.
    """

    def trained() -> None:
        """As by training: other weights, in their place."""
        for module in named_modules_of(model).values():
            module.train()
        for entry in registered(model):
            p = entry.tensor
            if not (p.requires_grad and p.is_floating_point() and p.layout is torch.strided):
                continue
            # What is expanded is one number in several places, and cannot be written.
            if all(size < 2 or step for size, step in zip(p.shape, p.stride(), strict=True)):
                most, places = 1 + clear_change(MOVED, *dtypes), p.shape[-1] if p.ndim else 1
                factors = torch.linspace(1.0, most, places + 1)[1:].to(p)
                p.mul_(factors if p.ndim else factors[0]).add_(0.01)

    def trained_anew() -> None:
        start.restore()
        trained()

    called(start.restore)
    before = _constants(model)
    with torch.enable_grad():
        second = called(lambda: None)
        switched = not torch.is_grad_enabled()
    if switched:
        yield Disorder("global state", "gradients", "switched off by a call in eval mode")
    by = _most(first, second)
    if by > _allowed(dtypes, first):
        place = "outputs of a second call"
        yield Disorder("moves in eval", place, f"differ by {by:.0e} from those of the first")
        return
    for name, value in _constants(model).items():
        if value != before.get(name):
            yield Disorder("moves in eval", name, f"from {before.get(name)} to {value} in one call")
    with suppress(ValueError):  # a call that other weights make impossible tells nothing
        cached, anew = called(trained), called(trained_anew)
        by = _most(cached, anew)
        if by > _allowed(dtypes, anew):
            place, than = "outputs after other weights", "if there was no call before"
            yield Disorder("stale", place, f"differ by {by:.0e} from what they are {than}")


def _allowed(dtypes: set[torch.dtype], outputs: list[Tensor]) -> float:
    """Roundings: weights that are merged and taken apart again are not the same bit by bit."""
    greatest = max((float(y.abs().max()) for y in outputs if y.numel()), default=0.0)
    return tolerance_of("recomputed", *dtypes) * greatest


def _constants(model: Model) -> dict[str, Any]:
    """What layers declare as constants, such as the momentum of a norm or the rate of dropout."""
    return {
        ".".join(filter(None, (member, name, constant))): vars(inner)[constant]
        for member, module in named_modules_of(model).items()
        for name, inner in module.named_modules()
        for constant in getattr(type(inner), "__constants__", ())
        if isinstance(vars(inner).get(constant), (bool, int, float))
    }


def _written(writes: Writes, mode: str) -> list[Disorder]:
    return [
        Disorder(
            "changes the batch",
            place,
            f"by {by:.0e} in one call in {mode} mode" + (f", first in {where}" if where else ""),
        )
        for place, by, where in writes.found()
    ]


def _generators() -> dict[str, str]:
    return {entry.name: entry.digest for entry in generator_entries()}


def _seeded_by(states: Sequence[Mapping[str, str]], mode: str) -> list[Disorder]:
    """Generators that calls under different seeds leave in one state."""
    return [
        Disorder(
            "global state", f"generator {name}", f"in one state after every call in {mode} mode"
        )
        for name in (states[0] if len(states) > 1 else ())
        if len({state.get(name) for state in states}) == 1
    ]


def _woken(model: Model, start: Snapshot) -> list[Disorder]:
    """Modules that a call in eval mode left in train mode, each without those inside it."""
    after = _in_train_mode(model)
    start.restore()
    for module in named_modules_of(model).values():
        module.eval()
    woken = [name for name in after if name not in _in_train_mode(model)]
    return [
        Disorder("mode", name, "in train mode after a call in eval mode")
        for name in woken
        if name.rpartition(".")[0] not in woken
    ]


def _in_train_mode(model: Model) -> list[str]:
    return [
        f"{member}.{name}" if name else member
        for member, module in named_modules_of(model).items()
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
    findings: Sequence[Disorder]


def moved_in_training(
    model: Model,
    batch: Any,
    outputs: Outputs | None,
    everything: list[nn.Module],
    *,
    used: set[int],
    optimizer: Callable[[Any], Any] | None = None,
    loss: Loss | None = None,
) -> Trained:
    """Trains for a few steps, and looks after each at what has moved; the model is left moved.

    Args:
        model: One module, or the members as a list or dict of modules.
        batch: What the model is called with.
        outputs: Splits what one module returns into member outputs.
        everything: All modules, also those that nothing registers.
        used: The ids of modules that a call in eval mode uses.
        optimizer: Builds the optimizer, or a list of them; by default plain SGD.
        loss: The training loss; by default a fixed random projection of all outputs.

    Raises:
        ValueError: If the model cannot be trained like this.

    Example:
        >>> net = nn.BatchNorm1d(3)
        >>> moved_in_training(net, torch.randn(4, 3), None, [net], used={id(net)}).updates
        {'model': 1}
    """
    entries = registered(model)
    trainable = {e.names[0]: e.tensor for e in entries if e.tensor.requires_grad}
    steps = STEPS if trainable else 1
    optimizers: tuple[Optimizer, ...] = ()
    if optimizer is not None or trainable:
        try:
            optimizers = optimizers_of(optimizer or plain_sgd, model)
        except ValueError:
            if trainable:  # else none can be built, and what hides the parameters is found
                raise
    averages = Averages(model, used)
    masked = _masked_in_eval(model, batch, outputs, entries)
    updates: dict[str, int] = {}
    found: list[Disorder] = []
    by_first: dict[str, float] = {}
    ever: set[str] = set()
    states: list[dict[str, str]] = []
    for step in range(steps):
        at_start = Snapshot(everything)
        before = _values(entries)
        norms = NormUpdates(_running_means(entries))
        with Writes(model, batch) as writes, norms:
            yielded = _train_call(model, writes.batch, outputs, step)
        states.append(_generators())
        found += _written(writes, "train")
        by_forward = dict(_changed(entries, before))
        by_first = by_first or by_forward
        flat = [y for ys in yielded.values() for y in ys]
        if masked:
            now = masked_elements(flat)
            masked = {k: mask & now[k] for k, mask in masked.items() if k in now}
        try:
            gradients = _gradients(yielded, loss, list(trainable.values()))
        except RuntimeError:
            if writes.found():  # autograd keeps the batch, and refuses another one
                break
            raise
        if step == 0:
            updates = _updates(entries, before, norms)
        between = _values(entries)
        for parameter, gradient in zip(trainable.values(), gradients, strict=True):
            parameter.grad = gradient
        for each in optimizers:
            _step(each)
        moved = dict(_changed(entries, between))
        found += _frozen_parameters(entries, moved, optimizers)
        ever |= {*by_forward, *moved}
        found += _behind_masks(entries, between, masked)
        averages.moved({n for n, g in zip(trainable, gradients, strict=True) if g is not None})
        zero = [
            name
            for name, gradient in zip(trainable, gradients, strict=True)
            if name in moved and gradient is not None and not values_of(gradient).any()
        ]
        if zero and loss is not None:
            after = Snapshot(everything)
            at_start.restore()
            yielded = _train_call(model, fresh(batch), outputs, step)
            flat = [y for ys in yielded.values() for y in ys]
            reach = projected_gradients(flat, [trainable[name] for name in zero])
            after.restore()
            found += [
                Disorder("drifting", name, f"gradient zero in step {step + 1}, and it moves")
                for name, gradient in zip(zero, reach, strict=True)
                if gradient is not None and values_of(gradient).any()
            ]
        del at_start, before, between, gradients  # of a large model, none lives beside its next
        for parameter in trainable.values():
            parameter.grad = None
    # At the end: a teacher that starts as its student's copy follows it from the second step on.
    found += _frozen_statistics(model, by_first, ever)
    found += _seeded_by(states, "train")
    found += averages.findings()
    first_of_each = {(one.kind, one.place): one for one in reversed(found)}
    return Trained(steps, updates, list(first_of_each.values()))


def _gradients(
    yielded: Mapping[str, tuple[Tensor, ...]], loss: Loss | None, trainable: list[Tensor]
) -> list[Tensor | None]:
    if loss is None:
        return projected_gradients([y for ys in yielded.values() for y in ys], trainable)
    value = loss_of(loss, yielded)
    return gradients_of([value], [torch.ones_like(value)], trainable)


def _train_call(
    model: Model, batch: Any, outputs: Outputs | None, step: int
) -> dict[str, tuple[Tensor, ...]]:
    for module in named_modules_of(model).values():
        module.train()
    seed_generators(present_seed.get() + step)
    return member_outputs(model, batch, outputs=outputs)


def _step(optimizer: Optimizer) -> None:
    try:
        optimizer.step()
    except Exception as error:
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
    model: Model, by_forward: Mapping[str, float], moved: set[str]
) -> Iterator[Disorder]:
    """Buffers that a call moved in modules whose parameters are all frozen and at rest."""
    first = {id(e.tensor): e.names[0] for e in registered(model)}
    for module in named_modules_of(model).values():
        for name, inner in module.named_modules():
            own = _governing(module, name)
            if not own or any(p.requires_grad or first[id(p)] in moved for p in own):
                continue
            for _, buffer in inner.named_buffers(recurse=False):
                place = first[id(buffer)]
                if place in by_forward and not place.endswith("num_batches_tracked"):
                    yield Disorder("frozen moves", place, "its module is frozen, a call moves it")


def _governing(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters that tell whether a module is frozen: its own, or those around it."""
    own = list(module.get_submodule(name).parameters(recurse=False))
    while not own and name:
        name = name.rpartition(".")[0]
        own = list(module.get_submodule(name).parameters())
    return own


def _frozen_parameters(
    entries: Sequence[Registered], moved: Mapping[str, float], optimizers: Sequence[Optimizer]
) -> Iterator[Disorder]:
    """Frozen parameters that an optimizer moves, and not a hook that averages into them."""
    held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    stepped = {memory_of(p) for p in held}
    for e in entries:
        by = moved.get(e.names[0])
        frozen = e.kind == "parameter" and not e.tensor.requires_grad
        if by and frozen and memory_of(e.tensor) in stepped:
            yield Disorder("frozen moves", e.names[0], f"a step moves it by {by:.0e}")


def _masked_in_eval(
    model: Model, batch: Any, outputs: Outputs | None, entries: Sequence[Registered]
) -> dict[int, Tensor]:
    """Where masks hide elements in eval mode too: what drops weights at random does not."""
    if not any(e.tensor.requires_grad and e.tensor.ndim for e in entries):
        return {}
    start = Snapshot(model)
    for module in named_modules_of(model).values():
        module.eval()
    yielded = member_outputs(model, fresh(batch), outputs=outputs)
    found = masked_elements(y for ys in yielded.values() for y in ys)
    start.restore()
    return found


def _behind_masks(
    entries: Sequence[Registered], before: Mapping[str, Tensor], masked: Mapping[int, Tensor]
) -> Iterator[Disorder]:
    for entry in entries:
        mask = masked.get(id(entry.tensor))
        if mask is None:
            continue
        then, now = before[entry.names[0]][mask], entry.tensor.detach()[mask]
        by = distance(then, now)
        if by:
            detail = f"{int((then != now).sum())} of {mask.numel()} elements, by {by:.0e}"
            yield Disorder("masked moves", entry.names[0], detail)
