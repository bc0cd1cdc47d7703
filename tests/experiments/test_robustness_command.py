"""`ensembles robustness`: on the published predictions, on runs of digits, and on wrong input."""

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import expit, logit
from torch import nn

from ensembles.experiments.command_line import main
from ensembles.experiments.data.sources import load_images
from ensembles.experiments.evaluation.results import Result, read_result, write_result
from ensembles.experiments.evaluation.scores import evaluate
from ensembles.experiments.robustness.dominance import dominance_matrix, triple_bounds
from ensembles.experiments.robustness.predictions import read_predictions
from ensembles.experiments.training.networks import NamedEnsemble, SingleNetwork

DATA = Path(os.environ.get("ENSEMBLES_DATA", Path(__file__).parents[3] / "shared" / "data"))
PUBLISHED = DATA / "cifar10_1_predictions.npz"
needs_predictions = pytest.mark.skipif(
    not PUBLISHED.is_file(), reason=f"{PUBLISHED.name} is not in {DATA} (set ENSEMBLES_DATA)"
)

QUICK = (
    "--data digits --network.base_channels 1 --training.epochs 1 --training.batch_size 450 "
    "--execution.progress false --execution.tensorboard false --execution.accelerator cpu"
)


def ensembles(line):
    return main(shlex.split(line))


def shown_by(line, capsys):
    capsys.readouterr()
    assert ensembles(f"robustness {line}") == 0
    return capsys.readouterr().out


def row(shown, beginning):
    """The cells of the one row that begins so, by words."""
    (found,) = (line for line in shown.splitlines() if line.strip().startswith(beginning))
    return found.replace(beginning, "").split()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Two runs of digits with their results and predictions, on a rotation too."""
    folder = tmp_path_factory.mktemp("digits")
    pair = "--network.kind ensemble --network.members 2"
    for name, options in (("pair", pair), ("other", "--seed 5")):
        assert ensembles(f"train {folder}/{name} {QUICK} {options}") == 0
        assert (
            ensembles(
                f"evaluate --model {folder}/{name} --data digits --shifted rotation:3 --device cpu "
                f"--out {folder}/results/{name}.json --predictions {folder}/{name}.npz"
            )
            == 0
        )
    return folder


# --- the published predictions --------------------------------------------------------------------


@needs_predictions
def test_the_figures_of_the_30_published_models_are_shown(capsys):
    """The published table, the refits, the dominance of pairs and the triples; see test_reference.

    Of shake_drop on v6: 92.30 - expit(0.8318 logit(0.9687) - 0.4736) = 0.76 points.
    """
    shown = shown_by(PUBLISHED, capsys)
    # set, images, dominance, of independence
    assert row(shown, "original ")[:3] == ["10,000", "1.68", "0.41"]
    assert row(shown, "v4 ")[:3] == ["2,021", "3.38", "0.38"]
    assert row(shown, "v6 ")[:3] == ["2,000", "3.30", "0.38"]
    assert "means over 435 pairs of single models" in shown
    v4, v6 = shown.split("from original to ")[1:]
    for part, slope, intercept, r_squared in (
        (v4, "0.8385", "0.4966", "0.9806"),
        (v6, "0.8393", "0.4715", "0.9816"),
    ):
        assert (
            f"refit: logit(out) = {slope} logit(in) - {intercept} through 30 single models, "
            f"R2 = {r_squared}\n" in part
        )
        assert "; the published line is within them)" in part
        assert "4,060 triples: the middle model is 0." in part
        assert (
            "published baseline (arXiv 2106.15831): logit(out) = 0.8318 logit(in) - 0.4736" in part
        )
    cells = row(v6, "shake_drop ")
    assert cells[0] == "96.87"
    assert cells[4] == "92.30"
    assert cells[-2:] == ["91.54", "+0.76"]
    ranked = [line.split()[0] for line in v6.splitlines()[2:32]]
    assert ranked[0] == "shake_shake_26_2x64d_SSI_cutout16"
    assert ranked[-1] == "alexnet_tf_ben"


@needs_predictions
def test_every_column_of_a_matrix_is_shown_in_lines_that_fit(capsys):
    shown = shown_by(PUBLISHED, capsys)
    assert max(map(len, shown.split("means over")[0].splitlines())) <= 102
    dominance = shown.split("\n\n")[0]
    zeta = 100 * dominance_matrix(read_predictions(PUBLISHED)["original"].correct)
    cells = []
    for line in dominance.splitlines():
        if "vgg16_keras" in line:
            cells += line.partition("vgg16_keras")[2].split()
    assert [float(cell) for cell in cells] == pytest.approx(zeta[25], abs=0.0501)


@needs_predictions
def test_json_holds_what_is_shown_and_all_matrices(capsys):
    report = json.loads(shown_by(f"{PUBLISHED} --json", capsys))
    stored = read_predictions(PUBLISHED)
    assert list(report["sets"]) == ["original", "v4", "v6"]
    np.testing.assert_array_equal(
        report["sets"]["v6"]["dominance"], dominance_matrix(stored["v6"].correct)
    )
    bounds = triple_bounds(stored["original"].correct, stored["v6"].correct)
    triples = report["shifts"][1]["triples"]
    assert triples["count"] == 4060
    assert triples["mean_bound"] == pytest.approx(bounds.bound.mean())
    assert triples["largest_deviation"] == pytest.approx(np.abs(bounds.deviation).max())
    model = report["shifts"][1]["models"]["shake_drop"]
    assert (model["in_distribution"]["correct"], model["shifted"]["correct"]) == (9687, 1846)
    expected = 100 * (0.9230 - expit(0.8318 * logit(0.9687) - 0.4736))
    assert model["effective_robustness"] == pytest.approx(expected)


# --- runs of one's own ----------------------------------------------------------------------------


def test_predictions_of_two_runs_are_compared_pair_by_pair(digits, capsys):
    shown = shown_by(f"{digits}/pair.npz {digits}/other.npz", capsys)
    names = ["member_0", "member_1", "ensemble, arithmetic", "ensemble, geometric"]
    names += ["ensemble, vote", "other"]
    right = {}
    for name in ("pair", "other"):
        stored = read_predictions(digits / f"{name}.npz")["digits_rotation_3"]
        right |= dict(zip(stored.models, stored.correct, strict=True))
    (block,) = (b for b in shown.split("\n\n") if b.startswith("similarity on digits_rotation_3"))
    for number, name in enumerate(names, start=1):
        expected = [100 * np.mean(right[name] == right[column]) for column in names]
        cells = [float(cell) for cell in row(block, f"{number} {name} ")]
        assert cells == pytest.approx(expected, abs=0.0501)
    # Of the members and the other run; reductions are made of them.
    single = ["member_0", "member_1", "other"]
    assert "means over 3 pairs of single models" in shown
    means = row(shown, "digits_rotation_3   797 ")
    alike = [np.mean(right[a] == right[b]) for a in single for b in single if a < b]
    assert float(means[2]) == pytest.approx(100 * np.mean(alike), abs=0.00501)
    assert (
        "  1 triple: the middle" in shown or "no triples: all models are equally accurate" in shown
    )
    assert "no line is published for these sets" in shown


def test_results_of_two_runs_are_shown_with_their_intervals(digits, capsys):
    shown = shown_by(f"{digits}/results", capsys)
    assert "from digits to digits_rotation_3\n" in shown
    for name in ("pair", "other"):
        inside, shifted = read_result(digits / "results" / f"{name}.json").evaluations
        for place, cells in ((inside, slice(4)), (shifted, slice(4, 8))):
            score = place.reductions.get("arithmetic") or place.members["single"]
            expected = (score.accuracy, *score.interval)
            words = row(shown, f"{name} ")[cells]
            numbers = [float(words[i].strip("()")) for i in (0, 1, 3)]
            assert numbers == pytest.approx([100 * value for value in expected], abs=0.00501)
    assert "baseline" not in shown
    assert "dominance" not in shown
    vote = json.loads(shown_by(f"{digits}/results --reduction vote --json", capsys))
    inside, _ = read_result(digits / "results" / "pair.json").evaluations
    (shift,) = vote["shifts"]
    assert (
        shift["models"]["pair"]["in_distribution"]["correct"] == inside.reductions["vote"].correct
    )
    assert [name for name, model in shift["models"].items() if model["ensemble"]] == ["pair"]


def results_of(tmp_path, *names):
    """Linear networks on digits that are called by these names of sets."""
    images = load_images("digits", "test")
    sets = [replace(images.select(slice(n, 400 + n)), name=name) for n, name in enumerate(names)]
    torch.manual_seed(0)
    made = [nn.Sequential(nn.Flatten(), nn.Linear(192, 10)) for _ in range(4)]
    for name, network in (("three", NamedEnsemble(made[:3])), ("one", SingleNetwork(made[3]))):
        found = [evaluate(network, images) for images in sets]
        write_result(Result.of(found, model=name), tmp_path / f"{name}.json")
    return tmp_path


def test_effective_robustness_is_shown_where_a_line_is_published(tmp_path, capsys):
    results = results_of(tmp_path, "cifar10", "cifar10_1_v6")
    shown = shown_by(results, capsys)
    inside, shifted = read_result(tmp_path / "one.json").evaluations
    here, there = inside.members["single"].accuracy, shifted.members["single"].accuracy
    expected = 100 * expit(0.8318 * logit(here) - 0.4736)
    cells = row(shown, "one ")
    assert float(cells[-2]) == pytest.approx(expected, abs=0.00501)
    assert float(cells[-1]) == pytest.approx(100 * there - expected, abs=0.00501)
    assert cells[-1][0] in "+-"
    # three members and the other network; the ensemble is none of them
    assert "through 4 single models" in shown
    assert "three, member_2 " in shown


def test_no_baseline_is_claimed_for_other_images(tmp_path, capsys):
    shown = shown_by(results_of(tmp_path, "cifar10_jpeg", "cifar10_1_v6"), capsys)
    assert "no line is published for these sets, so there is no effective robustness" in shown
    assert "baseline" not in shown


def test_a_model_alone_is_not_compared(digits, capsys):
    shown = shown_by(f"{digits}/other.npz", capsys)
    assert shown.startswith("no means over pairs: there are fewer than 2 single models\n")
    assert "no refit: a line with intervals needs at least 3 models, got 1" in shown
    assert "no triples: a triple needs at least 3 models, got 1" in shown


# --- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("places", "told"),
    [
        (
            "pair.npz results",
            "give either results or predictions (.npz): they are compared in",
        ),
        ("pair.npz pair.npz", "pair.npz is given 2 times: give it once"),
        (
            "none.npz",
            "there are no predictions none.npz: `ensembles evaluate --predictions` writes",
        ),
        ("nowhere", "there is no result nowhere: `ensembles evaluate` writes them"),
        ("pair/options.json", "options.json is no result"),
        ("bad.npz", "bad.npz: the file cannot be read"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(places, told, digits, monkeypatch, capsys):
    monkeypatch.chdir(digits)
    Path("bad.npz").write_text("no predictions")
    assert ensembles(f"robustness {places}") == 2
    shown = capsys.readouterr().err
    assert shown.startswith("ensembles robustness: error: ")
    assert told in shown


def test_evaluate_looks_for_the_file_of_predictions_before_it_computes(tmp_path, capsys):
    (tmp_path / "kept.npz").write_text("precious")
    line = f"evaluate --model nothing --data digits --out {tmp_path}/results --predictions"
    for name, told in (
        ("kept.npz", "kept.npz exists, and is not overwritten"),
        ("p.json", "p.json: predictions are an .npz file, such as predictions.npz"),
    ):
        assert ensembles(f"{line} {tmp_path}/{name}") == 2
        assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept.npz"]


def test_predictions_that_can_have_no_folder_are_told_before_anything_is_evaluated(
    digits, tmp_path, capsys
):
    (tmp_path / "taken").write_text("precious")
    line = f"evaluate --model {digits}/other --data digits --device cpu --out {tmp_path}/results"
    assert ensembles(f"{line} --predictions {tmp_path}/taken/p.npz") == 2
    assert "taken cannot be used as a folder" in capsys.readouterr().err
    assert (tmp_path / "taken").read_text() == "precious"
    assert [*tmp_path.rglob("*.json")] == []
