"""Which operation is the first whose result differs between two runs.

A recorded run tells modules apart, and a module may compute much in its forward. Every operation
that PyTorch dispatches is written down here, also those of backward passes, losses and optimizers,
with a digest of what it returns and the name of the function that called it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ensembles.instruments.recording import digest

__all__ = ["CallLog", "first_unlike"]

OURS = tuple(
    f"ensembles.{room}."
    for room in ("case", "checks", "gate", "handling", "instruments", "subject", "user_calls")
)
"""Code that looks; what `ensembles.models` does is looked at."""

Call = tuple[str, str]
"""The name of the operation with its caller, and the digest of what it returned."""


class CallLog(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, every operation on tensors is written down, except for those of the checks.

    Example:
        >>> with CallLog() as log:
        ...     y = nn.functional.relu(torch.ones(2))  # as PyTorch's own layers call it
        >>> [name for name, _ in log.calls]
        ['aten::relu']
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would wrap every call to keep the compiler off, and be the caller of each.
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        caller = _caller(sys._getframe(1))
        # Tensors on the meta device, and those of transforms, have no bits to read.
        with suppress(Exception):
            digests = [digest(y) for y in pytree.tree_leaves(result) if isinstance(y, Tensor)]
            # What is in new memory by chance is no result.
            if digests and caller is not None and "empty" not in func._schema.name:
                self.calls.append((func._schema.name + caller, " ".join(digests)))
        return result


def first_unlike(one: Sequence[Call], two: Sequence[Call]) -> str:
    """The first call that is another in the second run, or returns something else; "" for none.

    Example:
        >>> first_unlike([("aten::rand", "a1"), ("aten::add", "b2")],
        ...              [("aten::rand", "a1"), ("aten::add", "c3")])
        'aten::add'
    """
    for (name, found), (other, there) in zip(one, two, strict=False):
        if name != other:
            return f"{name} (in the second run {other})"
        if found != there:
            return name
    return ""


def _caller(frame: FrameType | None) -> str | None:
    """The innermost function that is not PyTorch's; None where it is one of a check."""
    by_pytorch = False
    while frame is not None:
        module = f"{frame.f_globals.get('__name__', '')}."
        if module.startswith(OURS):
            # They call modules, backward passes and optimizers of PyTorch, which do the rest.
            return "" if by_pytorch else None
        if not module.startswith("torch."):
            return f" in {frame.f_code.co_qualname.rpartition('<locals>.')[2]}"
        by_pytorch = by_pytorch or not module.startswith("torch.utils._python_dispatch.")
        frame = frame.f_back
    return ""
