"""Which rows of a batch reach which rows of the outputs: by values and by gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from ensembles.message import counted
from ensembles.message import seed as present_seed
from ensembles.probes.influence import probing
from ensembles.probes.state import preserved, seed_generators
from ensembles.probes.training import fresh, hidden_modules
from ensembles.subject import (
    Model,
    Outputs,
    checked_numbers,
    is_one_module,
    member_outputs,
    named_modules_of,
)

__all__ = ["Look", "look_at_rows"]

LOOKED_AT = 8
"""Rows that are replaced one by one: what mixes rows mixes more than one in eight."""

ROUNDING = 64
"""Units in the last place, of the largest output, that a kernel may differ by for other values."""

Found = Mapping[str, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Look:
    """What was seen of the rows.

    Attributes:
        members: The members' names.
        rows: How many rows the batch has.
        looked_at: How many of them were replaced and followed, one by one.
        pairs: (member, row of the input, row of the output) of rows that should be strangers.
        changes: For (member, row of the input), the largest change of a row that it should not
            reach, as a part of the largest output.
        moved: Members whose output depends on the place of a row.
        sized: Members whose output for a row is another when it stands alone.
        first: Where rows were first seen to mix.
        gradients: Whether gradients could be followed.
        random: Whether outputs are drawn.
        alone: Whether the model can be called on one row.
    """

    members: tuple[str, ...]
    rows: int
    looked_at: int
    pairs: tuple[tuple[str, int, int], ...]
    changes: Mapping[tuple[str, int], float]
    moved: tuple[str, ...]
    sized: tuple[str, ...]
    first: str
    gradients: bool
    random: bool
    alone: bool


def look_at_rows(
    model: Model,
    batch: Any,
    *,
    outputs: Outputs | None = None,
    training: bool = False,
    axis: int = 0,
    output_axis: int = 0,
) -> Look:
    """Replaces, follows, moves and isolates rows; arguments as `measure_batch_independence`.

    Raises:
        ValueError: As `measure_batch_independence`.

    Example:
        >>> look_at_rows(nn.Softmax(0), torch.randn(2, 3)).pairs
        (('model', 0, 1), ('model', 1, 0))
    """
    checked_numbers(model)
    modules = list(named_modules_of(model).values())
    bench = _Bench(model, batch, outputs, training, axis, output_axis)
    with preserved([*modules, *hidden_modules(modules)]) as start, torch.no_grad():
        bench.restore = start.restore
        base = bench.call(bench.batch)
        again = bench.call(bench.batch)
        if any(row for member in base for row in _differing(base[member], again[member])):
            raise ValueError(
                "two calls on one batch and one seed differ, so that nothing can be concluded "
                "from a change. Usual cause: random numbers from a generator that the seed does "
                "not reach, or state kept outside of buffers."
            )
        other = bench.call(bench.batch, seed=present_seed.get() + 1)
        random = any(row for member in base for row in _differing(base[member], other[member]))
        seen: dict[tuple[str, int], dict[int, float]] = {}
        for row in bench.chosen(bench.rows):
            changed = bench.call(bench.replaced(row))
            for member in base:
                own = bench.own_row(member, row)
                differing = _differing(base[member], changed[member])
                seen[member, row] = {i: size for i, size in differing.items() if i != own}
    by_gradient = bench.followed()
    pairs = {
        (member, row, i)
        for (member, row), found in seen.items()
        for i, size in found.items()
        if size > ROUNDING * bench.precision or (member, row, i) in (by_gradient or ())
    } | (by_gradient or set())
    changes = {(member, row): max(found.values()) for (member, row), found in seen.items() if found}
    moved: tuple[str, ...] = ()
    sized: tuple[str, ...] = ()
    alone, first = False, ""
    with preserved([*modules, *hidden_modules(modules)]) as start, torch.no_grad():
        bench.restore = start.restore
        if not pairs and not random:
            moved = bench.with_places(base)
            if not moved:
                sized, alone = bench.with_one_row(base)
        numerically = [pair for pair in sorted(pairs) if seen.get(pair[:2], {}).get(pair[2])]
        if numerically:
            first = bench.first_seen(numerically[0][1])
    return Look(
        members=tuple(base),
        rows=bench.rows,
        looked_at=len(bench.chosen(bench.rows)),
        pairs=tuple(sorted(pairs)),
        changes=changes,
        moved=moved,
        sized=sized,
        first=first,
        gradients=by_gradient is not None,
        random=random,
        alone=alone,
    )


class _Bench:
    """Calls the model on variations of one batch, always from the same state and seed."""

    def __init__(
        self,
        model: Model,
        batch: Any,
        outputs: Outputs | None,
        training: bool,
        axis: int,
        output_axis: int,
    ) -> None:
        self.model, self.batch, self.outputs = model, fresh(batch), outputs
        self.training, self.axis, self.output_axis = training, axis, output_axis
        self.restore: Callable[[], None] = lambda: None
        sizes = [x.shape[axis] for x in self._tensors() if x.ndim > axis]
        if not sizes:
            raise ValueError(f"the batch has no dense tensor with rows along axis {axis}.")
        self.rows = sizes[0]
        if self.rows < 2:
            raise ValueError(
                f"the batch has {self.rows} row along axis {axis}: give at least two, so that "
                "one can be replaced while another stays."
            )
        self.kept: dict[str, list[int]] = {}
        self.members: list[str] = []
        self.own_rows = self.rows
        self.precision = torch.finfo(torch.float32).eps

    def _tensors(self) -> list[Tensor]:
        leaves = pytree.tree_leaves(self.batch)
        return [x for x in leaves if isinstance(x, Tensor) and x.layout == torch.strided]

    def has_rows(self, x: Any) -> bool:
        return (
            isinstance(x, Tensor)
            and x.layout == torch.strided
            and x.ndim > self.axis
            and self.rows == x.shape[self.axis]
        )

    def chosen(self, rows: int) -> list[int]:
        """At most `LOOKED_AT` rows, evenly spread."""
        count = min(rows, LOOKED_AT)
        return [round(i * (rows - 1) / max(count - 1, 1)) for i in range(count)]

    def _set_modes(self) -> None:
        given = list(named_modules_of(self.model).values())
        for module in (*given, *hidden_modules(given)):
            module.train(self.training)
            for inner in module.modules():
                if isinstance(inner, _BatchNorm):
                    inner.training = False  # mixes rows in training mode by design

    def call(self, batch: Any, *, seed: int | None = None) -> dict[str, tuple[Tensor, ...]]:
        """Every member's outputs that have rows, with the rows as axis 0."""
        self.restore()
        self._set_modes()
        seed_generators(present_seed.get() if seed is None else seed)
        found = member_outputs(self.model, fresh(batch), outputs=self.outputs)
        if not self.kept:
            self._learn(found)
        return self._rows_first(found)

    def _rows_first(self, found: Found) -> dict[str, tuple[Tensor, ...]]:
        return {
            member: tuple(tensors[i].movedim(self.output_axis, 0) for i in self.kept[member])
            for member, tensors in found.items()
        }

    def _learn(self, found: Found) -> None:
        """Which outputs have rows, and whose rows they are."""
        self.members = list(found)
        ends = self.output_axis
        for own in (self.rows, self.rows // len(found)):
            kept = {
                member: [i for i, y in enumerate(ys) if y.ndim > ends and y.shape[ends] == own]
                for member, ys in found.items()
            }
            if all(kept.values()) and own in (self.rows, self.rows / len(found)):
                self.kept, self.own_rows = kept, own
                break
        else:
            member = next(m for m, indices in kept.items() if not indices)
            shapes = ", ".join(str(tuple(y.shape)) for y in found[member])
            raise ValueError(
                f"the batch has {self.rows} rows, and the output of member {member} has shape "
                f"{shapes}: there is no row for each of them along axis {ends}. Give "
                "output_axis=..., or outputs=a function that returns what has rows."
            )
        tensors = [found[m][i] for m, indices in self.kept.items() for i in indices]
        if not all(y.isfinite().all() for y in tensors):
            raise ValueError(
                "the outputs hold NaN or infinity: nothing can be concluded from them."
            )
        self.precision = max(torch.finfo(y.dtype).eps for y in tensors)

    def own_row(self, member: str, row: int) -> int | None:
        """The row of a member's output that a row of the input belongs to; None for another's."""
        if self.own_rows == self.rows:
            return row
        chunk, own = divmod(row, self.own_rows)
        return own if self.members[chunk] == member else None

    # --- variations of the batch

    def replaced(self, row: int) -> Any:
        """The batch with one other row: another's content, and noise on what is floating."""
        generator = torch.Generator().manual_seed(row)
        donors = [(row + step) % self.rows for step in range(1, self.rows)]
        for donor in donors:
            leaves, form = pytree.tree_flatten(self.batch)
            changed = [self._with_row(x, row, donor, generator) for x in leaves]
            pairs = zip(leaves, changed, strict=True)
            if any(self.has_rows(x) and not torch.equal(x, y) for x, y in pairs):
                return pytree.tree_unflatten(changed, form)
        raise ValueError(
            f"row {row} of the batch equals all others, so that it cannot be replaced by another "
            "one. Give a batch whose rows differ."
        )

    def _with_row(self, x: Any, row: int, donor: int, generator: torch.Generator) -> Any:
        if not self.has_rows(x):
            return x
        other = x.select(self.axis, donor)
        if x.is_floating_point() and not _is_mask(x):
            # Far enough that a maximum over all rows is another.
            noise = torch.randn(other.shape, generator=generator, dtype=torch.float32).to(other)
            other = other + 3 * noise * x.std().clamp(min=1e-2)
            other = other.abs() if bool((x >= 0).all()) else other
        return x.index_copy(
            self.axis, torch.tensor([row], device=x.device), other.unsqueeze(self.axis)
        )

    def _indexed(self, index: Sequence[int]) -> Any:
        return pytree.tree_map(
            lambda x: (
                x.index_select(self.axis, torch.tensor(index, device=x.device))
                if self.has_rows(x)
                else x
            ),
            self.batch,
        )

    def with_places(self, base: Found) -> tuple[str, ...]:
        """Members whose output for a row is another in the next place."""
        own = [*range(1, self.own_rows), 0]
        index = [
            start + i for start in range(0, self.rows, self.own_rows) for i in own
        ]  # each member's rows stay its own
        changed = self.call(self._indexed(index))
        expected = {member: tuple(y[own] for y in ys) for member, ys in base.items()}
        return tuple(m for m in base if self._unlike(expected[m], changed[m]))

    def with_one_row(self, base: Found) -> tuple[tuple[str, ...], bool]:
        """Members whose first row is another when it stands alone, and whether it can."""
        try:
            self.restore()
            self._set_modes()
            seed_generators(present_seed.get())
            alone = self._indexed(range(0, self.rows, self.own_rows))
            found = member_outputs(self.model, fresh(alone), outputs=self.outputs)
            kept = {m: tuple(found[m][i] for i in indices) for m, indices in self.kept.items()}
        except (ValueError, IndexError, KeyError):
            return (), False
        ends = self.output_axis
        rightly = {m: all(y.ndim > ends and y.shape[ends] == 1 for y in kept[m]) for m in kept}
        return tuple(
            m
            for m in kept
            if not rightly[m]
            or self._unlike(
                tuple(y[:1] for y in base[m]), tuple(y.movedim(ends, 0) for y in kept[m])
            )
        ), True

    def _unlike(self, one: Sequence[Tensor], two: Sequence[Tensor]) -> bool:
        if [y.shape for y in one] != [y.shape for y in two]:
            return True
        tolerance: float = self.precision**0.5
        return max(_differing(one, two).values(), default=0.0) > tolerance

    # --- gradients

    def followed(self) -> set[tuple[str, int, int]] | None:
        """Pairs of strangers by gradient; None where gradients cannot be followed."""
        for values in ("generic", "present"):
            sources = _Sources(self)
            try:
                with (
                    sources.watched(),
                    probing(
                        self.model,
                        self.batch,
                        outputs=self.outputs,
                        training=False,
                        values=values,
                    ) as probe,
                ):
                    if not sources.tensors:
                        return None
                    return self._gradient_pairs(self._rows_first(probe.outputs), sources.tensors)
            except (ValueError, RuntimeError):
                continue
        return None

    def _gradient_pairs(self, found: Found, sources: list[Tensor]) -> set[tuple[str, int, int]]:
        pairs = set()
        for member, tensors in found.items():
            live = [y for y in tensors if y.requires_grad]
            for i in self.chosen(self.own_rows) if live else ():
                ends = [y[i] for y in live]
                gradients = torch.autograd.grad(
                    ends,
                    sources,
                    [torch.rand_like(y) + 0.5 for y in ends],
                    retain_graph=True,
                    allow_unused=True,
                )
                for gradient in gradients:
                    if gradient is None:
                        continue
                    rows = gradient.to_dense().movedim(self.axis, 0)
                    rows = rows.reshape(len(rows), -1)
                    for row in (rows != 0).any(1).nonzero().flatten().tolist():
                        if self.own_row(member, row) != i:
                            pairs.add((member, row, i))
        return pairs

    # --- where

    def first_seen(self, row: int) -> str:
        """The first module whose output mixes rows, or before which they were mixed."""
        records = []
        for batch in (self.batch, self.replaced(row)):
            with _recorded(self.model) as record:
                self.call(batch)
            records.append(record)
        for one, two in zip_longest(*records):
            if one is None or two is None or one.name != two.name:
                return ""
            if self._mixed(one.inputs, two.inputs, row):
                return f"before {one.name}"
            if self._mixed(one.outputs, two.outputs, row):
                return f"in {one.name}"
        return ""

    def _mixed(self, one: Sequence[Tensor], two: Sequence[Tensor], row: int) -> bool:
        for x, y in zip(one, two, strict=False):
            if self.has_rows(x) and x.shape == y.shape:
                differing = _differing([x.movedim(self.axis, 0)], [y.movedim(self.axis, 0)])
                if any(
                    i != row and size > ROUNDING * self.precision for i, size in differing.items()
                ):
                    return True
        return False


class _Sources:
    """What is differentiated by: floating inputs, and embeddings of integer inputs."""

    def __init__(self, bench: _Bench) -> None:
        self._bench = bench
        self._found: dict[int, Tensor] = {}

    @property
    def tensors(self) -> list[Tensor]:
        return list(self._found.values())

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, calls of the model mark their inputs."""
        given = list(named_modules_of(self._bench.model).values())
        handles: list[Any] = [
            module.register_forward_pre_hook(self._mark, with_kwargs=True)
            for module in dict.fromkeys(given)
        ]
        handles += [
            inner.register_forward_hook(self._mark_embedded)
            for inner in dict.fromkeys(i for module in given for i in module.modules())
            if isinstance(inner, nn.Embedding)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _mark(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        for x in pytree.tree_leaves((args, kwargs)):
            if self._bench.has_rows(x) and x.is_floating_point() and x.is_leaf:
                x.requires_grad_()
                self._found[id(x)] = x

    def _mark_embedded(self, module: nn.Module, args: Any, output: Tensor) -> None:
        read = args[0] if args else None
        given = [x for x in self._bench._tensors() if self._bench.has_rows(x)]
        # Only what reads the batch: positions are the same for all rows.
        if any(
            isinstance(read, Tensor)
            and (read.shape, read.dtype) == (x.shape, x.dtype)
            and torch.equal(read, x)
            for x in given
        ):
            self._found[id(output)] = output


class _Record(NamedTuple):
    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@contextmanager
def _recorded(model: Model) -> Iterator[list[_Record]]:
    """What every module reads and returns, in the order in which they end."""
    records: list[_Record] = []
    handles = []

    def tensors(value: Any) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in pytree.tree_leaves(value) if isinstance(x, Tensor))

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            records.append(_Record(name, tensors((args, kwargs)), tensors(output)))

        return hook

    for member, given in named_modules_of(model).items():
        for name, module in given.named_modules():
            place = name if is_one_module(model) else f"{member}.{name}".rstrip(".")
            place = f"{place} ({type(module).__name__})" if place else type(module).__name__
            handles.append(module.register_forward_hook(hook_of(place), with_kwargs=True))
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def _differing(one: Sequence[Tensor], two: Sequence[Tensor]) -> dict[int, float]:
    """Rows that differ in a bit, with the largest difference as a part of the largest value."""
    found: dict[int, float] = {}
    for x, y in zip(one, two, strict=True):
        if x.shape != y.shape:
            raise ValueError(
                f"an output of shape {tuple(x.shape)} has shape {tuple(y.shape)} when one of "
                f"{counted(range(x.shape[0]), 'row')} is replaced, so that rows cannot be "
                "compared. Give rows of one length."
            )
        x, y = (t.detach().double().reshape(len(t), -1) for t in (x, y))
        size = float(x.nan_to_num().abs().max()) if x.numel() else 0.0
        unlike = ~((x == y) | (x.isnan() & y.isnan()))
        for row in unlike.any(1).nonzero().flatten().tolist():
            change = float((x[row] - y[row])[unlike[row]].abs().nan_to_num(torch.inf).max())
            found[row] = max(found.get(row, 0.0), change / size if size else change)
    return found


def _is_mask(x: Tensor) -> bool:
    return bool(((x == 0) | (x == 1)).all()) or bool((x.isinf() | (x == 0) | (x <= -1e4)).all())
