"""Verify that ensembles and weight-sharing networks are what they claim to be.

Public names only. `ensembles.registry` says where each is defined. They are resolved on first
use: the pytest plugin imports this package in every run on a machine, and must not import torch.
Type checkers read the stub beside this file.
"""

from importlib import import_module
from typing import Any

from ensembles.registry import PUBLIC

__all__ = sorted(PUBLIC)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'ensembles' has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
