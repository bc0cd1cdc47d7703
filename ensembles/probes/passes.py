"""The two passes that a cost is measured by: one as the model is, and one that shows its zeros."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ensembles.probes.autograd import postorder
from ensembles.probes.influence import probing
from ensembles.probes.meter import Counts, Kept, Meter, Operation
from ensembles.probes.state import parameters_kept, preserved
from ensembles.subject import Model, Outputs, member_outputs, named_modules_of

__all__ = ["actual_pass", "zeros_of"]


def actual_pass(
    model: Model,
    batch: Any,
    outputs: Outputs | None,
    training: bool,
    meter: Meter,
    *,
    check: bool,
) -> tuple[list[Kept], list[Tensor]]:
    """Runs the model as it is, forward and (in training) backward from all outputs.

    Args:
        model: One module, or the members as a list or dict of modules.
        batch: What the model is called with.
        outputs: Splits what one module returns into member outputs.
        training: Whether it is a training step, or a prediction without gradients.
        meter: Counts; it is full afterwards.
        check: Whether to refuse a call that changes parameters; not possible on meta.

    Returns:
        What is kept for the backward pass, and the leaves that are trained.

    Raises:
        ValueError: If the call or the backward pass fails.

    Example:
        >>> layer, batch = nn.Linear(3, 2), torch.ones(4, 3)
        >>> meter = Meter({"model": layer}, batch)
        >>> kept, trained = actual_pass(layer, batch, None, True, meter, check=True)
        >>> [piece.bytes for piece in kept], len(trained)
        ([48], 2)
    """
    __tracebackhide__ = True
    with ExitStack() as stack:
        stack.enter_context(preserved(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(training))
        stack.enter_context(_plain_calls())
        for module in named_modules_of(model).values():
            module.train(training)
        stack.enter_context(meter.watching())
        with ExitStack() as call:
            if check:
                call.enter_context(parameters_kept(model))
            found = member_outputs(model, batch, outputs=outputs)
        kept = meter.kept()
        trained = _trained(found)
        if trained:
            meter.backward = True
            _backward(found, trained)
    return kept, trained


def zeros_of(
    model: Model,
    batch: Any,
    outputs: Outputs | None,
    training: bool,
    real: Meter,
    kept: list[Kept],
    trained: list[Tensor],
) -> tuple[dict[Operation, int], int]:
    """Runs the model with generic values, transparently: what is zero then is zero by structure.

    Args:
        model: As for `actual_pass`, like the next three.
        batch: What the model is called with.
        outputs: Splits what one module returns into member outputs.
        training: Whether there is a backward pass.
        real: The meter of the actual pass.
        kept: What that pass keeps.
        trained: The leaves that it trains.

    Returns:
        FLOPs of each operation that multiply by zeros, and bytes kept that are zeros.

    Raises:
        ValueError: As `ensembles.probes.influence.probing`.

    Example:
        >>> layer, batch = nn.Sequential(nn.ZeroPad1d(1), nn.Linear(4, 2)), torch.ones(1, 2)
        >>> meter = Meter({"model": layer}, batch)
        >>> kept, trained = actual_pass(layer, batch, None, True, meter, check=True)
        >>> wasted, zeros = zeros_of(layer, batch, None, True, meter, kept, trained)
        >>> list(wasted.values()), zeros  # 2 of 4 inputs, forward and backward; 2 floats
        ([16], 8)
    """
    __tracebackhide__ = True
    meter = Meter(named_modules_of(model), batch, zeros=True)
    with (
        _plain_calls(),
        meter.watching(),
        probing(model, batch, outputs=outputs, training=training, wide=False) as probe,
    ):
        found = meter.kept() if training else []
        # Gradients are on in the probe, and a prediction has no backward pass.
        if training and trained:
            meter.backward = True
            _backward(probe.outputs, trained)
    budget = Counter(piece.like for piece in kept)
    zero_bytes = 0
    for piece in found:
        if budget[piece.like]:
            budget[piece.like] -= 1
            zero_bytes += piece.zeros
    wasted: dict[Operation, int] = {}
    for operation, counts in meter.counts.items():
        _add(wasted, real.counts, operation, counts.wasted)
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


def _trained(outputs: Mapping[str, tuple[Tensor, ...]]) -> list[Tensor]:
    """The leaves that a backward pass from all outputs reaches."""
    roots = [y.grad_fn for tensors in outputs.values() for y in tensors if y.grad_fn is not None]
    nodes = postorder(roots, lambda node: [n for n, _ in node.next_functions if n is not None])
    return [node.variable for node in nodes if hasattr(node, "variable")]


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
