"""Faults of state: kept where nothing finds it, lost on the way, or moving when it should not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ensembles.faults.architectures import (
    CLASSES,
    WIDTH,
    Architecture,
    Ensemble,
    Network,
    cross_entropy,
)
from ensembles.faults.fault import Place, fault
from ensembles.faults.members import separate, together
from ensembles.subject import Subject

__all__ = ["CLEAN", "MaskedHead", "with_head"]

CLEAN: Mapping[str, Any] = {"sharing": "independent", "hygiene": "clean"}


def with_head(
    architecture: Architecture,
    place: Place,
    head: Callable[[], nn.Module],
    claims: Mapping[str, Any] = CLEAN,
) -> Subject:
    """One member has this head, which is made anew with it.

    Example:
        >>> from ensembles.faults.architectures import ARCHITECTURES
        >>> subject = with_head(ARCHITECTURES["mlp"], Place(), lambda: nn.Linear(WIDTH, 2))
        >>> [member.head.out_features for member in subject.make()]
        [3, 2]
    """

    def plant(members: list[Network]) -> None:
        members[place.member].head = head()  # type: ignore[assignment]

    return replace(separate(architecture, place, plant), claims=claims)


class MaskedHead(nn.Linear):
    """A head with a mask over half of its weight, which `keep` puts somewhere.

    Example:
        >>> head = MaskedHead(lambda made, mask: made.register_buffer("mask", mask))
        >>> int(head.mask.sum()) == head.weight.numel() // 2
        True
    """

    mask: Tensor

    def __init__(self, keep: Callable[[MaskedHead, Tensor], None]) -> None:
        super().__init__(WIDTH, CLASSES)
        mask = torch.zeros(CLASSES, WIDTH)
        mask.view(-1)[torch.randperm(mask.numel())[: mask.numel() // 2]] = 1.0
        keep(self, mask)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return F.linear(x, self.weight * self.mask, self.bias)


@fault("state", "hygiene")
def mask_not_buffer(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A mask is a plain attribute: it stays where it is when the model moves, and is not saved."""

    def keep(head: MaskedHead, mask: Tensor) -> None:
        head.__dict__["mask"] = mask
        if not broken:
            del head.__dict__["mask"]
            head.register_buffer("mask", mask)

    return with_head(architecture, place, lambda: MaskedHead(keep))


@fault("state", "hygiene")
def norm_in_a_list(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A norm without weights sits in a Python list: it is not saved, and eval() misses it."""

    class Normed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(WIDTH, CLASSES)
            norms = [nn.BatchNorm1d(WIDTH, affine=False)]
            self.norms: Any = norms if broken else nn.ModuleList(norms)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.norms[0](x))

    return with_head(architecture, place, Normed)


@fault("state", "hygiene")
def eval_misses_a_member(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The ensemble has its own train(), which leaves out one member."""

    class Own(Ensemble):
        def train(self, mode: bool = True) -> Own:
            self.training = mode
            for position, member in enumerate(self.members):
                if not (broken and position == place.member):
                    member.train(mode)
            return self

    return replace(together(architecture, place, Own), claims=CLEAN)


@fault("state", "hygiene")
def dropout_in_eval(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """`F.dropout(x, p)` without `training=` drops out in eval mode too."""

    class Dropping(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, 0.5, training=broken or self.training))

    return with_head(architecture, place, lambda: Dropping(WIDTH, CLASSES))


@fault("state", "hygiene")
def statistics_move_in_eval(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A running mean is updated in eval mode too."""

    class Centred(nn.Linear):
        mean: Tensor

        def __init__(self) -> None:
            super().__init__(WIDTH, CLASSES)
            self.register_buffer("mean", torch.zeros(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            if broken or self.training:
                self.mean.lerp_(x.detach().mean(0), 0.1)
            return super().forward(x - self.mean)

    return with_head(architecture, place, Centred)


@fault("state", "hygiene")
def frozen_but_moving(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A norm is frozen by requires_grad_(False), but its statistics still move."""

    class Norm(nn.BatchNorm1d):
        def train(self, mode: bool = True) -> Norm:
            return super().train(mode and broken)

    def head() -> nn.Module:
        norm = Norm(WIDTH).requires_grad_(False)
        return nn.Sequential(norm, nn.Linear(WIDTH, CLASSES))

    return with_head(architecture, place, head)


@fault("state", "hygiene")
def norm_updated_twice(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """Two streams of a step go through one norm, so its statistics move twice."""

    class Streams(nn.Linear):
        def __init__(self) -> None:
            super().__init__(WIDTH, CLASSES)
            norm = nn.BatchNorm1d(WIDTH, affine=False)
            other = norm if broken else nn.BatchNorm1d(WIDTH, affine=False)
            self.norms = nn.ModuleList([norm, other])

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.norms[0](x) + self.norms[1](2 * x.sigmoid()))

    return with_head(architecture, place, Streams)


@fault("state", "hygiene")
def norm_of_two_widths(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A slimmable layer normalises its two widths with slices of one norm's statistics."""
    half = WIDTH // 2

    class Slimmable(nn.Linear):
        def __init__(self) -> None:
            super().__init__(WIDTH, CLASSES)
            norm = nn.BatchNorm1d(WIDTH, affine=False)
            other = norm if broken else nn.BatchNorm1d(WIDTH, affine=False)
            self.norms = nn.ModuleList([norm, other])

        def normalised(self, x: Tensor, norm: Any) -> Tensor:
            width = x.shape[1]
            mean, var = norm.running_mean[:width], norm.running_var[:width]
            return F.batch_norm(x, mean, var, training=self.training)

        def forward(self, x: Tensor) -> Tensor:
            narrow = self.normalised(x[:, :half], self.norms[0])
            wide = self.normalised(x, self.norms[1])
            return super().forward(wide) + F.linear(narrow, self.weight[:, :half])

    return with_head(architecture, place, Slimmable)


@fault("state", "hygiene")
def drifting_unused(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A member's loss is multiplied by 0 where it is to be left out: its weights still decay."""

    def loss(outputs: Mapping[str, Tensor]) -> Tensor:
        factors = {name: float(name != str(place.member)) for name in outputs}
        used = outputs if broken else [name for name, factor in factors.items() if factor]
        return torch.stack([factors[name] * cross_entropy(outputs[name]) for name in used]).sum()

    def decaying(members: list[Network]) -> torch.optim.Optimizer:
        return torch.optim.SGD(nn.ModuleList(members).parameters(), lr=0.1, weight_decay=0.1)

    healthy = separate(architecture, place, lambda members: None)
    return replace(healthy, loss=loss, optimizer=decaying, claims=CLEAN)


@fault("state", "hygiene")
def snapshot_by_reference(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """The best weights so far are kept as state_dict(), which holds the live ones."""

    def plant(members: list[Network]) -> None:
        state = members[place.member].state_dict()
        members[place.member].best = state if broken else copy.deepcopy(state)  # type: ignore[assignment]

    return replace(separate(architecture, place, plant), claims=CLEAN)


@fault("state", "hygiene")
def batch_in_place(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A stem scales its inputs in place: the members after it are given another batch."""

    class Halved(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x.mul_(0.5) if broken else x * 0.5)  # type: ignore[no-untyped-call]

    def plant(members: list[Network]) -> None:
        members[place.member].stem = Halved(members[place.member].stem)

    return replace(separate(architecture, place, plant), claims=CLEAN)


@fault("state", "hygiene")
def wakes_after_a_call(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A head ends its forward pass in train mode: the next call of an evaluation drops out."""

    class Waking(nn.Linear):
        def __init__(self) -> None:
            super().__init__(WIDTH, CLASSES)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(self.drop(x))
            self.drop.train(broken or self.training)
            return y

    return with_head(architecture, place, Waking)


@fault("state", "hygiene")
def stays_behind(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """An own `_apply` puts a mask back where it was: a model that moves leaves it behind."""

    class Staying(MaskedHead):
        def __init__(self) -> None:
            super().__init__(lambda head, mask: head.register_buffer("mask", mask))

        def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Staying:
            mask = self.mask
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            self.mask = mask if broken else self.mask
            return self

    return with_head(architecture, place, Staying)


@fault("state", "hygiene")
def seeds_in_forward(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A head seeds the global generators in every call, so that every step drops out alike."""

    class Noisy(nn.Linear):
        def __init__(self) -> None:
            super().__init__(WIDTH, CLASSES)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            if broken and self.training:
                torch.manual_seed(0)
            return super().forward(self.drop(x))

    return with_head(architecture, place, Noisy)


@fault("state", "hygiene")
def stale_cache(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """In eval mode a head caches what it made of its weight, and training does not renew it."""

    class Kept(nn.Linear):
        made: Tensor | None = None

        def __init__(self) -> None:
            super().__init__(WIDTH, CLASSES)

        def train(self, mode: bool = True) -> Kept:
            self.made = self.made if broken else None
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                return F.linear(x, F.normalize(self.weight), self.bias)
            if self.made is None:
                self.made = F.normalize(self.weight).detach()
            return F.linear(x, self.made, self.bias)

    return with_head(architecture, place, Kept)


@fault("state", "hygiene")
def reads_the_last_call(architecture: Architecture, place: Place, broken: bool) -> Subject:
    """A head scales by the mean of the last batch, which is a plain attribute, in eval mode too."""

    class Scaled(nn.Linear):
        seen: float = 1.0

        def __init__(self) -> None:
            super().__init__(WIDTH, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x) * (self.seen if broken else 1.0)
            self.seen = 1.0 + float(x.detach().abs().mean())
            return y

    return with_head(architecture, place, Scaled)
