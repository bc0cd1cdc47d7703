"""Averages of weights (EMA, SWA) that predict with BatchNorm statistics of other weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ensembles.probes.disorders import Disorder
from ensembles.probes.registers import registered
from ensembles.probes.steps import distance
from ensembles.subject import Model, named_modules_of

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
        >>> [found.detail for found in averages.findings()]
        ['its weights are averaged, its statistics stay as they were']
    """

    def __init__(self, model: Model, used: set[int]) -> None:
        self.model, self.entries = model, registered(model)
        self.names = {id(e.tensor): e.names[0] for e in self.entries}
        self.norms: dict[int, Any] = {
            id(norm): norm
            for given in named_modules_of(model).values()
            for norm in given.modules()
            if isinstance(norm, _NormBase)
            and id(norm) in used
            and isinstance(norm.weight, nn.Parameter)
            and isinstance(norm.running_mean, Tensor)
        }
        self.start = self._values()
        self.trained: set[str] = set()

    def moved(self, with_gradient: set[str]) -> None:
        """Tells which parameters a step had a gradient for."""
        self.trained |= with_gradient

    def findings(self) -> Iterator[Disorder]:
        """Called after the last step."""
        after = self._values()
        for norm in self.norms.values():
            name, weight = self._name(norm), self.names[id(norm.weight)]
            if weight in self.trained or not distance(self.start[weight], after[weight]):
                continue
            statistics = self._statistics(norm)
            if all(torch.equal(self.start[s], after[s]) for s in statistics):
                detail = "its weights are averaged, its statistics stay as they were"
                yield Disorder("averaged norm", name, detail)
            elif source := self._source(norm, after):
                detail = f"its weights are averaged, its statistics are those of {source}"
                yield Disorder("averaged norm", name, detail)
        for module in named_modules_of(self.model).values():
            module.eval()
        evaluated = self._values()
        for norm in self.norms.values():
            weight = self.names[id(norm.weight)]
            same = all(torch.equal(after[s], evaluated[s]) for s in self._statistics(norm))
            if same and distance(after[weight], evaluated[weight]):
                detail = "eval() changes its weights, and leaves its statistics"
                yield Disorder("averaged norm", self._name(norm), detail)

    def _values(self) -> dict[str, Tensor]:
        return {e.names[0]: e.tensor.detach().clone() for e in self.entries}

    def _name(self, norm: Any) -> str:
        return self.names[id(norm.weight)].removesuffix("weight").removesuffix(".") or "model"

    def _statistics(self, norm: Any) -> list[str]:
        return [self.names[id(norm.running_mean)], self.names[id(norm.running_var)]]

    def _source(self, norm: Any, now: Mapping[str, Tensor]) -> str:
        """The norm whose statistics these are, with weights of its own."""
        for given in named_modules_of(self.model).values():
            for other in given.modules():
                if (
                    other is not norm
                    and isinstance(other, _NormBase)
                    and isinstance(other.weight, nn.Parameter)
                    and isinstance(other.running_mean, Tensor)
                    and distance(norm.weight, other.weight)
                    and all(
                        torch.equal(now[mine], now[its])
                        for mine, its in zip(
                            self._statistics(norm), self._statistics(other), strict=True
                        )
                    )
                ):
                    return self._name(other)
        return ""
