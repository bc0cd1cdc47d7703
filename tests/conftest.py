"""What tests share: goldens."""

from collections.abc import Callable
from pathlib import Path

import pytest

MATS = Path(__file__).parent / "test_mats"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Compares a text with tests/test_mats/<name>; `--force-regen` records it anew.

    The name is a literal in the test, so that an unused golden can be found by its name.
    """
    file_regression = request.getfixturevalue("file_regression")

    def check(text: str, name: str) -> None:
        path = MATS / name
        file_regression.check(
            text, encoding="utf-8", extension=path.suffix, fullpath=path.resolve()
        )

    return check
