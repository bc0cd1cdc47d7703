"""The measurement of `cost`, and its assertions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ensembles.case import Case
from ensembles.checks.cost.claim import CostClaim
from ensembles.checks.cost.cost_passes import actual_pass, zeros_of
from ensembles.checks.cost.meter import Kept, Meter, Operation
from ensembles.handling.members import named_modules_of
from ensembles.handling.numbers import checked_initialised, checked_numbers
from ensembles.handling.registered_tensors import Registered, registered
from ensembles.instruments.storage import shared_memory
from ensembles.message import SHOWN_ROWS, aligned, broken, listed
from ensembles.subject import Model, Outputs

__all__ = [
    "ComputeCost",
    "LayerCost",
    "OperationCost",
    "assert_cost_equals",
    "assert_cost_within",
    "measure",
    "measure_compute_cost",
]


@dataclass(frozen=True)
class OperationCost:
    """What one product in the source of a layer costs, however often the layer is called.

    Attributes:
        name: "convolution", "product", "batched product", "attention" or "recurrence", with a
            number behind the first of them.
        forward: FLOPs of the forward pass.
        backward: FLOPs of the backward pass.
        wasted_flops: How many of both multiply by a structural zero; None where nobody looked.
    """

    name: str
    forward: int
    backward: int
    wasted_flops: int | None

    @property
    def flops(self) -> int:
        """FLOPs of both passes."""
        return self.forward + self.backward


@dataclass(frozen=True)
class LayerCost:
    """What one module costs by itself, without the modules inside it.

    Attributes:
        name: Path of the module, with the member in front where there are several; "" for the
            model itself.
        operations: Its products, in the order in which they run.
        parameters: Elements of the parameters that it registers, and nobody before it.
        kept_bytes: Bytes that it keeps for the backward pass, and nobody before it.
    """

    name: str
    operations: tuple[OperationCost, ...]
    parameters: int
    kept_bytes: int

    @property
    def forward(self) -> int:
        """FLOPs of the forward pass."""
        return sum(operation.forward for operation in self.operations)

    @property
    def backward(self) -> int:
        """FLOPs of the backward pass."""
        return sum(operation.backward for operation in self.operations)

    @property
    def flops(self) -> int:
        """FLOPs of both passes."""
        return self.forward + self.backward

    @property
    def wasted_flops(self) -> int | None:
        """FLOPs that multiply by a structural zero; None where nobody looked."""
        return _sum(operation.wasted_flops for operation in self.operations)


@dataclass(frozen=True)
class ComputeCost:
    """What a call of a model costs, in whole numbers; in all, and by layer.

    Attributes:
        layers: Every module that costs something by itself, in the order of registration.
        parameters: Elements of all parameters; memory that has several names counts once.
        buffers: Elements of all buffers, likewise.
        kept_bytes: Bytes that are kept for the backward pass.
        kept_weight_bytes: How many of them are copies of weights: computed from parameters and
            buffers alone, such as a weight under its mask.
        kept_zero_bytes: How many of them are structural zeros; None where nobody looked.
        training: Whether the call was a training step, with a backward pass.
        uncounted: Operations that multiply, and for which there is no formula.
    """

    layers: tuple[LayerCost, ...]
    parameters: int
    buffers: int
    kept_bytes: int
    kept_weight_bytes: int
    kept_zero_bytes: int | None
    training: bool
    uncounted: tuple[str, ...] = ()

    @property
    def forward(self) -> int:
        """FLOPs of the forward pass."""
        return sum(layer.forward for layer in self.layers)

    @property
    def backward(self) -> int:
        """FLOPs of the backward pass; 0 in evaluation."""
        return sum(layer.backward for layer in self.layers)

    @property
    def flops(self) -> int:
        """FLOPs of both passes."""
        return self.forward + self.backward

    @property
    def wasted_flops(self) -> int | None:
        """FLOPs that multiply by a structural zero; None on the meta device."""
        return _sum(layer.wasted_flops for layer in self.layers)

    @property
    def wasted(self) -> Fraction | None:
        """The share of FLOPs that multiply by a structural zero; None on the meta device."""
        return _share(self.wasted_flops, self.flops)

    @property
    def wasted_kept(self) -> Fraction | None:
        """The share of kept bytes that are structural zeros; None on the meta device."""
        return _share(self.kept_zero_bytes, self.kept_bytes)

    def layer(self, name: str) -> LayerCost:
        """The layer of this name.

        Raises:
            KeyError: If there is none that costs something.
        """
        found = {layer.name: layer for layer in self.layers}
        if name not in found:
            raise KeyError(f"no layer {name!r} costs something; layers are {listed(list(found))}")
        return found[name]

    def table(self, most: int | None = None) -> str:
        """The cost of every layer.

        Args:
            most: How many layers are shown, those with most FLOPs; by default all that have FLOPs
                or keep something.
        """
        busy = [layer for layer in self.layers if layer.flops or layer.kept_bytes]
        shown = set(sorted(busy, key=lambda layer: (-layer.flops, -layer.kept_bytes))[:most])
        rows = [
            (
                layer.name or "(model)",
                f"{layer.forward:,}",
                f"{layer.backward:,}",
                _percent(_share(layer.wasted_flops, layer.flops)),
                f"{layer.parameters:,}",
                f"{layer.kept_bytes:,}",
            )
            for layer in self.layers
            if layer in shown
        ]
        total = (
            "in all",
            f"{self.forward:,}",
            f"{self.backward:,}",
            _percent(self.wasted),
            f"{self.parameters:,}",
            f"{self.kept_bytes:,}",
        )
        lines = _columns([_HEAD, *rows, total])
        if len(busy) > len(rows):
            lines.insert(-1, f"... {len(busy) - len(rows)} more, with no more FLOPs each")
        if len(self.layers) > len(busy):
            lines.insert(-1, f"... {len(self.layers) - len(busy)} more, with parameters only")
        return "\n".join(lines)

    def __str__(self) -> str:
        of_zeros = self.wasted is not None and f", {_percent(self.wasted)} of them on zeros"
        passes = "forward and backward" if self.training else "forward, in evaluation"
        head = f"{self.flops:,} FLOPs {passes}{of_zeros or ''}; {self.parameters:,} parameters"
        lines = [f"{head}; {self.kept_bytes:,} bytes kept" if self.training else head]
        lines += [f"  {line}" for line in self.table(SHOWN_ROWS).splitlines()]
        if self.buffers:
            lines.append(f"  buffers: {self.buffers:,} elements")
        if self.kept_weight_bytes:
            lines.append(f"  kept copies of weights: {self.kept_weight_bytes:,} bytes")
        if self.kept_zero_bytes:
            told = f"{self.kept_zero_bytes:,} bytes, {_percent(self.wasted_kept)}"
            lines.append(f"  kept zeros: {told}")
        if self.wasted is None:
            lines.append("  zeros were not looked for: there are no numbers on the meta device")
        if self.uncounted:
            lines.append(f"  not counted, for want of a formula: {listed(self.uncounted)}")
        return "\n".join(lines)


_HEAD = ("layer", "FLOPs forward", "FLOPs backward", "on zeros", "parameters", "bytes kept")


def measure_compute_cost(
    model: Model, batch: Any, *, outputs: Outputs | None = None, training: bool = True
) -> ComputeCost:
    """Counts FLOPs, parameters, bytes kept for backward, and multiplications by zero.

    Args:
        model: One module, or the members as a list or dict of modules, each called on the batch.
        batch: What the model is called with. On the meta device nothing is computed; then zeros
            are not looked for.
        outputs: Splits what one module returns into member outputs; the backward pass begins at
            all of them.
        training: Whether a training step is measured (training mode, forward and backward), or a
            prediction (evaluation mode, forward without gradients).

    Returns:
        The cost, exactly. It takes two passes, one as the model is and one with generic values.

    Raises:
        ValueError: If the model cannot be called, a parameter is lazy or holds no usable numbers,
            there is nothing to count, or the outputs hold no floating tensor.

    Example:
        >>> cost = measure_compute_cost(nn.Linear(3, 4), torch.randn(2, 3), training=False)
        >>> cost.forward == 2 * 2 * 3 * 4, cost.parameters == 3 * 4 + 4
        (True, True)
    """
    __tracebackhide__ = True
    modules = named_modules_of(model)
    entries = registered(modules)
    for entry in entries:
        checked_initialised(entry.tensor, f"{entry.kind} {entry.names[0]}")
    given = [x for x in pytree.tree_leaves(batch) if isinstance(x, Tensor)]
    on_meta = any(x.is_meta for x in [*given, *(entry.tensor for entry in entries)])
    if not on_meta:
        checked_numbers(model)
    meter = Meter(modules, batch)
    kept, trained = actual_pass(model, batch, outputs, training, meter, check=not on_meta)
    wasted: Mapping[Operation, int] | None = None
    zero_bytes = None
    if not on_meta and (meter.counts or entries):
        wasted, zero_bytes = zeros_of(model, batch, outputs, training, meter, kept, trained)
    parameters = _elements(model, entries, "parameter")
    cost = ComputeCost(
        layers=_layers(meter, kept, wasted, parameters),
        parameters=sum(parameters.values()),
        buffers=sum(_elements(model, entries, "buffer").values()),
        kept_bytes=sum(piece.bytes for piece in kept),
        kept_weight_bytes=sum(piece.bytes for piece in kept if piece.of_weights),
        kept_zero_bytes=zero_bytes,
        training=training,
        uncounted=tuple(meter.uncounted),
    )
    if not cost.layers:
        raise ValueError(
            "the model multiplies nothing, has no parameters and keeps nothing for the backward "
            "pass: there is no cost to measure."
        )
    return cost


def assert_cost_within(
    cost: ComputeCost,
    *,
    flops: int | None = None,
    parameters: int | None = None,
    kept_bytes: int | None = None,
    wasted: float | Fraction | None = None,
) -> None:
    """Checks that a call costs no more than its budgets.

    Args:
        cost: From `measure_compute_cost`.
        flops: FLOPs of both passes, at most.
        parameters: Elements of all parameters, at most.
        kept_bytes: Bytes that are kept for the backward pass, at most.
        wasted: The share of FLOPs that multiply by structural zeros, 0 to 1, at most.

    Raises:
        ValueError: If there is no budget, if it is none, or if it is about something that was not
            looked at.
        AssertionError: If the cost exceeds a budget.

    Example:
        >>> cost = measure_compute_cost(nn.Linear(3, 4), torch.randn(2, 3))
        >>> assert_cost_within(cost, flops=100, parameters=16, wasted=0)
    """
    __tracebackhide__ = True
    asked = {
        "FLOPs": flops,
        "parameters": parameters,
        "bytes kept": kept_bytes,
        "share of zeros": wasted,
    }
    budgets = _budgets(cost, asked)
    found = _found(cost)
    exceeded = {name: limit for name, limit in budgets.items() if found[name] > limit}
    if exceeded:
        _fail(cost, exceeded, "at most ")


def assert_cost_equals(
    cost: ComputeCost,
    *,
    flops: int | None = None,
    forward: int | None = None,
    backward: int | None = None,
    parameters: int | None = None,
    buffers: int | None = None,
    kept_bytes: int | None = None,
    wasted: float | Fraction | None = None,
) -> None:
    """Checks that a call costs exactly what is claimed.

    Args:
        cost: From `measure_compute_cost`.
        flops: FLOPs of both passes.
        forward: FLOPs of the forward pass.
        backward: FLOPs of the backward pass.
        parameters: Elements of all parameters.
        buffers: Elements of all buffers.
        kept_bytes: Bytes that are kept for the backward pass.
        wasted: The share of FLOPs that multiply by structural zeros; a `Fraction` is exact.

    Raises:
        ValueError: If nothing is claimed, or something that was not looked at.
        AssertionError: If the cost is another.

    Example:
        >>> cost = measure_compute_cost(nn.Linear(3, 4), torch.randn(2, 3))
        >>> assert_cost_equals(cost, forward=48, parameters=16)
    """
    __tracebackhide__ = True
    asked = {
        "FLOPs": flops,
        "FLOPs forward": forward,
        "FLOPs backward": backward,
        "parameters": parameters,
        "buffers": buffers,
        "bytes kept": kept_bytes,
        "share of zeros": wasted,
    }
    budgets = _budgets(cost, asked)
    found = _found(cost)
    other = {name: claim for name, claim in budgets.items() if found[name] != claim}
    if other:
        _fail(cost, other, "")


# --- how it is measured -------------------------------------------------------------------------


def _layers(
    meter: Meter,
    kept: list[Kept],
    wasted: Mapping[Operation, int] | None,
    parameters: Mapping[str, int],
) -> tuple[LayerCost, ...]:
    operations: dict[str, list[OperationCost]] = defaultdict(list)
    for operation, counts in meter.counts.items():
        operations[operation.layer].append(
            OperationCost(
                operation.kind + (f" {operation.number}" if operation.number > 1 else ""),
                counts.forward,
                counts.backward,
                None if wasted is None else wasted.get(operation, 0),
            )
        )
    elements: Counter[str] = Counter()
    for name, count in parameters.items():
        elements[name] += count
    bytes_of: Counter[str] = Counter()
    for piece in kept:
        bytes_of[piece.layer] += piece.bytes
    return tuple(
        LayerCost(name, tuple(operations[name]), elements[name], bytes_of[name])
        for name in dict.fromkeys([*meter.paths.values(), *operations, *bytes_of])
        if operations[name] or elements[name] or bytes_of[name]
    )


def _elements(model: Model, entries: list[Registered], kind: str) -> dict[str, int]:
    """Layer to the elements of the tensors that it registers, all memory once."""
    named = named_modules_of(model)
    alone = list(named) == ["model"]

    def layer(name: str) -> str:
        path = name.rpartition(".")[0]
        return path.partition(".")[2] if alone else path

    counts: Counter[str] = Counter()
    homes: dict[str, Registered] = {}
    for entry in entries:
        homes.update(dict.fromkeys(entry.names, entry))
        if entry.kind == kind:
            counts[layer(entry.names[0])] += _distinct(entry.tensor)
    for memory in shared_memory(named_modules_of(model))[1]:
        holders = {
            id(homes[name].tensor): homes[name]
            for name in (str(place) for place in memory.places if place.kind == kind)
            if name in homes
        }
        # The first to be registered owns the memory; the others are views of it.
        for entry in list(holders.values())[1:]:
            counts[layer(entry.names[0])] -= memory.bytes // entry.tensor.element_size()
    return dict(counts)


def _distinct(tensor: Tensor) -> int:
    """Elements, without the repeats of an expanded tensor."""
    if tensor.layout is not torch.strided:
        return int(tensor._values().numel()) if tensor.is_sparse else tensor.numel()
    total = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        total *= size if stride or not size else 1
    return total


# --- how it is told -----------------------------------------------------------------------------


def _budgets(cost: ComputeCost, asked: Mapping[str, Any]) -> dict[str, Any]:
    __tracebackhide__ = True
    budgets = {name: limit for name, limit in asked.items() if limit is not None}
    if not budgets:
        raise ValueError(
            "no budget was given: there is nothing to compare. Give one or more of "
            f"{', '.join(_ARGUMENTS[name] for name in asked)}."
        )
    for name, limit in budgets.items():
        argument = _ARGUMENTS[name]
        number = isinstance(limit, (int, float, Fraction)) and not isinstance(limit, bool)
        share = name == "share of zeros"
        if not number or not limit >= 0 or (share and limit > 1):
            raise ValueError(
                f"{argument}={limit!r} is no budget: it is "
                + ("a share from 0 to 1." if share else "a whole number, 0 or more.")
            )
        if not share and not isinstance(limit, int):
            raise ValueError(f"{argument}={limit!r} is no budget: it is a whole number, 0 or more.")
    if "share of zeros" in budgets and cost.wasted is None:
        raise ValueError(
            "zeros were not looked for, because there are no numbers on the meta device. Measure "
            "the model on a real device, or leave out wasted=..."
        )
    if "bytes kept" in budgets and not cost.training:
        raise ValueError(
            "a prediction keeps nothing for a backward pass: measure the cost with training=True, "
            "or leave out kept_bytes=..."
        )
    if cost.uncounted and budgets.keys() & {"FLOPs", "FLOPs forward", "FLOPs backward"}:
        raise ValueError(
            f"there is no formula for the FLOPs of {listed(cost.uncounted)}, which the model "
            "calls, so that a budget would say nothing."
        )
    return budgets


_ARGUMENTS = {
    "FLOPs": "flops",
    "FLOPs forward": "forward",
    "FLOPs backward": "backward",
    "parameters": "parameters",
    "buffers": "buffers",
    "bytes kept": "kept_bytes",
    "share of zeros": "wasted",
}


def _found(cost: ComputeCost) -> dict[str, Any]:
    return {
        "FLOPs": cost.flops,
        "FLOPs forward": cost.forward,
        "FLOPs backward": cost.backward,
        "parameters": cost.parameters,
        "buffers": cost.buffers,
        "bytes kept": cost.kept_bytes,
        "share of zeros": cost.wasted or 0,
    }


def _fail(cost: ComputeCost, claims: Mapping[str, Any], at_most: str) -> None:
    __tracebackhide__ = True
    found = _found(cost)
    main = next(iter(claims))
    rows = [
        ("in all", f"expected {at_most}{_told(name, limit)}", f"found {_told(name, found[name])}")
        for name, limit in claims.items()
    ]
    rows += [(layer.name or "(model)", "", told) for layer, told in _places(cost, main)]
    meaning, remedy = _EXPLANATIONS[main.removesuffix(" forward").removesuffix(" backward")]
    call = "a training step" if cost.training else "a prediction"
    raise AssertionError(
        broken(
            f"{call} is claimed to take {at_most}"
            f"{' and '.join(_told(name, limit) for name, limit in claims.items())}, and "
            f"{'takes more' if at_most else 'does not'}",
            rows,
            total=_how_much(main, found[main], claims[main]),
            meaning=meaning if found[main] > claims[main] else "It costs less than is claimed.",
            remedy=remedy if found[main] > claims[main] else _CHEAPER,
        )
    )


def _places(cost: ComputeCost, name: str) -> list[tuple[LayerCost, str]]:
    """The layers that cost most of what a claim is about, with what they cost."""
    measures: dict[str, Any] = {
        "FLOPs": lambda layer: layer.flops,
        "FLOPs forward": lambda layer: layer.forward,
        "FLOPs backward": lambda layer: layer.backward,
        "parameters": lambda layer: layer.parameters,
        "buffers": lambda layer: 0,
        "bytes kept": lambda layer: layer.kept_bytes,
        "share of zeros": lambda layer: layer.wasted_flops or 0,
    }
    costly = sorted(cost.layers, key=lambda layer: -measures[name](layer))

    def told(layer: LayerCost) -> str:
        if name == "share of zeros":
            share = _percent(_share(layer.wasted_flops, layer.flops))
            return f"{share} of {layer.flops:,} FLOPs"
        return _told(name, measures[name](layer))

    return [(layer, told(layer)) for layer in costly if measures[name](layer)]


def _told(name: str, number: Any) -> str:
    return (
        f"{_percent(number)} of FLOPs on zeros"
        if name == "share of zeros"
        else f"{number:,} {name}"
    )


def _how_much(name: str, found: Any, claim: Any) -> str:
    if name == "share of zeros":
        return f"{_percent(found)} of all FLOPs"
    return f"{found / claim:.4g} times the {name} claimed" if claim else f"{found:,} {name}"


_CHEAPER = (
    "Usual cause: a layer that forward no longer calls, a batch or a width that is another, or "
    "work that was saved. Claim the new cost if it is meant."
)
_EXPLANATIONS = {
    "FLOPs": (
        "Every step takes as much longer.",
        "Usual cause: a masked layer at full width, a network that is called once too often, a "
        "batch or a width that is another. Compare the table of `print(cost)` with an older one.",
    ),
    "parameters": (
        "There are weights to train, store and send that are not claimed.",
        "Usual cause: a layer that was to be tied and is a copy (assign the Parameter itself: "
        "b.weight = a.weight), or one that nothing uses.",
    ),
    "buffers": (
        "There are buffers to store and send that are not claimed.",
        "Usual cause: masks or statistics that every member registers for itself.",
    ),
    "bytes kept": (
        "A step needs as much more memory, and fits smaller batches.",
        "Usual cause: masked copies of weights, activations at full width that are mostly zero, or "
        "a forward pass that runs twice. Compute with blocks of the weight, or use activation "
        "checkpointing.",
    ),
    "share of zeros": (
        "Such products take time and change nothing.",
        "Usual cause: a subnet that is its parent under a mask (compute with the block of the "
        "weight that is not zero, on the channels that are not zero), or outputs that nobody "
        "reads, whose gradients are zero.",
    ),
}


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Names to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return aligned(
        [
            (row[0], *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)))
            for row in rows
        ]
    )


def _sum(numbers: Iterable[int | None]) -> int | None:
    found = list(numbers)
    known = [number for number in found if number is not None]
    return sum(known) if len(known) == len(found) else None


def _share(part: int | None, whole: int) -> Fraction | None:
    return None if part is None else Fraction(part, whole) if whole else Fraction(0)


def _percent(share: Fraction | float | None) -> str:
    if share is None:
        return "?"
    if share in (0, 1):
        return f"{100 * int(share)} %"
    shown = f"{100 * float(share):.1f}"
    return {"0.0": "<0.1", "100.0": ">99.9"}.get(shown, shown) + " %"


def measure(case: Case, claim: CostClaim) -> ComputeCost:
    """What `cost` looks at, for this claim."""
    __tracebackhide__ = True
    return measure_compute_cost(case.model, case.batch, outputs=case.subject.outputs)
