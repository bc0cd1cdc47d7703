"""The folder of a run: whose it is, and tables that survive kills."""

import errno
import json
import os
import re

import pytest

from ensembles.experiments.training.runs import Run, RunFolder, Table, write_whole

THIS = {"format": 1, "training": {"lr": 0.1, "milestones": (0.3, 0.6)}, "data": {"name": "digits"}}


def test_a_folder_is_made_and_found_again(tmp_path):
    path = tmp_path / "deep" / "run"
    RunFolder(path, THIS).claim()
    assert json.loads((path / "options.json").read_text()) == json.loads(json.dumps(THIS))
    RunFolder(path, THIS).claim()
    assert [found.name for found in path.iterdir()] == ["options.json"]


def test_another_run_is_told_what_differs(tmp_path):
    RunFolder(tmp_path, THIS).claim()
    other = {"format": 1, "training": {"lr": 0.1, "milestones": [0.3], "seed": 4}}
    with pytest.raises(ValueError, match="belongs to another run") as caught:
        RunFolder(tmp_path, other).claim()
    assert str(caught.value) == (
        f"{tmp_path} belongs to another run, which differs in\n"
        "  training.milestones: [0.3, 0.6] there, [0.3] here\n"
        "  training.seed: nothing there, 4 here\n"
        '  data: {"name": "digits"} there, nothing here\n'
        "Choose another folder, or the options of that run to go on with it."
    )


def test_long_differences_are_cut_and_say_so(tmp_path):
    RunFolder(tmp_path, {f"o{n}": 1 for n in range(14)}).claim()
    with pytest.raises(ValueError, match=r"\.\.\. 4 more"):
        RunFolder(tmp_path, {f"o{n}": 2 for n in range(14)}).claim()


def test_what_a_killed_process_left_does_not_hinder_the_next(tmp_path):
    (tmp_path / ".options.json.77.tmp").write_text("{")
    (tmp_path / ".lock").touch()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".step_00000002.ckpt.77.tmp").write_text("")
    folder = RunFolder(tmp_path, THIS)
    with pytest.raises(ValueError, match=r"holds .checkpoints. and no options\.json"):
        folder.claim()
    folder.tidy()
    (tmp_path / "checkpoints").rmdir()
    folder.claim()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "options.json"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"format": 1, "tra', "is damaged: it is no JSON text: Unterminated string"),
        (bytes(range(128, 256)), "is damaged: it is no JSON text: 'utf-8' codec"),
        (b"", "is damaged: it is no JSON text"),
        (b"[]", "is damaged: it is a list, and no description of a run"),
    ],
    ids=["cut", "bytes", "empty", "list"],
)
def test_a_damaged_description_is_named_and_left_as_it_is(tmp_path, content, told):
    options = tmp_path / "options.json"
    options.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{options} {told}")) as caught:
        RunFolder(tmp_path, THIS).claim()
    assert str(caught.value).endswith(". Bring it back, or choose another folder.")
    assert options.read_bytes() == content


def test_a_file_in_the_place_of_a_folder_is_told(tmp_path):
    (tmp_path / "file").write_text("a user's")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        folder = RunFolder(place, THIS)
        told = f"{place} cannot be used as a folder ("
        with pytest.raises(OSError, match=re.escape(told)) as caught, folder.locked():
            pass
        assert str(caught.value).endswith("): choose another one")
    assert (tmp_path / "file").read_text() == "a user's"


def test_a_folder_that_may_not_be_written_to_is_told(tmp_path, monkeypatch):
    def refused(lock, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / ".lock"))

    monkeypatch.setattr("ensembles.experiments.training.runs.FileLock.acquire", refused)
    told = f"{tmp_path} cannot be used as a folder (Permission denied): choose another one"
    with pytest.raises(PermissionError, match=re.escape(told)), RunFolder(tmp_path, THIS).locked():
        pass


def test_a_lock_ends_with_who_has_it(tmp_path):
    folder = RunFolder(tmp_path, THIS)
    with folder.locked(), pytest.raises(RuntimeError, match="another process"), folder.locked():
        pass
    with folder.locked():
        pass


def test_numbers_are_read_back_to_the_bit(tmp_path):
    table = Table(tmp_path / "t.csv", ["step", "loss", "asked"])
    values = [0.1 + 0.2, 1e-300, float("inf"), -0.0, 2**53 + 1]
    for step, value in enumerate(values):
        table.append({"step": step, "loss": value, "asked": "parent subnet_0_0"})
    assert not table.path.exists()
    table.flush()
    found = table.read()
    assert [row["loss"] for row in found] == values
    assert str(found[3]["loss"]) == "-0.0"
    assert found[0]["asked"] == "parent subnet_0_0"


def test_what_was_not_measured_is_not_in_a_row(tmp_path):
    table = Table(tmp_path / "t.csv", ["step", "a", "b"])
    table.append({"step": 1, "b": 0.5})
    table.flush()
    assert table.read() == [{"step": 1, "b": 0.5}]
    with pytest.raises(ValueError, match=r"t\.csv has no column 'c'"):
        table.append({"step": 2, "c": 1})


@pytest.mark.parametrize("lost", range(26))
def test_a_table_is_cut_back_to_any_step_whatever_of_its_end_was_lost(tmp_path, lost):
    path = tmp_path / "t.csv"
    text = "loss,step\n0.5,1\n0.25,2\n0.125,10\n"
    path.write_text(text[: len(text) - lost])
    Table(path).cut(2)
    whole = [line for line in text[: len(text) - lost].splitlines(True) if line.endswith("\n")]
    expected = "".join(whole[:3])
    assert (path.read_text() if path.exists() else "") == expected


def test_a_table_goes_on_after_a_cut(tmp_path):
    path = tmp_path / "t.csv"
    for steps in ((1, 2, 3), (2, 3)):
        table = Table(path, ["step"])
        table.cut(1)
        for step in steps:
            table.append({"step": step})
        table.flush()
    assert path.read_text() == "step\n1\n2\n3\n"


def test_a_table_on_a_full_disk_says_what_to_do(tmp_path, monkeypatch):
    table = Table(tmp_path / "t.csv", ["step"])
    table.append({"step": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device while writing .*t\.csv"):
        table.flush()


def test_a_file_is_not_overwritten_even_by_who_comes_second(tmp_path, monkeypatch):
    path = tmp_path / "a"
    link = os.link

    def another_was_faster(source, target):
        path.write_bytes(b"theirs")
        link(source, target)

    monkeypatch.setattr(os, "link", another_was_faster)
    with pytest.raises(FileExistsError, match="a exists, and is not overwritten"):
        write_whole(path, b"ours", replace=False)
    assert path.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_system_without_hard_links_will_do(tmp_path, monkeypatch):
    def unsupported(source, target):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", unsupported)
    write_whole(tmp_path / "a", b"ours", replace=False)
    assert (tmp_path / "a").read_bytes() == b"ours"
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "a", b"again", replace=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    with pytest.raises(OSError, match=r"No such file or directory while writing .*nowhere"):
        write_whole(tmp_path / "nowhere" / "a", b"", replace=True)


def test_a_run_without_tables_has_no_rows(tmp_path):
    run = Run(tmp_path, None, 0, False)
    assert (run.epochs(), run.steps_taken()) == ([], [])
