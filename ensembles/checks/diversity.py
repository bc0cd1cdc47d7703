"""Promise: members differ at the start in every parameter that is drawn, and in their outputs.

Catches members that are copies of one initialised network, copies whose re-initialisation does
not reach every layer, a constructor that seeds, members built from one state dict, copies that
were scaled or moved a little, a member that is a mean of others, members that draw from one stream,
a few numbers apart, and permuted twins: other weights, the same function.

A parameter is drawn if a second construction gives it other values, or, where a constructor
leaves the generators in one state, or only a model was given, if its elements are not all one
number. In tensors of 32 elements and more, a correlation above 0.9 of what is drawn, with another
member or with a weighted sum of others, is no accident either. Zeros, ones and what a file gives
are by design: members may have them in common, as long as their outputs differ. Outputs are
compared in float64 where the model can be converted, and otherwise as they are, within what the
dtype can tell of one function that is computed in two ways (`ensembles.tolerance`).

Limits: a block that every member draws from one private generator of a fixed seed looks like one
that a file gives: the measurement counts such as given. Members inside the tensors of one module
(packed, stacked) are compared by their outputs, and by equal slices along any axis that divides by
their number. A tensor that is a few drawn numbers times fixed patterns is near a multiple, or a
weighted sum, of the others': claim by name that it is alike. Tensors with fewer than 20 random
bits, such as a few signs, may agree by chance and are not compared. Outputs that are the same for
all rows, as behind a head that starts at zero, say nothing of the members.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import combinations
from typing import Any

from torch import Tensor

from ensembles.message import aligned, broken, counted, listed, told_in_common
from ensembles.probes.likeness import (
    Likeness,
    Packed,
    Separate,
    built_from,
    double_outputs,
    holds_constants_only,
    same_outputs,
    vary,
)
from ensembles.subject import (
    Members,
    Model,
    Outputs,
    checked_numbers,
    is_one_module,
    named_members,
)

__all__ = [
    "MemberDiversity",
    "assert_members_distinct",
    "assert_members_diverse",
    "measure_member_diversity",
]


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
        outputs: "compared"; "none given" without a batch; "constant", the same for all rows; or
            "of different shapes", no two of one.
        constructed: Whether construction was looked at: a function that builds was given.
        constants: Whether nothing can have been drawn: every number in the members is a constant.
        repeated: Whether two constructions in a row gave the same weights.
        constant: Generators that construction leaves in one state, whatever it was before.
    """

    members: tuple[str, ...]
    drawn: tuple[str, ...]
    given: tuple[str, ...]
    alike: tuple[Likeness, ...]
    twins: tuple[tuple[str, ...], ...]
    outputs: str
    constructed: bool
    constants: bool
    repeated: bool
    constant: tuple[str, ...]

    def __str__(self) -> str:
        same = {likeness.name for likeness in self.alike}
        told = {
            "compared": f"outputs the same in {counted(range(_pairs(self.twins)), 'pair')}",
            "none given": "outputs not looked at",
            "constant": "outputs the same for all rows, and not compared",
            "of different shapes": "outputs of different shapes, and not compared",
        }[self.outputs]
        head = (
            f"{counted(self.members, 'member')}, {len(same)} of "
            f"{counted(self.drawn, 'drawn parameter')} alike, {told}"
            + (f", {len(self.given)} given and in common" if self.given else "")
            + ("" if self.constructed else ", construction not seen")
        )
        lines = aligned([(likeness.name, str(likeness)) for likeness in self.alike])
        lines += [f"one function: members {listed(group)}" for group in self.twins]
        if self.constant:
            lines.append(f"construction leaves generators in one state: {listed(self.constant)}")
        return "\n".join([head, *(f"  {line}" for line in lines)])


def measure_member_diversity(
    model: Model | Callable[[], Model],
    batch: Any = None,
    *,
    outputs: Outputs | None = None,
    members: Members | None = None,
) -> MemberDiversity:
    """Compares what members start with, and what they compute.

    Args:
        model: A function that builds the model, which is called twice in a row under the present
            seed; or a module, or the members as a list or dict of modules. A function that returns
            what was built before is taken as what it returns.
        batch: A tensor, a tuple of positional arguments, or a dict of keyword arguments. Without
            it outputs are not compared.
        outputs: Splits what one module returns into member outputs.
        members: Finds the member modules inside one module.

    Returns:
        The measurement. The model and the random generators are as before.

    Raises:
        ValueError: If there are fewer than two members, or nothing that could be compared.

    Example:
        >>> print(measure_member_diversity(
        ...     lambda: [nn.Linear(4, 2) for _ in range(3)], torch.randn(5, 4)))
        3 members, 0 of 2 drawn parameters alike, outputs the same in 0 pairs
    """
    built = built_from(model)
    checked_numbers(built.model)
    found = {} if batch is None else double_outputs(built.model, batch, outputs)
    if members is None and is_one_module(built.model):
        names = list(found)
        likenesses: Packed | Separate | None
        likenesses = Packed(built, len(names)) if len(names) > 1 else None
        modules = {}
    else:
        modules = named_members(built.model, members)
        names = list(modules)
        again = None if built.again is None else named_members(built.again, members)
        likenesses = Separate(modules, again, bool(built.constant))
    if len(names) < 2 or likenesses is None:
        raise ValueError(
            f"diversity compares members, and one was given ({listed(names) or 'one module'}). "
            "Give a list of modules, members=a function that finds them inside the model, such as "
            "members=lambda model: model.members, or a batch and outputs= that splits what it "
            "returns."
        )
    alike = tuple(likenesses.found(names))
    if not likenesses.drawn and not found:
        raise ValueError(
            "no trainable parameter is drawn, and no batch was given: there is nothing to compare. "
            "Give a batch."
        )
    varied = {name: ys for name, ys in found.items() if vary(ys)}
    twins = same_outputs(varied)
    if twins:  # they may be of one function until a matrix of zeros is trained
        twins = _in_both(
            twins, same_outputs(double_outputs(built.model, batch, outputs, woken=True))
        )
    return MemberDiversity(
        members=tuple(names),
        drawn=tuple(likenesses.drawn),
        given=likenesses.given,
        alike=alike,
        twins=tuple(twins),
        outputs=_compared_how(found, varied),
        constructed=built.again is not None,
        constants=isinstance(likenesses, Separate) and holds_constants_only(modules.values()),
        repeated=built.repeated,
        constant=built.constant,
    )


def assert_members_diverse(
    diversity: MemberDiversity, alike: Sequence[str] = (), *, seeded: bool = False
) -> None:
    """Checks that members start different, in every drawn parameter and in their outputs.

    Args:
        diversity: From `measure_member_diversity`.
        alike: Patterns (`fnmatch`) of parameters that members have in common by design, such as
            those of a shared trunk.
        seeded: Whether each member has a seed of its own by design, so that every construction
            gives the same ensemble.

    Raises:
        ValueError: If nothing was compared, or a pattern names no drawn parameter.
        AssertionError: If members are alike, or construction does not draw as it should.

    Example:
        >>> from copy import deepcopy
        >>> first = nn.Linear(4, 2)
        >>> assert_members_diverse(measure_member_diversity([first, deepcopy(first)]))
        Traceback (most recent call last):
        AssertionError: members 0, 1 are claimed to start different, and are alike
        ...
    """
    __tracebackhide__ = True
    for pattern in alike:
        if not any(fnmatchcase(name, pattern) for name in diversity.drawn):
            raise ValueError(
                f"no drawn parameter is named {pattern!r}, which is claimed alike. Names are, for "
                f"example, {listed(diversity.drawn, 3)}."
            )
    found = [
        likeness
        for likeness in diversity.alike
        if not any(fnmatchcase(likeness.name, pattern) for pattern in alike)
    ]
    _compared(diversity)
    if found or diversity.twins:
        raise AssertionError(_alike(diversity, found))
    if not seeded and (diversity.constant or diversity.repeated):
        rows = [
            (f"generator {name}", "in one state after construction, whatever it was before")
            for name in diversity.constant
        ]
        if diversity.repeated:
            rows.append(("initial weights", "the same in two constructions in a row"))
        raise AssertionError(
            broken(
                f"members {listed(diversity.members)} are claimed to draw their weights from the "
                "global generators, and do not",
                rows,
                total=f"{counted(diversity.drawn, 'drawn parameter')} in all",
                meaning="The members differ, and the next ensemble, with any seed, is this one "
                "again.",
                remedy=_SEEDED,
            )
        )


def assert_members_distinct(diversity: MemberDiversity) -> None:
    """Checks that no two members are one network: what any ensemble can claim.

    A parameter that construction is seen to draw must be drawn for each member. Where that cannot
    be seen, because members were given as objects or construction seeds, a parameter that is the
    same in several may come from a file, and members are one network where every parameter is
    alike, or their outputs are. Seeds of their own, one tensor that members share, copies with
    noise, and members that hold nothing but zeros, ones and other constants are no finding.

    Args:
        diversity: From `measure_member_diversity`.

    Raises:
        ValueError: If nothing was compared.
        AssertionError: If members are one network, or start alike in what is drawn.

    Example:
        >>> from copy import deepcopy
        >>> trunk = nn.Linear(4, 4)
        >>> pair = [nn.Sequential(deepcopy(trunk), nn.Linear(4, 2)) for _ in range(2)]
        >>> assert_members_distinct(measure_member_diversity(pair, torch.randn(5, 4)))
        >>> pair = [nn.Sequential(trunk), nn.Sequential(deepcopy(trunk))]
        >>> assert_members_distinct(measure_member_diversity(pair))
        Traceback (most recent call last):
        AssertionError: members 0, 1 are claimed to start different, and are alike
        ...
    """
    __tracebackhide__ = True
    if diversity.constants:
        return
    _compared(diversity)
    one_network = _one_network(diversity)
    seen = diversity.constructed and not diversity.constant
    found = [
        likeness
        for likeness in diversity.alike
        if set(likeness.members) & one_network
        or (seen and likeness.how != "one tensor" and not _is_related(likeness))
    ]
    if found or diversity.twins:
        raise AssertionError(_alike(diversity, found))


def _one_network(diversity: MemberDiversity) -> set[str]:
    """Members that are alike with one other in every drawn parameter."""
    names: dict[tuple[str, str], set[str]] = {}
    for likeness in diversity.alike:
        if _is_related(likeness) or likeness.how.startswith("equal in"):
            continue  # equal in a part, or not at all
        for pair in combinations(likeness.members, 2):
            names.setdefault(pair, set()).add(likeness.name)
    return {m for pair, alike in names.items() if alike >= set(diversity.drawn) for m in pair}


def _is_related(likeness: Likeness) -> bool:
    """Whether one tensor was made from others, and no number needs to be the same."""
    return likeness.how.startswith(("correlated", "weighted sums"))


def _in_both(
    one: Sequence[tuple[str, ...]], two: Sequence[tuple[str, ...]]
) -> list[tuple[str, ...]]:
    """The groups that two groupings have in common."""
    among = ([member for member in group if member in other] for group in one for other in two)
    return [tuple(group) for group in among if len(group) > 1]


def _compared(diversity: MemberDiversity) -> None:
    __tracebackhide__ = True
    if not diversity.drawn and diversity.outputs != "compared":
        raise ValueError(
            "no two members have a drawn parameter of one name and shape, and outputs say nothing "
            "of the members (they are the same for all rows, of different shapes, or none were "
            "given): give a batch, or a function that builds the model."
        )


def _compared_how(found: Mapping[str, Any], varied: Mapping[str, Sequence[Tensor]]) -> str:
    if not found:
        return "none given"
    shapes = {tuple(y.shape for y in ys) for ys in varied.values()}
    alone = len(shapes) == len(varied) > 1
    return "of different shapes" if alone else "compared" if varied else "constant"


# --- how the assertion looks --------------------------------------------------------------------

_SEEDED = (
    "Usual cause: torch.manual_seed(...) inside a constructor. Seed once, outside; in a "
    "constructor use torch.random.fork_rng(). Members with a seed each by design are claimed as "
    "seeded."
)


def _alike(diversity: MemberDiversity, found: Sequence[Likeness]) -> str:
    whole = {likeness.name for likeness in found if likeness.how in ("equal", "one tensor")}
    reordered = [likeness for likeness in found if "order" in likeness.how]
    rows = [(likeness.name, str(likeness)) for likeness in found]
    rows += [
        ("outputs", f"equal to rounding in members {listed(group)}") for group in diversity.twins
    ]
    related = [likeness for likeness in found if _is_related(likeness)]
    summed = [likeness for likeness in found if likeness.how.startswith("weighted sums")]
    shifted = [likeness for likeness in found if likeness.how.endswith("at other places")]
    every = whole | {likeness.name for likeness in reordered} >= set(diversity.drawn)
    if reordered and every and diversity.twins:
        meaning = "They are permuted twins: the weights differ, and the function is the same."
        remedy = "Usual cause: hidden units of a copy that were permuted. Draw each member anew."
    elif not found:
        meaning = (
            "Their weights differ, and the function is the same: they are twins (units permuted, "
            "scaled, or weights that the output does not use)."
            if diversity.drawn
            else "They are one network, however it was loaded."
        )
        remedy = "Draw each member anew, or load another checkpoint into each."
    elif {likeness.how for likeness in found} == {"one tensor"}:
        meaning, remedy = told_in_common(found[0].members, whole=_one_function(diversity, found))
    elif whole == set(diversity.drawn):
        meaning = (
            "They start as copies: on equal data they stay equal bit by bit, and the ensemble is "
            "one network at the price of several."
        )
        unseen = _COPIED if diversity.constructed else _COPIED_OR_SEEDED
        remedy = _SEEDED if diversity.constant else unseen
    elif reordered and len(reordered) == len(found):
        meaning = "These tensors hold the same numbers in another order: they were not drawn anew."
        remedy = _COPIED
    elif shifted and len(shifted) == len(found):
        meaning = (
            "Members draw from one stream of random numbers, each from another place in it: what "
            "one draws first, another draws later."
        )
        remedy = (
            "Usual cause: one seed for each, behind draws of another number. Seed once, outside."
        )
    elif summed and len(summed) == len(found):
        meaning = (
            "One of these members is made of the others, as their mean is: it adds no network to "
            "the ensemble."
        )
        remedy = (
            "Usual cause: an average of members (a soup, a merged checkpoint) that stands among "
            "them. Evaluate it beside the ensemble, or draw that member anew."
        )
    elif related and len(related) == len(found):
        meaning = "These tensors were scaled, negated or moved a little: they were not drawn anew."
        remedy = _COPIED
    else:
        meaning = (
            "Members that start alike in some layers have less to differ by than they seem: some "
            "weight differs, and not every one."
        )
        remedy = _SEEDED if diversity.constant else _PARTLY
    return broken(
        f"members {listed(diversity.members)} are claimed to start different, and are alike",
        rows,
        total=f"{len({likeness.name for likeness in found})} of "
        f"{counted(diversity.drawn, 'drawn parameter')}"
        + (
            f", outputs of {counted(range(_pairs(diversity.twins)), 'pair')}"
            if diversity.twins
            else ""
        ),
        meaning=meaning,
        remedy=remedy,
    )


_COPIED = (
    "Usual cause: deepcopy of one initialised network, one state dict loaded into several, or "
    "one seed for each. Build each member anew, without seeding in between."
)
_COPIED_OR_SEEDED = (
    "Usual cause: deepcopy of one initialised network, one state dict loaded into several, "
    "torch.manual_seed(...) inside a constructor, or one seed for each: which, a function that "
    "builds the members would show. Build each member anew, without seeding in between."
)
_PARTLY = (
    "Usual cause: a copy whose reset does not reach every layer (reset_parameters of some types "
    "only, or of direct children only), or one block built once and copied. Build each member "
    "anew, or claim by name what is alike by design."
)


def _one_function(diversity: MemberDiversity, found: Sequence[Likeness]) -> bool:
    """Whether the same members share all that is drawn, and nothing else makes them differ."""
    groups = {likeness.members for likeness in found}
    compared = diversity.outputs == "compared"
    return (
        len(groups) == 1
        and {likeness.name for likeness in found} == set(diversity.drawn)
        and (not compared or groups == set(diversity.twins))
    )


def _pairs(groups: Sequence[Sequence[str]]) -> int:
    return sum(math.comb(len(group), 2) for group in groups)
