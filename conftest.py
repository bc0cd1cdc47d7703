"""What every test and doctest of the project starts from."""

import os

import pytest

# Small networks on shared cores: two threads that wait for each other cost up to twenty times
# what one costs. Set before torch is imported, so that subprocesses have it too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["pytester"]  # runs the plugin in a pytest of its own, as a user would see it


@pytest.fixture(autouse=True)
def doctest_names(doctest_namespace: dict[str, object]) -> None:
    """Examples in docstrings take `import torch` and `from torch import nn` as read."""
    import torch

    doctest_namespace["torch"] = torch
    doctest_namespace["nn"] = torch.nn


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Tests draw the same numbers in any order, and when one is selected alone."""
    import torch

    torch.manual_seed(0)
