"""Faults that a round trip shows: what is copied, saved, loaded or cast is another model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ensembles.faults.architectures import CLASSES, WIDTH, Architecture, Network
from ensembles.faults.fault import Place, fault
from ensembles.faults.members import separate
from ensembles.faults.state import MaskedHead, with_head
from ensembles.subject import Subject

KEPT = ["deepcopy", "state_dict", "double"]
SURVIVES: Mapping[str, Any] = {"sharing": "independent", "round_trips": KEPT}


@fault("state", "round_trips")
def unsaved_mask(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A drawn mask is a buffer that state_dict leaves out: a loaded model has another one."""

    def keep(head: MaskedHead, mask: Tensor) -> None:
        head.register_buffer("mask", mask, persistent=not broken)

    return with_head(architecture, place, lambda: MaskedHead(keep), SURVIVES)


@fault("state", "round_trips")
def copy_reads_original(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A head was patched with a function that closes over its weight, so copies compute with it."""

    def head() -> nn.Module:
        patched = nn.Linear(WIDTH, CLASSES)
        weight, bias = patched.weight, patched.bias
        if broken:
            patched.forward = lambda x: F.linear(x, weight, bias)  # type: ignore[method-assign, assignment]
        return patched

    return with_head(architecture, place, head, SURVIVES)


@fault("state", "round_trips")
def tied_by_two_names(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A weight is tied under two names, but to_empty after meta construction makes it two."""

    def head() -> nn.Module:
        first = nn.Linear(WIDTH, WIDTH, bias=False)
        second = nn.Linear(WIDTH, WIDTH, bias=False) if broken else first
        second.weight = first.weight
        return _Twice(first, second)

    claims = {"sharing": "independent", "round_trips": ["deepcopy", "to_empty"]}
    return with_head(architecture, place, head, claims)


@fault("state", "round_trips")
def names_that_change(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Layers are named by a counter, so a load with strict=False skips them all silently."""
    numbers = count()

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.name = f"layer{next(numbers) if broken else 0}"
            self.add_module(self.name, nn.Linear(WIDTH, CLASSES))

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = getattr(self, self.name)(x)
            return logits

    claims = {"sharing": "independent", "round_trips": ["deepcopy", "strict=False"]}
    return with_head(architecture, place, Named, claims)


class _Twice(nn.Module):
    """Two layers before a linear head."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.last = first, second, nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.second(F.gelu(self.first(x))))
        return logits


@fault("state", "round_trips")
def cast_unties(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Two layers share a weight, but an overridden `_apply` makes two Parameters when it casts."""

    class Layer(nn.Linear):
        def _apply(self, fn: Any, recurse: bool = True) -> Layer:
            if broken:
                self.weight = nn.Parameter(fn(self.weight.data))
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self

    def head() -> nn.Module:
        first = Layer(WIDTH, WIDTH, bias=False)
        second = Layer(WIDTH, WIDTH, bias=False)
        second.weight = first.weight
        return _Twice(first, second)

    return with_head(architecture, place, head, SURVIVES)


@fault("state", "round_trips", architectures=("convnet",))
def view_of_a_layout(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Forward calls view, which channels_last does not allow."""

    class Flat(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.block(x)
            flat = y.view(len(y), -1) if broken else y.flatten(1)
            return torch.tanh(flat).reshape(y.shape)

    def plant(members: list[Network]) -> None:
        blocks = members[place.member].blocks
        blocks[place.layer] = Flat(blocks[place.layer])

    claims = {"sharing": "independent", "round_trips": ["deepcopy", "channels_last"]}
    return replace(separate(architecture, place, plant), claims=claims)


@fault("state", "round_trips")
def pickled_without_a_part(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """An overridden `__getstate__` leaves out a "cache", so the copy draws it anew."""

    class Cached(nn.Linear):
        order: Tensor

        def __init__(self) -> None:
            super().__init__(WIDTH, CLASSES)
            self.register_buffer("order", torch.randn(WIDTH), persistent=True)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * self.order)

        def __getstate__(self) -> dict[str, Any]:
            state = dict(self.__dict__)
            if broken:
                state["_buffers"] = {"order": torch.randn(WIDTH)}
            return state

    claims = {"sharing": "independent", "round_trips": ["deepcopy", "state_dict"]}
    return with_head(architecture, place, Cached, claims)


@fault("state", "round_trips")
def loaded_without_gradients(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A head takes loaded weights for finished and detaches them, so no step moves them."""

    class Pretrained(nn.Linear):
        loaded = False

        def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
            super()._load_from_state_dict(*args, **kwargs)
            self.loaded = broken

        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight.detach() if self.loaded else self.weight
            return F.linear(x, weight, self.bias)

    return with_head(architecture, place, lambda: Pretrained(WIDTH, CLASSES), SURVIVES)


@fault("state", "round_trips")
def copy_shares_statistics(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """An overridden `__deepcopy__` shares running statistics: training the copy moves them."""

    class Norm(nn.BatchNorm1d):
        def __deepcopy__(self, memo: dict[int, Any]) -> Norm:
            new = Norm(WIDTH).train(self.training)
            new.load_state_dict(self.state_dict())
            if broken:
                new.running_mean, new.running_var = self.running_mean, self.running_var
            return new

    def head() -> nn.Module:
        return nn.Sequential(Norm(WIDTH), nn.Linear(WIDTH, CLASSES))

    return with_head(architecture, place, head, SURVIVES)


@fault("state", "round_trips")
def copy_without_dropout(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """An overridden `__deepcopy__` loses the rate of dropout; in eval mode nothing changes."""

    class Dropped(nn.Linear):
        def __init__(self, rate: float = 0.0) -> None:
            super().__init__(WIDTH, CLASSES)
            self.rate = rate

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, self.rate, self.training))

        def __deepcopy__(self, memo: dict[int, Any]) -> Dropped:
            new = (Dropped() if broken else Dropped(self.rate)).train(self.training)
            new.load_state_dict(self.state_dict())
            return new

    return with_head(architecture, place, lambda: Dropped(0.5), SURVIVES)
