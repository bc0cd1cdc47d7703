"""Promise: a training step on one member moves that member only, or the others where claimed.

Catches members that are one network, packed members whose channels mix, members that read each
other's features, BatchNorm statistics that two members update, and a loss that trains one member
according to what another predicts.

One optimizer step is taken on each member alone, from the same state and with the same random
numbers, and everything of the other members is compared, bit by bit, with a control without it.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from ensembles.message import SHOWN_ROWS, aligned, broken, counted, listed
from ensembles.probes.state import parameters_kept, preserved
from ensembles.subject import (
    Members,
    Model,
    Outputs,
    checked_numbers,
    is_one_module,
    member_outputs,
    named_members,
    named_modules_of,
)

__all__ = [
    "GradientCoupling",
    "Moved",
    "assert_members_coupled",
    "assert_members_coupled_to",
    "assert_members_uncoupled",
    "measure_gradient_coupling",
]

LEARNING_RATE = 0.01
"""Of the default step, whose gradients are at most 1: far above rounding, and no explosion."""


@dataclass(frozen=True, order=True)
class Moved:
    """Something of one member that a step on another member moved.

    Attributes:
        step: The member that was trained.
        member: The member that moved.
        place: "output", "parameter <name>", "buffer <name>", or "loss" where the gradient that
            the training loss gives to `member` depends on what `step` predicts.
        by: The greatest absolute change; not compared, since its last digits are the machine's.
    """

    step: str
    member: str
    place: str
    by: float = field(compare=False)

    def __str__(self) -> str:
        what = "its gradient of the loss" if self.place == "loss" else self.place
        return f"{what} by {self.by:.0e}"


@dataclass(frozen=True)
class GradientCoupling:
    """What a training step on each member moves of every other.

    Attributes:
        members: The members' names.
        compared: The kinds of places that were looked at: "output"; "parameter" and "buffer"
            where member modules are known; "loss" where a loss was given.
        moved: Everything that moved, in the order of steps and members.
    """

    members: tuple[str, ...]
    compared: tuple[str, ...]
    moved: tuple[Moved, ...]

    def places(self, step: str, member: str) -> tuple[Moved, ...]:
        """What a step on one member moves of another."""
        return tuple(m for m in self.moved if (m.step, m.member) == (step, member))

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Every pair (step, member) in which something moved."""
        return tuple(dict.fromkeys((m.step, m.member) for m in self.moved))

    def __str__(self) -> str:
        head = (
            f"{counted(self.members, 'member')}, a step on one moves another in "
            f"{len(self.pairs)} of {len(self.members) * (len(self.members) - 1)} ordered pairs "
            f"({', '.join(self.compared)} compared)"
        )
        if not self.moved:
            return head
        if len(self.members) > SHOWN_ROWS:
            rows = [(f"step on {i}", f"moves {j}", self._cell(i, j)) for i, j in self.pairs]
            lines = aligned(rows[:SHOWN_ROWS])
            if len(rows) > SHOWN_ROWS:
                lines.append(f"... {len(rows) - SHOWN_ROWS} more pairs")
        else:
            lines = aligned(
                [
                    ("", *(f"moves {j}" for j in self.members)),
                    *(
                        (f"step on {i}", *(self._cell(i, j) for j in self.members))
                        for i in self.members
                    ),
                ]
            )
        return "\n".join([head, *(f"  {line}" for line in lines)])

    def _cell(self, step: str, member: str) -> str:
        if step == member:
            return "-"
        kinds = Counter(moved.place.split()[0] for moved in self.places(step, member))
        words = [
            kind if kind in ("output", "loss") else counted(range(number), kind)
            for kind, number in kinds.items()
        ]
        return ", ".join(words) or "."


def measure_gradient_coupling(
    model: Model,
    batch: Any,
    *,
    outputs: Outputs | None = None,
    members: Members | None = None,
    optimizer: Callable[[Any], Any] | None = None,
    loss: Callable[[dict[str, Any]], Tensor] | None = None,
) -> GradientCoupling:
    """Takes one training step on each member alone, and finds what it moves of the others.

    The step on member i descends a fixed random projection of i's output in train mode. Then
    the outputs of all members in eval mode, and the parameters and buffers of the member modules,
    are compared bit by bit with a control:

    - members that are a list or dict of modules: only i is called for the step, and the control
      is the untouched state, so a BatchNorm buffer that j shares with i is seen to move;
    - one module that computes all members: the control is the same call without the step, because
      buffers move by the call. An optimizer that also moves what has gradient zero (weight decay
      of a packed weight) is compared with its step on zero gradients.

    Limits: what one step from the present values cannot move is not seen. A layer that two
    members share behind branches that are both initialised to zero moves at the second step only;
    the sharing check sees it. A parameter has moved where any of its elements has: whether two
    members use different elements of it is for the ownership check to say.

    Args:
        model: One module, or the members as a list or dict of modules.
        batch: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        outputs: Splits what one module returns into member outputs.
        members: Finds the member modules inside one module; without it only outputs can be
            compared there. They have the names, or the order, of the outputs.
        optimizer: Builds the optimizer, or a list of them, for the model. By default plain SGD on
            all parameters, with every gradient scaled to a largest element of 1, so that
            vanishing gradients hide nothing.
        loss: The training loss, a function of the dict of member outputs. Where it is given, the
            gradient that it sends to member j must not change with what member i predicts.

    Returns:
        The measurement. The model, its gradients and the random generators are as before.

    Raises:
        ValueError: If there are fewer than two members, the model is not deterministic, the
            optimizer cannot train a member at all, or something given does not fit.

    Example:
        >>> first, second = nn.Linear(4, 4), nn.Linear(4, 4)
        >>> head = nn.Linear(4, 2)
        >>> two = [nn.Sequential(first, head), nn.Sequential(second, head)]
        >>> print(measure_gradient_coupling(two, torch.randn(3, 4)))
        2 members, a step on one moves another in 2 of 2 ordered pairs (output, ... compared)
                      moves 0                moves 1
          step on 0   -                      output, 2 parameters
          step on 1   output, 2 parameters   -
    """
    checked_numbers(model)
    with torch.inference_mode(False), torch.enable_grad():
        bench = _Bench(model, batch, outputs, members, optimizer)
        control = bench.control()
        moved = [found for name in bench.names for found in bench.moved_by(name, control)]
        if loss is not None:
            moved += bench.moved_by_loss(loss)
    ranks = {name: rank for rank, name in enumerate(bench.names)}
    compared = ["output", *(["parameter", "buffer"] if bench.holders else [])]
    return GradientCoupling(
        members=tuple(bench.names),
        compared=tuple([*compared, "loss"] if loss is not None else compared),
        moved=tuple(sorted(moved, key=lambda found: (ranks[found.step], ranks[found.member]))),
    )


def assert_members_uncoupled(coupling: GradientCoupling) -> None:
    """Checks that a training step on one member moves nothing of another.

    Args:
        coupling: From `measure_gradient_coupling`.

    Raises:
        AssertionError: If something of another member moves, or the loss couples them.

    Example:
        >>> two = [nn.Linear(4, 2), nn.Linear(4, 2)]
        >>> assert_members_uncoupled(measure_gradient_coupling(two, torch.randn(3, 4)))
    """
    __tracebackhide__ = True
    if not coupling.moved:
        return
    kinds = {moved.place.split()[0] for moved in coupling.moved}
    raise AssertionError(
        broken(
            f"members {listed(coupling.members)} are claimed to train independently, and "
            + (
                "the loss trains each by what others predict"
                if kinds == {"loss"}
                else "a training step on one moves another"
            ),
            [
                (
                    f"{'output of' if kinds == {'loss'} else 'step on'} {step}",
                    f"moves {member}:",
                    listed([str(moved) for moved in coupling.places(step, member)], 3),
                )
                for step, member in coupling.pairs
            ],
            total=_share(coupling, coupling.pairs),
            meaning=_COUPLED[_mechanism(kinds)][0],
            remedy=_COUPLED[_mechanism(kinds)][1],
        )
    )


def assert_members_coupled(coupling: GradientCoupling) -> None:
    """Checks that members are tied: a training step on any of them moves all others.

    Args:
        coupling: From `measure_gradient_coupling`.

    Raises:
        AssertionError: If a step on one member leaves the output and all parameters of another.

    Example:
        >>> one = nn.Linear(4, 2)
        >>> assert_members_coupled(measure_gradient_coupling([one, one], torch.randn(3, 4)))
    """
    __tracebackhide__ = True
    _assert_moved(
        coupling,
        [(i, j) for i in coupling.members for j in coupling.members if i != j],
        f"members {listed(coupling.members)} are claimed tied, and a training step on one leaves "
        "another as it was",
    )


def assert_members_coupled_to(coupling: GradientCoupling, parent: str) -> None:
    """Checks that a step on any subnet moves the parent, and a step on the parent every subnet.

    Args:
        coupling: From `measure_gradient_coupling`, with the parent among the members.
        parent: The parent's name there. All other members are its subnets.

    Raises:
        ValueError: If no member has this name.
        AssertionError: If a step on a subnet leaves the parent, or the other way round.

    Example:
        >>> wide = nn.Linear(4, 4)
        >>> class Rows(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.wide = wide
        ...     def forward(self, x):
        ...         return x @ self.wide.weight[:2].T
        >>> coupling = measure_gradient_coupling({"parent": wide, "0": Rows()}, torch.randn(3, 4))
        >>> assert_members_coupled_to(coupling, "parent")
    """
    __tracebackhide__ = True
    if parent not in coupling.members:
        raise ValueError(
            f"no member is named {parent!r}, which is claimed to be the parent. "
            f"Members are {listed(coupling.members)}."
        )
    subnets = [name for name in coupling.members if name != parent]
    _assert_moved(
        coupling,
        [pair for name in subnets for pair in ((name, parent), (parent, name))],
        f"members {listed(subnets)} are claimed to share weights with {parent}, and a training "
        "step on one side leaves the other as it was",
    )


# --- how the assertions look --------------------------------------------------------------------

_COUPLED = {
    "loss": (
        "Each member is trained according to what the others predict: one may learn for all.",
        "Usual cause: the loss of the mean prediction. Sum the members' own losses, or claim "
        "the coupling.",
    ),
    "buffer": (
        "A training call of one member changes how another predicts, though no weight is shared.",
        "Usual cause: one normalisation layer passed to several members, or its running "
        "statistics assigned. Give each member its own.",
    ),
    "parameter": (
        "Training one member trains the other, so that they cannot become independent.",
        "Usual cause: [model] * n, or a layer made once and passed to several members. Make it "
        "in each member, or claim it as shared.",
    ),
    "output": (
        "A member's prediction depends on weights that train another.",
        "Usual cause: a layer that mixes packed members (groups=1, a channel shuffle, a norm "
        "over all channels), or features that are read from another member, also detached ones.",
    ),
}


def _mechanism(kinds: set[str]) -> str:
    """What explains the most: a shared weight moves outputs too."""
    if "parameter" in kinds:
        return "parameter"
    if "buffer" in kinds:
        return "buffer"
    return "output" if "output" in kinds else "loss"


def _assert_moved(coupling: GradientCoupling, pairs: Sequence[tuple[str, str]], claim: str) -> None:
    """Only outputs and parameters count: shared statistics or a common loss are no tie."""
    __tracebackhide__ = True
    moved = {
        (m.step, m.member)
        for m in coupling.moved
        if m.place == "output" or m.place.startswith("parameter ")
    }
    still = [pair for pair in pairs if pair not in moved]
    if still:
        raise AssertionError(
            broken(
                claim,
                [(f"step on {step}", f"leaves {member} as it was") for step, member in still],
                total=f"{len(still)} of {len(pairs)} claimed pairs",
                meaning="They do not train the same weights.",
                remedy="Usual cause: deepcopy, clone, detach or load_state_dict where the module "
                "(or Parameter object) itself should be passed on, or a frozen weight.",
            )
        )


def _share(coupling: GradientCoupling, pairs: Sequence[tuple[str, str]]) -> str:
    return f"{len(pairs)} of {len(coupling.members) * (len(coupling.members) - 1)} ordered pairs"


# --- steps and controls -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """What a step can move: outputs in eval mode, and registered tensors by (member, place)."""

    outputs: Mapping[str, tuple[Tensor, ...]]
    tensors: Mapping[tuple[str, str], Tensor]

    def copied(self) -> _Seen:
        """The same values in memory of their own, each tied tensor once."""
        copies = {id(tensor): tensor.clone() for tensor in self.tensors.values()}
        return _Seen(
            {member: tuple(y.clone() for y in ys) for member, ys in self.outputs.items()},
            {place: copies[id(tensor)] for place, tensor in self.tensors.items()},
        )


class _Bench:
    """The model with what is needed to repeat an experiment on it from the same state."""

    def __init__(
        self,
        model: Model,
        batch: Any,
        outputs: Outputs | None,
        members: Members | None,
        optimizer: Callable[[Any], Any] | None,
    ) -> None:
        self.model, self.batch, self.outputs, self.optimizer = model, batch, outputs, optimizer
        self.called = named_modules_of(model)
        self.one = is_one_module(model)
        self.holders = {} if self.one and members is None else named_members(model, members)
        self.names: list[str] = []
        known = [*self.called.values(), *self.holders.values()]
        known += hidden_modules(known)
        with preserved(known):
            held = [p for o in optimizers_of(optimizer or _sgd, model) for p in _held(o)]
        registered = {id(p) for module in known for p in module.parameters()}
        # An optimizer may also hold tensors that no module registers: they are stepped too.
        self.everything = [*known, _Keep(p for p in held if id(p) not in registered)]

    def control(self) -> _Seen:
        """What is seen without a step; twice, because only a model that repeats can be judged."""
        with self._unstepped() as seen:
            first = seen.copied()
        self.names = list(first.outputs)
        if len(self.names) < 2:
            raise ValueError(
                f"coupling compares members, and only one was found ({listed(self.names)}). Give "
                "a list of modules, or outputs=a function that splits what the model returns."
            )
        for name, tensors in first.outputs.items():
            if not all(tensor.isfinite().all() for tensor in tensors):
                raise ValueError(
                    f"the output of member {name} holds NaN or infinity in eval mode, before any "
                    "step. Nothing can be concluded from it."
                )
        self._name_holders()
        with self._unstepped() as second:
            differences = list(_differences(first, second))
        for name, place, by in differences:
            raise ValueError(
                f"the model is not deterministic: {place} of member {name} differs by {by:.0e} "
                "between two runs from the same state and random numbers, so that what a step "
                "moves cannot be told. Use torch.use_deterministic_algorithms(True), or one "
                "thread, and keep no state outside parameters and buffers."
            )
        return first

    def _name_holders(self) -> None:
        if not self.holders or list(self.holders) == self.names:
            return
        if len(self.holders) != len(self.names):
            raise ValueError(
                f"members=... finds {counted(self.holders, 'module')} "
                f"({listed(list(self.holders))}), and the model yields "
                f"{counted(self.names, 'output')} ({listed(self.names)}). Return one module for "
                "each member output."
            )
        if set(self.holders) == set(self.names):
            self.holders = {name: self.holders[name] for name in self.names}
        else:
            self.holders = dict(zip(self.names, self.holders.values(), strict=True))

    @contextmanager
    def _unstepped(self) -> Iterator[_Seen]:
        with preserved(self.everything):
            if self.one:
                with _rewound(), parameters_kept(self.model):
                    self._train_mode(self.model)
                    member_outputs(self.model, fresh(self.batch), outputs=self.outputs)
            with parameters_kept(self.model):
                seen = self._see()
            yield seen

    def moved_by(self, step: str, control: _Seen) -> Iterator[Moved]:
        """What a step on one member moves of the others."""
        with self._stepped(step) as seen:
            differences = list(_differences(control, seen, but=step))
        if differences and self.one and self.optimizer is not None:
            # What the same step makes of zero gradients (decay) is no coupling.
            with self._stepped(step, zero=True) as seen:
                drift = seen.copied()
            with self._stepped(step) as seen:
                differences = list(_differences(drift, seen, but=step))
        for member, place, by in differences:
            yield Moved(step, member, place, by)

    @contextmanager
    def _stepped(self, step: str, *, zero: bool = False) -> Iterator[_Seen]:
        with preserved(self.everything):
            with _rewound():
                optimizers = optimizers_of(self.optimizer or _sgd, self.model)
                held = {id(p): p for o in optimizers for p in _held(o) if p.requires_grad}
                parameters = list(held.values())
                model = self.model if self.one else {step: self.called[step]}
                self._train_mode(model)
                with parameters_kept(model) if not self.one else nullcontext():
                    found = member_outputs(model, fresh(self.batch), outputs=self.outputs)
                if step not in found:
                    raise ValueError(
                        f"the model yields members {listed(self.names)} in eval mode and "
                        f"{listed(list(found))} in train mode. Give outputs=a function that "
                        "finds the same members in both."
                    )
                gradients = projected_gradients(found[step], parameters)
                self._checked_step(step, gradients)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        wanted = gradient if self.optimizer else _scaled(gradient)
                        parameter.grad = torch.zeros_like(gradient) if zero else wanted
                for optimizer in optimizers:
                    _step(optimizer)
            yield self._see()

    def _checked_step(self, step: str, gradients: Sequence[Tensor | None]) -> None:
        """A step that moves nothing at all would make every member look independent."""
        if not any(g is not None and bool(values_of(g).any()) for g in gradients):
            raise ValueError(
                f"there is no training step on member {step}: its output has no gradient (None or "
                "zero) in anything that the optimizer holds, so that nothing can be concluded. "
                "Usual cause: members in a Python list, frozen parameters, detach, or an "
                "optimizer of another model; the coverage check says which."
            )

    def _train_mode(self, model: Model) -> None:
        for module in self.called.values():
            module.eval()
        for module in named_modules_of(model).values():
            module.train()

    def _see(self) -> _Seen:
        """What the model now yields in eval mode and holds; the tensors are the model's own."""
        for module in self.called.values():
            module.eval()
        found = member_outputs(self.model, fresh(self.batch), outputs=self.outputs)
        held: dict[int, Tensor] = {}
        tensors = {
            (member, place): held.setdefault(id(tensor), tensor.detach())
            for member, module in self.holders.items()
            for place, tensor in _registered(module)
        }
        return _Seen({m: tuple(y.detach() for y in ys) for m, ys in found.items()}, tensors)

    # --- the loss

    def moved_by_loss(self, loss: Callable[[dict[str, Any]], Tensor]) -> Iterator[Moved]:
        """Which gradients of the loss depend on another member's prediction."""
        with preserved(self.everything):
            self._train_mode(self.model)
            found = member_outputs(self.model, fresh(self.batch), outputs=self.outputs)
            values = {m: tuple(y.detach().clone() for y in ys) for m, ys in found.items()}
            if list(values) != self.names:
                raise ValueError(
                    f"the model yields members {listed(self.names)} in eval mode and "
                    f"{listed(list(values))} in train mode. Give outputs=a function that finds "
                    "the same members in both."
                )
            with _rewound():
                expected = output_gradients(loss, values)
            for step in self.names:
                changed = {**values, step: tuple(_nudged(y) for y in values[step])}
                with _rewound():
                    seen = output_gradients(loss, changed)
                for member in self.names:
                    if member == step:
                        continue
                    pairs = zip(expected[member], seen[member], strict=True)
                    by = max((_distance(a, b) for a, b in pairs), default=0.0)
                    if by:
                        yield Moved(step, member, "loss", by)


class _Keep(nn.Module):
    """Registers tensors that no module of the user's registers, so that they are preserved."""

    def __init__(self, tensors: Iterator[Tensor]) -> None:
        super().__init__()
        for number, tensor in enumerate(tensors):
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(f"held{number}", tensor)
            else:
                self.register_buffer(f"held{number}", tensor)


def _rewound() -> Any:
    """On exit the random generators are as on entry: what follows draws the same numbers."""
    return preserved([nn.Identity()])


def _registered(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters(remove_duplicate=False):
        yield f"parameter {name}", parameter
    for name, buffer in module.named_buffers(remove_duplicate=False):
        yield f"buffer {name}", buffer


def _differences(
    before: _Seen, after: _Seen, *, but: str | None = None
) -> Iterator[tuple[str, str, float]]:
    """Member, place and size of all that differs, outputs first in each member."""
    distances: dict[tuple[int, int], float] = {}  # tied tensors are compared once
    for member, outputs in before.outputs.items():
        if member == but:
            continue
        others = after.outputs.get(member, ())
        if len(others) != len(outputs):
            yield member, "output", math.inf
        else:
            by = max(_distance(a, b) for a, b in zip(outputs, others, strict=True))
            if by:
                yield member, "output", by
        for (owner, place), tensor in before.tensors.items():
            if owner != member:
                continue
            other = after.tensors.get((owner, place))
            if other is None:
                yield member, place, math.inf
                continue
            key = (id(tensor), id(other))
            if key not in distances:
                distances[key] = _distance(tensor, other)
            if distances[key]:
                yield member, place, distances[key]


def _distance(one: Tensor | None, two: Tensor | None) -> float:
    """The greatest absolute difference; 0.0 only if every element is equal (NaN equals NaN)."""
    if one is None or two is None:
        return 0.0 if one is two else math.inf
    one, two = (x.detach() if x.layout == torch.strided else x.to_dense() for x in (one, two))
    if one.shape != two.shape or one.dtype != two.dtype:
        return math.inf
    if torch.equal(one, two):
        return 0.0
    same = (one == two) | ((one != one) & (two != two))
    if same.all():
        return 0.0
    wide = torch.complex128 if one.is_complex() else torch.float64
    by = float((one.cpu().to(wide) - two.cpu().to(wide)).abs()[~same.cpu()].max())
    return by if by > 0 else math.inf


def _nudged(output: Tensor) -> Tensor:
    """Another prediction of the same kind: probabilities stay in [0, 1], signs stay."""
    share = 0.25 * (1 - torch.rand(output.shape, generator=_generator())).to(output)
    return torch.where(output == 0, share, output * (1 - share))


def _sgd(model: Model) -> Optimizer:
    parameters = {
        id(p): p
        for module in named_modules_of(model).values()
        for p in module.parameters()
        if p.requires_grad
    }
    if not parameters:
        raise ValueError(
            "the model registers no trainable parameters, so that no step can be taken. Usual "
            "cause: members in a Python list instead of nn.ModuleList, or everything is frozen."
        )
    return torch.optim.SGD(list(parameters.values()), lr=LEARNING_RATE)


def _scaled(gradient: Tensor) -> Tensor:
    gradient = gradient.coalesce() if gradient.is_sparse else gradient
    largest = values_of(gradient).abs().max()
    return gradient / largest if largest > 0 and largest.isfinite() else gradient


def _step(optimizer: Optimizer) -> None:
    try:
        optimizer.step()
    except Exception as error:
        raise ValueError(
            f"{type(optimizer).__name__}.step() raised {type(error).__name__}: {error}. The check "
            "steps without a closure, on gradients that it has set."
        ) from error


def _held(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


# --- what the coverage check uses too -----------------------------------------------------------


def optimizers_of(optimizer: Any, model: Model) -> tuple[Optimizer, ...]:
    """The optimizers that a function of the model builds, one or a list.

    Raises:
        ValueError: If it raises or returns something else.

    Example:
        >>> optimizers_of(lambda net: torch.optim.SGD(net.parameters()), nn.Linear(2, 2))[0].defaults["lr"]
        0.001
    """  # noqa: E501
    if not callable(optimizer):
        raise ValueError(
            f"optimizer=... is an object of type {type(optimizer).__name__}. Give a function that "
            "takes the model and builds its optimizer, because every step needs a new one."
        )
    try:
        # PyTorch warns of duplicates, which the coverage check reports with their names.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built = optimizer(model)
    except Exception as error:
        if optimizer is _sgd:
            raise
        raise ValueError(
            f"optimizer={_called(optimizer)} raised {type(error).__name__}: {error} "
            "It takes the model and returns its optimizer, or a list of them."
        ) from error
    found = [built] if isinstance(built, Optimizer) else built
    if (
        not isinstance(found, (list, tuple))
        or not found
        or not all(isinstance(o, Optimizer) for o in found)
    ):
        raise ValueError(
            f"optimizer={_called(optimizer)} returned an object of type {type(built).__name__}. It "
            "takes the model and returns a torch.optim.Optimizer, or a list of them."
        )
    return tuple(found)


def projected_gradients(
    outputs: Sequence[Tensor], parameters: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of a fixed random projection of the outputs; generic, so that no sum cancels.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> weight, other = projected_gradients([layer(torch.ones(3, 2))],
        ...                                     [layer.weight, nn.Parameter(torch.ones(1))])
        >>> weight.shape, other
        (torch.Size([2, 2]), None)
    """
    generator = _generator()
    weights = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    return gradients_of(list(outputs), weights, parameters)


def gradients_of(
    outputs: Sequence[Tensor], weights: Sequence[Tensor], parameters: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of the weighted outputs; None where there is none. No `.grad` is left behind.

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
        # The graph may hold nodes that the user made: they stay usable.
        return list(
            torch.autograd.grad(
                tensors, list(parameters), factors, allow_unused=True, retain_graph=True
            )
        )
    except RuntimeError as error:
        if "checkpoint" not in str(error).lower():
            raise
    # Re-entrant checkpoints work with backward() only, which accumulates.
    before = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        torch.autograd.backward(tensors, factors, retain_graph=True)
        return [parameter.grad for parameter in parameters]
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


def loss_of(
    loss: Callable[[dict[str, Any]], Tensor], outputs: Mapping[str, tuple[Tensor, ...]]
) -> Tensor:
    """The training loss of member outputs, where a member with one tensor gives that tensor.

    Raises:
        ValueError: If the loss raises, or is no finite scalar tensor.

    Example:
        >>> loss_of(lambda y: y["a"].sum() + y["b"].sum(),
        ...         {"a": (torch.ones(2),), "b": (torch.ones(3),)})
        tensor(5.)
    """
    given = {name: ys[0] if len(ys) == 1 else ys for name, ys in outputs.items()}
    try:
        value: Any = loss(given)
    except Exception as error:
        raise ValueError(
            f"loss={_called(loss)} raised {type(error).__name__}: {error} It takes the dict of "
            f"member outputs (members {listed(list(outputs))}) and returns a scalar tensor."
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        kind = (
            f"a tensor of shape {tuple(value.shape)}"
            if isinstance(value, Tensor)
            else f"an object of type {type(value).__name__}"
        )
        raise ValueError(
            f"loss={_called(loss)} returned {kind}. It takes the dict of member outputs and "
            "returns a scalar tensor."
        )
    if not value.detach().isfinite().all():
        raise ValueError(
            f"loss={_called(loss)} is {float(value.detach())} for this model and batch. Nothing "
            "can be concluded from it."
        )
    return value


def output_gradients(
    loss: Callable[[dict[str, Any]], Tensor], values: Mapping[str, tuple[Tensor, ...]]
) -> dict[str, list[Tensor | None]]:
    """The gradient of the loss in each member's output.

    Raises:
        ValueError: If the loss depends on no member's output, or is no finite scalar tensor.

    Example:
        >>> output_gradients(lambda y: 2 * y["a"].sum(), {"a": (torch.ones(2),)})
        {'a': [tensor([2., 2.])]}
    """
    leaves = {m: tuple(y.detach().requires_grad_() for y in ys) for m, ys in values.items()}
    # Clones, because a loss may change what it is given in place.
    value = loss_of(loss, {m: tuple(y.clone() for y in ys) for m, ys in leaves.items()})
    flat = [y for ys in leaves.values() for y in ys]
    found = gradients_of([value], [torch.ones_like(value)], flat)
    if all(gradient is None for gradient in found):
        raise ValueError(
            f"loss={_called(loss)} has no gradient in any member's output: it is detached, or "
            "computed from something else."
        )
    queue = iter(found)
    return {m: [next(queue) for _ in ys] for m, ys in leaves.items()}


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


def hidden_modules(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Modules in Python containers below these, which a call may change though nothing lists them.

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


def values_of(gradient: Tensor) -> Tensor:
    """The numbers of a gradient, which an embedding may give as a sparse tensor.

    Example:
        >>> values_of(torch.eye(2).to_sparse())
        tensor([1., 1.])
    """
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _called(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
