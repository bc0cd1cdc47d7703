"""The line that models lie on, and the distance from it."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import expit, logit

from ensembles.experiments.robustness.line import (
    LINES,
    Line,
    baseline,
    effective_robustness,
    fit_line,
)
from ensembles.experiments.robustness.reference import published_models


@pytest.mark.parametrize(
    ("shift", "accuracy", "expected"),
    [  # with the published slopes and intercepts, arXiv:2106.15831
        ("cifar10.1", 80, 66.363),
        ("cifar10.1", 85, 72.497),
        ("cifar10.1", 90, 79.479),
        ("cifar10.1", 93, 84.264),
        ("cifar10.1", 95, 87.821),
        ("cifar10.1", 97, 91.818),
        ("imagenetv2", 80, 68.767),
        ("imagenetv2", 90, 82.308),
    ],
)
def test_the_baseline_has_the_published_points(shift, accuracy, expected):
    assert round(100 * baseline(accuracy / 100, shift), 3) == expected


def test_the_baseline_keeps_the_shape_of_what_it_is_given():
    assert isinstance(baseline(0.9), float)
    assert baseline([[0.8, 0.9]]).shape == (1, 2)
    assert isinstance(effective_robustness(0.9, 0.8), float)
    assert effective_robustness([0.9, 0.9], [0.8, 0.7]).shape == (2,)


def test_0_and_1_stay_0_and_1_on_the_baseline():
    assert baseline([0.0, 1.0]).tolist() == [0.0, 1.0]


@settings(max_examples=50, deadline=None)
@given(st.floats(0.001, 0.999))
def test_a_model_on_the_baseline_has_effective_robustness_0(accuracy):
    assert effective_robustness(accuracy, baseline(accuracy)) == 0
    assert effective_robustness(accuracy, 1.0) == pytest.approx(100 * (1 - baseline(accuracy)))


def test_effective_robustness_is_in_points():
    assert effective_robustness(0.93, 0.85) == pytest.approx(85 - 84.264, abs=5e-4)


@pytest.mark.parametrize("function", [baseline, lambda a: effective_robustness(0.5, a)])
@pytest.mark.parametrize(
    ("accuracy", "message"),
    [
        (93.0, "must be a fraction in [0, 1], got 93: divide percent by 100"),
        (-0.1, "must be a fraction in [0, 1], got -0.1"),
        (float("nan"), "must be a fraction in [0, 1], got nan"),
    ],
)
def test_an_accuracy_that_is_no_fraction_is_refused(function, accuracy, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        function(accuracy)


def test_the_place_of_a_wrong_accuracy_is_named():
    with pytest.raises(ValueError, match=re.escape("accuracy[1, 0] must be a fraction")):
        baseline([[0.1, 0.2], [1.2, 1.3]])


def test_an_unknown_shift_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no published line for 'cifar'.*cifar10.1, imagenetv2"):
        baseline(0.9, "cifar")


@pytest.mark.parametrize(
    ("version", "slope", "intercept", "r_squared"),
    [("v4", 0.8385, -0.4966, 0.9806), ("v6", 0.8393, -0.4715, 0.9816)],
)
def test_the_line_through_the_30_published_models(version, slope, intercept, r_squared):
    models = published_models()
    line = fit_line(
        [model.cifar10.accuracy for model in models],
        [getattr(model, version).accuracy for model in models],
    )
    assert (round(line.slope, 4), round(line.intercept, 4)) == (slope, intercept)
    assert round(line.r_squared, 4) == r_squared
    assert line.n_models == 30
    assert line.covers(LINES["cifar10.1"])
    assert not line.covers(LINES["imagenetv2"])


@pytest.mark.parametrize(("version", "slope"), [("v4", 0.7707), ("v6", 0.7674)])
def test_the_line_depends_on_which_models_it_is_drawn_through(version, slope):
    """Through the 24 models above 90 % it is flatter than through all 30 (0.8385, 0.8393)."""
    models = [model for model in published_models() if model.cifar10.accuracy > 0.9]
    assert len(models) == 24
    line = fit_line(
        [model.cifar10.accuracy for model in models],
        [getattr(model, version).accuracy for model in models],
    )
    assert round(line.slope, 4) == slope
    steepest = line.slope_interval[1]
    assert steepest - line.slope > 0.08  # as few and as near as they are, they say little of it


def test_points_on_a_line_give_that_line_with_intervals_of_no_width():
    x = np.array([0.5, 0.7, 0.9, 0.99])
    line = fit_line(x, Line(slope=0.8, intercept=-0.5)(x))
    assert (line.slope, line.intercept) == (pytest.approx(0.8), pytest.approx(-0.5))
    assert line.r_squared == pytest.approx(1)
    assert line.slope_interval == pytest.approx((0.8, 0.8), abs=1e-6)
    assert line.intercept_interval == pytest.approx((-0.5, -0.5), abs=1e-6)


def test_the_intervals_are_those_of_the_normal_equations():
    rng = np.random.default_rng(0)
    x = rng.uniform(0.6, 0.95, 12)
    y = expit(0.8 * logit(x) - 0.4 + rng.normal(0, 0.1, 12))
    design = np.stack([logit(x), np.ones(12)], axis=1)
    solution, (squares,), _, _ = np.linalg.lstsq(design, logit(y), rcond=None)
    errors = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * squares / 10)
    for confidence in (0.95, 0.5):
        line = fit_line(x, y, confidence=confidence)
        reach = stats.t.ppf((1 + confidence) / 2, 10) * errors
        assert (line.slope, line.intercept) == pytest.approx(solution)
        assert line.slope_interval == pytest.approx(
            (solution[0] - reach[0], solution[0] + reach[0])
        )
        assert line.intercept_interval == pytest.approx(
            (solution[1] - reach[1], solution[1] + reach[1])
        )


def test_the_intervals_cover_the_true_line_as_often_as_they_say():
    rng = np.random.default_rng(1)
    x = np.linspace(0.7, 0.97, 10)
    covered = 0
    for _ in range(400):
        y = expit(0.8 * logit(x) - 0.4 + rng.normal(0, 0.1, 10))
        low, high = fit_line(x, y, confidence=0.9).slope_interval
        covered += low <= 0.8 <= high
    assert covered / 400 == pytest.approx(0.9, abs=0.045)  # 3 standard errors


@pytest.mark.parametrize(
    ("in_dist", "out_dist", "message"),
    [
        ([0.9, 0.8], [0.8, 0.7], "needs at least 3 models, got 2"),
        ([0.9, 0.9, 0.9], [0.8, 0.7, 0.6], "all 3 models have in_dist 0.9"),
        ([0.9, 0.8, 0.7], [0.8, 1.0, 0.6], "out_dist[1] is 1: its logit is infinite"),
        ([0.0, 0.8, 0.7], [0.8, 0.7, 0.6], "in_dist[0] is 0: its logit is infinite"),
        ([0.9, 0.8, 0.7], [0.8, 0.7], "two lists of one length, got shapes (3,), (2,)"),
        ([0.9, 0.8, 70], [0.8, 0.7, 0.6], "in_dist[2] must be a fraction in [0, 1], got 70"),
    ],
)
def test_models_that_determine_no_line_are_refused(in_dist, out_dist, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fit_line(in_dist, out_dist)


def test_a_confidence_in_percent_is_refused():
    with pytest.raises(ValueError, match="confidence must be between 0 and 1, got 95"):
        fit_line([0.9, 0.8, 0.7], [0.8, 0.7, 0.6], confidence=95)
