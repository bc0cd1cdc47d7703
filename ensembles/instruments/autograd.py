"""Reads the graph that autograd keeps of a call: its nodes, and what each of them computes.

Torch names a node after the implementation that was chosen, and keeps of its arguments what the
backward pass needs. Both depend on the machine and on the version; what is read here does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ensembles.case import Case
from ensembles.handling.numbers import checked_numbers
from ensembles.handling.state import parameters_kept

__all__ = [
    "Edge",
    "Nodes",
    "attributes_of",
    "leaves_of",
    "nodes_of",
    "operation_of",
    "outputs_with_graph",
    "postorder",
    "signed",
]


# --- the call -----------------------------------------------------------------------------------


@contextmanager
def outputs_with_graph(
    case: Case, batch: Any = None, *, training: bool = False
) -> Iterator[dict[str, tuple[Tensor, ...]]]:
    """The member outputs of one call, with their graph; the model is as before on exit.

    Args:
        case: What is called.
        batch: What it is called with; by default a copy of the case's batch.
        training: Whether the model is called in training mode.

    Yields:
        Member name to its output tensors.

    Raises:
        ValueError: If a member's output has no graph, a parameter is lazy, on meta or not finite,
            or the call fails or changes parameters.

    Example:
        >>> with outputs_with_graph(Case.of(nn.Linear(3, 2), torch.ones(1, 3))) as outputs:
        ...     print(outputs["model"][0].grad_fn.name())
        AddmmBackward0
    """
    checked_numbers(case.model)
    with case.preserved():
        for module in case.modules.values():
            module.train(training)
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            _plain_kernels(),
            parameters_kept(case.model),
        ):
            outputs = case.call(batch=batch)
        for member, tensors in outputs.items():
            if not any(tensor.requires_grad for tensor in tensors):
                raise ValueError(
                    f"the output of member {member} has no autograd graph. Usual causes: "
                    "torch.no_grad or .detach() inside forward, or every parameter frozen "
                    "(requires_grad=False)."
                )
        yield outputs


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Turns off what one machine fuses into one operation and another computes in several."""
    backends: list[Any] = [torch.backends.cudnn, torch.backends.mkldnn]
    before = [backend.enabled for backend in backends]
    for backend in backends:
        backend.enabled = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for backend, enabled in zip(backends, before, strict=True):
            backend.enabled = enabled


# --- nodes --------------------------------------------------------------------------------------


class Edge(NamedTuple):
    """Output number `output` of node number `node`."""

    node: int
    output: int


@dataclass(frozen=True)
class Nodes:
    """The nodes that outputs are computed by; a node is known by its place in `functions`.

    Attributes:
        functions: Torch's nodes; operands precede what uses them.
        operands: What each node reads; None where no gradient flows.
        leaves: The nodes that gradients arrive at, with the tensor that has them.
        ends: Every member with the edges to what it returns; None where that has no graph.
    """

    functions: list[Any]
    operands: list[list[Edge | None]]
    leaves: dict[int, Tensor]
    ends: dict[str, list[Edge | None]]


def nodes_of(outputs: Mapping[str, Sequence[Tensor]]) -> Nodes:
    """The graph that member outputs were computed by.

    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> nodes = nodes_of({"model": [weight.exp() * 3]})
        >>> [operation_of(function) for function in nodes.functions], nodes.ends
        (['AccumulateGrad', 'Exp', 'Mul'], {'model': [Edge(node=2, output=0)]})
    """
    ends = {
        member: [
            _past_whole_slices(*torch.autograd.graph.get_gradient_edge(tensor)[:2])
            if tensor.requires_grad
            else None
            for tensor in tensors
        ]
        for member, tensors in outputs.items()
    }
    functions = postorder(
        [end[0] for found in ends.values() for end in found if end],
        lambda function: [used for used, _ in _operands(function) if used is not None],
    )
    index = {function: i for i, function in enumerate(functions)}
    return Nodes(
        functions=functions,
        operands=[
            [
                Edge(index[used], nr) if used is not None else None
                for used, nr in _operands(function)
            ]
            for function in functions
        ],
        leaves={i: node.variable for i, node in enumerate(functions) if _is_leaf(node)},
        ends={
            member: [Edge(index[end[0]], end[1]) if end else None for end in found]
            for member, found in ends.items()
        },
    )


def postorder(roots: Iterable[Any], operands: Callable[[Any], Sequence[Any]]) -> list[Any]:
    """Nodes with operands before what uses them, in the order in which operands are listed.

    A loop, since graphs may be deeper than Python's stack.

    Example:
        >>> postorder("a", {"a": "bc", "b": "d", "c": "d", "d": ""}.get)
        ['d', 'b', 'c', 'a']
    """
    order: list[Any] = []
    seen: set[Any] = set()
    for root in roots:
        if root in seen:
            continue
        seen.add(root)
        stack = [(root, iter(operands(root)))]
        while stack:
            node, rest = stack[-1]
            for operand in rest:
                if operand not in seen:
                    seen.add(operand)
                    stack.append((operand, iter(operands(operand))))
                    break
            else:
                stack.pop()
                order.append(node)
    return order


def leaves_of(outputs: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors that gradients of the outputs arrive at: the leaves of their autograd graph.

    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> [leaf is weight for leaf in leaves_of([weight.exp() * 3])]
        [True]
    """
    roots = []
    for tensor in outputs:
        if tensor.grad_fn is not None:
            roots.append(tensor.grad_fn)
        elif tensor.requires_grad:
            yield tensor
    for node in postorder(roots, lambda node: [n for n, _ in node.next_functions if n is not None]):
        if _is_leaf(node):
            yield node.variable


def _is_leaf(node: Any) -> bool:
    # Not whatever has an attribute `variable`: users name theirs so too.
    return bool(node.name().endswith("AccumulateGrad"))


def _operands(function: Any) -> list[tuple[Any, int]]:
    return [_past_whole_slices(used, nr) for used, nr in function.next_functions]


def _past_whole_slices(function: Any, nr: int) -> tuple[Any, int]:
    """Leaves out the ":" of x[:, 2:], which is a node in some versions of torch."""
    while function is not None and function.name().startswith("SliceBackward"):
        if (function._saved_start, function._saved_end, function._saved_step) != (0, 2**63 - 1, 1):
            break
        function, nr = function.next_functions[0]
    return function, nr


# --- operations ---------------------------------------------------------------------------------

# One name for implementations among which the device, the build or the version decides.
_SYNONYMS = (
    (r"(Native|Cudnn|Miopen|Mkldnn|Mps)?_?BatchNorm(Legit\w*|WithUpdate\w*)?", "BatchNorm"),
    (r"(Cudnn|Miopen|Mps)ConvolutionTranspose", "ConvolutionTranspose"),
    (r"(Cudnn|Miopen|Mkldnn|Mps|SlowNd)?Convolution(Overrideable)?", "Convolution"),
    (r"(MiopenDepthwiseConvolution|ThnnConv2D|SlowConv\w*|ConvDepthwise\w*)", "Convolution"),
    (r"(Mkldnn)?MaxPool(\dD)(WithIndices)?", r"MaxPool\2"),
    (r"Native(LayerNorm|GroupNorm)", r"\1"),
    (r"(Fused|Native)Dropout", "Mul"),  # on a CPU, dropout multiplies by a mask
    (r"(View|UnsafeView|ReshapeAlias)", "View"),  # which of them depends on strides
)


def operation_of(function: Any) -> str:
    """The operation that a node is the backward of, without what a build or a version adds.

    Example:
        >>> operation_of(nn.Conv2d(3, 4, 3)(torch.ones(1, 3, 8, 8)).grad_fn)
        'Convolution'
    """
    operation = _without_implementation(function.name())
    if operation == "Convolution" and getattr(function, "_saved_transposed", False):
        return "ConvolutionTranspose"
    return operation


@cache
def _without_implementation(name: str) -> str:
    bare = re.sub(r"Backwards?\d*$", "", name.rpartition("::")[2])
    for pattern, operation in _SYNONYMS:
        if match := re.fullmatch(pattern, bare):
            return match.expand(operation)
    return bare


# --- attributes ---------------------------------------------------------------------------------

_WINDOW = ("stride", "padding", "dilation", "groups", "output_padding")
_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")

# What is shown where a node has it. Only integers that torch has saved under the same name since
# 2.6, and that do not depend on the number of samples.
_SHOWN: Mapping[str, tuple[str, ...]] = {
    "Add": ("alpha",),
    "Sub": ("alpha",),
    "AvgPool2D": _POOL,
    "BatchNorm": ("training",),
    "Cat": ("dim",),
    "ConstantPadNd": ("pad",),
    "Convolution": _WINDOW,
    "ConvolutionTranspose": _WINDOW,
    "LogSoftmax": ("dim",),
    "MaxPool2D": _POOL,
    "Mean": ("dim",),
    "Permute": ("dims",),
    "Roll": ("dims", "shifts"),
    "Select": ("dim", "index"),
    "Slice": ("dim", "start", "end", "step"),
    "Softmax": ("dim",),
    "Split": ("dim", "split_size"),
    "Stack": ("dim",),
    "Sum": ("dim",),
    "Transpose": ("dim0", "dim1"),
    "Unbind": ("dim",),
}
_USUAL = {
    "alpha": 1,
    "ceil_mode": False,
    "dilation": 1,
    "groups": 1,
    "output_padding": 0,
    "padding": 0,
    "step": 1,
    "stride": 1,
    "training": False,
}


def attributes_of(function: Any, *, of_weight: bool) -> tuple[tuple[str, str], ...]:
    """The arguments of a node that are shown, without those that have their usual value.

    Args:
        function: Torch's node.
        of_weight: Whether it reads a weight. Of anything else axis 0 is the batch, of which
            neither start nor end of a slice is shown.

    Example:
        >>> attributes_of(nn.Conv2d(3, 4, 3, stride=2)(torch.ones(1, 3, 8, 8)).grad_fn,
        ...               of_weight=False)
        (('stride', '2'),)
    """
    saved: dict[str, Any] = {}
    for key in _SHOWN.get(operation_of(function), ()):
        value = getattr(function, f"_saved_{key}", None)
        if isinstance(value, bool):
            saved[key] = value
        elif isinstance(value, int):
            saved[key] = signed(value)
        elif isinstance(value, (tuple, list)) and all(type(entry) is int for entry in value):
            saved[key] = tuple(signed(entry) for entry in value)
    sizes = getattr(function, "_saved_self_sym_sizes", None)
    if sizes is not None:
        _count_from_the_front(saved, tuple(sizes), of_weight=of_weight)
    if saved.get("dim") == 0 and not of_weight:
        for key in ("start", "end", "split_size"):
            saved.pop(key, None)
    shown = []
    for key, value in saved.items():
        if isinstance(value, tuple) and key in (*_WINDOW, *_POOL) and len(set(value)) == 1:
            value = value[0]
        if value == () or (key in _USUAL and value == _USUAL[key]):
            continue
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        shown.append((key, text))
    return tuple(shown)


def signed(number: int) -> int:
    """Torch hands out saved negative numbers as unsigned ones.

    Example:
        >>> signed(2**64 - 1), signed(3)
        (-1, 3)
    """
    return number - 2**64 if number >= 2**63 else number


def _count_from_the_front(
    saved: dict[str, Any], sizes: tuple[int, ...], *, of_weight: bool
) -> None:
    """Writes negative axes and indices as positive ones, so that both spellings are one text."""
    for key in ("dim", "dims"):
        if isinstance(value := saved.get(key), tuple):
            saved[key] = tuple(axis % len(sizes) for axis in value)
        elif isinstance(value, int):
            saved[key] = value % len(sizes)
    axis = saved.get("dim")
    if not isinstance(axis, int) or (axis == 0 and not of_weight):
        return  # the size is that of the batch
    for key in ("start", "end", "index"):
        if isinstance(value := saved.get(key), int):
            saved[key] = min(value + sizes[axis] if value < 0 else value, sizes[axis])
