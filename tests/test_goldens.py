"""Goldens are all in use, and hold what every CPU computes."""

import ast
from pathlib import Path

import pytest

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


FIGURES = """
from pathlib import Path

import pytest
import torch

TENTHS = torch.linspace(0.1, 6.4, 64).view(8, 8)

@pytest.fixture
def golden(request):
    def check(figures):
        path, text = Path(request.node.name), str([f"{y:.1e}" for y in figures.tolist()])
        if not path.exists():
            path.write_text(text)
        assert text == path.read_text()
    return check

def test_roundings(golden):
    golden((TENTHS - TENTHS.mean(1, keepdim=True)).sum(1))

def test_numbers(golden):
    golden(TENTHS.square().sum(1))

def test_exact_numbers(golden):
    halves = TENTHS.mul(10).round() / 2
    golden(halves.square().sum(1) - halves[:, 0])

def test_without_a_golden():
    pass
"""


def test_a_golden_that_holds_a_rounding_is_found_by_rounding_otherwise(
    pytester: pytest.Pytester,
):
    pytester.makepyfile(FIGURES)
    pytester.syspathinsert(TESTS.parent)
    pytester.runpytest().assert_outcomes(passed=4)
    result = pytester.runpytest("-p", "tests.rounded_otherwise")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["FAILED *::test_roundings*"])
