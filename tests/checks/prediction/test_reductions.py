import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ensembles.checks.prediction.reductions import (
    Emitted,
    Found,
    kind_of,
    metrics_of,
    reductions_of,
    reorderings_of,
    rounded,
)
from ensembles.checks.prediction.words import REDUCTIONS, told_reduction

quick = settings(max_examples=60, deadline=None)


@st.composite
def outputs(draw, *, least_classes: int = 2):
    """Logits of several members, from nearly equal to nearly certain, and labels."""
    members, rows = draw(st.integers(2, 5)), draw(st.integers(4, 9))
    classes = draw(st.integers(least_classes, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.5, 1.0, 3.0, 6.0]))
    shape = (members, rows, classes)
    logits = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (rows,), generator=generator)


def entropy(p: torch.Tensor) -> torch.Tensor:
    return -torch.special.xlogy(p, p).sum(-1)


def of_mean(logits, labels, metric: str) -> tuple[float, list[float]]:
    emitted = Emitted(logits, "logits")
    each = [metrics_of(p, labels)[metric] for p in emitted.probabilities]
    return metrics_of(emitted.probabilities.mean(0), labels)[metric], each


# --- identities of predictions and losses -------------------------------------------------------


@quick
@given(outputs())
def test_the_nll_of_the_arithmetic_mean_is_at_most_the_mean_nll(drawn):
    ensemble, members = of_mean(*drawn, "nll")
    assert ensemble <= sum(members) / len(members) + 1e-12


@quick
@given(outputs())
def test_the_nll_of_the_geometric_mean_is_at_most_the_mean_nll_by_the_mean_divergence(drawn):
    logits, labels = drawn
    logs = logits.log_softmax(-1)
    geometric = logs.mean(0).log_softmax(-1)
    ensemble = metrics_of(geometric.exp(), labels)["nll"]
    members = [metrics_of(p, labels)["nll"] for p in logs.exp()]
    divergence = (geometric.exp() * (geometric - logs)).sum(-1).mean(0)
    assert ensemble == pytest.approx(
        sum(members) / len(members) - float(divergence.mean()), abs=1e-10
    )
    bound = (logits - logits.mean(0)).square().sum(-1).mean(0) / 4
    assert bool((divergence >= -1e-12).all())
    assert bool((divergence <= bound + 1e-12).all())


@quick
@given(outputs())
def test_the_mean_brier_score_is_that_of_the_mean_and_the_spread_of_the_members(drawn):
    logits, labels = drawn
    ensemble, members = of_mean(logits, labels, "brier")
    p = logits.softmax(-1)
    spread = float((p - p.mean(0)).square().sum(-1).mean())
    assert sum(members) / len(members) == pytest.approx(ensemble + spread, abs=1e-12)


@quick
@given(outputs(), st.booleans())
def test_the_entropy_of_the_mean_is_the_mean_entropy_and_the_divergence_of_the_members(drawn, hard):
    logits, _ = drawn
    p = logits.softmax(-1)
    if hard:  # probabilities of zero have no logarithm
        p = torch.nn.functional.one_hot(p.argmax(-1), p.shape[-1]).double()
    divergence = torch.special.xlogy(p, p) - torch.special.xlogy(p, p.mean(0))
    jensen_shannon = divergence.sum(-1).mean(0)
    expected = entropy(p).mean(0) + jensen_shannon
    torch.testing.assert_close(entropy(p.mean(0)), expected, rtol=0, atol=1e-12)
    assert bool((jensen_shannon >= -1e-12).all())
    assert bool((jensen_shannon <= math.log(min(p.shape[0], p.shape[-1])) + 1e-12).all())


@pytest.mark.parametrize(
    ("classes", "low", "high"), [(10, 1.46115, 2.46115), (2, 0.31326, 1.31326)]
)
def test_cross_entropy_of_probabilities_is_confined(classes, low, high):
    name = "cross-entropy of logits"
    certain = torch.eye(classes)
    right, wrong = torch.arange(classes), (torch.arange(classes) + 1) % classes
    assert metrics_of(certain, right)[name] == pytest.approx(low, abs=1e-5)
    assert metrics_of(certain, wrong)[name] == pytest.approx(high, abs=1e-5)


@quick
@given(outputs())
def test_cross_entropy_of_probabilities_is_never_outside_its_bounds(drawn):
    logits, labels = drawn
    classes = logits.shape[-1]
    high = math.log(math.e + classes - 1)
    for p in logits.softmax(-1):
        found = metrics_of(p, labels)["cross-entropy of logits"]
        reference = float(torch.nn.functional.cross_entropy(p, labels))
        assert found == pytest.approx(reference, abs=1e-12)
        assert high - 1 - 1e-12 <= found <= high + 1e-12


# --- what a prediction is -----------------------------------------------------------------------


@quick
@given(outputs(least_classes=3), st.data())
def test_the_weights_of_a_weighted_mean_are_found(drawn, data):
    logits, _ = drawn
    members = len(logits)
    parts = [data.draw(st.integers(1, 9)) for _ in range(members)]
    weights = torch.tensor(parts, dtype=torch.float64) / sum(parts)
    emitted = Emitted(logits, "logits")
    for reduction, prediction in (
        ("arithmetic", torch.einsum("m,mrc->rc", weights, emitted.probabilities)),
        ("geometric", torch.einsum("m,mrc->rc", weights, emitted.logarithms).softmax(-1)),
    ):
        found = {f.reduction: f.weights for f in reductions_of(prediction, emitted, 1e-9)}
        assert found[reduction] == pytest.approx(weights.tolist(), abs=1e-4)
        claimed = reductions_of(prediction, emitted, 1e-9, claimed=weights.tolist())
        assert Found(reduction, rounded(weights.tolist())) in claimed


@quick
@given(outputs(least_classes=3))
def test_a_prediction_that_is_not_made_of_the_members_is_no_reduction(drawn):
    logits, _ = drawn
    other = torch.randn(logits.shape[1:], generator=torch.Generator().manual_seed(5)).double()
    emitted = Emitted(logits, "logits")
    for prediction in (other.softmax(-1), other, (2 * logits).softmax(-1).mean(0)):
        assert reductions_of(prediction, emitted, 1e-9) == []
        assert reorderings_of(prediction, emitted, 1e-9) == []


def test_one_row_does_not_show_the_weights_of_many_members():
    emitted = Emitted(torch.randn(5, 1, 4).double(), "logits")
    assert reductions_of(emitted.probabilities.mean(0), emitted, 1e-9) == []


def test_a_row_for_all_is_no_other_order_of_rows():
    emitted = Emitted(torch.randn(3, 6, 4).double(), "logits")
    first = emitted.probabilities.mean(0)[:1].expand(6, 4)
    assert reorderings_of(first, emitted, 1e-9) == []


def test_kinds_are_seen_from_sums():
    logits = torch.randn(5, 4)
    assert kind_of(logits, 1e-4) == "logits"
    assert kind_of(logits.softmax(1), 1e-4) == "probabilities"
    assert kind_of(logits.log_softmax(1), 1e-4) == "log-probabilities"
    certain = torch.eye(4)
    assert kind_of(certain, 1e-4) == "probabilities"
    assert kind_of(certain.log(), 1e-4) == "log-probabilities"
    assert kind_of(torch.full((2, 2), math.nan), 1e-4) == "logits"


def test_every_reduction_has_words():
    weights = (0.5, 0.5)
    for reduction in REDUCTIONS:
        for given_weights in ((), weights, (1.0, 0.0), (1.0, 1.0), (0.25, 0.75)):
            assert told_reduction(Found(reduction, given_weights), ["a", "b"])
    assert told_reduction(Found("arithmetic", (0.4, 0.6)), ["a", "b"], (0.6, 0.4)) == (
        "the arithmetic mean of the probabilities, with the weights of other members: "
        "weights 0.4, 0.6"
    )
