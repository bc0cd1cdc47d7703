"""What a call writes into the batch that it is given, and the module that does."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils import _pytree as pytree

from ensembles.case import Case
from ensembles.handling.training import fresh
from ensembles.instruments.distances import distance

__all__ = ["Write", "Writes"]


class Write(NamedTuple):
    """A tensor of the batch that is not what it was.

    Attributes:
        place: Where in the batch: "batch", "batch[0]", "batch['mask']".
        by: The greatest difference.
        module: The innermost module that wrote first, with its type; "" where none is known.
    """

    place: str
    by: float
    module: str


class Writes:
    """While it is entered, calls on its `batch` are watched; `found` tells what they changed.

    `batch` is a copy of the batch of the case, for its model to be called with.

    Example:
        >>> net = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 1))
        >>> with Writes(Case.of(net, -torch.ones(3, 2))) as writes:
        ...     _ = net(writes.batch)
        >>> writes.found()
        [Write(place='batch', by=1.0, module='0 (ReLU)')]
    """

    def __init__(self, case: Case) -> None:
        self.batch = fresh(case.batch)
        self._before = fresh(case.batch)
        self._held = [x for x in pytree.tree_leaves(self.batch) if isinstance(x, Tensor)]
        self._names = _names(case)
        self._entered: list[list[int]] = []
        self._writers: dict[int, str] = {}

    def __enter__(self) -> Writes:
        self._hooks = [
            register_module_forward_pre_hook(self._enters),
            register_module_forward_hook(self._leaves, always_call=True),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enters(self, module: nn.Module, args: Any) -> None:
        self._entered.append([x._version for x in self._held])

    def _leaves(self, module: nn.Module, args: Any, output: Any) -> None:
        for tensor, version in zip(self._held, self._entered.pop(), strict=True):
            if tensor._version != version:  # inner modules leave first
                name = self._names.get(id(module), "")
                said = f"{name} ({type(module).__name__})" if name else type(module).__name__
                self._writers.setdefault(id(tensor), said)

    def found(self) -> list[Write]:
        """Tensors of the batch whose values have changed."""
        before, _ = pytree.tree_flatten_with_path(self._before)
        now = pytree.tree_leaves(self.batch)
        return [
            Write(f"batch{pytree.keystr(path)}", by, self._writers.get(id(tensor), ""))
            for (path, old), tensor in zip(before, now, strict=True)
            if isinstance(old, Tensor) and (by := distance(old, tensor))
        ]


def _names(case: Case) -> dict[int, str]:
    found: dict[int, str] = {}
    for member, module in case.modules.items():
        prefix = [] if case.is_one_module else [member]
        for name, inner in module.named_modules():
            found.setdefault(id(inner), ".".join([*prefix, *([name] if name else [])]))
    return found
