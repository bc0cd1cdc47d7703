"""Which drawn parameters members have in common, and how: by their numbers, not by their names."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ensembles.case import Case
from ensembles.handling.members import named_modules_of
from ensembles.handling.memory import numbers_in, told_type
from ensembles.handling.state import generators_kept, restore_generators, seed_generators
from ensembles.instruments.recording import digest, generator_entries
from ensembles.subject import Model

__all__ = [
    "Alike",
    "Construction",
    "Likeness",
    "Similarity",
    "compared_modules",
    "compared_slices",
    "construction_of",
    "holds_constants_only",
    "is_constant",
]

ENOUGH_BITS = 20
"""Random bits that a tensor needs to be compared: one chance in a million to agree."""

SOME = 0.1
"""Share of drawn elements from which on two tensors agree in part: floats agree in none."""

CORRELATED = 0.9
"""Correlation of drawn elements, with one other tensor or with a weighted sum of the others, from
which on one tensor was made from the others."""

ENOUGH_TO_CORRELATE = 32
"""Elements from which on such a correlation is no accident: of two draws less than one in 1e11."""

ENOUGH_EACH = 8
"""Elements for each tensor in a weighted sum: of draws, more of them come nearer by chance."""

ONE_SUM = 1e-9
"""Added to a correlation of 1, so that tensors of which one is an exact sum have an inverse too."""

HASH = 6364136223846793005
"""Odd, so that no bit is lost; Knuth's multiplier of the linear congruential generator MMIX."""

LOOKED_AT = 4096
"""Elements of a tensor that are counted, shifted and correlated: enough to tell them from a few
values, and from draws."""


class Alike(StrEnum):
    """How the tensors of one name are alike in several members."""

    ONE_TENSOR = "one tensor"
    EQUAL = "equal"
    EQUAL_IN_PART = "equal in part"
    REORDERED = "equal in another order"
    SHIFTED = "equal at other places"
    CORRELATED = "correlated"
    SUMMED = "weighted sums"


@dataclass(frozen=True)
class Likeness:
    """A drawn parameter that several members have in common.

    Attributes:
        name: The parameter's name in the members, or in the model.
        members: The members that are alike.
        how: How they are.
        amount: The share of elements that are equal in part or at other places, or the
            correlation; None for the other kinds.
    """

    name: str
    members: tuple[str, ...]
    how: Alike
    amount: float | None = None


@dataclass(frozen=True)
class Similarity:
    """What was found in the trainable parameters of members.

    Attributes:
        drawn: Names of the parameters that are drawn and were compared.
        left_out: Names of those that are drawn and were not compared: they hold few random bits, no
            other member has one of that name and shape, or, of packed members, no axis divides.
        given: Names of those that are the same in several members, in every construction.
        alike: Whatever members have in common.
        correlated: How many elements were looked at for shifts and correlations, and of how many.
    """

    drawn: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    alike: tuple[Likeness, ...] = ()
    correlated: tuple[int, int] = (0, 0)


# --- construction -------------------------------------------------------------------------------


class Construction(NamedTuple):
    """What a second construction shows.

    Attributes:
        again: A second model, built right after the first; None where a model was given, or a
            function that returns one which was built before.
        reset: Generators that both constructions leave in one state.
        repeated: Whether both gave the same weights.
    """

    again: Model | None = None
    reset: tuple[str, ...] = ()
    repeated: bool = False


def construction_of(case: Case) -> Construction:
    """Builds one more model, from the state in which the first one left the generators.

    Raises:
        ValueError: If `make` fails, or builds some of the parameters anew only.

    Example:
        >>> construction_of(Case.of(lambda: nn.Linear(2, 2))).repeated
        False
    """
    one, left = case.model, case.after_make
    if left is None:
        return Construction()
    with generators_kept():
        seed_generators(case.seed)
        before = _generators()
        restore_generators(left)
        after = _generators()
        two = case.built(left)
        later = _generators()
    ours, theirs = _all_parameters(one), _all_parameters(two)
    kept = {id(p) for p in ours} & {id(p) for p in theirs}
    if kept and len(kept) == len({id(p) for p in (*ours, *theirs)}):
        return Construction()  # built before: it is given, and its construction cannot be seen
    if kept:
        raise ValueError(
            "the function returned some of the same parameters at both calls, so that construction "
            "cannot be looked at. Build the model inside it: lambda: [Net() for _ in range(4)]."
        )
    reset = tuple(
        name for name, state in before.items() if state != after.get(name) == later.get(name)
    )
    pairs = [(p, q) for p, q in zip(ours, theirs, strict=False) if not is_constant(p)]
    same = all(numbers_in(p).equal(numbers_in(q)) for p, q in pairs if p.shape == q.shape)
    return Construction(two, reset, bool(reset and pairs) and same)


def _generators() -> dict[str, str]:
    return {entry.name: entry.digest for entry in generator_entries()}


def _all_parameters(model: Model) -> list[nn.Parameter]:
    return [p for module in named_modules_of(model).values() for p in module.parameters()]


# --- parameters ---------------------------------------------------------------------------------


def is_constant(tensor: Tensor) -> bool:
    """Whether all elements are one number.

    Example:
        >>> is_constant(torch.zeros(3)), is_constant(torch.eye(2))
        (True, False)
    """
    values = numbers_in(tensor).flatten()
    return bool((values == values[0]).all()) if values.numel() else True


def _drawn_elements(tensor: Tensor, again: Tensor | None, seeded: bool) -> Tensor | None:
    """Which elements are drawn; None where none is."""
    if again is None or again.shape != tensor.shape or seeded:
        drawn = torch.full(tensor.shape, not is_constant(tensor))
    else:
        drawn = (tensor.detach() != again.detach()).cpu()
    return drawn if bool(drawn.any()) else None


def _bits(*tensors: Tensor) -> float:
    """Random bits in each of some tensors of one kind, by how many values they take."""
    values = torch.cat([tensor.detach().flatten()[:LOOKED_AT] for tensor in tensors]).tolist()
    distinct = len(set(values))
    return (
        math.inf if 2 * distinct > len(values) else tensors[0].numel() * math.log2(max(distinct, 1))
    )


class _Held(NamedTuple):
    """A drawn tensor of one member."""

    tensor: Tensor
    elements: Tensor
    """Which of them are drawn."""
    differing: Tensor | None
    """What two constructions draw differently, of the first ones; None where that is not known."""
    identity: int
    """The same for members that register one tensor."""


def compared_modules(
    modules: Mapping[str, nn.Module],
    again: Mapping[str, nn.Module] | None = None,
    *,
    seeded: bool = False,
) -> Similarity:
    """Compares members that are modules of their own.

    Args:
        modules: The members.
        again: Those of a second construction, where there was one.
        seeded: Whether construction seeds, so that a second one shows nothing of what is drawn.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> [str(found.how) for found in compared_modules({"a": layer, "b": layer}).alike]
        ['one tensor', 'one tensor']
    """
    seen: dict[str, None] = {}
    loaded: defaultdict[Any, list[str]] = defaultdict(list)
    holders: defaultdict[Any, dict[str, _Held]] = defaultdict(dict)
    for member, module in modules.items():
        others = {} if again is None else dict(again[member].named_parameters())
        for name, parameter in _trainable(module):
            values = numbers_in(parameter, name)
            other = numbers_in(others[name], name) if name in others else None
            elements = _drawn_elements(values, other, seeded)
            if elements is None:
                if not is_constant(values):
                    loaded[name, digest(values)].append(member)
                continue
            # Without a second construction the tensor itself says how many values it takes.
            told = [values]
            if other is not None and other.shape == values.shape:
                told += [] if torch.equal(values, other) else [other]
            seen[name] = None
            if _bits(*told) < ENOUGH_BITS:
                continue
            # What is the same in all constructions, such as an identity to which noise is added,
            # is in no difference.
            differing = _difference(*told) if len(told) > 1 and not seeded else None
            held = _Held(values.cpu(), elements, differing, id(parameter))
            holders[name, values.shape, values.dtype][member] = held
    several = [(name, held) for (name, *_), held in holders.items() if len(held) > 1]
    drawn = dict.fromkeys(name for name, _ in several)
    sizes = [next(iter(held.values())).tensor.numel() for _, held in several]
    return Similarity(
        drawn=tuple(drawn),
        left_out=tuple(name for name in seen if name not in drawn),
        given=tuple(dict.fromkeys(name for (name, _), among in loaded.items() if len(among) > 1)),
        alike=tuple(found for name, held in several for found in _in_common(name, held)),
        correlated=(sum(min(size, LOOKED_AT) for size in sizes), sum(sizes)),
    )


def _trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.numel():
            yield name, parameter


def _in_common(name: str, held: Mapping[str, _Held]) -> Iterator[Likeness]:
    """What several tensors of one name and shape have in common."""
    groups = _groups({member: digest(one.tensor) for member, one in held.items()})
    for group in groups:
        if len(group) > 1:
            one_tensor = len({held[member].identity for member in group}) == 1
            yield Likeness(name, group, Alike.ONE_TENSOR if one_tensor else Alike.EQUAL)
    firsts = [group[0] for group in groups]
    # Once for each, and not for each pair. Few values agree by chance, and in any order.
    many = {m: _bits(held[m].tensor) == math.inf for m in firsts[:-1]}
    near = {m: _neighbours(held[m].tensor) for m in firsts if any(many.values())}
    told: set[str] = set()
    for one, two in combinations(firsts, 2):
        relation = _relation(held[one], held[two], near[one], near[two]) if many[one] else None
        if relation is not None:
            told |= {one, two}
            yield Likeness(name, (one, two), *relation)
    if summed := _summed({m: held[m] for m in firsts if m not in told}):
        yield Likeness(name, summed, Alike.SUMMED)


def _relation(
    one: _Held, two: _Held, near: Tensor, also_near: Tensor
) -> tuple[Alike, float | None] | None:
    """How two tensors that are not equal are alike, and how much."""
    equal = one.tensor == two.tensor
    if bool(equal.any()):  # of two that were drawn, no element is
        elements = one.elements & two.elements
        share = int((equal & elements).sum()) / max(int(elements.sum()), 1)
        if share > SOME:
            return Alike.EQUAL_IN_PART, share
    if one.tensor.numel() > 1 and _reordered(one.tensor, two.tensor):
        return Alike.REORDERED, None
    if (share := _shifted(near, also_near)) > SOME:
        return Alike.SHIFTED, share
    if abs(by := _correlation(one.differing, two.differing)) > CORRELATED:
        return Alike.CORRELATED, by
    return None


def _correlation(x: Tensor | None, y: Tensor | None) -> float:
    """Of what two constructions draw differently; 0.0 where that is not known."""
    if x is None or y is None or x.numel() < ENOUGH_TO_CORRELATE:
        return 0.0
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1].nan_to_num(0.0))


def _summed(held: Mapping[str, _Held]) -> tuple[str, ...]:
    """Those whose tensor is a weighted sum of others, as a mean of members is, to a little."""
    drawn = {m: one.differing for m, one in held.items() if one.differing is not None}
    if len(drawn) < 3:
        return ()
    stacked = torch.stack(list(drawn.values()))
    if stacked.shape[1] < max(ENOUGH_TO_CORRELATE, ENOUGH_EACH * len(drawn)):
        return ()
    correlations = torch.corrcoef(stacked).nan_to_num(0.0)
    correlations.fill_diagonal_(1 + ONE_SUM)
    # What the others leave of a tensor's variance is 1 over the inverse's diagonal (Marquardt
    # 1970, "variance inflation factors").
    left = 1 / torch.linalg.inv(correlations).diagonal()
    least = 1 - CORRELATED**2
    return tuple(m for m, rest in zip(drawn, left.tolist(), strict=True) if rest < least)


def _difference(one: Tensor, two: Tensor) -> Tensor:
    """In float64, of the first elements."""
    x, y = (tensor.detach().flatten()[:LOOKED_AT].cpu().double() for tensor in (one, two))
    return x - y


def _reordered(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors hold the same numbers; sorted only where the extremes agree."""
    extremes = (one.aminmax(), two.aminmax())
    return extremes[0] == extremes[1] and torch.equal(
        one.flatten().sort()[0], two.flatten().sort()[0]
    )


def _shifted(x: Tensor, y: Tensor) -> float:
    """The share of the neighbours in a tensor that are neighbours in the other too, at any place.

    One stream of random numbers, of which one member has drawn a few before, gives the same numbers
    a few places on.
    """
    few = [min(len(pairs), LOOKED_AT // 2) for pairs in (x, y)]
    if min(few) < 2:
        return 0.0
    ahead, behind = torch.isin(x[: few[0]], y), torch.isin(y[: few[1]], x)
    return max(float(found.double().mean()) for found in (ahead, behind))


def _neighbours(tensor: Tensor) -> Tensor:
    """A number for every two elements in a row that stand there once, as zeros in a row do not."""
    bits = tensor.flatten()[:LOOKED_AT].double().view(torch.int64)
    pairs = bits[:-1] * HASH + (bits[1:] >> 1)  # of other signs, the highest bits would cancel
    _, place, often = torch.unique(pairs, return_inverse=True, return_counts=True)
    return pairs[often[place] == 1]


def compared_slices(
    module: nn.Module,
    members: Sequence[str],
    again: nn.Module | None = None,
    *,
    seeded: bool = False,
) -> Similarity:
    """Compares members in slices of one module's tensors, along an axis that divides by them.

    `again` and `seeded` are as in `compared_modules`; what several constructions have in common is
    not told apart by member.

    Example:
        >>> layer = nn.Linear(2, 8)
        >>> compared_slices(layer, ["a", "b"]).drawn, compared_slices(layer, ["a", "b"]).alike
        (('weight', 'bias'), ())
    """
    others = {} if again is None else dict(again.named_parameters())
    drawn: dict[str, bool] = {}
    alike: dict[Likeness, None] = {}
    for name, parameter in _trainable(module):
        values = numbers_in(parameter, name)
        if values.shape != parameter.shape:
            raise ValueError(
                f"{name} is of type {told_type(parameter)}: which of the tensors inside belong to "
                "which member is not known. Give the members as a list of modules."
            )
        other = numbers_in(others[name], name) if name in others else None
        if _drawn_elements(values, other, seeded) is None:
            continue
        drawn[name] = False
        for axis, size in enumerate(values.shape):
            slices = values.cpu().chunk(len(members), axis)
            if size % len(members) or any(is_constant(part) for part in slices):
                continue
            if min(_bits(part) for part in slices) >= ENOUGH_BITS:
                drawn[name] = True
                digests = {members[i]: digest(part) for i, part in enumerate(slices)}
                groups = [group for group in _groups(digests) if len(group) > 1]
                alike |= dict.fromkeys(Likeness(name, group, Alike.EQUAL) for group in groups)
    return Similarity(
        drawn=tuple(name for name, compared in drawn.items() if compared),
        left_out=tuple(name for name, compared in drawn.items() if not compared),
        alike=tuple(alike),
    )


def holds_constants_only(modules: Iterable[nn.Module]) -> bool:
    """Whether nothing in the members can have been drawn: they have parameters, all constants.

    Example:
        >>> holds_constants_only([nn.BatchNorm1d(3)]), holds_constants_only([nn.Linear(3, 2)])
        (True, False)
    """
    held = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    trained = any(tensor.requires_grad for tensor in held)
    return trained and all(is_constant(tensor) for tensor in held)


def _groups(kinds: Mapping[str, str]) -> list[tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for member, kind in kinds.items():
        found.setdefault(kind, []).append(member)
    return [tuple(group) for group in found.values()]
