"""Identities and inequalities of dominance, similarity and disagreement; votes; triples."""

import re
from itertools import permutations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ensembles.experiments.robustness.dominance import (
    disagreement_matrix,
    dominance_matrix,
    dominance_over,
    independent_dominance,
    mean_dominance,
    plurality_vote,
    similarity_matrix,
    triple_bounds,
)

shapes = st.tuples(st.integers(1, 6), st.integers(1, 24))
correctness = shapes.flatmap(lambda shape: arrays(np.bool_, shape))
predicted = shapes.flatmap(lambda shape: arrays(np.int64, shape, elements=st.integers(0, 4)))
few = settings(max_examples=60, deadline=None)


def counted(matrix, n):
    """Probabilities as counts of samples: identities hold exactly, not to rounding."""
    counts = np.rint(matrix * n)
    np.testing.assert_allclose(matrix * n, counts, atol=1e-9)
    return counts.astype(int)


@few
@given(correctness)
def test_dominance_and_similarity_keep_their_identities(c):
    n = c.shape[1]
    zeta, similarity = counted(dominance_matrix(c), n), counted(similarity_matrix(c), n)
    right = c.sum(axis=1)
    np.testing.assert_array_equal(zeta - zeta.T, right[:, None] - right[None, :])
    np.testing.assert_array_equal(similarity, n - zeta - zeta.T)
    assert (zeta >= 0).all()
    assert (zeta <= np.minimum(right[:, None], n - right[None, :])).all()
    assert (np.diag(zeta) == 0).all()


@few
@given(correctness)
def test_dominance_and_similarity_are_what_counting_gives(c):
    zeta, similarity = dominance_matrix(c), similarity_matrix(c)
    for i, j in np.ndindex(*zeta.shape):
        assert zeta[i, j] == np.mean(c[i] & ~c[j])
        assert similarity[i, j] == np.mean(c[i] == c[j])


def assert_triangle(distance):
    """distance[i, k] <= distance[i, j] + distance[j, k] for all i, j, k."""
    assert (distance[:, None, :] <= distance[:, :, None] + distance[None, :, :]).all()


@few
@given(correctness)
def test_any_three_models_keep_the_triangle_inequalities(c):
    n = c.shape[1]
    assert_triangle(counted(dominance_matrix(c), n))
    assert_triangle(counted(1 - similarity_matrix(c), n))


@few
@given(predicted)
def test_disagreement_is_a_distance_and_at_least_the_dissimilarity(classes):
    n = classes.shape[1]
    disagreement = counted(disagreement_matrix(classes), n)
    assert_triangle(disagreement)
    np.testing.assert_array_equal(disagreement, disagreement.T)
    for labels in (classes[0], np.zeros(n, dtype=int)):
        assert (disagreement >= counted(1 - similarity_matrix(classes == labels), n)).all()


@few
@given(correctness)
def test_with_two_classes_disagreement_is_dissimilarity(c):
    n = c.shape[1]
    dissimilarity = n - counted(similarity_matrix(c), n)
    np.testing.assert_array_equal(counted(disagreement_matrix(c.astype(int)), n), dissimilarity)


def test_independent_models_have_the_dominance_of_independence():
    rng = np.random.default_rng(0)
    c = rng.random((3, 200_000)) < np.array([[0.7], [0.8], [0.9]])
    # The standard error of a share is below 0.5 / sqrt(200,000) = 0.0011.
    np.testing.assert_allclose(dominance_matrix(c), independent_dominance(c), atol=0.005)


def test_mean_dominance_takes_the_weaker_model_of_every_pair():
    c = np.array([[1, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 0]], dtype=bool)
    # weaker right, stronger wrong: (1 over 0) 1/4, (2 over 0) 0, (2 over 1) 1/4
    assert mean_dominance(c) == pytest.approx((0.25 + 0 + 0.25) / 3)
    assert mean_dominance(c[::-1]) == mean_dominance(c)


def test_mean_dominance_of_one_model_is_refused():
    with pytest.raises(ValueError, match="give at least 2, got 1"):
        mean_dominance([[True]])


@few
@given(correctness)
def test_dominance_over_a_model_is_its_column_of_the_matrix(c):
    np.testing.assert_array_equal(dominance_over(c, c[0]), dominance_matrix(c)[:, 0])


def test_dominance_over_another_number_of_samples_is_refused():
    message = "correct has 2 samples, and other has shape (1,)"
    with pytest.raises(ValueError, match=re.escape(message)):
        dominance_over([[True, False]], [True])


@few
@given(predicted)
def test_a_vote_has_most_votes_whatever_the_rule_for_ties(classes):
    for ties in ("lowest_class", "first_model"):
        winner = plurality_vote(classes, ties=ties)
        for sample, chosen in enumerate(winner):
            votes = np.bincount(classes[:, sample])
            assert votes[chosen] == votes.max()
            leading = np.flatnonzero(votes == votes.max())
            if ties == "lowest_class":
                assert chosen == leading[0]
            else:
                assert chosen == next(c for c in classes[:, sample] if c in leading)


@few
@given(predicted, st.randoms(use_true_random=False))
def test_ties_to_the_lowest_class_do_not_depend_on_the_order_of_models(classes, random):
    order = list(range(len(classes)))
    random.shuffle(order)
    np.testing.assert_array_equal(plurality_vote(classes[order]), plurality_vote(classes))


def test_ties_to_the_first_model_depend_on_the_order_of_models():
    assert plurality_vote([[3], [0]], ties="first_model").tolist() == [3]
    assert plurality_vote([[0], [3]], ties="first_model").tolist() == [0]
    # The first model itself has fewer votes than the leaders: it has no say.
    assert plurality_vote([[9], [5], [5], [2], [2]], ties="first_model").tolist() == [5]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([[0.5, 1.0]], "predictions must be class numbers, integers from 0, got float64 from 0.5"),
        ([[-1, 0]], "integers from 0, got int64 from -1"),
        ([[True, False]], "integers from 0, got bool"),
        ([0, 1], "predictions must be (model, sample) with at least one of each, got shape (2,)"),
        (np.zeros((0, 4), dtype=int), "got shape (0, 4)"),
    ],
)
def test_predictions_that_are_no_classes_are_refused(classes, message):
    for function in (plurality_vote, disagreement_matrix):
        with pytest.raises(ValueError, match=re.escape(message)):
            function(classes)


def test_an_unknown_rule_for_ties_is_refused():
    with pytest.raises(ValueError, match="ties must be 'lowest_class' or 'first_model'"):
        plurality_vote([[0]], ties="random")


@pytest.mark.parametrize("function", [dominance_matrix, similarity_matrix, independent_dominance])
@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ([[3, 5, 0]], "For predicted classes write: predictions == labels"),
        ([True, False], "correct must be (model, sample) with at least one of each"),
        (np.zeros((2, 0), dtype=bool), "got shape (2, 0)"),
        ([[0.5, 1.0]], "correct must hold True where a model is right"),
    ],
)
def test_what_is_no_correctness_is_refused(function, given_, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        function(given_)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_triple_is_as_far_from_its_chord_as_the_bounds_allow(data):
    models = data.draw(st.integers(3, 6))
    here, there = (
        data.draw(arrays(np.bool_, (models, data.draw(st.integers(1, 24))))) for _ in range(2)
    )
    mu = here.mean(axis=1)
    assume(np.ptp(mu) > 0)
    bounds = triple_bounds(here, there)
    assert (bounds.lower <= bounds.deviation + 1e-12).all()
    assert (bounds.deviation <= bounds.upper + 1e-12).all()
    assert (np.abs(bounds.deviation) <= bounds.bound + 1e-12).all()
    expected = {
        frozenset(t)
        for t in permutations(range(models), 3)
        if mu[t[0]] <= mu[t[1]] <= mu[t[2]] and mu[t[0]] < mu[t[2]]
    }
    assert {frozenset(t) for t in bounds.models.tolist()} == expected
    assert len(bounds.models) == len(expected)
    for (i, j, k), deviation in zip(bounds.models, bounds.deviation, strict=True):
        assert mu[i] <= mu[j] <= mu[k]
        shifted = there.mean(axis=1)
        chord = np.interp(mu[j], [mu[i], mu[k]], [shifted[i], shifted[k]])
        assert deviation == pytest.approx(shifted[j] - chord, abs=1e-12)


def test_nested_models_on_equal_sets_are_collinear_and_the_bound_says_so():
    # Each model is right wherever a weaker one is; the shifted set has the same structure, harder.
    here = np.arange(100)[None] < np.array([[40], [70], [80]])
    there = np.arange(200)[None] < np.array(
        [[20], [80], [100]]
    )  # (70-40)/(80-40) = (80-20)/(100-20)
    bounds = triple_bounds(here, there)
    assert bounds.deviation == pytest.approx([0], abs=1e-12)
    assert bounds.bound == pytest.approx([0], abs=1e-12)


def test_the_bounds_are_attained():
    # j is right exactly where i and k are wrong: d = zeta_jk, and the shifted set has d' = 0.
    here = np.array([[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0]], dtype=bool)
    there = np.array([[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0]], dtype=bool)
    bounds = triple_bounds(here, there)
    assert bounds.deviation == pytest.approx([-0.25])
    assert bounds.lower == pytest.approx([-0.25])
    assert bounds.upper == pytest.approx([0])


@pytest.mark.parametrize(
    ("here", "there", "message"),
    [
        ([[1], [0]], [[1], [0]], "a triple needs at least 3 models, got 2"),
        ([[1], [0], [1]], [[1], [0]], "correct has 3 models, and shifted has 2"),
        ([[1], [1], [1]], [[1], [0], [1]], "all models are equally accurate"),
        ([[1], [0], [1]], [[7], [0], [1]], "shifted must hold True where a model is right"),
    ],
)
def test_triples_without_a_chord_are_refused(here, there, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        triple_bounds(here, there)
