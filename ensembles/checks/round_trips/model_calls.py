"""Calls of a model before and after a conversion, in eval and in train mode, and how they differ.

In eval mode neither a lost dropout nor another momentum is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ensembles.case import Case
from ensembles.handling.members import member_outputs
from ensembles.handling.memory import numbers_in
from ensembles.handling.registered_tensors import registered
from ensembles.handling.state import preserved, seed_generators
from ensembles.handling.training import fresh
from ensembles.instruments.distances import distance
from ensembles.subject import whole

__all__ = ["TrainingCall", "difference", "outputs_of", "training_call", "training_difference"]


class TrainingCall(NamedTuple):
    """What a call in train mode gave.

    Attributes:
        outputs: Every tensor.
        buffers: By name, as the call left them.
        others: Names of buffers of another module that the call moved.
    """

    outputs: tuple[Tensor, ...]
    buffers: Mapping[str, Tensor]
    others: tuple[str, ...] = ()


def outputs_of(case: Case, callee: Callable[..., Any]) -> tuple[Tensor, ...]:
    """Every tensor that a module or a function returns for the case's batch, under its seed."""
    module = callee if isinstance(callee, nn.Module) else _Function(callee)
    seed_generators(case.seed)
    with torch.no_grad():
        found = member_outputs(module, fresh(case.batch), outputs=whole)
    if hasattr(callee, "reshard"):
        callee.reshard()
    return tuple(y.detach().clone() for y in found["model"])


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def training_call(
    case: Case, module: nn.Module, bystander: nn.Module | None = None
) -> TrainingCall | None:
    """Calls a module in train mode; it is as before afterwards.

    Args:
        case: Its batch and seed are used.
        module: What is called.
        bystander: Another module, whose buffers are watched.

    Returns:
        What the call gave; None where the module cannot be called in train mode, or does not
        repeat under the seed.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> found = training_call(Case.of(norm, torch.eye(2)), norm)
        >>> found.buffers["running_mean"], norm.running_mean
        (tensor([0.0500, 0.0500]), tensor([0., 0.]))
    """
    one, two = (_called(case, module, bystander) for _ in range(2))
    return None if one is None or two is None or training_difference(one, two) else one


def _called(case: Case, module: nn.Module, bystander: nn.Module | None) -> TrainingCall | None:
    watched = {} if bystander is None else _buffers(bystander)
    with preserved([module, *([] if bystander is None else [bystander])]), torch.no_grad():
        before = {name: buffer.detach().clone() for name, buffer in watched.items()}
        module.train()
        try:
            outputs = outputs_of(case, module)
        except (ValueError, NotImplementedError):  # BatchNorm of one value, exported programs
            return None
        return TrainingCall(
            outputs,
            {name: buffer.detach().clone() for name, buffer in _buffers(module).items()},
            tuple(name for name, then in before.items() if distance(then, watched[name])),
        )


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return {e.names[0]: e.tensor for e in registered(module) if e.kind == "buffer"}


def difference(one: Sequence[Tensor], two: Sequence[Tensor]) -> float:
    """The greatest difference between two calls, as a share of the greatest number of the first.

    Example:
        >>> difference([torch.ones(2)], [torch.tensor([1.0, 3.0])]), difference([], [torch.ones(1)])
        (2.0, inf)
    """
    if len(one) != len(two):
        return float("inf")
    by = max((distance(a, b) for a, b in zip(one, two, strict=True)), default=0.0)
    sizes = [numbers_in(y).abs().double().nan_to_num(0.0, 0.0) for y in one if y.numel()]
    greatest = max((float(size.max()) for size in sizes), default=0.0)
    return by / greatest if greatest > 0 else by


def training_difference(one: TrainingCall, other: TrainingCall) -> float:
    """The greatest difference of an output, or of a buffer that both have, each as a share.

    Example:
        >>> call = TrainingCall((torch.ones(2),), {"mean": torch.tensor(100.0)})
        >>> training_difference(call, TrainingCall((torch.ones(2),), {"mean": torch.tensor(0.0)}))
        1.0
    """
    if len(one.outputs) != len(other.outputs):
        return float("inf")
    pairs = list(zip(one.outputs, other.outputs, strict=True))
    pairs += [(one.buffers[n], other.buffers[n]) for n in one.buffers if n in other.buffers]
    return max((difference([a], [b]) for a, b in pairs), default=0.0)
