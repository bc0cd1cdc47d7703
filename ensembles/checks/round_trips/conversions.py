"""What users do to a model as a whole: copies, saves, loads, casts, wrappers and transforms.

Each conversion takes a model that has been trained a little, and gives what stands in its place
afterwards: how that is called, and the tensors that it registers under the model's own names.
"""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ensembles.handling.registered_tensors import registered
from ensembles.tolerance import Kind

__all__ = [
    "LOCAL",
    "Conversion",
    "Converted",
    "DoesNotApply",
    "NotLookedAt",
    "Source",
    "trace_kept_apart",
]


class NotLookedAt(Exception):  # noqa: N818  (nothing is wrong)
    """A conversion that this installation cannot do, or whose result PyTorch cannot call."""


class DoesNotApply(NotLookedAt):
    """A conversion that has nothing to convert in this model."""


@dataclass(frozen=True)
class Source:
    """A model to convert.

    Attributes:
        module: The model, in eval mode.
        batch: What it is called with.
        build: Builds another model, with other random numbers, in eval mode.
        other: Such a model, where the conversion `loads` a state into one.
    """

    module: nn.Module
    batch: Any
    build: Callable[[], nn.Module]
    other: nn.Module | None = None

    def loaded(self, state: Mapping[str, Any], *, strict: bool = True) -> Converted:
        """The other model, with this state."""
        assert self.other is not None, "a conversion that loads says so"
        self.other.load_state_dict(state, strict=strict)
        return _of(self.other)


class Converted(NamedTuple):
    """What stands in the model's place.

    Attributes:
        call: Called as the model is.
        module: What registers its parameters and buffers under their names of before; None where
            nothing does.
        tensors: Its parameters, by name, where there is no such module; to be changed in place.
    """

    call: Callable[..., Any]
    module: nn.Module | None
    tensors: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Conversion:
    """A conversion by name.

    Attributes:
        name: What claims and reports call it.
        convert: What it does.
        result: "copy" where the model is left as it was, "in place" where it is changed itself,
            "shared" where something new computes with the same parameters.
        compared: How outputs compare: "reordered" where the same operations are computed, and else
            "recomputed".
        cast: What weights are cast to on the way.
        partial: Whether PyTorch does it for some models only, so that an error is no defect.
        loads: Whether it loads the state into another model.
        layout: Whether it lays tensors out otherwise, which PyTorch has other kernels for.
    """

    name: str
    convert: Callable[[Source], Converted]
    result: Literal["copy", "in place", "shared"] = "copy"
    compared: Kind = "reordered"
    cast: torch.dtype | None = None
    partial: bool = False
    loads: bool = False
    layout: bool = False


def _of(module: nn.Module) -> Converted:
    return Converted(module, module)


# --- copies and files ---------------------------------------------------------------------------


def _deepcopy(source: Source) -> Converted:
    return _of(copy.deepcopy(source.module))


def _pickle(source: Source) -> Converted:
    return _of(pickle.loads(pickle.dumps(source.module)))


def _state_dict(source: Source) -> Converted:
    return source.loaded(_from_file(source.module.state_dict()))


def _not_strict(source: Source) -> Converted:
    return source.loaded(_from_file(source.module.state_dict()), strict=False)


def _assign(source: Source) -> Converted:
    source.module.load_state_dict(_from_file(source.module.state_dict()), assign=True)
    return _of(source.module)


def _from_file(state: Mapping[str, Any]) -> Any:
    """As it comes back from disk; tensors that shared memory share it again."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _safetensors(source: Source) -> Converted:
    if find_spec("safetensors") is None:
        raise NotLookedAt("safetensors is not installed")
    safetensors = import_module("safetensors.torch")
    # The format refuses memory that is shared, so that each tied tensor is saved once.
    once = {entry.names[0] for entry in registered(source.module)}
    saved = {
        name: value.contiguous()
        for name, value in source.module.state_dict().items()
        if name in once
    }
    return source.loaded(safetensors.load(safetensors.save(saved)), strict=False)


def _to_empty(source: Source) -> Converted:
    with torch.device("meta"):
        new = source.build()
    new.to_empty(device="cpu")
    with torch.no_grad():
        for entry in registered(new):  # whatever memory holds: here the same in every run
            entry.tensor.fill_(float("nan") if entry.tensor.is_floating_point() else 0)
    new.load_state_dict(source.module.state_dict())
    return _of(new)


# --- casts and layouts --------------------------------------------------------------------------


def _through(dtype: torch.dtype) -> Callable[[Source], Converted]:
    def convert(source: Source) -> Converted:
        used = {e.tensor.dtype for e in registered(source.module) if e.tensor.is_floating_point()}
        if not used:
            raise DoesNotApply("the model has no floating tensors")
        if len(used) > 1:
            raise NotLookedAt("the model has tensors of several floating dtypes")
        (before,) = used
        return _of(source.module.to(dtype).to(before))

    return convert


def _channels_last(source: Source) -> Converted:
    if not any(entry.tensor.ndim == 4 for entry in registered(source.module)):
        raise DoesNotApply("no parameter has four dimensions")
    return _of(source.module.to(memory_format=torch.channels_last))


# --- parametrizations and transforms ------------------------------------------------------------


def _weight_norm(source: Source) -> Converted:
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in source.module.modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, name))
    places = next((found for found in owners.values() if len(found) > 1), None)
    if places is None:
        raise DoesNotApply("no parameter is registered by two modules")
    nn.utils.parametrizations.weight_norm(places[0][0], places[0][1])
    return _of(source.module)


def _functional_call(source: Source) -> Converted:
    tensors = {entry.names[0]: entry.tensor.detach().clone() for entry in registered(source.module)}

    def call(*args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(source.module, tensors, args, kwargs)

    return Converted(call, None, tensors)


def _vmap(source: Source) -> Converted:
    members = [source.module, copy.deepcopy(source.module)]
    parameters, buffers = torch.func.stack_module_state(members)
    stacked = {name: tensor.detach() for name, tensor in {**parameters, **buffers}.items()}

    def call(*args: Any, **kwargs: Any) -> Any:
        def one(tensors: dict[str, Tensor]) -> Any:
            return torch.func.functional_call(members[0], tensors, args, kwargs)

        found = torch.vmap(one, randomness="different")(stacked)
        return torch.utils._pytree.tree_map_only(Tensor, lambda y: y[0], found)

    return Converted(call, None, {name: tensor[0] for name, tensor in stacked.items()})


# --- wrappers and compilers ---------------------------------------------------------------------


def _averaged_model(source: Source) -> Converted:
    averaged = torch.optim.swa_utils.AveragedModel(source.module)
    averaged.update_parameters(source.module)
    return Converted(averaged, averaged.module)


def _compile(source: Source) -> Converted:
    return Converted(torch.compile(source.module, backend="eager"), source.module)


def _export(source: Source) -> Converted:
    kwargs = source.batch if isinstance(source.batch, dict) else None
    args = source.batch if isinstance(source.batch, tuple) else (source.batch,)
    exported = torch.export.export(source.module, args if kwargs is None else (), kwargs)
    return _of(exported.module())


def _quantize(source: Source) -> Converted:
    quantize = getattr(getattr(torch.ao, "quantization", None), "quantize_dynamic", None)
    if quantize is None or torch.backends.quantized.engine == "none":
        raise NotLookedAt("this PyTorch has no dynamic quantization")
    if not any(isinstance(module, nn.Linear) for module in source.module.modules()):
        raise DoesNotApply("the model has no linear layer")
    of_torch = nn.TransformerEncoderLayer.forward
    if any(type(module).forward is of_torch for module in source.module.modules()):
        # Its fast path asks layers for the device of weights, which are functions once packed.
        raise NotLookedAt("PyTorch cannot call a quantized nn.TransformerEncoderLayer")
    return Converted(quantize(copy.deepcopy(source.module), {nn.Linear}), None)


LOCAL: Mapping[str, Conversion] = {
    conversion.name: conversion
    for conversion in (
        Conversion("deepcopy", _deepcopy),
        Conversion("pickle", _pickle, partial=True),
        Conversion("state_dict", _state_dict, loads=True),
        Conversion("strict=False", _not_strict, loads=True),
        Conversion("assign=True", _assign, "in place"),
        Conversion("safetensors", _safetensors, partial=True, loads=True),
        Conversion("to_empty", _to_empty, partial=True),
        Conversion("half", _through(torch.float16), "in place", "recomputed", torch.float16),
        Conversion("double", _through(torch.float64), "in place"),
        Conversion("channels_last", _channels_last, "in place", "recomputed", layout=True),
        Conversion("weight_norm", _weight_norm, "in place", "recomputed", partial=True),
        # Fused paths of a layer, such as attention's, ask for Parameters.
        Conversion("functional_call", _functional_call, "copy", "recomputed", partial=True),
        Conversion("vmap", _vmap, "copy", "recomputed", partial=True),
        Conversion("averaged_model", _averaged_model),
        Conversion("compile", _compile, "shared", "recomputed", partial=True),
        Conversion("export", _export, "shared", "recomputed", partial=True),
        Conversion("quantize_dynamic", _quantize, "copy", "recomputed", torch.qint8, partial=True),
    )
}
"""Every conversion that one process can do, in the order of reports."""


@contextmanager
def trace_kept_apart() -> Iterator[None]:
    """Keeps what torch traces for its own tools out of handlers of others, as pytest's.

    Compiling and exporting log a hundred records without a text to a logger that does not
    propagate. pytest listens to such loggers too, and would show them under every failing test.
    """
    trace = logging.getLogger("torch.__trace")
    others = [one for one in trace.handlers if not type(one).__module__.startswith("torch.")]
    try:
        for handler in others:
            trace.removeHandler(handler)
        yield
    finally:
        for handler in others:
            trace.addHandler(handler)
