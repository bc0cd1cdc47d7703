"""The main job, `pytest -k sharing` on the default subject; the goal is under 30 s."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_bench_the_main_job(benchmark):
    def main_job() -> str:
        command = [sys.executable, "-m", "pytest", "-k", "sharing", "-p", "no:cacheprovider"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout
        return run.stdout

    said = benchmark.pedantic(main_job, rounds=1, iterations=1)
    assert "what the models claim" in said
