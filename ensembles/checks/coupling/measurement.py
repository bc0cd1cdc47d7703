"""The measurement of `coupling`, and its assertions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ensembles.case import Case
from ensembles.checks.coupling.claim import CouplingClaim
from ensembles.checks.coupling.weight_penalties import coupled_by_weights
from ensembles.handling.members import member_outputs, named_modules_of
from ensembles.handling.memory import as_kind_of
from ensembles.handling.numbers import checked_numbers
from ensembles.handling.state import generators_kept, preserved
from ensembles.handling.training import fresh, hidden_modules, output_gradients, set_training
from ensembles.instruments.step_effects import distance, other_members, step_effects
from ensembles.message import SHOWN_ROWS, aligned, broken, counted, listed
from ensembles.subject import Loss, Members, Model, Outputs

__all__ = [
    "GradientCoupling",
    "Moved",
    "assert_members_coupled",
    "assert_members_coupled_to",
    "assert_members_uncoupled",
    "measure",
    "measure_gradient_coupling",
]


@dataclass(frozen=True, order=True)
class Moved:
    """Something of one member that a step on another member moved.

    Attributes:
        step: The member that was trained.
        member: The member that moved.
        place: "output", "parameter <name>", "buffer <name>", "loss" where the gradient that
            the training loss gives to `member` depends on what `step` predicts, or "penalty"
            where it depends on the weights of `step` by themselves.
        by: The greatest absolute change; not compared, since its last digits are the machine's.
    """

    step: str
    member: str
    place: str
    by: float = field(compare=False)

    def __str__(self) -> str:
        return f"{_BY_LOSS.get(self.place, self.place)} by {self.by:.0e}"


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
            kind if kind in ("output", *_BY_LOSS) else counted(range(number), kind)
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
    loss: Loss | None = None,
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
            all parameters. Gradients are scaled to a largest element of 1, tensor by tensor, so
            that vanishing ones hide nothing, and learning rates above 0.01 are lowered to that.
        loss: The training loss, a function of the dict of member outputs. Where it is given, the
            gradient that it sends to member j must not change with what member i predicts, nor,
            where it holds a penalty on weights, with the weights that are i's alone.

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
        steps = step_effects(model, batch, outputs=outputs, members=members, optimizer=optimizer)
        moved = [Moved(*effect) for effect in steps.effects]
        if loss is not None:
            moved += _moved_by_loss(model, batch, outputs, loss, steps.members)
    ranks = {name: rank for rank, name in enumerate(steps.members)}
    return GradientCoupling(
        members=steps.members,
        compared=(
            "output",
            *(("parameter", "buffer") if steps.modules_known else ()),
            *(("loss",) if loss is not None else ()),
        ),
        moved=tuple(sorted(moved, key=lambda found: (ranks[found.step], ranks[found.member]))),
    )


def _moved_by_loss(
    model: Model, batch: Any, outputs: Outputs | None, loss: Loss, members: tuple[str, ...]
) -> Iterator[Moved]:
    """Which gradients of the loss depend on another member's prediction, or on its weights."""
    modules = list(named_modules_of(model).values())
    everything = [*modules, *hidden_modules(modules)]
    with preserved(everything):

        def called() -> dict[str, tuple[Tensor, ...]]:
            set_training(model, model)
            with generators_kept():
                return member_outputs(model, fresh(batch), outputs=outputs)

        found = called()
        if tuple(found) != members:
            raise other_members(members, found)
        values = {m: tuple(y.detach().clone() for y in ys) for m, ys in found.items()}
        with generators_kept():
            expected = output_gradients(loss, values)
        for step in members:
            moved: dict[str, float] = {}
            for change in (_nudged, _turned):
                changed = {**values, step: tuple(change(y) for y in values[step])}
                with generators_kept():
                    seen = output_gradients(loss, changed)
                for member in members:
                    pairs = zip(expected[member], seen[member], strict=True)
                    by = max(distance(a, b) for a, b in pairs)
                    moved[member] = max(by, moved.get(member, 0.0))
            for member, by in moved.items():
                if by and member != step:
                    yield Moved(step, member, "loss", by)
        with generators_kept():
            for step, member, by in coupled_by_weights(called, loss, values, everything, _nudged):
                yield Moved(step, member, "penalty", by)


def _nudged(output: Tensor) -> Tensor:
    """Another prediction of the same kind: probabilities stay in [0, 1], signs stay."""
    generator = torch.Generator().manual_seed(0)
    share = as_kind_of(0.25 * (1 - torch.rand(output.shape, generator=generator)), output)
    return torch.where(output == 0, share, output * (1 - share))


def _turned(output: Tensor) -> Tensor:
    """The same numbers for other classes: who is right, or the surest, is somebody else."""
    return output.flip(-1) if output.ndim else -output


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
                f"the loss trains each by {' and '.join(_READ[kind] for kind in sorted(kinds))}"
                if kinds <= {*_READ}
                else "a training step on one moves another"
            ),
            [
                (
                    f"{_OF.get(_mechanism(kinds), 'step on')} {step}",
                    f"moves {member}:",
                    listed([str(moved) for moved in coupling.places(step, member)], 3),
                )
                for step, member in coupling.pairs
            ],
            total=f"{_share(coupling, coupling.pairs)}, greatest absolute changes",
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

_BY_LOSS = {"loss": "its gradient of the loss", "penalty": "its gradient of a penalty"}
_READ = {"loss": "what others predict", "penalty": "the weights of others"}
_OF = {"loss": "output of", "penalty": "weights of"}

_COUPLED = {
    "loss": (
        "Each member is trained according to what the others predict: one may learn for all.",
        "Usual cause: the loss of the mean prediction. Sum the members' own losses, or claim "
        "the coupling.",
    ),
    "penalty": (
        "Each member is drawn to, or driven from, the weights of the others.",
        "Usual cause: a penalty on the distance between members, or one norm of all weights. "
        "Penalise each member's weights by themselves, or claim the coupling.",
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
    if "output" in kinds:
        return "output"
    return "loss" if "loss" in kinds else "penalty"


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


def measure(case: Case, claim: CouplingClaim) -> GradientCoupling:
    """What `coupling` looks at, for this claim."""
    __tracebackhide__ = True
    given = case.subject
    return measure_gradient_coupling(
        case.model,
        case.batch,
        outputs=given.outputs,
        members=given.members,
        optimizer=given.optimizer,
        loss=given.loss,
    )
