"""Whether a training loss takes probabilities for logits, and applies a softmax to them.

The gradient of a cross-entropy in what it takes for logits z is w (softmax(z) - q), with a weight
w and targets q of the row that do not depend on z. Between two predictions it changes by
w (softmax(z') - softmax(z)), and w is the same between any two. No loss that takes probabilities
as such (negative log-likelihood, Brier, a margin) has such a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ensembles.handling.training import output_gradients
from ensembles.subject import Loss
from ensembles.tolerance import PROBABILITY_SUM, tolerance_of

__all__ = ["taken_for_logits"]

SAME = 1e-3
"""Least relative difference of gradients that counts, in any dtype: those of other losses are off
by a tenth."""

SPREAD = 3.0
"""Standard deviation of the logits that a loss is tried with: one of five classes has most of the
probability, and a gradient of 20,000 classes is still more than its roundings."""


def taken_for_logits(loss: Loss, values: Mapping[str, Sequence[Tensor]]) -> dict[str, int]:
    """The members whose probabilities the loss puts through a softmax, with their class axis.

    All of them are looked at together, so that a loss of their mean is seen too.

    Args:
        loss: The training loss, a function of the dict of member outputs, which draws the same
            random numbers in every call.
        values: The members' outputs; those of one tensor are looked at.

    Example:
        >>> from torch.nn.functional import cross_entropy, nll_loss
        >>> p, labels = torch.rand(4, 3).softmax(1), torch.tensor([0, 1, 2, 0])
        >>> taken_for_logits(lambda y: cross_entropy(y["a"], labels), {"a": [p]})
        {'a': 1}
        >>> taken_for_logits(lambda y: nll_loss(y["a"].log(), labels), {"a": [p]})
        {}
    """
    emitting = {
        name: axis
        for name, ys in values.items()
        if len(ys) == 1 and (axis := _class_axis(ys[0])) is not None
    }
    found = {}
    for shape, axis in {(values[name][0].shape, axis) for name, axis in emitting.items()}:
        alike = [n for n, a in emitting.items() if (values[n][0].shape, a) == (shape, axis)]
        if _softmaxed(loss, values, alike, axis):
            found.update(dict.fromkeys(alike, axis))
    return {name: axis for name, axis in emitting.items() if name in found}


def _class_axis(y: Tensor) -> int | None:
    """The axis along which these are distributions."""
    if y.ndim < 2 or not y.numel() or bool((y < 0).any()):
        return None
    tolerance = PROBABILITY_SUM + tolerance_of("rewritten", y)
    for axis in range(1, y.ndim):
        off = (y.double().sum(axis) - 1).abs()
        if y.shape[axis] > 1 and bool((off <= tolerance).all()):
            return axis
    return None


def _softmaxed(
    loss: Loss, values: Mapping[str, Sequence[Tensor]], names: Sequence[str], axis: int
) -> bool:
    like = values[names[0]][0]
    generator = torch.Generator().manual_seed(0)
    logits = [SPREAD * torch.randn(like.shape, generator=generator) for _ in range(3)]
    # Logits, because the gradients of probabilities differ too little to be seen in bfloat16. But a
    # loss may refuse or clamp them, so it is tried with probabilities of float32 too.
    wide = torch.promote_types(like.dtype, torch.float32)
    tried = (
        [z.to(like) for z in logits],
        [z.softmax(axis).to(like.device, wide) for z in logits],
    )
    return any(_has_gradient_of_softmax(loss, values, names, axis, points) for points in tried)


def _has_gradient_of_softmax(
    loss: Loss,
    values: Mapping[str, Sequence[Tensor]],
    names: Sequence[str],
    axis: int,
    points: Sequence[Tensor],
) -> bool:
    """Whether the gradients at these points are w (softmax(z) - q), with the same w and q."""
    same = max(SAME, tolerance_of("rewritten", points[0]))
    try:
        gradients = [_gradient(loss, values, names, point) for point in points]
    except ValueError:  # a loss that does not take these
        return False
    if any(bool(g.sum(axis).norm() > same * g.norm()) for g in gradients):
        return False
    steps = torch.stack([point.double().softmax(axis) for point in points[1:]])
    steps = steps - points[0].double().softmax(axis)
    changes = torch.stack(gradients[1:]) - gradients[0]
    # One weight for all changes of a row. A row that hardly steps tells none.
    across = (0, axis + 1)
    weight = (changes * steps).sum(across, keepdim=True) / steps.square().sum(across, keepdim=True)
    for change, step in zip(changes, steps, strict=True):
        if not bool((change - weight[0] * step).norm() <= same * change.norm()):
            return False
    return bool((weight > -same * weight.abs().max()).all() & weight.any())


def _gradient(
    loss: Loss, values: Mapping[str, Sequence[Tensor]], names: Sequence[str], point: Tensor
) -> Tensor:
    """Summed over the members, all of which emit this."""
    given = {n: (point,) if n in names else tuple(ys) for n, ys in values.items()}
    found = output_gradients(loss, given)
    total = torch.zeros_like(point, dtype=torch.float64)
    for name in names:
        gradient = found[name][0]
        total += 0 if gradient is None else gradient.double()
    return total
