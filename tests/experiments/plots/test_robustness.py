"""The picture of accuracy in against out of distribution: what is drawn where, and how labelled."""

import re

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from scipy.special import logit

from ensembles.experiments.evaluation.counts import Counts
from ensembles.experiments.plots.logit_axes import _ticks
from ensembles.experiments.plots.robustness import COLOURS, Point, plot_robustness
from ensembles.experiments.robustness.line import LINES, Line, baseline
from ensembles.experiments.robustness.reference import published_models

MEMBERS = tuple(
    Point(f"member_{i}", Counts(9300 + i, 10_000), Counts(1690 + i, 2000)) for i in range(3)
)
ENSEMBLE = Point("ensemble", Counts(9471, 10_000), Counts(1762, 2000), MEMBERS)
SINGLE = Point("single", 0.93, 0.85)


def drawn(figure):
    """Of every point with a marker of its own: where it is, by label."""
    return {
        container.get_label().removeprefix("_"): tuple(container.lines[0].get_xydata()[0])
        for container in figure.axes[0].containers
        if isinstance(container, ErrorbarContainer)
    }


def bars(figure, name):
    """The ends of the horizontal and the vertical bar of a point."""
    (container,) = (
        c for c in figure.axes[0].containers if str(c.get_label()).removeprefix("_") == name
    )
    across, up = (collection.get_segments()[0] for collection in container.lines[2])
    return across[:, 0].tolist(), up[:, 1].tolist()


def line(figure, label):
    (found,) = (one for one in figure.axes[0].lines if one.get_label() == label)
    return found.get_xydata()


def legend(figure):
    return [text.get_text().replace("\n", " ") for text in figure.legends[0].get_texts()]


def test_points_and_members_are_where_their_accuracies_are():
    figure = plot_robustness([ENSEMBLE, SINGLE])
    expected = {"ensemble": (0.9471, 0.881), "single": (0.93, 0.85)}
    expected |= {m.name: (m.in_dist.accuracy, m.out_dist.accuracy) for m in MEMBERS}
    assert drawn(figure) == expected


def test_bars_are_the_clopper_pearson_intervals_of_both_counts():
    across, up = bars(plot_robustness([ENSEMBLE]), "ensemble")
    assert across == pytest.approx(list(Counts(9471, 10_000).interval()))
    assert up == pytest.approx(list(Counts(1762, 2000).interval()))
    across, up = bars(plot_robustness([ENSEMBLE]), "member_1")
    assert up == pytest.approx(list(Counts(1691, 2000).interval()))


def test_an_accuracy_without_counts_has_no_bar():
    (container,) = plot_robustness([SINGLE]).axes[0].containers
    assert container.lines[2] == ()


def test_members_are_joined_to_their_ensemble_and_to_no_other():
    other = Point("other", 0.95, 0.9, (Point("first", 0.94, 0.88),))
    figure = plot_robustness([ENSEMBLE, other])
    joins = {
        one.get_label(): one.get_xydata().tolist()
        for one in figure.axes[0].lines
        if " of " in str(one.get_label())
    }
    assert len(joins) == 4
    assert joins["_first of other"] == [[0.94, 0.88], [0.95, 0.9]]
    assert joins["_member_2 of ensemble"] == [[0.9302, 0.846], [0.9471, 0.881]]


@pytest.mark.parametrize("version", ["v4", "v6"])
def test_the_published_models_stand_behind(version):
    figure = plot_robustness([SINGLE], published=version)
    expected = [(m.cifar10.accuracy, getattr(m, version).accuracy) for m in published_models()]
    assert list(map(tuple, line(figure, "30 published models").tolist())) == expected
    assert "30 published models" in legend(figure)
    assert "30 published models" not in legend(plot_robustness([SINGLE], published=None))


def test_the_baseline_and_the_diagonal_are_drawn_across_the_axes():
    figure = plot_robustness([SINGLE])
    x, y = line(figure, "published baseline:\neffective robustness 0").T
    np.testing.assert_allclose(y, baseline(x))
    assert (x[0], x[-1]) == pytest.approx(figure.axes[0].get_xlim())
    diagonal = line(figure, "y = x")
    np.testing.assert_array_equal(diagonal[:, 0], diagonal[:, 1])


@pytest.mark.parametrize("out_dist", [Counts(6400, 10_000), Counts(9400, 10_000)])
def test_the_diagonal_is_in_view_however_large_the_shift(out_dist):
    figure = plot_robustness([Point("far", Counts(38_000, 50_000), out_dist)], published=None)
    low, high = figure.axes[0].get_ylim()
    diagonal = line(figure, "y = x")[:, 1]
    assert ((low < diagonal) & (diagonal < high)).mean() > 0.2


def test_another_line_or_none_is_drawn_when_asked():
    own = Line(slope=1.0, intercept=-0.3)
    x, y = line(
        plot_robustness([SINGLE], line=own), "published baseline:\neffective robustness 0"
    ).T
    np.testing.assert_allclose(y, own(x))
    figure = plot_robustness([SINGLE], line=None, published=None)
    assert legend(figure) == ["single", "y = x"]


def test_both_axes_are_logit_axes_that_hold_every_point_and_bar():
    low_end = Point("weak", Counts(30, 50), Counts(5, 50))
    axes = plot_robustness([ENSEMBLE, low_end]).axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("logit", "logit")
    for ends, counts in (
        (axes.get_xlim(), [Counts(30, 50), Counts(9471, 10_000)]),
        (axes.get_ylim(), [Counts(5, 50), Counts(1762, 2000)]),
    ):
        for count in counts:
            assert ends[0] < count.interval()[0] < count.interval()[1] < ends[1]


def test_labels_say_what_was_measured_on_how_many_samples():
    axes = plot_robustness([ENSEMBLE]).axes[0]
    assert axes.get_xlabel() == "accuracy on CIFAR-10 test (%, n = 10,000)"
    assert axes.get_ylabel() == "accuracy on CIFAR-10.1 v6 (%, n = 2,000)"
    short = Point("short", Counts(9292, 9984), 0.85)
    axes = plot_robustness([ENSEMBLE, short], title="two").axes[0]
    assert axes.get_xlabel() == "accuracy on CIFAR-10 test (%, n = 9,984 to 10,000)"
    assert axes.get_title(loc="left") == "two"
    assert plot_robustness([SINGLE]).axes[0].get_xlabel() == "accuracy on CIFAR-10 test (%)"


def test_the_legend_names_what_there_is_and_nothing_else():
    lines = ["y = x", "published baseline: effective robustness 0", "30 published models"]
    assert legend(plot_robustness([SINGLE])) == ["single", *lines]
    assert legend(plot_robustness([ENSEMBLE, SINGLE])) == [
        "ensemble",
        "single",
        "members, joined to their ensemble",
        *lines,
    ]


def test_no_two_of_49_points_look_alike():
    points = [Point(str(i), 0.5 + i / 200, 0.5) for i in range(49)]
    containers = plot_robustness(points).axes[0].containers
    looks = {(c.lines[0].get_color(), c.lines[0].get_marker()) for c in containers}
    assert len(looks) == 49
    assert {colour for colour, _ in looks} == set(COLOURS)


@pytest.mark.parametrize(
    ("in_dist", "out_dist", "marker"),
    [(1.0, 0.9, ">"), (0.0, 0.9, "<"), (0.9, 1.0, "^"), (0.9, 0.0, "v"), (1.0, 1.0, "^")],
)
def test_0_and_1_are_drawn_at_the_edge_as_a_triangle_and_the_legend_says_so(
    in_dist, out_dist, marker
):
    figure = plot_robustness([Point("edge", in_dist, out_dist), SINGLE])
    axes = figure.axes[0]
    x, y = drawn(figure)["edge"]
    edges = {0.0: 0, 1.0: 1}
    assert x == (axes.get_xlim()[edges[in_dist]] if in_dist in edges else in_dist)
    assert y == (axes.get_ylim()[edges[out_dist]] if out_dist in edges else out_dist)
    assert np.isfinite(logit([x, y])).all()
    assert axes.containers[0].lines[0].get_marker() == marker
    assert "0 or 100 %: beyond the end of the axis" in legend(figure)
    assert "0 or 100 %: beyond the end of the axis" not in legend(plot_robustness([SINGLE]))


def test_a_perfect_count_has_a_bar_from_its_lower_end_to_the_edge():
    figure = plot_robustness([Point("perfect", Counts(797, 797), Counts(790, 797))])
    across, _ = bars(figure, "perfect")
    assert across == pytest.approx([Counts(797, 797).interval()[0], figure.axes[0].get_xlim()[1]])


def test_only_infinite_accuracies_can_be_drawn_too():
    figure = plot_robustness([Point("all", 1.0, 1.0)], line=None, published=None)
    assert np.isfinite(figure.axes[0].get_xlim()).all()
    figure.savefig(__import__("io").BytesIO())


def test_pyplot_knows_nothing_of_our_figures():
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    plot_robustness([SINGLE])
    assert pyplot.get_fignums() == before


@pytest.mark.parametrize(
    ("points", "options", "message"),
    [
        ([], {}, "there is nothing to draw: give at least one point"),
        ([SINGLE, SINGLE], {}, "two points are called 'single'"),
        ([SINGLE], {"published": "v5"}, "published must be 'v4', 'v6' or None, got 'v5'"),
    ],
)
def test_what_cannot_be_drawn_is_refused(points, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plot_robustness(points, **options)


@pytest.mark.parametrize("accuracy", [93.0, -0.1, float("nan")])
def test_a_point_outside_of_0_to_1_is_refused(accuracy):
    message = "out_dist of 'model' must be counts or a fraction in [0, 1]"
    with pytest.raises(ValueError, match=re.escape(message)):
        Point("model", 0.9, accuracy)


@pytest.mark.parametrize(
    ("low", "high"), [(0.6, 0.7), (0.65, 0.94), (0.82, 0.977), (0.002, 0.998), (0.93, 0.931)]
)
def test_every_axis_has_readable_ticks(low, high):
    ticks = _ticks(low, high)
    assert 3 <= len(ticks) <= 11
    assert ticks == sorted(ticks)
    assert all(low <= tick <= high for tick in ticks)
    labels = [f"{100 * tick:.4g}" for tick in ticks]
    assert len(set(labels)) == len(labels)
    gaps = np.diff(logit(ticks)) / (logit(high) - logit(low))
    assert gaps.min() > 1 / 13


def test_the_default_line_is_that_of_cifar_10_1():
    assert plot_robustness.__kwdefaults__["line"] == LINES["cifar10.1"]
