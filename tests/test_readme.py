"""The README's examples run as they stand there."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

import ensembles.suite  # noqa: F401  (before pytester forgets what inner runs import)
from ensembles import Subject
from ensembles.registry import PROMISES

pytest.importorskip("torchvision")
pytest.importorskip("sklearn.datasets")

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
EXAMPLES = [
    block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "def test_" in block
]


@pytest.fixture(autouse=True)
def without_hypothesis(monkeypatch):
    """Its plugin loads the whole of hypothesis anew in every inner run."""
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:hypothesispytest -p no:randomly")


def test_the_first_example_fails_with_the_message_beside_it(pytester):
    pytester.makepyfile(test_model=EXAMPLES[0])
    result = pytester.runpytest()
    assert result.parseoutcomes() == {"failed": 1}
    said = " ".join(" ".join(line.removeprefix("E") for line in result.outlines).split())
    shown = re.findall(r"```\n(members 0.*?)```", README, re.DOTALL)[0]
    for line in filter(None, shown.splitlines()):
        assert " ".join(line.split()) in said


@pytest.mark.parametrize(("number", "passing"), [(1, 3), (2, 5)])
def test_the_other_examples_pass(pytester, number, passing):
    pytester.makepyfile(EXAMPLES[number])
    outcomes = pytester.runpytest().parseoutcomes()
    assert outcomes["passed"] == passing
    assert outcomes.keys() <= {"passed", "skipped"}


def test_every_example_is_looked_at():
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize(
    ("head", "names"),
    [
        ("| field | what it is |", [field.name for field in fields(Subject)]),
        ("| check | claim |", list(PROMISES)),
    ],
    ids=["fields", "claims"],
)
def test_every_field_of_a_subject_and_every_claim_has_a_row(head, names):
    table = README.partition(head)[2].partition("\n\n")[0].splitlines()[2:]
    found = [name for row in table for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(found) == sorted(names)


HEAD = "| fixture | what it promises | a fault that it catches |\n|---|---|---|\n"


def test_the_table_of_promises_is_that_of_the_registry(request):
    """`--force-regen` writes it anew, as it does goldens."""
    rows = [f"| `{p.fixture}` | {p.sentence} | {p.catches} |\n" for p in PROMISES.values()]
    file = Path(__file__).parents[1] / "README.md"
    before, head, after = file.read_text("utf-8").partition(HEAD)
    assert head
    _, gap, rest = after.partition("\n\n")
    if request.config.getoption("force_regen", False):
        file.write_text(before + head + "".join(rows).rstrip() + gap + rest, "utf-8")
    assert file.read_text("utf-8").partition(HEAD)[2].partition("\n\n")[0] + "\n" == "".join(rows)
