"""Which scalar weights move which member's output, whatever the weights happen to be now.

Gradients at the actual weights lie: a dead ReLU, the losers of a max-pool, a dropped unit, a
saturated softmax or a branch that starts at zero all give a gradient of exactly zero where the
weight matters a moment later. So the network is looked at with

- generic values: every trainable parameter, and every input, is positive and random, scaled so
  that activations keep their size; running statistics of BatchNorm are 0 and 1;
- transparent operations (`ensembles.probes.transparency`): dropout keeps everything, and no
  activation, softmax, pooling or normalisation hides what it reads.

What is zero then is zero by structure: a mask, a group of a grouped convolution, a block that is
not read. It is one backward pass for each member. Where generic values decide what is computed
(routing, clipping, one-hot inputs), a second look with other `Values` adds what it sees: a gradient
that is not zero is a proof.

Limits. Influence is followed by autograd: it ends at `detach`, `no_grad`, rounding, signs and
integer values, and does not see values that the training step writes. Hard routing is that of the
batch: an expert that no row goes to is not reached. A weight that is held at zero by anything but
the forward pass (a gradient hook, the optimizer) counts as one that matters. Random masks that are
not drawn by dropout or `bernoulli` are taken as they fall.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from ensembles.message import seed
from ensembles.probes.precision import is_narrow, widened
from ensembles.probes.registers import registered
from ensembles.probes.state import parameters_kept, preserved
from ensembles.probes.transparency import transparent_backward, transparent_forward
from ensembles.subject import (
    Model,
    Outputs,
    checked_numbers,
    is_one_module,
    member_outputs,
    named_modules_of,
)

__all__ = ["Probe", "Values", "influence", "probing"]

Values = Literal["generic", "signed", "present"]
"""Weights and inputs: positive and random, with masks among the inputs kept; random with both
signs, also in place of one-hot inputs; or as they are, with operations as they are."""

MASKED = -1e4
"""What a mask adds to a logit at most, to exclude it: float16 holds no more than 65,504."""

GAINS = (1.0, 1e-2, 1e2)
"""Factors on the weights' scale, tried in turn until the outputs are finite and not all zero."""


@dataclass(frozen=True)
class Probe:
    """A forward pass that was made transparent, ready for one backward pass a member.

    Attributes:
        outputs: Member name to its output tensors.
        parameters: Qualified name ("<member>.<name>", member "model" for one module) to tensor;
            a tied parameter once, under its first name. Frozen masks are left out.
        lookups: Names of parameters that are read by index (embeddings): rows that the batch does
            not name are not reached, and that says nothing about them.
        frozen: Names of parameters that are not trained (requires_grad is False).
        homes: Parameter name to the member that registers it, where members are modules of their
            own; empty for one module.
    """

    outputs: dict[str, tuple[Tensor, ...]]
    parameters: dict[str, Tensor]
    lookups: frozenset[str]
    frozen: frozenset[str]
    homes: Mapping[str, str]

    def reach(self, member: str, names: Iterable[str] | None = None) -> dict[str, Tensor | None]:
        """Which elements of each parameter reach the member; None where autograd has no path.

        Args:
            member: One of `outputs`.
            names: The parameters to look at; all by default.
        """
        wanted = {name: self.parameters[name] for name in names or self.parameters}
        outputs = [y for y in self.outputs[member] if y.requires_grad]
        if not outputs or not wanted:
            return dict.fromkeys(wanted)
        # Positive and generic: what adds up to zero for all-ones (softmax, differences) does not.
        seeds = [torch.rand_like(y) + 0.5 for y in outputs]
        gradients = torch.autograd.grad(
            outputs, list(wanted.values()), seeds, retain_graph=True, allow_unused=True
        )
        return {
            name: None if gradient is None else gradient.to_dense() != 0  # embeddings may be sparse
            for name, gradient in zip(wanted, gradients, strict=True)
        }


def influence(
    model: Model,
    batch: Any,
    *,
    outputs: Outputs | None = None,
    training: bool = False,
    values: Values = "generic",
    draw: int = 0,
) -> Iterator[tuple[str, dict[str, Tensor | None]]]:
    """For each member, which elements of every parameter reach its output.

    Args:
        model: One module, or the members as a list or dict of modules.
        batch: A tensor, a tuple of positional arguments, or a dict of keyword arguments. Floating
            inputs are replaced by generic ones, but for masks (infinities, or only 0 and 1).
        outputs: Splits what one module returns into member outputs.
        training: Whether modules are in training mode.
        values: What weights and inputs are: see `Values`.
        draw: Number of the random draw, for models that draw what they compute.

    Yields:
        The member's name, and for each qualified parameter name a mask of the parameter's shape,
        or None where autograd has no path at all.

    Raises:
        ValueError: As `probing`.

    Example:
        >>> two = [nn.Linear(2, 1), nn.Linear(2, 1)]
        >>> for member, reached in influence(two, torch.zeros(1, 2)):
        ...     print(member, [name for name, mask in reached.items() if mask is not None])
        0 ['0.weight', '0.bias']
        1 ['1.weight', '1.bias']
    """
    with probing(
        model, batch, outputs=outputs, training=training, values=values, draw=draw
    ) as probe:
        for member in probe.outputs:
            yield member, probe.reach(member)


@contextmanager
def probing(
    model: Model,
    batch: Any,
    *,
    outputs: Outputs | None = None,
    training: bool = False,
    values: Values = "generic",
    draw: int = 0,
    held: Collection[int] = (),
    wide: bool = True,
) -> Iterator[Probe]:
    """One transparent forward pass; the model is as it was on exit.

    What is narrower than float32 computes in float32 meanwhile, where the model takes it: whether a
    gradient is zero cannot be told in float16, which underflows, nor in bfloat16, where it cancels.

    Args:
        model: As for `influence`.
        batch: As for `influence`.
        outputs: As for `influence`.
        training: As for `influence`.
        values: As for `influence`.
        draw: As for `influence`.
        held: Ids of parameters that keep their present values.
        wide: Whether to compute in float32 where the model does not.

    Yields:
        The `Probe`; it is valid inside the context only.

    Raises:
        ValueError: If parameters hold no usable numbers, the call fails or changes parameters, no
            output depends on a parameter by autograd, or outputs are not finite at any scale.

    Example:
        >>> with probing(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.zeros(1, 2)) as probe:
        ...     reached = probe.reach("model")
        >>> bool(reached["model.0.weight"].all())
        True
    """
    checked_numbers(model)
    with ExitStack() as stack:
        start = stack.enter_context(preserved(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        modules = named_modules_of(model)
        for module in modules.values():
            module.train(training)
        every = [entry for entry in registered(modules) if entry.kind == "parameter"]
        frozen = {id(entry.tensor) for entry in every if not entry.tensor.requires_grad}
        look = partial(_look, model, outputs, values, draw, held=held, frozen=frozen)
        found: dict[str, tuple[Tensor, ...]] | None = None
        if wide and values != "present":
            with suppress(ValueError), widened(model):  # some models know one dtype
                found = look(pytree.tree_map(_wide, batch))
        if found is None:
            start.restore()
            for module in modules.values():
                module.train(training)
            found = look(batch)
        if not any(y.requires_grad for tensors in found.values() for y in tensors):
            raise ValueError(
                "no member's output depends on a parameter by autograd: the forward pass runs "
                "under no_grad or detaches. Influence cannot be followed; enable gradients."
            )
        ends = [y for tensors in found.values() for y in tensors]
        lookups: set[int] = set()
        if values != "present":
            lookups = stack.enter_context(transparent_backward(ends))
        homes: dict[int, str] = {}
        if not is_one_module(model):
            for member, module in modules.items():
                for parameter in module.parameters():
                    homes.setdefault(id(parameter), member)
        # All but frozen masks, and what has no elements.
        looked_at = [e for e in every if e.tensor.requires_grad and e.tensor.numel()]
        yield Probe(
            outputs=found,
            parameters={entry.names[0]: entry.tensor for entry in looked_at},
            lookups=frozenset(e.names[0] for e in looked_at if id(e.tensor) in lookups),
            frozen=frozenset(e.names[0] for e in looked_at if id(e.tensor) in frozen),
            homes={e.names[0]: homes[id(e.tensor)] for e in looked_at if homes},
        )


def _look(
    model: Model,
    outputs: Outputs | None,
    values: Values,
    draw: int,
    batch: Any,
    *,
    held: Collection[int],
    frozen: Collection[int],
) -> dict[str, tuple[Tensor, ...]]:
    """The outputs of one call, with weights of the first scale at which they are numbers."""
    modules = named_modules_of(model)
    for gain in GAINS if values != "present" else GAINS[:1]:
        torch.manual_seed(seed.get() + draw)
        if values == "present":
            _require_gradients(p for m in modules.values() for p in m.parameters())
            inputs = pytree.tree_map(_own_copy, batch)
        else:
            _set_values(modules, gain, signed=values == "signed", held=held)
            inputs = pytree.tree_map(_signed if values == "signed" else _generic, batch)
        seen = nullcontext() if values == "present" else transparent_forward()
        with parameters_kept(model, frozen=frozen), seen:
            found = member_outputs(model, inputs, outputs=outputs)
        if all(_usable(tensors) for tensors in found.values()):
            return found
    worst = next(name for name, tensors in found.items() if not _usable(tensors))
    raise ValueError(
        f"the output of member {worst} is NaN, infinite or all zero for generic positive "
        "weights of any scale, so that nothing can be said of what reaches it. Look for "
        "a division or a logarithm of sums, or cast the model to float64."
    )


def _usable(tensors: Sequence[Tensor]) -> bool:
    return all(bool(y.isfinite().all()) for y in tensors) and any(bool(y.any()) for y in tensors)


# --- generic values -----------------------------------------------------------------------------


def _set_values(
    modules: dict[str, nn.Module], gain: float, *, signed: bool, held: Collection[int]
) -> None:
    every = list(dict.fromkeys(m for given in modules.values() for m in given.modules()))
    fans = {
        id(module.weight): module.weight.numel() // module.weight.shape[0]
        for module in every
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
        and isinstance(module.weight, nn.Parameter)
        and module.weight.numel()
    }
    with torch.no_grad():
        for parameter in dict.fromkeys(p for m in modules.values() for p in m.parameters()):
            if id(parameter) in held or not (parameter.requires_grad or _is_generic(parameter)):
                continue
            parameter.requires_grad = True
            scale = gain * _scale(parameter, fans) if parameter.ndim > 1 else 1.0
            parameter.data.uniform_(0.5 * scale, 1.5 * scale)
            if signed:
                parameter.data.mul_(torch.randint_like(parameter, 2) * 2 - 1)
        for module in every:
            if isinstance(module, _NormBase) and isinstance(module.running_mean, Tensor):
                module.running_mean.zero_()
                if isinstance(module.running_var, Tensor):
                    module.running_var.fill_(1.0)


def _scale(parameter: Tensor, fans: dict[int, int]) -> float:
    """The mean of positive weights that keeps a sum over the inputs as large as one of them."""
    if id(parameter) in fans:
        return 1.0 / fans[id(parameter)]
    # Initialisations have variance of about 1 / fan_in, whatever the layout of the tensor.
    variance = float(parameter.detach().double().square().mean()) if parameter.numel() else 0.0
    return min(1.0, max(variance, 1.0 / max(parameter.numel(), 1)))


def _is_generic(frozen: Tensor) -> bool:
    """Whether a frozen parameter may be redrawn: not a mask, nor one of an unusual type."""
    usual = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return frozen.dtype in usual and bool(((frozen != 0) & frozen.isfinite()).all())


def _require_gradients(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        parameter.requires_grad = True


def _generic(x: Any) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.is_meta or not x.numel():
        return x
    return _own_copy(x) if _is_mask(x) else torch.rand_like(x.detach()) + 0.5


def _signed(x: Any) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point() or _is_additive_mask(x):
        return _own_copy(x)
    return torch.randn_like(x.detach())


def _wide(x: Any) -> Any:
    return x.float() if is_narrow(x) else x


def _own_copy(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


def _is_mask(x: Tensor) -> bool:
    binary = bool(((x == 0) | (x == 1)).all()) and bool((x == 0).any()) and bool((x == 1).any())
    return binary or _is_additive_mask(x)


def _is_additive_mask(x: Tensor) -> bool:
    """Attention adds minus infinity, or a number that does the same to a softmax."""
    return bool(x.isinf().any()) or bool((x <= MASKED).any() and ((x <= MASKED) | (x == 0)).all())
