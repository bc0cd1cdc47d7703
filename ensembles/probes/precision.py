"""Which dtypes take part when a model is called, and how to call it in float32 instead.

A tolerance is that of the coarsest dtype. What reaches what, which is seen by gradients that are
zero or not, has no tolerance: sums of float16 underflow, and those of bfloat16 cancel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ensembles.subject import Model, named_modules_of
from ensembles.tolerance import unit_of

__all__ = ["autocasts", "dtypes_of", "is_narrow", "widened"]


def dtypes_of(model: Model, *given: Any) -> set[torch.dtype]:
    """The floating dtypes of parameters, of tensors such as inputs and outputs, and of autocast.

    Buffers are left out, and parameters of 8 bits: they may be kept in less than what computes.

    Args:
        model: One module, or the members as a list or dict of modules.
        given: Tensors, or what holds some; dtypes that took part besides.

    Example:
        >>> found = dtypes_of(torch.nn.Linear(2, 2), {"x": torch.ones(1).half()}, torch.float64)
        >>> sorted(map(str, found))
        ['torch.float16', 'torch.float32', 'torch.float64']
    """
    parameters = [p for module in named_modules_of(model).values() for p in module.parameters()]
    leaves = [*(p for p in parameters if p.itemsize > 1), *pytree.tree_leaves(given)]
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    dtypes = {x.dtype for x in tensors} | {x for x in leaves if isinstance(x, torch.dtype)}
    dtypes |= {
        torch.get_autocast_dtype(device)
        for device in {x.device.type for x in tensors}
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    }
    return {dtype for dtype in dtypes if unit_of(dtype)}


@contextmanager
def autocasts() -> Iterator[set[torch.dtype]]:
    """The dtypes that models cast to while this is open, also where they cast outputs back.

    What enters `torch.autocast` is seen; what a function casts by hand is not.

    Example:
        >>> with autocasts() as seen, torch.autocast("cpu", torch.bfloat16):
        ...     pass
        >>> seen
        {torch.bfloat16}
    """
    seen: set[torch.dtype] = set()
    enter: Any = torch.autocast.__enter__

    def entered(self: Any) -> Any:
        result = enter(self)
        if torch.is_autocast_enabled(self.device):
            seen.add(torch.get_autocast_dtype(self.device))
        return result

    # No hook and no mode, because in their presence other kernels may be taken.
    with mock.patch.object(torch.autocast, "__enter__", entered):
        yield seen


def is_narrow(x: Any) -> bool:
    """Whether this is a tensor of a floating type that is narrower than float32.

    Example:
        >>> is_narrow(torch.ones(1).half()), is_narrow(torch.ones(1)), is_narrow("text")
        (True, False, False)
    """
    if not isinstance(x, Tensor) or type(x.data) is not Tensor:  # a subclass knows best
        return False
    return x.is_floating_point() and x.itemsize == 2 and x.layout is torch.strided


@contextmanager
def widened(model: Model) -> Iterator[None]:
    """Inside, what is registered in 16 bits is in float32, and nothing enters autocast.

    `ensembles.probes.state.preserved`, around this, gives tensors their own memory back.

    Args:
        model: One module, or the members as a list or dict of modules.

    Example:
        >>> from ensembles.probes.state import preserved
        >>> net = torch.nn.Linear(2, 2).half()
        >>> with preserved(net), widened(net), torch.autocast("cpu", torch.bfloat16):
        ...     print(net(torch.ones(1, 2)).dtype)
        torch.float32
        >>> net.weight.dtype
        torch.float16
    """
    with torch.no_grad():
        for module in named_modules_of(model).values():
            for tensor in (*module.parameters(), *module.buffers()):
                if is_narrow(tensor):
                    tensor.data = tensor.data.float()
    enter: Any = torch.autocast.__enter__

    def entered(self: Any) -> Any:
        with mock.patch.object(self, "_enabled", False):
            return enter(self)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.autocast, "__enter__", entered))
        for device in ("cpu", "cuda"):  # what is entered already is left for as long as this
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
