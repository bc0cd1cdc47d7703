"""The model under verification: how to make, feed, split and train it, and what it claims.

`Subject` holds all of this. `Recipe` is the part of it that every check and fixture takes as
keywords. `split_axis`, `split_batch` and `whole` say how an output is split into members.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

from torch import Tensor, nn

Model = nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]
"""What a user gives: one module, or the members as a list or dict of modules."""

Outputs = Callable[[Any], Mapping[str, Any] | Sequence[Any]]
"""Splits what one module returns into member outputs: see `split_axis` and `split_batch`."""

Members = Callable[[Any], Mapping[str, nn.Module] | Sequence[nn.Module]]
"""Finds the members inside one module."""


Loss = Callable[[dict[str, Any]], Tensor]
"""The training loss: a function of the dict of member outputs, to a scalar tensor."""


class Recipe(TypedDict, total=False):
    """How a model is split, trained and used: what every check takes beside model and batch.

    The keys are fields of `Subject`, and `seed`. A check ignores the keys that it does not need, so
    that one recipe serves all checks of a model.
    """

    name: str
    outputs: Outputs | None
    members: Members | None
    optimizer: Callable[[Any], Any] | None
    loss: Loss | None
    member_loss: Callable[[Any], Tensor] | None
    scheduler: Callable[[Any], Any] | None
    clip: Callable[[Any], Any] | None
    predict: Callable[[Any, Any], Any] | None
    evaluate: Callable[[Any, Any, Tensor], Any] | None
    data: Callable[[Any], Any] | None
    data_size: int | None
    seed: int | None
    """Set before the model is made, and before every check; by default the seed of the run."""


LISTED = "Usual cause: members in a Python list instead of nn.ModuleList"
"""Why a model registers no parameters."""

SPLIT = (
    "Give a list of modules, or outputs=a function that splits what the model returns: split_axis, "
    "split_batch or your own. If it returns the mean of its members, give the members: "
    "make=lambda: list(Model().members)."
)
"""What to do if a model returns one output, but a check compares members."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Subject:
    """A model with the recipe to make, feed, split and train it, and with its claims.

    Only `make` is required. If a check needs another field, it says which one to add.

    Args:
        make: Returns a new model at each call: a module, or the members as a list or dict of
            modules. It is called after the global seeds were set. All checks share one model, but
            some checks also build new ones.
        name: Shown in reports and test ids.
        batch: Returns what the model is called with: a tensor, a tuple of positional arguments,
            or a dict of keyword arguments.
        outputs: Splits the value that one module returns into member outputs. By default a list,
            tuple or dict is taken as one output per member, and a tensor as one member.
        members: Finds the member modules inside one module, such as `lambda model: model.members`,
            so that storage can be compared between them. A list or dict of modules does not need
            it.
        optimizer: Takes the model, and builds its optimizer or a list of them. It may also return
            what `configure_optimizers` of a LightningModule returns; schedulers are then ignored.
        loss: The training loss: a function of the dict of member outputs, to a scalar tensor.
        member_loss: The loss of one member: a function of its output, to a scalar tensor.
        scheduler: A function of one optimizer. It returns its scheduler, a list of them, or a
            function that is called once after each training step.
        clip: Clips the gradients before the step, as training does: a function of the model.
        predict: The ensemble's prediction: a function of the model and the batch, to a tensor of
            probabilities, log-probabilities, logits or classes.
        evaluate: The ensemble's metric: a function of the model, the batch and the labels, to a
            number.
        data: What a member is trained on: a function of its number, to sample indices, a sampler,
            or a loader. If the members are a dict, it gets the member's name.
        data_size: How many samples the data set has, if a member draws another number of them.
        claims: What the model promises: check name to claim (see `ensembles.checks`). A check that
            is not claimed is reported as not claimed, and never as passed.
        expected_failures: Check name to the reason why its claim is known to be broken. Such a
            check fails as expected. If it passes after all, this is reported.

    Example:
        >>> from ensembles.handling.members import member_outputs
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
    expected_failures: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.make):
            raise ValueError(
                "Subject(make=...) takes a function that builds the model, but got "
                f"{kind_of(self.make)}. Write make=lambda: ..., so that a new model can be built."
            )
        for name in (
            *("batch", "outputs", "members", "optimizer", "loss"),
            *("member_loss", "scheduler", "clip", "predict", "evaluate", "data"),
        ):
            given = getattr(self, name)
            if given is not None and not callable(given):
                raise ValueError(
                    f"Subject({name}=...) takes a function, but got {kind_of(given)}. "
                    f"Write {name}=lambda ...: ..., so that every check gets a new one."
                )
        for name, value in (("claim", self.claims), ("reason", self.expected_failures)):
            if not isinstance(value, Mapping):
                field_name = "claims" if name == "claim" else "expected_failures"
                raise ValueError(
                    f"Subject({field_name}=...) takes a dict of check name to {name}, but got "
                    f"{kind_of(value)}."
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
        times: 1 if subnets partition a weight. It is k for a stem, because each of its k row
            blocks is shared by the k subnets that start there.

    Example:
        >>> print(Partition(), "|", Partition(times=2))
        parent and 1 subnet | parent and 2 subnets
    """

    parent: str = "parent"
    times: int = 1

    def __str__(self) -> str:
        return f"{self.parent} and {self.times} subnet" + ("" if self.times == 1 else "s")


def split_axis(axis: int) -> Outputs:
    """Splits a tensor in which member outputs are stacked along `axis`.

    Args:
        axis: The member axis: 0 for (member, sample, class), 1 for (sample, member, class).

    Example:
        >>> [tuple(y.shape) for y in split_axis(1)(torch.zeros(8, 3, 10))]
        [(8, 10), (8, 10), (8, 10)]
    """

    def split(output: Any) -> Sequence[Any]:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"split_axis({axis}) splits a tensor, but the model returned "
                f"{kind_of(output)}. Give outputs=a function of that value."
            )
        if not -output.ndim <= axis < output.ndim:
            raise ValueError(
                f"split_axis({axis}): the model's output has shape "
                f"{tuple(output.shape)}, which has no axis {axis}."
            )
        return output.unbind(axis)

    return split


def split_batch(count: int) -> Outputs:
    """Splits a tensor in which member outputs are stacked along the batch.

    Rows 0..n-1 are the output of member 0, the next n rows that of member 1, and so on.

    Args:
        count: The number of members; the output has count * n rows.

    Example:
        >>> [tuple(y.shape) for y in split_batch(4)(torch.zeros(8, 10))]
        [(2, 10), (2, 10), (2, 10), (2, 10)]
    """
    if count < 1:
        raise ValueError(f"split_batch({count}): the number of members must be at least 1.")

    def split(output: Any) -> Sequence[Any]:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"split_batch({count}) splits a tensor, but the model returned "
                f"{kind_of(output)}. Give outputs=a function of that value."
            )
        if output.ndim == 0 or output.shape[0] % count:
            raise ValueError(
                f"split_batch({count}): the model's output has shape "
                f"{tuple(output.shape)}, and its number of rows is not a multiple of {count}."
            )
        return output.chunk(count)

    return split


def whole(output: Any) -> Mapping[str, Any]:
    """Takes the model as one member, whatever it returns (auxiliary heads, a tuple, a dict).

    Example:
        >>> list(whole((torch.zeros(2), torch.zeros(3))))
        ['model']
    """
    return {"model": output}


def kind_of(value: Any) -> str:
    """What a user gave, in words for an error.

    Example:
        >>> kind_of(torch.zeros(2)), kind_of("model")
        ('a tensor of dtype torch.float32 and shape (2,)', 'an object of type str')
    """
    if isinstance(value, Tensor):
        return f"a tensor of dtype {value.dtype} and shape {tuple(value.shape)}"
    return f"an object of type {type(value).__name__}"
