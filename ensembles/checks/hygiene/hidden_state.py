"""State of a model at rest: what nothing registers, live snapshots, stale gradients, modes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ensembles.case import Case
from ensembles.findings import Finding
from ensembles.handling.members import named_modules_of
from ensembles.handling.memory import memory_in
from ensembles.handling.registered_tensors import registered
from ensembles.handling.state import copy_of
from ensembles.instruments.distances import distance
from ensembles.instruments.tensor_locations import Location, Search, things_below
from ensembles.message import listed
from ensembles.subject import Model

__all__ = [
    "left_behind",
    "live_snapshots",
    "memory_of",
    "stale_gradients",
    "unlisted_modules",
    "wrong_modes",
]


# --- at rest ------------------------------------------------------------------------------------


def unlisted_modules(
    model: Model, search: Search | None = None
) -> list[tuple[Location, nn.Module]]:
    """Modules below the model that nothing registers, each without those inside it.

    `search` is told how far the search came.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> net.others = [nn.ReLU()]
        >>> unlisted_modules(net)
        [(Location(path='model.others[0]', how='in a Python list'), ReLU())]
    """
    known = {id(inner) for module in named_modules_of(model).values() for inner in module.modules()}
    found = []
    for location, thing in things_below(model, search):
        if isinstance(thing, nn.Module) and id(thing) not in known:
            known.update(id(inner) for inner in thing.modules())
            found.append((location, thing))
    return found


def live_snapshots(model: Model) -> Iterator[Finding]:
    """A kept state_dict, or any list or dict of detached weights, that is the live weights.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> net.best = net.state_dict()
        >>> [found.place for found in live_snapshots(net)]
        ['model.best']
    """
    named: dict[Any, Tensor] = {}
    live: dict[Any, tuple[str, Tensor]] = {}
    for module in named_modules_of(model).values():
        for inner in module.modules():
            for name, tensor in inner.state_dict(keep_vars=True).items():
                if isinstance(tensor, Tensor) and tensor.numel():
                    memory = memory_of(tensor, name)
                    named[name, memory] = tensor
                    live[memory, tensor.shape] = (name, tensor)
    for (path, _), thing in things_below(model):
        if isinstance(thing, Mapping) and not path.endswith(("._parameters", "._buffers")):
            pairs = list(thing.items())
        elif isinstance(thing, (list, tuple)):
            pairs = list(enumerate(thing))
        else:
            continue
        kept = [(name, t) for name, t in pairs if isinstance(t, Tensor) and t.numel()]
        aliases = [
            name
            for name, tensor in kept
            if named.get((name, memory_of(tensor)), tensor) is not tensor
        ]
        # Under other names, or under none: only where there is nothing else.
        others = [live.get((memory_of(t), t.shape)) for _, t in kept if not t.requires_grad]
        found = [entry for entry in others if entry is not None]
        trained = any(tensor.requires_grad for _, tensor in found)
        if not aliases and trained and len(found) == len(kept):
            aliases = [name for name, _ in found]
        if aliases:
            told = f"is the live memory of {listed(aliases, 3)}"
            yield Finding(kind="alias", place=path, found=told, amount=len(aliases))


def stale_gradients(case: Case) -> Iterator[Finding]:
    """Frozen parameters that the optimizer holds, with a gradient of before the freeze.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> net(torch.ones(1, 2)).sum().backward()
        >>> build = lambda model: torch.optim.SGD(model.parameters(), lr=0.1)
        >>> frozen = Case.of(net.requires_grad_(False), optimizer=build)
        >>> [found.place for found in stale_gradients(frozen)]
        ['weight', 'bias']
    """
    frozen = {
        id(e.tensor): e.names[0]
        for e in registered(case.model)
        if e.kind == "parameter" and not e.tensor.requires_grad and e.tensor.grad is not None
    }
    if not frozen or case.subject.optimizer is None:
        return
    with case.preserved():
        built = case.optimizers()
    for one in built:
        for p in (p for group in one.param_groups for p in group["params"] if id(p) in frozen):
            found = "the optimizer steps its gradient of before the freeze"
            yield Finding(kind="frozen moves", place=frozen[id(p)], found=found)


def left_behind(model: Model) -> Iterator[Finding]:
    """Parameters and buffers that `.to` does not move; looked at in a copy, without its values.

    Example:
        >>> class Stays(nn.BatchNorm1d):
        ...     def _apply(self, fn, recurse=True):
        ...         return self
        >>> [found.place for found in left_behind(nn.Sequential(Stays(2, affine=False)))][:1]
        ['0.running_mean']
    """
    try:
        empty = {id(e.tensor): _empty(e.tensor) for e in registered(model)}
        copied: Any = copy.deepcopy(model, empty)
        if _inner_modules(copied) & _inner_modules(model):
            return  # of itself an own __deepcopy__ may give the original, which must not move
        for module in named_modules_of(copied).values():
            module.to("meta")
    except Exception:  # what cannot be copied, or computes as it moves, tells nothing
        return
    for entry in registered(copied):
        if not entry.tensor.is_meta:
            found = f"{entry.kind} that .to() does not move"
            yield Finding(kind="stays behind", place=entry.names[0], found=found)


def _inner_modules(model: Model) -> set[int]:
    return {id(m) for module in named_modules_of(model).values() for m in module.modules()}


def _empty(tensor: Tensor) -> Tensor:
    """In memory that is never written, and so takes no room."""
    like = torch.empty_like(tensor, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(like, requires_grad=tensor.requires_grad)
    return like


def memory_of(tensor: Tensor, place: str = "a tensor") -> tuple[tuple[str, int], ...]:
    """The device and the address of each storage that a tensor is a view of: one, of most.

    Raises:
        ValueError: If PyTorch does not show the memory of the tensor.

    Example:
        >>> weight = torch.ones(2, 2)
        >>> memory_of(weight) == memory_of(weight[1:])
        True
    """
    storages = [(part.device, part.untyped_storage()) for part in memory_in(tensor, place)]
    # On meta nothing is allocated, and every address is 0.
    return tuple(
        (str(device), found._cdata if found.device.type == "meta" else found.data_ptr())
        for device, found in storages
    )


# --- modes --------------------------------------------------------------------------------------


def wrong_modes(modules: Mapping[str, nn.Module]) -> Iterator[Finding]:
    """What train() and eval() do not reach, or change.

    Example:
        >>> net = nn.Sequential(nn.Dropout(0.5))
        >>> list(wrong_modes({"model": net}))
        []
    """
    for member, module in modules.items():
        before = module.training
        for word, mode in (("eval", False), ("train", True)):
            returned = getattr(module, word)()
            if returned is not module:
                found = f"returns {type(returned).__name__}, not itself"
                yield Finding(kind="mode", place=f"{member}.{word}()", found=found)
            values = [(e.names[0], copy_of(e.tensor)) for e in registered(module)]
            for name, inner in _topmost(module, mode):
                if not (mode and _rightly_in_eval(inner)):
                    place = f"{member}.{name}" if name else member
                    found = f"in {'train' if inner.training else 'eval'} mode after {word}()"
                    yield Finding(kind="mode", place=place, found=found)
            getattr(module, word)()
            now = {name: e.tensor for e in registered(module) for name in e.names}
            for name, value in values:
                if name not in now or distance(value, now[name]):
                    found = f"a second {word}() changes it"
                    yield Finding(kind="mode", place=f"{member}.{name}", found=found)
        module.train(before)  # an own train() may keep more than a mode


def _topmost(module: nn.Module, mode: bool, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules that are not in this mode, each without those inside it."""
    # A list of modules is never called, and an own train() need not set its mode.
    if module.training is not mode and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        yield name, module
        return
    for child, inner in module.named_children():
        yield from _topmost(inner, mode, f"{name}.{child}" if name else child)


def _rightly_in_eval(module: nn.Module) -> bool:
    """A norm that keeps its statistics, or a part that is frozen as a whole."""
    parameters = list(module.parameters())
    frozen = bool(parameters) and not any(p.requires_grad for p in parameters)
    return isinstance(module, _NormBase) or frozen
