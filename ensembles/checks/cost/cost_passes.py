"""The two passes that a cost is measured by: one as the model is, and one that shows its zeros."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ensembles.case import Case
from ensembles.checks.cost.meter import Counts, Kept, Meter, Operation
from ensembles.handling.state import parameters_kept
from ensembles.handling.training import fresh
from ensembles.instruments.autograd import leaves_of
from ensembles.instruments.influence import probing

__all__ = ["ActualPass", "actual_pass", "zeros_of"]


@dataclass(frozen=True)
class ActualPass:
    """A model that was run as it is.

    Attributes:
        meter: What was counted.
        kept: What is kept for the backward pass.
        trained: The leaves that are trained.
    """

    meter: Meter
    kept: list[Kept]
    trained: list[Tensor]


def actual_pass(case: Case, *, training: bool, check: bool) -> ActualPass:
    """Runs the model as it is, forward and (in training) backward from all outputs.

    Args:
        case: What is run.
        training: Whether it is a training step, or a prediction without gradients.
        check: Whether to refuse a call that changes parameters; not possible on meta.

    Raises:
        ValueError: If the call or the backward pass fails.

    Example:
        >>> case = Case.of(nn.Linear(3, 2), torch.ones(4, 3))
        >>> actual = actual_pass(case, training=True, check=True)
        >>> [piece.bytes for piece in actual.kept], len(actual.trained)
        ([48], 2)
    """
    __tracebackhide__ = True
    with ExitStack() as stack:
        stack.enter_context(case.preserved())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(training))
        stack.enter_context(_plain_calls())
        for module in case.modules.values():
            module.train(training)
        batch = fresh(case.batch)
        meter = Meter(case.modules, batch)
        stack.enter_context(meter.watching())
        with parameters_kept(case.model) if check else nullcontext():
            found = case.call(batch=batch)
        kept = meter.kept()
        leaves = dict.fromkeys(leaves_of(y for tensors in found.values() for y in tensors))
        trained = [leaf for leaf in leaves if leaf.requires_grad]  # a call may freeze what it used
        if trained:
            meter.backward = True
            _backward(found, trained)
    return ActualPass(meter, kept, trained)


def zeros_of(case: Case, actual: ActualPass, *, training: bool) -> tuple[dict[Operation, int], int]:
    """Runs the model with generic values, transparently: what is zero then is zero by structure.

    Args:
        case: As for `actual_pass`.
        actual: What that returned.
        training: As for `actual_pass`.

    Returns:
        FLOPs of each operation that multiply by zeros, and bytes kept that are zeros.

    Raises:
        ValueError: As `ensembles.instruments.influence.probing`.

    Example:
        >>> case = Case.of(nn.Sequential(nn.ZeroPad1d(1), nn.Linear(4, 2)), torch.ones(1, 2))
        >>> actual = actual_pass(case, training=True, check=True)
        >>> wasted, zeros = zeros_of(case, actual, training=True)
        >>> list(wasted.values()), zeros  # 2 of 4 inputs, forward and backward; 2 floats
        ([16], 8)
    """
    __tracebackhide__ = True
    with torch.inference_mode(False):
        batch = fresh(case.batch)
    meter = Meter(case.modules, batch, zeros=True)
    with (
        case.preserved(),
        _plain_calls(),
        meter.watching(),
        probing(
            case.model, batch, outputs=case.subject.outputs, training=training, wide=False
        ) as probe,
    ):
        found = meter.kept() if training else []
        # Gradients are on in the probe, and a prediction has no backward pass.
        if training and actual.trained:
            meter.backward = True
            _backward(probe.outputs, actual.trained)
    budget = Counter(piece.like for piece in actual.kept)
    zero_bytes = 0
    for piece in found:
        if budget[piece.like]:
            budget[piece.like] -= 1
            zero_bytes += piece.zeros
    wasted: dict[Operation, int] = {}
    for operation, counts in meter.counts.items():
        _add(wasted, actual.meter.counts, operation, counts.wasted)
    return wasted, zero_bytes


def _add(
    wasted: dict[Operation, int],
    counts: Mapping[Operation, Counts],
    operation: Operation,
    flops: int,
) -> None:
    """Waste goes to the operation that ran in the actual pass: fused attention for its products."""
    if operation not in counts:
        same_layer = [other for other in counts if other.layer == operation.layer]
        fused = [other for other in same_layer if other.kind == "attention"]
        candidates = fused or same_layer
        if not candidates:
            return
        operation = candidates[0]
    actual = counts[operation]
    limit = actual.forward + actual.backward
    wasted[operation] = min(wasted.get(operation, 0) + flops, limit)


@contextmanager
def _plain_calls() -> Iterator[None]:
    """Compiled modules run eagerly, and encoder layers as the modules that they consist of."""
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # its import takes seconds, and is nobody's need here
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(
            torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
        )
        torch.backends.mha.set_fastpath_enabled(False)
        yield


def _backward(outputs: Mapping[str, tuple[Tensor, ...]], trained: list[Tensor]) -> None:
    __tracebackhide__ = True
    roots = [y for tensors in outputs.values() for y in tensors if y.requires_grad]
    # Positive and generic, as in the probe; the actual pass does not look at the values.
    seeds = [torch.rand_like(y) + 0.5 for y in roots]
    try:
        torch.autograd.grad(roots, trained, seeds, allow_unused=True)
    except RuntimeError as error:
        said = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the backward pass of the model raised RuntimeError: {said} Its cost cannot be "
            "measured. With activation checkpointing use checkpoint(..., use_reentrant=False); or "
            "measure a prediction with training=False."
        ) from error
