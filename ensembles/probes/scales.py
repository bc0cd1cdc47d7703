"""What a loss, and clipping, make of each member's gradient: a multiple, or a mixture of members.

A member's gradient "alone" is that of its own loss. It is compared in the parameters that the
member has for itself; where all are shared, in its output. In elements that gradients of several
members reach, they add up: that is a measurement of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ensembles.calling import asked
from ensembles.message import listed
from ensembles.probes.confined import taken_for_logits
from ensembles.probes.precision import autocasts, dtypes_of
from ensembles.probes.registers import registered
from ensembles.probes.state import generators_kept, preserved, seed_generators
from ensembles.probes.training import (
    Loss,
    fresh,
    gradients_of,
    hidden_modules,
    loss_of,
    output_gradients,
    values_of,
)
from ensembles.subject import SPLIT, Model, Outputs, member_outputs, named_modules_of
from ensembles.tolerance import tolerance_of

__all__ = ["Clip", "MemberLoss", "Overlap", "Scale", "scales_of"]

MemberLoss = Callable[[Any], Tensor]
"""The loss of one member: a function of its output, to a scalar tensor."""

Clip = Callable[[Any], Any]
"""What training does to gradients before the step: a function of the model."""

Dtypes = tuple[torch.dtype, ...]
"""What took part in the forward pass and in the loss."""

SMALL = 0.01
"""Greatest output of predictions that are made larger before they are changed."""

SIMPLE = 0.25
"""Share of the tolerance of gradients within which a multiple is the simple number that was meant:
it is a mean over all elements, whose roundings cancel."""

ROUNDINGS = 0.02
"""Share of the tolerance, of the largest gradient of a member, below which a parameter's gradient
is nothing but roundings, as that of a bias before a norm is."""

LOUD = 1e6
"""By how much other members' gradients are made to exceed one, to see whether clipping couples; in
a dtype that does not hold it, half of what it holds."""


@dataclass(frozen=True)
class Overlap:
    """A parameter in which a member's gradient and those of others add up.

    Attributes:
        names: Under which it is registered; none where nothing registers it.
        members: Whose gradients reach the same elements.
        multiple: The whole gradient in these elements, of the member's alone; None where it points
            elsewhere.
    """

    names: tuple[str, ...]
    members: tuple[str, ...]
    multiple: float | None


@dataclass(frozen=True)
class Scale:
    """What becomes of one member's gradient.

    Attributes:
        multiple: Of its gradient alone; None where it points elsewhere, or alone is unknown.
        exact: Whether it is the simple multiple bit by bit.
        coupled: The members whose predictions change it.
        clipped: Whether clipping changes it when other members' gradients are loud; None where
            there is no clipping.
        parameters: The parameters that the member has for itself.
        precision: To what a multiple is known, as a part of it.
        classes: Of the probabilities that the loss takes for logits; None where it does not.
        shared: The parameters in which its gradient and those of other members add up.
    """

    multiple: float | None
    exact: bool
    coupled: tuple[str, ...]
    clipped: bool | None
    parameters: tuple[Tensor, ...]
    precision: float
    classes: int | None = None
    shared: tuple[Overlap, ...] = ()


def scales_of(
    model: Model,
    batch: Any,
    loss: Loss,
    *,
    outputs: Outputs | None = None,
    member_loss: MemberLoss | None = None,
    clip: Clip | None = None,
) -> dict[str, Scale]:
    """Compares every member's gradient in the ensemble with its gradient alone, in train mode.

    Raises:
        ValueError: If the loss is random, or alone is not known: `member_loss` was not given, and
            the loss is no cross-entropy of each member.

    Example:
        >>> y = torch.tensor([0, 1])
        >>> scale = scales_of([nn.Linear(3, 2), nn.Linear(3, 2)], torch.randn(2, 3),
        ...     lambda outputs: sum(nn.functional.cross_entropy(o, y) for o in outputs.values()) / 2)
        >>> scale["0"].multiple, scale["0"].exact, scale["0"].coupled
        (0.5, True, ())
    """  # noqa: E501
    modules = list(named_modules_of(model).values())
    everything = [*modules, *hidden_modules(modules)]
    with preserved(everything), torch.inference_mode(False), torch.enable_grad():
        for module in modules:
            module.train()
        with _rewound(), autocasts() as cast:
            found = member_outputs(model, fresh(batch), outputs=outputs)
        values = {name: tuple(y.detach().clone() for y in ys) for name, ys in found.items()}
        _check_members(values)
        with autocasts() as cast_by_loss:
            together = _output_gradients(loss, values)
        dtypes = tuple(dtypes_of(model, batch, values, *cast, *cast_by_loss))
        _check_deterministic(loss, values, together, dtypes)
        axes = taken_for_logits(loss, values)
        classes = {name: values[name][0].shape[axis] for name, axis in axes.items()}
        coupled = {name: _coupled(loss, values, together, name, dtypes) for name in values}
        single = _member_losses(member_loss, values, together, any(coupled.values()), dtypes)
        parameters = [p for module in everything for p in module.parameters() if p.requires_grad]
        parameters = list({id(p): p for p in parameters}.values())
        with _rewound():
            whole = loss_of(loss, found)
        total = gradients_of([whole], [torch.ones_like(whole)], parameters)
        alone = _alone(single, found, parameters)
        scales = {}
        for name in values:
            own = [
                i
                for i in range(len(parameters))
                if alone[name][i] is not None
                and all(alone[other][i] is None for other in values if other != name)
            ]
            multiple, exact = None, False
            if single is not None:
                pairs = [(total[i], alone[name][i]) for i in own]
                multiple, exact = _multiple(pairs, name, dtypes) if own else (None, False)
                # Or a penalty on the weights is added, which has no multiple; whether it couples
                # members is for the coupling check to say.
                if multiple is None:
                    apart = _output_gradients(
                        partial(_of_one, single[name], name), {name: values[name]}
                    )
                    pairs = list(zip(together[name], apart[name], strict=True))
                    multiple, exact = _multiple(pairs, name, dtypes)
            held = tuple(parameters[i] for i in own)
            clipped = (
                None
                if clip is None
                else _clipped(clip, model, parameters, total, own, name, dtypes)
            )
            scales[name] = Scale(
                multiple,
                exact,
                coupled[name],
                clipped,
                held,
                SIMPLE * tolerance_of("rescaled", *dtypes),
                classes.get(name),
            )
        if single is None:
            return scales
        names = {id(entry.tensor): entry.names for entry in registered(model)}
        overlaps = _overlaps(scales, alone, total, parameters, names, dtypes)
        return {n: replace(scale, shared=tuple(overlaps[n])) for n, scale in scales.items()}


# --- coupling -----------------------------------------------------------------------------------


def _coupled(
    loss: Loss,
    values: Mapping[str, tuple[Tensor, ...]],
    before: Mapping[str, Any],
    name: str,
    dtypes: Dtypes,
) -> tuple[str, ...]:
    """The members whose predictions change this one's gradient."""
    found = []
    for other in values:
        if other != name:
            after = _output_gradients(loss, {**values, other: _nudged(values[other])})
            if not _equal(before[name], after[name], dtypes):
                found.append(other)
    return tuple(found)


def _nudged(outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Another prediction of the same kind: probabilities stay in [0, 1], signs stay."""
    generator = torch.Generator().manual_seed(0)
    nudged = []
    for y in outputs:
        share = 0.5 * (1 - torch.rand(y.shape, generator=generator)).to(y)
        greatest = y.abs().max() if y.numel() else y.sum()
        # What is small all over would change less than roundings do.
        larger = y / greatest if 0 < float(greatest) < SMALL else y
        nudged.append(torch.where(y == 0, share, larger * (1 - share)))
    return tuple(nudged)


def _equal(one: Sequence[Tensor | None], two: Sequence[Tensor | None], dtypes: Dtypes) -> bool:
    tolerance = tolerance_of("reordered", *dtypes)
    return all(
        a is b
        if a is None or b is None
        else bool((a.double() - b.double()).norm() <= tolerance * a.double().norm())
        for a, b in zip(one, two, strict=True)
    )


# --- alone --------------------------------------------------------------------------------------


def _member_losses(
    member_loss: MemberLoss | None,
    values: Mapping[str, tuple[Tensor, ...]],
    gradients: Mapping[str, Sequence[Tensor | None]],
    coupled: bool,
    dtypes: Dtypes,
) -> dict[str, MemberLoss] | None:
    """Each member's own loss; a cross-entropy is recognised by its gradient.

    The gradient of a cross-entropy in the logits is a multiple of softmax(z) - onehot(label), so
    it shows the labels, and the multiple needs no word of the user's. Without that, a loss that is
    divided by a number written down could not be told from a smaller loss.
    """
    if member_loss is not None:
        return dict.fromkeys(values, member_loss)
    if coupled:
        return None
    labels = {
        name: _labels(ys[0], gradients[name][0], dtypes) if len(ys) == 1 else None
        for name, ys in values.items()
    }
    known = [found for found in labels.values() if found is not None]
    if not known:
        raise ValueError(
            "what a member's loss is alone is not known: loss=... is no cross-entropy of each "
            "member's output. Give member_loss=a function of one member's output."
        )
    silent = [n for n in values if labels[n] is None and any(g is not None for g in gradients[n])]
    moved = [n for n in silent if any(g is not None and bool(g.any()) for g in gradients[n])]
    if moved:
        raise ValueError(
            f"what the loss of member {listed(moved)} is alone is not known: it is no "
            "cross-entropy. Give member_loss=a function of one member's output."
        )

    def of(target: Tensor) -> MemberLoss:
        return lambda y: cross_entropy(y, target)

    return {n: of(found if found is not None else known[0]) for n, found in labels.items()}


def _labels(logits: Tensor, gradient: Tensor | None, dtypes: Dtypes) -> Tensor | None:
    """The labels of a mean cross-entropy with this gradient; None if it is no such gradient."""
    if gradient is None or logits.ndim != 2 or not gradient.any():
        return None
    # A prediction that is right and sure has a gradient that rounds to zero.
    labels = torch.where(gradient.amin(1) < 0, gradient.argmin(1), logits.argmax(1))
    found = gradient.double()
    direction = logits.double().softmax(1)
    direction = direction - torch.nn.functional.one_hot(labels, logits.shape[1])
    share = (found * direction).sum() / direction.square().sum()
    off = (found - share * direction).norm() / found.norm()
    return labels if float(off) < tolerance_of("rewritten", *dtypes) else None


def _alone(
    single: Mapping[str, MemberLoss] | None,
    found: Mapping[str, tuple[Tensor, ...]],
    parameters: Sequence[Tensor],
) -> dict[str, list[Tensor | None]]:
    """The gradient of every member's own loss; of its output's sum where that is not known."""
    gradients = {}
    for name, ys in found.items():
        with _rewound():
            if single is None:
                value = torch.stack([y.sum() for y in ys]).sum()
            else:
                value = loss_of(partial(_of_one, single[name], name), {name: ys})
        gradients[name] = gradients_of([value], [torch.ones_like(value)], parameters)
    return gradients


def _overlaps(
    scales: Mapping[str, Scale],
    alone: Mapping[str, Sequence[Tensor | None]],
    total: Sequence[Tensor | None],
    parameters: Sequence[Tensor],
    names: Mapping[int, tuple[str, ...]],
    dtypes: Dtypes,
) -> dict[str, list[Overlap]]:
    """Where others that are trained send gradients to elements in which a member has its own.

    Who is not trained sends none. Elements are looked at, and not tensors: packed members have
    slices of one.
    """
    trained = [name for name, scale in scales.items() if scale.multiple != 0]
    norms = {name: [_norm(gradient) for gradient in alone[name]] for name in trained}
    found: dict[str, list[Overlap]] = {name: [] for name in scales}
    # One parameter is less than all, and its roundings cancel less: as outputs do.
    one, all_of_them = (tolerance_of(kind, *dtypes) for kind in ("recomputed", "rescaled"))
    for i, parameter in enumerate(parameters):
        dense = {m: g for m in trained if (g := _dense(alone[m][i])) is not None}
        for name, mine in dense.items():
            # Of a bias before a norm, rounding is all that there is.
            if norms[name][i] <= ROUNDINGS * all_of_them * max(norms[name]):
                continue
            here = mine != 0
            least = all_of_them * norms[name][i]
            among = [
                other
                for other, theirs in dense.items()
                if other == name or float((theirs * here).norm()) > least
            ]
            if len(among) > 1:
                whole = _dense(total[i])
                sent = mine.new_zeros(mine.shape) if whole is None else whole * here
                by = float((sent * mine).sum() / mine.square().sum())
                along = float((sent - by * mine).norm()) <= one * float(sent.norm())
                multiple = (_simple(by, SIMPLE * one) if by else 0.0) if along else None
                found[name].append(Overlap(names.get(id(parameter), ()), tuple(among), multiple))
    return found


def _norm(gradient: Tensor | None) -> float:
    dense = _dense(gradient)
    return 0.0 if dense is None else float(dense.norm())


def _dense(gradient: Tensor | None) -> Tensor | None:
    if gradient is None:
        return None
    return (gradient.to_dense() if gradient.is_sparse else gradient).detach().double()


def _of_one(loss: MemberLoss, name: str, outputs: dict[str, Any]) -> Tensor:
    return loss(outputs[name])


def _multiple(
    pairs: Sequence[tuple[Tensor | None, Tensor | None]],
    name: str,
    dtypes: Dtypes,
) -> tuple[float | None, bool]:
    """The s with together = s * alone, and whether that is so bit by bit."""
    known = [(torch.zeros_like(b) if a is None else a, b) for a, b in pairs if b is not None]
    one = torch.cat([values_of(a.detach()).flatten().double() for a, _ in known])
    two = torch.cat([values_of(b.detach()).flatten().double() for _, b in known])
    if not two.any():
        raise ValueError(
            f"the gradient of member {name} alone is zero, so that no multiple of it can be told. "
            "Give other inputs or labels; the coverage check says what is cut."
        )
    if not one.any():
        return 0.0, True
    multiple = float(one @ two / (two @ two))
    tolerance = tolerance_of("rescaled", *dtypes)
    if float((one - multiple * two).norm()) > tolerance * float(one.norm()):
        return None, False
    simple = _simple(multiple, SIMPLE * tolerance)
    return simple, all(torch.equal(values_of(a), values_of(b) * simple) for a, b in known)


def _simple(multiple: float, tolerance: float) -> float:
    """The whole number, or one over it, that was meant."""
    for candidate in (float(round(multiple)), 1 / round(1 / multiple) if abs(multiple) < 1 else 0):
        if candidate and math.isclose(multiple, candidate, rel_tol=tolerance):
            return candidate
    return multiple


# --- clipping -----------------------------------------------------------------------------------


def _clipped(
    clip: Clip,
    model: Model,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    own: Sequence[int],
    name: str,
    dtypes: Dtypes,
) -> bool:
    """Whether this member's clipped gradient changes when those of others are loud."""
    if not own:
        raise ValueError(
            f"member {name} has no parameters of its own, so that clipping cannot be compared. "
            "Leave clip= out where members share all parameters."
        )
    seen = []
    for loudness in (0.0, LOUD):
        for i, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
            others = torch.full_like(parameter, min(loudness, torch.finfo(parameter.dtype).max / 2))
            given = gradient.detach().clone() if gradient is not None else None
            parameter.grad = given if i in own else others
        then = (
            "It takes the model, whose gradients are set, and changes them as training does before "
            "a step."
        )
        asked("clip", clip, model, then=then)
        seen.append([None if (g := parameters[i].grad) is None else g.clone() for i in own])
    for parameter in parameters:
        parameter.grad = None
    return not _equal(seen[0], seen[1], dtypes)


# --- randomness ---------------------------------------------------------------------------------


def _output_gradients(loss: Loss, values: Mapping[str, tuple[Tensor, ...]]) -> dict[str, Any]:
    with _rewound():
        return output_gradients(loss, values)


def _check_deterministic(
    loss: Loss,
    values: Mapping[str, tuple[Tensor, ...]],
    before: Mapping[str, Any],
    dtypes: Dtypes,
) -> None:
    with _rewound(1):
        after = output_gradients(loss, values)
    if not all(_equal(before[name], after[name], dtypes) for name in values):
        raise ValueError(
            "the loss draws random numbers, so that members' gradients differ from step to step "
            "and have no multiple. Give the loss of one draw, or without what is drawn."
        )


@contextmanager
def _rewound(seed: int = 0) -> Iterator[None]:
    """Every call draws the same random numbers."""
    with generators_kept():
        seed_generators(seed)
        yield


def _check_members(values: Mapping[str, Any]) -> None:
    if len(values) < 2:
        raise ValueError(
            f"loss scale compares members, and only one was found ({listed(list(values))}). {SPLIT}"
        )
