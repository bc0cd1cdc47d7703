"""How often calls update running statistics, also those that no counter of a module counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["NormUpdates"]

RUNNING_MEAN = {torch.nn.functional.batch_norm: 1, torch.batch_norm: 3}
"""The place of the running mean among the arguments."""


class NormUpdates(TorchFunctionMode):
    """Counts, while it is entered, the calls of batch_norm in training mode on running means.

    A slice counts for its own elements: two norms may keep their statistics in one buffer, and
    two widths of a slimmable network must not keep theirs in the same part of it (Yu et al. 2019,
    "Slimmable neural networks").

    Args:
        means: Running means by name.

    Example:
        >>> mean = torch.zeros(4)
        >>> with NormUpdates({"mean": mean}) as updates:
        ...     for width in (2, 4):
        ...         _ = nn.functional.batch_norm(
        ...             torch.randn(3, width), mean[:width], torch.ones(width), training=True)
        >>> updates.most("mean")
        2
    """

    def __init__(self, means: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._means = dict(means)
        self._counts = {
            storage._cdata: torch.zeros(storage.nbytes() // mean.element_size())
            for mean in means.values()
            for storage in (mean.untyped_storage(),)
        }

    def most(self, name: str) -> int:
        """How often the element of this running mean that is updated most often is."""
        return int(self._part_of(self._means[name]).max())

    def _part_of(self, mean: Tensor) -> Tensor:
        counts = self._counts[mean.untyped_storage()._cdata]
        return counts.as_strided(mean.shape, mean.stride(), mean.storage_offset())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Looks at the running mean, and calls."""
        given = kwargs or {}
        place = RUNNING_MEAN.get(func)
        if place is not None:
            mean = given.get("running_mean", args[place] if len(args) > place else None)
            training = given.get("training", args[5] if len(args) > 5 else False)
            if training and mean is not None and _memory_of(mean) in self._counts:
                self._part_of(mean).add_(1)
        return func(*args, **given)


def _memory_of(tensor: Tensor) -> int | None:
    """Where a tensor is; None under vmap, whose tensors are nowhere."""
    try:
        memory: int = tensor.untyped_storage()._cdata
    except NotImplementedError:
        return None
    return memory
