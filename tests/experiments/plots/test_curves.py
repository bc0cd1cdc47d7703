"""Training curves: tables that are read, and what is drawn of them."""

import re
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger

from ensembles.experiments.plots.curves import Curves, plot_training_curves, read_curves, read_runs

OURS = """step,epoch,lr,train/loss,train/member_0/accuracy,train/ensemble/accuracy,\
val/member_0/accuracy,val/ensemble/accuracy,val/ensemble/n
8,0,0.1,2.1,0.25,0.5,0.2,0.4,40
16,1,0.05,1.4,0.5,0.75,0.3,0.6,40
"""


def table(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder


def test_our_tables_give_the_curves_of_the_ensemble(tmp_path):
    run = table(tmp_path, "epochs.csv", OURS)
    assert read_curves(run) == Curves({1: 0.5, 2: 0.75}, {1: 0.4, 2: 0.6}, validation_n=40)
    assert read_curves(run / "epochs.csv") == read_curves(run)


def test_any_columns_can_be_asked_for(tmp_path):
    run = table(tmp_path, "epochs.csv", OURS)
    curves = read_curves(
        run, training="train/member_0/accuracy", validation="val/member_0/accuracy"
    )
    assert curves == Curves({1: 0.25, 2: 0.5}, {1: 0.2, 2: 0.3})
    assert read_curves(run, training="train/member_0/accuracy").validation == {}


def test_a_single_network_has_the_curves_of_its_only_member(tmp_path):
    run = table(
        tmp_path, "epochs.csv", "epoch,train/single/accuracy,val/single/accuracy\n0,0.5,0.25\n"
    )
    assert read_curves(run) == Curves({1: 0.5}, {1: 0.25})


def test_a_run_without_validation_has_an_empty_curve(tmp_path):
    run = table(tmp_path, "epochs.csv", "epoch,train/single/accuracy\n0,0.5\n")
    assert read_curves(run) == Curves({1: 0.5}, {})


def test_the_table_that_lightning_s_logger_writes_is_read(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="run")
    for epoch in range(2):
        for step in range(2):  # twice an epoch: its mean counts
            logger.log_metrics({"train_acc": 0.5 + epoch / 4 + step / 8, "epoch": epoch}, step)
        logger.log_metrics({"val_acc": 0.25 + epoch / 4, "epoch": epoch}, epoch)
    logger.save()
    curves = read_curves(tmp_path / "run", training="train_acc", validation="val_acc")
    assert curves == Curves({1: 0.5625, 2: 0.8125}, {1: 0.25, 2: 0.5})


def test_the_runs_of_a_folder_are_read_by_name(tmp_path):
    for name in ("sum", "mean"):
        table(tmp_path / name, "epochs.csv", OURS)
    table(tmp_path / "notes", "readme.txt", "no run")
    assert list(read_runs(tmp_path)) == ["mean", "sum"]
    assert read_runs(tmp_path)["sum"] == read_curves(tmp_path / "sum")


def test_an_empty_folder_and_a_missing_one_are_told_apart(tmp_path):
    message = f"{tmp_path} holds no runs: none of its folders has epochs.csv or metrics.csv"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read_runs(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        read_runs(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"no run: there is no epochs\.csv or metrics\.csv"):
        read_curves(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column 'epoch'. It is empty"),
        ("step,loss\n1,2\n", "has no column 'epoch'. There are: step, loss"),
        (
            "epoch,train_acc\n0,0.5\n",
            "which column is the accuracy? There is no 'train/ensemble/accuracy'; pass training= "
            "and validation=. There are: epoch, train_acc",
        ),
        (
            "epoch,train/a/accuracy,train/b/accuracy\n0,0.5,0.5\n",
            "which column is the accuracy?",
        ),
        ("epoch,train/single/accuracy\n", "has no value in column 'train/single/accuracy'"),
        (
            "epoch,train/single/accuracy\n0,0.5\n1,52.5\n",
            "line 3: train/single/accuracy must be a fraction in [0, 1], got 52.5",
        ),
        ("epoch,train/single/accuracy\n0,nan\n", "must be a fraction in [0, 1], got nan"),
        ("epoch,train/single/accuracy\n0,high\n", "train/single/accuracy 'high' is no number"),
        ("epoch,train/single/accuracy\n,0.5\n", "epoch '' or train/single/accuracy '0.5' is no"),
        ("epoch,train/single/accuracy\n0,0.5\n1,0.", "line 3: 2 of 2 cells, cut off. Usual"),
        ("epoch,train/single/accuracy\n0,0.5\n1\n", "line 3: 1 of 2 cells. Usual cause: a run"),
        ("epoch,train/single/accuracy\n0,0.5,7\n", "line 2: 3 of 2 cells. Usual cause: a run"),
    ],
)
def test_a_malformed_table_is_refused_with_the_place(tmp_path, text, message):
    run = table(tmp_path, "epochs.csv", text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_curves(run)
    assert str(run / "epochs.csv") in str(error.value)


def test_a_table_that_is_no_text_is_named(tmp_path):
    run = table(tmp_path, "epochs.csv", "")
    (run / "epochs.csv").write_bytes(bytes(range(128, 256)))
    with pytest.raises(ValueError, match="is no table: 'utf-8' codec can't decode") as error:
        read_curves(run)
    assert str(run / "epochs.csv") in str(error.value)


def test_a_missing_column_is_refused_with_those_there_are(tmp_path):
    run = table(tmp_path, "metrics.csv", "epoch,train_acc\n0,0.5\n")
    with pytest.raises(ValueError, match=r"no column 'val_acc'\. There are: epoch, train_acc"):
        read_curves(run, training="train_acc", validation="val_acc")


def data(axes):
    return {str(one.get_label()): one.get_xydata().tolist() for one in axes.lines}


def test_both_panels_show_every_run_in_per_cent_by_epoch():
    runs = {
        "single": Curves({1: 0.5, 2: 0.75}, {1: 0.4, 2: 0.5}, validation_n=5000),
        "ensemble, sum": Curves({1: 0.25}, {1: 0.5}, validation_n=5000),
    }
    training, validation = plot_training_curves(runs, title="runs").axes
    assert data(training) == {"single": [[1, 50], [2, 75]], "ensemble, sum": [[1, 25]]}
    assert data(validation) == {"single": [[1, 40], [2, 50]], "ensemble, sum": [[1, 50]]}
    assert validation.get_title(loc="left") == "validation (n = 5,000)"
    assert (training.get_xlabel(), training.get_ylabel()) == ("epochs trained", "accuracy (%)")
    assert training.lines[0].get_color() == validation.lines[0].get_color()
    assert training.lines[0].get_color() != training.lines[1].get_color()


def test_seeds_of_one_run_are_drawn_as_mean_and_range():
    seeds = [Curves({1: 0.2, 2: 0.5, 3: 0.9}, {}), Curves({1: 0.4, 2: 0.6}, {})]
    figure = plot_training_curves({"single": seeds})
    (axes,) = figure.axes
    ((label, line),) = data(axes).items()
    assert label == "single\n(mean and range of 2)"
    np.testing.assert_allclose(line, [[1, 30], [2, 55]])
    (band,) = axes.collections
    corners = {tuple(corner) for corner in np.round(band.get_paths()[0].vertices, 9)}
    assert {(1, 20), (1, 40), (2, 50), (2, 60)} <= corners


def test_a_curve_that_was_not_measured_is_named_and_the_other_is_drawn(tmp_path):
    """Members that see images of their own have no mean prediction in training."""
    columns = "epoch,train/ensemble/accuracy,val/ensemble/accuracy,val/ensemble/n\n"
    table(tmp_path / "own", "epochs.csv", columns + "0,,0.25,100\n1,,0.5,100\n")
    own = read_curves(tmp_path / "own")
    assert own == Curves({}, {1: 0.25, 2: 0.5}, 100)
    with pytest.raises(ValueError, match="has no value in column 'train/ensemble/accuracy'"):
        read_curves(tmp_path / "own", training="train/ensemble/accuracy")
    figure = plot_training_curves({"own": own, "other": Curves({1: 0.5}, {1: 0.25}, 100)})
    left, right = figure.axes
    assert [text.get_text() for text in left.texts] == ["not measured:\nown"]
    assert [len(axes.lines) for axes in (left, right)] == [1, 2]
    assert not right.texts
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"own", "other"}


def test_different_validation_sizes_are_not_passed_off_as_one():
    figure = plot_training_curves(
        {"a": Curves({1: 0.5}, {1: 0.5}, 100), "b": Curves({1: 0.5}, {1: 0.5}, 200)}
    )
    assert figure.axes[1].get_title(loc="left") == "validation"


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({}, "there is nothing to draw: give at least one run"),
        ({"a": []}, "'a' has no runs"),
        ({"a": [Curves({1: 0.5}, {}), Curves({2: 0.5}, {})]}, "'a' have no epoch in common"),
    ],
)
def test_what_cannot_be_drawn_is_refused(runs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plot_training_curves(runs)
