"""Predictions are distributions, and obey the identities that are known of means of them."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss, one_hot
from torch.special import entr, xlogy

from ensembles.models import Mean, MeanField, log_probabilities, member_losses, predict

few = settings(max_examples=60, deadline=None)
REDUCTIONS = ["arithmetic", "geometric", "vote"]
CLOSE = 1e-11
"""Of float64 sums of a few terms, none of which is above 100."""

COUNTS = st.integers(1, 5)


def named(stacked: Tensor) -> dict[str, Tensor]:
    return {f"member_{number}": logits for number, logits in enumerate(stacked)}


@st.composite
def ensembles(draw, *, members=COUNTS, largest=30.0, excluding=False):
    """Logits (member, sample, class) and labels (sample,)."""
    shape = (draw(members), draw(st.integers(1, 3)), draw(st.integers(2, 6)))
    logits = torch.from_numpy(
        draw(arrays(np.float64, shape, elements=st.floats(-largest, largest)))
    )
    if excluding:  # a class with probability 0, for some members and rows; the first is left
        excluded = torch.from_numpy(draw(arrays(np.bool_, shape)))
        excluded[..., 0] = False
        logits = logits.masked_fill(excluded, -math.inf)
    labels = draw(arrays(np.int64, shape[1:2], elements=st.integers(0, shape[2] - 1)))
    return logits, torch.from_numpy(labels)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension."""
    return (xlogy(p, p) - xlogy(p, q)).sum(-1)


# --- distributions ------------------------------------------------------------------------------


@few
@given(ensembles(excluding=True), st.sampled_from(REDUCTIONS))
def test_every_reduction_is_a_distribution_for_every_sample(drawn, reduction):
    logits, _ = drawn
    predicted = predict(named(logits), reduction)
    assert predicted.shape == logits.shape[1:]
    assert not predicted.isnan().any()
    assert (predicted <= 1e-15).all()
    torch.testing.assert_close(
        predicted.exp().sum(1), torch.ones(logits.shape[1]).double(), rtol=0, atol=1e-12
    )


@few
@given(ensembles(excluding=True))
def test_reductions_are_what_their_formulas_say(drawn):
    logits, _ = drawn
    p = logits.softmax(-1)
    mean = p.mean(0)
    product = p.log().mean(0).exp()
    votes = one_hot(logits.argmax(-1), logits.shape[-1]).double().mean(0)
    for reduction, expected in [
        ("arithmetic", mean),
        ("geometric", product / product.sum(1, keepdim=True)),
        ("vote", votes),
    ]:
        found = predict(named(logits), reduction).exp()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14, msg=reduction)


@few
@given(ensembles(members=st.just(1)))
def test_one_member_is_its_own_mean(drawn):
    logits, _ = drawn
    alone = logits[0].log_softmax(-1)
    for reduction in ("arithmetic", "geometric"):
        torch.testing.assert_close(predict(named(logits), reduction), alone, rtol=0, atol=1e-13)


@few
@given(ensembles(), st.permutations(range(5)), st.floats(-5, 5))
def test_neither_the_order_of_members_nor_constants_added_to_logits_change_predictions(
    drawn, order, constant
):
    logits, _ = drawn
    other = logits[[place for place in order if place < len(logits)]] + constant
    for reduction in ("arithmetic", "geometric"):
        one, two = predict(named(logits), reduction), predict(named(other), reduction)
        torch.testing.assert_close(one, two, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_extreme_logits_stay_distributions(reduction, dtype):
    rows = [
        [[1e4, -1e4, 0.0], [-math.inf, 0.0, 1e4], [0.0, 0.0, 0.0]],
        [[1e4, 1e4, 1e4], [-math.inf, 0.0, -1e4], [6e4, -6e4, 0.0]],
    ]
    predicted = predict(named(torch.tensor(rows, dtype=dtype)), reduction)
    assert predicted.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not predicted.isnan().any()
    torch.testing.assert_close(predicted.exp().sum(1), torch.ones(3).to(predicted))
    assert predicted[1, 0] == -math.inf


@pytest.mark.parametrize("count", [2, 3, 7])
def test_logits_at_the_end_of_the_range_have_a_geometric_mean(count):
    logits = torch.tensor([[3e38, 0.0, 1e38]]).expand(count, 1, 3)
    torch.testing.assert_close(
        predict(named(logits), "geometric").exp(), torch.tensor([[1.0, 0.0, 0.0]])
    )
    worst = torch.tensor([[[0.0, -3e38]], [[-3e38, 0.0]]]).repeat(2, 1, 1)
    assert worst.sum(0).isneginf().all()
    assert predict(named(worst), "geometric").exp().tolist() == [[0.5, 0.5]]


def test_half_precision_is_computed_in_float32():
    torch.manual_seed(1)
    logits = (10 * torch.randn(4, 5, 6)).half()
    for reduction in REDUCTIONS:
        found = predict(named(logits), reduction)
        assert torch.equal(found, predict(named(logits.float()), reduction))
    labels = torch.randint(6, (5,))
    assert torch.equal(Mean()(named(logits), labels), Mean()(named(logits.float()), labels))
    mixed = {"half": logits[0], "double": logits[1].double()}
    assert {found.dtype for found in log_probabilities(mixed).values()} == {torch.float64}


def test_votes_count_members_and_ties_take_the_lowest_class():
    logits = torch.tensor(
        [
            [[0.0, 0.0, 1.0], [5.0, 0.0, 0.0], [1.0, 1.0, 0.0]],
            [[0.0, 9.0, 0.0], [0.0, 0.1, 0.0], [0.0, 2.0, 2.0]],
            [[0.0, 0.1, 0.0], [0.0, 0.1, 0.0], [0.0, 0.0, 0.0]],
            [[0.0, 0.0, 0.1], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]],
        ]
    )
    predicted = predict(named(logits), "vote")
    shares = [[0.0, 0.5, 0.5], [0.5, 0.5, 0.0], [0.75, 0.25, 0.0]]
    assert torch.equal(predicted, torch.tensor(shares).log())
    assert predicted.argmax(1).tolist() == [1, 0, 0]


def test_votes_are_of_the_logits_and_not_of_what_rounding_makes_equal():
    logits = torch.tensor([[0.0, 1e-9]])
    assert logits.log_softmax(1)[0, 0] == logits.log_softmax(1)[0, 1]
    assert predict({"single": logits}, "vote").exp().tolist() == [[0.0, 1.0]]


def test_three_reductions_can_pick_three_classes():
    unsure = [0.25, 0.35, 0.40]
    p = torch.tensor([[unsure], [unsure], [[0.60, 0.39, 0.01]]]).double()
    winners = [predict(named(p.log()), reduction).argmax().item() for reduction in REDUCTIONS]
    assert winners == [0, 1, 2]


def test_gradients_of_means_are_finite_where_all_members_exclude_a_class():
    for reduction in ("arithmetic", "geometric"):
        logits = torch.tensor([[[-math.inf, 1.0, 2.0]], [[-math.inf, 0.0, 1.0]]])
        logits.requires_grad_()
        (-predict(named(logits), reduction)[0, 1]).backward()
        assert logits.grad.isfinite().all()
        assert (logits.grad[:, 0, 1] < 0).all()


def test_no_sample_is_no_prediction():
    for reduction in REDUCTIONS:
        assert predict(named(torch.zeros(3, 0, 4)), reduction).shape == (0, 4)


# --- the geometric mean and the mean-field bound ------------------------------------------------


def gap_of(logits: Tensor, labels: Tensor) -> Tensor:
    """mean_m CE(z_m) - CE(zbar), of each sample."""
    samples = range(logits.shape[1])
    losses = [MeanField()(named(logits[:, [row]]), labels[[row]]) for row in samples]
    return torch.stack(losses) - cross_entropy(logits.mean(0), labels, reduction="none")


@few
@given(ensembles())
def test_the_geometric_mean_is_the_softmax_of_the_mean_logits(drawn):
    logits, _ = drawn
    found = predict(named(logits), "geometric")
    torch.testing.assert_close(found, logits.mean(0).log_softmax(-1), rtol=0, atol=CLOSE)


@few
@given(ensembles(), st.data())
def test_the_mean_field_gap_is_the_mean_divergence_whatever_the_label(drawn, data):
    logits, labels = drawn
    gap = gap_of(logits, labels)
    geometric = predict(named(logits), "geometric").exp()
    expected = divergence(geometric, logits.softmax(-1)).mean(0)
    torch.testing.assert_close(gap, expected, rtol=0, atol=CLOSE)
    classes = st.integers(0, logits.shape[-1] - 1)
    other = torch.from_numpy(data.draw(arrays(np.int64, labels.shape, elements=classes)))
    torch.testing.assert_close(gap_of(logits, other), gap, rtol=0, atol=CLOSE)


@few
@given(ensembles())
def test_the_mean_field_gap_is_within_its_bounds(drawn):
    logits, labels = drawn
    gap = gap_of(logits, labels)
    spread = (logits - logits.mean(0)).square().sum(-1).mean(0)
    assert (gap >= -CLOSE).all()
    assert (gap <= spread / 4 + CLOSE).all()


def test_a_quarter_is_the_least_factor_of_the_upper_bound():
    step = 1e-3
    logits = torch.tensor([[[step, -step]], [[-step, step]]]).double()
    gap = gap_of(logits, torch.tensor([0]))
    spread = (logits - logits.mean(0)).square().sum(-1).mean(0)
    assert gap / spread == pytest.approx(1 / 4, rel=1e-5)


@few
@given(ensembles(largest=5.0), st.lists(st.floats(-20, 20), min_size=5, max_size=5))
def test_the_gap_is_zero_where_softmaxes_coincide_and_only_there(drawn, constants):
    logits, labels = drawn
    offsets = torch.tensor(constants[: len(logits)]).double()[:, None, None]
    assert (gap_of(logits[:1] + offsets, labels).abs() < CLOSE).all()
    # Pinsker's inequality: what differs has a gap of at least half its squared distance.
    geometric = predict(named(logits), "geometric").exp()
    apart = (logits.softmax(-1) - geometric).abs().sum(-1).square().mean(0)
    assert (gap_of(logits, labels) >= apart / 2 - CLOSE).all()


def test_the_sum_of_group_logits_has_no_such_bound():
    confident_and_wrong = torch.tensor([[[3.0, 0.0]], [[3.0, 0.0]]]).double()
    labels = torch.tensor([1])
    groups = MeanField()(named(confident_and_wrong), labels)
    of_sum = cross_entropy(confident_and_wrong.sum(0), labels)
    assert of_sum > groups + 2.9
    assert cross_entropy(confident_and_wrong.mean(0), labels) <= groups
    right = torch.tensor([0])  # and with another label it is on the other side
    assert cross_entropy(confident_and_wrong.sum(0), right) < MeanField()(
        named(confident_and_wrong), right
    )


# --- the arithmetic mean ------------------------------------------------------------------------


@few
@given(ensembles())
def test_the_loss_of_the_arithmetic_mean_is_at_most_the_mean_loss(drawn):
    logits, labels = drawn
    for row in range(len(labels)):
        one, label = named(logits[:, [row]]), labels[[row]]
        loss = -predict(one)[0, label.item()]
        assert loss <= Mean()(one, label) + CLOSE
        best = min(member_losses(one, label).values())
        assert loss <= best + math.log(len(logits)) + CLOSE  # a mean is at least a share of it


@few
@given(ensembles(excluding=True))
def test_the_brier_score_decomposes_exactly(drawn):
    logits, labels = drawn
    p = logits.softmax(-1)
    target = one_hot(labels, logits.shape[-1]).double()
    mean = predict(named(logits)).exp()
    of_members = (p - target).square().sum(-1).mean(0)
    of_mean = mse_loss(mean, target, reduction="none").sum(-1)
    variance = (p - mean).square().sum(-1).mean(0)
    torch.testing.assert_close(of_members, of_mean + variance, rtol=0, atol=1e-13)
    assert (of_mean <= of_members + 1e-15).all()


@few
@given(ensembles(excluding=True))
def test_entropy_of_the_mean_is_mean_entropy_plus_a_bounded_divergence(drawn):
    logits, _ = drawn
    count, _, classes = logits.shape
    p = logits.softmax(-1)
    mean = predict(named(logits)).exp()
    difference = entr(mean).sum(-1) - entr(p).sum(-1).mean(0)
    jensen_shannon = divergence(p, mean).mean(0)
    torch.testing.assert_close(difference, jensen_shannon, rtol=0, atol=CLOSE)
    assert (difference >= -CLOSE).all()
    assert (difference <= math.log(min(count, classes)) + CLOSE).all()


@pytest.mark.parametrize(("members", "classes"), [(2, 5), (3, 3), (6, 3)])
def test_members_that_are_sure_of_different_classes_reach_the_greatest_divergence(members, classes):
    sure = one_hot(torch.arange(members) % classes, classes).double().log()[:, None]
    mean = predict(named(sure)).exp()
    assert entr(mean).sum() == pytest.approx(math.log(min(members, classes)), rel=1e-15)


# --- probabilities in the place of logits -------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "low", "high"), [(2, 0.31326, 1.31326), (10, 1.46115, 2.46115)]
)
def test_cross_entropy_of_probabilities_is_confined(classes, low, high):
    exact = math.log(math.e + classes - 1)
    assert (round(exact - 1, 5), round(exact, 5)) == (low, high)
    sure = one_hot(torch.tensor([0, 0]), classes).double()
    losses = [Mean()({"single": sure[[0]]}, torch.tensor([label])) for label in (0, 1)]
    assert [loss.item() for loss in losses] == pytest.approx([exact - 1, exact], rel=1e-15)


@few
@given(ensembles(excluding=True))
def test_no_probabilities_leave_the_confines(drawn):
    logits, labels = drawn
    high = math.log(math.e + logits.shape[-1] - 1)
    for loss in member_losses(named(logits.softmax(-1)), labels).values():
        assert high - 1 - 1e-14 <= loss <= high + 1e-14


# --- wrong input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        ({}, ValueError, "logits is empty: give those of at least one member"),
        (torch.zeros(2, 3), TypeError, "logits must be a mapping of member names to tensors"),
        ({"a": [[0.0]]}, TypeError, "logits of a must be a tensor, got a list"),
        ({"a": torch.zeros(3)}, ValueError, "got torch.float32 of shape (3,)"),
        ({"a": torch.zeros(3, 0)}, ValueError, "got torch.float32 of shape (3, 0)"),
        ({"a": torch.zeros(3, 2).int()}, ValueError, "got torch.int32 of shape (3, 2)"),
        (
            {"a": torch.zeros(3, 2), "b": torch.zeros(3, 2), "c": torch.zeros(2, 2)},
            ValueError,
            "logits of c have shape (2, 2), and those of a (3, 2): members predict the same",
        ),
        (
            {"a": torch.zeros(3, 2), "b": torch.tensor([[0.0, 0.0], [0.0, math.nan], [1, 1]])},
            FloatingPointError,
            "logits of b are no distribution: NaN in row 1 (1 of 3 rows are none)",
        ),
        (
            {"a": torch.tensor([[math.inf, 0.0], [0, 0]])},
            FloatingPointError,
            "logits of a are no distribution: +inf in row 0 (1 of 2 rows are none)",
        ),
        (
            {"a": torch.full((2, 3), -math.inf)},
            FloatingPointError,
            "logits of a are no distribution: -inf for every class in row 0 (2 of 2 rows",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_logits_that_are_no_members_logits_are_refused(reduction, logits, error, message):
    with pytest.raises(error, match=re.escape(message)):
        predict(logits, reduction)


def test_an_unknown_reduction_and_an_undefined_mean_are_refused():
    with pytest.raises(
        ValueError, match=re.escape("one of ('arithmetic', 'geometric', 'vote'), got 'mean'")
    ):
        predict({"a": torch.zeros(1, 2)}, "mean")
    apart = {
        "a": torch.tensor([[0.0, 1.0], [0.0, -math.inf]]),
        "b": torch.tensor([[0.0, 1.0], [-math.inf, 0.0]]),
    }
    with pytest.raises(ValueError, match=re.escape("row 1 has no geometric mean (1 of 2 rows)")):
        predict(apart, "geometric")
    assert predict(apart).exp()[1].tolist() == [0.5, 0.5]
    assert predict(apart, "vote").exp()[1].tolist() == [0.5, 0.5]
