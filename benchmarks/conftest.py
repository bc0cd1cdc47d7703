"""Ratios are measured side by side: machines differ and drift, ratios of one run much less."""

from collections.abc import Callable
from statistics import median
from time import perf_counter

import pytest


@pytest.fixture
def side_by_side(benchmark, capsys):
    """Runs two functions in turn, and stores and prints how much longer the first takes.

    The ratio is that of the medians; both medians go to `benchmark.extra_info`, in seconds.
    """

    def measure(
        first: Callable[[], object], second: Callable[[], object], *, rounds: int, what: str
    ) -> tuple[float, float]:
        times: tuple[list[float], list[float]] = ([], [])
        first(), second()  # what is made once is not measured

        def both() -> None:
            for function, taken in zip((first, second), times, strict=True):
                start = perf_counter()
                function()
                taken.append(perf_counter() - start)

        benchmark.pedantic(both, rounds=rounds, iterations=1)
        ours, reference = (median(taken) for taken in times)
        benchmark.extra_info |= {
            "seconds": ours,
            "reference_seconds": reference,
            "ratio": ours / reference,
        }
        with capsys.disabled():
            print(
                f"\n  {what}: {ours:.3f} s against {reference:.3f} s, ratio {ours / reference:.2f}"
            )
        return ours, reference

    return measure
