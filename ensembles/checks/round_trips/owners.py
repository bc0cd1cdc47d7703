"""Who owns what before and after a conversion: the members that every element of a weight reaches.

It is one transparent forward pass (`ensembles.instruments.influence`) in eval mode. What is
compared is where elements reach, by structure, so that roundings of a conversion do not matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ensembles.checks.round_trips.differences import Difference
from ensembles.instruments.influence import influence
from ensembles.subject import Outputs

__all__ = ["Reach", "other_owners", "reach_of"]

Reach = Mapping[str, Mapping[str, Tensor]]
"""Name of a parameter, under each that it has, to the members that it reaches, with masks of the
elements."""


def reach_of(module: nn.Module, batch: Any, outputs: Outputs | None = None) -> Reach | None:
    """Which elements of each trainable parameter reach which member's output.

    Args:
        module: The model, which is as before afterwards.
        batch: What it is called with.
        outputs: Splits what it returns into member outputs.

    Returns:
        The masks; None where nothing can be said, because nothing depends on a weight by autograd.

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
    try:
        for member, masks in influence(module, batch, outputs=outputs):
            for qualified, mask in masks.items():
                if mask is not None:
                    for name in named.get(qualified.removeprefix("model."), ()):
                        found[name][member] = mask
    except ValueError:
        return None
    return found


def other_owners(before: Reach, after: Reach) -> list[Difference]:
    """Of the parameters in both: those that reach other members, together where the members are.

    Example:
        >>> one, none = torch.tensor([True, True]), torch.tensor([False, True])
        >>> (found,) = other_owners({"w": {"0": one, "1": one}}, {"w": {"0": one, "1": none}})
        >>> found.names, found.amount, found.limit, found.now, found.before
        (('w',), 1, 2, ('0',), ('0', '1'))
    """
    found: dict[Any, list[tuple[str, Tensor]]] = {}
    for name in (name for name in before if name in after):
        then, now = before[name], after[name]
        masks = [*then.values(), *now.values()]
        changed = torch.zeros_like(masks[0]) if masks else torch.zeros(0, dtype=torch.bool)
        none = torch.zeros_like(changed)
        for member in then.keys() | now.keys():
            changed |= then.get(member, none) != now.get(member, none)
        if changed.any():
            place = tuple(changed.nonzero()[0].tolist())
            owners = [tuple(m for m, mask in masks.items() if mask[place]) for masks in (now, then)]
            found.setdefault(tuple(owners), []).append((name, changed))
    return [
        Difference(
            "ownership",
            "other owners",
            tuple(name for name, _ in those),
            amount=sum(int(changed.sum()) for _, changed in those),
            limit=sum(changed.numel() for _, changed in those),
            now=owners[0],
            before=owners[1],
        )
        for owners, those in found.items()
    ]
