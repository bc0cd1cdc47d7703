"""One seed and no freedom: every switch that decides whether two runs give the same bits."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from ensembles.handling.state import generators_kept, seed_generators

__all__ = ["later", "seeded"]

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_REPEATS = (":4096:8", ":16:8")
"""The two values with which cuBLAS repeats its sums: docs.nvidia.com/cuda/cublas, "Results
reproducibility"."""

CLOCKS = ("time", "monotonic", "perf_counter", "process_time", "thread_time")

A_DAY_AND_A_SECOND = 86_401
"""Neither the hour, the minute nor the second of the clock is the same."""


@contextmanager
def seeded(seed: int, *, algorithms: bool = True) -> Iterator[None]:
    """Seeds python, numpy, torch and CUDA, and lets kernels no freedom; all is restored on exit.

    Args:
        seed: The seed of every global generator.
        algorithms: Whether to set `torch.use_deterministic_algorithms`, the cuDNN flags and the
            cuBLAS workspace too; without it they stay as the user has them.

    Example:
        >>> before = torch.get_rng_state()
        >>> with seeded(1):
        ...     first = torch.rand(3), torch.are_deterministic_algorithms_enabled()
        >>> with seeded(1):
        ...     second = torch.rand(3)
        >>> torch.equal(first[0], second), first[1]
        (True, True)
        >>> torch.equal(torch.get_rng_state(), before), torch.are_deterministic_algorithms_enabled()
        (True, False)
    """
    with ExitStack() as stack:
        stack.enter_context(generators_kept())
        if algorithms:
            stack.enter_context(_repeatable_kernels())
        seed_generators(seed)
        yield


@contextmanager
def later() -> Iterator[None]:
    """Inside, every clock of `time` is a day ahead: a seed from one of them is another.

    Of `datetime`, whose types cannot be replaced where they were imported, the clock stays.

    Example:
        >>> import time
        >>> now, day = time.time(), time.strftime("%d")
        >>> with later():
        ...     time.time() - now > 86_400, time.strftime("%d") == day
        (True, False)
    """

    def moved(clock: Callable[[], Any], by: int) -> Callable[[], Any]:
        return lambda: clock() + by

    def told(function: Callable[..., Any], now: Callable[[], Any], given: int) -> Any:
        """A function whose last argument, after those given, is the present time by default."""
        return lambda *args: function(*args, *(() if len(args) > given else (now(),)))

    with ExitStack() as stack:
        ahead = {clock: moved(getattr(time, clock), A_DAY_AND_A_SECOND) for clock in CLOCKS}
        for clock in CLOCKS:
            name = f"{clock}_ns"
            ahead[name] = moved(getattr(time, name), A_DAY_AND_A_SECOND * 10**9)
        now = ahead["time"]
        ahead |= {name: told(getattr(time, name), now, 0) for name in ("localtime", "gmtime")}
        ahead["ctime"] = told(time.ctime, now, 0)
        ahead["asctime"] = told(time.asctime, ahead["localtime"], 0)
        ahead["strftime"] = told(time.strftime, ahead["localtime"], 1)
        for name, function in ahead.items():
            stack.enter_context(mock.patch.object(time, name, function))
        yield


@contextmanager
def _repeatable_kernels() -> Iterator[None]:
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark
    workspace = os.environ.get(CUBLAS)
    try:
        torch.use_deterministic_algorithms(True)
        cudnn.deterministic, cudnn.benchmark = True, False
        if workspace not in CUBLAS_REPEATS:
            os.environ[CUBLAS] = CUBLAS_REPEATS[0]
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        cudnn.deterministic, cudnn.benchmark = flags
        if workspace is None:
            os.environ.pop(CUBLAS, None)
        else:
            os.environ[CUBLAS] = workspace
