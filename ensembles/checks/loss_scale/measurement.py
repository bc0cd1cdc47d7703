"""What the loss makes of every member's gradient, and the learning rates that follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

from ensembles.case import Case, Given
from ensembles.checks.loss_scale.claim import STEPS, LossScaleClaim
from ensembles.checks.loss_scale.gradient_scale import MemberScale, scales_of
from ensembles.claims import is_patterns
from ensembles.handling.numbers import checked_numbers
from ensembles.handling.registered_tensors import one_network
from ensembles.instruments.learning_rates import near, rates_of_members
from ensembles.message import SHOWN_ROWS, aligned, counted, listed
from ensembles.subject import Recipe

__all__ = ["LossScale", "MemberScale", "fraction", "measure", "measure_loss_scale"]

SHOWN_STEPS = 5
"""Steps of a schedule that are shown: as many as fit into one line."""


@dataclass(frozen=True)
class LossScale:
    """What the loss makes of every member's gradient, and the rates that follow.

    Attributes:
        members: One for each member.
        one_network: Whether all members register the same parameters and buffers.
        designed: Patterns of parameter names, each with whether other claims of the subject say
            that members share these; the first that fits counts.
    """

    members: tuple[MemberScale, ...]
    one_network: bool = False
    designed: tuple[tuple[str, bool], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The members' names."""
        return tuple(member.member for member in self.members)

    @property
    def steps(self) -> int:
        """How many steps of the schedule were looked at; 0 without an optimizer."""
        return max((len(rate.scheduled) for m in self.members for rate in m.rates), default=0)

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
            part = "" if self.objective == "sum" else f"{fraction(multiples[0])} of "
            return f"the loss is the {self.objective}: each gets {part}its gradient alone{exact}"
        shares = [fraction(m) if m is None else f"{m:.4g}" for m in multiples]
        known = [m for m in multiples if m is not None]
        in_all = f", {sum(known):.4g} in all{exact}" if len(known) == len(multiples) else ""
        return f"the loss gives {listed(shares)} of their gradients alone{in_all}"

    def __str__(self) -> str:
        common = {overlap.names for member in self.members for overlap in member.shared}
        added = f", but gradients add up in {counted(common, 'shared parameter')}" if common else ""
        rates = [rate for member in self.members for rate in member.rates]
        moving = any(len(set(rate.scheduled)) > 1 for rate in rates)
        seen = f", rates of {self.steps} steps" if moving else ""
        lines = [f"{counted(self.members, 'member')}, {self.told}{added}{seen}"]
        rows = list(_table(self)) if rates else []
        lines += [f"  {line}" for line in aligned(rows[: SHOWN_ROWS + 1])]
        if len(rows) > SHOWN_ROWS + 1:
            lines.append(f"  ... {len(rows) - SHOWN_ROWS - 1} more")
        for step, by in [rate.absolute for rate in rates if rate.absolute][:1]:
            way = "low" if by < 0 else "high"
            lines.append(
                "  schedule   holds absolute rates: unless they were scaled too, lr is "
                f"{abs(by):.4g} too {way} at step {step}"
            )
        clipped = [member.member for member in self.members if member.clipped]
        if clipped:
            lines.append(f"  clipping   couples members {listed(clipped)}")
        taken = [member.member for member in self.members if member.classes]
        if taken:
            lines.append(f"  softmax    of the probabilities of members {listed(taken)}")
        return "\n".join(lines)


def measure_loss_scale(
    model: Given, batch: Any = None, *, steps: int = STEPS, **recipe: Unpack[Recipe]
) -> LossScale:
    """Finds the multiple of each member's gradient, and the learning rates that follow.

    Args:
        model: One module, or the members as a list or dict of modules.
        batch: What the model is called with.
        steps: How many training steps of the schedule are looked at.
        **recipe: `loss` is needed. So is `member_loss`, unless `loss` is made of mean
            cross-entropies of logits, which are recognised. Rates follow from `optimizer` and
            `scheduler`; `clip` is looked at where it is given.

    Returns:
        The measurement; `print` it for a table of members and steps.

    Raises:
        ValueError: If there are fewer than two members, a member's own loss is not known, or
            something given does not fit.

    Example:
        >>> labels = torch.tensor([0, 1, 1])
        >>> def mean_of_losses(outputs):
        ...     losses = [nn.functional.cross_entropy(y, labels) for y in outputs.values()]
        ...     return torch.stack(losses).mean()
        >>> two = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])
        >>> print(measure_loss_scale(two, torch.randn(3, 4), loss=mean_of_losses,
        ...     optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1, weight_decay=5e-4)))
        2 members, the loss is the mean: each gets 1/2 of its gradient alone, bit by bit
          member   multiple   optimizer   lr    effective lr   decay    effective decay
          0        1/2        SGD         0.1   0.05           0.0005   0.001
          1        1/2        SGD         0.1   0.05           0.0005   0.001
    """
    return measure(Case.of(model, batch, **recipe), LossScaleClaim(steps=steps))


def measure(case: Case, claim: LossScaleClaim | None = None) -> LossScale:
    """What `measure_loss_scale` finds in a case, for as many steps as the claim says."""
    __tracebackhide__ = True
    checked_numbers(case.model)
    if case.subject.scheduler is not None and case.subject.optimizer is None:
        raise ValueError("a scheduler was given without an optimizer: give optimizer= too.")
    members, own = scales_of(case)
    names = [member.member for member in members]
    if case.subject.optimizer is not None:
        multiples = {member.member: member.multiple for member in members}
        rates = rates_of_members(case, multiples, own, (claim or LossScaleClaim()).steps)
        members = [replace(member, rates=rates[member.member]) for member in members]
    return LossScale(
        members=tuple(members),
        one_network=not case.is_one_module and one_network(case.model, names),
        designed=tuple(_designed(case.subject.claims)),
    )


def _designed(claims: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """What the claims of sharing and of ownership say of each parameter."""
    sharing, ownership = claims.get("sharing"), claims.get("ownership")
    if sharing == "tied":
        yield "*", True
    elif isinstance(sharing, Sequence) and is_patterns(sharing):
        yield from ((pattern, True) for pattern in sharing)
    if ownership is not None:
        statements = ownership if isinstance(ownership, Mapping) else {"*": ownership}
        for pattern, said in statements.items():
            yield pattern, said not in ("independent", "unused")


# --- how it reads -------------------------------------------------------------------------------


def _table(scale: LossScale) -> Iterator[tuple[str, ...]]:
    rates = [rate for member in scale.members for rate in member.rates]
    parts = SHOWN_STEPS - 1
    steps = sorted({round(i * (scale.steps - 1) / parts) for i in range(SHOWN_STEPS)})
    head = "effective lr at step 0"
    if all(len(set(rate.scheduled)) == 1 for rate in rates):
        steps, head = [0], "effective lr"
    several = len({rate.group for rate in rates}) > 1
    yield (
        *("member", "multiple", *(["group"] if several else []), "optimizer", "lr", head),
        *(*map(str, steps[1:]), "decay", "effective decay"),
    )
    told = _number if scale.objective == "weighted" else fraction
    for member in scale.members:
        for rate in member.rates:
            effective = rate.effective or (None,) * scale.steps
            yield (
                member.member,
                told(member.multiple),
                *([rate.group] if several else []),
                rate.response.name,
                f"{rate.built:.4g}",
                *(_number(effective[step]) for step in steps),
                f"{rate.decay:.4g}",
                _number(rate.effective_decay),
            )


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def fraction(multiple: float | None) -> str:
    """A multiple as a person reads it.

    Example:
        >>> fraction(0.25), fraction(0.3), fraction(None)
        ('1/4', '0.3', 'no multiple')
    """
    if multiple is None:
        return "no multiple"
    over = round(1 / multiple) if multiple and abs(multiple) < 1 else 0
    if over and near(multiple, 1 / over):
        return f"1/{over}"
    return f"{multiple:.4g}"
