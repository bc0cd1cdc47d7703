"""Ratios are measured side by side: machines differ and drift, ratios of one run much less.

`pytest benchmarks --benchmark-compare` compares with the last run that was saved on this kind of
machine: below ``.benchmarks`` (local), else below ``benchmarks/baselines`` (in the repository).
Where there is neither, it stores this run as the first, and says so.
"""

import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import pytest
from _pytest.terminal import TerminalReporter  # public from pytest 8.4 on

LOCAL = ".benchmarks"
COMMITTED = Path(__file__).parent / "baselines"


def machine() -> dict[str, str]:
    """What a wall time depends on and what stays the same from run to run."""
    import cpuinfo
    import torch

    return {
        "system": platform.system(),
        "cpu": cpuinfo.get_cpu_info().get("brand_raw") or platform.machine(),
        "cores": str(os.cpu_count()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__,
    }


class Baseline:
    """The run to compare with; where there is none, this one becomes the first."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        # Another torch is what one wants to compare, so it is no part of the kind.
        parts = [value for name, value in machine().items() if name != "torch"]
        self.kind = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(parts))
        option = config.option
        if option.benchmark_storage in (LOCAL, f"file://./{LOCAL}"):
            option.benchmark_storage = f"file://{config.rootpath / LOCAL / self.kind}"
        self.told: list[str] = []
        self.first = False
        if option.benchmark_compare is True and option.benchmark_storage.startswith("file://"):
            self._find(Path(option.benchmark_storage.removeprefix("file://")))

    def _find(self, storage: Path) -> None:
        option = self.config.option
        if any(storage.glob("*/[0-9][0-9][0-9][0-9]_*.json")):
            return
        committed = COMMITTED / f"{self.kind}.json"
        if committed.exists():
            option.benchmark_compare = str(committed)
            self.told.append(f"compared with {committed.relative_to(self.config.rootpath)}")
            return
        self.first = True
        option.benchmark_compare = []
        option.benchmark_autosave = option.benchmark_autosave or "first"
        if option.benchmark_compare_fail:
            option.benchmark_compare_fail = []
            self.told.append("--benchmark-compare-fail was not looked at")

    def report(self, reporter: TerminalReporter) -> None:
        if self.first:
            storage = self.config._benchmarksession.storage
            stored = storage.query("[0-9][0-9][0-9][0-9]_")
            self.told.insert(
                0,
                f"nothing to compare with: stored the first run of this kind of machine, "
                f"{os.path.relpath(stored[-1], self.config.rootpath)}; "
                "the next --benchmark-compare compares with it"
                if stored
                else "nothing to compare with, and nothing stored: no benchmark was measured",
            )
        if self.told:
            reporter.section("benchmarks: what is compared")
            reporter.write_line(f"machine: {self.kind}")
            for line in self.told:
                reporter.write_line(line)


def pytest_configure(config: pytest.Config) -> None:
    # Before pytest-benchmark's own, which reads the options and looks for runs.
    option = config.option
    used = option.benchmark_compare or option.benchmark_save or option.benchmark_autosave
    if used and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Reported(Baseline(config)), "benchmarks-baseline")


class Reported:
    """Hooks of a run that stores or compares."""

    def __init__(self, baseline: Baseline) -> None:
        self.baseline = baseline

    def pytest_benchmark_update_machine_info(self, config, machine_info):
        # pytest-benchmark warns where this differs, and its own has the clock rate of the moment.
        machine_info.clear()
        machine_info.update(machine())

    @pytest.hookimpl(tryfirst=True, wrapper=True)
    def pytest_sessionfinish(self, session):
        # Where nothing was measured there is nothing to store, of which pytest-benchmark warns.
        benchmarks = session.config._benchmarksession
        if self.baseline.first and not benchmarks.benchmarks:
            benchmarks.autosave = None
        return (yield)

    def pytest_terminal_summary(self, terminalreporter):
        self.baseline.report(terminalreporter)


@pytest.fixture
def side_by_side(benchmark, capsys):
    """Runs two functions in turn, and stores and prints how much longer the first takes.

    The ratio is that of the medians; both medians go to `benchmark.extra_info`, in seconds.
    """

    def measure(
        first: Callable[[], object], second: Callable[[], object], *, rounds: int, what: str
    ) -> tuple[float, float]:
        times: tuple[list[float], list[float]] = ([], [])
        first(), second()  # what is made once is not measured

        def both() -> None:
            for function, taken in zip((first, second), times, strict=True):
                start = perf_counter()
                function()
                taken.append(perf_counter() - start)

        benchmark.pedantic(both, rounds=rounds, iterations=1)
        ours, reference = (median(taken) for taken in times)
        benchmark.extra_info |= {
            "seconds": ours,
            "reference_seconds": reference,
            "ratio": ours / reference,
        }
        with capsys.disabled():
            print(
                f"\n  {what}: {ours:.3f} s against {reference:.3f} s, ratio {ours / reference:.2f}"
            )
        return ours, reference

    return measure
