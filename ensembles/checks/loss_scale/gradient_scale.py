"""What a loss, and clipping, make of each member's gradient: a multiple, or a mixture of members.

A member's gradient "alone" is that of its own loss. It is compared in the parameters that the
member has for itself; where all are shared, in its output. In elements that gradients of several
members reach, they add up: that is a measurement of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from ensembles.case import Case
from ensembles.checks.loss_scale.double_softmax import taken_for_logits
from ensembles.handling.memory import as_kind_of
from ensembles.handling.precision import autocasts, dtypes_of
from ensembles.handling.registered_tensors import registered
from ensembles.handling.state import seed_generators
from ensembles.handling.training import gradients_of, loss_of, output_gradients, values_of
from ensembles.instruments.learning_rates import Rate
from ensembles.message import listed
from ensembles.subject import SPLIT, Loss
from ensembles.tolerance import tolerance_of
from ensembles.user_calls import asked

__all__ = ["MemberScale", "Overlap", "scales_of"]

Values = Mapping[str, tuple[Tensor, ...]]
"""The outputs of every member."""

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
class MemberScale:
    """What becomes of one member's gradient in the ensemble.

    Attributes:
        member: The member's name.
        multiple: Of its gradient alone; None where it points elsewhere, or alone is unknown.
        exact: Whether it is that multiple bit by bit.
        coupled: The members whose predictions change it.
        clipped: Whether clipping changes it when other members' gradients are loud; None where
            there is no clipping.
        precision: To what a multiple is known, as a part of it.
        classes: Of the probabilities that the loss takes for logits; None where it does not.
        shared: The parameters in which its gradient and those of other members add up.
        rates: One for each optimizer group that holds parameters of the member.
    """

    member: str
    multiple: float | None
    exact: bool
    coupled: tuple[str, ...]
    clipped: bool | None
    precision: float = 0.0
    classes: int | None = None
    shared: tuple[Overlap, ...] = ()
    rates: tuple[Rate, ...] = ()


def scales_of(case: Case) -> tuple[list[MemberScale], dict[str, list[Tensor]]]:
    """Compares every member's gradient in the ensemble with its gradient alone, in train mode.

    The model is called once. All calls of a loss draw the same random numbers.

    Returns:
        One scale for each member, without rates; and by member the parameters that it has for
        itself.

    Raises:
        ValueError: If there are fewer than two members, the subject has no loss, the loss is
            random, or alone is not known: `member_loss` was not given, and the loss is no
            cross-entropy of each member.

    Example:
        >>> y = torch.tensor([0, 1])
        >>> def mean_of_losses(outputs):
        ...     return sum(nn.functional.cross_entropy(o, y) for o in outputs.values()) / 2
        >>> two = [nn.Linear(3, 2), nn.Linear(3, 2)]
        >>> (scale, _), own = scales_of(Case.of(two, torch.randn(2, 3), loss=mean_of_losses))
        >>> scale.multiple, scale.exact, scale.coupled, len(own["0"])
        (0.5, True, (), 2)
    """
    with case.preserved(), torch.inference_mode(False), torch.enable_grad():
        for module in case.modules.values():
            module.train()
        seed_generators(case.seed)
        with autocasts() as cast:
            found = case.call()
        values = {name: tuple(y.detach().clone() for y in ys) for name, ys in found.items()}
        _check_members(values)
        seed_generators(case.seed)
        with autocasts() as cast_by_loss:
            whole = case.loss(_copies(found))
        dtypes = tuple(dtypes_of(case.model, case.batch, values, *cast, *cast_by_loss))
        loss, again = (_seeded(case.subject.loss, case.seed + i) for i in range(2))
        together = output_gradients(loss, values)
        _check_deterministic(again, values, together, dtypes)
        axes = taken_for_logits(loss, values)
        coupled = _coupled(loss, values, together, dtypes)
        single = _member_losses(case, values, together, any(coupled.values()), dtypes)
        every = {id(p): p for m in case.everything for p in m.parameters() if p.requires_grad}
        parameters: list[Tensor] = list(every.values())
        total = gradients_of([whole], [torch.ones_like(whole)], parameters)
        alone = {
            name: _alone(None if single is None else single[name], {name: ys}, parameters)
            for name, ys in found.items()
        }
        reached = [
            [name for name in values if alone[name][i] is not None] for i in range(len(parameters))
        ]
        scales, own = [], {}
        for name in values:
            mine = [i for i, names in enumerate(reached) if names == [name]]
            multiple, exact = None, False
            if single is not None:
                pairs = [(total[i], alone[name][i]) for i in mine]
                multiple, exact = _multiple(pairs, name, dtypes) if mine else (None, False)
                # Or a penalty on the weights is added, which has no multiple; whether it couples
                # members is for the coupling check to say.
                if multiple is None:
                    apart = output_gradients(single[name], {name: values[name]})
                    pairs = list(zip(together[name], apart[name], strict=True))
                    multiple, exact = _multiple(pairs, name, dtypes)
            scales.append(
                MemberScale(
                    name,
                    multiple,
                    exact,
                    coupled[name],
                    _clipped(case, parameters, total, mine, name, dtypes),
                    SIMPLE * tolerance_of("rescaled", *dtypes),
                    values[name][0].shape[axes[name]] if name in axes else None,
                )
            )
            own[name] = [parameters[i] for i in mine]
        if single is not None:
            names = {id(entry.tensor): entry.names for entry in registered(case.model)}
            places = [names.get(id(parameter), ()) for parameter in parameters]
            trained = [scale.member for scale in scales if scale.multiple != 0]
            overlaps = _overlaps(trained, alone, total, places, dtypes)
            scales = [replace(s, shared=tuple(overlaps.get(s.member, ()))) for s in scales]
        return scales, own


def _check_members(values: Values) -> None:
    if len(values) < 2:
        raise ValueError(
            f"loss scale compares members, but only one was found ({listed(list(values))}). {SPLIT}"
        )


def _copies(outputs: Values) -> dict[str, tuple[Tensor, ...]]:
    """For a loss that changes what it is given in place."""
    return {name: tuple(y.clone() for y in ys) for name, ys in outputs.items()}


def _seeded(loss: Any, seed: int) -> Loss:
    """The same loss, which draws the same random numbers in every call."""

    @wraps(loss)
    def seeded(outputs: dict[str, Any]) -> Tensor:
        seed_generators(seed)
        return loss(outputs)  # type: ignore[no-any-return]

    return seeded


def _check_deterministic(
    again: Loss, values: Values, before: Mapping[str, Any], dtypes: Dtypes
) -> None:
    after = output_gradients(again, values)
    if not all(_equal(before[name], after[name], dtypes) for name in values):
        raise ValueError(
            "the loss draws random numbers, so that members' gradients differ from step to step "
            "and have no multiple. Give the loss of one draw, or without what is drawn."
        )


# --- coupling -----------------------------------------------------------------------------------


def _coupled(
    loss: Loss, values: Values, before: Mapping[str, Any], dtypes: Dtypes
) -> dict[str, tuple[str, ...]]:
    """By member, those whose predictions change its gradient."""
    after = {
        other: output_gradients(loss, {**values, other: _nudged(ys)})
        for other, ys in values.items()
    }
    return {
        name: tuple(
            other
            for other in values
            if other != name and not _equal(before[name], after[other][name], dtypes)
        )
        for name in values
    }


def _nudged(outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Another prediction of the same kind: probabilities stay in [0, 1], signs stay."""
    generator = torch.Generator().manual_seed(0)
    nudged = []
    for y in outputs:
        share = as_kind_of(0.5 * (1 - torch.rand(y.shape, generator=generator)), y)
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
    case: Case,
    values: Values,
    gradients: Mapping[str, Sequence[Tensor | None]],
    coupled: bool,
    dtypes: Dtypes,
) -> dict[str, Loss] | None:
    """Each member's own loss, of its output in a dict; a cross-entropy is known by its gradient.

    The gradient of a cross-entropy in the logits is a multiple of softmax(z) - onehot(label), so
    it shows the labels, and the multiple needs no word of the user's. Without that, a loss that is
    divided by a number written down could not be told from a smaller loss.
    """
    if case.subject.member_loss is not None:
        return {name: _given(case.subject.member_loss, name, case.seed) for name in values}
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

    def of(name: str, target: Tensor) -> Loss:
        return lambda ys: cross_entropy(ys[name], target)

    return {n: of(n, found if found is not None else known[0]) for n, found in labels.items()}


def _given(member_loss: Callable[[Any], Tensor], name: str, seed: int) -> Loss:
    then = "It takes the output of one member and returns its loss, a scalar tensor."
    return _seeded(lambda ys: asked("member_loss", member_loss, ys[name], then=then), seed)


def _labels(logits: Tensor, gradient: Tensor | None, dtypes: Dtypes) -> Tensor | None:
    """The labels of a mean cross-entropy with this gradient; None if it is no such gradient."""
    if gradient is None or logits.ndim != 2 or not gradient.any():
        return None
    # A prediction that is right and sure has a gradient that rounds to zero.
    labels = torch.where(gradient.amin(1) < 0, gradient.argmin(1), logits.argmax(1))
    found = gradient.double()
    direction = logits.double().softmax(1) - one_hot(labels, logits.shape[1])
    share = (found * direction).sum() / direction.square().sum()
    off = (found - share * direction).norm() / found.norm()
    return labels if float(off) < tolerance_of("rewritten", *dtypes) else None


def _alone(loss: Loss | None, output: Values, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient of one member's own loss; of its output's sum where that is not known."""
    if loss is None:
        value = torch.stack([y.sum() for ys in output.values() for y in ys]).sum()
    else:
        value = loss_of(loss, _copies(output))
    return gradients_of([value], [torch.ones_like(value)], parameters)


def _overlaps(
    trained: Sequence[str],
    alone: Mapping[str, Sequence[Tensor | None]],
    total: Sequence[Tensor | None],
    places: Sequence[tuple[str, ...]],
    dtypes: Dtypes,
) -> dict[str, list[Overlap]]:
    """Where others that are trained send gradients to elements in which a member has its own.

    Who is not trained sends none. Elements are looked at, and not tensors: packed members have
    slices of one.
    """
    norms = {name: [_norm(gradient) for gradient in alone[name]] for name in trained}
    found: dict[str, list[Overlap]] = {name: [] for name in trained}
    # One parameter is less than all, and its roundings cancel less: as outputs do.
    one, all_of_them = (tolerance_of(kind, *dtypes) for kind in ("recomputed", "rescaled"))
    for i, names in enumerate(places):
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
                found[name].append(Overlap(names, tuple(among), multiple))
    return found


def _norm(gradient: Tensor | None) -> float:
    dense = _dense(gradient)
    return 0.0 if dense is None else float(dense.norm())


def _dense(gradient: Tensor | None) -> Tensor | None:
    if gradient is None:
        return None
    return (gradient.to_dense() if gradient.is_sparse else gradient).detach().double()


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
    case: Case,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    own: Sequence[int],
    name: str,
    dtypes: Dtypes,
) -> bool | None:
    """Whether this member's clipped gradient changes when those of others are loud."""
    clip = case.subject.clip
    if clip is None:
        return None
    if not own:
        raise ValueError(
            f"member {name} has no parameters of its own, so that clipping cannot be compared. "
            "Leave clip= out where members share all parameters."
        )
    then = "It takes the model, and changes its gradients as training does before a step."
    seen = []
    for loudness in (0.0, LOUD):
        for i, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
            others = torch.full_like(parameter, min(loudness, torch.finfo(parameter.dtype).max / 2))
            given = gradient.detach().clone() if gradient is not None else None
            parameter.grad = given if i in own else others
        asked("clip", clip, case.model, then=then)
        seen.append([None if (g := parameters[i].grad) is None else g.clone() for i in own])
    for parameter in parameters:
        parameter.grad = None
    return not _equal(seen[0], seen[1], dtypes)
