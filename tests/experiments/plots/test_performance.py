"""The diary's call, pictures of results, and files that are never overwritten."""

import errno
import os
import re
from datetime import UTC, datetime

import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.image import imread

from ensembles.experiments.evaluation.counts import Counts
from ensembles.experiments.evaluation.results import Data, EvaluatedData, Model, Result, Score
from ensembles.experiments.plots import (
    plot_model_performance,
    plot_results,
    plot_robustness,
    save_figure,
)
from ensembles.experiments.plots.robustness import Point


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def drawn(figure):
    return {
        container.get_label(): tuple(container.lines[0].get_xydata()[0])
        for container in figure.axes[0].containers
        if isinstance(container, ErrorbarContainer)
    }


def legend(figure):
    return [text.get_text().replace("\n", " ") for text in figure.legends[0].get_texts()]


# --- the diary's call ---------------------------------------------------------------------------


def test_the_diary_s_call_writes_a_png_and_never_over_another(tmp_path):
    number = {"in_dist_acc": 0.9307, "out_dist_acc": 0.849}
    (tmp_path / "cifar10_performance_3.png").write_text("mine")
    names = [plot_model_performance(number, "cifar10").path.name for _ in range(3)]
    assert names == [
        "cifar10_performance.png",
        "cifar10_performance_2.png",
        "cifar10_performance_4.png",
    ]
    assert (tmp_path / "cifar10_performance_3.png").read_text() == "mine"
    assert imread(tmp_path / names[0]).shape[2] in (3, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [*names, "cifar10_performance_3.png"]
    )


@pytest.mark.parametrize("scale", [1, 100])
def test_fractions_and_percent_draw_the_same_point(scale):
    number = {"in_dist_acc": 0.93 * scale, "out_dist_acc": 0.85 * scale}
    figure = plot_model_performance(number, "cifar10").figure
    assert drawn(figure) == {"model": (pytest.approx(0.93), pytest.approx(0.85))}
    assert "30 published models" in legend(figure)


def test_several_models_are_drawn_by_name_with_bars_where_sizes_are_given(tmp_path):
    figure, path = plot_model_performance(
        {
            "single": {"in_dist_acc": 93.0, "out_dist_acc": 85.0},
            "ensemble": {
                "in_dist_acc": 94.71,
                "out_dist_acc": 88.1,
                "in_dist_n": 10_000,
                "out_dist_n": 2000,
            },
        },
        "cifar10",
        version="v4",
        path=tmp_path / "new" / "picture.svg",
    )
    assert path == tmp_path / "new" / "picture.svg"
    assert path.read_text().startswith("<?xml")
    assert list(drawn(figure)) == ["single", "ensemble"]
    single, ensemble = figure.axes[0].containers[:2]
    assert len(single.lines[2]) == 0
    segment = ensemble.lines[2][1].get_segments()[0]
    assert segment[:, 1].tolist() == pytest.approx(list(Counts(1762, 2000).interval()))
    assert figure.axes[0].get_ylabel() == "accuracy on CIFAR-10.1 v4 (%, n = 2,000)"


def test_imagenet_has_its_own_line_and_no_cifar_models():
    figure = plot_model_performance({"in_dist_acc": 76, "out_dist_acc": 64}, "imagenet").figure
    assert figure.axes[0].get_xlabel() == "accuracy on ImageNet validation (%)"
    assert "30 published models" not in legend(figure)
    line = next(x for x in figure.axes[0].lines if "baseline" in str(x.get_label()))
    x, y = line.get_xydata()[0]
    from ensembles.experiments.robustness.line import baseline

    assert y == pytest.approx(baseline(x, "imagenetv2"))


@pytest.mark.parametrize(
    ("performance", "dataset", "message"),
    [
        (
            {"in_dist_acc": 93, "out_dist_acc": 0.85},
            "cifar10",
            "out_dist_acc = 0.85 reads as a fraction and in_dist_acc = 93 as percent",
        ),
        (
            {
                "a": {"in_dist_acc": 93, "out_dist_acc": 85},
                "b": {"in_dist_acc": 0.93, "out_dist_acc": 0.85},
            },
            "cifar10",
            "b: in_dist_acc = 0.93 reads as a fraction and a: in_dist_acc = 93 as percent",
        ),
        ({"in_dist_acc": 930, "out_dist_acc": 85}, "cifar10", "in_dist_acc must be a fraction"),
        ({"in_dist_acc": -1, "out_dist_acc": 85}, "cifar10", "or percent up to 100, got -1"),
        (
            {"in_dist_acc": float("nan"), "out_dist_acc": 85},
            "cifar10",
            "in_dist_acc must be a fraction in [0, 1] or percent up to 100, got nan",
        ),
        ({"in_dist_acc": 0.9}, "cifar10", "out_dist_acc is missing; given are in_dist_acc"),
        (
            {"a": {"in_dist_acc": 0.9, "out_acc": 0.8}},
            "cifar10",
            "a: out_dist_acc is missing; given are in_dist_acc, out_acc",
        ),
        (
            {"in_dist_acc": 0.9, "out_dist_acc": 0.8, "loss": 1},
            "cifar10",
            "unknown key 'loss'",
        ),
        ({"in_dist_acc": "high", "out_dist_acc": 0.8}, "cifar10", "in_dist_acc must be a number"),
        (
            {
                "in_dist_acc": 93.06890869,
                "out_dist_acc": 85,
                "in_dist_n": 10_000,
                "out_dist_n": 2000,
            },
            "cifar10",
            "is no count of 10000",
        ),
        ({}, "cifar10", "performance must be {'in_dist_acc': ..., 'out_dist_acc': ...}"),
        ({"in_dist_acc": 0.9, "out_dist_acc": 0.8}, "cifar100", "one of cifar10, imagenet"),
    ],
)
def test_what_cannot_be_understood_is_refused_and_nothing_written(
    performance, dataset, message, tmp_path
):
    with pytest.raises(ValueError, match=re.escape(message)):
        plot_model_performance(performance, dataset)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_version_is_refused():
    with pytest.raises(ValueError, match=r"version of CIFAR-10\.1 must be 'v4' or 'v6', got 'v5'"):
        plot_model_performance({"in_dist_acc": 0.9, "out_dist_acc": 0.8}, "cifar10", version="v5")


# --- files --------------------------------------------------------------------------------------


def test_a_picture_is_not_written_over_a_file(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=re.escape(f"{path} exists")):
        save_figure(Figure(), path)
    with pytest.raises(FileExistsError):
        plot_model_performance({"in_dist_acc": 0.9, "out_dist_acc": 0.8}, "cifar10", path=path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("name", ["picture", "picture.docx"])
def test_an_ending_that_names_no_format_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=rf"{name} must end in a format, one of .*\.png"):
        save_figure(Figure(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_half_picture(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        save_figure(Figure(), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


# --- results ------------------------------------------------------------------------------------


def score(correct, n):
    return Score(correct=correct, n=n, interval=Counts(correct, n).interval(), nll=0.5)


def evaluated(name, n, members, vote=None, *, digest="a", version="1"):
    kinds = ("arithmetic", "geometric", "vote") if vote is not None else ()
    return EvaluatedData(
        data=Data(
            name=name, version=version, split="test", sha256=digest * 64, n=n, counts={"cat": n}
        ),
        members={member: score(correct, n) for member, correct in members.items()},
        reduced=[m for m in members if m != "parent"] if vote is not None else [],
        reductions={kind: score(vote, n) for kind in kinds},
    )


def result(model, *evaluations, seed=None):
    return Result(
        schema_version=1,
        time=datetime(2021, 10, 25, tzinfo=UTC),
        command=[],
        seed=seed,
        device="cpu",
        packages={},
        model=Model(name=model, options={}, weights=[]),
        evaluations=list(evaluations),
    )


SINGLE = result(
    "single",
    evaluated("cifar10", 10_000, {"single": 9307}),
    evaluated("cifar10_1_v6", 2000, {"single": 1695}, digest="b"),
    evaluated("cifar10_blur_3", 10_000, {"single": 8000}, digest="c"),
)
ENSEMBLE = result(
    "ensemble",
    evaluated("cifar10", 10_000, {"member_0": 9300, "member_1": 9310}, 9471),
    evaluated("cifar10_1_v6", 2000, {"member_0": 1690, "member_1": 1700}, 1762, digest="b"),
)
SUBNETS = result(
    "subnets",
    evaluated("cifar10", 10_000, {"parent": 9400, "subnet_0_0": 9200, "subnet_0_1": 9210}, 9300),
    evaluated(
        "cifar10_1_v6",
        2000,
        {"parent": 1740, "subnet_0_0": 1650, "subnet_0_1": 1660},
        1700,
        digest="b",
    ),
)


def test_results_are_drawn_one_picture_for_each_shifted_set():
    figures = plot_results([SINGLE, ENSEMBLE])
    assert list(figures) == ["cifar10_1_v6", "cifar10_blur_3"]
    assert drawn(figures["cifar10_1_v6"]) == {
        "single": (0.9307, 0.8475),
        "ensemble": (0.9471, 0.881),
        "_member_0": (0.93, 0.845),
        "_member_1": (0.931, 0.85),
    }
    assert drawn(figures["cifar10_blur_3"]) == {"single": (0.9307, 0.8)}
    labels = {name: figure.axes[0].get_ylabel() for name, figure in figures.items()}
    assert labels == {
        "cifar10_1_v6": "accuracy on CIFAR-10.1 v6 (%, n = 2,000)",
        "cifar10_blur_3": "accuracy on CIFAR-10 blur 3 test (%, n = 10,000)",
    }


def test_the_published_baseline_is_drawn_only_where_it_was_published():
    figures = plot_results([SINGLE])
    assert "30 published models" in legend(figures["cifar10_1_v6"])
    assert legend(figures["cifar10_blur_3"]) == ["single", "y = x"]
    jpeg = result(
        "single",
        evaluated("cifar10_jpeg", 10_000, {"single": 8200}),
        evaluated("cifar10_1_v6", 2000, {"single": 1695}, digest="b"),
    )
    assert legend(plot_results([jpeg])["cifar10_1_v6"]) == ["single", "y = x"]


def test_a_parent_is_a_point_by_itself():
    figure = plot_results([SUBNETS])["cifar10_1_v6"]
    assert set(drawn(figure)) == {"subnets", "subnets, parent", "_subnet_0_0", "_subnet_0_1"}
    assert drawn(figure)["subnets, parent"] == (0.94, 0.87)


def test_results_of_one_name_are_told_apart_by_seed_or_number():
    def named(*seeds):
        repeated = [SINGLE.model_copy(update={"seed": seed}) for seed in seeds]
        return [n for n in drawn(plot_results(repeated)["cifar10_1_v6"]) if not n.startswith("_")]

    assert named(0, 1) == ["single, seed 0", "single, seed 1"]
    assert named(None, None) == ["single (1)", "single (2)"]
    assert named(0, 0) == ["single, seed 0 (1)", "single, seed 0 (2)"]


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([], "there are no results"),
        (
            [result("single", evaluated("cifar10", 10_000, {"single": 9307}))],
            "the result of 'single' has accuracies on cifar10 only: evaluate it on a shifted set",
        ),
        (
            [
                SINGLE,
                result(
                    "other",
                    evaluated("cifar10", 9984, {"single": 9292}, digest="d", version="short"),
                    evaluated("cifar10_1_v6", 2000, {"single": 1695}, digest="b"),
                ),
            ],
            "measured on different images that are both called cifar10: sha256 aaaaaaaaaaaa..., "
            "n = 10000 (1), and dddddddddddd..., n = 9984 (short)",
        ),
        (
            [SINGLE, result("digits", *SINGLE.evaluations[1:])],
            "the results start from different sets, cifar10 and cifar10_1_v6: give them apart",
        ),
        (
            [
                result(
                    "mixed",
                    evaluated("cifar10", 10, {"member_0": 9, "member_1": 8}, 9),
                    evaluated("cifar10_1_v6", 10, {"single": 8}, digest="b"),
                )
            ],
            "has members member_0, member_1 on cifar10 and single on cifar10_1_v6",
        ),
    ],
)
def test_results_that_do_not_belong_together_are_refused(results, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plot_results(results)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="reduction must be 'arithmetic', 'geometric' or 'vote'"):
        plot_results([ENSEMBLE], reduction="mean")


def test_all_names_of_pictures_are_in_one_place():
    from ensembles.experiments import plots

    assert all(hasattr(plots, name) for name in plots.__all__)
    assert plots.plot_robustness is plot_robustness
    assert plots.Point is Point
