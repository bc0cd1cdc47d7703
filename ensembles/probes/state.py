"""Whatever a check does with a model, the model and the random generators are as before."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ensembles.probes.registers import registered
from ensembles.subject import Model, named_modules_of

__all__ = ["generators_kept", "parameters_kept", "preserved", "seed_generators"]


@contextmanager
def preserved(model: Model) -> Iterator[None]:
    """Restores parameters, buffers, gradients, modes and random generators on exit.

    Inside, gradients are None, so that a backward pass starts from nothing. Values are restored
    in the tensors that the model held on entry, so views and ties survive.

    Args:
        model: One module, or the members as a list or dict of modules.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> before = layer.weight.detach().clone()
        >>> with preserved(layer), torch.no_grad():
        ...     _ = layer.eval().weight.zero_()
        >>> torch.equal(layer.weight, before), layer.training
        (True, True)
    """
    modules = list(
        dict.fromkeys(m for given in named_modules_of(model).values() for m in given.modules())
    )
    modes = [module.training for module in modules]
    registers = [(dict(module._parameters), dict(module._buffers)) for module in modules]
    tensors: dict[int, Tensor] = {
        id(tensor): tensor
        for parameters, buffers in registers
        for tensor in (*parameters.values(), *buffers.values())
        if tensor is not None
    }
    saved = [
        (t, t.grad if t.is_leaf else None, t.requires_grad, t.data, t.detach().clone())
        for t in tensors.values()
    ]
    generators = _generators()
    for tensor in tensors.values():
        if tensor.is_leaf:
            tensor.grad = None
    try:
        yield
    finally:
        for module, mode, (parameters, buffers) in zip(modules, modes, registers, strict=True):
            module.training = mode
            pairs: list[tuple[Any, Any]]
            pairs = [(module._parameters, parameters), (module._buffers, buffers)]
            for register, before in pairs:
                if not _same(dict(register), before):  # scripted modules have read-only ones
                    register.clear()
                    register.update(before)
        with torch.no_grad():
            for tensor, grad, requires_grad, memory, values in saved:
                _unexpanded(memory).copy_(_unexpanded(values, like=memory))
                if _layout(tensor) != _layout(memory):
                    tensor.data = memory
                if tensor.is_leaf:
                    tensor.requires_grad_(requires_grad)
                    tensor.grad = grad
        _restore(generators)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restores the global random generators of Python, torch and (where in use) numpy on exit.

    Example:
        >>> before = torch.get_rng_state()
        >>> with generators_kept():
        ...     seed_generators(1)
        >>> torch.equal(torch.get_rng_state(), before)
        True
    """
    generators = _generators()
    try:
        yield
    finally:
        _restore(generators)


def seed_generators(seed: int) -> None:
    """Seeds the global random generators of Python, torch and (where in use) numpy.

    Example:
        >>> seed_generators(1)
        >>> first = torch.rand(())
        >>> seed_generators(1)
        >>> bool(first == torch.rand(()))
        True
    """
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


@contextmanager
def parameters_kept(model: Model) -> Iterator[None]:
    """Refuses a model whose call changes its own parameters; wrap the call in it.

    Raises:
        ValueError: On exit, naming the first parameter that the call changed.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with parameters_kept(layer), torch.no_grad():
        ...     _ = layer.bias.add_(1.0)
        Traceback (most recent call last):
        ValueError: calling the model changes its own parameter model.bias...
    """
    named = [
        (names[0], tensor)
        for tensor, names, kind in registered(named_modules_of(model))
        if kind == "parameter"
    ]
    before = [(p.data_ptr(), _bits(p).clone()) for _, p in named]
    yield
    for (place, parameter), (address, bits) in zip(named, before, strict=True):
        if parameter.data_ptr() != address or not torch.equal(_bits(parameter), bits):
            raise ValueError(
                f"calling the model changes its own parameter {place}, so that what is measured "
                "depends on how often it was called. Change parameters in the training step, "
                "or make the tensor a buffer."
            )


def _unexpanded(tensor: Tensor, *, like: Tensor | None = None) -> Tensor:
    """Without the repeats of an expanded tensor, which cannot be written to."""
    strides = (tensor if like is None else like).stride() if tensor.ndim else ()
    return tensor[tuple(slice(1) if stride == 0 else slice(None) for stride in strides)]


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    data = tensor.detach()
    storage = data.untyped_storage()._cdata
    return storage, data.storage_offset(), data.shape, data.stride(), data.dtype


def _bits(parameter: Tensor) -> Tensor:
    """The values as integers, so that NaN equals itself and -0.0 differs from 0.0."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    data = parameter.detach()
    if data.is_complex():
        data = torch.view_as_real(data)
    return data.view(kinds[data.element_size()])


def _same(one: dict[str, Tensor | None], other: dict[str, Tensor | None]) -> bool:
    return list(one) == list(other) and all(one[name] is other[name] for name in one)


def _generators() -> dict[str, Any]:
    found: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        found["numpy"] = sys.modules["numpy"].random.get_state()
    return found


def _restore(generators: dict[str, Any]) -> None:
    random.setstate(generators["python"])
    torch.set_rng_state(generators["torch"])
    if "cuda" in generators:
        torch.cuda.set_rng_state_all(generators["cuda"])
    if "numpy" in generators:
        sys.modules["numpy"].random.set_state(generators["numpy"])
