"""The measurement of `loss_scale`, and its assertions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import e, log
from typing import Any

from ensembles.case import Case
from ensembles.checks.loss_scale.claim import LossScaleClaim
from ensembles.checks.loss_scale.gradient_scale import Clip, MemberLoss, Overlap, scales_of
from ensembles.handling.members import is_one_module
from ensembles.handling.numbers import checked_numbers
from ensembles.handling.registered_tensors import one_network
from ensembles.instruments.learning_rates import Rate, fraction, groups_of, near
from ensembles.message import SHOWN_ROWS, aligned, broken, counted, listed, told_in_common
from ensembles.subject import Loss, Model, Outputs

__all__ = [
    "LossScale",
    "MemberScale",
    "assert_loss_scaled",
    "measure",
    "measure_loss_scale",
]

Claim = str | float | Mapping[str, float] | Sequence[float]
"""`sum`, `mean`, `joint`, one multiple, or one for each member."""

SHOWN_STEPS = 5
"""Steps of a schedule that are shown: as many as fit into one line."""


@dataclass(frozen=True)
class MemberScale:
    """What one member's gradient is in the ensemble.

    Attributes:
        member: The member's name.
        multiple: Of its gradient alone; None where it points elsewhere or alone is unknown.
        exact: Whether it is that multiple bit by bit.
        coupled: The members whose predictions change it.
        clipped: Whether clipping makes it depend on other members' gradients; None without any.
        rates: One for each optimizer group that holds parameters of the member.
        precision: To what multiples are known, as a part of them: what dtypes can tell.
        classes: How many probabilities the loss takes for logits; None where it does not.
        shared: The parameters in which its gradient and those of other members add up.
    """

    member: str
    multiple: float | None
    exact: bool
    coupled: tuple[str, ...]
    clipped: bool | None
    rates: tuple[Rate, ...]
    precision: float = 0.0
    classes: int | None = None
    shared: tuple[Overlap, ...] = ()


@dataclass(frozen=True)
class LossScale:
    """What the loss makes of every member's gradient, and the rates that follow.

    Attributes:
        members: One for each member.
        one_network: Whether all members register the same parameters and buffers.
    """

    members: tuple[MemberScale, ...]
    one_network: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The members' names."""
        return tuple(member.member for member in self.members)

    @property
    def objective(self) -> str:
        """What the loss is: sum, mean, joint, weighted (other multiples) or mixed (none)."""
        if any(member.coupled for member in self.members):
            return "joint"
        if any(member.multiple is None for member in self.members):
            return "mixed"
        for name, wanted in (("sum", 1.0), ("mean", 1 / len(self.members))):
            if all(near(m.multiple, wanted, m.precision) for m in self.members):
                return name
        return "weighted"

    @property
    def told(self) -> str:
        """The loss in words."""
        multiples = [member.multiple for member in self.members]
        exact = ", bit by bit" if all(member.exact for member in self.members) else ""
        if self.objective == "joint":
            coupled = [member.member for member in self.members if member.coupled]
            return f"the loss is joint: gradients of {listed(coupled)} depend on other members"
        if self.objective in ("sum", "mean"):
            each = (
                "its gradient alone"
                if self.objective == "sum"
                else f"{fraction(multiples[0])} of its gradient alone"
            )
            return f"the loss is the {self.objective}: each gets {each}{exact}"
        shares = [fraction(m) if m is None else f"{m:.4g}" for m in multiples]
        told = f"the loss gives {listed(shares)} of their gradients alone"
        known = [m for m in multiples if m is not None]
        return told + (f", {sum(known):.4g} in all{exact}" if len(known) == len(multiples) else "")

    def __str__(self) -> str:
        common = {overlap.names for member in self.members for overlap in member.shared}
        added = f", and they add up in {counted(common, 'shared parameter')}" if common else ""
        lines = [f"{counted(self.members, 'member')}, {self.told}{added}"]
        rows = list(_table(self))
        if len(rows) > 1:
            lines += [f"  {line}" for line in aligned(rows[: SHOWN_ROWS + 1])]
            if len(rows) > SHOWN_ROWS + 1:
                lines.append(f"  ... {len(rows) - SHOWN_ROWS - 1} more")
        absolute = [rate for m in self.members for rate in m.rates if rate.absolute]
        if absolute:
            lines.append(f"  schedule   {_absolute(absolute[0])}")
        clipped = [member.member for member in self.members if member.clipped]
        if clipped:
            lines.append(f"  clipping   couples members {listed(clipped)}")
        confined = [member.member for member in self.members if member.classes]
        if confined:
            lines.append(f"  softmax    of the probabilities of members {listed(confined)}")
        return "\n".join(lines)


def measure_loss_scale(
    model: Model,
    batch: Any,
    loss: Loss,
    *,
    outputs: Outputs | None = None,
    member_loss: MemberLoss | None = None,
    optimizer: Callable[[Any], Any] | None = None,
    scheduler: Callable[[Any], Any] | None = None,
    steps: int = 100,
    clip: Clip | None = None,
) -> LossScale:
    """Finds the multiple of each member's gradient, and the learning rates that follow.

    The multiple is measured by backward passes in train mode: of the loss, and of the member's
    loss alone. What the optimizer makes of it is found by experiment: SGD and its relatives are
    proportional to the gradient, Adam and its relatives do not see its scale but for eps.

    Limits: an optimizer whose update is neither proportional nor invariant (RAdam, LBFGS) has no
    effective rates. A loss that draws random numbers is refused.

    Args:
        model: One module, or the members as a list or dict of modules.
        batch: What the model is called with.
        loss: The training loss, a function of the dict of member outputs.
        outputs: Splits what one module returns into member outputs.
        member_loss: The loss of one member, a function of its output. Not needed where `loss` is
            made of mean cross-entropies of logits, which are recognised.
        optimizer: Builds the optimizer, or a list of them, for the model.
        scheduler: A function of one optimizer: its scheduler, a list of them, or a function to be
            called once after each training step.
        steps: How many training steps of the schedule are looked at.
        clip: What training does to gradients before the step, a function of the model.

    Returns:
        The measurement; `print` it for a table of members and steps. The model, its gradients and
        the random generators are as before.

    Raises:
        ValueError: If there are fewer than two members, a member's own loss is not known, or
            something given does not fit.

    Example:
        >>> labels = torch.tensor([0, 1, 1])
        >>> def mean_of_losses(outputs):
        ...     losses = [nn.functional.cross_entropy(y, labels) for y in outputs.values()]
        ...     return torch.stack(losses).mean()
        >>> two = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])
        >>> print(measure_loss_scale(two, torch.randn(3, 4), mean_of_losses, steps=1,
        ...     optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1, weight_decay=5e-4)))
        2 members, the loss is the mean: each gets 1/2 of its gradient alone, bit by bit
          member   multiple   optimizer   lr    effective lr   decay    effective decay
          0        1/2        SGD         0.1   0.05           0.0005   0.001
          1        1/2        SGD         0.1   0.05           0.0005   0.001
    """
    checked_numbers(model)
    if scheduler is not None and optimizer is None:
        raise ValueError("a scheduler was given without an optimizer: give optimizer= too.")
    scales = scales_of(model, batch, loss, outputs=outputs, member_loss=member_loss, clip=clip)
    groups = []
    if optimizer is not None:
        multiples = {scale.multiple for scale in scales.values()}
        groups = groups_of(model, optimizer, scheduler, steps, multiples=multiples)
    return LossScale(
        tuple(
            MemberScale(
                name,
                scale.multiple,
                scale.exact,
                scale.coupled,
                scale.clipped,
                tuple(
                    group.rate(scale.multiple) for group in groups if group.holds(scale.parameters)
                ),
                scale.precision,
                scale.classes,
                scale.shared,
            )
            for name, scale in scales.items()
        ),
        one_network=not is_one_module(model) and one_network(model, scales),
    )


def assert_loss_scaled(
    scale: LossScale,
    claim: Claim = "sum",
    *,
    clipping: str = "member",
    shared: Sequence[str] = (),
) -> None:
    """Checks that every member's gradient is the claimed multiple of its gradient alone.

    Args:
        scale: From `measure_loss_scale`.
        claim: "sum" (each multiple is 1), "mean" (1/M), "joint" (members are coupled), one number,
            or one for each member, by name or in order.
        clipping: "member" where clipping must not couple members, "joint" where it may.
        shared: Patterns (`fnmatch`) of the parameters that members share by design, as those of a
            trunk, or of a parent under its subnets: there the members' gradients add up, and what
            is claimed is the multiple of each in the sum.

    Raises:
        ValueError: If the claim is none of these, or does not fit the members.
        AssertionError: If a multiple is another, members are coupled where they are not claimed
            to be, gradients add up in weights that are not claimed shared, or the loss takes
            probabilities for logits.

    Example:
        >>> labels = torch.tensor([0, 1, 1])
        >>> def sum_of_losses(outputs):
        ...     return sum(nn.functional.cross_entropy(y, labels) for y in outputs.values())
        >>> two = [nn.Linear(4, 2), nn.Linear(4, 2)]
        >>> assert_loss_scaled(measure_loss_scale(two, torch.randn(3, 4), sum_of_losses), "sum")
    """
    __tracebackhide__ = True
    if clipping not in ("member", "joint"):
        raise ValueError(f"clipping cannot be claimed to be {clipping!r}. It is member or joint.")
    if claim == "joint":
        _assert_joint(scale)
    else:
        _assert_multiples(scale, claim)
        _assert_apart(scale, claim, shared)
    _assert_not_confined(scale)
    clipped = [member for member in scale.members if member.clipped]
    if clipped and clipping == "member":
        raise AssertionError(
            broken(
                f"gradients of members {listed(scale.names)} are claimed to be clipped for each "
                "member, and one norm couples them",
                [
                    (member.member, "its gradient is clipped away when those of others are large")
                    for member in clipped
                ],
                total=f"{len(clipped)} of {counted(scale.members, 'member')}",
                meaning="A loud member silences the others: they are not trained as alone.",
                remedy="Usual cause: clip_grad_norm_(model.parameters(), c). Clip each member's "
                "parameters by themselves (with c/M for the mean), or claim clipping='joint'.",
            )
        )


# --- probabilities taken for logits -------------------------------------------------------------


def _assert_not_confined(scale: LossScale) -> None:
    __tracebackhide__ = True
    confined = [(member.member, member.classes) for member in scale.members if member.classes]
    if confined:
        raise AssertionError(
            broken(
                f"the loss is claimed to fit what members {listed([n for n, _ in confined])} "
                "emit, which are probabilities, and takes them for logits",
                [
                    (
                        name,
                        f"cross-entropy stays between {log(e + classes - 1) - 1:.5f} and "
                        f"{log(e + classes - 1):.5f}",
                        f"for {classes} classes, however good the prediction is",
                    )
                    for name, classes in confined
                ],
                total=f"{len(confined)} of {counted(scale.members, 'member')}",
                meaning="A softmax of a softmax is nearly uniform: gradients are small where the "
                "prediction is wrong, and never vanish where it is right.",
                remedy="Usual cause: softmax at the end of forward, and cross_entropy as the loss. "
                "Return logits, or use nll_loss(p.log(), labels).",
            )
        )


# --- multiples ----------------------------------------------------------------------------------


def _assert_multiples(scale: LossScale, claim: Claim) -> None:
    __tracebackhide__ = True
    expected = _expected(scale, claim)
    coupled = [member for member in scale.members if member.coupled]
    words = f"the {claim} of their losses"
    if not isinstance(claim, str):
        words = f"{listed([_number(x) for x in expected.values()])} of their losses"
    if coupled:
        raise AssertionError(
            broken(
                f"members {listed(scale.names)} are claimed to train on {words}, and the loss "
                "couples them",
                [
                    (
                        member.member,
                        f"expected {fraction(expected[member.member])} of its gradient alone",
                        f"found a gradient that depends on predictions of {listed(member.coupled)}",
                    )
                    for member in coupled
                ],
                total=f"{len(coupled)} of {counted(scale.members, 'member')}",
                meaning="Each member is trained by what the others predict: no learning rate makes "
                "that a training alone.",
                remedy="Usual cause: the loss of the mean prediction, or weights that depend on "
                "all losses. Add up the members' own losses, or claim 'joint'.",
            )
        )
    wrong = [m for m in scale.members if not near(m.multiple, expected[m.member], m.precision)]
    if not wrong:
        return
    found = {"sum": "their sum", "mean": "their mean"}.get(scale.objective, "other multiples")
    told = fraction if isinstance(claim, str) else _number
    raise AssertionError(
        broken(
            f"members {listed(scale.names)} are claimed to train on {words}, and train on {found}",
            [
                (
                    member.member,
                    f"expected {told(expected[member.member])}",
                    f"found {told(member.multiple)}",
                    _consequence(member),
                )
                for member in wrong
            ],
            total=f"multiples of the gradient alone, of {len(wrong)} of "
            f"{counted(scale.members, 'member')}",
            meaning=_meaning(wrong[0], expected[wrong[0].member]),
            remedy="Usual cause: mean() or a division by the number of members where a sum is "
            "meant, or weights of members that do not add up. Sum the losses; or scale lr, "
            "weight decay and all absolute rates of the schedule, and claim what it is.",
        )
    )


def _assert_apart(scale: LossScale, claim: Claim, shared: Sequence[str]) -> None:
    """Where members share weights, what arrives there is the multiple of nobody's gradient."""
    __tracebackhide__ = True
    expected = _expected(scale, claim)
    found: dict[tuple[str, ...], list[tuple[str, Overlap]]] = {}
    for member in scale.members:
        for overlap in member.shared:
            wrong = not near(overlap.multiple, expected[member.member], member.precision)
            if wrong and not _fits(overlap.names, shared):
                found.setdefault(overlap.names, []).append((member.member, overlap))
    if not found:
        return
    rows = []
    for names, those in found.items():
        multiples = {fraction(overlap.multiple) for _, overlap in those}
        wanted = {fraction(expected[member]) for member, _ in those}
        rows.append(
            (
                names[0] if names else "an unregistered parameter",
                f"gradients of members {listed(those[0][1].members)}",
                f"expected {listed(sorted(wanted))}",
                f"found {listed(sorted(multiples))}",
            )
        )
    members = list(dict.fromkeys(name for those in found.values() for name, _ in those))
    several = all(len(n) >= max(2, len(those[0][1].members)) for n, those in found.items())
    words = (
        f"the {claim} of their losses" if isinstance(claim, str) else "multiples of their losses"
    )
    meaning = (
        "A step there follows the sum of these gradients: no learning rate makes that a training "
        "of one alone."
    )
    remedy = (
        "Usual cause: a trunk or a parent's weights under several members, or features of one that "
        "another reads. "
    )
    if several:
        common, cause = told_in_common(members, whole=scale.one_network)
        meaning = common if scale.one_network else meaning
        remedy = f"{cause} "
    raise AssertionError(
        broken(
            f"members {listed(scale.names)} are claimed to train on {words}, each by its gradient "
            "alone, and have weights in common, where gradients add up",
            rows,
            total=f"multiples of the gradient alone, in {counted(found, 'parameter')}",
            meaning=meaning,
            remedy=f"{remedy}What is shared by design is claimed by name: shared=[...].",
        )
    )


def _fits(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether a name, with its member in front or without, is claimed."""
    known = [*names, *(name.partition(".")[2] for name in names)]
    return any(fnmatchcase(name, pattern) for name in known for pattern in patterns)


def _assert_joint(scale: LossScale) -> None:
    __tracebackhide__ = True
    alone = [member for member in scale.members if not member.coupled]
    if alone:
        raise AssertionError(
            broken(
                f"members {listed(scale.names)} are claimed to train jointly, and some train alone",
                [
                    (member.member, f"found {fraction(member.multiple)} of its gradient alone")
                    for member in alone
                ],
                total=f"{len(alone)} of {counted(scale.members, 'member')}",
                meaning="What other members predict does not change these gradients.",
                remedy="Usual cause: the mean of the losses in place of the loss of the mean "
                "prediction, or a detached prediction. Claim 'sum' or 'mean' where it is meant.",
            )
        )


def _expected(scale: LossScale, claim: Claim) -> dict[str, float]:
    names = scale.names
    if isinstance(claim, str):
        if claim not in ("sum", "mean"):
            raise ValueError(
                f"a loss cannot be claimed to be {claim!r}. It is sum, mean, joint, a number, or "
                "one for each member."
            )
        return dict.fromkeys(names, 1.0 if claim == "sum" else 1 / len(names))
    if isinstance(claim, (int, float)):
        return dict.fromkeys(names, float(claim))
    given = (
        {str(name): float(x) for name, x in claim.items()}
        if isinstance(claim, Mapping)
        else {name: float(x) for name, x in zip(names, claim, strict=False)}
    )
    if set(given) != set(names) or len(claim) != len(names):
        raise ValueError(
            f"multiples are claimed for {listed(list(given))}, and members are {listed(names)}. "
            "Give one for each."
        )
    return given


def _consequence(member: MemberScale) -> str:
    told = []
    for rate in member.rates[:1]:
        if rate.kind == "proportional" and rate.effective is not None and member.multiple:
            told.append(f"lr {rate.built:.4g} acts as {rate.built * member.multiple:.4g}")
        if rate.effective_decay is not None and rate.decay and rate.effective_decay != rate.decay:
            told.append(f"weight decay {rate.decay:.4g} as {rate.effective_decay:.4g}")
    return ", ".join(told)


def _meaning(member: MemberScale, expected: float) -> str:
    if member.multiple is None:
        return "Such a gradient is no multiple of the member's own: something else is added to it."
    if not member.multiple:
        return "The member is not trained at all."
    if not expected:
        return "The member is trained, and is claimed not to be."
    kinds = {rate.kind for rate in member.rates}
    if kinds == {"invariant"}:
        return (
            f"{member.rates[0].optimizer} does not see the scale of a gradient but for eps: lr "
            "acts as it is set, and only weight decay that goes through the gradient changes."
        )
    by = fraction(member.multiple / expected)
    return (
        f"Under SGD, whatever its momentum, this is exactly a training at {by} of the learning "
        f"rate and {fraction(expected / member.multiple)} times the weight decay."
    )


# --- how it reads -------------------------------------------------------------------------------


def _table(scale: LossScale) -> Iterator[tuple[str, ...]]:
    rates = [rate for member in scale.members for rate in member.rates]
    if not rates:
        return
    steps = _steps(len(rates[0].scheduled))
    constant = all(len(set(rate.scheduled)) == 1 for rate in rates)
    weighted = scale.objective == "weighted"
    several = len({rate.group for rate in rates}) > 1
    heads = (
        ["effective lr"]
        if constant
        else [f"effective lr at step {steps[0]}", *(str(step) for step in steps[1:])]
    )
    yield (
        "member",
        "multiple",
        *(["group"] if several else []),
        "optimizer",
        "lr",
        *heads,
        "decay",
        "effective decay",
    )
    for member in scale.members:
        for rate in member.rates:
            shown = (
                [None] * len(steps)
                if rate.effective is None
                else [rate.effective[step] for step in steps]
            )
            yield (
                member.member,
                _number(member.multiple) if weighted else fraction(member.multiple),
                *([rate.group] if several else []),
                rate.optimizer,
                f"{rate.built:.4g}",
                *(_number(x) for x in (shown[:1] if constant else shown)),
                f"{rate.decay:.4g}",
                _number(rate.effective_decay),
            )


def _steps(count: int) -> list[int]:
    most = SHOWN_STEPS - 1
    return sorted({round(i * (count - 1) / most) for i in range(SHOWN_STEPS)})


def _absolute(rate: Rate) -> str:
    step, by = rate.absolute or (0, 0.0)
    way = "low" if by < 0 else "high"
    return (
        f"holds absolute rates: unless they were scaled too, lr is {abs(by):.4g} too {way} at "
        f"step {step}"
    )


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def measure(case: Case, claim: LossScaleClaim) -> LossScale:
    """What `loss_scale` looks at, for this claim."""
    __tracebackhide__ = True
    given = case.subject
    if given.loss is None:
        raise ValueError(
            f"subject {given.name!r} claims a loss scale, and has no loss: give "
            "Subject(loss=...), a function of the dict of member outputs."
        )
    return measure_loss_scale(
        case.model,
        case.batch,
        given.loss,
        outputs=given.outputs,
        member_loss=given.member_loss,
        optimizer=given.optimizer,
        scheduler=given.scheduler,
        steps=claim.steps,
        clip=given.clip,
    )
