"""Averages of weights (EMA, SWA) that predict with BatchNorm statistics of other weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ensembles.findings import Finding
from ensembles.handling.members import named_modules_of
from ensembles.handling.registered_tensors import registered
from ensembles.handling.state import copy_of
from ensembles.instruments.distances import distance
from ensembles.subject import Model

__all__ = ["Averages"]


class Averages:
    """Norms that predict with averaged weights, and with statistics of other weights.

    A norm's weight that moves in training, or when eval() is called, without a gradient is an
    average. Its statistics are to be averaged too, or to be taken with it.

    Args:
        model: One module, or the members as a list or dict of modules.
        used: The ids of modules that a call in eval mode uses.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> averages = Averages(norm, {id(norm)})
        >>> _ = norm.weight.data.add_(1.0)
        >>> [found.found for found in averages.findings()]
        ['its weights are averaged, but its statistics stay as they were']
    """

    def __init__(self, model: Model, used: set[int]) -> None:
        self.model, self.entries = model, registered(model)
        self.names = {id(e.tensor): e.names[0] for e in self.entries}
        self.norms: dict[int, Any] = {
            id(norm): norm for norm in self._all_norms() if id(norm) in used
        }
        self.start = self._values()
        self.trained: set[str] = set()
        self.past: list[dict[str, Tensor]] = []

    def moved(self, with_gradient: set[str]) -> None:
        """Tells which parameters a step had a gradient for; called after every step."""
        self.trained |= with_gradient
        if self.norms:
            held = [t for norm in self._all_norms() for t in (norm.weight, *_statistics(norm))]
            self.past.append({self.names[id(t)]: t.detach().clone() for t in held})

    def findings(self) -> Iterator[Finding]:
        """Called after the last step."""
        after = self._values()
        for norm in self.norms.values():
            weight, found = self.names[id(norm.weight)], ""
            if weight in self.trained or not distance(self.start[weight], after[weight]):
                continue
            statistics = self._statistics(norm)
            if all(torch.equal(self.start[s], after[s]) for s in statistics):
                found = "stay as they were"
            elif source := self._source(norm):
                found = f"are those of {source}"
            if found:
                found = f"its weights are averaged, but its statistics {found}"
                yield Finding(kind="averaged norm", place=self._name(norm), found=found)
        for module in named_modules_of(self.model).values():
            module.eval()
        evaluated = self._values()
        for norm in self.norms.values():
            weight = self.names[id(norm.weight)]
            same = all(torch.equal(after[s], evaluated[s]) for s in self._statistics(norm))
            if same and distance(after[weight], evaluated[weight]):
                found = "eval() changes its weights, but not its statistics"
                yield Finding(kind="averaged norm", place=self._name(norm), found=found)

    def _values(self) -> dict[str, Tensor]:
        return {e.names[0]: copy_of(e.tensor) for e in self.entries}

    def _name(self, norm: Any) -> str:
        return self.names[id(norm.weight)].removesuffix("weight").removesuffix(".") or "model"

    def _statistics(self, norm: Any) -> list[str]:
        return [self.names[id(tensor)] for tensor in _statistics(norm)]

    def _all_norms(self) -> Iterator[Any]:
        for given in named_modules_of(self.model).values():
            for norm in given.modules():
                if (
                    isinstance(norm, _NormBase)
                    and isinstance(norm.weight, nn.Parameter)
                    and isinstance(norm.running_mean, Tensor)
                ):
                    yield norm

    def _source(self, norm: Any) -> str:
        """The norm whose statistics these are, or were after a step, with weights of its own."""
        for other in self._all_norms():
            pairs = list(zip(_statistics(norm), self._statistics(other), strict=True))
            copied = [
                distance(norm.weight, then[self.names[id(other.weight)]]) > 0
                for then in self.past
                if other is not norm and all(torch.equal(s, then[name]) for s, name in pairs)
            ]
            if copied and all(copied):  # else it was copied as a whole
                return self._name(other)
        return ""


def _statistics(norm: Any) -> tuple[Tensor, Tensor]:
    return norm.running_mean, norm.running_var
