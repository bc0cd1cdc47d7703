"""Which scalar weights move which member's output, whatever the weights happen to be now.

Gradients at the actual weights lie: a dead ReLU, the losers of a max-pool, a dropped unit, a
saturated softmax or a branch that starts at zero all give a gradient of exactly zero where the
weight matters a moment later. So the network is looked at with

- generic values: every trainable parameter, and every input, is positive and random, scaled so
  that activations keep their size; running statistics of BatchNorm are 0 and 1;
- transparent operations (`ensembles.probes.transparency`): dropout keeps everything, and no
  activation, softmax, pooling or normalisation hides what it reads.

What is zero then is zero by structure: a mask, a group of a grouped convolution, a block that is
not read. It is one backward pass for each member.

Limits. Influence is followed by autograd: it ends at `detach`, `no_grad`, rounding, signs and
integer values, and does not see values that the training step writes. Hard routing is that of the
batch: an expert that no row goes to is not reached. A weight that is held at zero by anything but
the forward pass (a gradient hook, the optimizer) counts as one that matters. Random masks that are
not drawn by dropout or `bernoulli` are taken as they fall.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from ensembles.message import seed
from ensembles.probes.registers import registered
from ensembles.probes.state import parameters_kept, preserved
from ensembles.probes.transparency import make_transparent, transparent_forward
from ensembles.subject import (
    Model,
    Outputs,
    checked_numbers,
    member_outputs,
    named_modules_of,
)

__all__ = ["Probe", "influence", "probing"]

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
    """

    outputs: dict[str, tuple[Tensor, ...]]
    parameters: dict[str, Tensor]
    lookups: frozenset[str]

    def reach(self, member: str, names: Iterable[str] | None = None) -> dict[str, Tensor | None]:
        """Which elements of each parameter reach the member; None where autograd has no path.

        Args:
            member: One of `outputs`.
            names: The parameters to look at; all by default.
        """
        wanted = {name: self.parameters[name] for name in names or self.parameters}
        outputs = [y for y in self.outputs[member] if y.requires_grad]
        if not outputs:
            return dict.fromkeys(wanted)
        # Positive and generic: what adds up to zero for all-ones (softmax, differences) does not.
        seeds = [torch.rand_like(y) + 0.5 for y in outputs]
        gradients = torch.autograd.grad(
            outputs, list(wanted.values()), seeds, retain_graph=True, allow_unused=True
        )
        return {
            name: None if gradient is None else gradient != 0
            for name, gradient in zip(wanted, gradients, strict=True)
        }


def influence(
    model: Model, batch: Any, *, outputs: Outputs | None = None, training: bool = False
) -> Iterator[tuple[str, dict[str, Tensor | None]]]:
    """For each member, which elements of every parameter reach its output.

    Args:
        model: One module, or the members as a list or dict of modules.
        batch: A tensor, a tuple of positional arguments, or a dict of keyword arguments. Floating
            inputs are replaced by generic ones, but for masks (infinities, or only 0 and 1).
        outputs: Splits what one module returns into member outputs.
        training: Whether modules are in training mode.

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
    with probing(model, batch, outputs=outputs, training=training) as probe:
        for member in probe.outputs:
            yield member, probe.reach(member)


@contextmanager
def probing(
    model: Model, batch: Any, *, outputs: Outputs | None = None, training: bool = False
) -> Iterator[Probe]:
    """One transparent forward pass; the model is as it was on exit.

    Args:
        model: As for `influence`.
        batch: As for `influence`.
        outputs: As for `influence`.
        training: As for `influence`.

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
        stack.enter_context(preserved(model))
        stack.enter_context(torch.enable_grad())
        modules = named_modules_of(model)
        for module in modules.values():
            module.train(training)
        found: dict[str, tuple[Tensor, ...]] = {}
        for gain in GAINS:
            torch.manual_seed(seed.get())
            _set_generic_values(modules, gain)
            inputs = _generic_inputs(batch)
            with parameters_kept(model), transparent_forward():
                found = member_outputs(model, inputs, outputs=outputs)
            if all(_usable(tensors) for tensors in found.values()):
                break
        else:
            worst = next(name for name, tensors in found.items() if not _usable(tensors))
            raise ValueError(
                f"the output of member {worst} is NaN, infinite or all zero for generic positive "
                "weights of any scale, so that nothing can be said of what reaches it. Look for "
                "a division or a logarithm of sums, or cast the model to float64."
            )
        if not any(y.requires_grad for tensors in found.values() for y in tensors):
            raise ValueError(
                "no member's output depends on a parameter by autograd: the forward pass runs "
                "under no_grad or detaches. Influence cannot be followed; enable gradients."
            )
        lookups = make_transparent(y for tensors in found.values() for y in tensors)
        parameters = {
            entry.names[0]: entry.tensor
            for entry in registered(modules)
            if entry.kind == "parameter" and entry.tensor.requires_grad  # all but frozen masks
        }
        yield Probe(
            found, parameters, frozenset(n for n, p in parameters.items() if id(p) in lookups)
        )


def _usable(tensors: Sequence[Tensor]) -> bool:
    return all(bool(y.isfinite().all()) for y in tensors) and any(bool(y.any()) for y in tensors)


# --- generic values -----------------------------------------------------------------------------


def _set_generic_values(modules: dict[str, nn.Module], gain: float) -> None:
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
            if not parameter.requires_grad and bool((parameter == 0).any()):
                continue  # a frozen parameter with zeros is a mask
            parameter.requires_grad_(True)
            scale = gain * _scale(parameter, fans) if parameter.ndim > 1 else 1.0
            parameter.data.uniform_(0.5 * scale, 1.5 * scale)
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


def _generic_inputs(batch: Any) -> Any:
    def generic(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.is_meta:
            return x
        if x.numel() and (bool(x.isinf().any()) or _is_binary(x)):
            return x  # a mask
        return torch.rand_like(x.detach()) + 0.5

    return pytree.tree_map(generic, batch)


def _is_binary(x: Tensor) -> bool:
    return bool(((x == 0) | (x == 1)).all()) and bool((x == 0).any()) and bool((x == 1).any())
