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

TENTHS = torch.linspace(0.1, 4.9, 49)

@pytest.fixture
def golden(request):
    def check(figure):
        path = Path(request.node.name)
        if not path.exists():
            path.write_text(f"{figure:.1e}")
        assert f"{figure:.1e}" == path.read_text()
    return check

def test_a_rounding(golden):
    golden(float((TENTHS - TENTHS.mean()).sum()))

def test_a_number(golden):
    golden(float(TENTHS @ TENTHS))

def test_an_exact_number(golden):
    halves = torch.arange(9) / 2
    golden(float(halves @ halves - 51))

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
    result.stdout.fnmatch_lines(["FAILED *::test_a_rounding*"])
