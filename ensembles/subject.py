"""The model under verification: how to make, feed, split and train it, and what it claims.

Every check accepts what users already have: a module, a list or a dict of modules. This file
turns those into one vocabulary (named members, named member outputs), and refuses what cannot be
looked at with an error that says where and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from typing_extensions import TypeIs

from ensembles.calling import asked, raised
from ensembles.memory import numbers_in

Model = nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]
"""What a user points at: one module, or the members as a list or dict of modules."""

Outputs = Callable[[Any], Mapping[str, Any] | Sequence[Any]]
"""Splits what one module returns into member outputs: see `split_axis` and `split_batch`."""

Members = Callable[[Any], Mapping[str, nn.Module] | Sequence[nn.Module]]
"""Finds the members inside one module."""


LISTED = "Usual cause: members in a Python list instead of nn.ModuleList"
"""Why a model registers nothing."""

SPLIT = (
    "Give a list of modules, or outputs=a function that splits what the model returns: split_axis, "
    "split_batch or your own. Where it returns the mean of its members, give the members: "
    "make=lambda: list(Model().members)."
)
"""What to do where a model yields one output, and a check compares members."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Subject:
    """A model with the recipe to make, feed, split and train it, and with its claims.

    Only `make` is required; a check that needs more than was given says which field to add.

    Args:
        make: Returns a new model at each call: a module, or the members as a list or dict of
            modules. Called once for every check, after the global seeds were set.
        name: Shown in reports and test ids.
        batch: Returns what the model is called with: a tensor, a tuple of positional arguments,
            or a dict of keyword arguments.
        outputs: Splits the value that one module returns into member outputs. By default a list,
            tuple or dict is taken as one output per member, and a tensor as one member.
        members: Finds the member modules inside one module, such as `lambda model: model.members`,
            so that storage can be compared between them. A list or dict of modules needs none.
        optimizer: Builds the optimizer, or a list of them, for the model that it is given; or
            returns what `configure_optimizers` of a LightningModule does, of which schedulers are
            left out.
        loss: The training loss: a function of the dict of member outputs, to a scalar tensor.
        member_loss: The loss of one member: a function of its output, to a scalar tensor.
        scheduler: A function of one optimizer: its scheduler, a list of them, or a function that
            is called once after each training step.
        clip: What training does to gradients before the step: a function of the model.
        predict: The ensemble's prediction: a function of the model and the batch, to a tensor of
            probabilities, log-probabilities, logits or classes.
        evaluate: The ensemble's metric: a function of the model, the batch and the labels, to a
            number.
        data: What a member is trained on: a function of its number (its name, where the members
            are a dict), to sample indices, a sampler, or a loader.
        data_size: How many samples the data set has, where a member draws another number.
        claims: What the model promises: check name to claim (see `ensembles.claims`). What
            is not claimed is shown as such, and is never passed.

    Example:
        >>> subject = Subject(
        ...     name="three classifiers",
        ...     make=lambda: [nn.Linear(4, 2) for _ in range(3)],
        ...     batch=lambda: torch.randn(5, 4),
        ...     claims={"sharing": "independent", "ownership": "independent"},
        ... )
        >>> list(member_outputs(subject.make(), subject.batch()))
        ['0', '1', '2']
    """

    make: Callable[[], Model]
    name: str = ""
    batch: Callable[[], Any] | None = None
    outputs: Outputs | None = None
    members: Members | None = None
    optimizer: Callable[[Any], Any] | None = None
    loss: Callable[[dict[str, Any]], Tensor] | None = None
    member_loss: Callable[[Any], Tensor] | None = None
    scheduler: Callable[[Any], Any] | None = None
    clip: Callable[[Any], Any] | None = None
    predict: Callable[[Any, Any], Any] | None = None
    evaluate: Callable[[Any, Any, Tensor], Any] | None = None
    data: Callable[[Any], Any] | None = None
    data_size: int | None = None
    claims: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.make):
            raise ValueError(
                "Subject(make=...) takes a function that builds the model, and got "
                f"{_kind(self.make)}. Write make=lambda: ..., so that every check gets a new model."
            )
        for name in (
            *("batch", "outputs", "members", "optimizer", "loss"),
            *("member_loss", "scheduler", "clip", "predict", "evaluate", "data"),
        ):
            given = getattr(self, name)
            if given is not None and not callable(given):
                raise ValueError(
                    f"Subject({name}=...) takes a function, and got {_kind(given)}. "
                    f"Write {name}=lambda ...: ..., so that every check gets a new one."
                )
        if not isinstance(self.claims, Mapping):
            raise ValueError(
                "Subject(claims=...) takes a dict of check name to claim, and got "
                f"{_kind(self.claims)}."
            )
        if not self.name:
            object.__setattr__(self, "name", getattr(self.make, "__name__", "subject"))

    def __repr__(self) -> str:
        return f"Subject(name={self.name!r}, claims={dict(self.claims)!r})"

    def claiming(self, **claims: Any) -> Subject:
        """The same subject with these claims in place of its own.

        Example:
            >>> Subject(make=lambda: nn.Linear(2, 2)).claiming(sharing="distinct").claims
            {'sharing': 'distinct'}
        """
        return replace(self, claims=claims)


@dataclass(frozen=True)
class Partition:
    """The claim that every element belongs to the parent and to `times` subnets.

    Attributes:
        parent: The parent's member name. All other members are subnets, and each owns an equal
            share.
        times: 1 where subnets partition a weight; k for a stem, whose k row blocks are each
            shared by the k subnets that start there.

    Example:
        >>> print(Partition(), "|", Partition(times=2))
        parent and 1 subnet | parent and 2 subnets
    """

    parent: str = "parent"
    times: int = 1

    def __str__(self) -> str:
        return f"{self.parent} and {self.times} subnet" + ("" if self.times == 1 else "s")


def split_axis(axis: int) -> Outputs:
    """Member outputs are stacked along `axis` of one tensor.

    Args:
        axis: The member axis: 0 for (member, sample, class), 1 for (sample, member, class).

    Example:
        >>> [tuple(y.shape) for y in split_axis(1)(torch.zeros(8, 3, 10))]
        [(8, 10), (8, 10), (8, 10)]
    """

    def split(output: Any) -> Sequence[Any]:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"split_axis({axis}) splits a tensor, and the model returned "
                f"{_kind(output)}. Give outputs=a function of that value."
            )
        if not -output.ndim <= axis < output.ndim:
            raise ValueError(
                f"split_axis({axis}): the model's output has shape "
                f"{tuple(output.shape)}, which has no axis {axis}."
            )
        return output.unbind(axis)

    return split


def split_batch(count: int) -> Outputs:
    """Member outputs are stacked along the batch: rows 0..n-1 are member 0's, and so on.

    Args:
        count: The number of members; the output has count * n rows.

    Example:
        >>> [tuple(y.shape) for y in split_batch(4)(torch.zeros(8, 10))]
        [(2, 10), (2, 10), (2, 10), (2, 10)]
    """
    if count < 1:
        raise ValueError(f"split_batch({count}): the number of members is at least 1.")

    def split(output: Any) -> Sequence[Any]:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"split_batch({count}) splits a tensor, and the model returned "
                f"{_kind(output)}. Give outputs=a function of that value."
            )
        if output.ndim == 0 or output.shape[0] % count:
            raise ValueError(
                f"split_batch({count}): the model's output has shape "
                f"{tuple(output.shape)}, whose rows do not divide by {count}."
            )
        return output.chunk(count)

    return split


def whole(output: Any) -> Mapping[str, Any]:
    """The model is one member, whatever it returns (auxiliary heads, a named tuple, a dict).

    Example:
        >>> list(whole((torch.zeros(2), torch.zeros(3))))
        ['model']
    """
    return {"model": output}


def named_modules_of(model: Model) -> dict[str, nn.Module]:
    """The modules that the user gave, by name: {"model": it} for one, {"0": ...} for a list.

    Raises:
        ValueError: If it is no module, or no list or dict of modules, or an empty one.

    Example:
        >>> list(named_modules_of([nn.Linear(2, 2), nn.Linear(2, 2)]))
        ['0', '1']
    """
    if is_one_module(model):
        return {"model": model}
    return _named(model, nn.Module, "the model")


def is_one_module(model: Model) -> TypeIs[nn.Module]:
    """Whether the user gave one module; containers without a call count as lists and dicts.

    Example:
        >>> is_one_module(nn.Linear(2, 2)), is_one_module(nn.ModuleList([nn.Linear(2, 2)]))
        (True, False)
    """
    return isinstance(model, nn.Module) and not isinstance(model, (nn.ModuleList, nn.ModuleDict))


def named_members(model: Model, members: Members | None = None) -> dict[str, nn.Module]:
    """The member modules by name, as `members` finds them, or the list or dict itself.

    Raises:
        ValueError: If there are none, or if something else than modules was found.

    Example:
        >>> named_members(nn.ModuleDict({"a": nn.Linear(2, 2)}), dict)
        {'a': Linear(in_features=2, out_features=2, bias=True)}
    """
    __tracebackhide__ = True
    if members is None:
        return named_modules_of(model)
    then = "It takes the model and returns its member modules, as a list or dict."
    found = asked("members", members, model, then=f"{then} The model is {_kind(model)}.")
    return _named(found, nn.Module, "members=...")


def member_outputs(
    model: Model, batch: Any, *, outputs: Outputs | None = None
) -> dict[str, tuple[Tensor, ...]]:
    """Calls the model and returns the floating tensors that each member yields.

    Args:
        model: One module, or the members as a list or dict of modules, each called on the batch.
        batch: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        outputs: Splits what one module returns; by default a list, tuple or dict is one output
            per member and a tensor is one member. Of members that are modules of their own, it
            finds the output in what each returns.

    Returns:
        Member name to its output tensors, in the order in which the model gives them.

    Raises:
        ValueError: If the call raises, or if a member's output holds no floating tensor.

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
    except Exception as error:
        what = f"calling {place} ({type(module).__name__}) on the batch {_shapes(batch)}"
        raise ValueError(raised(what, error, _devices(module, batch), of=module)) from error


def checked_numbers(model: Model) -> None:
    """Refuses parameters that hold no usable numbers, before a check computes with them.

    Raises:
        ValueError: For lazy, meta, integer, complex, NaN or infinite parameters, naming the first
            of them and what to do.

    Example:
        >>> checked_numbers(nn.Linear(4, 2, device="meta"))
        Traceback (most recent call last):
        ValueError: parameter model.weight is on the meta device, ...
    """
    for member, module in named_modules_of(model).items():
        for name, parameter in module.named_parameters():
            place = f"parameter {member}.{name}"
            checked_initialised(parameter, place)
            if parameter.device.type == "meta":
                raise ValueError(
                    f"{place} is on the meta device, and this check computes with numbers. "
                    "Build the model on a real device; the sharing check works on meta."
                )
            if not parameter.is_floating_point():
                raise ValueError(
                    f"{place} has dtype {parameter.dtype}, and this check needs real floating "
                    "parameters. Make integer tables buffers; give complex weights as pairs."
                )
            # A frozen parameter may be an additive mask, of minus infinity.
            numbers = numbers_in(parameter, place)
            usable = numbers.isfinite()
            if not parameter.requires_grad:
                usable |= numbers.isinf()
            if not usable.all():
                wrong = int((~usable).sum())
                raise ValueError(
                    f"{place} holds NaN or infinity in {wrong} of {numbers.numel()} elements. "
                    "Nothing can be concluded from it: mend the initialisation or the checkpoint."
                )


def checked_initialised(tensor: Tensor, place: str) -> None:
    """Refuses a lazy parameter that has no shape yet.

    Example:
        >>> checked_initialised(nn.LazyLinear(2).weight, "parameter head.weight")
        Traceback (most recent call last):
        ValueError: parameter head.weight is lazy and has no shape yet. Call the model on ...
    """
    if is_lazy(tensor):
        raise ValueError(
            f"{place} is lazy and has no shape yet. Call the model on one batch in make() first."
        )


def _named(found: Any, kind: type, where: str) -> dict[str, Any]:
    if isinstance(found, (Mapping, nn.ModuleDict)):
        named = {str(name): value for name, value in found.items()}
        if len(named) < len(found):
            raise ValueError(f"{where} has two members of one name: {sorted(map(str, found))}.")
    elif isinstance(found, (Sequence, nn.ModuleList)) and not isinstance(found, str):
        named = {str(position): value for position, value in enumerate(found)}
    else:
        raise ValueError(f"{where} is {_kind(found)}: give a list or dict, one entry per member.")
    if not named:
        raise ValueError(f"{where} has no members: there is nothing to compare.")
    for name, value in named.items():
        if not isinstance(value, kind):
            raise ValueError(f"{where}: member {name} is {_kind(value)}, not a torch.nn.Module.")
    return named


def _tensors(value: Any, member: str) -> tuple[Tensor, ...]:
    found = tuple(x for x in _leaves(value) if isinstance(x, Tensor) and x.is_floating_point())
    if not found:
        raise ValueError(
            f"the output of member {member} is {_kind(value)}, and holds no floating tensor. "
            "Give outputs=a function that returns each member's logits."
        )
    return found


def _leaves(value: Any) -> Iterator[Any]:
    """What an output holds, also in dataclasses and mappings that torch does not know as such."""
    for leaf in pytree.tree_leaves(value):
        if is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _leaves([getattr(leaf, entry.name) for entry in fields(leaf)])
        elif isinstance(leaf, Mapping):
            yield from _leaves(list(leaf.values()))
        else:
            yield leaf


def _split(outputs: Outputs, result: Any, place: str) -> Any:
    __tracebackhide__ = True
    then = f"It takes what {place} returned, {_kind(result)}, and returns one output per member."
    return asked("outputs", outputs, result, then=then)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of dtype {value.dtype} and shape {tuple(value.shape)}"
    return f"an object of type {type(value).__name__}"


def _shapes(batch: Any) -> str:
    found = [x for x in pytree.tree_leaves(batch) if isinstance(x, Tensor)]
    return ", ".join(f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in found) or _kind(batch)


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
