"""Puts a model and the random generators back as they were, whatever a check did with them."""

from __future__ import annotations

import ctypes
import os
import random
import sys
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from types import FunctionType, MethodType, ModuleType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ensembles.handling.members import named_modules_of
from ensembles.handling.memory import (
    checked_present,
    inner_tensors,
    is_shell,
    numbers_in,
    told_type,
)
from ensembles.handling.registered_tensors import registered
from ensembles.subject import Model
from ensembles.user_calls import raised

__all__ = [
    "Snapshot",
    "copy_of",
    "digest_of_state",
    "generator_states",
    "generators_kept",
    "graph_kept",
    "parameters_kept",
    "preserved",
    "restore_generators",
    "seed_generators",
]

PLAIN = (Tensor, bool, int, float, str, type(None))
"""Types of attributes that are restored."""

CONTAINERS = (dict, list)
"""Types of attributes that are restored with what was in them."""

REGISTERS = ("_parameters", "_buffers", "_modules")
"""Dicts that are restored separately."""

PLAIN_MODEL = (
    "This check computes with plain tensors. Check the model before it is sharded or quantized "
    "(fully_shard, parallelize_module, quantize_); sharing opens such tensors."
)
"""What to do if a class of tensors does not support an operation."""

_COPIES: WeakValueDictionary[tuple[int, int], Tensor] = WeakValueDictionary()
"""Copies of tensors, by the tensor's address and a number, for as long as they are in use."""

_STATES = 3
"""How many copies of a tensor are kept: before a check, and before and after what it does."""


def copy_of(tensor: Tensor) -> Tensor:
    """A copy of the values, which must only be read.

    While the values are the same, every call returns the same copy. Checks within checks each keep
    the state that they begin from, and mostly this is one state. In a network with hundreds of
    millions of weights, every copy counts.

    Example:
        >>> weight = torch.ones(2)
        >>> before = copy_of(weight)
        >>> before is copy_of(weight), before is copy_of(weight.add_(1.0)), before
        (True, False, tensor([1., 1.]))
    """
    values = tensor.detach()
    if type(values) is not Tensor or values.layout is not torch.strided or values.is_meta:
        return values.clone()
    places = [(values.data_ptr(), number) for number in range(_STATES)]
    held = [copied for place in places if (copied := _COPIES.get(place)) is not None]
    for copied in held:
        if _same_bits(values, copied):
            return copied
    copied = values.clone()
    _COPIES[next((place for place in places if place not in _COPIES), places[-1])] = copied
    return copied


def _same_bits(one: Tensor, two: Tensor) -> bool:
    kinds = [(x.dtype, x.shape, x.device) for x in (one, two)]
    return kinds[0] == kinds[1] and one.is_floating_point() and torch.equal(_bits(one), _bits(two))


class Snapshot:
    """What modules hold, and the states of the random generators, to be restored repeatedly.

    Values are restored in the tensors that the modules held, so views and ties survive. Plain
    attributes are restored too: a counter, a flag, a cache that was None or empty.

    Args:
        model: One module, or the members as a list or dict of modules.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> start = Snapshot(layer)
        >>> _ = layer.weight.data.zero_()
        >>> start.changed()
        True
        >>> start.restore()
        >>> start.changed()
        False
    """

    def __init__(self, model: Model) -> None:
        for tensor, names, kind in registered(model):
            checked_present(tensor, f"{kind} {names[0]}")
        self._modules = [
            (module, module.training, dict(module._parameters), dict(module._buffers))
            for module in dict.fromkeys(
                inner for given in named_modules_of(model).values() for inner in given.modules()
            )
        ]
        # Old-style weight_norm, spectral_norm and pruning keep what they computed as attributes. A
        # cache is None until the first call. A flag says whether weights are merged.
        self._attributes = [
            (module, dict(module._modules), _plain_among(vars(module)))
            for module, *_ in self._modules
        ]
        tensors = {
            id(tensor): tensor
            for _, _, parameters, buffers in self._modules
            for tensor in (*parameters.values(), *buffers.values())
            if tensor is not None
        }
        self._tensors = [(t, t.requires_grad, t.data, copy_of(t)) for t in tensors.values()]
        self._hooks = [
            (tensor, kind, hooks if hooks is None else dict(hooks))
            for tensor in tensors.values()
            if tensor.is_leaf
            for kind in ("_backward_hooks", "_post_accumulate_grad_hooks")
            for hooks in (getattr(tensor, kind, None),)
        ]
        self._generators = generator_states()

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors that can have a gradient."""
        return [tensor for tensor, *_ in self._tensors if tensor.is_leaf]

    def changed(self) -> bool:
        """Whether a parameter or buffer was replaced, or differs in a bit."""
        registered_anew = any(
            not (_same(module._parameters, parameters) and _same(module._buffers, buffers))
            for module, _, parameters, buffers in self._modules
        )
        return registered_anew or any(
            (tensor.shape, tensor.dtype) != (values.shape, values.dtype)
            or not torch.equal(_bits(tensor), _bits(values))
            for tensor, _, _, values in self._tensors
        )

    def restore(self) -> None:
        """Restores values, modes and random generators; gradients become None."""
        for module, training, parameters, buffers in self._modules:
            module.training = training
            pairs: list[tuple[Any, Any]]
            pairs = [(module._parameters, parameters), (module._buffers, buffers)]
            for register, before in pairs:
                if not _same(register, before):  # those of scripted modules are read-only
                    register.clear()
                    register.update(before)
        for module, children, attributes in self._attributes:
            if not _same(module._modules, children):
                module._modules.clear()
                module._modules.update(children)
            for name in _tensors_among(vars(module)).keys() - attributes.keys():
                del vars(module)[name]
            for name, (value, inside) in attributes.items():
                vars(module)[name] = value
                if type(value) is list:
                    value[:] = inside
                elif type(value) is dict and not _same(value, inside):
                    value.clear()
                    value.update(inside)
        for tensor, kind, hooks in self._hooks:
            if (now := getattr(tensor, kind, None)) is not None and dict(now) != (hooks or {}):
                now.clear()
                now.update(hooks or {})
        with torch.no_grad():
            for tensor, requires_grad, memory, values in self._tensors:
                _unexpanded(memory).copy_(_unexpanded(values, like=memory))
                if _layout(tensor) != _layout(memory):
                    tensor.data = memory
                if tensor.is_leaf:
                    # Assigned, because users write `weight.requires_grad_ = False` over the method.
                    tensor.requires_grad = requires_grad
                    tensor.grad = None
        restore_generators(self._generators)


@contextmanager
def preserved(model: Model) -> Iterator[Snapshot]:
    """Restores parameters, buffers, gradients, modes and random generators on exit.

    Inside, gradients are None, so that a backward pass starts from nothing.

    Args:
        model: One module, or the members as a list or dict of modules.

    Yields:
        The state on entry, which may also be restored before the exit.

    Raises:
        ValueError: If a tensor of the model has no memory that may be read. It also replaces an
            error that is raised inside, if the model has tensors that are made of others, because
            these do not support many operations.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> before = layer.weight.detach().clone()
        >>> with preserved(layer), torch.no_grad():
        ...     _ = layer.eval().weight.zero_()
        >>> torch.equal(layer.weight, before), layer.training
        (True, True)
    """
    with _shells_told(model):
        snapshot = Snapshot(model)
        gradients = [(leaf, leaf.grad) for leaf in snapshot.leaves]
        for leaf, _ in gradients:
            leaf.grad = None
        try:
            yield snapshot
        finally:
            snapshot.restore()
            for leaf, gradient in gradients:
                if leaf.is_leaf:
                    leaf.grad = gradient


@contextmanager
def _shells_told(model: Model) -> Iterator[None]:
    """Adds to a foreign error that the model has tensors which are made of others."""
    try:
        yield
    except (AssertionError, ValueError):
        raise
    except Exception as error:
        for tensor, names, kind in registered(model):
            if is_shell(tensor):
                what = f"{kind} {names[0]} is of type {told_type(tensor)}, and an operation on it"
                raise ValueError(raised(what, error, PLAIN_MODEL)) from error
        raise


def graph_kept(modules: Sequence[nn.Module]) -> saved_tensors_hooks:
    """Keeps a graph that is made inside usable, although these modules are changed and restored.

    Autograd by itself refuses a tensor that was written to, even if it has its old values again.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with graph_kept([layer]):
        ...     output = layer(layer(torch.ones(1, 2))).sum()
        >>> start = Snapshot(layer)
        >>> with torch.no_grad():
        ...     _ = layer.weight.zero_()
        >>> start.restore()
        >>> output.backward()
    """
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    undone = {t.untyped_storage()._cdata for t in tensors if t.layout is torch.strided}

    def pack(tensor: Tensor) -> tuple[Tensor, int | None]:
        ours = tensor.layout is torch.strided and tensor.untyped_storage()._cdata in undone
        return tensor.detach(), None if ours else tensor._version

    def unpack(saved: tuple[Tensor, int | None]) -> Tensor:
        tensor, version = saved
        if version not in (None, tensor._version):
            raise ValueError(
                f"a tensor of shape {tuple(tensor.shape)} that the backward pass needs was "
                "overwritten later in the call or in the next one. Clone it before, or do not "
                "work in place."
            )
        return tensor

    return saved_tensors_hooks(pack, unpack)


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
    generators = generator_states()
    try:
        yield
    finally:
        restore_generators(generators)


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
def parameters_kept(model: Model, *, frozen: Collection[int] = ()) -> Iterator[None]:
    """Refuses a model whose call changes its trainable parameters; wrap the call in it.

    A frozen parameter may change, as a buffer may: the key encoder of He et al. 2020 follows its
    query encoder in the forward pass of training.

    Args:
        model: One module, or the members as a list or dict of modules.
        frozen: Ids of parameters that are frozen, though they require a gradient now.

    Raises:
        ValueError: On exit. It names the first trainable parameter that the call changed.

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
        if kind == "parameter" and tensor.requires_grad and id(tensor) not in frozen
    ]
    before = [(p.data_ptr(), copy_of(p)) for _, p in named]
    yield
    for (place, parameter), (address, values) in zip(named, before, strict=True):
        if parameter.data_ptr() != address or not torch.equal(_bits(parameter), _bits(values)):
            raise ValueError(
                f"calling the model changes its own parameter {place}, so a measurement "
                "depends on how often the model was called. Change parameters in the training "
                "step. If this one is not trained, freeze it (requires_grad_(False)) or make it a "
                "buffer."
            )


def _unexpanded(tensor: Tensor, *, like: Tensor | None = None) -> Tensor:
    """The tensor without the repeats of an expanded one, which cannot be written to."""
    if not tensor.ndim or tensor.layout is not torch.strided:
        return tensor
    strides = (tensor if like is None else like).stride()
    return tensor[tuple(slice(1) if stride == 0 else slice(None) for stride in strides)]


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    data = tensor.detach()
    if data.layout is not torch.strided:
        return data.layout, data.shape, data.dtype
    storage = data.untyped_storage()._cdata
    return storage, data.storage_offset(), data.shape, data.stride(), data.dtype


def _bits(parameter: Tensor) -> Tensor:
    """The values as integers, so that NaN equals itself and -0.0 differs from 0.0."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    data = numbers_in(parameter)
    if data.is_complex():
        data = torch.view_as_real(data)
    return data.view(kinds[data.element_size()])


def _plain_among(attributes: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Plain attributes; a dict or list comes with a copy of what is in it."""
    return {
        name: (value, value.copy() if type(value) in CONTAINERS else None)
        for name, value in attributes.items()
        if isinstance(value, PLAIN) or (type(value) in CONTAINERS and name not in REGISTERS)
    }


def _tensors_among(attributes: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in attributes.items() if isinstance(value, Tensor)}


def _same(register: Any, before: Mapping[str, Any]) -> bool:
    now = dict(register)
    return list(now) == list(before) and all(now[name] is before[name] for name in now)


def generator_states() -> dict[str, Any]:
    """The states of the global random generators of Python, torch and (where in use) numpy.

    Example:
        >>> sorted(generator_states())[-2:]
        ['python', 'torch']
    """
    found: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        found["numpy"] = sys.modules["numpy"].random.get_state()
    return found


def restore_generators(generators: Mapping[str, Any]) -> None:
    """Sets the global random generators to states from `generator_states`.

    Example:
        >>> before = generator_states()
        >>> first = torch.rand(())
        >>> restore_generators(before)
        >>> bool(first == torch.rand(()))
        True
    """
    random.setstate(generators["python"])
    torch.set_rng_state(generators["torch"])
    if "cuda" in generators:
        torch.cuda.set_rng_state_all(generators["cuda"])
    if "numpy" in generators:
        sys.modules["numpy"].random.set_state(generators["numpy"])


# --- digests ------------------------------------------------------------------------------------

WALKED = 20_000
"""How many objects below the modules a digest reads; a model that keeps more is made anew."""


def digest_of_state(things: Sequence[Any]) -> str:
    """A digest of everything that modules hold: tensors, gradients, modes, hooks, attributes.

    It also reads what Python objects below the modules keep: counters, caches, generators. If these
    are more than `WALKED` objects, two digests never agree, because they would prove nothing.

    Args:
        things: Modules or a batch, with all that is below them.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> before = digest_of_state([layer])
        >>> layer.counter = [0]
        >>> digest_of_state([layer]) == before
        False
    """
    found = blake2b(digest_size=16)
    seen: dict[int, int] = {}
    keep: list[Any] = []  # so that no id is used twice
    stack: list[Any] = list(reversed(things))
    while stack:
        thing = stack.pop()
        if id(thing) in seen:
            found.update(b"again %d;" % seen[id(thing)])
            continue
        if len(seen) > WALKED:
            return os.urandom(16).hex()
        text, inside = _read(thing)
        found.update(text)
        if inside is not None:
            seen[id(thing)] = len(seen)
            keep.append(thing)
            stack.extend(reversed(inside))
    return found.hexdigest()


def _read(thing: Any) -> tuple[bytes, list[Any] | None]:
    """What an object is by itself, and what is in it; None if it holds no other objects."""
    if isinstance(thing, Tensor):
        if nn.parameter.is_lazy(thing):
            return b"lazy;", None
        grad = thing.grad if thing.is_leaf else None
        flags = f"{thing.dtype} {tuple(thing.shape)} {thing.device} {thing.requires_grad};"
        try:
            inner = inner_tensors(thing)
            return flags.encode() + (b"" if inner else _raw(thing)), [*inner, grad]
        except ValueError:  # what cannot be read proves nothing
            return os.urandom(16), None
    if isinstance(thing, (bool, int, float, complex, str, bytes, type(None))):
        return f"{type(thing).__name__} {thing!r};".encode(), None
    if isinstance(thing, torch.Generator):
        return thing.get_state().numpy().tobytes(), []
    if isinstance(thing, random.Random):
        return repr(thing.getstate()).encode(), []
    if isinstance(thing, Mapping):
        pairs = list(thing.items())
        return f"{type(thing).__name__} {len(pairs)};".encode(), [x for p in pairs for x in p]
    if isinstance(thing, (list, tuple, deque)):
        return f"{type(thing).__name__} {len(thing)};".encode(), list(thing)
    if isinstance(thing, (set, frozenset)):
        return f"set {len(thing)} {sorted(map(repr, thing))};".encode(), []
    kind = f"{type(thing).__module__}.{type(thing).__qualname__};".encode()
    if isinstance(thing, (type, ModuleType)):
        return kind + thing.__name__.encode(), []
    if isinstance(thing, FunctionType):
        cells = [cell.cell_contents for cell in thing.__closure__ or () if _is_filled(cell)]
        return kind, [*cells, thing.__defaults__]
    if isinstance(thing, MethodType):
        return kind, [thing.__self__, thing.__func__]
    if isinstance(thing, partial):
        return kind, [thing.func, thing.args, thing.keywords]
    numpy = getattr(type(thing), "__module__", "").partition(".")[0] == "numpy"
    if numpy:
        state = getattr(getattr(thing, "bit_generator", thing), "state", None)
        return kind + repr(thing if state is None else state).encode(), []
    return kind, [dict(vars(thing))] if hasattr(thing, "__dict__") else []


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _raw(tensor: Tensor) -> bytes:
    """The bits of a tensor with memory of its own; a tensor on meta has none."""
    values = tensor.detach()
    if values.is_meta:
        return b"meta;"
    checked_present(values)
    values = values.resolve_conj().resolve_neg().cpu().contiguous()
    size = values.numel() * values.element_size()
    if not size:
        return b"empty;"
    return blake2b((ctypes.c_ubyte * size).from_address(values.data_ptr()), digest_size=16).digest()
