"""What conversions do to a model: everything of before and after that can be compared.

The model is trained a little first, so that what the factory makes anew is told from what the
conversion carries over. Outputs are compared twice: as converted, and after the same change of
every weight in both, because a copy may compute with weights of the original. Owners of weights
are compared too, because the same function may be cut off from its weights in the backward pass.

Models are built as few times as possible. The case's own model serves all conversions that leave
their model as it was; one more serves those that do not, and is what states are loaded into. A
model serves again where a digest proves that it was put back, and is built anew where not.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ensembles.case import Case
from ensembles.checks.round_trips.conversions import (
    Conversion,
    Converted,
    DoesNotApply,
    NotLookedAt,
    Source,
)
from ensembles.checks.round_trips.differences import ASPECTS, Difference, Outcome
from ensembles.checks.round_trips.model_calls import (
    TrainingCall,
    difference,
    outputs_of,
    training_call,
    training_difference,
)
from ensembles.checks.round_trips.overruns import OverrunLog
from ensembles.checks.round_trips.owners import Reach, other_owners, reach_of
from ensembles.handling.members import call, is_one_module, named_modules_of
from ensembles.handling.memory import as_kind_of, numbers_in
from ensembles.handling.precision import autocasts, dtypes_of
from ensembles.handling.registered_tensors import registered
from ensembles.handling.state import Snapshot, digest_of_state, seed_generators
from ensembles.handling.training import fresh, hidden_modules
from ensembles.subject import Model
from ensembles.tolerance import clear_change, tolerance_of
from ensembles.user_calls import said

__all__ = ["Original", "Spare", "outcomes", "together"]

STEP = 0.1
"""Least change of every weight, in multiples of its tensor's own spread: outputs differ clearly."""

_OVERRUN = "on a CPU, PyTorch may write past a buffer in the weight gradient of"


def outcomes(case: Case, conversions: Sequence[Conversion]) -> dict[str, Outcome]:
    """What each conversion does to the case's model, which is as before afterwards.

    Raises:
        ValueError: If a conversion needs a new model, and the case's factory builds none.

    Example:
        >>> from ensembles.checks.round_trips.conversions import LOCAL
        >>> found = outcomes(Case.of(nn.Linear(2, 2), torch.ones(3, 2)), [LOCAL["pickle"]])
        >>> found["pickle"].looked_at, found["pickle"].differences
        (('function', 'ownership', 'parameters'), ())
    """
    spare = Spare(case)
    found: dict[str, Outcome] = {}
    with case.preserved():
        for copying, models in (
            (True, chain([together(case.model)], iter(spare.taken, None))),
            (False, iter(spare.taken, None)),
        ):
            original: Original | None = None
            for conversion in conversions:
                if (conversion.result == "copy") == copying:
                    original = original or Original(case, next(models))
                    found[conversion.name] = original.after(conversion, spare)
                    original = original if original.put_back() else None
    return {conversion.name: found[conversion.name] for conversion in conversions}


# --- the models ---------------------------------------------------------------------------------


class _Together(nn.Module):
    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, *args: Any, **kwargs: Any) -> list[Any]:
        return [member(*args, **kwargs) for member in self.members]


def together(model: Model) -> nn.Module:
    """The members of a list or dict as one module, which can be converted as a whole.

    Example:
        >>> [y.shape for y in together([nn.Linear(2, 3)])(torch.ones(4, 2))]
        [torch.Size([4, 3])]
    """
    return model if is_one_module(model) else _Together(list(named_modules_of(model).values()))


class _Kept:
    """A module in the state that it has now, to return to."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._start = Snapshot([module, *hidden_modules([module])])
        self._digest = digest_of_state([module])

    def put_back(self) -> bool:
        """Returns to that state; whether a digest proves it."""
        self._start.restore()
        return digest_of_state([self.module]) == self._digest


class Spare:
    """Another model of the case's factory, with other random numbers, built when it is needed.

    Example:
        >>> spare = Spare(Case.of(lambda: nn.Linear(2, 2)))
        >>> spare.lent() is spare.lent(), spare.built() is spare.lent()
        (True, False)
    """

    def __init__(self, case: Case) -> None:
        self._case = case
        self._kept: _Kept | None = None

    def built(self) -> nn.Module:
        """A new one, in eval mode.

        Raises:
            ValueError: If the factory builds no new model.
        """
        if self._case.given:
            raise ValueError(
                "this conversion needs a new model, but got an object of type "
                f"{type(self._case.model).__name__}. Give a function that builds it: lambda: ..."
            )
        model = self._case.built(self._case.after_make)
        one, two = (list(named_modules_of(m).values()) for m in (self._case.model, model))
        if {id(m) for m in one} & {id(m) for m in two}:
            raise ValueError(
                "make returns the same module at each call, but this conversion needs a new one. "
                "Build the model inside the function."
            )
        return together(model).eval()

    def lent(self) -> nn.Module:
        """One as it was built, until the next call: the same again if it can be put back."""
        if self._kept is None or not self._kept.put_back():
            self._kept = _Kept(self.built())
        return self._kept.module.eval()

    def taken(self) -> nn.Module:
        """One as it was built, for good."""
        module = self.lent()
        self._kept = None
        return module


class Original:
    """A model that conversions begin with, trained a little, and all that they may break of it."""

    def __init__(self, case: Case, module: nn.Module) -> None:
        self.case, self.module = case, _trained(case, module)
        self.split = None if isinstance(module, _Together) else case.subject.outputs
        with autocasts() as cast:
            self.outputs = outputs_of(case, module)
        self.dtypes = dtypes_of(module, case.batch, self.outputs, *cast)
        self.noise = _noise(module, clear_change(STEP, *self.dtypes))
        self.parameters = _parameters(module)
        self.trainable = {name: p.requires_grad for name, p in self.parameters.items()}
        self.groups = _groups(module)
        self._kept = _Kept(module)
        self.put_back = self._kept.put_back
        self.moved = self._outputs_moved()
        self.owners = reach_of(module, case.batch, self.split)

    def _outputs_moved(self) -> tuple[Tensor, ...]:
        values = {name: self.parameters[name].detach().clone() for name in self.noise}
        _move(self.parameters, self.noise)
        found = outputs_of(self.case, self.module)
        with torch.no_grad():
            for name, value in values.items():
                self.parameters[name].copy_(value)
        return found

    @cached_property
    def in_training(self) -> TrainingCall | None:
        """A call in train mode; None where that is not possible, or does not repeat."""
        return training_call(self.case, self.module)

    def after(self, conversion: Conversion, spare: Spare) -> Outcome:
        """What a conversion does; `put_back` afterwards says whether the model serves again."""
        name, partial = conversion.name, conversion.partial
        trained = self.in_training if conversion.compared == "reordered" else None
        other = spare.lent() if conversion.loads else None
        source = Source(self.module, self.case.batch, spare.built, other)
        try:
            with warnings.catch_warnings():  # of deprecations: users see the table
                warnings.simplefilter("ignore")
                result = conversion.convert(source)
        except NotLookedAt as told:
            return Outcome(name, reason=str(told), applies=not isinstance(told, DoesNotApply))
        except Exception as error:  # of the user's hooks, or of PyTorch's
            if partial:
                return Outcome(name, reason=f"it raised {said(error)}")
            return self._outcome(
                name, ["function"], [Difference("function", "error", error=said(error))]
            )
        looked_at = ["function"]
        found: list[Difference] = []
        if result.module is not None:
            copied = conversion.result == "copy"
            found += self._registered_otherwise(result.module, copied=copied)
            tied = any(len(group) > 1 for group in (*self.groups, *_groups(result.module)))
            looked_at += ["parameters", *(["ties"] * tied), *(["optimizer"] * (not copied))]
        log = OverrunLog()
        try:
            with log if conversion.layout else nullcontext():
                outputs = outputs_of(self.case, result.call)
        except Exception as error:
            if partial and (result.module is None or conversion.result == "shared"):
                # By whom it was called, on what, is no news here.
                cause = said(error.__cause__ or error)
                return Outcome(name, reason=f"what it makes cannot be called: {cause}")
            found.append(Difference("function", "error", error=said(error)))
            return self._outcome(name, looked_at, found)
        apart = any(one.kind == "came apart" for one in found)
        found += self._computed_otherwise(conversion, result, outputs, trained, apart=apart)
        unowned = f"{_OVERRUN} {log.convs[0]}" if log.convs else ""
        if self.owners is not None and result.module is not None and not unowned:
            # To look at owners is a backward pass.
            owned = self._owned_otherwise(self.owners, result.module)
            looked_at += [] if owned is None else ["ownership"]
            found += owned or []
        return replace(self._outcome(name, looked_at, found), unowned=unowned)

    def _registered_otherwise(self, module: nn.Module, *, copied: bool) -> Iterator[Difference]:
        groups = _groups(module)
        for kind, one, other in (
            ("came apart", self.groups, groups),
            ("became one", groups, self.groups),
        ):
            for group in one:
                if len(group) > 1 and not any(group <= names for names in other):
                    yield Difference("ties", kind, tuple(sorted(group)))
        before, now = self.trainable, _parameters(module)
        other_mode = [n for n in before if n in now and before[n] != now[n].requires_grad]
        held = {id(p) for p in self.parameters.values()}
        for aspect, kind, found in (
            ("parameters", "not registered", [n for n in before if n not in now]),
            ("parameters", "registered besides", [n for n in now if n not in before]),
            ("parameters", "frozen", [n for n in other_mode if before[n]]),
            ("parameters", "not frozen", [n for n in other_mode if not before[n]]),
            (
                "optimizer",
                "not held",
                [n for n, p in now.items() if p.requires_grad and id(p) not in held],
            ),
        ):
            if found and (aspect != "optimizer" or not copied):
                yield Difference(aspect, kind, tuple(found))

    def _computed_otherwise(
        self,
        conversion: Conversion,
        result: Converted,
        outputs: tuple[Tensor, ...],
        trained: TrainingCall | None,
        *,
        apart: bool,
    ) -> Iterator[Difference]:
        """The first thing that is computed otherwise."""
        by_cast = filter(None, [conversion.cast])
        limit = tolerance_of(conversion.compared, *self.dtypes, *by_cast)
        if not (by := difference(self.outputs, outputs)) <= limit:
            yield Difference("function", "other outputs", amount=by, limit=limit)
            return
        if apart:  # of course outputs differ, once weights have moved apart
            return
        again = None
        if trained is not None and result.module is not None:
            bystander = self.module if conversion.result == "copy" else None
            again = training_call(self.case, result.module, bystander)
        held = result.tensors if result.module is None else _parameters(result.module)
        if held is not None and self.noise.keys() <= held.keys():
            _move(held, self.noise)
            by = difference(self.moved, outputs_of(self.case, result.call))
            if conversion.result == "copy" and self._is_moved():
                yield Difference("function", "moves the original")
                return
            if not by <= limit:
                yield Difference("function", "other weights", amount=by, limit=limit)
                return
        if trained is None or result.module is None:
            return
        if again is not None and again.others:
            yield Difference("function", "moves the original's buffers", again.others)
            return
        by = float("inf") if again is None else training_difference(trained, again)
        if not by <= limit:
            yield Difference("function", "other in training", amount=by, limit=limit)

    def _is_moved(self) -> bool:
        """Whether the original computes something else by now, or nothing any more."""
        with suppress(ValueError):
            by = difference(self.outputs, outputs_of(self.case, self.module))
            return not by <= tolerance_of("reordered", *self.dtypes)
        return True

    def _owned_otherwise(self, before: Reach, module: nn.Module) -> list[Difference] | None:
        """Of weights with other owners; None where owners cannot be looked at."""
        if any(hasattr(p, "device_mesh") for p in module.parameters()):
            return None  # each process holds a shard
        try:
            now = reach_of(module, self.case.batch, self.split)
        except NotImplementedError:  # an exported program has no modes
            return None
        if now is None:
            return [Difference("ownership", "no owners")]
        return other_owners(before, now)

    def _outcome(self, name: str, looked_at: list[str], found: list[Difference]) -> Outcome:
        if name == "to_empty" and any(one.aspect == "function" for one in found):
            unsaved = _unsaved(self.module)
            found += [Difference("function", "not saved", unsaved)] if unsaved else []
        return Outcome(
            name,
            tuple(aspect for aspect in ASPECTS if aspect in looked_at),
            tuple(sorted(found, key=lambda one: ASPECTS.index(one.aspect))),
        )


# --- parameters ---------------------------------------------------------------------------------


def _trained(case: Case, module: nn.Module) -> nn.Module:
    """Statistics have seen the batch, and every weight has moved."""
    seed_generators(case.seed)
    with torch.no_grad():
        module.train()
        # Some models have no train mode that this batch fits (BatchNorm of a single value).
        with suppress(ValueError):
            call(module, fresh(case.batch), place="the model")
        _move(_parameters(module), _noise(module, STEP))
    return module.eval()


def _noise(module: nn.Module, step: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for entry in registered(module):
        tensor = entry.tensor.detach()
        if entry.kind == "parameter" and tensor.is_floating_point() and entry.tensor.requires_grad:
            spread = numbers_in(tensor).abs().mean().nan_to_num(1.0).clamp(min=0.01).cpu().float()
            drawn = torch.randn(tensor.shape, generator=generator) * spread * step
            found[entry.names[0]] = drawn.to(tensor)
    return found


def _move(tensors: Mapping[str, Tensor], noise: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, change in noise.items():
            tensors[name].add_(as_kind_of(change, tensors[name]))


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters(remove_duplicate=False))


def _groups(module: nn.Module) -> list[frozenset[str]]:
    """Of every tensor the names that it has."""
    return [frozenset(entry.names) for entry in registered(module)]


def _unsaved(module: nn.Module) -> tuple[str, ...]:
    """Parameters and buffers that no state_dict holds."""
    saved = module.state_dict().keys()
    return tuple(e.names[0] for e in registered(module) if saved.isdisjoint(e.names))
