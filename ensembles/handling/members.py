"""The members of a model: as modules of their own, or as outputs of one module.

Every check accepts what users already have: a module, a list or a dict of modules. This file makes
named members and named member outputs of these. What cannot be looked at is refused, with an error
that says where and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import TypeIs

from ensembles.subject import Members, Model, Outputs, kind_of
from ensembles.user_calls import ERRORS, asked, raised

__all__ = [
    "call",
    "is_one_module",
    "member_outputs",
    "named_members",
    "named_modules_of",
    "new_model",
]


def new_model(make: Callable[[], Model]) -> Model:
    """The new model that the user's function returns.

    Raises:
        ValueError: If it raises, skips or exits.

    Example:
        >>> new_model(nn.Identity)
        Identity()
    """
    __tracebackhide__ = True
    then = (
        "It takes no arguments and returns a module, or the members as a list or dict of modules."
    )
    model: Model = asked("make", make, then=then)
    return model


def named_modules_of(model: Model) -> dict[str, nn.Module]:
    """The modules that the user gave, by name: {"model": it} for one, {"0": ...} for a list.

    Raises:
        ValueError: If it is neither a module nor a list or dict of modules, or if it is empty.

    Example:
        >>> list(named_modules_of([nn.Linear(2, 2), nn.Linear(2, 2)]))
        ['0', '1']
    """
    if is_one_module(model):
        return {"model": model}
    return _named(model, nn.Module, "the model")


def is_one_module(model: Model) -> TypeIs[nn.Module]:
    """Whether the user gave one module; a ModuleList or ModuleDict counts as a list or dict.

    Example:
        >>> is_one_module(nn.Linear(2, 2)), is_one_module(nn.ModuleList([nn.Linear(2, 2)]))
        (True, False)
    """
    return isinstance(model, nn.Module) and not isinstance(model, (nn.ModuleList, nn.ModuleDict))


def named_members(model: Model, members: Members | None = None) -> dict[str, nn.Module]:
    """The member modules by name, as `members` finds them, or the list or dict itself.

    Raises:
        ValueError: If there are none, or if something other than modules was found.

    Example:
        >>> named_members(nn.ModuleDict({"a": nn.Linear(2, 2)}), dict)
        {'a': Linear(in_features=2, out_features=2, bias=True)}
    """
    __tracebackhide__ = True
    if members is None:
        return named_modules_of(model)
    then = "It takes the model and returns its member modules, as a list or dict."
    found = asked("members", members, model, then=f"{then} The model is {kind_of(model)}.")
    return _named(found, nn.Module, "members=...")


def member_outputs(
    model: Model, batch: Any, *, outputs: Outputs | None = None
) -> dict[str, tuple[Tensor, ...]]:
    """Calls the model, and returns the floating-point tensors of each member's output.

    Args:
        model: One module, or the members as a list or dict of modules, each called on the batch.
        batch: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        outputs: Splits what one module returns. By default a list, tuple or dict has one output
            per member, and a tensor is one member. If the members are a list or dict of modules,
            `outputs` is called on what each of them returns.

    Returns:
        Member name to its output tensors, in the order in which the model gives them.

    Raises:
        ValueError: If the call raises, or if a member's output holds no floating-point tensor.

    Example:
        >>> two = [nn.Linear(4, 2), nn.Linear(4, 2)]
        >>> {name: y[0].shape for name, y in member_outputs(two, torch.randn(5, 4)).items()}
        {'0': torch.Size([5, 2]), '1': torch.Size([5, 2])}
    """
    __tracebackhide__ = True
    if is_one_module(model):
        result = call(model, batch, place="the model")
        if outputs is not None:
            result = _split(outputs, result, "the model")
        elif isinstance(result, Tensor) or not isinstance(result, (Mapping, Sequence)):
            result = {"model": result}
        found = _named(result, object, "the model's output")
    else:
        found = {
            name: call(module, batch, place=f"member {name}")
            for name, module in named_modules_of(model).items()
        }
        if outputs is not None:
            found = {n: _split(outputs, value, f"member {n}") for n, value in found.items()}
    return {name: _tensors(value, name) for name, value in found.items()}


def call(module: nn.Module, batch: Any, *, place: str) -> Any:
    """Calls a module on a batch; an error of the call names the place and the devices.

    Example:
        >>> call(nn.Linear(4, 2), (torch.ones(3, 4),), place="the model").shape
        torch.Size([3, 2])
    """
    __tracebackhide__ = True
    try:
        if isinstance(batch, dict):
            return module(**batch)
        return module(*batch) if isinstance(batch, tuple) else module(batch)
    except ERRORS as error:
        what = f"calling {place} ({type(module).__name__}) on the batch {_shapes(batch)}"
        raise ValueError(raised(what, error, _devices(module, batch), of=module)) from error


def _named(found: Any, kind: type, where: str) -> dict[str, Any]:
    if isinstance(found, (Mapping, nn.ModuleDict)):
        named = {str(name): value for name, value in found.items()}
        if len(named) < len(found):
            raise ValueError(
                f"{where} has two members with the same name: {sorted(map(str, found))}."
            )
    elif isinstance(found, (Sequence, nn.ModuleList)) and not isinstance(found, str):
        named = {str(position): value for position, value in enumerate(found)}
    else:
        raise ValueError(f"{where} is {kind_of(found)}: give a list or dict, one entry per member.")
    if not named:
        raise ValueError(f"{where} has no members: there is nothing to compare.")
    for name, value in named.items():
        if not isinstance(value, kind):
            raise ValueError(f"{where}: member {name} is {kind_of(value)}, not a torch.nn.Module.")
    return named


def _tensors(value: Any, member: str) -> tuple[Tensor, ...]:
    found = tuple(x for x in _leaves(value) if isinstance(x, Tensor) and x.is_floating_point())
    if not found:
        raise ValueError(
            f"the output of member {member} is {kind_of(value)}, and holds no floating-point "
            "tensor. Give outputs=a function that returns each member's logits."
        )
    return found


def _leaves(value: Any) -> Iterator[Any]:
    """What an output holds, also in dataclasses and mappings that torch does not open."""
    for leaf in pytree.tree_leaves(value):
        if is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _leaves([getattr(leaf, entry.name) for entry in fields(leaf)])
        elif isinstance(leaf, Mapping):
            yield from _leaves(list(leaf.values()))
        else:
            yield leaf


def _split(outputs: Outputs, result: Any, place: str) -> Any:
    __tracebackhide__ = True
    then = f"It takes what {place} returned, {kind_of(result)}, and returns one output per member."
    return asked("outputs", outputs, result, then=then)


def _shapes(batch: Any) -> str:
    found = [x for x in pytree.tree_leaves(batch) if isinstance(x, Tensor)]
    return ", ".join(f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in found) or kind_of(batch)


def _devices(module: nn.Module, batch: Any) -> str:
    homes: dict[str, str] = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        homes.setdefault(str(tensor.device), name)
    for x in pytree.tree_leaves(batch):
        if isinstance(x, Tensor):
            homes.setdefault(str(x.device), "the batch")
    if len(homes) < 2:
        return ""
    listed = "; ".join(f"{device} holds {name}" for device, name in homes.items())
    return f"Several devices are in use: {listed}. Move model and batch to one."
