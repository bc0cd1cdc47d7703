"""Where tensors live that a model computes with and does not register: a name for each.

Attributes of objects and classes, containers, closures, default arguments and globals below the
model are looked into.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from ensembles.handling.atoms import FUNCTIONS, SEQUENCES, holds_nothing
from ensembles.handling.members import named_modules_of
from ensembles.instruments.autograd import leaves_of
from ensembles.subject import Model

__all__ = ["Location", "Search", "homes_of", "things_below"]

HOLDERS = (Tensor, nn.Module, list, dict, tuple)
"""What is looked for in places that hold much else: classes, defaults and global variables."""

AT_ONCE = 1_000
"""Entries of a container that are looked at in their turn; the rest comes last, so that a data set
that hangs on a model does not keep the search from the model's other attributes."""

MOST_OBJECTS = 300_000
"""Objects that are looked into, which takes seconds. Where there are more, the search says so."""


class Location(NamedTuple):
    """Where a thing is kept.

    Attributes:
        path: From the name of the model on, such as "model.members[0].weight".
        how: The kind of place, in words that follow "kept", such as "in a Python list".
    """

    path: str
    how: str


def homes_of(model: Model, wanted: Mapping[int, Tensor]) -> dict[int, Location]:
    """Where tensors that nothing registers are kept, by id, as far as they can be found.

    Args:
        model: One module, or the members as a list or dict of modules.
        wanted: The tensors, by id.

    Returns:
        The locations of those that were found, in the order of the search.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> net.scales = [torch.ones(2, requires_grad=True)]
        >>> homes_of(net, {id(net.scales[0]): net.scales[0]})[id(net.scales[0])]
        Location(path='model.scales[0]', how='in a Python list')
    """
    if not wanted:
        return {}
    exact: dict[int, Location] = {}
    made_from: dict[int, Location] = {}
    for location, tensor in things_below(model):
        if not isinstance(tensor, Tensor):
            continue
        if id(tensor) in wanted:
            exact.setdefault(id(tensor), location)
        elif tensor.grad_fn is not None and not tensor.is_leaf:
            leaves = [id(leaf) for leaf in leaves_of([tensor])]
            # An attribute that was computed from one lost Parameter, not a cached activation.
            if len(leaves) == 1 and leaves[0] in wanted:
                how = "only as a tensor that was computed from it (.to() does that)"
                made_from.setdefault(leaves[0], Location(location.path, how))
    return {**made_from, **exact}


@dataclass
class Search:
    """How far searches came.

    Attributes:
        objects: How many objects the last one looked into. Numbers and texts do not count.
        ended: Whether these were all, in each search.

    Example:
        >>> search = Search()
        >>> _ = list(things_below(nn.Linear(2, 2), search))
        >>> search.ended
        True
    """

    objects: int = 0
    ended: bool = True


def things_below(model: Model, search: Search | None = None) -> Iterator[tuple[Location, Any]]:
    """All that is in attributes, containers, functions and classes below the model.

    Breadth first, so that the shortest path names a thing. What holds no tensor is passed over, and
    optimizers are not looked into. `search` is told how far the search came.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> net.others = [nn.ReLU()]
        >>> [place.path for place, thing in things_below(net) if isinstance(thing, nn.ReLU)]
        ['model.others[0]']
    """
    search = Search() if search is None else search
    search.objects = 0
    queue: deque[tuple[str, str, Any]] = deque()
    rests: deque[Iterator[tuple[str, str, Any]]] = deque()

    def take(inside: Iterator[tuple[str, str, Any]]) -> None:
        some = list(islice(inside, AT_ONCE))
        queue.extend(some)
        if len(some) == AT_ONCE:
            rests.append(inside)

    take((name, "", module) for name, module in named_modules_of(model).items())
    seen: dict[int, Any] = {}  # with the objects, so that no new one gets an id
    while queue or rests:
        if not queue:
            take(rests.popleft())
            continue
        path, how, thing = queue.popleft()
        location = Location(path, how or "as a plain attribute")
        if isinstance(thing, Tensor):
            yield location, thing
            continue
        # What an optimizer lists, it steps: that is no home. A schedule's optimizer is one too.
        if id(thing) in seen or holds_nothing(thing) or isinstance(thing, Optimizer):
            continue
        if search.objects == MOST_OBJECTS:
            search.ended = False
            return
        search.objects += 1
        seen[id(thing)] = thing
        yield location, thing
        take(_inside(path, how, thing))


def _inside(path: str, how: str, thing: Any) -> Iterator[tuple[str, str, Any]]:
    if isinstance(thing, nn.Module):
        yield from _inside_module(path, how, thing)
    elif isinstance(thing, Mapping):
        for key, value in list(thing.items()):
            if not holds_nothing(value):
                yield f"{path}[{key!r}]", how or "in a Python dict", value
    elif isinstance(thing, SEQUENCES):
        kind = next(kind.__name__ for kind in SEQUENCES if isinstance(thing, kind))
        for position, value in enumerate(thing):
            if not holds_nothing(value):
                yield f"{path}[{position}]", how or f"in a Python {kind}", value
    elif isinstance(thing, partial):
        for value in (thing.func, *thing.args, *thing.keywords.values()):
            yield path, how or "in a partial", value
    elif isinstance(thing, FUNCTIONS):
        yield from _inside_function(path, "", thing)
    elif not isinstance(thing, (type, types.ModuleType)):
        for name, value in _attributes(thing):
            yield f"{path}.{name}", how or f"in an object of type {type(thing).__name__}", value


def _inside_module(path: str, how: str, module: nn.Module) -> Iterator[tuple[str, str, Any]]:
    held = {**vars(module), **module._parameters, **module._modules}
    for name, value in held.items():
        if name not in ("_parameters", "_buffers", "_modules"):
            yield f"{path}.{name}", how, value
    for ancestor in type(module).__mro__:
        if not ancestor.__module__.startswith("torch."):
            for name, value in list(vars(ancestor).items()):
                if name not in held and isinstance(value, HOLDERS):
                    yield f"{path}.{name}", how or "as a class attribute", value
    yield from _inside_function(path, "forward", type(module).forward)


def _attributes(thing: Any) -> Iterator[tuple[str, Any]]:
    """What an object keeps in its dict and in its slots."""
    yield from list(getattr(thing, "__dict__", {}).items())
    for kind in type(thing).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            member = vars(kind).get(name)
            if isinstance(member, types.MemberDescriptorType):
                with suppress(AttributeError):  # not set yet
                    yield name, member.__get__(thing)


def _inside_function(path: str, name: str, function: Any) -> Iterator[tuple[str, str, Any]]:
    """What a function closes over, its default arguments, and the globals that it names."""
    function = getattr(function, "__func__", function)
    if not isinstance(function, types.FunctionType):
        return
    place = f"{path}.{name}" if name else path
    code = function.__code__
    for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:  # not yet bound
            continue
        yield f"{variable} of {place}", "in a closure", value
    for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        if isinstance(value, HOLDERS):
            yield place, "as a default argument", value
    for word in code.co_names:
        value = function.__globals__.get(word)
        if isinstance(value, HOLDERS):
            yield f"{word} of {place}", "as a global variable", value
