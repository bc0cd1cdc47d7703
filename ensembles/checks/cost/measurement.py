"""What a call costs: FLOPs, parameters, bytes kept and zeros, in all and by layer."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ensembles.case import Case, Given
from ensembles.checks.cost.claim import CostClaim
from ensembles.checks.cost.cost_passes import actual_pass, zeros_of
from ensembles.checks.cost.meter import Kept, Meter, Operation
from ensembles.handling.numbers import checked_initialised, checked_numbers
from ensembles.handling.registered_tensors import Registered, registered
from ensembles.instruments.storage import shared_memory
from ensembles.message import SHOWN_ROWS, aligned, listed
from ensembles.subject import Recipe

__all__ = [
    "ComputeCost",
    "LayerCost",
    "OperationCost",
    "measure",
    "measure_compute_cost",
    "percent",
]


class _Total:
    """FLOPs of something that consists of parts."""

    @property
    def parts(self) -> Sequence[OperationCost | LayerCost]:
        """What is added up."""
        raise NotImplementedError

    @property
    def forward(self) -> int:
        """FLOPs of the forward pass."""
        return sum(part.forward for part in self.parts)

    @property
    def backward(self) -> int:
        """FLOPs of the backward pass; 0 in evaluation."""
        return sum(part.backward for part in self.parts)

    @property
    def flops(self) -> int:
        """FLOPs of both passes."""
        return self.forward + self.backward

    @property
    def wasted_flops(self) -> int | None:
        """FLOPs that multiply by a structural zero; None on the meta device."""
        return _sum(part.wasted_flops for part in self.parts)

    @property
    def wasted(self) -> Fraction | None:
        """The share of FLOPs that multiply by a structural zero; None on the meta device."""
        return _share(self.wasted_flops, self.flops)


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
class LayerCost(_Total):
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
    def parts(self) -> tuple[OperationCost, ...]:
        """What is added up: the operations."""
        return self.operations


@dataclass(frozen=True)
class ComputeCost(_Total):
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
    def parts(self) -> tuple[LayerCost, ...]:
        """What is added up: the layers."""
        return self.layers

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
                percent(layer.wasted),
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
            percent(self.wasted),
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
        of_zeros = self.wasted is not None and f", {percent(self.wasted)} of them on zeros"
        passes = "forward and backward" if self.training else "forward, in evaluation"
        head = f"{self.flops:,} FLOPs {passes}{of_zeros or ''}; {self.parameters:,} parameters"
        lines = [f"{head}; {self.kept_bytes:,} bytes kept" if self.training else head]
        lines += [f"  {line}" for line in self.table(SHOWN_ROWS).splitlines()]
        if self.buffers:
            lines.append(f"  buffers: {self.buffers:,} elements")
        if self.kept_weight_bytes:
            lines.append(f"  kept copies of weights: {self.kept_weight_bytes:,} bytes")
        if self.kept_zero_bytes:
            told = f"{self.kept_zero_bytes:,} bytes, {percent(self.wasted_kept)}"
            lines.append(f"  kept zeros: {told}")
        if self.wasted is None:
            lines.append("  zeros were not looked for: there are no numbers on the meta device")
        if self.uncounted:
            lines.append(f"  not counted, for want of a formula: {listed(self.uncounted)}")
        return "\n".join(lines)


_HEAD = ("layer", "FLOPs forward", "FLOPs backward", "on zeros", "parameters", "bytes kept")


def measure_compute_cost(
    model: Given, batch: Any = None, *, training: bool = True, **recipe: Unpack[Recipe]
) -> ComputeCost:
    """Counts FLOPs, parameters, bytes kept for backward, and multiplications by zero.

    Args:
        model: One module, or the members as a list or dict of modules, each called on the batch.
        batch: What the model is called with. On the meta device nothing is computed; then zeros
            are not looked for.
        training: Whether a training step is measured (training mode, forward and backward), or a
            prediction (evaluation mode, forward without gradients).
        **recipe: `outputs` splits what one module returns into member outputs; the backward pass
            begins at all of them.

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
    return measure(Case.of(model, batch, **recipe), CostClaim(training=training))


def measure(case: Case, claim: CostClaim | None = None) -> ComputeCost:
    """What a training step of a case costs, or a prediction where the claim is about one."""
    __tracebackhide__ = True
    training = claim is None or claim.training
    entries = registered(case.modules)
    for entry in entries:
        checked_initialised(entry.tensor, f"{entry.kind} {entry.names[0]}")
    given = [x for x in pytree.tree_leaves(case.batch) if isinstance(x, Tensor)]
    on_meta = any(x.is_meta for x in [*given, *(entry.tensor for entry in entries)])
    if not on_meta:
        checked_numbers(case.model)
    actual = actual_pass(case, training=training, check=not on_meta)
    meter, kept = actual.meter, actual.kept
    wasted: Mapping[Operation, int] | None = None
    zero_bytes = None
    if not on_meta and (meter.counts or entries):
        wasted, zero_bytes = zeros_of(case, actual, training=training)
    parameters = _elements(case.modules, entries, "parameter")
    cost = ComputeCost(
        layers=_layers(meter, kept, wasted, parameters),
        parameters=sum(parameters.values()),
        buffers=sum(_elements(case.modules, entries, "buffer").values()),
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
    elements = Counter(parameters)
    bytes_of: Counter[str] = Counter()
    for piece in kept:
        bytes_of[piece.layer] += piece.bytes
    return tuple(
        LayerCost(name, tuple(operations[name]), elements[name], bytes_of[name])
        for name in dict.fromkeys([*meter.paths.values(), *operations, *bytes_of])
        if operations[name] or elements[name] or bytes_of[name]
    )


def _elements(
    modules: Mapping[str, nn.Module], entries: list[Registered], kind: str
) -> dict[str, int]:
    """Layer to the elements of the tensors that it registers, all memory once."""
    alone = list(modules) == ["model"]

    def layer(name: str) -> str:
        path = name.rpartition(".")[0]
        return path.partition(".")[2] if alone else path

    counts: Counter[str] = Counter()
    homes: dict[str, Registered] = {}
    for entry in entries:
        homes.update(dict.fromkeys(entry.names, entry))
        if entry.kind == kind:
            counts[layer(entry.names[0])] += _distinct(entry.tensor)
    for memory in shared_memory(modules)[1]:
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


def percent(share: Fraction | float | None) -> str:
    """A share in words; what is not quite none or all does not look like it.

    Example:
        >>> percent(Fraction(3, 4)), percent(0), percent(1e-9), percent(None)
        ('75.0 %', '0 %', '<0.1 %', '?')
    """
    if share is None:
        return "?"
    if share in (0, 1):
        return f"{100 * int(share)} %"
    shown = f"{100 * float(share):.1f}"
    return {"0.0": "<0.1", "100.0": ">99.9"}.get(shown, shown) + " %"
