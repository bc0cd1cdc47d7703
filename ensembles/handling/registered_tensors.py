"""The tensors that a model registers, and all of their names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Literal, NamedTuple

from torch import Tensor

from ensembles.handling.members import is_one_module, named_modules_of
from ensembles.subject import Model

__all__ = ["Registered", "holders_of", "one_network", "registered"]


class Registered(NamedTuple):
    """A parameter or buffer, once, with all names under which it is registered."""

    tensor: Tensor
    names: tuple[str, ...]
    kind: Literal["parameter", "buffer"]


def registered(model: Model) -> list[Registered]:
    """Every parameter and buffer once, in the order of registration.

    Args:
        model: One module, whose names are its own, or the members as a list or dict of modules,
            whose names have the member in front.

    Example:
        >>> tied = nn.Linear(2, 2, bias=False)
        >>> [entry.names for entry in registered([tied, nn.Sequential(tied, nn.PReLU())])]
        [('0.weight', '1.0.weight'), ('1.1.weight',)]
    """
    tensors: dict[int, Tensor] = {}
    names: defaultdict[int, dict[str, None]] = defaultdict(dict)
    parameters: set[int] = set()
    for member, module in named_modules_of(model).items():
        prefix = "" if is_one_module(model) else f"{member}."
        own = list(module.named_parameters(remove_duplicate=False))
        parameters.update(id(tensor) for _, tensor in own)
        for name, tensor in [*own, *module.named_buffers(remove_duplicate=False)]:
            tensors[id(tensor)] = tensor
            names[id(tensor)][prefix + name] = None
    return [
        Registered(tensor, tuple(names[i]), "parameter" if i in parameters else "buffer")
        for i, tensor in tensors.items()
    ]


def holders_of(model: Model) -> dict[int, tuple[str, ...]]:
    """The members that register each parameter and buffer, by its id.

    Example:
        >>> one = nn.Linear(2, 2)
        >>> holders_of([one, nn.Sequential(one), nn.Linear(2, 2)])[id(one.weight)]
        ('0', '1')
    """
    holders: defaultdict[int, dict[str, None]] = defaultdict(dict)
    for member, module in named_modules_of(model).items():
        for tensor in (*module.parameters(), *module.buffers()):
            holders[id(tensor)][member] = None
    return {key: tuple(members) for key, members in holders.items()}


def one_network(model: Model, members: Collection[str]) -> bool:
    """Whether all that these members register is registered by each of them.

    Example:
        >>> one = nn.Linear(2, 2)
        >>> one_network([one, one, nn.Linear(2, 2)], ["0", "1"])
        True
    """
    wanted = {*members}
    return all(
        wanted <= {*held} for held in holders_of(model).values() if not wanted.isdisjoint(held)
    )
