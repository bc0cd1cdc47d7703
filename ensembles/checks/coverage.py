"""Promise: training reaches every trainable parameter, and steps each of them exactly once.

Catches parameters that the optimizer never got or got twice, optimizers of a model that has
changed since, members in a Python list, tensors that forward uses and nothing registers, branches
that are cut from the loss, and freezes that froze nothing.

Healthy networks stay silent: a gradient that is zero or missing at the present values is a
finding only where the parameter reaches no output by structure either, in train or in eval mode.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from ensembles.checks.coupling import (
    fresh,
    gradients_of,
    hidden_modules,
    loss_of,
    optimizers_of,
    output_gradients,
    projected_gradients,
    values_of,
)
from ensembles.checks.sharing import measure_parameter_sharing
from ensembles.message import aligned, broken, counted
from ensembles.probes.influence import influence
from ensembles.probes.state import parameters_kept, preserved
from ensembles.subject import Model, Outputs, checked_numbers, member_outputs, named_modules_of

__all__ = [
    "Finding",
    "OptimizerCoverage",
    "assert_optimizer_complete",
    "measure_optimizer_coverage",
]

LOSS_DRAWS = 16
"""Draws of a random loss for each member: one that picks a member at random leaves a given one
out of all of them with a probability of less than exp(-16)."""


ROUTING_DRAWS = 16
"""Draws of other weights before a parameter is called cut: hard routing sends rows to an expert
for some of them. Needed only where something was found."""


@dataclass(frozen=True, order=True)
class Finding:
    """One place where training does not do what it seems to do.

    Attributes:
        kind: A key of `Finding.KINDS`.
        place: The parameter's name, or where the tensor was found.
        detail: What was found there.
    """

    kind: str
    place: str
    detail: str

    KINDS = (
        "missing",
        "repeated",
        "stale",
        "unregistered",
        "without gradient",
        "zero gradient",
        "false freeze",
    )


@dataclass(frozen=True)
class OptimizerCoverage:
    """What training reaches, and what it does not.

    Attributes:
        trainable: The names of all trainable parameters; a tied one under its first name.
        optimizers: How many optimizers were looked at; 0 if none was given.
        called: Whether the model was called, so that gradients and unregistered tensors are known.
        findings: All places where training does not do what it seems to do, kind by kind.
    """

    trainable: tuple[str, ...]
    optimizers: int
    called: bool
    findings: tuple[Finding, ...]

    def places(self, kind: str) -> tuple[str, ...]:
        """The places of one kind of finding, such as "missing" or "unregistered".

        Raises:
            ValueError: If there is no such kind.
        """
        if kind not in Finding.KINDS:
            raise ValueError(f"{kind!r} is no kind of finding: {', '.join(Finding.KINDS)}.")
        return tuple(found.place for found in self.findings if found.kind == kind)

    def __str__(self) -> str:
        looked = [
            *([counted(range(self.optimizers), "optimizer")] if self.optimizers else []),
            *(["gradients"] if self.called else []),
        ]
        head = (
            f"{counted(self.trainable, 'trainable parameter')}, "
            f"{counted(self.findings, 'finding')} ({' and '.join(looked)} looked at)"
        )
        rows = aligned([(found.place, found.kind, found.detail) for found in self.findings])
        return "\n".join([head, *(f"  {row}" for row in rows)])


def measure_optimizer_coverage(
    model: Model,
    optimizer: Optimizer | Sequence[Optimizer] | Callable[[Any], Any] | None = None,
    batch: Any = None,
    *,
    outputs: Outputs | None = None,
    loss: Callable[[dict[str, Any]], Tensor] | None = None,
) -> OptimizerCoverage:
    """Finds the parameters that training does not reach, or reaches more than once.

    Gradients are those of the training loss in train mode, or of a random projection of all
    outputs. Where one is missing or zero in every element, the structure decides:
    `ensembles.probes.influence` says whether the parameter reaches an output when weights are
    generic and activations transparent, in train or in eval mode. So zero-initialised branches,
    dead ReLUs, dropped blocks and auxiliary heads are no findings, and a detached branch is one.

    And so that an expert to which hard routing sends no row of this batch is not taken for cut,
    other weights are drawn before something is.

    Limits: with many more experts than rows some stay without any row, and count as cut. Tensors
    behind a re-entrant checkpoint are not in the autograd graph, so unregistered ones are not
    found there.

    Args:
        model: One module, or the members as a list or dict of modules.
        optimizer: The optimizer, a list of them (one for each member, say), or a function of the
            model that builds them. Without it, groups are not looked at.
        batch: What the model is called with. Without it, gradients are not looked at.
        outputs: Splits what one module returns into member outputs.
        loss: The training loss, a function of the dict of member outputs; every member's output
            must have a gradient in it.

    Returns:
        The measurement. The model, its gradients, the optimizer and the random generators are as
        before.

    Raises:
        ValueError: If neither optimizer nor batch is given, the model has no trainable
            parameters, or something given does not fit.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> net[1] = nn.Linear(4, 3)
        >>> print(measure_optimizer_coverage(net, optimizer, torch.randn(5, 4)))
        4 trainable parameters, 4 findings (1 optimizer and gradients looked at)
          model.1.weight                      missing   in no group
          model.1.bias                        missing   in no group
          optimizer 0, group 0, position 2    stale     shape (2, 4), not in the model
          optimizer 0, group 0, position 3    stale     shape (2,), not in the model
    """
    if optimizer is None and batch is None:
        raise ValueError(
            "neither an optimizer nor a batch was given, so that there is nothing to look at. "
            "Give optimizer=, and batch= to have gradients looked at too."
        )
    checked_numbers(model)
    registered = _registered(model)
    false_freezes = tuple(_false_freezes(model))
    flow = _Flow({}, {}, (), ())
    with _methods_kept(registered):
        optimizers = _given_optimizers(optimizer, model)
        if batch is not None:
            with torch.inference_mode(False), torch.enable_grad():
                flow = _flow(model, batch, outputs, loss, registered)
    trainable = {key: held for key, held in registered.items() if held.tensor.requires_grad}
    if not trainable and not flow.lost:
        raise ValueError(
            "the model registers no trainable parameters: there is nothing to train. Usual cause: "
            "everything is frozen, or members sit in a Python list instead of nn.ModuleList."
        )
    slots = _slots(optimizers)
    foreign = {
        key: tensor
        for key, (tensor, _) in slots.items()
        if key not in registered and key not in flow.lost and key not in flow.of_loss
    }
    homes = _homes(model, {**flow.lost, **foreign})
    ranks = {key: rank for rank, key in enumerate(homes)}
    found = [
        *_missing(trainable, slots if optimizers else None),
        *_repeated(model, registered, trainable, slots),
        *_foreign(foreign, slots, homes),
        *(
            Finding("unregistered", homes.get(key, _nowhere(tensor)), _lost(tensor, key in slots))
            for key, tensor in sorted(
                flow.lost.items(), key=lambda lost: ranks.get(lost[0], len(ranks))
            )
        ),
        *flow.cut,
        *flow.unused_members,
        *false_freezes,
    ]
    return OptimizerCoverage(
        trainable=tuple(held.names[0] for held in trainable.values()),
        optimizers=len(optimizers),
        called=batch is not None,
        findings=tuple(sorted(found, key=lambda finding: Finding.KINDS.index(finding.kind))),
    )


def assert_optimizer_complete(coverage: OptimizerCoverage) -> None:
    """Checks that every trainable parameter is stepped exactly once and has a gradient.

    Args:
        coverage: From `measure_optimizer_coverage`; what it did not look at is not judged.

    Raises:
        AssertionError: If there is any finding.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> assert_optimizer_complete(
        ...     measure_optimizer_coverage(net, optimizer, torch.randn(3, 4)))
    """
    __tracebackhide__ = True
    if not coverage.findings:
        return
    kinds = list(dict.fromkeys(found.kind for found in coverage.findings))
    counts = [f"{len(coverage.places(kind))} {kind}" for kind in kinds]
    raise AssertionError(
        broken(
            "training is claimed to reach every trainable parameter exactly once, and does not",
            [(found.place, f"{found.kind}:", found.detail) for found in coverage.findings],
            total=f"{', '.join(counts)}; {counted(coverage.trainable, 'trainable parameter')} "
            "in all",
            meaning=" ".join(_MEANINGS[kind] for kind in kinds),
            remedy=" ".join(_REMEDIES[kind] for kind in kinds),
        )
    )


# --- how the assertion looks --------------------------------------------------------------------

_MEANINGS = {
    "missing": "What is missing keeps its initial values.",
    "repeated": "What is repeated is stepped several times, with several decays.",
    "stale": "Stale parameters are stepped in vain: the model computes with others.",
    "unregistered": "What is unregistered is absent from parameters(), to() and state_dict().",
    "without gradient": "What has no gradient is never trained.",
    "zero gradient": "What has gradient zero whatever its values is only decayed, never trained.",
    "false freeze": "What seems frozen is trained.",
}

_REMEDIES = {
    "missing": "Missing: groups made by hand, or by another model's rule. Build them from "
    "model.parameters() (of every member).",
    "repeated": "Repeated: a tied weight listed under two names, or two Parameters over one "
    "memory. Tie by assigning the Parameter itself, and list it once.",
    "stale": "Stale: layers replaced or members added after the optimizer was built. Build the "
    "optimizer when the model is final.",
    "unregistered": "Unregistered: use nn.ModuleList, nn.ModuleDict or nn.ParameterList for "
    "containers, and wrap last: nn.Parameter(tensor.to(device)).",
    "without gradient": "Without gradient: detach, .data, no_grad, a checkpoint with "
    "use_reentrant=True, a layer that forward does not use, or a member that the loss leaves "
    "out. Mend it, or freeze it.",
    "zero gradient": "Zero gradient: a mask, or a block that reads channels which are always "
    "zero. Mend the route, or freeze it.",
    "false freeze": "False freeze: modules have no attribute requires_grad. Call "
    "module.requires_grad_(False).",
}


# --- groups -------------------------------------------------------------------------------------


class _Held(NamedTuple):
    """A registered parameter with all its names."""

    tensor: Tensor
    names: list[str]


Slots = Mapping[int, tuple[Tensor, list[str]]]
"""By id, what the optimizers hold: the tensor, and every place in which it is listed."""


def _registered(model: Model) -> dict[int, _Held]:
    found: dict[int, _Held] = {}
    for member, module in named_modules_of(model).items():
        for name, parameter in module.named_parameters(remove_duplicate=False):
            held = found.setdefault(id(parameter), _Held(parameter, []))
            held.names.append(f"{member}.{name}")
    return found


def _given_optimizers(optimizer: Any, model: Model) -> tuple[Optimizer, ...]:
    if optimizer is None:
        return ()
    given = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
    if isinstance(given, (list, tuple)):
        if given and all(isinstance(one, Optimizer) for one in given):
            return tuple(given)
        raise ValueError(
            "optimizer is a list with something else than optimizers "
            f"({', '.join(type(one).__name__ for one in given) or 'it is empty'}). Give a "
            "torch.optim.Optimizer, a list of them, or a function of the model."
        )
    with preserved(model):
        return optimizers_of(optimizer, model)


def _slots(optimizers: Sequence[Optimizer]) -> Slots:
    found: dict[int, tuple[Tensor, list[str]]] = {}
    for number, optimizer in enumerate(optimizers):
        for group, settings in enumerate(optimizer.param_groups):
            for position, tensor in enumerate(settings["params"]):
                place = f"optimizer {number}, group {group}, position {position}"
                found.setdefault(id(tensor), (tensor, []))[1].append(place)
    return found


def _missing(trainable: Mapping[int, _Held], slots: Slots | None) -> Iterator[Finding]:
    if slots is None:
        return
    for key, held in trainable.items():
        if key not in slots:
            yield Finding("missing", held.names[0], "in no group")


def _repeated(
    model: Model, registered: Mapping[int, _Held], trainable: Mapping[int, _Held], slots: Slots
) -> Iterator[Finding]:
    for key, (tensor, places) in slots.items():
        if len(places) > 1 and tensor.requires_grad:
            name = registered[key].names[0] if key in registered else _nowhere(tensor)
            more = f" and {len(places) - 2} more" if len(places) > 2 else ""
            yield Finding("repeated", name, f"{places[0]}; {places[1]}{more}")
    objects = {name: key for key, held in registered.items() for name in held.names}
    for memory in measure_parameter_sharing(model).shared:
        names = [str(place) for place in memory.places if place.kind == "parameter"]
        # A frozen view of a trained weight is stepped by nobody.
        keys = list(dict.fromkeys(objects[n] for n in names if objects[n] in trainable))
        if len(keys) > 1:
            extent = "the same memory" if memory.whole else "overlapping memory"
            others = ", ".join(registered[key].names[0] for key in keys[1:])
            yield Finding(
                "repeated", registered[keys[0]].names[0], f"{extent} as the Parameter {others}"
            )


def _foreign(
    foreign: Mapping[int, Tensor], slots: Slots, homes: Mapping[int, str]
) -> Iterator[Finding]:
    for key, tensor in foreign.items():
        if key in homes:
            yield Finding("unregistered", homes[key], _lost(tensor, True))
        else:
            yield Finding(
                "stale", slots[key][1][0], f"shape {tuple(tensor.shape)}, not in the model"
            )


def _false_freezes(model: Model) -> Iterator[Finding]:
    for member, module in named_modules_of(model).items():
        for name, inner in module.named_modules():
            place = f"{member}.{name}" if name else member
            for word in ("requires_grad", "requires_grad_", "require_grad"):
                if vars(inner).get(word) is not False:
                    continue
                training = [p for p in inner.parameters() if p.requires_grad]
                if training:
                    yield Finding(
                        "false freeze",
                        f"{place}.{word} = False",
                        f"{counted(training, 'parameter')} below it still "
                        f"{'requires' if len(training) == 1 else 'require'} gradients",
                    )
        for name, parameter in module.named_parameters():
            for word in ("requires_grad_", "require_grad"):
                if vars(parameter).get(word) is False and parameter.requires_grad:
                    yield Finding(
                        "false freeze",
                        f"{member}.{name}.{word} = False",
                        "the parameter still requires gradients",
                    )


@contextmanager
def _methods_kept(registered: Mapping[int, _Held]) -> Iterator[None]:
    """Uncovers `requires_grad_` of parameters where a false freeze hides the method."""
    hidden = [held.tensor for held in registered.values() if "requires_grad_" in vars(held.tensor)]
    values = [vars(tensor).pop("requires_grad_") for tensor in hidden]
    try:
        yield
    finally:
        for tensor, value in zip(hidden, values, strict=True):
            vars(tensor)["requires_grad_"] = value


# --- gradients ----------------------------------------------------------------------------------


class _Flow(NamedTuple):
    """What one call in train mode shows."""

    lost: Mapping[int, Tensor]
    """Leaves of the outputs' autograd graph that nothing registers, by id."""
    of_loss: Mapping[int, Tensor]
    """Leaves of the loss alone: weights of the loss are not the model's, and not stale."""
    cut: tuple[Finding, ...]
    unused_members: tuple[Finding, ...]


def _flow(
    model: Model,
    batch: Any,
    outputs: Outputs | None,
    loss: Callable[[dict[str, Any]], Tensor] | None,
    registered: Mapping[int, _Held],
) -> _Flow:
    trainable = {key: held for key, held in registered.items() if held.tensor.requires_grad}
    hidden = hidden_modules(list(named_modules_of(model).values()))
    with preserved([*named_modules_of(model).values(), *hidden]):
        for module in named_modules_of(model).values():
            module.train()
        given = fresh(batch)
        with parameters_kept(model):
            found = member_outputs(model, given, outputs=outputs)
        for name, tensors in found.items():
            if not all(bool(tensor.isfinite().all()) for tensor in tensors):
                raise ValueError(
                    f"the output of member {name} holds NaN or infinity in train mode. Nothing "
                    "can be concluded from it."
                )
        every = [tensor for tensors in found.values() for tensor in tensors]
        values = {m: tuple(y.detach().clone() for y in ys) for m, ys in found.items()}
        inputs = {id(x) for x in pytree.tree_leaves(given) if isinstance(x, Tensor)}
        known = registered.keys() | inputs
        lost = {id(leaf): leaf for leaf in _leaves(every) if id(leaf) not in known}
        of_loss: dict[int, Tensor] = {}
        # Lost leaves are asked for too, so that a backward pass leaves nothing in their .grad.
        parameters = [*(held.tensor for held in trainable.values()), *lost.values()]
        unused: tuple[Finding, ...] = ()
        if loss is None:
            gradients = projected_gradients(every, parameters)
        else:
            value = loss_of(loss, found)
            of_loss = {id(leaf): leaf for leaf in _leaves([value])}
            gradients = gradients_of([value], [torch.ones_like(value)], parameters)
            unused = tuple(_unused_members(loss, values))
        suspects = {
            key: gradient is None
            for key, gradient in zip(trainable, gradients[: len(trainable)], strict=True)
            if gradient is None or not bool(values_of(gradient).any())
        }
        live = any(tensor.requires_grad for tensor in every)
        cut = _cut(model, batch, outputs, suspects, registered, live=live)
    return _Flow(
        lost,
        of_loss,
        tuple(
            Finding(
                "without gradient" if none else "zero gradient",
                registered[key].names[0],
                "cut from every output, or unused" if none else "zero in every element",
            )
            for key, none in cut.items()
        ),
        unused,
    )


def _cut(
    model: Model,
    batch: Any,
    outputs: Outputs | None,
    suspects: Mapping[int, bool],
    registered: Mapping[int, _Held],
    *,
    live: bool,
) -> dict[int, bool]:
    """The suspects that no output depends on by structure either, in train and in eval mode.

    `live` says whether outputs in train mode depend on anything at all.
    """
    left = dict(suspects)
    errors = []
    for training in (True, False) if live else (False,):
        if not left:
            break
        try:
            for _, reached in influence(model, fresh(batch), outputs=outputs, training=training):
                for key in list(left):
                    masks = [reached.get(name) for name in registered[key].names]
                    if any(mask is not None and bool(mask.any()) for mask in masks):
                        del left[key]
        except ValueError as error:
            # One mode is enough to judge by: some models enable gradients in train mode only.
            errors.append(error)
    if left and len(errors) == 2:
        raise errors[0]
    for draw in range(ROUTING_DRAWS):
        if not left:
            break
        for key in _reached_elsewhere(model, batch, outputs, draw, left, registered):
            del left[key]
    return left


def _reached_elsewhere(
    model: Model,
    batch: Any,
    outputs: Outputs | None,
    draw: int,
    left: Mapping[int, bool],
    registered: Mapping[int, _Held],
) -> list[int]:
    """The suspects with a gradient for other weights: routers choose other experts there."""
    with preserved(model):
        torch.manual_seed(draw)
        with torch.no_grad():
            for held in registered.values():
                if held.tensor.requires_grad:  # a frozen one may be a mask
                    held.tensor.add_(_noise_like(held.tensor))
        try:
            found = member_outputs(model, fresh(batch), outputs=outputs)
        except ValueError:  # the model does not take any values; what is known already stands
            return []
        every = [tensor for tensors in found.values() for tensor in tensors]
        gradients = projected_gradients(every, [registered[key].tensor for key in left])
        return [
            key
            for key, gradient in zip(left, gradients, strict=True)
            if gradient is not None
            and bool(values_of(gradient).any())
            and bool(values_of(gradient).isfinite().all())
        ]


def _noise_like(tensor: Tensor) -> Tensor:
    """Normal noise of the tensor's own size, so that it becomes another of its kind."""
    size = float(tensor.detach().double().square().mean().sqrt()) if tensor.numel() else 0.0
    return torch.randn_like(tensor.detach()) * (size or 0.1)


def _unused_members(
    loss: Callable[[dict[str, Any]], Tensor], values: Mapping[str, tuple[Tensor, ...]]
) -> Iterator[Finding]:
    """Members whose output has no gradient in the loss, in any draw of a random loss."""
    left = dict.fromkeys(values)
    for _ in range(LOSS_DRAWS * len(values)):
        for member, gradients in output_gradients(loss, values).items():
            if any(gradient is not None for gradient in gradients):
                left.pop(member, None)
        if not left:
            return
    for member in left:
        yield Finding("without gradient", f"output of member {member}", "the loss does not use it")


def _leaves(outputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """The leaves of the autograd graph, by its AccumulateGrad nodes."""
    stack: list[Any] = []
    for tensor in outputs:
        if tensor.grad_fn is not None:
            stack.append(tensor.grad_fn)
        elif tensor.requires_grad:
            yield tensor
    seen = set(stack)
    while stack:
        node = stack.pop()
        if hasattr(node, "variable"):
            yield node.variable
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)


# --- where a tensor lives -----------------------------------------------------------------------

MOST_OBJECTS = 100_000
"""Objects looked into for a name: a data set that hangs on a model is not walked to its end."""


def _homes(model: Model, wanted: Mapping[int, Tensor]) -> dict[int, str]:
    """Where tensors that nothing registers are kept, by id, as far as they can be found."""
    if not wanted:
        return {}
    exact: dict[int, str] = {}
    made_from: dict[int, str] = {}
    for path, how, tensor in _tensors_below(model):
        if id(tensor) in wanted:
            exact.setdefault(id(tensor), f"{path} ({how})")
        elif tensor.grad_fn is not None and not tensor.is_leaf:
            leaves = [id(leaf) for leaf in _leaves([tensor])]
            # An attribute that was computed from one lost Parameter, not a cached activation.
            if len(leaves) == 1 and leaves[0] in wanted:
                made_from.setdefault(
                    leaves[0], f"{path} (not a Parameter: computed from one, as by .to())"
                )
    return {**made_from, **exact}


def _tensors_below(model: Model) -> Iterator[tuple[str, str, Tensor]]:
    """Tensors in attributes, containers and closures below the model: path, kind of place, tensor.

    Breadth first, so that the shortest path names a tensor.
    """
    queue: deque[tuple[str, str, Any]] = deque(
        (name, "", module) for name, module in named_modules_of(model).items()
    )
    seen: set[int] = set()
    while queue and len(seen) < MOST_OBJECTS:
        path, how, thing = queue.popleft()
        if isinstance(thing, Tensor):
            yield path, how or "a plain attribute", thing
            continue
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        queue.extend(_inside(path, how, thing))


def _inside(path: str, how: str, thing: Any) -> Iterator[tuple[str, str, Any]]:
    if isinstance(thing, nn.Module):
        held = {**vars(thing), **thing._parameters, **thing._modules}
        for name, value in held.items():
            if name not in ("_parameters", "_buffers", "_modules"):
                yield f"{path}.{name}", how, value
        yield from _inside_function(path, "forward", type(thing).forward)
    elif isinstance(thing, Mapping):
        for key, value in list(thing.items()):
            yield f"{path}[{key!r}]", how or "in a Python dict", value
    elif isinstance(thing, (list, tuple, set, frozenset, deque)):
        kind = "list" if isinstance(thing, list) else "tuple" if isinstance(thing, tuple) else "set"
        for position, value in enumerate(thing):
            yield f"{path}[{position}]", how or f"in a Python {kind}", value
    elif isinstance(thing, partial):
        for value in (thing.func, *thing.args, *thing.keywords.values()):
            yield path, how or "in a partial", value
    elif isinstance(thing, (types.FunctionType, types.MethodType)):
        yield from _inside_function(path, "", thing)
    elif not isinstance(thing, (type, types.ModuleType)) and hasattr(thing, "__dict__"):
        for name, value in list(vars(thing).items()):
            yield f"{path}.{name}", how or f"in an object of type {type(thing).__name__}", value


def _inside_function(path: str, name: str, function: Any) -> Iterator[tuple[str, str, Any]]:
    """What a function closes over, and the globals that it names."""
    function = getattr(function, "__func__", function)
    if not isinstance(function, types.FunctionType):
        return
    place = f"{path}.{name}" if name else path
    code = function.__code__
    for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:  # not yet bound
            continue
        yield f"{variable} of {place}", "in a closure", value
    for word in code.co_names:
        value = function.__globals__.get(word)
        if isinstance(value, (Tensor, nn.Module, list, dict, tuple)):
            yield f"{word} of {place}", "a global variable", value


def _nowhere(tensor: Tensor) -> str:
    return f"a leaf of shape {tuple(tensor.shape)}"


def _lost(tensor: Tensor, stepped: bool) -> str:
    what = "Parameter" if isinstance(tensor, nn.Parameter) else "tensor"
    after = ", though the optimizer has it" if stepped else ""
    return f"{what} of shape {tuple(tensor.shape)} that parameters() does not list{after}"
