"""How many FLOPs an operation of PyTorch takes, and how many of them multiply by a zero.

A multiply-add is two FLOPs; only products of matrices and convolutions are counted, as
`torch.utils.flop_counter` does, whose formulas are used. Own here is what it counts too high (the
weight gradient of a grouped convolution, by the factor `groups`) or as nothing (products with a
vector, recurrent layers that run as one kernel, and, before PyTorch 2.15, fused attention on a
CPU).

A convolution multiplies every tap at every output position, those on the padding too. They are
work, as `torch.utils.flop_counter` has it, and waste only where their channel is zero everywhere:
what a subnet of half the channels would not compute is exactly three quarters, padded or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.flop_counter import flop_registry

__all__ = ["UNCOUNTED", "flops_of", "kind_of", "useful_flops_of"]

_aten = torch.ops.aten


def _packets(*names: str) -> tuple[Any, ...]:
    """The operations of these names that this version of PyTorch has."""
    return tuple(getattr(_aten, name) for name in names if hasattr(_aten, name))


_CONVOLUTIONS = _packets("convolution", "_convolution", "convolution_overrideable")
_RECURRENT = _packets("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn")
_RECURRENT_BACKWARD = _packets(
    "mkldnn_rnn_layer_backward", "_cudnn_rnn_backward", "miopen_rnn_backward"
)
_ATTENTION = _packets(
    *(f"_scaled_dot_product_{kernel}_attention" for kernel in ("flash", "efficient", "cudnn")),
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
)
_ATTENTION_BACKWARD = _packets(*(f"{packet.__name__}_backward" for packet in _ATTENTION))
UNCOUNTED = frozenset(
    _packets("_trilinear", "_native_multi_head_attention", "_transformer_encoder_layer_fwd")
)
"""Operations that multiply, and for which there is no formula."""


# --- FLOPs --------------------------------------------------------------------------------------


def flops_of(packet: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int | None:
    """The FLOPs of one operation; None where it multiplies no matrices.

    Args:
        packet: The operation, such as `torch.ops.aten.mm`.
        args: What it was called with.
        kwargs: The same, by name.
        out: What it returned.

    Example:
        >>> a, b = torch.ones(2, 3), torch.ones(3, 4)
        >>> flops_of(torch.ops.aten.mm, (a, b), {}, a @ b)
        48
    """
    own = _OWN.get(packet)
    if own is not None:
        return own(*args, **kwargs)
    formula = flop_registry.get(packet)
    return None if formula is None else int(formula(*args, **kwargs, out_val=out))


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, _bias: Any, *geometry: Any
) -> int:
    # Both gradients pair the same numbers as the product itself: every weight with every position
    # of the side that the stride does not refine.
    transposed, wanted = geometry[3], geometry[6]
    coarse = x if transposed else grad
    products = coarse.shape[0] * prod(coarse.shape[2:]) * weight.numel()
    return 2 * products * (int(wanted[0]) + int(wanted[1]))


def _vector(matrix: Tensor, *_: Any) -> int:
    return 2 * matrix.numel()


def _recurrent(x: Tensor, *rest: Any) -> int:
    """Every weight matrix is used once at every step of every sequence."""
    weights = [t for group in rest[:4] for t in (group if isinstance(group, list) else [group])]
    used = sum(w.numel() for w in weights if isinstance(w, Tensor) and w.ndim == 2)
    return 2 * (x.numel() // x.shape[-1]) * used


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Scores, and their product with the values; masked ones too."""
    return 2 * _pairs_of(query, key) * (query.shape[-1] + value.shape[-1])


def _attention_backward(
    _grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    """The scores again, the gradients of query and key, and those of probabilities and values."""
    return 2 * _pairs_of(query, key) * (3 * query.shape[-1] + 2 * value.shape[-1])


def _pairs_of(query: Tensor, key: Tensor) -> int:
    # Keys and values may have fewer heads, each read by several of the query's.
    return query.numel() // query.shape[-1] * key.shape[-2]


_OWN: dict[Any, Callable[..., int]] = {
    _aten.convolution_backward: _convolution_backward,
    _aten.mv: _vector,
    _aten.dot: _vector,
    _aten.vdot: _vector,
    _aten.addmv: lambda _bias, matrix, *_: _vector(matrix),
    **dict.fromkeys(_RECURRENT, _recurrent),
    **dict.fromkeys(_RECURRENT_BACKWARD, lambda *args: 2 * _recurrent(*args)),
    **dict.fromkeys(_ATTENTION, _attention),
    **dict.fromkeys(_ATTENTION_BACKWARD, _attention_backward),
}


def kind_of(packet: Any) -> str:
    """What an operation is called in tables.

    Example:
        >>> kind_of(torch.ops.aten.addmm), kind_of(torch.ops.aten.convolution_backward)
        ('product', 'convolution')
    """
    name = packet.__name__
    return next((kind for word, kind in _KINDS.items() if word in name), "product")


_KINDS = {
    "conv": "convolution",
    "attention": "attention",
    "rnn": "recurrence",
    "bmm": "batched product",
}


# --- FLOPs without zeros ------------------------------------------------------------------------


def useful_flops_of(packet: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int | None:
    """The FLOPs of one operation whose two factors are both not zero; None where all are.

    Args:
        packet: The operation.
        args: What it was called with: tensors that hold numbers.
        kwargs: The same, by name.

    Example:
        >>> a, b = torch.tensor([[1.0, 0.0]]), torch.ones(2, 4)
        >>> useful_flops_of(torch.ops.aten.mm, (a, b), {})
        8
    """
    if packet in _ATTENTION or packet in _ATTENTION_BACKWARD:
        names = [argument.name for argument in packet.default._schema.arguments]
        return 2 * _attended(**(dict(zip(names, args, strict=False)) | kwargs))
    rule = _USEFUL.get(packet)
    if rule is None or not any(
        isinstance(x, Tensor) and x.numel() and int(x.count_nonzero()) < x.numel() for x in args[:3]
    ):
        return None
    return 2 * rule(*args)


def _matrices(a: Tensor, b: Tensor, *_: Any) -> int:
    """(..., m, k) times (..., k, n): each column of `a` meets the row of `b` of the same index."""
    return int(((a != 0).sum(-2) * (b != 0).sum(-1)).sum())


def _matrix_and_vector(a: Tensor, b: Tensor, *_: Any) -> int:
    return int(((a != 0) & (b != 0)).sum())


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    scale: float | None = None,
    grad_out: Tensor | None = None,
    grad_out_: Tensor | None = None,
    **_: Any,
) -> int:
    """Attention as its plain products, in which a masked probability is a zero.

    What dropout would draw is left out.
    """
    heads = query.shape[-3]
    key, value = (x.repeat_interleave(heads // x.shape[-3], dim=-3) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(scores.new_ones(scores.shape[-2:]).tril() == 0, -torch.inf)
    mask = attn_bias if attn_mask is None else attn_mask
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    # A row in which everything is masked attends to nothing.
    attends = scores.softmax(-1).nan_to_num(0.0)
    grad = grad_out if grad_out_ is None else grad_out_
    if grad is None:
        return _matrices(query, key.mT) + _matrices(attends, value)
    of_attends = grad @ value.mT
    of_scores = attends * (of_attends - (attends * of_attends).sum(-1, keepdim=True))
    return (
        _matrices(query, key.mT)
        + _matrices(grad, value.mT)
        + _matrices(attends.mT, grad)
        + _matrices(of_scores, key)
        + _matrices(of_scores.mT, query)
    )


def _forward(x: Tensor, weight: Tensor, _bias: Any, *geometry: Any) -> int:
    transposed = geometry[3]
    return _spread(x, weight) if transposed else _windows(x, weight, x.shape, *geometry)


def _backward(grad: Tensor, x: Tensor, weight: Tensor, _bias: Any, *geometry: Any) -> int:
    transposed, wanted = geometry[3], geometry[6]
    useful = 0
    if wanted[0]:
        useful += (
            _windows(grad, weight, x.shape, *geometry) if transposed else _spread(grad, weight)
        )
    if wanted[1]:
        coarse, fine = (x, grad) if transposed else (grad, x)
        useful += _pairs(coarse, fine, weight, *geometry)
    return useful


def _spread(coarse: Tensor, weight: Tensor) -> int:
    """Every element of the coarse side meets every weight that its channel is the first axis of."""
    elements = (coarse != 0).sum([d for d in range(coarse.ndim) if d != 1])
    return int((elements * (weight != 0).flatten(1).sum(1)).sum())


def _windows(fine: Tensor, weight: Tensor, read: Sequence[int], *geometry: Any) -> int:
    """Every weight meets its tap of each window of the fine side."""
    groups = geometry[5]
    rows = (weight != 0).reshape(groups, -1, *weight.shape[1:])
    users = rows.sum(1).flatten(0, 1).flatten(1)  # (channel, tap)
    coarse = _coarse(fine, weight, read, geometry)
    taps = _taps(fine, weight, coarse, 1, *geometry)
    return sum(
        int((seen.flatten(2).sum((0, 2)) * readers).sum())
        for seen, readers in zip(taps, users.unbind(1), strict=True)
    )


def _pairs(coarse: Tensor, fine: Tensor, weight: Tensor, *geometry: Any) -> int:
    """Every element of the coarse side meets every element of its window on the fine side."""
    groups = geometry[5]
    left = _added_up(coarse != 0, coarse.shape[1] // groups)
    channels = fine.shape[1] // groups
    taps = _taps(fine, weight, coarse.shape[2:], channels, *geometry)
    return sum(int((left * seen).sum()) for seen in taps)


def _coarse(
    fine: Tensor, weight: Tensor, read: Sequence[int], geometry: Sequence[Any]
) -> list[int]:
    stride, padding, dilation, transposed = geometry[:4]
    if transposed:
        return list(read[2:])
    return [
        (size + 2 * pad - gap * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, gap in zip(
            fine.shape[2:],
            weight.shape[2:],
            *(_each(x, fine.ndim - 2) for x in (stride, padding, dilation)),
            strict=True,
        )
    ]


def _taps(
    fine: Tensor, weight: Tensor, coarse: Sequence[int], together: int, *geometry: Any
) -> Iterator[Tensor]:
    """For every tap of the kernel, how many channels it sees at the coarse positions.

    Args:
        fine: The side with windows.
        weight: Its kernel size counts.
        coarse: The numbers of positions.
        together: So many channels are added up.
        *geometry: Stride, padding, dilation and so on.
    """
    space = fine.ndim - 2
    stride, padding, dilation = (_each(x, space) for x in geometry[:3])
    kernel = weight.shape[2:]
    # A transposed convolution may see beyond its own output: as much as the last window needs.
    needs = [
        (size - 1) * step + gap * (taps - 1) + 1
        for size, step, gap, taps in zip(coarse, stride, dilation, kernel, strict=True)
    ]
    sides = [
        (pad, max(0, need - pad - size))
        for pad, size, need in zip(padding, fine.shape[2:], needs, strict=True)
    ]
    around = [number for side in reversed(sides) for number in side]
    seen = fine != 0
    alive = seen.flatten(2).any(2).reshape(*fine.shape[:2], *[1] * space)
    inside = F.pad(torch.ones_like(seen), around)
    padded = torch.where(inside, F.pad(seen, around), alive)
    padded = _added_up(padded, together)
    for tap in product(*(range(taps) for taps in kernel)):
        index = tuple(
            slice(t * gap, t * gap + (size - 1) * step + 1, step)
            for t, gap, size, step in zip(tap, dilation, coarse, stride, strict=True)
        )
        yield padded[(slice(None), slice(None), *index)]


def _added_up(seen: Tensor, together: int) -> Tensor:
    """How many of so many neighbouring channels are seen."""
    batch, channels, *space = seen.shape
    return seen.reshape(batch, channels // together, together, *space).sum(2)


def _each(numbers: Sequence[int], space: int) -> list[int]:
    """One number for all dimensions of space is allowed to stand alone."""
    return list(numbers) * space if len(numbers) == 1 else list(numbers)


_USEFUL: dict[Any, Callable[..., int]] = {
    _aten.mm: _matrices,
    _aten.bmm: _matrices,
    _aten.addmm: lambda _bias, *factors: _matrices(*factors),
    _aten.baddbmm: lambda _bias, *factors: _matrices(*factors),
    _aten.mv: _matrix_and_vector,
    _aten.dot: _matrix_and_vector,
    _aten.vdot: _matrix_and_vector,
    _aten.addmv: lambda _bias, *factors: _matrix_and_vector(*factors),
    _aten.convolution_backward: _backward,
    **dict.fromkeys(_CONVOLUTIONS, _forward),
}
