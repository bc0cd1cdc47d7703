"""`CONTRIBUTING.md` lists every edit that a new promise takes: they are carried out in a copy."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
LEFT_OUT = shutil.ignore_patterns(".*", "*.pyc", "__pycache__", "results", "baselines", "dist")

OWN = """
import pytest
import torch
from torch import nn


def weight(size):
    return nn.Embedding.from_pretrained(torch.tensor([[size]]), freeze=False)


def test_holds(weight_magnitude):
    weight_magnitude.assert_bounded(weight(0.5))


def test_breaks(weight_magnitude):
    with pytest.raises(AssertionError, match="weights are claimed to be at most 1, but some are"):
        weight_magnitude.assert_bounded(weight(2.5))
"""
MODELS = """
import torch
from ensembles import Subject
from torch import nn


def build(claim=1.0):
    return Subject(make=lambda: nn.Linear(4, 2), claims={"magnitude": claim})


def misclaimed():
    return build("small")
"""
FAULT = """
from ensembles.faults.catalogue import FAULTS, kill_matrix

matrix = kill_matrix([FAULTS["exploding-start"]])
assert matrix.missed == matrix.false_alarms == (), str(matrix)
assert matrix.explained_by("magnitude") == ("exploding-start",)
"""


def blocks() -> list[tuple[str, str, str]]:
    """Every edit of the page: what to do, the file, and the text."""
    found = re.findall(r"```python\n# (file|edit|append): (\S+)\n(.*?)```", TEXT, re.DOTALL)
    rows = re.findall(r"<!-- row: (\S+), (.*?) -->\n(.*?)```", TEXT, re.DOTALL)
    return [*found, *(("row", file, f"{head}\n{row}") for file, head, row in rows)]


def carry_out(copy: Path) -> None:
    """Makes the edits of the page."""
    for kind, name, text in blocks():
        file = copy / name
        if kind == "file":
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
        elif kind == "append":
            file.write_text(file.read_text() + text)
        elif kind == "edit":  # at the end of the table
            before, end, after = file.read_text().partition("\n)\n\nPROMISES")
            assert end
            file.write_text(f"{before}\n{text.rstrip()}{end}{after}")
        else:
            head, _, row = text.partition("\n")
            before, _, after = file.read_text("utf-8").partition(head)
            table, gap, rest = after.partition("\n\n")
            file.write_text(f"{before}{head}{table}\n{row.rstrip()}{gap}{rest}", "utf-8")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contributed") / "project"
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
    carry_out(folder)
    (folder / "tests" / "test_own.py").write_text(OWN)
    (folder / "own_models.py").write_text(MODELS)
    return folder


def run(copy: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def pytest_in(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    quick = ["-q", "-p", "no:randomly", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return run(copy, "-m", "pytest", *quick, *arguments)


def test_a_new_promise_is_a_folder_a_row_a_fault_and_a_page(copy):
    kinds = [(kind, name) for kind, name, _ in blocks()]
    folder = "ensembles/checks/magnitude/"
    files = {name.removeprefix(folder) for kind, name in kinds if kind == "file"}
    stages = ("claim", "measurement", "judgement", "fixture")
    assert files == {"__init__.py", *(f"{stage}.py" for stage in stages)}
    assert [kind for kind, _ in kinds if kind != "file"] == ["edit", "append", "row"]

    derived = ["tests/test_public_names.py", "tests/test_readme.py", "-k", "registry"]
    pytest_in(copy, *derived, "--force-regen")
    assert "weight_magnitude" in (copy / "README.md").read_text("utf-8")
    held = ["tests/test_architecture.py", "tests/test_public_names.py", "tests/test_own.py"]
    done = pytest_in(copy, *held, folder, "tests/test_readme.py", "-k", "not example")
    assert done.returncode == 0, done.stdout


def test_its_fault_is_caught_and_its_twin_is_not(copy):
    done = run(copy, "-c", FAULT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("factory", "status"), [("build", 0), ("misclaimed", 4)])
def test_the_gate_knows_it(copy, factory, status):
    gate = ["--pyargs", "ensembles.suite", f"--ensembles-subject=own_models:{factory}"]
    done = pytest_in(copy, *gate, "--ensembles-require=magnitude", "-m", "")
    assert done.returncode == status, done.stdout + done.stderr
    told = "magnitude cannot be claimed to be 'small'. It can be: a number."
    assert (told in done.stdout + done.stderr) is bool(status)
