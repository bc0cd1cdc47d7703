"""The parts of a training step: batch, loss, gradients and optimizers.

The functions take what users give. If something does not fit, the error says what to do. They leave
nothing behind: no `.grad`, and the batch is not changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from ensembles.handling.members import named_modules_of
from ensembles.handling.memory import as_kind_of
from ensembles.message import listed
from ensembles.subject import LISTED, Loss, Model
from ensembles.user_calls import asked, called

__all__ = [
    "LEARNING_RATE",
    "fresh",
    "gradients_of",
    "hidden_modules",
    "loss_of",
    "optimizers_of",
    "output_gradients",
    "plain_sgd",
    "projected_gradients",
    "set_training",
    "values_of",
]

LEARNING_RATE = 0.01
"""The learning rate of `plain_sgd`, and the greatest one in steps that are looked at. With
gradients of about 1, a step is far larger than rounding, but training does not explode."""

NOTHING_TO_TRAIN = (
    "The model registers no trainable parameters, so no training step is possible. "
    f"{LISTED}, or all parameters are frozen."
)

# --- the model and what it is called with -------------------------------------------------------


def fresh(batch: Any) -> Any:
    """A copy of the batch, so that a model that works in place changes only the copy.

    Example:
        >>> x = torch.zeros(2)
        >>> fresh((x,))[0] is x
        False
    """
    return pytree.tree_map(
        lambda x: (
            x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        ),
        batch,
    )


def set_training(model: Model, trained: Model) -> None:
    """Puts modules that belong to `trained` into train mode, and all others into eval mode.

    Example:
        >>> two = [nn.Linear(2, 2), nn.Linear(2, 2)]
        >>> set_training(two, two[:1])
        >>> [member.training for member in two]
        [True, False]
    """
    for module in named_modules_of(model).values():
        module.eval()
    for module in named_modules_of(trained).values():
        module.train()


def hidden_modules(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Modules in Python containers below these: no module lists them, but a call may change them.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> net.others = [nn.BatchNorm1d(2)]
        >>> hidden_modules([net])
        [BatchNorm1d(2, ...)]
    """
    known = {id(inner) for module in modules for inner in module.modules()}
    found: list[nn.Module] = []
    stack: list[Any] = [vars(inner) for module in modules for inner in module.modules()]
    seen: set[int] = set()
    while stack:
        container = stack.pop()
        if id(container) in seen:
            continue
        seen.add(id(container))
        for value in list(container.values() if isinstance(container, Mapping) else container):
            if isinstance(value, nn.Module) and id(value) not in known:
                found.append(value)
                known.update(id(inner) for inner in value.modules())
                stack.extend(vars(inner) for inner in value.modules())
            elif isinstance(value, (list, tuple, dict)):
                stack.append(value)
    return found


# --- gradients ----------------------------------------------------------------------------------


def projected_gradients(
    outputs: Sequence[Tensor], parameters: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of a fixed random projection of the outputs, so that no gradients cancel.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> weight, other = projected_gradients([layer(torch.ones(3, 2))],
        ...                                     [layer.weight, nn.Parameter(torch.ones(1))])
        >>> weight.shape, other
        (torch.Size([2, 2]), None)
    """
    generator = torch.Generator().manual_seed(0)
    weights = [as_kind_of(torch.randn(y.shape, generator=generator), y) for y in outputs]
    return gradients_of(list(outputs), weights, parameters)


def gradients_of(
    outputs: Sequence[Tensor], weights: Sequence[Tensor], parameters: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of the weighted outputs, or None where there is none. No `.grad` is left behind.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> gradients_of([3 * x], [torch.ones(2)], [x]), x.grad
        ([tensor([3., 3.])], None)
    """
    live = [(y, w) for y, w in zip(outputs, weights, strict=True) if y.requires_grad]
    if not live or not parameters:
        return [None] * len(parameters)
    tensors, factors = [y for y, _ in live], [w for _, w in live]
    try:
        # The graph may hold nodes that the user made, and these must stay usable.
        return list(
            torch.autograd.grad(
                tensors, list(parameters), factors, allow_unused=True, retain_graph=True
            )
        )
    except RuntimeError as error:
        if "checkpoint" not in str(error).lower():
            raise
    # Re-entrant checkpoints only work with backward(), which accumulates.
    before = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        torch.autograd.backward(tensors, factors, retain_graph=True)
        return [parameter.grad for parameter in parameters]
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


def values_of(gradient: Tensor) -> Tensor:
    """The numbers of a gradient, which an embedding may give as a sparse tensor.

    Example:
        >>> values_of(torch.eye(2).to_sparse())
        tensor([1., 1.])
    """
    return gradient.coalesce().values() if gradient.is_sparse else gradient


# --- the loss -----------------------------------------------------------------------------------


def loss_of(loss: Loss, outputs: Mapping[str, tuple[Tensor, ...]]) -> Tensor:
    """The training loss of member outputs. A member with one tensor is passed as that tensor.

    Raises:
        ValueError: If the loss raises, or is not a finite scalar tensor.

    Example:
        >>> loss_of(lambda y: y["a"].sum() + y["b"].sum(),
        ...         {"a": (torch.ones(2),), "b": (torch.ones(3),)})
        tensor(5.)
    """
    given = {name: ys[0] if len(ys) == 1 else ys for name, ys in outputs.items()}
    then = (
        f"It takes the dict of member outputs (members {listed(list(outputs))}) and returns a "
        "scalar tensor."
    )
    value = asked("loss", loss, given, then=then)
    if not isinstance(value, Tensor) or value.numel() != 1:
        kind = (
            f"a tensor of shape {tuple(value.shape)}"
            if isinstance(value, Tensor)
            else f"an object of type {type(value).__name__}"
        )
        raise ValueError(
            f"loss={called(loss)} returned {kind}. It takes the dict of member outputs and "
            "returns a scalar tensor."
        )
    if not value.detach().isfinite().all():
        raise ValueError(
            f"loss={called(loss)} is {float(value.detach())} for this model and batch. Nothing "
            "can be concluded from it."
        )
    return value


def output_gradients(
    loss: Loss, values: Mapping[str, tuple[Tensor, ...]]
) -> dict[str, list[Tensor | None]]:
    """The gradient of the loss with respect to each member's output.

    Raises:
        ValueError: If the loss depends on no member's output, or is not a finite scalar tensor.

    Example:
        >>> output_gradients(lambda y: 2 * y["a"].sum(), {"a": (torch.ones(2),)})
        {'a': [tensor([2., 2.])]}
    """
    leaves = {m: tuple(y.detach().requires_grad_() for y in ys) for m, ys in values.items()}
    # The loss gets clones, because it may change its arguments in place.
    value = loss_of(loss, {m: tuple(y.clone() for y in ys) for m, ys in leaves.items()})
    flat = [y for ys in leaves.values() for y in ys]
    found = gradients_of([value], [torch.ones_like(value)], flat)
    if all(gradient is None for gradient in found):
        raise ValueError(
            f"loss={called(loss)} has no gradient in any member's output: it is detached, or "
            "computed from something else."
        )
    queue = iter(found)
    return {m: [next(queue) for _ in ys] for m, ys in leaves.items()}


# --- the optimizer ------------------------------------------------------------------------------


def optimizers_of(optimizer: Any, model: Model) -> tuple[Optimizer, ...]:
    """The optimizers that a function of the model builds: one or a list.

    Raises:
        ValueError: If it raises or returns something else.

    Example:
        >>> (built,) = optimizers_of(lambda net: torch.optim.SGD(net.parameters(), lr=0.5),
        ...                          nn.Linear(2, 2))
        >>> built.defaults["lr"]
        0.5
    """
    if not callable(optimizer):
        raise ValueError(
            f"optimizer=... is an object of type {type(optimizer).__name__}. Give a function that "
            "takes the model and builds its optimizer, because every step needs a new one."
        )
    then = "It takes the model and returns its optimizer, or a list of them."
    if not _trained(model):  # every optimizer refuses an empty list
        then = f"{then} {NOTHING_TO_TRAIN}"
    # PyTorch warns about duplicates, but the coverage check reports them with their names.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = asked("optimizer", optimizer, model, then=then)
    found = tuple(_optimizers_in(built))
    if not found or not all(isinstance(one, Optimizer) for one in found):
        raise ValueError(
            f"optimizer={called(optimizer)} returned an object of type {type(built).__name__}. It "
            "takes the model and returns a torch.optim.Optimizer, a list of them, or what "
            "configure_optimizers of a LightningModule returns."
        )
    return found


def _optimizers_in(built: Any) -> Iterator[Any]:
    """Also what Lightning takes: dicts, and a list of optimizers with a list of schedulers."""
    if isinstance(built, Mapping) and "optimizer" in built:
        yield from _optimizers_in(built["optimizer"])
    elif isinstance(built, (list, tuple)):
        with_schedulers = len(built) == 2 and all(isinstance(x, (list, tuple)) for x in built)
        with_schedulers = with_schedulers and not any(isinstance(x, Optimizer) for x in built[1])
        for one in built[0] if with_schedulers else built:
            yield from _optimizers_in(one)
    else:
        yield built


def _trained(model: Model) -> dict[int, nn.Parameter]:
    return {
        id(p): p
        for module in named_modules_of(model).values()
        for p in module.parameters()
        if p.requires_grad
    }


def plain_sgd(model: Model, *, momentum: float = 0.0) -> Optimizer:
    """The optimizer of a model that came without one: SGD on all trainable parameters.

    Args:
        model: One module, or the members as a list or dict of modules.
        momentum: As for `torch.optim.SGD`.

    Raises:
        ValueError: If there are none.

    Example:
        >>> len(plain_sgd(nn.Linear(2, 2)).param_groups[0]["params"])
        2
    """
    parameters = _trained(model)
    if not parameters:
        raise ValueError(NOTHING_TO_TRAIN)
    return torch.optim.SGD(list(parameters.values()), lr=LEARNING_RATE, momentum=momentum)
