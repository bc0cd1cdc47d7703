"""Which parameters, tensors and members a training call reaches by gradients.

A gradient that is missing or zero at the present values says little: a zero-initialised branch, a
dead ReLU and a dropped block have none either. So the structure decides what is cut: a parameter
that nothing which the loss uses depends on in train mode, with generic values or other draws of
the weights and of what the model draws itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ensembles.case import Case
from ensembles.handling.registered_tensors import Registered, registered
from ensembles.handling.state import parameters_kept
from ensembles.handling.training import (
    fresh,
    gradients_of,
    output_gradients,
    projected_gradients,
    set_training,
    values_of,
)
from ensembles.instruments.autograd import leaves_of
from ensembles.instruments.influence import probing
from ensembles.subject import Loss

__all__ = ["Flow", "gradient_flow"]

LOSS_DRAWS = 16
"""Draws of a random loss for each member: one that picks a member at random leaves a given one
out of all of them with a probability of less than exp(-16)."""

STRUCTURE_DRAWS = 4
"""Draws of what a model draws itself (blocks that it skips) for the transparent look."""

ROUTING_DRAWS = 16
"""Draws of other weights before a parameter is called cut: hard routing sends rows to an expert
for some of them. Needed only where something was found."""


@dataclass(frozen=True)
class Flow:
    """What the gradients of one call in train mode reach.

    Attributes:
        lost: Leaves of the outputs' autograd graph that nothing registers, by id.
        of_loss: Ids of the leaves of the loss. Its own weights are among them.
        without_gradient: Trainable parameters that are cut from every output, or unused.
        zero_gradient: Trainable parameters whose gradient is zero whatever the values are.
        stuck: Trainable parameters that are zero and have no gradient, because whatever
            multiplies them is zero and has none either.
        thawed: Frozen parameters that train() or the call makes trainable.
        refrozen: Parameters that the call uses and then freezes: backward() gives them nothing.
        unused_members: Members whose trained output the loss does not use, whatever the
            predictions.
    """

    lost: Mapping[int, Tensor] = field(default_factory=dict)
    of_loss: frozenset[int] = frozenset()
    without_gradient: tuple[str, ...] = ()
    zero_gradient: tuple[str, ...] = ()
    stuck: tuple[str, ...] = ()
    thawed: tuple[str, ...] = ()
    refrozen: tuple[str, ...] = ()
    unused_members: tuple[str, ...] = ()


def gradient_flow(case: Case) -> Flow:
    """Follows the gradients of the training loss, or of a random projection of all outputs.

    Parameters have their qualified name, "<member>.<name>", a tied one its first.

    Raises:
        ValueError: If outputs are not finite, or something given does not fit.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> net.spare = nn.Linear(1, 1)
        >>> gradient_flow(Case.of(net, torch.ones(3, 4))).without_gradient
        ('model.spare.weight', 'model.spare.bias')
    """
    every_one = [e for e in registered(case.modules) if e.kind == "parameter"]
    trainable = {e.names[0]: e for e in every_one if e.tensor.requires_grad}
    frozen = [e for e in every_one if not e.tensor.requires_grad]
    # A model that freezes itself in eval mode was not claimed to be frozen.
    in_training = all(module.training for module in case.modules.values())
    with case.preserved():
        set_training(case.model, case.model)
        given = fresh(case.batch)
        with parameters_kept(case.model):
            found = case.call(batch=given)
        _check_finite(found)
        thawed = tuple(e.names[0] for e in frozen if in_training and e.tensor.requires_grad)
        every = [y for ys in found.values() for y in ys]
        refrozen = _refrozen(every_one, every)
        known = {id(p) for module in case.modules.values() for p in module.parameters()}
        known |= {id(x) for x in pytree.tree_leaves(given) if isinstance(x, Tensor)}
        lost = {id(leaf): leaf for leaf in leaves_of(every) if id(leaf) not in known}
        # Lost leaves are asked for too, so that a backward pass leaves nothing in their .grad.
        asked = [*(entry.tensor for entry in trainable.values()), *lost.values()]
        of_loss: frozenset[int] = frozenset()
        unused: tuple[str, ...] = ()
        used = {member: [True] * len(ys) for member, ys in found.items()}
        if case.subject.loss is None:
            gradients = projected_gradients(every, asked)
        else:
            values = {m: tuple(y.detach().clone() for y in ys) for m, ys in found.items()}
            value = case.loss(found)
            of_loss = frozenset(id(leaf) for leaf in leaves_of([value]))
            gradients = gradients_of([value], [torch.ones_like(value)], asked)
            del value  # and its graph
            used = _used_outputs(case.subject.loss, values)
            unused = tuple(
                member
                for member, tensors in used.items()
                # What no trainable parameter reaches is a target: a teacher, say.
                if not any(tensors) and any(y.requires_grad for y in found[member])
            )
        pairs = list(zip(trainable, gradients[: len(trainable)], strict=True))
        missing = {name for name, gradient in pairs if gradient is None}
        dead = [name for name, gradient in pairs if gradient is None or not _lives(gradient)]
        suspects = {name: trainable[name] for name in dead if name not in refrozen}
        live = any(y.requires_grad for y in every)
        del found, every, gradients, pairs  # each as large as the model, or its graph
        cut = _cut(case, used, suspects, live=live)
        stuck = _stuck(case, used, {n: entry for n, entry in suspects.items() if n not in cut})
    return Flow(
        lost=lost,
        of_loss=of_loss,
        without_gradient=tuple(n for n in dead if n in cut and n in missing),
        zero_gradient=tuple(n for n in dead if n in cut and n not in missing),
        stuck=stuck,
        thawed=thawed,
        refrozen=refrozen,
        unused_members=unused,
    )


def _refrozen(parameters: Sequence[Registered], outputs: Sequence[Tensor]) -> tuple[str, ...]:
    """What the call used while it was trainable, and has frozen since."""
    frozen = [entry for entry in parameters if not entry.tensor.requires_grad]
    used = {id(leaf) for leaf in leaves_of(outputs)} if frozen else {}
    return tuple(entry.names[0] for entry in frozen if id(entry.tensor) in used)


def _check_finite(found: Mapping[str, tuple[Tensor, ...]]) -> None:
    for name, tensors in found.items():
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise ValueError(
                f"the output of member {name} holds NaN or infinity in train mode. Nothing "
                "can be concluded from it."
            )


def _lives(gradient: Tensor) -> bool:
    return bool(values_of(gradient).any())


def _used_outputs(loss: Loss, values: Mapping[str, tuple[Tensor, ...]]) -> dict[str, list[bool]]:
    """Which outputs have a gradient in the loss, in any draw of a random loss or of predictions."""
    used = {member: [False] * len(ys) for member, ys in values.items()}
    for draw in range(LOSS_DRAWS * len(values)):
        # A factor keeps the kind of a prediction: probabilities stay positive, signs stay.
        other = {m: tuple(y * torch.randn_like(y).exp() for y in ys) for m, ys in values.items()}
        try:
            found = output_gradients(loss, other if draw else values)
        except ValueError:
            if not draw:
                raise
            continue  # the loss does not take any predictions; what is known already stands
        for member, gradients in found.items():
            for i, gradient in enumerate(gradients):
                used[member][i] |= gradient is not None and _lives(gradient)
        if all(all(tensors) for tensors in used.values()):
            break
    return used


# --- what is cut by structure -------------------------------------------------------------------


_Used = Mapping[str, list[bool]]
"""By member, which of its outputs the loss uses."""


def _of_used(found: Mapping[str, tuple[Tensor, ...]], used: _Used) -> dict[str, tuple[Tensor, ...]]:
    """The outputs that the loss uses."""
    kept = {}
    for member, ys in found.items():
        uses = used.get(member, [])
        # A member that is not used at all is a finding by itself.
        partly = any(uses) and len(uses) == len(ys)
        kept[member] = tuple(y for y, u in zip(ys, uses, strict=True) if u) if partly else ys
    return kept


def _cut(
    case: Case,
    used: _Used,
    suspects: Mapping[str, Registered],
    *,
    live: bool,
    held: Collection[int] = (),
) -> set[str]:
    """The suspects that nothing which the loss uses depends on by structure either."""
    left = dict(suspects)
    errors = []
    for draw in range(STRUCTURE_DRAWS):
        if not left:
            break
        try:
            with probing(
                case.model,
                fresh(case.batch),
                outputs=case.subject.outputs,
                training=True,
                draw=draw,
                held=held,
            ) as probe:
                probe = replace(probe, outputs=_of_used(probe.outputs, used))
                for member in probe.outputs:
                    reached = probe.reach(member)
                    left = {n: entry for n, entry in left.items() if not _reached(entry, reached)}
        except ValueError as error:
            errors.append(error)
    if left and live and len(errors) == STRUCTURE_DRAWS:
        raise errors[0]  # without a graph in train mode, that is what is found
    for draw in range(ROUTING_DRAWS):
        if not left:
            break
        found = _reached_elsewhere(case, used, draw, left, held)
        left = {name: entry for name, entry in left.items() if name not in found}
    return set(left)


def _stuck(case: Case, used: _Used, dead: Mapping[str, Registered]) -> tuple[str, ...]:
    """The parameters without a gradient that are zero, and stay so, whatever all others become.

    Of two zero factors neither gets a gradient; of a zero and a drawn one the zero does, and the
    other after it.
    """
    left = {n: entry for n, entry in dead.items() if not entry.tensor.detach().any()}
    while left:
        held = {id(entry.tensor) for entry in left.values()}
        still = _cut(case, used, left, live=False, held=held)
        if len(still) == len(left):
            break
        left = {name: entry for name, entry in left.items() if name in still}
    return tuple(left)


def _reached(entry: Registered, reached: Mapping[str, Tensor | None]) -> bool:
    masks = [reached.get(name) for name in entry.names]
    return any(mask is not None and bool(mask.any()) for mask in masks)


def _reached_elsewhere(
    case: Case, used: _Used, draw: int, left: Mapping[str, Registered], held: Collection[int]
) -> set[str]:
    """The suspects with a gradient for other weights: routers choose other experts there."""
    with case.preserved():
        torch.manual_seed(draw)
        with torch.no_grad():
            for entry in registered(case.model):
                movable = entry.tensor.requires_grad and id(entry.tensor) not in held
                if entry.kind == "parameter" and movable:  # frozen: maybe a mask
                    entry.tensor.add_(_noise_like(entry.tensor))
        try:
            found = case.call()
        except ValueError:  # the model does not take any values; what is known already stands
            return set()
        every = [y for ys in _of_used(found, used).values() for y in ys]
        gradients = projected_gradients(every, [entry.tensor for entry in left.values()])
        return {
            name
            for name, gradient in zip(left, gradients, strict=True)
            if gradient is not None and _lives(gradient) and values_of(gradient).isfinite().all()
        }


def _noise_like(tensor: Tensor) -> Tensor:
    """Normal noise of the tensor's own size, so that it becomes another of its kind."""
    size = float(tensor.detach().double().square().mean().sqrt()) if tensor.numel() else 0.0
    return torch.randn_like(tensor.detach()) * (size or 0.1)
