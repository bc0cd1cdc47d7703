"""Which dtypes take part when a model is called; the coarsest of them decides the tolerance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ensembles.handling.members import named_modules_of
from ensembles.subject import Model
from ensembles.tolerance import unit_of

__all__ = ["autocasts", "dtypes_of"]


def dtypes_of(model: Model, *given: Any) -> set[torch.dtype]:
    """The floating dtypes of parameters, of tensors such as inputs and outputs, and of autocast.

    Buffers and 8-bit parameters are left out: they may be stored more coarsely than computed with.

    Args:
        model: One module, or the members as a list or dict of modules.
        given: Tensors or containers of tensors, and other dtypes that took part.

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

    It sees models that enter `torch.autocast`. It does not see a function that casts by itself.

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

    # Neither a hook nor a mode is used, because PyTorch may choose other kernels for them.
    with mock.patch.object(torch.autocast, "__enter__", entered):
        yield seen
