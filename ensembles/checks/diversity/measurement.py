"""What members have in common at the start, and which of them compute one function."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Unpack

from torch import Tensor

from ensembles.case import Case
from ensembles.checks.diversity.claim import DiversityClaim
from ensembles.checks.diversity.equal_outputs import double_outputs, equal_outputs, vary
from ensembles.checks.diversity.similarity import (
    Construction,
    Likeness,
    Similarity,
    compared_modules,
    compared_slices,
    construction_of,
    holds_constants_only,
)
from ensembles.findings import Count
from ensembles.handling.members import named_members, named_modules_of
from ensembles.handling.numbers import checked_numbers
from ensembles.message import aligned, counted, listed
from ensembles.subject import Model, Recipe

__all__ = ["MemberDiversity", "measure", "measure_member_diversity"]

_Outputs = Literal["compared", "not given", "constant", "of different shapes"]

_OUTPUTS: Mapping[str, str] = {
    "not given": "outputs not looked at",
    "constant": "outputs the same for all rows, and not compared",
    "of different shapes": "outputs of different shapes, and not compared",
}


@dataclass(frozen=True)
class MemberDiversity:
    """What members have in common at the start.

    Attributes:
        members: The members' names.
        drawn: Names of the parameters that are drawn and were compared; of packed members, those
            that hold a slice for each.
        given: Names of parameters that are no constants, and the same in several members and in
            every construction, as if from a file.
        alike: Drawn parameters that members have in common.
        twins: Groups of members whose outputs are the same.
        outputs: Whether outputs were compared; "not given" is without a batch, and "constant" is
            the same for all rows.
        constructed: Whether construction was looked at: a function that builds was given.
        only_constants: Whether nothing can have been drawn: every number in the members is a
            constant.
        reset: Generators that construction leaves in one state, whatever it was before.
        repeated: Whether two constructions in a row gave the same weights.
        looked_at: Of what a part only was looked at, and how much.
    """

    members: tuple[str, ...]
    drawn: tuple[str, ...]
    given: tuple[str, ...]
    alike: tuple[Likeness, ...]
    twins: tuple[tuple[str, ...], ...]
    outputs: _Outputs
    constructed: bool
    only_constants: bool
    reset: tuple[str, ...]
    repeated: bool
    looked_at: tuple[Count, ...]

    @property
    def twin_pairs(self) -> int:
        """How many pairs of members have the same outputs."""
        return sum(math.comb(len(group), 2) for group in self.twins)

    def __str__(self) -> str:
        alike = {likeness.name for likeness in self.alike}
        same = counted(range(self.twin_pairs), "pair")
        head = (
            f"{counted(self.members, 'member')}, {len(alike)} of "
            f"{counted(self.drawn, 'drawn parameter')} alike, "
            + _OUTPUTS.get(self.outputs, f"outputs the same in {same}")
            + (f", {len(self.given)} given and in common" if self.given else "")
            + ("" if self.constructed else ", construction not seen")
        )
        rows = [
            (x.name, x.how, "" if x.amount is None else f"{x.amount:.2f}", listed(x.members))
            for x in self.alike
        ]
        lines = aligned(rows)
        lines += [f"one function: members {listed(group)}" for group in self.twins]
        if self.reset:
            lines.append(f"construction leaves generators in one state: {listed(self.reset)}")
        return "\n".join([head, *(f"  {line}" for line in lines)])


def measure_member_diversity(
    model: Case | Model | Any, batch: Any = None, **recipe: Unpack[Recipe]
) -> MemberDiversity:
    """Compares what members start with, and what they compute.

    Args:
        model: A function that builds the model: it is called once more than for other checks. Or a
            module, or the members as a list or dict of modules, of which construction is not seen.
        batch: What the model is called with. Without it outputs are not compared.
        **recipe: `outputs` splits what one module returns; `members` finds its member modules.

    Returns:
        The measurement.

    Raises:
        ValueError: If there are fewer than two members, or nothing that could be compared.

    Example:
        >>> print(measure_member_diversity(
        ...     lambda: [nn.Linear(4, 2) for _ in range(3)], torch.randn(5, 4)))
        3 members, 0 of 2 drawn parameters alike, outputs the same in 0 pairs
    """
    return measure(Case.of(model, batch, **recipe))


def measure(case: Case, claim: DiversityClaim | None = None) -> MemberDiversity:
    """What `measure_member_diversity` finds in a case; every claim asks for a batch."""
    __tracebackhide__ = True
    checked_numbers(case.model)
    found = {} if claim is None and not case.has_batch else double_outputs(case)
    names = list(case.members if case.members_known else found)
    if len(names) < 2:
        raise ValueError(
            f"diversity compares members, but one was given ({listed(names) or 'one module'}). "
            "Give a list of modules, members=a function that finds them inside the model, such as "
            "members=lambda model: model.members, or a batch and outputs= that splits what it "
            "returns."
        )
    varied = {name: ys for name, ys in found.items() if vary(ys)}
    twins = equal_outputs(varied)
    if twins:  # they may be of one function until a matrix of zeros is trained
        twins = _in_both(twins, equal_outputs(double_outputs(case, woken=True)))
    # After the outputs, so that a second model and a copy in float64 are not held at once.
    construction = construction_of(case)
    similarity = _similarity(case, names, construction)
    if not similarity.drawn and not found:
        raise ValueError(
            "no trainable parameter is drawn, and no batch was given: there is nothing to compare. "
            "Give a batch."
        )
    return MemberDiversity(
        members=tuple(names),
        drawn=similarity.drawn,
        given=similarity.given,
        alike=similarity.alike,
        twins=tuple(twins),
        outputs=_compared_how(found, varied),
        constructed=construction.again is not None,
        only_constants=case.members_known and holds_constants_only(case.members.values()),
        reset=construction.reset,
        repeated=construction.repeated,
        looked_at=tuple(_looked_at(similarity)),
    )


def _similarity(case: Case, names: Sequence[str], construction: Construction) -> Similarity:
    again, seeded = construction.again, bool(construction.reset)
    if case.members_known:
        others = None if again is None else named_members(again, case.subject.members)
        return compared_modules(case.members, others, seeded=seeded)
    (one,) = case.modules.values()
    other = None if again is None else next(iter(named_modules_of(again).values()))
    return compared_slices(one, names, other, seeded=seeded)


def _looked_at(similarity: Similarity) -> Iterator[Count]:
    if similarity.left_out:
        compared = len(similarity.drawn)
        yield Count(compared, "drawn parameter", of=compared + len(similarity.left_out))
    looked, among = similarity.correlated
    if looked < among:
        yield Count(looked, "element of tensors, for correlations", of=among)


def _in_both(
    one: Sequence[tuple[str, ...]], two: Sequence[tuple[str, ...]]
) -> list[tuple[str, ...]]:
    """The groups that two groupings have in common."""
    among = ([member for member in group if member in other] for group in one for other in two)
    return [tuple(group) for group in among if len(group) > 1]


def _compared_how(found: Mapping[str, Any], varied: Mapping[str, Sequence[Tensor]]) -> _Outputs:
    if not found:
        return "not given"
    if not varied:
        return "constant"
    shapes = {tuple(y.shape for y in ys) for ys in varied.values()}
    return "of different shapes" if len(shapes) == len(varied) > 1 else "compared"
