"""A call in train mode, before and after a conversion: its outputs, and what it moves.

In eval mode neither a lost dropout nor another momentum is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ensembles.handling.memory import numbers_in
from ensembles.handling.registered_tensors import registered
from ensembles.handling.state import preserved, seed_generators
from ensembles.instruments.step_effects import distance

__all__ = ["TrainingCall", "training_call", "unlike"]


class TrainingCall(NamedTuple):
    """What a call in train mode gave.

    Attributes:
        outputs: Every tensor.
        buffers: By name, as the call left them.
        others: Names of buffers of another module that the call moved.
    """

    outputs: tuple[Tensor, ...]
    buffers: Mapping[str, Tensor]
    others: tuple[str, ...]


def training_call(
    module: nn.Module,
    call: Callable[[nn.Module], tuple[Tensor, ...]],
    *,
    seed: int,
    bystander: nn.Module | None = None,
) -> TrainingCall | None:
    """Calls in train mode; module and bystander are as before afterwards.

    Args:
        module: Called, through `call`.
        call: Gives the outputs.
        seed: Of what is drawn.
        bystander: Another module, whose buffers are watched.

    Returns:
        What the call gave; None where the module cannot be called in train mode, or does not
        repeat under the seed.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> found = training_call(norm, lambda m: (m(torch.eye(2)),), seed=0)
        >>> found.buffers["running_mean"], norm.running_mean
        (tensor([0.0500, 0.0500]), tensor([0., 0.]))
    """
    one, two = (_called(module, call, seed, bystander) for _ in range(2))
    if one is None or two is None or unlike(one, two):
        return None
    return one


def _called(
    module: nn.Module,
    call: Callable[[nn.Module], tuple[Tensor, ...]],
    seed: int,
    bystander: nn.Module | None,
) -> TrainingCall | None:
    watched = [] if bystander is None else _buffers(bystander)
    with preserved([module, *([] if bystander is None else [bystander])]), torch.no_grad():
        before = [(name, buffer, buffer.detach().clone()) for name, buffer in watched]
        module.train()
        seed_generators(seed)
        try:
            outputs = call(module)
        except (ValueError, NotImplementedError):  # BatchNorm of one value, exported programs
            return None
        return TrainingCall(
            outputs,
            {name: buffer.detach().clone() for name, buffer in _buffers(module)},
            tuple(name for name, buffer, then in before if distance(then, buffer)),
        )


def unlike(one: TrainingCall, other: TrainingCall) -> float:
    """The greatest difference of outputs and of buffers with one name, as a share of the greatest.

    Example:
        >>> call = TrainingCall((torch.ones(2),), {}, ())
        >>> unlike(call, TrainingCall((torch.tensor([1.0, 3.0]),), {}, ()))
        2.0
    """
    if len(one.outputs) != len(other.outputs):
        return float("inf")
    pairs = list(zip(one.outputs, other.outputs, strict=True))
    pairs += [(one.buffers[n], other.buffers[n]) for n in one.buffers if n in other.buffers]
    found = 0.0
    for a, b in pairs:
        by = distance(a, b)
        numbers = numbers_in(a).abs().double().nan_to_num(0.0, 0.0)
        greatest = float(numbers.max()) if numbers.numel() else 0.0
        found = max(found, by / greatest if greatest > 0 else by)
    return found


def _buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(e.names[0], e.tensor) for e in registered(module) if e.kind == "buffer"]
