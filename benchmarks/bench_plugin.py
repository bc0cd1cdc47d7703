"""What the plugin costs a run that does not use it; the goal is under 20 ms more."""

import os
import subprocess
import sys


def test_bench_collection_of_an_empty_file_with_and_without_the_plugin(
    side_by_side, benchmark, tmp_path
):
    (tmp_path / "test_empty.py").touch()
    alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    pytest = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]

    def collected(*options: str) -> None:
        run = subprocess.run(
            [*pytest, *options], cwd=tmp_path, env=alone, capture_output=True, check=False
        )
        assert run.returncode == 5, run.stdout  # no tests collected

    with_plugin, without = side_by_side(
        lambda: collected("-p", "ensembles.plugin"),
        collected,
        rounds=15,
        what="--collect-only with the plugin against without",
    )
    benchmark.extra_info["milliseconds_more"] = 1000 * (with_plugin - without)
