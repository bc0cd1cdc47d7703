"""Operations that hide nothing: what `ensembles.instruments.influence` looks through.

Forward, below autograd, nothing is dropped, and an activation that gives exactly zero for an input
that is not zero gives a tenth of it. Backward, activations, softmax, pooling and normalisation
pass the gradient on to everything that they read. All changes are to positive values and keep
zeros that stand for structure: masks, empty groups.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from ensembles.instruments.autograd import postorder, signed

__all__ = ["transparent_backward", "transparent_forward"]


@contextmanager
def transparent_forward() -> Iterator[None]:
    """Inside, operations of a forward pass hide nothing, and are recorded one by one.

    Example:
        >>> with transparent_forward():
        ...     print(torch.tensor([-1.0, 0.0, 2.0]).relu())
        tensor([0.1000, 0.0000, 2.0000])
    """
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # its import takes seconds, and is nobody's need here
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        # The fused attentions have a backward of their own, which hides the softmax.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_no_recomputation())
        stack.enter_context(_Transparent())  # type: ignore[no-untyped-call]
        yield


@contextmanager
def _no_recomputation() -> Iterator[None]:
    """Checkpoints keep what they compute: the backward rules read saved tensors a second time."""
    name = "_checkpoint_hook"  # what puts recomputation in the place of a saved tensor
    recomputing = getattr(checkpoint, name)
    setattr(checkpoint, name, nullcontext)
    try:
        yield
    finally:
        setattr(checkpoint, name, recomputing)


_aten = torch.ops.aten

_ACTIVATIONS = frozenset(
    getattr(_aten, name + tail)
    for name in (
        "relu", "hardtanh", "threshold", "hardswish", "hardsigmoid", "gelu", "silu", "mish",
        "hardshrink", "softshrink", "elu", "leaky_relu", "clamp", "clamp_min", "log_sigmoid",
        "relu6", "celu", "selu", "tanh", "sigmoid", "rrelu_with_noise",
    )
    for tail in ("", "_")
    if hasattr(_aten, name + tail)
)  # fmt: skip
MOST = 1e3
"""A gradient whose greatest element is more than this, or less than one over it, is scaled: in each
layer it may grow or shrink again, and a deep network would go beyond float32."""

_DRAWS = frozenset(getattr(_aten, name) for name in ("bernoulli", "bernoulli_"))


class _Transparent(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Below autograd: activations hide nothing, dropout drops nothing."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would wrap every call to keep the compiler off, and import it for that: seconds.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet in _ACTIVATIONS:
            before = args[0]
            in_place = packet.__name__.endswith("_")
            if in_place:
                before = before.clone()
            result = func(*args, **kwargs)
            opened = _opened(result, before.abs())
            return result.copy_(opened) if in_place else opened
        if packet is _aten.maximum:
            result = func(*args, **kwargs)
            return _opened(result, args[0].abs() + args[1].abs())
        if packet in _DRAWS:
            drawn = func(*args, **kwargs)
            return drawn.fill_(1) if drawn.is_floating_point() else drawn
        if packet is _aten.native_dropout:
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if packet is _aten.gt and _is_zero(args[1]) and args[0].is_floating_point():
            return args[0] != 0  # the gate of a hand-written ReLU
        return func(*args, **kwargs)


def _opened(result: Tensor, instead: Tensor) -> Tensor:
    return torch.where(result == 0, 0.1 * instead, result) if result.is_floating_point() else result


def _is_zero(x: Any) -> bool:
    return isinstance(x, (int, float)) and x == 0


Gradients = tuple[Tensor | None, ...]
Rule = Callable[[Any, Gradients, Tensor], Sequence[Tensor | None] | None]
"""From a node, the gradients in its inputs and the one in its output: others for its inputs."""


@contextmanager
def transparent_backward(outputs: Iterable[Tensor]) -> Iterator[set[int]]:
    """Inside, other backward rules stand in a recorded graph.

    A rule reads the node whose hook it is, a cycle that no garbage collector sees: a hook that
    stayed would keep the graph, and the model with it, for as long as the process lives.

    Args:
        outputs: The tensors that backward passes will start from.

    Yields:
        The ids of the parameters that are read by index (embeddings).

    Raises:
        ValueError: If a re-entrant checkpoint hides a part of the graph.

    Example:
        >>> x = torch.tensor([-1.0], requires_grad=True)
        >>> y = x.relu()
        >>> with transparent_backward([y]):
        ...     bool(torch.autograd.grad(y, x, retain_graph=True)[0])
        True
        >>> bool(torch.autograd.grad(y, x)[0])
        False
    """
    lookups: set[int] = set()
    roots = [y.grad_fn for y in outputs if y.grad_fn is not None]
    nodes = postorder(roots, lambda node: [n for n, _ in node.next_functions if n is not None])
    with ExitStack() as hooks:
        for node in nodes:
            name = type(node).__name__.rstrip("0123456789")
            if name.startswith("CheckpointFunction"):
                raise ValueError(
                    "the forward pass uses re-entrant activation checkpointing, which hides the "
                    "graph of its segment. Use checkpoint(..., use_reentrant=False), or turn it "
                    "off here."
                )
            if name in _RULES:
                hooks.callback(node.register_hook(_hook(node, _RULES[name])).remove)
            if name in _PRODUCTS:
                hooks.callback(node.register_prehook(_rescaled).remove)
            if name in _LOOKUPS:
                lookups |= {
                    id(child.variable)
                    for child, _ in node.next_functions
                    if child is not None and hasattr(child, "variable")
                }
        yield lookups


def _hook(node: Any, rule: Rule) -> Callable[[Gradients, Gradients], Any]:
    def replace(inputs: Gradients, outputs: Gradients) -> Any:
        if outputs[0] is None:
            return None
        found = rule(node, inputs, outputs[0])
        if found is None:
            return None
        kept = list(inputs)
        for i, gradient in enumerate(found):
            before = inputs[i]
            if before is not None and gradient is not None:
                kept[i] = gradient.expand(before.shape).to(before.dtype)
        return tuple(kept)

    return replace


def _rescaled(gradients: Gradients) -> Any:
    """Keeps gradients of a deep network away from underflow and overflow; zeros stay zeros."""

    def near_one(gradient: Tensor | None) -> Tensor | None:
        if gradient is None or not gradient.numel():
            return gradient
        size = float(torch.linalg.vector_norm(gradient.detach(), math.inf))
        return gradient / size if size and not 1 / MOST < size < MOST else gradient

    return tuple(near_one(gradient) for gradient in gradients)


def _pass(node: Any, inputs: Gradients, gradient: Tensor) -> Sequence[Tensor | None]:
    return [_generic(gradient)]


def _generic(gradient: Tensor) -> Tensor:
    """A derivative that is not zero, and not the same as another's: x - clamp(x) cancels none."""
    return gradient * (torch.rand_like(gradient) + 0.5)


def _pass_to_both(node: Any, inputs: Gradients, gradient: Tensor) -> Sequence[Tensor | None]:
    return [None if x is None else _generic(gradient).sum_to_size(x.shape) for x in inputs[:2]]


def _prelu(node: Any, inputs: Gradients, gradient: Tensor) -> Sequence[Tensor | None]:
    slope = inputs[1]
    used = None if slope is None else (gradient * node._saved_self.abs()).sum_to_size(slope.shape)
    return [gradient, used]


def _convolution(node: Any, inputs: Gradients, gradient: Tensor) -> Sequence[Tensor | None]:
    """A tap that sees only padding, because this image is small, counts as its neighbours do."""
    read, weight, bias = inputs
    if weight is not None:
        weight = weight.abs().amax(list(range(2, weight.ndim)), keepdim=True)
    return [read, weight, bias]


def _softmax(node: Any, inputs: Gradients, gradient: Tensor) -> Sequence[Tensor | None]:
    result = node._saved_result
    dim = signed(node._saved_dim)
    logarithmic = "Log" in type(node).__name__
    # Exactly zero probability is a mask: generic scores are too close together to underflow.
    unmasked = result.isfinite() if logarithmic else result != 0
    gradient = gradient * unmasked
    return [(gradient + gradient.mean(dim, keepdim=True)) * unmasked]


def _max_pool(node: Any, inputs: Gradients, gradient: Tensor) -> Sequence[Tensor | None]:
    """Every element of a window takes part: the transpose of a convolution with ones."""
    read = node._saved_self
    kernel = list(node._saved_kernel_size)
    space = read.ndim - (read.ndim - len(kernel))
    kernel = kernel * space if len(kernel) == 1 else kernel
    stride = list(node._saved_stride) or kernel
    padding, dilation = list(node._saved_padding), list(node._saved_dilation)
    flat = gradient.reshape(-1, 1, *gradient.shape[-space:])
    transpose = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[space - 1]
    spread = transpose(flat, flat.new_ones(1, 1, *kernel), stride=stride, dilation=dilation)
    # The transpose covers the padded input; with ceil_mode windows may end before or beyond it.
    sides = read.shape[-space:]
    after = [
        max(0, pad + side - have)
        for pad, side, have in zip(padding, sides, spread.shape[-space:], strict=True)
    ]
    spread = F.pad(spread, [n for extra in reversed(after) for n in (0, extra)])
    for axis, (pad, side) in enumerate(zip(padding, sides, strict=True)):
        spread = spread.narrow(2 + axis, pad, side)
    return [spread.reshape(read.shape)]


def _adaptive_max_pool(node: Any, inputs: Gradients, gradient: Tensor) -> Any:
    read = node._saved_self
    backward = (
        _aten._adaptive_avg_pool2d_backward
        if "2D" in type(node).__name__
        else _aten._adaptive_avg_pool3d_backward
    )
    return [backward(gradient, read)]


def _max_over(node: Any, inputs: Gradients, gradient: Tensor) -> Sequence[Tensor | None]:
    if inputs[0] is None:
        return [None]
    rank = inputs[0].ndim
    dims = getattr(node, "_saved_dim", ())
    dims = [dims] if isinstance(dims, int) else dims
    dims = [signed(dim) for dim in dims] or list(range(rank))
    if not getattr(node, "_saved_keepdim", False):
        for dim in sorted(d % rank for d in dims):
            gradient = gradient.unsqueeze(dim)
    return [_generic(gradient.expand(inputs[0].shape))]


def _batch_norm(node: Any, inputs: Gradients, gradient: Tensor) -> Sequence[Tensor | None] | None:
    if not getattr(node, "_saved_training", True):
        return None
    weight = node._saved_weight
    if weight is not None:
        gradient = gradient * weight.abs().reshape(1, -1, *[1] * (gradient.ndim - 2))
    others = [dim for dim in range(gradient.ndim) if dim != 1]
    return [gradient + gradient.mean(others, keepdim=True)]


def _layer_norm(node: Any, inputs: Gradients, gradient: Tensor) -> Sequence[Tensor | None]:
    if node._saved_weight is not None:
        gradient = gradient * node._saved_weight.abs()
    dims = list(range(-len(node._saved_normalized_shape), 0))
    return [gradient + gradient.mean(dims, keepdim=True)]


def _group_norm(node: Any, inputs: Gradients, gradient: Tensor) -> Sequence[Tensor | None]:
    if node._saved_weight is not None:
        gradient = gradient * node._saved_weight.abs().reshape(1, -1, *[1] * (gradient.ndim - 2))
    grouped = gradient.reshape(gradient.shape[0], node._saved_group, -1)
    return [(grouped + grouped.mean(-1, keepdim=True)).reshape(gradient.shape)]


_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            f"{name}Backward"
            for name in (
                "Relu", "Hardtanh", "Threshold", "LeakyRelu", "Sigmoid", "Tanh", "Gelu", "Silu",
                "Mish", "Hardswish", "Hardsigmoid", "Elu", "Softplus", "LogSigmoid", "Clamp",
                "ClampMin", "ClampMax", "Hardshrink", "Softshrink", "RreluWithNoise", "Abs",
            )
        ),
        _pass,
    ),
    "PreluKernelBackward": _prelu,
    "ConvolutionBackward": _convolution,
    "MaximumBackward": _pass_to_both,
    "MinimumBackward": _pass_to_both,
    "SoftmaxBackward": _softmax,
    "LogSoftmaxBackward": _softmax,
    "SafeSoftmaxBackward": _softmax,
    "MaxPool2DWithIndicesBackward": _max_pool,
    "MaxPool3DWithIndicesBackward": _max_pool,
    "AdaptiveMaxPool2DBackward": _adaptive_max_pool,
    "AdaptiveMaxPool3DBackward": _adaptive_max_pool,
    "MaxBackward": _max_over,
    "MinBackward": _max_over,
    "AmaxBackward": _max_over,
    "AminBackward": _max_over,
    "NativeBatchNormBackward": _batch_norm,
    "CudnnBatchNormBackward": _batch_norm,
    "NativeLayerNormBackward": _layer_norm,
    "NativeGroupNormBackward": _group_norm,
}  # fmt: skip

_PRODUCTS = frozenset(
    f"{name}Backward"
    for name in ("Convolution", "Addmm", "Mm", "Bmm", "Baddbmm", "Linear", "Mv", "Addmv")
)
_LOOKUPS = frozenset(
    f"{name}Backward"
    for name in ("Embedding", "EmbeddingBag", "IndexSelect", "Index", "Gather", "Take")
)
