"""Promise: the state of a model is where PyTorch finds it, and moves only when it is claimed to.

Catches modules and tensors in lists, dicts and closures, masks that are plain attributes, eval()
and train() that do not reach everything, tensors that .to() leaves behind, a forward pass that
changes buffers or modes in eval mode, drops out in it, keeps something for the next call, or writes
into the batch, one that seeds the global generators, caches that outlive the weights that they were
made of, BatchNorm statistics that move several times a step or though their layer is frozen,
weights that drift in steps whose loss does not use them or behind a mask, averaged weights with
statistics of others, and snapshots that alias live weights.

Healthy networks stay silent: a frozen BatchNorm kept in eval mode by an own train(), a teacher
that forward moves, dropped paths, and branches that start at zero are no findings.

Limits: a cache that outlives the weights is seen in plain attributes, lists and dicts; one in
another object, or in another kind of mapping, answers both calls alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ensembles.message import aligned, broken, counted
from ensembles.probes.disorders import (
    Disorder,
    left_behind,
    live_snapshots,
    memory_of,
    mode_disorders,
    stale_gradients,
    unlisted_modules,
)
from ensembles.probes.motions import moved_in_eval, moved_in_training
from ensembles.probes.registers import registered
from ensembles.probes.state import generators_kept, preserved
from ensembles.probes.training import Loss
from ensembles.subject import Model, Outputs, checked_numbers, named_modules_of

__all__ = [
    "StateHygiene",
    "assert_snapshot_detached",
    "assert_state_clean",
    "measure_state_hygiene",
]


@dataclass(frozen=True)
class StateHygiene:
    """What a model keeps, and what moves.

    Attributes:
        modules: How many modules are registered.
        tensors: How many parameters and buffers are registered; a tied one once.
        steps: How many training steps were taken.
        updates: How often each norm updated its statistics in one training step, as its counter
            or the calls of batch_norm say.
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
            random projection of all outputs. Unless both loss and optimizer are given, a gradient
            that is larger than its parameter is scaled down to its size before the step.

    Returns:
        The measurement. The model, its gradients and the random generators are as before.

    Raises:
        ValueError: If the model cannot be called or trained so: the loss, or a parameter, becomes
            NaN or infinite.

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
    hidden = unlisted_modules(model)
    everything = [*given.values(), *(module for _, module in hidden)]
    found = [*live_snapshots(model), *stale_gradients(model, optimizer)]
    with (
        torch.inference_mode(False),
        generators_kept(),
        preserved(everything) as start,
    ):
        found += left_behind(model)
        start.restore()  # what is bound to the original moves that
        found += mode_disorders(given)
        start.restore()
        with torch.no_grad():
            used, in_eval = moved_in_eval(model, batch, outputs, hidden, everything, start)
        found += in_eval
        start.restore()
        with torch.enable_grad():
            trained = moved_in_training(
                model, batch, outputs, everything, used=used, optimizer=optimizer, loss=loss
            )
        known = {(one.kind, one.place) for one in found}
        found += [one for one in trained.findings if (one.kind, one.place) not in known]
    found += [
        Disorder("hidden module", place, f"{type(module).__name__} that modules() does not list")
        for place, module in hidden
        if _matters(module) and any(id(inner) in used for inner in module.modules())
    ]
    kinds = Disorder.KINDS
    return StateHygiene(
        modules=len({id(inner) for module in given.values() for inner in module.modules()}),
        tensors=len(registered(model)),
        steps=trained.steps,
        updates=tuple(trained.updates.items()),
        findings=tuple(
            sorted(dict.fromkeys(found), key=lambda one: (kinds.index(one.kind), one.place))
        ),
    )


def _matters(module: nn.Module) -> bool:
    """Whether it has state, or does something else in train mode."""
    state = next(module.parameters(), None) is not None or next(module.buffers(), None) is not None
    return state or any(isinstance(inner, _DropoutNd) and inner.p for inner in module.modules())


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
    live = {memory_of(e.tensor): e.names[0] for e in registered(model) if e.tensor.numel()}
    rows = [
        (place, f"is the memory of {live[memory_of(tensor)]}")
        for place, tensor in kept
        if tensor.numel() and memory_of(tensor) in live
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
    "stays behind": "A move of the model leaves part of it on the device where it was.",
    "mode": "Part of the model stays in another mode than the rest.",
    "moves in eval": "Evaluation changes the model: what it reports depends on how often and on "
    "what it was called before.",
    "stale": "Evaluation predicts with what was computed from weights of before the training.",
    "random in eval": "Evaluation depends on the random state.",
    "global state": "A call changes what the whole program draws next, or whether it can train.",
    "changes the batch": "Whoever reads the batch next, as another member does, reads another.",
    "norm updates": "Running statistics move n times a step: momentum m acts as 1 - (1 - m)^n.",
    "frozen moves": "What is frozen changes in training, and with it every output.",
    "drifting": "Weights move in steps whose loss does not use them.",
    "masked moves": "What a mask hides is trained: norms, decay and pruning see the whole weight.",
    "averaged norm": "Averaged weights predict with statistics of other weights.",
    "alias": "A state_dict holds the live tensors: after more training it is the last model's.",
}

_REMEDIES = {
    "hidden module": "Hidden module: nn.ModuleList, nn.ModuleDict, or an attribute.",
    "hidden tensor": "Hidden tensor: self.register_buffer(name, tensor).",
    "stays behind": "Stays behind: an own _apply() calls super()._apply(fn, recurse), and puts "
    "nothing back.",
    "mode": "Mode: an own train() sets the mode of every child and returns self; call "
    "super().train(mode). forward() sets no mode.",
    "moves in eval": "Moves in eval: change buffers only if self.training.",
    "stale": "Stale: drop in train() what was computed from weights, or compute it in each call.",
    "random in eval": "Random in eval: F.dropout(x, p, training=self.training).",
    "global state": "Global state: forward() seeds nothing and sets no switch. Seed once, outside; "
    "draw what stays the same in the constructor, into a buffer; use with torch.no_grad().",
    "changes the batch": "Changes the batch: nothing in place on what forward is given; write "
    "x = x * 2, and ReLU(inplace=True) behind a layer only.",
    "norm updates": "Norm updates: several streams, subnets or a recomputed checkpoint go through "
    "one norm. Give each its own, or claim the number.",
    "frozen moves": "Frozen moves: requires_grad_(False) leaves statistics running. Keep the norm "
    "in eval mode, too, by an own train(), and drop gradients of before the freeze.",
    "drifting": "Drifting: gradients are zero, and not None, so that momentum and decay act. Leave "
    "the unused loss out instead of multiplying it by 0.",
    "masked moves": "Masked moves: mask the weight before it is normalised, and once for good "
    "(weight.mul_(mask)), so that decay finds zeros.",
    "averaged norm": "Averaged norm: average the buffers too, or call "
    "torch.optim.swa_utils.update_bn before the average predicts.",
    "alias": "Alias: copy.deepcopy(model.state_dict()).",
}


# --- snapshots -----------------------------------------------------------------------------------


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
