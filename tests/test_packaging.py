"""What a user gets: the wheel, in a clean environment, in a directory that holds no repository."""

import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import ensembles

ROOT = Path(__file__).parents[1]
ZOO = """
from torch import nn

def apart():
    return [nn.Linear(4, 2) for _ in range(3)]

def repeated():
    return [nn.Linear(4, 2)] * 3
"""


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built without a download."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def clean_pytest(wheel, tmp_path_factory):
    """The `pytest` of a new environment that has the wheel, and torch and pytest from ours.

    Our site-packages are on its path, and their .pth files, which hold the editable install of
    this checkout, are not read.
    """
    home = tmp_path_factory.mktemp("environment")
    python = home / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip())
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True, capture_output=True)
    ours = {str(Path(module.__file__).parents[1]) for module in (pytest, __import__("torch"))}
    (site / "torch_and_pytest.pth").write_text("\n".join(sorted(ours)))
    script = home / "bin" / "pytest"  # what pip writes for pytest's entry point
    script.write_text(f"#!{python}\nimport sys, pytest\nsys.exit(pytest.console_main())\n")
    script.chmod(0o755)
    return script


def gated(clean_pytest: Path, folder: Path, factory: str) -> subprocess.CompletedProcess[str]:
    (folder / "zoo.py").write_text(ZOO)
    gate = ["--pyargs", "ensembles.suite", f"--ensembles-subject=zoo:{factory}", "-k", "sharing"]
    command = [str(clean_pytest), "-p", "no:randomly", "-p", "no:hypothesispytest", *gate]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_wheel_holds_the_package_its_types_and_nothing_else(wheel):
    about = f"pytest_ensembles-{ensembles.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        entry_point = opened.read(f"{about}/entry_points.txt").decode()
    package = (path for path in (ROOT / "ensembles").rglob("*") if path.is_file())
    sources = {str(p.relative_to(ROOT)) for p in package if p.suffix != ".pyc"}
    assert {name for name in names if not name.startswith(about)} == sources
    assert {"ensembles/py.typed", f"{about}/licenses/LICENSE"} <= names
    assert entry_point == (
        "[console_scripts]\nensembles = ensembles.experiments.command_line:main\n\n"
        "[pytest11]\nensembles = ensembles.plugin\n"
    )


def test_the_installed_gate_passes_a_healthy_subject(clean_pytest, tmp_path):
    run = gated(clean_pytest, tmp_path, "apart")
    assert run.returncode == pytest.ExitCode.OK, run.stdout + run.stderr
    assert "  sharing   held   3 members, 6 parameters and buffers" in run.stdout


def test_the_installed_gate_fails_a_broken_subject(clean_pytest, tmp_path):
    run = gated(clean_pytest, tmp_path, "repeated")
    assert run.returncode == pytest.ExitCode.TESTS_FAILED, run.stdout + run.stderr
    assert "\nmembers 0, 1, 2 are claimed independent, but share parameters\n" in run.stdout


def test_the_clean_environment_imports_the_wheel_and_not_the_checkout(clean_pytest, tmp_path):
    script = "import ensembles, torch; print(ensembles.__file__)"
    command = [str(clean_pytest.with_name("python")), "-c", script]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    home = clean_pytest.parents[1]
    assert Path(run.stdout.strip()).is_relative_to(home)


def test_pytest_finds_the_plugin_by_its_entry_point():
    (found,) = entry_points(group="pytest11", name="ensembles")
    assert found.value == "ensembles.plugin"


def test_the_checks_need_only_torch_and_pytest():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [requirement.partition(">")[0] for requirement in project["dependencies"]]
    assert names == ["torch", "pytest"]


def test_continuous_integration_runs_exactly_the_test_command_of_the_readme_first():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    first, *others = [number for number, line in enumerate(lines) if "pytest" in line]
    # What comes after it may not hide that it failed.
    command, joined, end = lines[first].rpartition(" &&")
    assert (joined, end) == (" &&", "")
    assert command.endswith("pytest -n 2")
    assert command in (ROOT / "README.md").read_text().splitlines()
    assert len(others) == 1


def test_it_runs_what_is_computed_channels_last_with_the_kernels_of_avx2_too():
    command = (ROOT / ".ci" / "run").read_text().replace("\\\n ", "").splitlines()[-1]
    setting, _, rest = command.partition(" ")
    assert setting == "ONEDNN_MAX_CPU_ISA=AVX2"
    tests = [part for part in rest.split() if part.startswith("tests/")]
    assert "tests/models" in tests
    assert all((ROOT / path).exists() for path in tests)


def test_the_readme_has_the_command_of_the_main_job():
    command = (
        'python3 -m venv .venv && .venv/bin/pip install -q -e ".[test]" '
        "&& .venv/bin/pytest -k sharing"
    )
    assert command in (ROOT / "README.md").read_text().splitlines()


def test_the_whole_project_collects_under_every_strictness():
    command = [sys.executable, "-m", "pytest", "--strict", "--collect-only", "-q"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


USER = """
from typing import assert_type

import torch
from torch import nn

from ensembles import (
    Partition,
    Result,
    Results,
    Subject,
    check_ensemble,
    measure_ownership_map,
    parametrize_with_checks,
    split_axis,
)
from ensembles.checks.ownership.measurement import OwnershipMap


def members() -> list[nn.Module]:
    return [nn.Linear(4, 2) for _ in range(3)]


subject = Subject(
    make=members,
    batch=lambda: torch.ones(3, 4),
    outputs=split_axis(1),
    claims={"ownership": {"*": Partition(times=2)}},
    expected_failures={"ownership": "the head is one"},
)
results = check_ensemble(subject, seed=3)
assert_type(results, Results)
assert_type(results[0], Result)
assert_type(results["sharing"], Result)
assert_type(results[:2], tuple[Result, ...])
assert_type([result.status for result in results], list[str])
assert_type(measure_ownership_map(members(), torch.ones(3, 4), outputs=split_axis(1)), OwnershipMap)


@parametrize_with_checks([subject, members])
def test_claims(subject: Subject, check: object) -> None:
    pass
"""


def types_of(clean_pytest: Path, folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    (folder / "user.py").write_text(text)
    python = str(clean_pytest.parent / "python")
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", python, "user.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_strict_type_checkers_see_the_types_of_the_wheel(clean_pytest, tmp_path):
    run = types_of(clean_pytest, tmp_path, USER)
    assert run.returncode == 0, run.stdout + run.stderr


def test_wrong_use_is_a_type_error(clean_pytest, tmp_path):
    wrong = USER + "measure_ownership_map(members(), torch.ones(3, 4), output=split_axis(1))\n"
    run = types_of(clean_pytest, tmp_path, wrong)
    assert run.returncode == 1
    assert 'Unexpected keyword argument "output"' in run.stdout
