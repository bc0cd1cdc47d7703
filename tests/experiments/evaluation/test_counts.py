"""Accuracies as counts, their exact intervals, and figures that are no count."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ensembles.experiments.evaluation.counts import Counts, as_counts, clopper_pearson

counts = st.integers(1, 60_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@pytest.mark.parametrize(
    ("correct", "n", "ends"),
    [  # the method of Recht et al. 2018, arXiv:1806.00451
        (1800, 2000, (88.6, 91.3)),
        (9711, 10_000, (96.8, 97.4)),
        (1813, 2021, (88.3, 91.0)),
    ],
)
def test_intervals_are_those_of_the_publication(correct, n, ends):
    assert tuple(round(100 * end, 1) for end in clopper_pearson(correct, n)) == ends


def test_an_interval_ends_where_the_binomial_tail_is_half_the_rest():
    low, high = clopper_pearson(1800, 2000, confidence=0.9)
    assert stats.binom.sf(1799, 2000, low) == pytest.approx(0.05, abs=1e-9)
    assert stats.binom.cdf(1800, 2000, high) == pytest.approx(0.05, abs=1e-9)


def test_none_and_all_correct_have_one_open_end():
    alpha_half = 0.025
    assert clopper_pearson(0, 10) == (0.0, pytest.approx(1 - alpha_half**0.1, abs=1e-12))
    assert clopper_pearson(10, 10) == (pytest.approx(alpha_half**0.1, abs=1e-12), 1.0)


@settings(max_examples=40, deadline=None)
@given(counts)
def test_an_interval_holds_the_accuracy_and_mirrors_that_of_the_errors(case):
    correct, n = case
    low, high = clopper_pearson(correct, n)
    assert 0 <= low <= correct / n <= high <= 1
    assert clopper_pearson(n - correct, n) == (
        pytest.approx(1 - high, abs=1e-9),
        pytest.approx(1 - low, abs=1e-9),
    )


@pytest.mark.parametrize("confidence", [0, 1, 95, float("nan")])
def test_a_confidence_outside_of_0_to_1_is_refused(confidence):
    with pytest.raises(ValueError, match="confidence must be between 0 and 1"):
        clopper_pearson(1, 2, confidence=confidence)


@pytest.mark.parametrize(
    ("correct", "n", "error", "message"),
    [
        (3, 2, ValueError, "correct must be between 0 and n = 2, got 3"),
        (-1, 2, ValueError, "correct must be between 0 and n = 2, got -1"),
        (0, 0, ValueError, "n must be at least 1 sample, got 0"),
        (1.0, 2, TypeError, "correct must be an integer, got 1.0"),
        (True, 2, TypeError, "correct must be an integer, got True"),
    ],
)
def test_impossible_counts_are_refused(correct, n, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        Counts(correct, n)


def test_counts_take_the_integers_of_numpy_and_keep_plain_ones():
    found = Counts(np.int64(9), np.int32(10))
    assert (type(found.correct), type(found.n)) == (int, int)
    assert found == Counts(9, 10)


def test_counts_read_as_a_sentence_in_a_table():
    assert str(Counts(797, 797)) == "797/797 = 100.00 % (95 % interval 99.54 to 100.00 %)"


@settings(max_examples=100, deadline=None)
@given(counts)
def test_every_count_is_read_back_from_its_accuracy(case):
    correct, n = case
    assert as_counts(correct / n, n) == Counts(correct, n)
    assert as_counts(f"{100 * correct / n:.8f}%", n) == Counts(correct, n)
    assert as_counts(float(np.float32(correct / n)), n) == Counts(correct, n)


def test_an_accuracy_of_9984_images_is_not_one_of_10000():
    assert as_counts("93.06890869 %", 9984) == Counts(9292, 9984)
    with pytest.raises(ValueError) as error:
        as_counts("93.06890869 %", 10_000)
    assert str(error.value) == (
        "93.06890869 % is no count of 10000: 9306/10000 is 93.06 %, 9307/10000 is 93.07 %. It fits "
        "9292/9984, 9386/10085, 9198/9883, ... A loader that drops its last batch leaves 9984 of "
        "10000 at batch sizes 32, 64, 128, 256."
    )
    with pytest.raises(ValueError, match="9292/9984"):
        as_counts(0.9306890869, 10_000)


@pytest.mark.parametrize(
    ("accuracy", "n", "message"),
    [
        ("93.1 %", 10_000, "93.1 % fits 9305 to 9315 correct of 10000: give more decimals, or the"),
        (93.1, 10_000, "must be between 0 and 1 (100 %), got 93.1: write percent as a string"),
        ("100.5 %", 10, "accuracy must be between 0 and 1 (100 %), got 100.5 %"),
        (-0.1, 10, "accuracy must be between 0 and 1 (100 %), got -0.1"),
        (float("nan"), 10, "accuracy must be between 0 and 1 (100 %), got nan"),
        ("inf", 10, "accuracy must be between 0 and 1 (100 %), got inf"),
        ("93,1 %", 10, "accuracy must be a number, got '93,1 %'"),
        (0.123456789, 3, "0.123456789 is no count of 3: 0/3 is 0 %, 1/3 is 33.33333333 %. It fits"),
        (0.5, 0, "n must be at least 1 sample, got 0"),
    ],
)
def test_an_accuracy_that_is_no_count_is_refused(accuracy, n, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        as_counts(accuracy, n)


def test_written_decimals_decide_and_a_float_s_missing_zeros_do_not():
    assert as_counts("0.9", 10) == Counts(9, 10)
    assert as_counts("93.07 %", 10_000) == Counts(9307, 10_000)
    assert as_counts(0.9, 1_000_000) == Counts(900_000, 1_000_000)
    with pytest.raises(ValueError, match="fits 850000 to 950000 correct"):
        as_counts("0.9", 1_000_000)


def test_a_count_at_the_end_of_what_rounds_to_the_figure_fits_it():
    with pytest.raises(ValueError, match=r"3\.5 % fits 345 to 355 correct of 10000"):
        as_counts("3.5 %", 10_000)  # 0.035 - 0.0005 is a little more than 0.0345 in binary


def test_the_ends_are_counts():
    assert as_counts(0, 7) == Counts(0, 7)
    assert as_counts("100 %", 7) == Counts(7, 7)
