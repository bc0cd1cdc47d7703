"""`docs/results.md` holds the numbers of the files in `docs/results/`, and these hold together."""

import importlib.util
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def results():
    spec = importlib.util.spec_from_file_location("results_of_docs", DOCS / "results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_the_page_are_those_of_the_files(results):
    text = results.PAGE.read_text("utf-8")
    assert results.with_tables(text) == text


def test_a_number_that_was_typed_is_seen(results):
    text = results.PAGE.read_text("utf-8")
    [cell] = re.findall(r"ResNet-20 \| 8\.27 \| (\d\.\d\d)", text)
    changed = text.replace(f"ResNet-20 | 8.27 | {cell}", "ResNet-20 | 8.27 | 1.23")
    assert results.with_tables(changed) == text != changed


def test_every_picture_of_the_page_is_there(results):
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", results.PAGE.read_text("utf-8"))
    assert pictures == [f"results/{study}.png" for study in results.STUDIES]
    assert all((DOCS / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_every_result_is_of_what_it_is_called_and_has_its_training(results):
    for study, chosen in results.STUDIES.items():
        for name, found in results.read_study(study).items():
            for result in found:
                trained, options = results.TRAINED[name], result.model.options["training"]
                assert result.model.options["network"]["kind"] == trained.kind
                assert options["seed"] == result.seed
                assert options["objective"]["name"] in name or name in ("wide",)
                assert options["epochs"] == chosen.options["epochs"]
                table = results.RESULTS / study / f"{name}-seed{result.seed}.csv"
                assert len(table.read_text().splitlines()) == 1 + options["epochs"]


def test_the_mean_loss_with_rescaled_rates_trains_the_members_of_the_sum(results):
    """What diary 11/03 asks, on real images: equal in every count and every bit of the loss."""
    studied = results.read_study("digits")
    assert [result.seed for result in studied["ensemble_mean_like_sum"]] == [0, 1, 2]
    for rescaled, summed in zip(
        studied["ensemble_mean_like_sum"], studied["ensemble_sum"], strict=True
    ):
        assert rescaled.seed == summed.seed
        assert rescaled.evaluations == summed.evaluations


def test_published_errors_are_in_the_intervals_of_official_pixels_and_below_those_of_jpeg(results):
    official, same, every = results.read_result(results.RESULTS / "pretrained.json").evaluations
    assert (official.data.n, same.data.n, every.data.n) == (846, 846, 10_000)
    for name, weights in results.PRETRAINED.items():
        published = 1 - weights.test_error / 100
        low, high = official.members[name].interval
        assert low <= published <= high
        assert all(data.members[name].interval[1] < published for data in (same, every))
