"""Who owns what before and after a conversion: the members that every element of a weight reaches.

It is one transparent look (`ensembles.instruments.influence`) in eval mode. What is compared is
where elements reach, by structure, so that roundings of a conversion do not matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ensembles.instruments.influence import influence
from ensembles.message import listed
from ensembles.subject import Outputs

__all__ = ["Reach", "owned_otherwise", "reach_of"]

Reach = Mapping[str, Mapping[str, Tensor]]
"""Name of a parameter, under each that it has, to the members that it reaches, with masks of the
elements."""


def reach_of(module: nn.Module, batch: Any, outputs: Outputs | None = None) -> Reach:
    """Which elements of each trainable parameter reach which member's output.

    Args:
        module: The model, which is as before afterwards.
        batch: What it is called with.
        outputs: Splits what it returns into member outputs.

    Raises:
        ValueError: As `influence`, if nothing can be said.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU())
        >>> reach_of(net, torch.zeros(1, 2))
        {'0.weight': {'model': tensor([[True, True]])}}
    """
    aliases: dict[int, list[str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        if p.requires_grad and p.numel():
            aliases.setdefault(id(p), []).append(name)
    named = {name: group for group in aliases.values() for name in group}
    found: dict[str, dict[str, Tensor]] = {name: {} for name in named}
    for member, masks in influence(module, batch, outputs=outputs):
        for qualified, mask in masks.items():
            if mask is not None:
                for name in named.get(qualified.removeprefix("model."), ()):
                    found[name][member] = mask
    return found


def owned_otherwise(before: Reach, after: Reach) -> tuple[str, ...]:
    """Of the names in both: what is reached otherwise, each in a sentence.

    Example:
        >>> one, none = torch.tensor([True, True]), torch.tensor([False, True])
        >>> owned_otherwise({"w": {"0": one, "1": one}}, {"w": {"0": one, "1": none}})
        ('w: 1 of 2 elements move 0, and moved 0, 1',)
    """
    told = []
    for name, then in before.items():
        now = after.get(name)
        if now is None:
            continue
        masks = [*then.values(), *now.values()]
        changed = torch.zeros_like(masks[0]) if masks else torch.zeros(0, dtype=torch.bool)
        for member in then.keys() | now.keys():
            none = torch.zeros_like(changed)
            changed |= then.get(member, none) != now.get(member, none)
        if changed.any():
            place = tuple(changed.nonzero()[0].tolist())
            owners = [
                listed([member for member, mask in masks.items() if mask[place]]) or "nobody"
                for masks in (now, then)
            ]
            told.append(
                f"{name}: {int(changed.sum())} of {changed.numel()} elements move {owners[0]}, "
                f"and moved {owners[1]}"
            )
    return tuple(told)
