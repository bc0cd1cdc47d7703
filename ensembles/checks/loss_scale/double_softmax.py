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

from ensembles.handling.state import generators_kept, seed_generators
from ensembles.handling.training import output_gradients
from ensembles.subject import Loss

__all__ = ["taken_for_logits"]

SAME = 1e-3
"""Relative; the gradients of other losses are off by a tenth."""

SUM = 1e-3
"""By how much a row of probabilities may miss 1; in half precision that is one unit."""


def taken_for_logits(loss: Loss, values: Mapping[str, Sequence[Tensor]]) -> dict[str, int]:
    """The members whose probabilities the loss puts through a softmax, with their class axis.

    All of them are looked at together, so that a loss of their mean is seen too.

    Args:
        loss: The training loss, a function of the dict of member outputs.
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
    for axis in range(1, y.ndim):
        if y.shape[axis] > 1 and bool(((y.sum(axis) - 1).abs() <= SUM).all()):
            return axis
    return None


def _softmaxed(
    loss: Loss, values: Mapping[str, Sequence[Tensor]], names: Sequence[str], axis: int
) -> bool:
    like = values[names[0]][0]
    generator = torch.Generator().manual_seed(0)
    points = [
        (3 * torch.randn(like.shape, generator=generator)).softmax(axis).to(like) for _ in range(3)
    ]
    try:
        gradients = [_gradient(loss, values, names, point) for point in points]
    except ValueError:  # a loss that does not take any probabilities
        return False
    if any(bool(g.sum(axis).norm() > SAME * g.norm()) for g in gradients):
        return False
    weights = []
    for one, other in ((0, 1), (0, 2)):
        step = points[other].double().softmax(axis) - points[one].double().softmax(axis)
        change = gradients[other] - gradients[one]
        weight = (change * step).sum(axis, keepdim=True) / step.square().sum(axis, keepdim=True)
        if not bool((change - weight * step).norm() <= SAME * change.norm()):
            return False
        weights.append(weight)
    same = bool((weights[0] - weights[1]).norm() <= SAME * weights[0].norm())
    return same and bool((weights[0] > -SAME * weights[0].abs().max()).all() & weights[0].any())


def _gradient(
    loss: Loss, values: Mapping[str, Sequence[Tensor]], names: Sequence[str], point: Tensor
) -> Tensor:
    """Summed over the members, all of which emit this."""
    with generators_kept():
        seed_generators(0)
        given = {n: (point,) if n in names else tuple(ys) for n, ys in values.items()}
        found = output_gradients(loss, given)
    total = torch.zeros_like(point, dtype=torch.float64)
    for name in names:
        gradient = found[name][0]
        total += 0 if gradient is None else gradient.double()
    return total
