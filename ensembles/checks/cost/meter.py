"""Watches a call of a model: its FLOPs, and what it keeps for the backward pass, by layer.

A layer is a module; an operation belongs to the innermost module that is running, and its backward
pass to the module that ran it forward. (Operations of the backward pass are traced by the sequence
numbers that autograd gives to its nodes; what activation checkpointing computes anew belongs to
the module that is run again.)
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ensembles.checks.cost.flops import UNCOUNTED, flops_of, kind_of, useful_flops_of
from ensembles.handling.memory import memory_in
from ensembles.handling.registered_tensors import registered

__all__ = ["Counts", "Kept", "Meter", "Operation"]


class Operation(NamedTuple):
    """A product in the source of a layer, however often the layer is called.

    Attributes:
        layer: Path of the module, with the member in front where there are several.
        kind: "convolution", "product", "batched product", "attention" or "recurrence".
        number: 1 for the first of this kind in a call of the layer, and so on.
    """

    layer: str
    kind: str
    number: int


@dataclass
class Counts:
    """FLOPs of one operation, and how many of them multiply by a zero."""

    forward: int = 0
    backward: int = 0
    wasted: int = 0


class Kept(NamedTuple):
    """A piece of memory that is kept for the backward pass.

    Attributes:
        layer: The first layer that keeps it.
        bytes: Its size.
        of_weights: Whether it was computed from parameters and buffers alone.
        like: Shape and type of the tensor that is kept.
        zeros: Bytes of it that are floating zeros; 0 where nobody looked.
    """

    layer: str
    bytes: int
    of_weights: bool
    like: tuple[Any, ...]
    zeros: int


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while `watching`; give it the roots of the model, by member.

    Args:
        modules: Member name to module; {"model": it} for one.
        batch: What the model will be called with.
        zeros: Whether to look for zeros, too.

    Example:
        >>> layer = nn.Linear(3, 4)
        >>> meter = Meter({"model": layer}, torch.ones(2, 3))
        >>> with meter.watching():
        ...     _ = layer(torch.ones(2, 3))
        >>> meter.counts
        {Operation(layer='', kind='product', number=1): Counts(forward=48, backward=0, wasted=0)}
    """

    supports_higher_order_operators = True

    def __init__(
        self, modules: Mapping[str, nn.Module], batch: Any, *, zeros: bool = False
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.zeros = zeros
        self.paths = _paths(modules)
        self.roots = list(modules.values())
        registers = [entry.tensor for entry in registered(modules)]
        self.own = {_storage(t) for t in registers}
        inputs = [x for x in pytree.tree_leaves(batch) if isinstance(x, Tensor)]
        self.origins: dict[StorageWeakRef | int, int] = {
            **dict.fromkeys(self.own, _WEIGHTS),
            **{_storage(x): _DATA for x in inputs},
        }
        self.backward = False
        self.clear()

    def clear(self) -> None:
        """Forgets what was counted."""
        self.counts: dict[Operation, Counts] = {}
        self.uncounted: dict[str, None] = {}
        self.saved: weakref.WeakSet[_Saved] = weakref.WeakSet()
        self._nodes: dict[int, Operation] = {}
        self._frames = [_Frame("")]
        self._entered = 0

    # --- the layer that is running ---------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches everything that is called inside."""
        hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack), self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if not self.backward and len(self._frames) == 1 and any(module is m for m in self.roots):
            if self._entered == len(self.roots):
                self.clear()  # a probe calls the model again where the first try failed
            self._entered += 1
        path = self.paths.get(module)
        # A module that the model does not list (a template of functional calls) is its caller's.
        self._frames.append(self._frames[-1] if path is None else _Frame(path))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._frames.pop()

    # --- operations ------------------------------------------------------------------------------

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would wrap every call to keep the compiler off, and import it for that: seconds.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "overloadpacket", func)
        known = packet in UNCOUNTED
        if isinstance(func, torch._ops.OpOverload) and not known and func.namespace != "prim":
            # Under inference_mode operations arrive whole that consist of others.
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        flops = flops_of(packet, args, kwargs, out)
        if flops is not None:
            self._count(packet, args, kwargs, flops)
        elif known or isinstance(func, torch._ops.HigherOrderOperator):
            self.uncounted[packet.__name__] = None
        if not self.backward:
            self._trace(args, kwargs, out)
        return out

    def _count(
        self, packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], flops: int
    ) -> None:
        again = len(self._frames) > 1
        node: Any = torch._C._current_autograd_node() if self.backward else None
        if self.backward and node is None and not again:
            return  # a hook of a probe, which computes something of its own
        if self.backward and not again:
            fallback = Operation("", kind_of(packet), 1)
            operation = self._nodes.get(node._sequence_nr(), fallback)
        else:
            operation = self._frames[-1].next(kind_of(packet))
            # The node was made just before: its number is the last that autograd gave.
            self._nodes.setdefault(torch._C._autograd._get_sequence_nr() - 1, operation)
        counts = self.counts.setdefault(operation, Counts())
        if self.backward:
            counts.backward += flops
        else:
            counts.forward += flops
        useful = useful_flops_of(packet, args, kwargs) if self.zeros else None
        if useful is not None:
            counts.wasted += flops - useful

    def _trace(self, args: Any, kwargs: Any, out: Any) -> None:
        """Notes of what comes out whether it was computed from weights alone."""
        read = [
            self.origins.get(_storage(x), _CONSTANT)
            for x in pytree.tree_leaves((args, kwargs))
            if isinstance(x, Tensor)
        ]
        origin = max(read, default=_CONSTANT)
        for x in pytree.tree_leaves(out):
            if isinstance(x, Tensor):
                self.origins[_storage(x)] = origin

    # --- what is kept ----------------------------------------------------------------------------

    def _pack(self, tensor: Tensor) -> _Saved:
        saved = _Saved(self._frames[-1].path, tensor.detach())
        self.saved.add(saved)
        return saved

    def kept(self) -> list[Kept]:
        """What is kept at present, each piece of memory once; the model's own left out."""
        found: dict[StorageWeakRef | int, Kept] = {}
        for saved in sorted(self.saved, key=lambda s: s.order):
            storage = _storage(saved.tensor)
            if storage not in self.own and storage not in found:
                found[storage] = Kept(
                    saved.path,
                    _bytes(saved.tensor),
                    self.origins.get(storage) == _WEIGHTS,
                    (tuple(saved.tensor.shape), saved.tensor.dtype),
                    _zero_bytes(saved.tensor) if self.zeros else 0,
                )
        return list(found.values())


_CONSTANT, _WEIGHTS, _DATA = range(3)
"""What a tensor was computed from: the greatest of what went into it."""


@dataclass
class _Frame:
    """A call of a module that is running."""

    path: str
    numbers: Counter[str] = field(default_factory=Counter)

    def next(self, kind: str) -> Operation:
        self.numbers[kind] += 1
        return Operation(self.path, kind, self.numbers[kind])


class _Saved:
    """Stands in the graph for a saved tensor, and is gone when the graph lets go of it."""

    made = 0

    def __init__(self, path: str, tensor: Tensor) -> None:
        self.path, self.tensor = path, tensor
        _Saved.made += 1
        self.order = _Saved.made


def _unpack(saved: _Saved) -> Tensor:
    return saved.tensor


def _paths(modules: Mapping[str, nn.Module]) -> dict[nn.Module, str]:
    """Every module's first name; a single model's own name is empty."""
    found: dict[nn.Module, str] = {}
    for member, root in modules.items():
        front = "" if list(modules) == ["model"] else member
        for name, module in root.named_modules():
            found.setdefault(module, ".".join(part for part in (front, name) if part))
    return found


def _storage(tensor: Tensor) -> StorageWeakRef | int:
    """What tells pieces of memory apart, on the meta device too; tensors without one are their own.

    While a weak reference is held, no other storage gets the address: PyTorch makes tensors that no
    dispatch mode sees (a number that is written into a slice), and they are of no known origin.
    """
    if tensor.layout is not torch.strided:
        return id(tensor)
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """What holds the memory; nothing where PyTorch does not show it."""
    try:
        return tuple(memory_in(tensor))
    except ValueError:
        return ()


def _bytes(tensor: Tensor) -> int:
    parts = _parts(tensor)
    if not parts:
        return tensor.numel() * tensor.element_size()
    return sum(part.untyped_storage().nbytes() for part in parts)


def _zero_bytes(tensor: Tensor) -> int:
    """Bytes of the tensor's whole memory that hold zeros of a floating type."""
    zeros = 0
    for part in _parts(tensor) if tensor.layout is torch.strided else ():
        if part.is_floating_point():
            memory = torch.empty(0, dtype=part.dtype, device=part.device)
            memory.set_(part.untyped_storage())
            zeros += (memory.numel() - int(memory.count_nonzero())) * memory.element_size()
    return zeros
