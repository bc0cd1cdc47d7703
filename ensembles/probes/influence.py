"""Which scalar weights move which member's output, whatever the weights happen to be now.

Gradients at the actual weights lie: a dead ReLU, the losers of a max-pool, a dropped unit, a
saturated softmax or a branch that starts at zero all give a gradient of exactly zero where the
weight matters a moment later. So the network is looked at with

- generic values: every trainable parameter, and every input, is positive and random, scaled so
  that activations keep their size; running statistics of BatchNorm are 0 and 1;
- transparent operations: dropout keeps everything; an activation that gives exactly zero for an
  input that is not zero gives a tenth of it; in the backward pass activations, softmax, pooling
  and normalisation pass the gradient on to everything that they read.

What is zero then is zero by structure: a mask, a group of a grouped convolution, a block that is
not read. It is one backward pass for each member.

Limits. Influence is followed by autograd: it ends at `detach`, `no_grad` and integer values, and
does not see values that the training step writes. Hard routing is that of the batch: an expert
that no row goes to is not reached. A weight that is held at zero by anything but the forward pass
(a gradient hook, the optimizer) counts as one that matters. Random masks that are not drawn by
dropout or `bernoulli` are taken as they fall.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ensembles.message import seed
from ensembles.probes.autograd import postorder, signed
from ensembles.probes.registers import registered
from ensembles.probes.state import parameters_kept, preserved
from ensembles.subject import (
    Model,
    Outputs,
    checked_numbers,
    member_outputs,
    named_modules_of,
)

__all__ = ["Probe", "influence", "probing"]

GAINS = (1.0, 1e-2, 1e2)
"""Factors on the weights' scale, tried in turn until the outputs are finite and not all zero."""


@dataclass(frozen=True)
class Probe:
    """A forward pass that was made transparent, ready for one backward pass a member.

    Attributes:
        outputs: Member name to its output tensors.
        parameters: Qualified name ("<member>.<name>", member "model" for one module) to tensor;
            a tied parameter once, under its first name. Frozen masks are left out.
        lookups: Names of parameters that are read by index (embeddings): rows that the batch does
            not name are not reached, and that says nothing about them.
    """

    outputs: dict[str, tuple[Tensor, ...]]
    parameters: dict[str, Tensor]
    lookups: frozenset[str]

    def reach(self, member: str, names: Iterable[str] | None = None) -> dict[str, Tensor | None]:
        """Which elements of each parameter reach the member; None where autograd has no path.

        Args:
            member: One of `outputs`.
            names: The parameters to look at; all by default.
        """
        wanted = {name: self.parameters[name] for name in names or self.parameters}
        outputs = [y for y in self.outputs[member] if y.requires_grad]
        if not outputs:
            return dict.fromkeys(wanted)
        # Positive and generic: what adds up to zero for all-ones (softmax, differences) does not.
        seeds = [torch.rand_like(y) + 0.5 for y in outputs]
        gradients = torch.autograd.grad(
            outputs, list(wanted.values()), seeds, retain_graph=True, allow_unused=True
        )
        return {
            name: None if gradient is None else gradient != 0
            for name, gradient in zip(wanted, gradients, strict=True)
        }


def influence(
    model: Model, batch: Any, *, outputs: Outputs | None = None, training: bool = False
) -> Iterator[tuple[str, dict[str, Tensor | None]]]:
    """For each member, which elements of every parameter reach its output.

    Args:
        model: One module, or the members as a list or dict of modules.
        batch: A tensor, a tuple of positional arguments, or a dict of keyword arguments. Floating
            inputs are replaced by generic ones, but for masks (infinities, or only 0 and 1).
        outputs: Splits what one module returns into member outputs.
        training: Whether modules are in training mode.

    Yields:
        The member's name, and for each qualified parameter name a mask of the parameter's shape,
        or None where autograd has no path at all.

    Raises:
        ValueError: As `probing`.

    Example:
        >>> two = [nn.Linear(2, 1), nn.Linear(2, 1)]
        >>> for member, reached in influence(two, torch.zeros(1, 2)):
        ...     print(member, [name for name, mask in reached.items() if mask is not None])
        0 ['0.weight', '0.bias']
        1 ['1.weight', '1.bias']
    """
    with probing(model, batch, outputs=outputs, training=training) as probe:
        for member in probe.outputs:
            yield member, probe.reach(member)


@contextmanager
def probing(
    model: Model, batch: Any, *, outputs: Outputs | None = None, training: bool = False
) -> Iterator[Probe]:
    """One transparent forward pass; the model is as it was on exit.

    Args:
        model: As for `influence`.
        batch: As for `influence`.
        outputs: As for `influence`.
        training: As for `influence`.

    Yields:
        The `Probe`; it is valid inside the context only.

    Raises:
        ValueError: If parameters hold no usable numbers, the call fails or changes parameters, no
            output depends on a parameter by autograd, or outputs are not finite at any scale.

    Example:
        >>> with probing(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.zeros(1, 2)) as probe:
        ...     reached = probe.reach("model")
        >>> bool(reached["model.0.weight"].all())
        True
    """
    checked_numbers(model)
    with ExitStack() as stack:
        stack.enter_context(preserved(model))
        stack.enter_context(torch.enable_grad())
        if "torch._dynamo" in sys.modules:  # its import takes seconds, and is nobody's need here
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        # The fused attentions have a backward of their own, which hides the softmax.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        modules = named_modules_of(model)
        for module in modules.values():
            module.train(training)
        found: dict[str, tuple[Tensor, ...]] = {}
        for gain in GAINS:
            torch.manual_seed(seed.get())
            _set_generic_values(modules, gain)
            inputs = _generic_inputs(batch)
            with parameters_kept(model), _Transparent():  # type: ignore[no-untyped-call]
                found = member_outputs(model, inputs, outputs=outputs)
            if all(_usable(tensors) for tensors in found.values()):
                break
        else:
            worst = next(name for name, tensors in found.items() if not _usable(tensors))
            raise ValueError(
                f"the output of member {worst} is NaN, infinite or all zero for generic positive "
                "weights of any scale, so that nothing can be said of what reaches it. Look for "
                "a division or a logarithm of sums, or cast the model to float64."
            )
        if not any(y.requires_grad for tensors in found.values() for y in tensors):
            raise ValueError(
                "no member's output depends on a parameter by autograd: the forward pass runs "
                "under no_grad or detaches. Influence cannot be followed; enable gradients."
            )
        lookups = _make_transparent(found)
        parameters = {
            entry.names[0]: entry.tensor
            for entry in registered(modules)
            if entry.kind == "parameter" and entry.tensor.requires_grad  # all but frozen masks
        }
        yield Probe(
            found, parameters, frozenset(n for n, p in parameters.items() if id(p) in lookups)
        )


def _usable(tensors: Sequence[Tensor]) -> bool:
    return all(bool(y.isfinite().all()) for y in tensors) and any(bool(y.any()) for y in tensors)


# --- generic values -----------------------------------------------------------------------------


def _set_generic_values(modules: dict[str, nn.Module], gain: float) -> None:
    every = list(dict.fromkeys(m for given in modules.values() for m in given.modules()))
    fans = {
        id(module.weight): module.weight.numel() // module.weight.shape[0]
        for module in every
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
        and isinstance(module.weight, nn.Parameter)
        and module.weight.numel()
    }
    with torch.no_grad():
        for parameter in dict.fromkeys(p for m in modules.values() for p in m.parameters()):
            if not parameter.requires_grad and bool((parameter == 0).any()):
                continue  # a frozen parameter with zeros is a mask
            parameter.requires_grad_(True)
            scale = gain * _scale(parameter, fans) if parameter.ndim > 1 else 1.0
            parameter.data.uniform_(0.5 * scale, 1.5 * scale)
        for module in every:
            if isinstance(module, _NormBase) and isinstance(module.running_mean, Tensor):
                module.running_mean.zero_()
                if isinstance(module.running_var, Tensor):
                    module.running_var.fill_(1.0)


def _scale(parameter: Tensor, fans: dict[int, int]) -> float:
    """The mean of positive weights that keeps a sum over the inputs as large as one of them."""
    if id(parameter) in fans:
        return 1.0 / fans[id(parameter)]
    # Initialisations have variance of about 1 / fan_in, whatever the layout of the tensor.
    variance = float(parameter.detach().double().square().mean()) if parameter.numel() else 0.0
    return min(1.0, max(variance, 1.0 / max(parameter.numel(), 1)))


def _generic_inputs(batch: Any) -> Any:
    def generic(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.is_meta:
            return x
        if x.numel() and (bool(x.isinf().any()) or _is_binary(x)):
            return x  # a mask
        return torch.rand_like(x.detach()) + 0.5

    return pytree.tree_map(generic, batch)


def _is_binary(x: Tensor) -> bool:
    return bool(((x == 0) | (x == 1)).all()) and bool((x == 0).any()) and bool((x == 1).any())


# --- transparent operations ---------------------------------------------------------------------

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
Rule = Callable[[Any, Gradients, Gradients], Sequence[Tensor | None] | None]


def _make_transparent(outputs: dict[str, tuple[Tensor, ...]]) -> set[int]:
    """Hooks the backward rules of the graph; returns ids of parameters that are read by index."""
    lookups: set[int] = set()
    roots = [y.grad_fn for tensors in outputs.values() for y in tensors if y.grad_fn is not None]
    for node in postorder(roots, lambda node: [n for n, _ in node.next_functions if n is not None]):
        name = type(node).__name__.rstrip("0123456789")
        if name.startswith("CheckpointFunction"):
            raise ValueError(
                "the forward pass uses re-entrant activation checkpointing, which hides the graph "
                "of its segment. Use checkpoint(..., use_reentrant=False), or turn it off here."
            )
        if name in _RULES:
            node.register_hook(_hook(node, _RULES[name]))
        if name in _PRODUCTS:
            node.register_prehook(_rescaled)
        if name in _LOOKUPS:
            lookups |= {
                id(child.variable)
                for child, _ in node.next_functions
                if child is not None and hasattr(child, "variable")
            }
    return lookups


def _hook(node: Any, rule: Rule) -> Callable[[Gradients, Gradients], Any]:
    def replace(inputs: Gradients, outputs: Gradients) -> Any:
        if outputs[0] is None:
            return None
        found = rule(node, inputs, outputs)
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
        return gradient / size if size and not 1e-3 < size < 1e3 else gradient

    return tuple(near_one(gradient) for gradient in gradients)


def _pass(node: Any, inputs: Gradients, outputs: Gradients) -> Sequence[Tensor | None]:
    return [outputs[0]]


def _pass_to_both(node: Any, inputs: Gradients, outputs: Gradients) -> Sequence[Tensor | None]:
    (gradient,) = (g for g in outputs[:1] if g is not None)
    return [None if x is None else gradient.sum_to_size(x.shape) for x in inputs[:2]]


def _prelu(node: Any, inputs: Gradients, outputs: Gradients) -> Sequence[Tensor | None]:
    (gradient,) = (g for g in outputs[:1] if g is not None)
    slope = inputs[1]
    used = None if slope is None else (gradient * node._saved_self.abs()).sum_to_size(slope.shape)
    return [gradient, used]


def _convolution(node: Any, inputs: Gradients, outputs: Gradients) -> Sequence[Tensor | None]:
    """A tap that sees only padding, because this image is small, counts as its neighbours do."""
    read, weight, bias = inputs
    if weight is not None:
        weight = weight.abs().amax(list(range(2, weight.ndim)), keepdim=True)
    return [read, weight, bias]


def _softmax(node: Any, inputs: Gradients, outputs: Gradients) -> Sequence[Tensor | None]:
    (gradient,) = (g for g in outputs[:1] if g is not None)
    result = node._saved_result
    dim = signed(node._saved_dim)
    logarithmic = "Log" in type(node).__name__
    # Exactly zero probability is a mask: generic scores are too close together to underflow.
    unmasked = result.isfinite() if logarithmic else result != 0
    gradient = gradient * unmasked
    return [(gradient + gradient.mean(dim, keepdim=True)) * unmasked]


def _max_pool(node: Any, inputs: Gradients, outputs: Gradients) -> Sequence[Tensor | None]:
    """Every element of a window takes part: the transpose of a convolution with ones."""
    (gradient,) = (g for g in outputs[:1] if g is not None)
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


def _adaptive_max_pool(node: Any, inputs: Gradients, outputs: Gradients) -> Any:
    (gradient,) = (g for g in outputs[:1] if g is not None)
    read = node._saved_self
    backward = (
        _aten._adaptive_avg_pool2d_backward
        if "2D" in type(node).__name__
        else _aten._adaptive_avg_pool3d_backward
    )
    return [backward(gradient, read)]


def _max_over(node: Any, inputs: Gradients, outputs: Gradients) -> Sequence[Tensor | None]:
    (gradient,) = (g for g in outputs[:1] if g is not None)
    if inputs[0] is None:
        return [None]
    rank = inputs[0].ndim
    dims = getattr(node, "_saved_dim", ())
    dims = [dims] if isinstance(dims, int) else dims
    dims = [signed(dim) for dim in dims] or list(range(rank))
    if not getattr(node, "_saved_keepdim", False):
        for dim in sorted(d % rank for d in dims):
            gradient = gradient.unsqueeze(dim)
    return [gradient]


def _batch_norm(node: Any, inputs: Gradients, outputs: Gradients) -> Sequence[Tensor | None] | None:
    (gradient,) = (g for g in outputs[:1] if g is not None)
    if not getattr(node, "_saved_training", True):
        return None
    weight = node._saved_weight
    if weight is not None:
        gradient = gradient * weight.abs().reshape(1, -1, *[1] * (gradient.ndim - 2))
    others = [dim for dim in range(gradient.ndim) if dim != 1]
    return [gradient + gradient.mean(others, keepdim=True)]


def _layer_norm(node: Any, inputs: Gradients, outputs: Gradients) -> Sequence[Tensor | None]:
    (gradient,) = (g for g in outputs[:1] if g is not None)
    if node._saved_weight is not None:
        gradient = gradient * node._saved_weight.abs()
    dims = list(range(-len(node._saved_normalized_shape), 0))
    return [gradient + gradient.mean(dims, keepdim=True)]


def _group_norm(node: Any, inputs: Gradients, outputs: Gradients) -> Sequence[Tensor | None]:
    (gradient,) = (g for g in outputs[:1] if g is not None)
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
                "ClampMin", "ClampMax", "Hardshrink", "Softshrink", "RreluWithNoise", "Abs", "Sgn",
                "Sign", "Round", "Floor", "Ceil", "Trunc",
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
