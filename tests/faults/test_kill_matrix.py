"""Every fault is caught by the checks named for it, and no check fires on a healthy twin."""

import dataclasses
import runpy
from pathlib import Path

from ensembles.faults import catalogue
from ensembles.faults.catalogue import FAULTS, kill_matrix
from ensembles.faults.members import same_module
from ensembles.registry import PROMISES


def test_every_fault_is_caught_and_no_check_fires_on_a_healthy_twin(golden):
    """One test, so that workers that share the tests do not each run the whole matrix."""
    matrix = kill_matrix()
    print(f"\n{matrix}")
    assert matrix.missed == ()
    assert matrix.false_alarms == ()
    twins = [run for run in matrix.runs if not run.broken]
    assert len(twins) == sum(len(fault.architectures) for fault in FAULTS.values())
    assert all("held" in run.statuses.values() for run in twins)
    assert [check for check in PROMISES if not matrix.explained_by(check)] == []
    golden(str(matrix), "kill_matrix.txt")


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
