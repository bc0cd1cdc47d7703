import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from ensembles import Subject, check_ensemble, split_batch
from ensembles.checks.batch import assert_rows_independent, measure_batch_independence


def classifier(*inner: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), *inner, nn.Dropout(), nn.Linear(6, 3)
    )


class Call(nn.Module):
    """A function of the batch, as a layer."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class WrongView(nn.Module):
    def forward(self, x):
        return x.view(x.shape[1], x.shape[0]).t()


def message(model, batch, **options) -> str:
    with pytest.raises(AssertionError) as broken:
        assert_rows_independent(measure_batch_independence(model, batch, **options))
    return str(broken.value)


def reached(model, batch, **options) -> set[tuple[int, int]]:
    found = measure_batch_independence(model, batch, **options).reaches
    return {(reach.row, row) for reach in found for row in reach.reached}


# --- rows are independent -----------------------------------------------------------------------


def test_members_whose_rows_are_independent_hold():
    measured = measure_batch_independence([classifier(), classifier()], torch.randn(5, 4))
    assert_rows_independent(measured)
    assert str(measured) == (
        "2 members, 5 rows, 0 pairs of different rows reach each other in eval mode "
        "(values, gradients, places, one row alone compared)"
    )


@pytest.mark.parametrize(("rows", "told"), [(8, "8 rows"), (9, "looked at 8 of 9 rows")])
def test_how_many_rows_were_looked_at_is_told(rows, told):
    batch = torch.randn(rows, 4)
    assert str(measure_batch_independence(classifier(), batch)).startswith(f"1 member, {told}, 0 ")
    mixing = classifier(Call(lambda x: x - x.mean(0)))
    text = message(mixing, batch)
    assert ("looked at 8 of 9 rows" in text) is (rows == 9)


def test_batch_norm_is_the_exception_in_training_mode():
    model = classifier()
    assert_rows_independent(measure_batch_independence(model, torch.randn(5, 4), training=True))
    assert model[1].training
    broken = classifier(Call(lambda x: x - x.mean(0)))
    assert "in training mode" in message(broken, torch.randn(5, 4), training=True)


def test_attention_over_tokens_holds():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert_rows_independent(measure_batch_independence(layer, torch.randn(3, 5, 8)))


def test_sequences_first_are_told_by_their_axis():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    x = torch.randn(5, 3, 8)
    assert_rows_independent(measure_batch_independence(layer, x, axis=1, output_axis=1))


def test_packed_sequences_hold_though_their_kernels_follow_the_lengths():
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.gru = nn.Embedding(9, 4), nn.GRU(4, 5, batch_first=True)

        def forward(self, tokens, lengths):
            packed = pack_padded_sequence(
                self.embedding(tokens), lengths, batch_first=True, enforce_sorted=False
            )
            return self.gru(packed)[1][0]

    batch = {"tokens": torch.randint(9, (4, 6)), "lengths": torch.tensor([6, 2, 4, 3])}
    assert_rows_independent(measure_batch_independence(Reader(), batch))


def test_members_side_by_side_in_the_batch_hold_their_own_rows():
    layer, batch = nn.Linear(4, 2), torch.randn(6, 4)
    assert_rows_independent(measure_batch_independence(layer, batch, outputs=split_batch(2)))
    crossed = nn.Sequential(layer, Call(lambda y: y.roll(3, 0)))
    found = reached(crossed, batch, outputs=split_batch(2))
    assert found == {(0, 0), (1, 1), (2, 2), (3, 0), (4, 1), (5, 2)}


def test_outputs_that_are_drawn_are_compared_but_for_places():
    class MonteCarlo(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x, 0.5)

    measured = measure_batch_independence(
        nn.Sequential(nn.Linear(4, 9), MonteCarlo()), torch.randn(3, 4)
    )
    assert measured.random
    assert_rows_independent(measured)


def test_the_size_of_the_batch_may_be_fixed():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.state = nn.Parameter(torch.zeros(3, 4))

        def forward(self, x):
            return torch.stack([x, self.state])[0]

    measured = measure_batch_independence(Fixed(), torch.randn(3, 4))
    assert_rows_independent(measured)
    assert not measured.alone


# --- rows mix -----------------------------------------------------------------------------------


def test_a_view_in_place_of_a_transpose_is_broken(golden):
    torch.manual_seed(0)
    members = [classifier(), classifier(WrongView())]
    golden(message(members, torch.randn(4, 4)), "messages/batch_view.txt")


def test_batch_statistics_in_eval_mode_are_broken(golden):
    torch.manual_seed(0)
    model = classifier(nn.BatchNorm1d(6, track_running_stats=False))
    golden(message(model, torch.randn(3, 4)), "messages/batch_statistics.txt")


def test_a_missing_batch_first_is_broken(golden):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0)
    golden(message(layer, torch.randn(3, 5, 8)), "messages/batch_first.txt")


def test_positions_along_the_batch_are_broken(golden):
    positions = torch.randn(9, 4)
    model = nn.Sequential(Call(lambda x: x + positions[: len(x)]), nn.Linear(4, 2))
    golden(message(model, torch.randn(3, 4)), "messages/batch_places.txt")


@pytest.mark.parametrize(
    "function",
    [torch.squeeze, lambda y: y / len(y)],
    ids=["squeeze", "divided"],
)
def test_an_output_that_depends_on_the_number_of_rows_is_broken(function):
    told = message(nn.Sequential(nn.Linear(4, 2), Call(function)), torch.randn(3, 4))
    assert "depends on the number of rows in eval mode" in told
    assert "one row stands alone" in told


@pytest.mark.parametrize(
    "function",
    [
        lambda y: y.softmax(0),
        lambda y: y / y.abs().max(),
        lambda y: y - y.mean(),
        lambda y: nn.functional.normalize(y, dim=0),
        lambda y: y.cumsum(0),
        lambda y: y.detach().sort(0)[0],
        lambda y: y + 1e-4 * y.roll(1, 0),
    ],
    ids=["softmax", "maximum", "mean", "norm", "cumulative", "sorted", "faint"],
)
def test_a_reduction_over_rows_is_broken(function):
    torch.manual_seed(0)
    told = message(nn.Sequential(nn.Linear(4, 5), Call(function)), torch.randn(4, 4))
    assert "reach each other in eval mode" in told
    assert "first seen in 1 (Call)" in told


def test_the_pairs_are_those_that_mix():
    assert reached(Call(lambda y: y.roll(1, 0)), torch.randn(3, 2)) == {(0, 1), (1, 2), (2, 0)}
    assert reached(Call(lambda y: y.cumsum(0)), torch.randn(3, 2)) == {(0, 1), (0, 2), (1, 2)}


def test_mixing_that_no_number_shows_yet_is_seen_by_gradients():
    class ZeroInit(nn.Module):
        def __init__(self, first: nn.Module) -> None:
            super().__init__()
            self.first, self.gain = first, nn.Parameter(torch.zeros(1))

        def forward(self, x):
            y = self.first(x).flatten(1)
            return y + self.gain * y.mean(0)

    for first, batch in (
        (nn.Linear(4, 2), torch.randn(3, 4)),
        (nn.Embedding(9, 2), torch.arange(6).view(3, 2)),
    ):
        told = message(ZeroInit(first), batch)
        assert "by its gradient" in told
        assert "6 of 6 pairs" in told


def test_integers_that_no_embedding_reads_are_seen_by_values():
    table = torch.randn(9, 2)
    model = Call(lambda i: table[i].mean(1) + table[i].mean((0, 1)))
    measured = measure_batch_independence(model, torch.arange(6).view(3, 2))
    assert not measured.gradients
    assert "6 pairs" in str(measured)


def test_a_large_batch_is_looked_at_in_eight_rows():
    measured = measure_batch_independence(Call(lambda y: y - y.mean(0)), torch.randn(40, 2))
    assert {reach.row for reach in measured.reaches} == set(range(40))
    assert_rows_independent(measure_batch_independence(nn.Linear(2, 2), torch.randn(40, 2)))


def test_a_claim_of_rows_is_checked_for_a_subject():
    subject = Subject(
        make=lambda: nn.Sequential(nn.Linear(4, 2), nn.Softmax(0)),
        batch=lambda: torch.randn(3, 4),
        claims={"batch": "rows"},
    )
    (result,) = (r for r in check_ensemble(subject) if r.claim)
    assert result.status == "broken"
    (result,) = (r for r in check_ensemble(subject.claiming(batch="samples")) if r.claim)
    assert (result.status, result.found) == (
        "error",
        "batch cannot be claimed to be 'samples'. It is rows or rows in training.",
    )


def test_the_fixture_asserts_rows(batch_independence):
    batch_independence.assert_rows(classifier(), torch.randn(3, 4), training=True)
    with pytest.raises(AssertionError, match="reach each other"):
        batch_independence.assert_rows(nn.Softmax(0), torch.randn(3, 4))


# --- wrong use ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "batch", "told"),
    [
        (nn.Linear(4, 2), torch.randn(1, 4), "the batch has 1 row along axis 0"),
        (nn.Linear(4, 2), torch.tensor(1.0), "no dense tensor with rows along axis 0"),
        (nn.Linear(4, 2), torch.eye(4).to_sparse(), "no dense tensor with rows along axis 0"),
        (nn.Embedding(9, 2), torch.zeros(3, dtype=torch.long), "row 0 of the batch equals all"),
        (Call(lambda x: x.sum()), torch.randn(3, 4), "there is no row for each of them"),
        (Call(lambda x: x.repeat(2, 1)), torch.randn(3, 4), "there is no row for each of them"),
        (Call(lambda x: x / 0), torch.randn(3, 4), "the outputs hold NaN or infinity"),
    ],
    ids=["one_row", "no_axis", "sparse", "equal_rows", "scalar", "repeated", "not_finite"],
)
def test_what_cannot_be_looked_at_is_an_error(model, batch, told):
    with pytest.raises(ValueError, match=told):
        measure_batch_independence(model, batch)


def test_a_model_that_does_not_repeat_is_an_error():
    state = [0.0]

    def counting(x):
        state[0] += 1
        return x + state[0]

    with pytest.raises(ValueError, match="two calls on one batch and one seed differ"):
        measure_batch_independence(Call(counting), torch.randn(3, 4))


def test_looking_changes_nothing():
    members = [classifier().train(), classifier(WrongView()).eval()]
    for member in members:
        member[0].weight.grad = torch.ones_like(member[0].weight)
    before = [copy.deepcopy(m.state_dict()) for m in members]
    modes = [[m.training for m in member.modules()] for member in members]
    batch = torch.randn(4, 4)
    kept, state = batch.clone(), torch.get_rng_state()
    measure_batch_independence(members, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(batch, kept)
    assert not batch.requires_grad
    assert modes == [[m.training for m in member.modules()] for member in members]
    for member, saved in zip(members, before, strict=True):
        assert bool((member[0].weight.grad == 1).all())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in member.modules())
        for name, tensor in member.state_dict().items():
            assert torch.equal(tensor, saved[name])


def test_one_number_for_each_row_is_a_row():
    assert reached(Call(lambda x: 2 * x), torch.randn(3)) == set()
    mixed = reached(Call(lambda x: x.softmax(0)), torch.randn(3))
    assert mixed == {(i, j) for i in range(3) for j in range(3) if i != j}
