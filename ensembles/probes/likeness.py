"""What members have in common at the start: drawn parameters, and outputs."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ensembles.message import listed
from ensembles.message import seed as present_seed
from ensembles.probes.recording import digest, generator_entries
from ensembles.probes.state import generators_kept, preserved, seed_generators
from ensembles.probes.training import fresh, hidden_modules
from ensembles.subject import Model, Outputs, member_outputs, named_modules_of
from ensembles.tolerance import tolerance_of

__all__ = [
    "Built",
    "Likeness",
    "Packed",
    "Separate",
    "built_from",
    "double_outputs",
    "holds_constants_only",
    "same_outputs",
    "vary",
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

RIDGE = 1e-9
"""Is added to a tensor's correlation with itself, so that an exact sum of others has an inverse."""

CLOSER = 0.01
"""Twins are closer to each other than a row is to others, by this factor at least."""

WOKEN = 0.5
"""What a trainable matrix of zeros is set to, to see what it will multiply: any number would do."""

HASH = 6364136223846793005
"""Odd, so that no bit is lost; Knuth's multiplier of the linear congruential generator MMIX."""

LOOKED_AT = 4096
"""Elements of a tensor that are counted: enough to tell numbers from a few values."""


@dataclass(frozen=True)
class Likeness:
    """A drawn parameter that several members have in common.

    Attributes:
        name: The parameter's name in the members, or in the model.
        members: The members that are alike.
        how: "one tensor", "equal", "equal in 50%" of its elements, "equal but for the order",
            "equal in 90% at other places", "correlated by 0.99", or "weighted sums of each
            other".
    """

    name: str
    members: tuple[str, ...]
    how: str

    def __str__(self) -> str:
        return f"{self.how} in members {listed(self.members)}"


# --- construction -------------------------------------------------------------------------------


class Built(NamedTuple):
    """A model, and what was seen of its construction.

    Attributes:
        model: The model.
        again: A second one, built right after it; None where a model was given, or a function
            that returns one which was built before.
        constant: Generators that both constructions leave in one state.
    """

    model: Model
    again: Model | None
    constant: tuple[str, ...]

    @property
    def repeated(self) -> bool:
        """Whether construction seeds, and gave the same weights twice in a row."""
        if self.again is None or not self.constant:
            return False
        one, two = (
            [p for module in named_modules_of(m).values() for p in module.parameters()]
            for m in (self.model, self.again)
        )
        pairs = [(p, q) for p, q in zip(one, two, strict=False) if not _is_constant(p)]
        return bool(pairs) and all(torch.equal(p, q) for p, q in pairs if p.shape == q.shape)


def built_from(model: Model | Callable[[], Model]) -> Built:
    """The model as given, or built twice in a row where a function was given.

    Raises:
        ValueError: If it is neither, or the function builds some of the parameters anew only.

    Example:
        >>> built_from(lambda: nn.Linear(2, 2)).repeated
        False
    """
    if isinstance(model, (nn.Module, Sequence, Mapping)):
        return Built(model, None, ())
    return _built_twice(model)


def _built_twice(make: Callable[[], Model]) -> Built:
    """Two constructions in a row, and the generators that both of them leave in one state."""
    if not callable(make):
        raise ValueError(
            f"the model is an object of type {type(make).__name__}: give a module, a list or dict "
            "of modules, or a function that builds one."
        )
    states = []
    with generators_kept():
        seed_generators(present_seed.get())
        built = []
        states.append(_generators())
        for _ in range(2):
            built.append(make())
            states.append(_generators())
    one, two = built
    ours = {id(p) for module in named_modules_of(one).values() for p in module.parameters()}
    theirs = {id(p) for module in named_modules_of(two).values() for p in module.parameters()}
    if ours and ours == theirs:  # built before: it is given, and its construction cannot be seen
        return Built(one, None, ())
    if ours & theirs:
        raise ValueError(
            "the function returned some of the same parameters at both calls, so that construction "
            "cannot be looked at. Build the model inside it: lambda: [Net() for _ in range(4)]."
        )
    before, after, later = states
    constant = [name for name, state in after.items() if before[name] != state == later[name]]
    return Built(one, two, tuple(constant))


def _generators() -> dict[str, str]:
    return {entry.name: entry.digest for entry in generator_entries()}


# --- parameters ---------------------------------------------------------------------------------


def _is_constant(tensor: Tensor) -> bool:
    values = tensor.detach().flatten()
    return bool((values == values[0]).all()) if values.numel() else True


def _drawn_elements(tensor: Tensor, again: Tensor | None, seeded: bool) -> Tensor | None:
    """Which elements are drawn; None where none is."""
    if again is None or again.shape != tensor.shape or seeded:
        drawn = torch.full(tensor.shape, not _is_constant(tensor))
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


class Separate:
    """Members that are modules of their own.

    Attributes:
        drawn: Names of the parameters that are drawn in at least two members.
        given: Names of those that are the same in several members, in every construction.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> pair = Separate({"a": layer, "b": layer}, None, False)
        >>> [str(likeness) for likeness in pair.found(["a", "b"])]
        ['one tensor in members a, b', 'one tensor in members a, b']
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        again: Mapping[str, nn.Module] | None,
        seeded: bool,
    ) -> None:
        self.drawn: dict[str, None] = {}
        self._holders: dict[Any, dict[str, tuple[Tensor, Tensor]]] = {}
        self._tensors: dict[tuple[str, str], int] = {}
        self._draws: dict[tuple[str, str], Tensor] = {}
        loaded: defaultdict[Any, list[str]] = defaultdict(list)
        holders: Any = defaultdict(dict)
        for member, module in modules.items():
            others = {} if again is None else dict(_parameters(again[member]))
            for name, parameter in _parameters(module):
                if not parameter.requires_grad or not parameter.numel():
                    continue
                other = others.get(name)
                elements = _drawn_elements(parameter, other, seeded)
                if elements is None:
                    if not _is_constant(parameter):
                        loaded[name, digest(parameter)].append(member)
                    continue
                # Without a second construction the tensor itself says how many values it takes.
                told = [parameter]
                if other is not None and other.shape == parameter.shape:
                    told += [] if torch.equal(parameter, other) else [other]
                if _bits(*told) >= ENOUGH_BITS:
                    kind = (name, parameter.shape, parameter.dtype)
                    holders[kind][member] = (parameter.detach().cpu(), elements)
                    self._tensors[name, member] = id(parameter)
                    if len(told) > 1 and not seeded:
                        # What is the same in all constructions, such as an identity to which noise
                        # is added, is in neither.
                        self._draws[name, member] = _difference(*told)
        for kind, held in holders.items():
            if len(held) > 1:
                self.drawn[kind[0]] = None
                self._holders[kind] = held
        self.given = tuple(
            dict.fromkeys(name for (name, _), among in loaded.items() if len(among) > 1)
        )

    def found(self, names: Sequence[str]) -> Iterator[Likeness]:
        """Whatever members have in common."""
        for (name, *_), held in self._holders.items():
            groups = _groups({m: digest(tensor) for m, (tensor, _) in held.items()})
            for group in groups:
                if len(group) > 1:
                    one_tensor = len({self._tensors[name, member] for member in group}) == 1
                    yield Likeness(name, group, "one tensor" if one_tensor else "equal")
            firsts = [group[0] for group in groups]
            # Once for each, and not for each pair. Few values agree by chance, and in any order.
            many = {m: _bits(held[m][0]) == math.inf for m in firsts[:-1]}
            near = {m: _neighbours(held[m][0]) for m in firsts if any(many.values())}
            pairs: list[Likeness] = []
            for one, two in combinations(firsts, 2):
                (x, drawn), (y, also) = held[one], held[two]
                if not many[one]:
                    continue
                equal, share = x == y, 0.0
                if bool(equal.any()):  # of two that were drawn, no element is
                    elements = drawn & also
                    share = int((equal & elements).sum()) / max(int(elements.sum()), 1)
                if share > SOME:
                    how = f"equal in {share:.0%}"
                elif x.numel() > 1 and _reordered(x, y):
                    how = "equal but for the order"
                elif (share := _shifted(near[one], near[two])) > SOME:
                    how = f"equal in {share:.0%} at other places"
                elif abs(by := self._correlation(name, one, two)) > CORRELATED:
                    how = f"correlated by {by:.2f}"
                else:
                    continue
                pairs.append(Likeness(name, (one, two), how))
            yield from pairs
            told = {member for pair in pairs for member in pair.members}
            if summed := self._summed(name, [member for member in firsts if member not in told]):
                yield Likeness(name, summed, "weighted sums of each other")

    def _correlation(self, name: str, one: str, two: str) -> float:
        """Of what two constructions draw differently; 0.0 where that is not known."""
        x, y = self._draws.get((name, one)), self._draws.get((name, two))
        if x is None or y is None or x.numel() < ENOUGH_TO_CORRELATE:
            return 0.0
        return float(torch.corrcoef(torch.stack([x, y]))[0, 1].nan_to_num(0.0))

    def _summed(self, name: str, members: Sequence[str]) -> tuple[str, ...]:
        """Those whose tensor is a weighted sum of others, as a mean of members is, to a little."""
        drawn = {m: x for m in members if (x := self._draws.get((name, m))) is not None}
        if len(drawn) < 3:
            return ()
        stacked = torch.stack(list(drawn.values()))
        if stacked.shape[1] < max(ENOUGH_TO_CORRELATE, ENOUGH_EACH * len(drawn)):
            return ()
        correlations = torch.corrcoef(stacked).nan_to_num(0.0)
        correlations.fill_diagonal_(1 + RIDGE)
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


class Packed:
    """Members in slices of one module's tensors, along an axis that divides by their number.

    Attributes:
        drawn: Names of the parameters that have such slices.
        given: Nothing: what several constructions have in common is not told apart by member.

    Example:
        >>> list(Packed(built_from(nn.Linear(2, 8)), 2).found(["a", "b"]))
        []
    """

    def __init__(self, built: Built, members: int) -> None:
        self.drawn: dict[str, None] = {}
        self.given: tuple[str, ...] = ()
        self._slices: list[tuple[str, tuple[Tensor, ...]]] = []
        (module,) = named_modules_of(built.model).values()
        again = {} if built.again is None else dict(_parameters(_only(built.again)))
        for name, parameter in _parameters(module):
            if not parameter.requires_grad or not parameter.numel():
                continue
            drawn = _drawn_elements(parameter, again.get(name), bool(built.constant))
            if drawn is None:
                continue
            for axis, size in enumerate(parameter.shape):
                slices = parameter.detach().cpu().chunk(members, axis) if size else ()
                if size % members or any(bool(_is_constant(part)) for part in slices):
                    continue
                if min(_bits(part) for part in slices) >= ENOUGH_BITS:
                    self.drawn[name] = None
                    self._slices.append((name, slices))

    def found(self, names: Sequence[str]) -> Iterator[Likeness]:
        """Slices that are equal."""
        told: dict[tuple[str, tuple[str, ...]], None] = {}
        for name, slices in self._slices:
            digests = {names[i]: digest(part) for i, part in enumerate(slices)}
            for group in _groups(digests):
                if len(group) > 1:
                    told[name, group] = None
        yield from (Likeness(name, group, "equal") for name, group in told)


def holds_constants_only(modules: Iterable[nn.Module]) -> bool:
    """Whether nothing in the members can have been drawn: they have parameters, all constants.

    Example:
        >>> holds_constants_only([nn.BatchNorm1d(3)]), holds_constants_only([nn.Linear(3, 2)])
        (True, False)
    """
    held = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    trained = any(tensor.requires_grad for tensor in held)
    return trained and all(_is_constant(tensor) for tensor in held)


def _parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters())


def _only(model: Model) -> nn.Module:
    (module,) = named_modules_of(model).values()
    return module


def _groups(kinds: Mapping[str, str]) -> list[tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for member, kind in kinds.items():
        found.setdefault(kind, []).append(member)
    return [tuple(group) for group in found.values()]


# --- outputs ------------------------------------------------------------------------------------


def double_outputs(
    model: Model, batch: Any, outputs: Outputs | None, *, woken: bool = False
) -> dict[str, tuple[Tensor, ...]]:
    """What members return in eval mode, in float64 where the model allows it.

    Args:
        model: One module, or the members.
        batch: What it is called with.
        outputs: Splits what one module returns.
        woken: Whether trainable matrices that are zero hold one other number, in a copy, so that
            what a branch that starts at zero (Hu et al. 2022) will compute is seen.

    Example:
        >>> double_outputs(nn.Linear(2, 1), torch.ones(3, 2), None)["model"][0].dtype
        torch.float64
    """
    try:
        wide = copy.deepcopy(model)
        if _held(wide) & _held(model):
            raise ValueError("an own __deepcopy__ gives the original, which is not converted")
        for module in named_modules_of(wide).values():
            module.double()
            for parameter in module.parameters() if woken else ():
                if parameter.ndim > 1 and parameter.requires_grad and not parameter.any():
                    # One number for all elements: what is a permuted twin stays one.
                    parameter.data.fill_(WOKEN)
        with generators_kept():  # of a copy nothing else needs to be kept
            return _called(wide, pytree.tree_map(_double, batch), outputs)
    except Exception:  # whatever a model does that knows one precision, or cannot be copied
        modules = list(named_modules_of(model).values())
        with preserved([*modules, *hidden_modules(modules)]):
            return _called(model, batch, outputs)


def _held(model: Model) -> set[int]:
    return {
        id(held)
        for given in named_modules_of(model).values()
        for held in (*given.modules(), *given.parameters(), *given.buffers())
    }


def _called(model: Model, batch: Any, outputs: Outputs | None) -> dict[str, tuple[Tensor, ...]]:
    modules = list(named_modules_of(model).values())
    for module in (*modules, *hidden_modules(modules)):
        module.eval()
    seed_generators(present_seed.get())
    with torch.no_grad():
        return member_outputs(model, fresh(batch), outputs=outputs)


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def vary(tensors: Sequence[Tensor]) -> bool:
    """Whether outputs depend on the row, or, of one row, are not all one number.

    Example:
        >>> vary([torch.eye(2)]), vary([torch.ones(2, 3)])
        (True, False)
    """
    return any(
        bool((y != y[:1]).any()) if y.ndim and y.shape[0] > 1 else not _is_constant(y)
        for y in tensors
    )


def same_outputs(found: Mapping[str, tuple[Tensor, ...]]) -> list[tuple[str, ...]]:
    """Groups of members whose outputs are the same to rounding.

    Example:
        >>> y = torch.randn(3, 2)
        >>> same_outputs({"a": (y,), "b": (y + 1,), "c": (y.clone(),)})
        [('a', 'c')]
    """
    groups: list[list[str]] = []
    for member, tensors in found.items():
        for group in groups:
            if _same(found[group[0]], tensors):
                group.append(member)
                break
        else:
            groups.append([member])
    return [tuple(group) for group in groups if len(group) > 1]


def _same(one: Sequence[Tensor], two: Sequence[Tensor]) -> bool:
    """Equal to rounding, and much closer to each other than rows are."""
    if [y.shape for y in one] != [y.shape for y in two]:
        return False
    for x, y in zip(one, two, strict=True):
        relative = tolerance_of("recomputed", x, y)
        x, y = x.double(), y.double()
        distance = float((x - y).abs().max()) if x.numel() else 0.0
        spread = float(x.std(0).max()) if x.ndim and x.shape[0] > 1 else math.inf
        if not distance <= min(relative * float(x.abs().max()), CLOSER * spread):
            return False
    return True
