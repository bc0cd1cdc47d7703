"""docs/thresholds.md has every number that decides something, with its present value."""

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import pytest
import torch

from ensembles.tolerance import KINDS, tolerance_of

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "thresholds.md"
FOLDERS = ("checks", "probes")
"""Of the package: what is looked through for constants, besides the rule of tolerance."""

RULE = ROOT / "ensembles" / "tolerance.py"

FILES = {
    path.stem: path
    for folder in FOLDERS
    for path in sorted((ROOT / "ensembles" / folder).rglob("*.py"))
    if path.stem != "__init__"
}
ROW = re.compile(r"\| `(?P<name>[\w.]+)` \| (?P<value>[^|]+) \| (?P<why>[^|]+) \|")


def constants() -> dict[str, object]:
    """`module.NAME` to value of every constant that is a number, or a tuple of numbers."""
    found = {}
    for stem, path in {**FILES, RULE.stem: RULE}.items():
        module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for place in assigned(ast.parse(path.read_text()).body):
            value = attrgetter(place)(module)
            if is_number(value):
                found[f"{stem}.{place}"] = value
    return found


def assigned(body: list[ast.stmt]) -> Iterator[str]:
    """Names in capitals that are assigned in a module, and in its classes."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from (f"{node.name}.{place}" for place in assigned(node.body))
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            # Several names at once are words that are numbered, and no thresholds.
            yield from (t.id for t in targets if isinstance(t, ast.Name) and t.id.isupper())


def is_number(value: object) -> bool:
    if isinstance(value, tuple):
        return bool(value) and all(map(is_number, value))
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def told(page: str) -> dict[str, object]:
    rows = ROW.findall(page)
    assert len({name for name, *_ in rows}) == len(rows), "a constant stands there twice"
    assert all(why.strip().endswith(".") for *_, why in rows), "a reason is a sentence"
    return {name: ast.literal_eval(value.strip()) for name, value, _ in rows}


def test_every_constant_stands_in_the_table_with_its_value_and_no_other_does():
    assert told(PAGE.read_text("utf-8")) == constants()


def test_modules_are_told_apart_by_their_names():
    paths = [p for f in FOLDERS for p in (ROOT / "ensembles" / f).rglob("[!_]*.py")]
    assert len(FILES) == len(paths)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("| `rows.LOOKED_AT` | 8 |", "| `rows.LOOKED_AT` | 9 |"),
        ("| `rows.LOOKED_AT` | 8 |", "| `rows.LOOKED` | 8 |"),
        ("| `influence.GAINS` | (1.0, 1e-2, 1e2) |", "| `influence.GAINS` | (1.0, 1e-2) |"),
    ],
    ids=["value", "name", "tuple"],
)
def test_a_row_that_is_not_true_would_be_seen(before, after):
    page = PAGE.read_text("utf-8")
    assert before in page
    assert told(page.replace(before, after)) != constants()


def test_the_table_of_tolerances_is_what_the_rule_gives():
    lines = PAGE.read_text("utf-8").splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    head = next(row for row in table if row[:1] == ["kind"])
    rows = [row for row in table if row and row[0] in KINDS]
    assert [row[0] for row in rows] == list(KINDS)
    for kind, _, *cells in rows:
        for name, cell in zip(head[2:], cells, strict=True):
            assert cell == shown(kind, getattr(torch, name)), f"{kind} in {name}"


def shown(kind: str, dtype: torch.dtype) -> str:
    try:
        tolerance = tolerance_of(kind, dtype)
    except ValueError:
        return "refused"
    return f"{tolerance:.1e}" if tolerance else "0"


def bare(source: str) -> Iterator[str]:
    """Comparisons with a number that has no name, and roundings beside the one rule."""
    for node in ast.walk(ast.parse(source)):
        inside = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
        if (
            (
                isinstance(node, ast.Compare)
                and any(isinstance(x, float) and x not in (0.0, 1.0) for x in inside)
            )
            or (
                isinstance(node, ast.keyword)
                and node.arg in ("rtol", "atol", "rel_tol", "abs_tol")
                and any(inside)
            )
            or (isinstance(node, ast.Attribute) and node.attr in ("eps", "resolution"))
        ):
            yield ast.unparse(node)


@pytest.mark.parametrize("stem", FILES)
def test_no_comparison_has_a_number_without_a_name(stem):
    assert list(bare(FILES[stem].read_text())) == []


@pytest.mark.parametrize(
    "source",
    ["x < 1e-3", "abs(a - 1) <= 0.5 * b", "close(a, b, rtol=1e-3)", "k * torch.finfo(d).eps"],
)
def test_a_bare_number_would_be_seen(source):
    assert len(list(bare(source))) == 1
    assert list(bare("x < LIMIT and close(a, b, rtol=NEAR, atol=0) and y > 0.0")) == []
