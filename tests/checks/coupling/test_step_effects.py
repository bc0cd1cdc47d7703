import random

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ensembles.case import Case
from ensembles.checks.coupling.step_effects import step_effects


def effects_of(model, batch, **recipe):
    return step_effects(Case.of(model, batch, **recipe))


class Together(nn.Module):
    """Members in one module, which counts its calls by mode."""

    def __init__(self, members, calls=None) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.count = (lambda training: None) if calls is None else calls.append

    def forward(self, x):
        self.count(self.training)
        return [member(x) for member in self.members]


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(),
        nn.Linear(36, 3),
    )  # fmt: skip


def images() -> torch.Tensor:
    return torch.randn(4, 2, 5, 5)


def momentum(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def decaying(model):
    return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)


# --- what it costs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shared", "optimizer", "expected"),
    [
        # A look is a call in each mode: the control twice, and once after each step. Besides, in
        # train mode, the call before the control, and the one that serves all members; and, as
        # these members drop out, 8 calls with other draws.
        (False, None, (2 + 2 + 3 + 8, 2 + 3)),
        (False, momentum, (2 + 2 + 3 + 8, 2 + 3)),
        (False, decaying, (2 + 2 + 3 + 8, 2 + 3)),
        (True, momentum, (2 + 2 + 3 + 8, 2 + 3)),
        # What decay moves of a shared layer is looked at once more for each member.
        (True, decaying, (2 + 2 + 2 * 3 + 8, 2 + 2 * 3)),
    ],
    ids=["default", "momentum", "decay", "shared_momentum", "shared_decay"],
)
def test_one_module_is_called_as_often_as_needed(shared, optimizer, expected):
    members = [conv() for _ in range(3)]
    if shared:
        for member in members[1:]:
            member[5] = members[0][5]
    calls: list[bool] = []
    effects_of(Together(members, calls), images(), optimizer=optimizer)
    assert (calls.count(True), calls.count(False)) == expected


def test_members_that_draw_nothing_are_called_once_for_all_steps():
    calls: list[bool] = []
    members = [nn.Sequential(nn.Flatten(), nn.Linear(50, 3)) for _ in range(3)]
    effects_of(Together(members, calls), images())
    assert (calls.count(True), calls.count(False)) == (2 + 2 + 3, 2 + 3)


# --- members that mix in some draws -------------------------------------------------------------


class Mixing(nn.Module):
    """Members whose features change places in a share of all training calls."""

    def __init__(self, share, draw=torch.rand, dropout=0.0) -> None:
        super().__init__()
        self.stems = nn.ModuleList(nn.Linear(4, 6) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in range(3))
        self.share, self.draw, self.dropout = share, draw, nn.Dropout(dropout)

    def forward(self, x):
        features = [self.dropout(stem(x).tanh()) for stem in self.stems]
        if self.training and float(self.draw(())) < self.share:
            features = features[1:] + features[:1]
        return [head(y) for head, y in zip(self.heads, features, strict=True)]


@pytest.mark.parametrize("draw", [torch.rand, lambda _: random.random()], ids=["torch", "python"])
@pytest.mark.parametrize("seed", range(3))
def test_members_that_mix_in_some_draws_move_each_other(draw, seed):
    torch.manual_seed(seed)
    found = effects_of(Mixing(0.5, draw, dropout=0.5), torch.randn(5, 4)).moved
    pairs = {(effect.step, effect.member) for effect in found}
    assert {("0", "1"), ("1", "2"), ("2", "0")} <= pairs
    assert all(effect.by > 0 for effect in found)


@pytest.mark.parametrize("dropout", [0.0, 0.5, 0.95])
def test_members_that_draw_and_do_not_mix_move_nothing(dropout):
    assert effects_of(Mixing(0.0, dropout=dropout), torch.randn(5, 4)).moved == ()


# --- one call serves all members ----------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant) -> None:
        super().__init__()
        self.stem, self.rest = nn.Conv2d(2, 2, 1), conv()
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(self.rest[2:], self.rest[:2](self.stem(x)), use_reentrant=self.reentrant)


@pytest.mark.parametrize(
    "make",
    [
        conv,
        lambda: Checkpointed(reentrant=True),
        lambda: Checkpointed(reentrant=False),
        lambda: nn.Sequential(
            nn.Flatten(), nn.utils.parametrizations.spectral_norm(nn.Linear(50, 3))
        ),
        lambda: nn.Sequential(
            nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(50, 3))
        ),
    ],
    ids=["conv", "reentrant_checkpoint", "checkpoint", "spectral_norm", "weight_norm"],
)
@pytest.mark.parametrize("optimizer", [None, momentum, decaying], ids=["sgd", "momentum", "decay"])
def test_what_the_graph_needs_is_as_it_was_at_each_step(make, optimizer):
    members = [make() for _ in range(3)]
    members.append(nn.Sequential(members[0], nn.Tanh()))
    found = effects_of(
        Together(members), images(), members=lambda m: m.members, optimizer=optimizer
    )
    assert {(e.step, e.member) for e in found.moved} == {("0", "3"), ("3", "0")}
    for step in "03":
        kinds = {e.place.split()[0] for e in found.moved if e.step == step}
        assert {"output", "parameter"} <= kinds


def test_the_steps_of_one_module_are_those_of_its_members():
    members = [nn.Sequential(nn.Flatten(), nn.Linear(50, 4), nn.Linear(4, 3)) for _ in range(3)]
    members[2][2] = members[0][2]
    x = images()
    apart = effects_of(members, x)
    together = effects_of(Together(members), x, members=lambda m: m.members)
    assert apart.moved == together.moved
    assert len(apart.moved) == 6


def test_a_freeze_by_the_optimizer_holds_in_the_call():
    class Stopped(nn.Module):
        """Has no gradient where its weight is frozen."""

        def __init__(self):
            super().__init__()
            self.own, self.common = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return [self.own(x), self.common(x), self.common(x) * 2]

    def frozen(model):
        model.common.weight.requires_grad_(False)
        return torch.optim.SGD(model.parameters(), lr=0.1)

    model = Stopped()
    found = effects_of(
        model, torch.randn(3, 4), optimizer=frozen, members=lambda m: [m.own, m.common, m.common]
    )
    assert {e.place for e in found.moved} == {"output", "parameter bias"}
    assert model.common.weight.requires_grad


def test_a_workspace_that_the_next_call_overwrites_is_an_error():
    class Workspace(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(4, 2) for _ in range(2))
            self.kept = [torch.zeros(3, 4)]

        def forward(self, x):
            self.kept[0].copy_(x)
            return [head(self.kept[0]) for head in self.heads]

    with pytest.raises(ValueError, match=r"a tensor of shape \(3, 4\) that the backward pass"):
        effects_of(Workspace(), torch.randn(3, 4))


def test_members_in_train_mode_are_those_in_eval_mode():
    class Fewer(Together):
        def forward(self, x):
            return super().forward(x)[: 1 if self.training else 2]

    told = "yields members 0, 1 in eval mode and 0 in train mode"
    with pytest.raises(ValueError, match=told):
        effects_of(Fewer([nn.Linear(2, 2), nn.Linear(2, 2)]), torch.randn(3, 2))
