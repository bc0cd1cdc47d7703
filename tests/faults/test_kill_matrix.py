"""Every fault is caught by the checks named for it, and no check fires on a healthy twin."""

import dataclasses
import runpy
from pathlib import Path

import pytest

from ensembles.faults import catalogue
from ensembles.faults.catalogue import FAULTS, KillMatrix, kill_matrix
from ensembles.faults.members import same_module
from ensembles.registry import PROMISES

MATRIX = Path(__file__).parents[1] / "test_mats" / "kill_matrix.txt"


def recorded() -> dict[str, list[str]]:
    """Every row of the recorded matrix: fault to its cells, one a check, and what the twin did."""
    lines = MATRIX.read_text("utf-8").splitlines()
    rows = [line.split() for line in lines[1 : lines.index("")] if line.startswith(" ")]
    return {name: cells for name, *cells in rows}


def row_of(matrix: KillMatrix, name: str) -> list[str]:
    (row,) = (line.split()[1:] for line in str(matrix).splitlines() if line.split()[:1] == [name])
    return row


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught_as_recorded_and_no_check_fires_on_its_twin(name, request):
    """A test for each, so that workers share the matrix."""
    matrix = kill_matrix([FAULTS[name]])
    assert matrix.missed == ()
    assert matrix.false_alarms == ()
    twins = [run for run in matrix.runs if not run.broken]
    assert len(twins) == len(FAULTS[name].architectures)
    assert all("held" in run.statuses.values() for run in twins)
    if not request.config.getoption("force_regen", False):
        assert row_of(matrix, name) == recorded()[name]


def test_the_recorded_matrix_has_every_fault_and_check(request):
    """`--force-regen` runs the whole matrix, and records it."""
    if request.config.getoption("force_regen", False):
        MATRIX.write_text(str(kill_matrix()), "utf-8")
    rows, text = recorded(), MATRIX.read_text("utf-8")
    assert list(rows) == list(FAULTS)
    assert text.splitlines()[0].split() == [*PROMISES, "twin"]
    assert "\nmissed: none\nfalse alarms: none\n" in text
    for check, line in zip(PROMISES, text.splitlines()[-len(PROMISES) :], strict=True):
        place = list(PROMISES).index(check)
        alone = [name for name, cells in rows.items() if _alone(cells, place)]
        assert line == f"{check} alone catches: {', '.join(alone)}", "recorded by hand?"
        assert alone, f"no fault is caught by {check} alone"


def _alone(cells: list[str], place: int) -> bool:
    """Whether this check caught the fault in every architecture, and no other check in any."""
    caught, _, of = cells[place].rstrip("*!").partition("/")
    others = [cell for i, cell in enumerate(cells[: len(PROMISES)]) if i != place]
    return bool(of) and caught == of and all(c in ".-" or c.startswith("0/") for c in others)


def test_no_fault_without_a_check():
    for fault in FAULTS.values():
        assert fault.caught_by, fault.name
        assert set(fault.caught_by) <= set(PROMISES), fault.name


def test_a_check_that_could_not_look_says_why_and_catches_nothing():
    copied = FAULTS["optimizer-of-a-copy"]
    matrix = kill_matrix([copied], architectures=["mlp"])
    (broken,) = (run for run in matrix.runs if run.broken)
    assert broken.statuses["coupling"] == "error"
    assert broken.messages["coupling"].startswith("there is no training step on member")
    hoped = dataclasses.replace(copied, caught_by=("coupling",))
    assert kill_matrix([hoped], architectures=["mlp"]).missed == (
        "optimizer-of-a-copy (mlp): coupling",
    )


def test_a_fault_that_nothing_catches_is_missed():
    harmless = dataclasses.replace(
        same_module, build=lambda *args: same_module.build(*args[:2], False)
    )
    matrix = kill_matrix([harmless], architectures=["mlp"])
    assert matrix.missed == tuple(
        f"same-module (mlp): {check}" for check in ("sharing", "ownership", "coupling")
    )
    assert "0/1*" in str(matrix)


def test_a_twin_that_is_not_healthy_is_a_false_alarm():
    ill = dataclasses.replace(same_module, build=lambda *args: same_module.build(*args[:2], True))
    matrix = kill_matrix([ill], architectures=["mlp"])
    assert matrix.false_alarms == tuple(
        f"same-module (mlp): {check}" for check in ("sharing", "ownership", "coupling")
    )
    assert "fires in 1/1" in str(matrix)


def test_the_kill_matrix_is_printed_from_the_command_line(monkeypatch, capsys):
    matrix = kill_matrix([same_module], architectures=["mlp"])
    monkeypatch.setattr(catalogue, "kill_matrix", lambda: matrix)
    runpy.run_path(str(Path(catalogue.__file__).with_name("__main__.py")), run_name="__main__")
    assert capsys.readouterr().out == f"{matrix}\n"
