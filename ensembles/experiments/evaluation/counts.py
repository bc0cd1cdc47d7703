"""Accuracy as counts: correct of n samples, with its exact interval.

A count keeps what a rounded figure loses: how precise it is, and on how many samples it was
measured.
"""

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

import numpy as np
from scipy import stats

__all__ = ["Counts", "as_counts", "clopper_pearson"]


@dataclass(frozen=True)
class Counts:
    """How many of how many samples were right: an accuracy that has not lost its precision.

    Example:
        >>> counts = Counts(1800, 2000)
        >>> counts.accuracy
        0.9
        >>> print(counts)
        1800/2000 = 90.00 % (95 % interval 88.60 to 91.28 %)

    Args:
        correct: Samples classified correctly.
        n: Samples in the set, at least 1.

    Raises:
        ValueError: If ``n`` is below 1, or ``correct`` is not between 0 and ``n``.
        TypeError: If one of them is not an integer.
    """

    correct: int
    n: int

    def __post_init__(self) -> None:
        for name, value in (("correct", self.correct), ("n", self.n)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            object.__setattr__(self, name, int(value))
        if self.n < 1:
            raise ValueError(f"n must be at least 1 sample, got {self.n}")
        if not 0 <= self.correct <= self.n:
            raise ValueError(f"correct must be between 0 and n = {self.n}, got {self.correct}")

    @property
    def accuracy(self) -> float:
        """Share of correct samples, in [0, 1]."""
        return self.correct / self.n

    def interval(self, *, confidence: float = 0.95) -> tuple[float, float]:
        """Clopper-Pearson interval of the accuracy: see `clopper_pearson`."""
        return clopper_pearson(self.correct, self.n, confidence=confidence)

    def __str__(self) -> str:
        low, high = self.interval()
        return (
            (
                f"{self.correct}/{self.n} = {self.accuracy:.2%} "
                f"(95 % interval {100 * low:.2f} to {high:.2%})"
            )
            .replace("%", " %")
            .replace("95  %", "95 %")
        )


def clopper_pearson(correct: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Exact (Clopper-Pearson) interval of an accuracy.

    With no correct sample the lower end is exactly 0, with no wrong one the upper end is exactly
    1: on a logit scale those ends are infinite, and `ensembles.experiments.plots` draws them to
    the edge of the axes.

    Example:
        >>> [round(100 * end, 1) for end in clopper_pearson(1800, 2000)]
        [88.6, 91.3]
        >>> clopper_pearson(10, 10)[1]
        1.0

    Args:
        correct: Samples classified correctly.
        n: Samples in the set.
        confidence: Probability that such intervals cover the true accuracy, at least; in (0, 1).

    Returns:
        Lower and upper end, fractions.

    Raises:
        ValueError: If the counts are impossible, or ``confidence`` is not in (0, 1).

    Source:
        C. Clopper and E. Pearson (1934); used for CIFAR-10.1 by Recht et al. 2018,
        arXiv:1806.00451.
    """
    counts = Counts(correct, n)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    interval = stats.binomtest(counts.correct, counts.n).proportion_ci(confidence, method="exact")
    return float(interval.low), float(interval.high)


FLOAT32_ULP = 2.0**-23  # largest relative distance between neighbouring float32 numbers


def as_counts(accuracy: float | str, n: int) -> Counts:
    """Turns an accuracy into counts, and refuses one that no ``n`` samples can give.

    An accuracy times ``n`` is an integer. A figure that is none was measured on another number
    of samples, often because the loader dropped the last batch.

    A string counts as exact to half a unit of its last decimal; every number may besides be off by
    one unit of float32, the precision in which most training code computes accuracies.

    Example:
        >>> as_counts(0.9711, 10_000)
        Counts(correct=9711, n=10000)
        >>> as_counts("93.06890869 %", 9984)
        Counts(correct=9292, n=9984)
        >>> as_counts("93.06890869 %", 10_000)
        Traceback (most recent call last):
        ...
        ValueError: 93.06890869 % is no count of 10000: 9306/10000 is 93.06 %, 9307/10000 is
        93.07 %. It fits 9292/9984, 9386/10085, 9198/9883, ... A loader that drops its last batch
        leaves 9984 of 10000 at batch sizes 32, 64, 128, 256.

    Args:
        accuracy: A fraction in [0, 1], or a string: a fraction, or percent with a ``%`` sign.
        n: Samples in the set.

    Returns:
        The counts.

    Raises:
        ValueError: If the accuracy is out of range, is no count of ``n`` (the message names the
            numbers of samples near ``n`` that fit), or has too few decimals to tell which count.
    """
    n = Counts(0, n).n
    text, value, slack = _read_accuracy(accuracy)
    # A count just at the end of what rounds to this figure is in: rounding may not push it out.
    low, high = np.ceil((value - slack) * n - 1e-9), np.floor((value + slack) * n + 1e-9)
    low, high = max(int(low), 0), min(int(high), n)
    if low == high:
        return Counts(low, n)
    if low < high:
        raise ValueError(
            f"{text} fits {low} to {high} correct of {n}: give more decimals, or the count"
        )
    below = int(value * n)
    around = [f"{k}/{n} is {100 * k / n:.10g} %" for k in (below, below + 1) if k <= n]
    raise ValueError(f"{text} is no count of {n}: {', '.join(around)}. {_fitting(value, slack, n)}")


def _read_accuracy(accuracy: float | str) -> tuple[str, float, float]:
    """How it was written, its value as a fraction, and how far the true fraction may be away."""
    text = str(accuracy).strip()
    try:
        written = Decimal(text.removesuffix("%").strip())
    except InvalidOperation:
        raise ValueError(f"accuracy must be a number, got {accuracy!r}") from None
    scale = 100 if text.endswith("%") else 1
    value = float(written) / scale
    if not 0 <= value <= 1:
        hint = ": write percent as a string, '93.1 %'" if 1 < value <= 100 else ""
        raise ValueError(f"accuracy must be between 0 and 1 (100 %), got {text}{hint}")
    exponent = written.as_tuple().exponent
    assert isinstance(exponent, int)  # infinities and NaN are out of range
    # A float shows no zeros at its end: 0.9 may be 0.90000, so its decimals say nothing.
    half_unit = 10.0**exponent / 2 / scale if isinstance(accuracy, str) else 0.0
    return text, value, max(half_unit, FLOAT32_ULP * value)


def _fitting(value: float, slack: float, n: int) -> str:
    """Sentence that names the numbers of samples closest to n that the accuracy fits."""
    sizes = np.arange(1, 2 * n + 1)
    correct = np.rint(value * sizes)
    fits = sizes[np.abs(correct / sizes - value) <= slack]
    if not len(fits):
        return f"It fits no number of samples up to {2 * n}."
    nearest = sorted((int(size) for size in fits), key=lambda size: abs(size - n))
    listed = ", ".join(f"{round(value * size)}/{size}" for size in nearest[:3])
    sentence = f"It fits {listed}{', ...' if len(nearest) > 3 else '.'}"
    dropped = {
        batch: n - n % batch
        for batch in (2**power for power in range(3, 14))
        if n - n % batch in nearest
    }
    if not dropped:
        return sentence
    kept = max(dropped.values())
    batches = ", ".join(str(batch) for batch, left in dropped.items() if left == kept)
    return (
        f"{sentence} A loader that drops its last batch leaves {kept} of {n} at batch sizes "
        f"{batches}."
    )
