"""Which elements of a parameter stand behind a constant mask, wherever a call uses it.

Read from the autograd graph and not from gradients: a zero gradient may as well be a dead unit, or
a part of a kernel that sees padding only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ensembles.instruments.autograd import operation_of

__all__ = ["masked_elements"]

_OF_WEIGHTS = frozenset(
    {"Abs", "Add", "Clamp", "ClampMax", "ClampMin", "Clone", "Div", "Exp", "Expand"}
    | {"LinalgVectorNorm", "Maximum", "Mean", "Mul", "Neg"}
    | {"Norm", "Pow", "Reciprocal", "Rsqrt", "Sigmoid", "Softmax", "Softplus", "Sqrt", "Square"}
    | {"Std", "Sub", "Sum", "Tanh", "Unsqueeze", "Var", "WeightNormInterface", "AccumulateGrad"}
)
"""Operations that make a weight of weights, and in whose place no batch comes in."""


def masked_elements(outputs: Iterable[Tensor]) -> dict[int, Tensor]:
    """The elements that every use multiplies by a constant zero, by the id of their parameter.

    A use is a product with a constant, `masked_fill` or `where`, of the parameter itself or of a
    weight of its shape that is computed from it (weight normalisation). Parameters of which no
    element is hidden, or all are, are left out.

    Args:
        outputs: What the call returned, with its graph.

    Example:
        >>> weight = torch.ones(3, requires_grad=True)
        >>> masked_elements([(weight * torch.tensor([1.0, 0.0, 1.0])).sum()])[id(weight)]
        tensor([False,  True, False])
        >>> masked_elements([(weight * torch.tensor([1.0, 0.0, 1.0])).sum() + weight.sum()])
        {}
    """
    ends = [y.grad_fn for y in outputs if y.grad_fn is not None]
    masks: list[tuple[Any, Tensor]] = []

    def found(node: Any) -> bool:
        mask = _mask_of(node)
        if mask is not None and _of_weights_only(node):
            masks.append((node, mask))
            return True
        return False

    open_ones = {id(node.variable) for node in _below(ends, stop=found) if _is_leaf(node)}
    hidden: dict[int, list[Tensor]] = defaultdict(list)
    for node, mask in masks:
        for leaf in _below([n for n, _ in node.next_functions if n is not None]):
            if _is_leaf(leaf) and leaf.variable.shape == mask.shape:
                hidden[id(leaf.variable)].append(mask)
            elif _is_leaf(leaf):  # a gain of another shape has no elements behind the mask
                open_ones.add(id(leaf.variable))
    agreed = {key: torch.stack(each).all(0) for key, each in hidden.items() if key not in open_ones}
    return {key: mask for key, mask in agreed.items() if bool(mask.any()) and not bool(mask.all())}


def _below(roots: Iterable[Any], stop: Any = lambda node: False) -> list[Any]:
    """All nodes that the roots are computed from, without those behind a node to stop at."""
    seen: set[Any] = set()
    order = []
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if stop(node):
            continue
        order.append(node)
        stack.extend(used for used, _ in node.next_functions if used is not None)
    return order


def _is_leaf(node: Any) -> bool:
    return str(node.name()).endswith("AccumulateGrad")


def _mask_of(node: Any) -> Tensor | None:
    """True where the node gives zero whatever the tensor is that it reads; None for no mask."""
    operation = operation_of(node)
    if operation not in ("Mul", "MaskedFill", "Where"):
        return None
    read = [used is not None for used, _ in node.next_functions]
    if sum(read) != 1:
        return None
    if operation == "Mul":
        constant = node._saved_other if read[0] else node._saved_self
        zeros = constant == 0 if isinstance(constant, Tensor) else None
    elif operation == "MaskedFill":
        zeros = node._saved_mask
    else:
        zeros = ~node._saved_condition if read[0] else node._saved_condition
    (made, *_) = node._input_metadata
    if zeros is None or not zeros.ndim or not made.shape:
        return None
    return zeros.expand(tuple(made.shape)) if bool(zeros.any()) else None


def _of_weights_only(node: Any) -> bool:
    operands = [used for used, _ in node.next_functions if used is not None]
    return all(operation_of(below) in _OF_WEIGHTS for below in _below(operands))
