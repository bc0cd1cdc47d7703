"""Every fault is caught by the checks named for it, and no check fires on a healthy twin."""

import dataclasses
import runpy
from pathlib import Path

import pytest

from ensembles.claims import CHECKS
from ensembles.faults import catalogue
from ensembles.faults.catalogue import FAULTS, KillMatrix, kill_matrix
from ensembles.faults.members import same_module


@pytest.fixture(scope="module")
def matrix() -> KillMatrix:
    return kill_matrix()


def test_the_kill_matrix_is_the_recorded_one(matrix, golden):
    print(f"\n{matrix}")
    golden(str(matrix), "kill_matrix.txt")


def test_every_fault_is_caught_by_the_checks_named_for_it(matrix):
    assert matrix.missed == ()


def test_no_check_fires_on_a_healthy_twin(matrix):
    assert matrix.false_alarms == ()
    twins = [run for run in matrix.runs if not run.broken]
    assert len(twins) == sum(len(fault.architectures) for fault in FAULTS.values())
    assert all("held" in run.statuses.values() for run in twins)


@pytest.mark.parametrize("check", CHECKS)
def test_every_check_has_a_fault_that_it_alone_explains(matrix, check):
    assert matrix.explained_by(check) != ()


def test_no_fault_without_a_check(matrix):
    for fault in FAULTS.values():
        assert fault.caught_by, fault.name
        assert set(fault.caught_by) <= set(CHECKS), fault.name


def test_the_named_checks_break_the_claim_and_do_not_only_fail_to_look(matrix):
    for run in matrix.runs:
        if run.broken:
            for check in FAULTS[run.fault].caught_by:
                assert run.statuses[check] == "broken", f"{run.fault} ({run.architecture}): {check}"


def test_a_check_that_could_not_look_says_why(matrix):
    told = {
        run.fault: run.messages[check]
        for run in matrix.runs
        for check, status in run.statuses.items()
        if status == "error"
    }
    assert set(told) == {"optimizer-of-a-copy", "optimizer-of-another"}
    assert all(text.startswith("there is no training step on member") for text in told.values())


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


def test_the_kill_matrix_is_printed_from_the_command_line(matrix, monkeypatch, capsys):
    monkeypatch.setattr(catalogue, "kill_matrix", lambda: matrix)
    runpy.run_path(str(Path(catalogue.__file__).with_name("__main__.py")), run_name="__main__")
    assert capsys.readouterr().out == f"{matrix}\n"
