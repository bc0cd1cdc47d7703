"""Promise: the state of a model is where PyTorch finds it, and moves only when it is claimed to.

Catches modules and tensors in lists, dicts and closures, masks that are plain attributes, eval()
and train() that do not reach everything, a forward pass that changes buffers in eval mode or drops
out in it, BatchNorm statistics that move several times a step or though their layer is frozen,
weights that drift in steps whose loss does not use them, and snapshots that alias live weights.

Healthy networks stay silent: a frozen BatchNorm kept in eval mode by an own train(), a teacher
that forward moves, dropped paths, and branches that start at zero are no findings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from ensembles.message import aligned, broken, counted, listed
from ensembles.message import seed as present_seed
from ensembles.probes.homes import things_below
from ensembles.probes.registers import registered
from ensembles.probes.state import Snapshot, generators_kept, preserved, seed_generators
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
from ensembles.subject import Model, Outputs, checked_numbers, member_outputs, named_modules_of

__all__ = [
    "Disorder",
    "StateHygiene",
    "assert_snapshot_detached",
    "assert_state_clean",
    "measure_state_hygiene",
]

STEPS = 3
"""A loss that is drawn leaves a member out in one of a few steps; momentum needs a step before."""


@dataclass(frozen=True, order=True)
class Disorder:
    """One place where state is not where it should be, or moves when it should not.

    Attributes:
        kind: A key of `Disorder.KINDS`.
        place: Where.
        detail: What was found there.
    """

    kind: str
    place: str
    detail: str

    KINDS = (
        "hidden module",
        "hidden tensor",
        "mode",
        "moves in eval",
        "random in eval",
        "norm updates",
        "frozen moves",
        "drifting",
        "alias",
    )


@dataclass(frozen=True)
class StateHygiene:
    """What a model keeps, and what moves.

    Attributes:
        modules: How many modules are registered.
        tensors: How many parameters and buffers are registered; a tied one once.
        steps: How many training steps were taken.
        updates: How often each norm with a counter updated its statistics in one training step.
        findings: All that is not in order, kind by kind.
    """

    modules: int
    tensors: int
    steps: int
    updates: tuple[tuple[str, int], ...]
    findings: tuple[Disorder, ...]

    def places(self, kind: str) -> tuple[str, ...]:
        """The places of one kind of finding, such as "hidden tensor".

        Raises:
            ValueError: If there is no such kind.
        """
        if kind not in Disorder.KINDS:
            raise ValueError(f"{kind!r} is no kind of finding: {', '.join(Disorder.KINDS)}.")
        return tuple(found.place for found in self.findings if found.kind == kind)

    def __str__(self) -> str:
        often = sorted({count for _, count in self.updates})
        norms = f", statistics updated {' or '.join(map(str, often))} times a step" if often else ""
        head = (
            f"{counted(range(self.modules), 'module')}, {self.tensors} parameters and buffers, "
            f"{counted(self.findings, 'finding')}{norms}"
        )
        rows = aligned([(found.place, found.kind, found.detail) for found in self.findings])
        return "\n".join([head, *(f"  {row}" for row in rows)])


def measure_state_hygiene(
    model: Model,
    batch: Any,
    *,
    outputs: Outputs | None = None,
    optimizer: Callable[[Any], Any] | None = None,
    loss: Loss | None = None,
) -> StateHygiene:
    """Looks for state in hidden places, and for state that moves when it should not.

    The model is called in eval mode with several random states, and trained for a few steps.

    Args:
        model: One module, or the members as a list or dict of modules.
        batch: What the model is called with.
        outputs: Splits what one module returns into member outputs.
        optimizer: Builds the optimizer, or a list of them, for the model; by default plain SGD.
        loss: The training loss, a function of the dict of member outputs; by default a fixed
            random projection of all outputs.

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
          model.mask   hidden tensor   shape (2, 3), a plain attribute
    """
    checked_numbers(model)
    given = named_modules_of(model)
    hidden = _hidden_modules(model)
    everything = [*given.values(), *(module for _, module in hidden)]
    found = [*_snapshots(model), *_stale_gradients(model, optimizer)]
    with (
        torch.inference_mode(False),
        generators_kept(),
        preserved(everything) as start,
    ):
        found += _modes(given)
        start.restore()
        with torch.no_grad():
            used, in_eval = _in_eval(model, batch, outputs, hidden, everything, start)
        found += in_eval
        start.restore()
        with torch.enable_grad():
            steps, updates, moved = _trained(model, batch, outputs, everything, optimizer, loss)
        found += moved
    found += [
        Disorder("hidden module", place, f"{type(module).__name__} that modules() does not list")
        for place, module in hidden
        if _matters(module) and any(id(inner) in used for inner in module.modules())
    ]
    kinds = Disorder.KINDS
    return StateHygiene(
        modules=len({id(inner) for module in given.values() for inner in module.modules()}),
        tensors=len(registered(model)),
        steps=steps,
        updates=tuple(updates.items()),
        findings=tuple(
            sorted(dict.fromkeys(found), key=lambda one: (kinds.index(one.kind), one.place))
        ),
    )


def assert_state_clean(hygiene: StateHygiene, *, updates: int = 1) -> None:
    """Checks that state is registered, and moves only when it should.

    Args:
        hygiene: From `measure_state_hygiene`.
        updates: How often the statistics of a norm move in one training step: N where N streams
            go through one network. A norm that the step does not call is let pass.

    Raises:
        AssertionError: If there is any finding, or a norm updates another number of times.

    Example:
        >>> assert_state_clean(measure_state_hygiene(nn.BatchNorm1d(3), torch.randn(4, 3)))
    """
    __tracebackhide__ = True
    wrong = [
        Disorder("norm updates", name, f"{count} a step, claimed {updates}")
        for name, count in hygiene.updates
        if count not in (0, updates)
    ]
    findings = sorted([*hygiene.findings, *wrong], key=lambda one: Disorder.KINDS.index(one.kind))
    if not findings:
        return
    kinds = list(dict.fromkeys(one.kind for one in findings))
    counts = ", ".join(f"{sum(one.kind == kind for one in findings)} {kind}" for kind in kinds)
    raise AssertionError(
        broken(
            "the model is claimed to keep its state in order, and does not",
            [(one.place, f"{one.kind}:", one.detail) for one in findings],
            total=f"{counts}; {hygiene.modules} modules, {hygiene.tensors} parameters and buffers",
            meaning="\n".join(_MEANINGS[kind] for kind in kinds),
            remedy="\n".join(_REMEDIES[kind] for kind in kinds),
        )
    )


def assert_snapshot_detached(snapshot: Any, model: Model) -> None:
    """Checks that a snapshot of weights is a copy, and not the live weights under another name.

    Args:
        snapshot: What was kept: a state_dict, a list or dict of tensors or of such, or modules.
        model: What it was taken of, and is trained on.

    Raises:
        ValueError: If the snapshot holds no tensors.
        AssertionError: If a tensor of the snapshot is memory of the model.

    Example:
        >>> import copy
        >>> net = nn.Linear(3, 2)
        >>> assert_snapshot_detached(copy.deepcopy(net.state_dict()), net)
    """
    __tracebackhide__ = True
    kept = list(_tensors_of(snapshot, "snapshot"))
    if not kept:
        raise ValueError(
            f"the snapshot, an object of type {type(snapshot).__name__}, holds no tensors: there "
            "is nothing to compare. Give what model.state_dict() returned, or the copied modules."
        )
    live = {_memory(e.tensor): e.names[0] for e in registered(model) if e.tensor.numel()}
    rows = [
        (place, f"is the memory of {live[_memory(tensor)]}")
        for place, tensor in kept
        if tensor.numel() and _memory(tensor) in live
    ]
    if rows:
        raise AssertionError(
            broken(
                "a snapshot is claimed to keep past weights, and aliases the live ones",
                rows,
                total=f"{len(rows)} of {counted(kept, 'tensor')}",
                meaning=_MEANINGS["alias"],
                remedy=_REMEDIES["alias"],
            )
        )


# --- how the assertion looks --------------------------------------------------------------------

_MEANINGS = {
    "hidden module": "What is hidden is absent from to(), train(), eval() and state_dict().",
    "hidden tensor": "A tensor that is no buffer stays where it is when the model moves, and is "
    "not saved.",
    "mode": "Part of the model stays in another mode than the rest.",
    "moves in eval": "Evaluation changes the model: what it reports depends on how often and on "
    "what it was called before.",
    "random in eval": "Evaluation depends on the random state.",
    "norm updates": "Running statistics move n times a step: momentum m acts as 1 - (1 - m)^n.",
    "frozen moves": "What is frozen changes in training, and with it every output.",
    "drifting": "Weights move in steps whose loss does not use them.",
    "alias": "A state_dict holds the live tensors: after more training it is the last model's.",
}

_REMEDIES = {
    "hidden module": "Hidden module: nn.ModuleList, nn.ModuleDict, or an attribute.",
    "hidden tensor": "Hidden tensor: self.register_buffer(name, tensor).",
    "mode": "Mode: an own train() sets the mode of every child and returns self; call "
    "super().train(mode).",
    "moves in eval": "Moves in eval: change buffers only if self.training.",
    "random in eval": "Random in eval: F.dropout(x, p, training=self.training).",
    "norm updates": "Norm updates: several streams, subnets or a recomputed checkpoint go through "
    "one norm. Give each its own, or claim the number.",
    "frozen moves": "Frozen moves: requires_grad_(False) leaves statistics running. Keep the norm "
    "in eval mode, too, by an own train(), and drop gradients of before the freeze.",
    "drifting": "Drifting: gradients are zero, and not None, so that momentum and decay act. Leave "
    "the unused loss out instead of multiplying it by 0.",
    "alias": "Alias: copy.deepcopy(model.state_dict()).",
}


# --- at rest ------------------------------------------------------------------------------------


def _hidden_modules(model: Model) -> list[tuple[str, nn.Module]]:
    """Modules below the model that nothing registers, each without those inside it."""
    known = {id(inner) for module in named_modules_of(model).values() for inner in module.modules()}
    found = []
    for path, how, thing in things_below(model):
        if isinstance(thing, nn.Module) and id(thing) not in known:
            known.update(id(inner) for inner in thing.modules())
            found.append((f"{path} ({how})" if how else path, thing))
    return found


def _matters(module: nn.Module) -> bool:
    """Whether it has state, or does something else in train mode."""
    state = next(module.parameters(), None) is not None or next(module.buffers(), None) is not None
    return state or any(isinstance(inner, _DropoutNd) and inner.p for inner in module.modules())


def _snapshots(model: Model) -> Iterator[Disorder]:
    """A kept state_dict, by the names of its keys, that is the live weights."""
    own = {}
    for module in named_modules_of(model).values():
        for inner in module.modules():
            for name, tensor in inner.state_dict(keep_vars=True).items():
                if isinstance(tensor, Tensor) and tensor.numel():
                    own[name, _memory(tensor)] = tensor
    for path, _, thing in things_below(model):
        if isinstance(thing, Mapping) and not path.endswith(("._parameters", "._buffers")):
            aliases = [
                name
                for name, tensor in list(thing.items())
                if isinstance(tensor, Tensor)
                and tensor.numel()
                and (name, _memory(tensor)) in own
                and own[name, _memory(tensor)] is not tensor
            ]
            if aliases:
                yield Disorder("alias", path, f"is the live memory of {listed(aliases, 3)}")


def _stale_gradients(model: Model, optimizer: Any) -> Iterator[Disorder]:
    frozen = {
        id(e.tensor): e.names[0]
        for e in registered(model)
        if e.kind == "parameter" and not e.tensor.requires_grad and e.tensor.grad is not None
    }
    if not frozen or optimizer is None:
        return
    with preserved(model):
        built = optimizers_of(optimizer, model)
    for one in built:
        for p in (p for group in one.param_groups for p in group["params"] if id(p) in frozen):
            yield Disorder("frozen moves", frozen[id(p)], "the optimizer steps its old gradient")


def _tensors_of(thing: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(thing, Tensor):
        yield path, thing
    elif isinstance(thing, nn.Module):
        for name, tensor in thing.state_dict(keep_vars=True).items():
            yield from _tensors_of(tensor, f"{path}.{name}")
    elif isinstance(thing, (Mapping, list, tuple)):
        pairs = thing.items() if isinstance(thing, Mapping) else enumerate(thing)
        for key, value in pairs:
            yield from _tensors_of(value, f"{path}[{key!r}]")


def _memory(tensor: Tensor) -> tuple[str, int]:
    storage = tensor.untyped_storage()
    # On meta nothing is allocated, and every address is 0.
    return str(tensor.device), storage._cdata if tensor.is_meta else storage.data_ptr()


# --- modes --------------------------------------------------------------------------------------


def _modes(given: Mapping[str, nn.Module]) -> list[Disorder]:
    found = []
    for member, module in given.items():
        before = module.training
        for word, mode in (("eval", False), ("train", True)):
            returned = getattr(module, word)()
            if returned is not module:
                kind = type(returned).__name__
                found.append(Disorder("mode", f"{member}.{word}()", f"returns {kind}, not itself"))
            values = [(e.names[0], e.tensor.detach().clone()) for e in registered(module)]
            for name, inner in _topmost(module, mode):
                if not (mode and _rightly_in_eval(inner)):
                    place = f"{member}.{name}" if name else member
                    says = "train" if inner.training else "eval"
                    found.append(Disorder("mode", place, f"in {says} mode after {word}()"))
            getattr(module, word)()
            now = {name: e.tensor for e in registered(module) for name in e.names}
            for name, value in values:
                if name not in now or distance(value, now[name]):
                    place = f"{member}.{name}"
                    found.append(Disorder("mode", place, f"a second {word}() changes it"))
        module.train(before)  # an own train() may keep more than a mode
    return found


def _topmost(module: nn.Module, mode: bool, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules that are not in this mode, each without those inside it."""
    # A list of modules is never called, and an own train() need not set its mode.
    if module.training is not mode and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        yield name, module
        return
    for child, inner in module.named_children():
        yield from _topmost(inner, mode, f"{name}.{child}" if name else child)


def _rightly_in_eval(module: nn.Module) -> bool:
    """A norm that keeps its statistics, or a part that is frozen as a whole."""
    parameters = list(module.parameters())
    frozen = bool(parameters) and not any(p.requires_grad for p in parameters)
    return isinstance(module, _NormBase) or frozen


# --- in eval mode -------------------------------------------------------------------------------


def _in_eval(
    model: Model,
    batch: Any,
    outputs: Outputs | None,
    hidden: list[tuple[str, nn.Module]],
    everything: list[nn.Module],
    start: Snapshot,
) -> tuple[set[int], list[Disorder]]:
    """The modules that are called, and what is not in order."""
    held = {id(t) for m in everything for t in (*m.parameters(), *m.buffers())}
    places: dict[int, tuple[str, str, Tensor]] = {}
    for path, how, thing in things_below(model):
        if isinstance(thing, Tensor) and id(thing) not in held:
            places.setdefault(id(thing), (path, how, thing))
    named = [(e.names[0], e.tensor) for e in registered(model)]
    named += [(f"{place}.{n}", b) for place, m in hidden for n, b in m.named_buffers()]

    def called(seed: int) -> list[Tensor]:
        start.restore()
        for module in named_modules_of(model).values():
            module.eval()
        seed_generators(seed)
        yielded = member_outputs(model, fresh(batch), outputs=outputs)
        return [y.detach().clone() for ys in yielded.values() for y in ys]

    found = []
    seed = present_seed.get()
    with Usage({key: tensor for key, (_, _, tensor) in places.items()}) as usage:
        before = {name: tensor.detach().clone() for name, tensor in named}
        called(seed)
    for name, tensor in named:
        by = distance(before[name], tensor)
        if by:
            found.append(Disorder("moves in eval", name, f"by {by:.0e} in one call"))
    for key in usage.mixed:
        path, how, tensor = places[key]
        what = f"shape {tuple(tensor.shape)}, {how or 'a plain attribute'}"
        found.append(Disorder("hidden tensor", path, what))
    # Without the recorder, in whose presence PyTorch takes no fused kernels.
    first, again, other = called(seed), called(seed), called(seed + 1)
    unlike = [_most(first, again), _most(first, other)]
    if any(unlike):
        drawn = f": {listed(list(usage.random), 3)}" if usage.random else ""
        which = "outputs of two calls" if unlike[0] else "outputs under two seeds"
        found.append(Disorder("random in eval", which, f"differ by {max(unlike):.0e}{drawn}"))
    return set(usage.modules), found


def _most(one: list[Tensor], other: list[Tensor]) -> float:
    if len(one) != len(other):
        return math.inf
    return max((distance(a, b) for a, b in zip(one, other, strict=True)), default=0.0)


# --- in training --------------------------------------------------------------------------------


def _trained(
    model: Model,
    batch: Any,
    outputs: Outputs | None,
    everything: list[nn.Module],
    optimizer: Callable[[Any], Any] | None,
    loss: Loss | None,
) -> tuple[int, dict[str, int], list[Disorder]]:
    """How many steps, the updates of norms in the first, and what moved without reason."""
    entries = registered(model)
    trainable = {e.names[0]: e.tensor for e in entries if e.tensor.requires_grad}
    optimizers: tuple[torch.optim.Optimizer, ...] = ()
    if optimizer is not None or trainable:
        optimizers = optimizers_of(optimizer or plain_sgd, model)
    updates: dict[str, int] = {}
    found: list[Disorder] = []
    for step in range(STEPS if trainable else 1):
        at_start = Snapshot(everything)
        before = {e.names[0]: e.tensor.detach().clone() for e in entries}
        yielded = _train_call(model, batch, outputs, step)
        by_forward = {n for n, _ in _changed(entries, before)}
        flat = [y for ys in yielded.values() for y in ys]
        if loss is None:
            gradients = projected_gradients(flat, list(trainable.values()))
        else:
            value = loss_of(loss, yielded)
            gradients = gradients_of([value], [torch.ones_like(value)], list(trainable.values()))
        if step == 0:
            updates = _updates(entries, before)
            found += _frozen_statistics(model, by_forward)
        between = {e.names[0]: e.tensor.detach().clone() for e in entries}
        for parameter, gradient in zip(trainable.values(), gradients, strict=True):
            parameter.grad = gradient
        for each in optimizers:
            _step(each)
        moved = dict(_changed(entries, between))
        found += [
            Disorder("frozen moves", e.names[0], f"a step moves it by {moved[e.names[0]]:.0e}")
            for e in entries
            if e.kind == "parameter" and not e.tensor.requires_grad and e.names[0] in moved
        ]
        zero = [
            name
            for name, gradient in zip(trainable, gradients, strict=True)
            if name in moved and gradient is not None and not values_of(gradient).any()
        ]
        if zero and loss is not None:
            after = Snapshot(everything)
            at_start.restore()
            yielded = _train_call(model, batch, outputs, step)
            flat = [y for ys in yielded.values() for y in ys]
            reach = projected_gradients(flat, [trainable[name] for name in zero])
            after.restore()
            found += [
                Disorder("drifting", name, f"gradient zero in step {step + 1}, and it moves")
                for name, gradient in zip(zero, reach, strict=True)
                if gradient is not None and values_of(gradient).any()
            ]
    first_of_each = {(one.kind, one.place): one for one in reversed(found)}
    return (STEPS if trainable else 1), updates, list(first_of_each.values())


def _train_call(
    model: Model, batch: Any, outputs: Outputs | None, step: int
) -> dict[str, tuple[Tensor, ...]]:
    for module in named_modules_of(model).values():
        module.train()
    seed_generators(present_seed.get() + step)
    return member_outputs(model, fresh(batch), outputs=outputs)


def _step(optimizer: torch.optim.Optimizer) -> None:
    try:
        optimizer.step()
    except Exception as error:
        raise ValueError(
            f"{type(optimizer).__name__}.step() raised {type(error).__name__}: {error} Give "
            "optimizer=a function that builds one whose step() needs no arguments."
        ) from error


def _changed(entries: Any, before: Mapping[str, Tensor]) -> Iterator[tuple[str, float]]:
    for entry in entries:
        by = distance(before[entry.names[0]], entry.tensor)
        if by:
            yield entry.names[0], by


def _updates(entries: Any, before: Mapping[str, Tensor]) -> dict[str, int]:
    """Of norms that count: by the name of the norm."""
    return {
        name.removesuffix("num_batches_tracked").removesuffix(".") or "model": int(
            entry.tensor - before[name]
        )
        for entry in entries
        if (name := entry.names[0]).rpartition(".")[2] == "num_batches_tracked"
    }


def _frozen_statistics(model: Model, moved: set[str]) -> Iterator[Disorder]:
    """Buffers that a call moved in modules whose own parameters are all frozen and at rest."""
    first = {id(e.tensor): e.names[0] for e in registered(model)}
    for module in named_modules_of(model).values():
        for inner in module.modules():
            own = list(inner.parameters(recurse=False))
            if not own or any(p.requires_grad or first[id(p)] in moved for p in own):
                continue
            for _, buffer in inner.named_buffers(recurse=False):
                name = first[id(buffer)]
                if name in moved and not name.endswith("num_batches_tracked"):
                    yield Disorder("frozen moves", name, "its module is frozen, a call moves it")
