"""The main job and the whole test run, as subprocesses on at most two cores.

`pytest -k sharing` on the default subject, for which the goal is under 30 s, and all tests, for
which it is under 5 min. Neither is asserted: wall times inform.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


CORES = 2


def run(benchmark, *options: str) -> str:
    def pytest_run() -> str:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
        return done.stdout

    pinned = hasattr(os, "sched_setaffinity")  # Linux
    available = os.sched_getaffinity(0) if pinned else set()
    if pinned:
        os.sched_setaffinity(0, sorted(available)[:CORES])  # children inherit it
    try:
        said: str = benchmark.pedantic(pytest_run, rounds=1, iterations=1)
    finally:
        if pinned:
            os.sched_setaffinity(0, available)
    benchmark.extra_info["cores"] = min(CORES, len(available)) if pinned else os.cpu_count()
    return said


def test_bench_the_main_job(benchmark):
    assert "what the models claim" in run(benchmark, "-k", "sharing")


def test_bench_all_tests(benchmark):
    assert " passed" in run(benchmark, "-n", str(CORES))
