"""Axes on which accuracies are spaced by their logit, and labelled in per cent."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator
from scipy.special import expit, logit

__all__ = ["limits", "logit_axes", "with_diagonal"]


def limits(accuracies: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis that holds all accuracies whose logit is finite, with a margin."""
    finite = [a for a in accuracies if 0 < a < 1] or [0.5]
    low, high = logit(min(finite)), logit(max(finite))
    margin = max(0.05 * (high - low), 0.1)
    return float(expit(low - margin)), float(expit(high + margin))


def with_diagonal(x: tuple[float, float], y: tuple[float, float]) -> tuple[float, float]:
    """Extends the y axis where y = x would not cross at least a quarter of the width."""
    left, right, low, high = logit([*x, *y])
    quarter = (right - left) / 4
    return float(expit(min(low, right - quarter))), float(expit(max(high, left + quarter)))


TICKS = (
    (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999),
    (0.05, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.95, 0.98, 0.995),
    (0.02, 0.25, 0.75, 0.85, 0.93, 0.97),
    (0.35, 0.45, 0.55, 0.65, 0.92, 0.94, 0.96, 0.985),
    tuple(percent / 100 for percent in range(2, 99)),
    tuple(tenths / 1000 for tenths in range(2, 999)),
)
"""Accuracies that an axis may label, the preferred ones first."""


def _ticks(low: float, high: float) -> list[float]:
    """Round accuracies to label, between the two ends."""
    steepness = [p * (1 - p) for p in (low, high)]  # one over the derivative of the logit
    if max(steepness) < 3 * min(steepness) and (high - 0.5) * (low - 0.5) > 0:
        # The axis is nearly linear: steps of one size are what the eye expects.
        even = MaxNLocator(nbins=7, steps=[1, 2, 5, 10]).tick_values(100 * low, 100 * high)
        return [percent / 100 for percent in even if low <= percent / 100 <= high]
    apart = (logit(high) - logit(low)) / 12
    chosen: list[float] = []
    for rank in TICKS:
        for tick in rank:
            if low <= tick <= high and all(abs(logit(tick) - logit(t)) > apart for t in chosen):
                chosen.append(tick)
        if len(chosen) >= 5:
            break
    return sorted(chosen)


def logit_axes(axes: Axes, x: tuple[float, float], y: tuple[float, float]) -> None:
    """Makes both axes logit axes with these ends, labelled in per cent, with a pale grid."""
    axes.set_xscale("logit")
    axes.set_yscale("logit")
    axes.set_xlim(*x)
    axes.set_ylim(*y)
    for axis, ends in ((axes.xaxis, x), (axes.yaxis, y)):
        ticks = _ticks(*ends)
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(FixedFormatter([f"{100 * tick:.4g}" for tick in ticks]))
        axis.set_minor_locator(NullLocator())
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
