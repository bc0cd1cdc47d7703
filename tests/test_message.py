import re

import pytest

from ensembles import message, present_run
from ensembles.findings import Count, Finding, Findings

TOGETHER = "one tensor in members 0, 1"


def findings(count: int, **texts: str) -> Findings:
    texts = {"meaning": "It trains one network.", "remedy": "Build each anew.", **texts}
    items = (
        Finding(
            kind="shared", place=f"layer{i}.weight", found="one tensor in members 0, 1", **texts
        )
        for i in range(count)
    )
    return Findings(claim="A claim.", items=tuple(items), affected=(Count(9, "parameter", of=9),))


@pytest.fixture
def told_outside(monkeypatch):
    """The lines of a message, as a script would see them."""

    def told(count: int, **texts: str) -> list[str]:
        monkeypatch.delenv("PYTEST_CURRENT_TEST")
        return message.rendered(findings(count, **texts)).splitlines()

    return told


@pytest.fixture
def in_test(monkeypatch):
    def enter(name: str) -> None:
        monkeypatch.setenv("PYTEST_CURRENT_TEST", f"{name} (call)")

    return enter


def test_a_table_that_fits_is_whole(told_outside):
    lines = told_outside(8)
    assert lines[0] == "A claim."
    assert lines[2:11] == [
        *(f"  layer{i}.weight   one tensor in members 0, 1" for i in range(8)),
        "  (9 of 9 parameters)",
    ]


def test_a_long_table_is_capped_and_says_so(told_outside):
    lines = told_outside(9)
    assert lines[2:] == [
        *(f"  layer{i}.weight   one tensor in members 0, 1" for i in range(8)),
        "  ... 1 more (9 of 9 parameters)",
        "",
        "  It trains one network.",
        "  Build each anew.",
    ]


def test_long_lines_of_the_prose_are_wrapped(told_outside):
    assert told_outside(1, remedy=f"Mend {'word ' * 19}end.")[5:] == [
        "  It trains one network.",
        f"  Mend {'word ' * 17}".rstrip(),
        "  word word end.",
    ]


def test_the_replay_is_the_last_line_and_quotes_what_a_shell_would_read(in_test):
    in_test("tests/test_model.py::test_members[vgg 11]")
    last = message.rendered(findings(1)).splitlines()[-1]
    assert last == "  replay: pytest 'tests/test_model.py::test_members[vgg 11]' " + (
        "--ensembles-seed=1729"
    )


def test_the_replay_has_the_present_seed(in_test):
    in_test("test_model.py::test_members")
    token = present_run.seed.set(5)
    assert message.replay() == "replay: pytest test_model.py::test_members --ensembles-seed=5"
    present_run.seed.reset(token)


@pytest.mark.parametrize("file", ["", "../lib/python3.11/site-packages/ensembles/suite.py"])
def test_the_gate_is_replayed_by_its_import_name_and_with_its_subject(in_test, file):
    in_test(f"{file}::test_claim[zoo-sharing]")
    token = present_run.subject.set("zoo:my models")
    assert message.replay() == (
        "replay: pytest --pyargs 'ensembles.suite::test_claim[zoo-sharing]' "
        "--ensembles-subject='zoo:my models' --ensembles-seed=1729"
    )
    present_run.subject.reset(token)


def test_another_tests_replay_names_no_subject(in_test):
    in_test("test_model.py::test_members")
    token = present_run.subject.set("zoo:models")
    assert "--ensembles-subject" not in message.replay()
    present_run.subject.reset(token)


def test_there_is_no_replay_outside_a_test(told_outside):
    assert told_outside(1)[-1] == "  Build each anew."
    assert message.replay() == ""


def test_columns_without_rows_are_no_lines():
    assert message.aligned([]) == []


def test_rows_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=re.escape("zip() argument 2 is shorter than argument 1")):
        message.aligned([("a",), ("b", "c")])


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (6, "0, 1, 2, 3, 4, 5"),
        (7, "0, 1, 2, 3, 4, 5 and 1 more"),
    ],
)
def test_names_are_capped_after_six(count, text):
    assert message.listed([str(i) for i in range(count)]) == text


@pytest.mark.parametrize(("length", "stacked"), [(33, False), (34, True)])
def test_what_is_too_wide_to_stand_side_by_side_is_stacked(monkeypatch, length, stacked):
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    wide = Finding(kind="differs", place="a", expected="x" * length, found="y" * 44)
    new = Finding(kind="differs", place="b", found="z")
    rows = message.rendered(Findings(claim="A claim.", items=(wide, new))).splitlines()[2:]
    assert rows == (
        [f"  a   expected {wide.expected}", f"      found    {wide.found}", "  b   z"]
        if stacked
        else [f"  a   expected {wide.expected}   found {wide.found}", f"  b{' ' * 48}z"]
    )
