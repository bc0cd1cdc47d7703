"""The parts of a training step: batch, loss, gradients and optimizers.

The functions take what users give. If something does not fit, the error says what to do. They leave
nothing behind: no `.grad`, and the batch is not changed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from ensembles.handling.atoms import holds_nothing
from ensembles.handling.members import named_modules_of
from ensembles.handling.memory import as_kind_of
from ensembles.message import listed
from ensembles.subject import LISTED, Loss, Model
from ensembles.user_calls import asked, called

__all__ = [
    "LEARNING_RATE",
    "NotFiniteError",
    "TrainingParts",
    "fresh",
    "gradients_of",
    "hidden_modules",
    "loss_of",
    "optimizers_of",
    "output_gradients",
    "plain_sgd",
    "projected_gradients",
    "restrain",
    "set_training",
    "values_of",
]

LEARNING_RATE = 0.01
"""The learning rate of `plain_sgd`, and the greatest one in steps that are looked at. With
gradients of about 1, a step is far larger than rounding, but training does not explode: `restrain`
scales larger gradients down."""

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
            elif isinstance(value, (list, tuple, dict)) and not holds_nothing(value):
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

    As in backward(), what a call has frozen after it was used has none.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> gradients_of([3 * x], [torch.ones(2)], [x]), x.grad
        ([tensor([3., 3.])], None)
    """
    live = [(y, w) for y, w in zip(outputs, weights, strict=True) if y.requires_grad]
    asked_for = [parameter for parameter in parameters if parameter.requires_grad]
    if not live or not asked_for:
        return [None] * len(parameters)
    found = iter(_gradients([y for y, _ in live], [w for _, w in live], asked_for))
    return [next(found) if parameter.requires_grad else None for parameter in parameters]


def _gradients(
    tensors: list[Tensor], factors: list[Tensor], parameters: list[Tensor]
) -> list[Tensor | None]:
    try:
        # The graph may hold nodes that the user made, and these must stay usable.
        return list(
            torch.autograd.grad(tensors, parameters, factors, allow_unused=True, retain_graph=True)
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


class NotFiniteError(ValueError):
    """A training loss is NaN or infinite.

    Attributes:
        value: The loss.
    """

    def __init__(self, told: str, value: Tensor) -> None:
        super().__init__(told)
        self.value = value


def loss_of(loss: Loss, outputs: Mapping[str, tuple[Tensor, ...]]) -> Tensor:
    """The training loss of member outputs. A member with one tensor is passed as that tensor.

    Raises:
        ValueError: If the loss raises, or is not a scalar tensor.
        NotFiniteError: If it is NaN or infinite.

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
        told = f"loss={called(loss)} is {float(value.detach())} for this model and batch."
        raise NotFiniteError(f"{told} Nothing can be concluded from it.", value)
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


def restrain(parameters: Iterable[Tensor]) -> None:
    r"""Scales gradients that are larger than their parameters down, each tensor by itself.

    $g \leftarrow g \min(1, \max(\|w\|, 1) / \|g\|)$, so that one step of `plain_sgd` moves a tensor
    by at most `LEARNING_RATE` of its norm (of 1, where that is more: what starts at zero moves
    too). A healthy network can have gradients of any size: BatchNorm over two rows multiplies them
    by up to $1 / \sqrt{\epsilon} = 316$ in every layer. As the norm is that of one tensor, members
    that are trained together take the steps that they take alone.

    Args:
        parameters: Whose `grad` is replaced; gradients that are not finite are left.

    Source: the trust ratio of LARS (You et al. 2017, arXiv:1708.03888), used as a bound.

    Example:
        >>> small, large = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.full((1,), 4.0))
        >>> small.grad, large.grad = torch.full((1,), 1e6), torch.full((1,), 2.0)
        >>> restrain([small, large])
        >>> small.grad, large.grad
        (tensor([1.]), tensor([2.]))
    """
    for parameter in {id(p): p for p in parameters}.values():
        if parameter.grad is None:
            continue
        norm = _norm(values_of(parameter.grad.detach()))
        allowed = max(_norm(parameter.detach()), 1.0)
        if allowed < norm < math.inf:
            # Not in place: autograd gives the terms of a sum one gradient.
            parameter.grad = parameter.grad * (allowed / norm)


def _norm(tensor: Tensor) -> float:
    """In float64, where no square of a float32 overflows."""
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    dense = tensor if tensor.layout == torch.strided else tensor.to_dense()
    return float(torch.linalg.vector_norm(dense, dtype=wide))


@dataclass(frozen=True)
class TrainingParts:
    """What of its steps a training was given; the rest is the check's own.

    Attributes:
        loss: Whether the loss is the user's.
        optimizer: Whether the optimizer is the user's.
    """

    loss: bool
    optimizer: bool

    def loss_of(self, loss: Loss, outputs: Mapping[str, tuple[Tensor, ...]], step: int) -> Tensor:
        """The training loss in this step, the first of which is 1.

        Raises:
            ValueError: As `loss_of` does; after the first step it says that training runs away.

        Example:
            >>> TrainingParts(loss=True, optimizer=True).loss_of(
            ...     lambda y: y["a"].sum() / 0, {"a": (torch.ones(2),)}, step=2)
            Traceback (most recent call last):
            ValueError: the training loss became infinite in step 2: training runs away. ...
        """
        try:
            return loss_of(loss, outputs)
        except NotFiniteError as error:
            if step == 1:
                raise
            raise self._ran_away("the training loss", error.value, step) from error

    def restrain(self, parameters: Iterable[Tensor]) -> None:
        """Scales gradients, as `restrain` does, unless both are the user's.

        A rate fits the gradients of the loss that it was found for, and no rate fits every loss.

        Example:
            >>> weight = nn.Parameter(torch.ones(1))
            >>> weight.grad = torch.full((1,), 8.0)
            >>> TrainingParts(loss=True, optimizer=True).restrain([weight])
            >>> weight.grad
            tensor([8.])
            >>> TrainingParts(loss=False, optimizer=True).restrain([weight])
            >>> weight.grad
            tensor([1.])
        """
        if not (self.loss and self.optimizer):
            restrain(parameters)

    def check_finite(self, parameters: Mapping[str, Tensor], step: int) -> None:
        """Refuses what a step has made NaN: of two runs it is alike, whatever else differs.

        Raises:
            ValueError: If a parameter holds NaN or infinity.

        Example:
            >>> parts = TrainingParts(loss=True, optimizer=False)
            >>> parts.check_finite({"weight": torch.ones(2) / 0}, 1)
            Traceback (most recent call last):
            ValueError: parameter weight became infinite in step 1: training runs away. ...
        """
        for name, parameter in parameters.items():
            if not parameter.detach().isfinite().all():
                raise self._ran_away(f"parameter {name}", parameter, step)

    def _ran_away(self, what: str, value: Tensor, step: int) -> ValueError:
        became = "NaN" if value.detach().isnan().any() else "infinite"
        if self.optimizer:
            likely = "Likely the learning rate is too large for this batch."
            do = "a smaller one, or a batch of more rows"
        else:
            likely = (
                "The check's own steps are small: likely a gradient is not finite, as of BatchNorm "
                "over few rows, of a root at zero, or in float16."
            )
            do = "a batch of more rows"
        do += "" if self.loss else ", or the loss=... that the model is trained with"
        return ValueError(
            f"{what} became {became} in step {step}: training runs away. Nothing can be concluded "
            f"from it. {likely} Give {do}."
        )
