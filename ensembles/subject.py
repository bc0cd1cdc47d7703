"""The model under verification: how to make, feed, split and train it, and what it claims.

Every check accepts what users already have: a module, a list or a dict of modules. This file
turns those into one vocabulary (named members, named member outputs), and refuses what cannot be
looked at with an error that says where and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

from torch import Tensor, nn

Model = nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]
"""What a user points at: one module, or the members as a list or dict of modules."""

Outputs = Callable[[Any], Mapping[str, Any] | Sequence[Any]]
"""Splits what one module returns into member outputs: see `split_axis` and `split_batch`."""

Members = Callable[[Any], Mapping[str, nn.Module] | Sequence[nn.Module]]
"""Finds the members inside one module."""


Loss = Callable[[dict[str, Any]], Tensor]
"""The training loss: a function of the dict of member outputs, to a scalar tensor."""


class Recipe(TypedDict, total=False):
    """How a model is split, trained and used: what every check takes beside model and batch.

    The keys are the fields of `Subject` of the same names, and mean the same; `seed` is besides. A
    check that has no use for one lets it pass, so that one recipe serves all checks of a model.
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
    """Set before the model is made, and before every check; by default that of the run."""


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
        claims: What the model promises: check name to claim (see `ensembles.checks`). What
            is not claimed is shown as such, and is never passed.
        expected_failures: Check name to the reason why its claim is known to be broken. Such a
            check fails as expected; one that passes after all is reported.

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
    expected_failures: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.make):
            raise ValueError(
                "Subject(make=...) takes a function that builds the model, and got "
                f"{kind_of(self.make)}. Write make=lambda: ..., so that a new model can be built."
            )
        for name in (
            *("batch", "outputs", "members", "optimizer", "loss"),
            *("member_loss", "scheduler", "clip", "predict", "evaluate", "data"),
        ):
            given = getattr(self, name)
            if given is not None and not callable(given):
                raise ValueError(
                    f"Subject({name}=...) takes a function, and got {kind_of(given)}. "
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
                f"{kind_of(output)}. Give outputs=a function of that value."
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


def kind_of(value: Any) -> str:
    """What a user gave, in words for an error.

    Example:
        >>> kind_of(torch.zeros(2)), kind_of("model")
        ('a tensor of dtype torch.float32 and shape (2,)', 'an object of type str')
    """
    if isinstance(value, Tensor):
        return f"a tensor of dtype {value.dtype} and shape {tuple(value.shape)}"
    return f"an object of type {type(value).__name__}"
