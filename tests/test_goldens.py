"""Goldens are all in use: a test that is deleted takes its golden with it."""

import ast
from pathlib import Path

TESTS = Path(__file__).parent
MATS = TESTS / "test_mats"


def literals() -> set[str]:
    """Every text that stands in a test, whole."""
    return {
        node.value
        for path in TESTS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def test_every_golden_is_named_in_a_test():
    goldens = {path.relative_to(MATS).as_posix() for path in MATS.rglob("*") if path.is_file()}
    assert goldens, "no goldens were found where they are kept"
    assert sorted(goldens - literals()) == []
