"""What a tensor holds: memory of its own, or other tensors.

A `DTensor`, a quantized weight or a nested tensor is a shell around other tensors. The address of
the shell is 0, and reading there ends the process. Two shells share what their inner tensors share.
A sparse tensor holds its indices and values. PyTorch does not show the memory of a oneDNN tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "as_kind_of",
    "checked_present",
    "inner_tensors",
    "is_shell",
    "memory_in",
    "numbers_in",
    "told_type",
]

REAL = "Build it on a real device."

SPARSE: dict[torch.layout, Callable[[Tensor], tuple[Tensor, ...]]] = {
    torch.sparse_coo: lambda x: (x._indices(), x._values()),
    **dict.fromkeys(
        (torch.sparse_csr, torch.sparse_bsr),
        lambda x: (x.crow_indices(), x.col_indices(), x.values()),
    ),
    **dict.fromkeys(
        (torch.sparse_csc, torch.sparse_bsc),
        lambda x: (x.ccol_indices(), x.row_indices(), x.values()),
    ),
}


def inner_tensors(tensor: Tensor, place: str = "a tensor") -> tuple[Tensor, ...]:
    """The tensors that a tensor is made of; none if it has memory of its own.

    Args:
        tensor: A tensor of any class and layout.
        place: What an error calls it.

    Raises:
        ValueError: If it has no memory, and does not show what it is made of.

    Example:
        >>> len(inner_tensors(torch.ones(2))), len(inner_tensors(torch.eye(2).to_sparse()))
        (0, 2)
    """
    if tensor.layout is torch.strided and not tensor.is_nested and _has_memory(tensor, place):
        return ()
    found: tuple[Tensor, ...] = ()
    try:
        if hasattr(type(tensor), "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
            values = [getattr(tensor, name) for name in names]
            found = tuple(value for value in values if isinstance(value, Tensor))
        elif tensor.is_nested:
            found = (tensor.detach().values(),)
        elif tensor.layout in SPARSE:
            found = SPARSE[tensor.layout](tensor.detach())
    except Exception as error:
        raise ValueError(
            f"{place} is of type {told_type(tensor)}, and its inner tensors cannot be read: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not found:
        raise ValueError(
            f"{place} is of type {told_type(tensor)}, and PyTorch does not show its memory. Check "
            "the model before it gets such tensors, or make them dense."
        )
    return found


def memory_in(tensor: Tensor, place: str = "a tensor") -> Iterator[Tensor]:
    """The strided tensors that hold a tensor's memory: itself, or those that it is made of.

    Args:
        tensor: A tensor of any class and layout.
        place: What an error calls it.

    Raises:
        ValueError: As `inner_tensors`.

    Example:
        >>> weight = torch.ones(2)
        >>> [part is weight for part in memory_in(weight)]
        [True]
    """
    inner = inner_tensors(tensor, place)
    for part in inner:
        yield from memory_in(part, place)
    if not inner:
        yield tensor


def numbers_in(tensor: Tensor, place: str = "a tensor") -> Tensor:
    """A dense tensor with a tensor's numbers, without its history.

    For a shell around several tensors, the numbers of all of them are joined into one row.

    Args:
        tensor: A tensor of any class and layout.
        place: What an error calls it.

    Raises:
        ValueError: As `inner_tensors`, and if it is on the meta device or a fake tensor.

    Example:
        >>> numbers_in(torch.eye(2).to_sparse())
        tensor([[1., 0.],
                [0., 1.]])
    """
    inner = inner_tensors(tensor, place) if is_shell(tensor) else ()
    if inner:
        parts = [numbers_in(part, place) for part in inner]
        return parts[0] if len(parts) == 1 else torch.cat([part.flatten() for part in parts])
    values = tensor.detach()
    values = values.dequantize() if values.is_quantized else values
    values = values if values.layout is torch.strided else values.to_dense()
    checked_present(values, place)
    if values.is_meta:
        raise ValueError(f"{place} is on the meta device, and has no numbers. {REAL}")
    return values


def checked_present(tensor: Tensor, place: str = "a tensor") -> None:
    """Refuses a tensor that cannot be read: its storage was freed, or it is a fake tensor.

    Args:
        tensor: A tensor of any class and layout. One on the meta device is accepted, because it is
            never read.
        place: What the error calls it.

    Raises:
        ValueError: If reading its numbers could end the process.

    Example:
        >>> weight = torch.ones(2)
        >>> _ = weight.untyped_storage().resize_(0)
        >>> checked_present(weight, "weight")
        Traceback (most recent call last):
        ValueError: weight has no memory at present: ...
    """
    if tensor.layout is not torch.strided or tensor.is_meta:
        return
    if not is_shell(tensor):
        inner_tensors(tensor, place)
    elif tensor.untyped_storage().device.type == "meta":
        raise ValueError(f"{place} is of type {told_type(tensor)}, and has no numbers. {REAL}")
    elif hasattr(type(tensor), "__tensor_flatten__"):
        for part in inner_tensors(tensor, place):
            checked_present(part, place)


def as_kind_of(values: Tensor, tensor: Tensor) -> Tensor:
    """Plain values in the precision, on the device and in the placement of another tensor.

    A `DTensor` computes only with another `DTensor`.

    Example:
        >>> as_kind_of(torch.ones(2), torch.zeros(2, dtype=torch.float64))
        tensor([1., 1.], dtype=torch.float64)
    """
    mesh = getattr(tensor, "device_mesh", None)
    moved = values.to(dtype=tensor.dtype, device=tensor.device)
    if mesh is None:
        return moved
    from torch.distributed.tensor import Replicate, distribute_tensor

    placed: Any = tensor
    partly = [Replicate() if where.is_partial() else where for where in placed.placements]
    return distribute_tensor(moved, mesh, partly)


def is_shell(tensor: Tensor) -> bool:
    """Whether it is of a class that computes with tensors inside, or a nested tensor.

    Example:
        >>> is_shell(torch.ones(2)), is_shell(nn.Parameter(torch.ones(2)))
        (False, False)
    """
    own = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return own or tensor.is_nested


def told_type(tensor: Tensor) -> str:
    """The class of a tensor, and its layout where that is not the usual one.

    Example:
        >>> told_type(torch.eye(2).to_sparse())
        'Tensor of layout torch.sparse_coo'
    """
    kind = type(tensor).__name__
    return kind if tensor.layout is torch.strided else f"{kind} of layout {tensor.layout}"


def _has_memory(tensor: Tensor, place: str) -> bool:
    """Whether it may be read; a storage that was freed is refused."""
    try:
        storage = tensor.untyped_storage()
        if storage.device.type == "meta" or not tensor.numel():
            return True
        there = bool(storage.data_ptr()) or not storage.nbytes()
    except (NotImplementedError, RuntimeError):  # of a shell, and under vmap
        return False
    dims = zip(tensor.shape, tensor.stride(), strict=True)
    last = int(tensor.storage_offset()) + sum((size - 1) * stride for size, stride in dims)
    if there and (last + 1) * tensor.element_size() > storage.nbytes():
        raise ValueError(
            f"{place} has no memory at present: its storage of {storage.nbytes():,} bytes is too "
            "small for its elements. FSDP frees what it has sharded: check the model before that."
        )
    return there
