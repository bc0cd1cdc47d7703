"""Result files: they say what was measured, are never overwritten, and refused when malformed."""

import errno
import json
import os
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata

import pytest
import torch

from ensembles.experiments.data.sources import load_images
from ensembles.experiments.evaluation.counts import clopper_pearson
from ensembles.experiments.evaluation.results import (
    Result,
    WeightFile,
    read_result,
    read_results,
    write_result,
)
from ensembles.experiments.evaluation.scores import Evaluation, Scores, evaluate
from ensembles.experiments.training.networks import NetworkOptions, build_network

DIGEST = "ab" * 32


@pytest.fixture(scope="module")
def evaluations():
    network = build_network(NetworkOptions(kind="ensemble", members=2, base_channels=1))
    digits = load_images("digits", "test")
    return [evaluate(network, digits), evaluate(network, digits.select(slice(0, 500)))]


@pytest.fixture
def result(evaluations):
    return Result.of(
        evaluations[:1],
        model="two ResNets",
        options={"depth": 18},
        weights=[WeightFile(file="a.th", sha256=DIGEST)],
        seed=3,
        command=["ensembles", "evaluate", "--seed", "3"],
    )


def changed(result, folder, place, value=None, *, missing=False):
    """A file of the result with one thing changed, or one key removed."""
    raw = json.loads(result.model_dump_json())
    *parents, last = place
    part = raw
    for key in parents:
        part = part[key]
    if missing:
        del part[last]
    else:
        part[last] = value
    path = folder / "changed.json"
    path.write_text(json.dumps(raw))
    return path


def test_a_result_reads_back_as_it_was_written(result, tmp_path):
    path = write_result(result, tmp_path)
    assert read_result(path) == result
    assert read_results([tmp_path, path]) == [result, result]


def test_a_result_says_what_was_measured_on_what_with_what_and_when(result, evaluations):
    raw = json.loads(result.model_dump_json())
    scores, images = evaluations[0].members["member_0"], evaluations[0].images
    (evaluated,) = raw["evaluations"]
    assert evaluated["members"]["member_0"] == {
        "correct": int((scores.predictions == images.labels).sum()),
        "n": 797,
        "interval": list(clopper_pearson(scores.correct, 797)),
        "nll": scores.nll,
    }
    assert evaluated["data"] == {
        "name": "digits",
        "version": images.version,
        "split": "test",
        "sha256": images.sha256,
        "n": 797,
        "counts": {str(digit): count for digit, count in enumerate(images.counts())},
    }
    assert evaluated["reduced"] == ["member_0", "member_1"]
    assert list(evaluated["reductions"]) == ["arithmetic", "geometric", "vote"]
    assert raw["command"] == ["ensembles", "evaluate", "--seed", "3"]
    assert raw["seed"] == 3
    assert raw["packages"]["torch"] == metadata.version("torch")
    assert raw["packages"]["pytest-ensembles"] == metadata.version("pytest-ensembles")
    assert raw["model"] == {
        "name": "two ResNets",
        "options": {"depth": 18},
        "weights": [{"file": "a.th", "sha256": DIGEST}],
    }
    made = datetime.fromisoformat(raw["time"])
    assert made.utcoffset() == UTC.utcoffset(None)
    assert abs((datetime.now(UTC) - made).total_seconds()) < 600


def test_a_result_names_no_machine_and_no_folder(result):
    text = result.model_dump_json()
    for private in (os.uname().nodename, os.getcwd(), os.path.expanduser("~")):
        assert f'"{private}' not in text


def test_the_file_name_tells_model_data_and_time(result, tmp_path):
    time = result.time.strftime("%Y%m%dT%H%M%S.%fZ")
    assert write_result(result, tmp_path / "new").name == f"two_ResNets-digits-{time}.json"


def test_many_sets_are_counted_in_the_file_name_and_not_cut_off(evaluations):
    part = evaluations[0].images
    several = [
        replace(evaluations[0], images=replace(part, name=f"digits_rotation_{level}"))
        for level in range(1, 6)
    ]
    name = Result.of(several, model="one").identifier
    assert name.startswith("one-digits_rotation_1_to_4_sets-")
    name = Result.of(several[:3], model="one").identifier
    assert name.startswith("one-digits_rotation_1_to_digits_rotation_2_to_digits_rotation_3-")


def test_a_result_is_never_overwritten(result, tmp_path):
    path = write_result(result, tmp_path / "one.json")
    before = path.read_bytes()
    for place in (path, tmp_path / "one.json"):
        with pytest.raises(FileExistsError, match=r"one\.json exists, and is not overwritten"):
            write_result(result, place)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["one.json"]


def test_a_disk_that_fills_up_leaves_nothing_half_written(result, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device while writing .*result") as told:
        write_result(result, tmp_path / "result.json")
    assert told.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


SCORE = ("evaluations", 0, "members", "member_0")


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        ((*SCORE, "correct"), 798, "evaluations.0.members.member_0: correct is 798, of only n ="),
        ((*SCORE, "correct"), -1, "evaluations.0.members.member_0.correct: Input should be gr"),
        ((*SCORE, "correct"), "12", "member_0.correct: Input should be a valid integer, got '12'"),
        ((*SCORE, "correct"), True, "member_0.correct: Input should be a valid integer, got True"),
        ((*SCORE, "correct"), 1.5, "member_0.correct: Input should be a valid integer, got 1.5"),
        ((*SCORE, "interval"), [0.98, 0.99], "the interval 0.98 to 0.99 does not hold"),
        (("evaluations", 0, "data", "n"), 800, "evaluations.0.data: counts add up to 797, and n"),
        (("evaluations", 0, "data", "sha256"), "x", "evaluations.0.data.sha256: String should"),
        (("evaluations", 0, "members"), {}, "evaluations.0.members: Dictionary should have at"),
        (("evaluations",), [], "evaluations: List should have at least 1 item"),
        (("evaluations", 0, "reduced"), ["x"], "reduced names 'x', which is no member"),
        (("seed",), "3", "seed: Input should be a valid integer, got '3'"),
        (("time",), "2026-11-23T12:00:00", "time: Input should have timezone info"),
        (("model", "name"), "", "model.name: String should have at least 1 character"),
        (("extra",), 1, "extra: Extra inputs are not permitted"),
        (("schema_version",), 2, "schema_version is 2, and this release"),
        (("schema_version",), "1", "schema_version is '1', and this release"),
        (("schema_version",), True, "schema_version is True, and this release"),
    ],
    ids=lambda value: None if isinstance(value, (int, list, dict)) else str(value)[:40],
)
def test_a_malformed_result_is_refused_with_its_place(result, tmp_path, place, value, told):
    path = changed(result, tmp_path, place, value)
    with pytest.raises(ValueError) as error:
        read_result(path)
    assert str(error.value).startswith(f"{path}")
    assert told in str(error.value)


def keys_of(value, place=()):
    """The place of every key whose absence must be noticed; names of members are free."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*place, key)
            yield from keys_of(inner, (*place, key))
    if isinstance(value, list):
        for number, inner in enumerate(value):
            yield from keys_of(inner, (*place, number))


def test_every_missing_key_is_noticed(result, tmp_path):
    raw = json.loads(result.model_dump_json())
    free = {"packages", "options", "counts", "members", "reductions"}
    places = [p for p in keys_of(raw) if not (len(p) > 1 and p[-2] in free)]
    assert len(places) > 30
    for place in places:
        path = changed(result, tmp_path, place, missing=True)
        with pytest.raises(ValueError, match="Field required") as error:
            read_result(path)
        assert f"\n  {'.'.join(map(str, place))}: Field required" in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is no JSON text"),
        ("[]", "the whole: Input should be an object"),
        ("null", "the whole: Input should be an object"),
        ('{"seed": 1, "seed": 2}', "the key 'seed' is there twice"),
        ('{"seed": NaN}', "NaN is no number in JSON"),
        ("\ud800", "is no JSON text"),
    ],
)
def test_what_is_no_result_is_refused(text, told, tmp_path):
    path = tmp_path / "text.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError) as error:
        read_result(path)
    assert told in str(error.value)
    assert str(path) in str(error.value)


def test_a_truncated_result_is_refused(result, tmp_path):
    path = write_result(result, tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is no JSON text"):
        read_result(path)


def test_an_empty_folder_of_results_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"has no results: there is no \.json file in it"):
        read_results([tmp_path])
    with pytest.raises(FileNotFoundError):
        read_results([tmp_path / "nowhere.json"])


def test_one_set_is_evaluated_once_and_in_every_sample(evaluations):
    with pytest.raises(ValueError, match="digits is evaluated more than once"):
        Result.of([evaluations[0], evaluations[0]], model="twice")
    images = evaluations[0].images
    few = Scores(torch.zeros(3, 10), torch.zeros(3, dtype=torch.int64), images.labels[:3])
    with pytest.raises(ValueError, match=r"members\.few\.n is 3, and the set has 797 images"):
        Result.of([Evaluation(images, {"few": few}, {}, ("few",))], model="dropped")


def test_the_likelihood_of_a_vote_without_the_label_is_no_number(evaluations):
    vote = evaluations[0].reductions["vote"]
    assert vote.nll == float("inf")
    result = Result.of(evaluations[:1], model="two")
    assert result.evaluations[0].reductions["vote"].nll is None
    assert result.evaluations[0].reductions["vote"].correct == vote.correct
