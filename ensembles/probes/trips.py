"""One conversion of one model, and everything of before and after that can be compared.

The model has been trained a little first, so that what the factory makes anew is told from what
the conversion carried over. Outputs are compared twice: as converted, and after the same change of
every weight in both, because a copy may compute with weights of the original. Owners of weights
are compared too, because the same function may be cut off from its weights in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ensembles.probes.conversions import Conversion, NotLookedAt, Source, converted
from ensembles.probes.owned import Reach, owned_otherwise, reach_of
from ensembles.probes.precision import autocasts, dtypes_of
from ensembles.probes.registers import registered
from ensembles.probes.state import seed_generators
from ensembles.probes.steps import distance
from ensembles.probes.training import fresh
from ensembles.probes.training_calls import TrainingCall, training_call, unlike
from ensembles.subject import (
    Model,
    Outputs,
    call,
    is_one_module,
    member_outputs,
    named_modules_of,
    whole,
)
from ensembles.tolerance import clear_change, tolerance_of

__all__ = ["Trip", "owners_of", "trip"]

STEP = 0.1
"""Least change of every weight, in multiples of its tensor's own spread: outputs differ clearly."""


@dataclass(frozen=True)
class Trip:
    """What one conversion did to a model.

    Attributes:
        reason: Why nothing could be compared; then all else is empty.
        error: What the conversion, or the call after it, raised.
        tied: How many tensors had several names before.
        untied: The names of tensors that were one, and are several.
        newly_tied: The names of tensors that were several, and are one.
        registers: Whether a module holds parameters under their names afterwards.
        lost: Parameters that are not registered any more, or not trainable any more.
        added: Parameters that are registered besides, or are trainable besides.
        optimized: Whether an optimizer made before can hold the parameters of afterwards.
        stale: Parameters that an optimizer made before does not hold.
        difference: Of outputs, relative to the greatest; None where the call raised.
        after_step: The same after a change of every weight; None where that was not looked at.
        aliased: Whether a change of the copy changed the model that it was made of.
        in_training: The difference in train mode, of outputs and of the statistics that it moves;
            None where that was not looked at.
        statistics: Buffers of the model that a training call of the copy moved.
        unsaved: Buffers that no state_dict holds.
        tolerance: The greatest difference that is none, of dtypes and of the conversion.
        owned: Whether owners of weights could be compared.
        owned_otherwise: Weights whose elements reach other members than before, in sentences.
    """

    reason: str = ""
    error: str = ""
    tied: int = 0
    untied: tuple[tuple[str, ...], ...] = ()
    newly_tied: tuple[tuple[str, ...], ...] = ()
    registers: bool = False
    lost: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    optimized: bool = False
    stale: tuple[str, ...] = ()
    difference: float | None = None
    after_step: float | None = None
    aliased: bool = False
    in_training: float | None = None
    statistics: tuple[str, ...] = ()
    unsaved: tuple[str, ...] = ()
    tolerance: float = 0.0
    owned: bool = False
    owned_otherwise: tuple[str, ...] = ()


def trip(
    make: Callable[[], Model],
    batch: Any,
    conversion: Conversion,
    *,
    seed: int,
    outputs: Outputs | None = None,
    owners: Reach | None = None,
) -> Trip:
    """Builds a model, trains it a little, converts it, and compares; global generators move.

    Args:
        make: Builds a new model at each call.
        batch: What it is called with.
        conversion: What is done to it.
        seed: From which models are built.
        outputs: Splits what one module returns into member outputs.
        owners: From `owners_of`; without them, who owns what is not compared.

    Example:
        >>> from ensembles.probes.conversions import CONVERSIONS
        >>> found = trip(lambda: nn.Linear(2, 2), torch.ones(3, 2), CONVERSIONS["pickle"], seed=0)
        >>> found.difference, found.lost
        (0.0, ())
    """
    model = _built(make, seed)
    source = Source(_trained(model, batch), lambda: _built(make, seed + 1), batch)
    with autocasts() as cast:
        before = _outputs(source.module, batch, seed)
    dtypes = dtypes_of(source.module, batch, before, *cast)
    same = tolerance_of("reordered", *dtypes)
    by_cast = () if conversion.cast is None else (conversion.cast,)
    tolerance = tolerance_of(conversion.compared, *dtypes, *by_cast)
    noise = _noise(source.module, clear_change(STEP, *dtypes))
    moved = _outputs_moved(source, noise, seed)
    names, parameters = _names(source.module), _parameters(source.module)
    unsaved = _unsaved(source.module)
    same_code = conversion.compared == "reordered"
    trained = _in_training(source.module, batch, seed) if same_code else None
    try:
        result = converted(conversion, source)
    except NotLookedAt as told:
        return Trip(reason=str(told))
    except Exception as error:
        said = _said(error)
        return Trip(reason=f"it raised {said}") if conversion.partial else Trip(error=said)
    after = _Facts() if result.module is None else _compared(names, result.module)
    if result.module is not None:
        now = _parameters(result.module)
        after.lost = tuple(n for n, p in parameters.items() if not _alike(p, now.get(n)))
        after.added = tuple(n for n, p in now.items() if not _alike(p, parameters.get(n)))
        known = {id(p) for p in parameters.values()}
        after.stale = tuple(n for n, p in now.items() if p.requires_grad and id(p) not in known)
    facts: dict[str, Any] = {
        "tied": sum(len(group) > 1 for group in names),
        "untied": after.untied,
        "newly_tied": after.newly_tied,
        "registers": result.module is not None,
        "lost": after.lost,
        "added": after.added,
        "optimized": conversion.result != "copy" and result.module is not None,
        "stale": after.stale if conversion.result != "copy" else (),
        "unsaved": unsaved,
        "tolerance": tolerance,
    }
    try:
        found = _outputs(result.call, batch, seed)
    except Exception as error:
        if conversion.partial and (result.module is None or conversion.result == "shared"):
            # By whom it was called, on what, is no news here.
            return Trip(reason=f"what it makes cannot be called: {_said(error.__cause__ or error)}")
        return Trip(error=_said(error), **facts)
    facts["difference"] = _difference(before, found)
    if trained is not None and result.module is not None:
        original = source.module if conversion.result == "copy" else None
        again = _in_training(result.module, batch, seed, original)
        facts["in_training"] = float("inf") if again is None else unlike(trained, again)
        facts["statistics"] = () if again is None else again.others
    held = _held(result.module) if result.module is not None else result.tensors
    if held is not None and noise.keys() <= held.keys():
        _move({name: held[name] for name in noise}, noise)
        facts["after_step"] = _difference(moved, _outputs(result.call, batch, seed))
        if conversion.result == "copy":
            facts["aliased"] = _changed(source, before, same, seed)
    if owners is not None and result.module is not None:
        facts["owned"], facts["owned_otherwise"] = _owned(owners, result.module, batch, outputs)
    return Trip(**facts)


def owners_of(
    make: Callable[[], Model], batch: Any, *, seed: int, outputs: Outputs | None = None
) -> Reach | None:
    """Who owns what in a model of the factory; None where nothing can be said.

    Example:
        >>> owners = owners_of(lambda: nn.Linear(2, 1, bias=False), torch.ones(3, 2), seed=0)
        >>> list(owners)
        ['weight']
    """
    module = _trained(_built(make, seed), batch)
    return _owners(module, batch, outputs)


def _owners(module: nn.Module, batch: Any, outputs: Outputs | None) -> Reach | None:
    split = None if isinstance(module, Together) else outputs
    try:
        return reach_of(module, batch, split)
    except ValueError:
        return None


def _owned(
    before: Reach, module: nn.Module, batch: Any, outputs: Outputs | None
) -> tuple[bool, tuple[str, ...]]:
    if any(hasattr(p, "device_mesh") for p in module.parameters()):
        return False, ()  # each process holds a shard
    try:
        after = _owners(module, batch, outputs)
    except NotImplementedError:  # an exported program has no modes
        return False, ()
    if after is None:
        return True, ("no output depends on a weight by autograd any more",)
    return True, owned_otherwise(before, after)


def _in_training(
    module: nn.Module, batch: Any, seed: int, bystander: nn.Module | None = None
) -> TrainingCall | None:
    def called(given: nn.Module) -> tuple[Tensor, ...]:
        found = member_outputs(given, fresh(batch), outputs=whole)
        return tuple(y.detach().clone() for y in found["model"])

    return training_call(module, called, seed=seed, bystander=bystander)


def _unsaved(module: nn.Module) -> tuple[str, ...]:
    saved = module.state_dict().keys()
    return tuple(e.names[0] for e in registered(module) if saved.isdisjoint(e.names))


def _changed(source: Source, before: tuple[Tensor, ...], tolerance: float, seed: int) -> bool:
    """Whether the original computes something else by now, or nothing any more."""
    try:
        return not _difference(before, _outputs(source.module, source.batch, seed)) <= tolerance
    except ValueError:
        return True


class _Facts:
    untied: tuple[tuple[str, ...], ...] = ()
    newly_tied: tuple[tuple[str, ...], ...] = ()
    lost: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    stale: tuple[str, ...] = ()


# --- the model ----------------------------------------------------------------------------------


class Together(nn.Module):
    """The members of a list or dict as one module, which can be converted as a whole.

    Example:
        >>> [y.shape for y in Together([nn.Linear(2, 3)])(torch.ones(4, 2))]
        [torch.Size([4, 3])]
    """

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, *args: Any, **kwargs: Any) -> list[Any]:
        """What every member returns."""
        return [member(*args, **kwargs) for member in self.members]


def _built(make: Callable[[], Model], seed: int) -> nn.Module:
    seed_generators(seed)
    model = make()
    if is_one_module(model):
        return model
    return Together(list(named_modules_of(model).values()))


def _trained(module: nn.Module, batch: Any) -> nn.Module:
    """Statistics have seen the batch, and every weight has moved."""
    with torch.no_grad():
        module.train()
        # Some models have no train mode that this batch fits (BatchNorm of a single value).
        with suppress(ValueError):
            call(module, fresh(batch), place="the model")
        _move(_held(module), _noise(module, STEP))
    return module.eval()


def _noise(module: nn.Module, step: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for entry in registered(module):
        tensor = entry.tensor.detach()
        if entry.kind == "parameter" and tensor.is_floating_point() and entry.tensor.requires_grad:
            spread = tensor.abs().mean().nan_to_num(1.0).clamp(min=0.01).cpu().float()
            drawn = torch.randn(tensor.shape, generator=generator) * spread * step
            found[entry.names[0]] = drawn.to(tensor)
    return found


def _move(tensors: Mapping[str, Tensor], noise: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, change in noise.items():
            tensor: Any = tensors[name]
            if hasattr(tensor, "device_mesh"):  # sharded
                from torch.distributed.tensor import distribute_tensor

                change = distribute_tensor(change, tensor.device_mesh, tensor.placements)
            tensor.add_(change)


def _outputs_moved(source: Source, noise: Mapping[str, Tensor], seed: int) -> tuple[Tensor, ...]:
    held = {name: tensor for name, tensor in _held(source.module).items() if name in noise}
    values = {name: tensor.detach().clone() for name, tensor in held.items()}
    _move(held, noise)
    found = _outputs(source.module, source.batch, seed)
    with torch.no_grad():
        for name, tensor in held.items():
            tensor.copy_(values[name])
    return found


# --- what is compared ---------------------------------------------------------------------------


def _outputs(callee: Callable[..., Any], batch: Any, seed: int) -> tuple[Tensor, ...]:
    module = callee if isinstance(callee, nn.Module) else _Callee(callee)
    seed_generators(seed)
    with torch.no_grad():
        found = member_outputs(module, fresh(batch), outputs=whole)
    if hasattr(callee, "reshard"):
        callee.reshard()
    return tuple(y.detach().clone() for y in found["model"])


class _Callee(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _difference(one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> float:
    if len(one) != len(two):
        return float("inf")
    scale = max((float(y.abs().nan_to_num(0.0).max()) for y in one if y.numel()), default=1.0)
    found = max((distance(a, b) for a, b in zip(one, two, strict=True)), default=0.0)
    return found / scale if scale > 0 else found


def _held(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters(remove_duplicate=False))


_parameters = _held


def _alike(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.requires_grad == other.requires_grad


def _names(module: nn.Module) -> list[frozenset[str]]:
    return [frozenset(entry.names) for entry in registered(module)]


def _compared(before: list[frozenset[str]], module: nn.Module) -> _Facts:
    now = _names(module)
    facts = _Facts()
    facts.untied = tuple(
        tuple(sorted(group))
        for group in before
        if len(group) > 1 and not any(group <= other for other in now)
    )
    facts.newly_tied = tuple(
        tuple(sorted(group))
        for group in now
        if len(group) > 1 and not any(group <= other for other in before)
    )
    return facts


def _said(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:160]
