"""`pytest benchmarks --benchmark-compare` from a fresh clone, and with runs to compare with."""

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ONE = """
def test_bench_one(benchmark):
    assert benchmark.pedantic(sum, args=([1, 2],), rounds=3) == 3
"""

TOLD = "*nothing to compare with: stored the first run of this kind of machine*"


@pytest.fixture
def clone(pytester, monkeypatch):
    """A tree with our conftest of the benchmarks and our settings, and one small benchmark."""
    # The runs within are measured, whatever runs this one: pytest-benchmark looks here for xdist.
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("benchmarks/conftest.py", "pyproject.toml"):
        target = pytester.path / name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, target)
    (pytester.path / "benchmarks/bench_one.py").write_text(ONE)

    def run(*options):
        return pytester.runpytest_inprocess(
            "benchmarks", "-p", "no:randomly", "-p", "no:cacheprovider", *options
        )

    run.path = pytester.path
    return run


def saved(clone):
    return sorted((clone.path / ".benchmarks").rglob("*.json"))


def test_the_first_run_is_stored_and_says_so_and_the_second_is_compared_with_it(clone):
    first = clone("--benchmark-compare")
    first.assert_outcomes(passed=1)
    assert first.ret == 0
    first.stdout.fnmatch_lines(["*benchmarks: what is compared*", "machine: *", TOLD])
    assert len(saved(clone)) == 1
    first.stdout.no_fnmatch_line("*(NOW)*")

    second = clone("--benchmark-compare")
    second.assert_outcomes(passed=1)
    assert second.ret == 0
    second.stdout.fnmatch_lines_random(["*test_bench_one (0001*", "*test_bench_one (NOW)*"])
    second.stdout.no_fnmatch_line(TOLD)
    # The same machine and torch: pytest-benchmark has no difference to warn of.
    assert "machine_info is different" not in second.stdout.str() + second.stderr.str()
    assert len(saved(clone)) == 1


def test_a_baseline_in_the_repository_is_compared_with_and_named(clone):
    clone("--benchmark-autosave")
    [run] = saved(clone)
    kind = run.relative_to(clone.path / ".benchmarks").parts[0]
    baselines = clone.path / "benchmarks/baselines"
    baselines.mkdir()
    run.rename(baselines / f"{kind}.json")

    compared = clone("--benchmark-compare")
    assert compared.ret == 0
    compared.stdout.fnmatch_lines([f"compared with benchmarks/baselines/{kind}.json"])
    compared.stdout.fnmatch_lines(["*test_bench_one (NOW)*"])
    compared.stdout.no_fnmatch_line(TOLD)
    assert saved(clone) == []


def test_a_baseline_of_another_kind_of_machine_is_not_compared_with(clone):
    baselines = clone.path / "benchmarks/baselines"
    baselines.mkdir()
    (baselines / "Linux-of-another-kind.json").write_text("{}")
    result = clone("--benchmark-compare")
    assert result.ret == 0
    result.stdout.fnmatch_lines([TOLD])


def test_a_bound_on_the_comparison_is_said_not_to_be_looked_at_in_the_first_run(clone):
    result = clone("--benchmark-compare", "--benchmark-compare-fail=mean:5%")
    assert result.ret == 0
    result.stdout.fnmatch_lines([TOLD, "--benchmark-compare-fail was not looked at"])


@pytest.mark.parametrize("options", [["--collect-only"], ["-k", "nothing"]], ids=["collect", "k"])
def test_where_nothing_is_measured_nothing_is_stored_and_that_is_said(clone, options):
    result = clone("--benchmark-compare", *options)
    assert result.ret == (
        0 if options == ["--collect-only"] else pytest.ExitCode.NO_TESTS_COLLECTED
    )
    result.stdout.fnmatch_lines(
        ["nothing to compare with, and nothing stored: no benchmark was measured"]
    )
    assert saved(clone) == []


def test_without_options_nothing_is_stored(clone):
    result = clone()
    assert result.ret == 0
    result.stdout.no_fnmatch_line("*what is compared*")
    assert saved(clone) == []
