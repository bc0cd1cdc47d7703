"""Healthy networks whose sharing is unusual and correct: no check fires on what they claim."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.parametrizations import weight_norm

from ensembles import Subject, check_ensemble, parametrize_with_checks, split_axis, split_batch
from ensembles.subject import whole

ALONE = {
    "sharing": "distinct",
    "coverage": "complete",
    "hygiene": "clean",
    "batch": "rows",
    "determinism": "bitwise",
}
"""What holds of any one network that is trained."""

SEPARATE = {
    **ALONE,
    "sharing": "independent",
    "ownership": "independent",
    "coupling": "independent",
    "diversity": "independent",
}
"""What holds of members that have nothing in common."""


def sgd(model):
    """Plain training of what is not frozen, of one module or of a list of members."""
    every = (
        model.parameters() if isinstance(model, nn.Module) else nn.ModuleList(model).parameters()
    )
    return torch.optim.SGD([p for p in every if p.requires_grad], lr=0.1, momentum=0.9)


def squares(outputs):
    """A loss that is the sum of what each member loses."""
    return sum(y.square().mean() for y in outputs.values() if y.requires_grad)


def tokens():
    return torch.tensor([[1, 4, 2, 0, 3], [5, 6, 7, 1, 1], [3, 2, 6, 5, 0]])


def sequences():
    return torch.randn(3, 5, 8)


def rows():
    return torch.randn(4, 6)


def images():
    return torch.randn(3, 2, 6, 6)


def healthy(name, make, batch, claims, **more) -> Subject:
    given = {"optimizer": sgd, "loss": squares, "claims": claims}
    return Subject(name=name, make=make, batch=batch, **{**given, **more})


def frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


# --- one network that uses a weight more than once ----------------------------------------------


class LanguageModel(nn.Module):
    """Press and Wolf 2017: the embedding of the input is the weight of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 6)
        self.mixing = nn.GRU(6, 6, batch_first=True)
        self.output = nn.Linear(6, 8, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, words):
        return self.output(self.mixing(self.embedding(words))[0])


class Unrolled(nn.Module):
    """A cell that is called once a step."""

    def __init__(self, cell: type[nn.Module]) -> None:
        super().__init__()
        self.cell, self.head = cell(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Albert(nn.Module):
    """Lan et al. 2020: one layer, applied several times."""

    def __init__(self, times: int = 3) -> None:
        super().__init__()
        self.times = times
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for _ in range(self.times):
            x = self.block(x)
        return self.head(x.mean(1))


def listed_albert():
    """The same layer under several names, as in nn.Sequential(*[block] * 3)."""
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(*[block] * 3, nn.Linear(8, 3))


class TiedAutoencoder(nn.Module):
    """The decoder is the transposed weight of the encoder, which has a weight norm."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = weight_norm(nn.Linear(6, 4))
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x):
        return F.linear(self.encoder(x).tanh(), self.encoder.weight.t(), self.bias)


def weight_normed_twice():
    layer = weight_norm(nn.Linear(6, 6))
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(6, 2))


class Lora(nn.Module):
    """Hu et al. 2022: a low-rank update, which starts at zero, of a layer that is not trained."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = frozen(base)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


class SoftMixture(nn.Module):
    """A mixture of experts; each row weighs all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Linear(6, 2) for _ in range(3))

    def forward(self, x):
        votes = torch.stack([expert(x) for expert in self.experts], -1)
        return (votes * self.gate(x).softmax(-1).unsqueeze(1)).sum(-1)


class SparseMixture(SoftMixture):
    """A mixture of experts; each row is sent to the best two of them."""

    def forward(self, x):
        weight, chosen = self.gate(x).topk(2)
        weight, result = weight.softmax(-1), x.new_zeros(len(x), 2)
        for i, expert in enumerate(self.experts):
            row, place = (chosen == i).nonzero(as_tuple=True)
            result = result.index_add(0, row, expert(x[row]) * weight[row, place].unsqueeze(-1))
        return result


class Siamese(nn.Module):
    """One encoder for both inputs; their distance, in which a last bias would cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3, bias=False))

    def forward(self, one, two):
        return (self.encoder(one) - self.encoder(two)).square().sum(-1, keepdim=True)


class SiamesePair(Siamese):
    """Both codes, as two members that are one network."""

    def forward(self, one, two):
        return {"one": self.encoder(one), "two": self.encoder(two)}


def pairs():
    return rows(), rows()


@parametrize_with_checks(
    [
        healthy("tied_embeddings", LanguageModel, tokens, ALONE),
        healthy("unrolled_rnn", lambda: Unrolled(nn.RNNCell), sequences, ALONE),
        healthy("unrolled_lstm", lambda: Unrolled(nn.LSTMCell), sequences, ALONE),
        healthy("repeated_block", Albert, sequences, ALONE),
        healthy("block_under_three_names", listed_albert, sequences, ALONE),
        healthy("weight_normed_autoencoder", TiedAutoencoder, rows, ALONE),
        healthy("weight_normed_twice", weight_normed_twice, rows, ALONE),
        healthy(
            "lora",
            lambda: nn.Sequential(Lora(nn.Linear(6, 8)), nn.Tanh(), Lora(nn.Linear(8, 2))),
            rows,
            ALONE,
        ),
        healthy("soft_mixture_of_experts", SoftMixture, rows, ALONE),
        healthy("sparse_mixture_of_experts", SparseMixture, rows, ALONE),
        healthy("siamese_distance", Siamese, pairs, ALONE, outputs=whole),
    ]
)
def test_a_network_that_uses_a_weight_more_than_once(subject, check):
    check(subject)


# --- members inside one module ------------------------------------------------------------------


class RankOne(nn.Module):
    """Wen et al. 2020: one weight, and for each member a factor on its inputs and outputs."""

    def __init__(self, inputs: int, outputs: int, members: int) -> None:
        super().__init__()
        self.members = members
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.r = nn.Parameter(1 + 0.5 * torch.randn(members, inputs))
        self.s = nn.Parameter(1 + 0.5 * torch.randn(members, outputs))
        self.bias = nn.Parameter(torch.zeros(members, outputs))

    def forward(self, x):
        r, s, bias = (
            factor.repeat_interleave(len(x) // self.members, 0)
            for factor in (self.r, self.s, self.bias)
        )
        return F.linear(x * r, self.weight) * s + bias


class BatchEnsemble(nn.Module):
    """Every member sees every row: the batch is repeated, and split after the last layer."""

    def __init__(self, members: int = 3) -> None:
        super().__init__()
        self.members = members
        self.one, self.two = RankOne(6, 8, members), RankOne(8, 2, members)

    def forward(self, x):
        return self.two(self.one(x.repeat(self.members, 1)).relu())


class Mimo(nn.Module):
    """Havasi et al. 2021: one trunk on the inputs of all members, and one head for each."""

    def __init__(self, members: int = 3) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6 * members, 12), nn.ReLU(), nn.Linear(12, 8))
        self.heads = nn.ModuleList(nn.Linear(8, 2) for _ in range(members))

    def forward(self, *inputs):
        features = self.trunk(torch.cat(inputs, 1)).relu()
        return [head(features) for head in self.heads]


class Packed(nn.Module):
    """Laurent et al. 2023: members are groups of convolutions; (sample, member, class)."""

    def __init__(self, members: int = 2) -> None:
        super().__init__()
        self.members = members
        self.layers = nn.Sequential(
            nn.Conv2d(2 * members, 4 * members, 3, padding=1, groups=members, bias=False),
            nn.BatchNorm2d(4 * members),
            nn.ReLU(),
            nn.Conv2d(4 * members, 4 * members, 3, padding=1, groups=members),
            nn.GroupNorm(members, 4 * members),
            nn.ReLU(),
            nn.Conv2d(4 * members, 3 * members, 1, groups=members),
        )

    def forward(self, x):
        return self.layers(x.repeat(1, self.members, 1, 1)).mean((2, 3)).unflatten(1, (-1, 3))


class LoraEnsemble(nn.Module):
    """Members are low-rank updates of one frozen layer, with heads of their own."""

    def __init__(self, members: int = 3) -> None:
        super().__init__()
        base = nn.Linear(6, 8)
        self.members = nn.ModuleList(
            nn.Sequential(Lora(base), nn.Tanh(), nn.Linear(8, 2)) for _ in range(members)
        )

    def forward(self, x):
        return [member(x) for member in self.members]


class Distilled(nn.Module):
    """A student, and a teacher that follows it between steps (Tarvainen and Valpola 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
        self.teacher = frozen(copy.deepcopy(self.student))

    @torch.no_grad()
    def follow(self):
        for mean, value in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            mean.lerp_(value, 0.01)

    def forward(self, x):
        return {"student": self.student(x), "teacher": self.teacher(x)}


class FollowedInForward(Distilled):
    """He et al. 2020: the teacher follows in the forward pass of training."""

    def forward(self, x):
        if self.training:
            self.follow()
        return super().forward(x)


def student_and_teacher(model):
    return {"student": model.student, "teacher": model.teacher}


def distance_to_teacher(outputs):
    return F.mse_loss(outputs["student"], outputs["teacher"].detach())


TIED = {**ALONE, "ownership": "tied", "coupling": "tied"}
FACTORS = {"*.weight": "tied", "*": "independent"}
PARTS = {"trunk.*": "tied", "heads.*": "independent"}


@parametrize_with_checks(
    [
        healthy(
            "siamese_pair",
            SiamesePair,
            pairs,
            TIED | {"sharing": "tied"},
            members=lambda model: {"one": model.encoder, "two": model.encoder},
        ),
        healthy(
            "rank_one_factors",
            BatchEnsemble,
            rows,
            {**TIED, "ownership": FACTORS, "diversity": "independent"},
            outputs=split_batch(3),
        ),
        healthy(
            "mimo_heads",
            Mimo,
            lambda: (rows(), rows(), rows()),
            {**TIED, "ownership": PARTS, "sharing": "independent", "diversity": "independent"},
            members=lambda model: model.heads,
        ),
        healthy(
            "packed_in_groups",
            Packed,
            images,
            SEPARATE | {"sharing": "distinct"},
            outputs=split_axis(1),
        ),
        healthy(
            "lora_ensemble",
            LoraEnsemble,
            rows,
            SEPARATE | {"sharing": ["0.base.*"]},
            members=lambda model: model.members,
        ),
        healthy(
            "student_and_mean_teacher",
            Distilled,
            rows,
            {**ALONE, "sharing": "independent", "ownership": "independent"},
            members=student_and_teacher,
        ),
    ]
)
def test_members_inside_one_module(subject, check):
    check(subject)


# --- members that are modules -------------------------------------------------------------------


class FrozenTrunk(nn.Sequential):
    """A trunk that stays in evaluation mode, whatever its network does."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        frozen(self)

    def train(self, mode: bool = True):
        return super().train(False)


class Member(nn.Module):
    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        return self.head(self.trunk(x))


def heads_on_one_trunk():
    trunk = FrozenTrunk()
    return [Member(trunk) for _ in range(3)]


def heads_on_a_trained_trunk():
    trunk = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return [Member(trunk) for _ in range(3)]


@parametrize_with_checks(
    [
        healthy(
            "frozen_trunk_with_heads",
            heads_on_one_trunk,
            images,
            SEPARATE | {"sharing": ["trunk.*"]},
        ),
        healthy(
            "trained_trunk_with_heads",
            heads_on_a_trained_trunk,
            images,
            {
                **TIED,
                "sharing": ["trunk.*"],
                "ownership": {"*.trunk.*": "tied", "*": "independent"},
                "diversity": ["trunk.*"],
            },
        ),
        healthy("tied_embeddings_twice", lambda: [LanguageModel() for _ in "ab"], tokens, SEPARATE),
        healthy("repeated_blocks", lambda: [Albert() for _ in "ab"], sequences, SEPARATE),
        healthy(
            "unrolled_cells", lambda: [Unrolled(nn.GRUCell) for _ in "ab"], sequences, SEPARATE
        ),
        healthy("weight_normed_members", lambda: [TiedAutoencoder() for _ in "ab"], rows, SEPARATE),
        healthy("mixtures_of_experts", lambda: [SparseMixture() for _ in "ab"], rows, SEPARATE),
    ]
)
def test_members_that_are_modules(subject, check):
    check(subject)


# --- outputs and teachers ------------------------------------------------------------------------


class FlatDistance(Siamese):
    """One number for each row, with no axis of its own."""

    def forward(self, one, two):
        return super().forward(one, two).squeeze(1)


@parametrize_with_checks([healthy("one_number_a_row", FlatDistance, pairs, ALONE)])
def test_a_network_with_one_number_for_each_row(subject, check):
    check(subject)


@parametrize_with_checks(
    [
        healthy(
            "teacher_that_follows_in_forward",
            FollowedInForward,
            rows,
            {**ALONE, "sharing": "independent", "ownership": "independent"},
            members=student_and_teacher,
            loss=distance_to_teacher,
        ),
    ]
)
def test_a_teacher_that_follows_in_the_forward_pass(subject, check):
    """What is frozen may move with the training, as a buffer may."""
    check(subject)


class FollowedInEval(Distilled):
    def __init__(self) -> None:
        super().__init__()
        self.teacher[0].bias.data += 1  # a mean of values that are equal does not move

    def forward(self, x):
        self.follow()
        return super().forward(x)


class StudentThatMoves(Distilled):
    def forward(self, x):
        with torch.no_grad():
            self.student[0].weight.add_(0.01)
        return super().forward(x)


@pytest.mark.parametrize(
    ("moving", "check", "told"),
    [
        (FollowedInEval, "hygiene", "teacher"),
        (StudentThatMoves, "coverage", "changes its own parameter model.student.0.weight"),
    ],
)
def test_what_moves_in_eval_mode_or_is_trained_is_not_healthy(moving, check, told):
    subject = healthy("moving", moving, rows, {check: ALONE[check]}, loss=distance_to_teacher)
    (found,) = (result for result in check_ensemble(subject) if result.claim)
    assert found.status in ("broken", "error")
    assert told in found.message
