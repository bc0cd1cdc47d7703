"""Accuracy under distribution shift: the line that models lie on, and the distance from it.

On a logit scale the accuracies of many models, in against out of distribution, lie close to one
line. Effective robustness is the distance of a model from that line, in points. Accuracies are
fractions in [0, 1] throughout; only differences between accuracies are in points (per cent).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.special import expit, logit

from ensembles.experiments.evaluation.counts import Counts, as_counts, clopper_pearson

__all__ = [
    "LINES",
    "Counts",
    "FittedLine",
    "Line",
    "as_counts",
    "baseline",
    "clopper_pearson",
    "effective_robustness",
    "fit_line",
    "published_line",
]


@dataclass(frozen=True)
class Line:
    """A line on logit axes: logit(out) = slope * logit(in) + intercept, natural logarithm.

    Example:
        >>> line = Line(slope=1.0, intercept=0.0)
        >>> line(0.75)
        0.75
        >>> round(line.residual(0.75, 0.8), 6)
        5.0

    Args:
        slope: Slope in logit space.
        intercept: Intercept in logit space.
    """

    slope: float
    intercept: float

    @overload
    def __call__(self, accuracy: float) -> float: ...
    @overload
    def __call__(self, accuracy: ArrayLike) -> NDArray[np.float64]: ...
    def __call__(self, accuracy: ArrayLike) -> float | NDArray[np.float64]:
        """Accuracy out of distribution that the line gives for one in distribution.

        0 and 1 are mapped to 0 and 1, the limits of a rising line.
        """
        on_line: NDArray[np.float64] = expit(
            self.slope * logit(_fractions(accuracy, "accuracy")) + self.intercept
        )
        return float(on_line) if np.ndim(on_line) == 0 else on_line

    @overload
    def residual(self, in_dist: float, out_dist: float) -> float: ...
    @overload
    def residual(self, in_dist: ArrayLike, out_dist: ArrayLike) -> NDArray[np.float64]: ...
    def residual(self, in_dist: ArrayLike, out_dist: ArrayLike) -> float | NDArray[np.float64]:
        """Height above the line in points: 100 (out_dist - line(in_dist))."""
        height: NDArray[np.float64] = 100 * (_fractions(out_dist, "out_dist") - self(in_dist))
        return float(height) if np.ndim(height) == 0 else height


LINES: Mapping[str, Line] = MappingProxyType(
    {
        # Andreassen et al. 2021, arXiv:2106.15831: CIFAR-10 to CIFAR-10.1, ImageNet to ImageNetV2
        "cifar10.1": Line(slope=0.8318, intercept=-0.4736),
        "imagenetv2": Line(slope=0.9225, intercept=-0.4896),
    }
)
"""The published lines on which effective robustness is 0, by shifted set."""


SHIFTS: Mapping[tuple[str, ...], tuple[str, ...]] = MappingProxyType(
    {
        ("cifar10", "cifar10_lossless"): ("cifar10_1_v4", "cifar10_1_v6"),
        ("original",): ("v4", "v6"),  # the names in the file of the published predictions
    }
)
"""From which sets to which CIFAR-10.1's line was published: those with the official pixels."""


def published_line(in_dist: str, shifted: str) -> Line | None:
    """The line that is published for two sets, by their names; None where there is none.

    Example:
        >>> published_line("cifar10", "cifar10_1_v6") == LINES["cifar10.1"]
        True
        >>> published_line("cifar10_jpeg", "cifar10_1_v6"), published_line("cifar10", "digits")
        (None, None)

    Args:
        in_dist: Name of the set in distribution.
        shifted: Name of the shifted set.
    """
    if any(in_dist in inside and shifted in outside for inside, outside in SHIFTS.items()):
        return LINES["cifar10.1"]
    return None


@overload
def baseline(accuracy: float, shift: str = ...) -> float: ...
@overload
def baseline(accuracy: ArrayLike, shift: str = ...) -> NDArray[np.float64]: ...
def baseline(accuracy: ArrayLike, shift: str = "cifar10.1") -> float | NDArray[np.float64]:
    """Accuracy on the shifted set that the published line expects: effective robustness 0.

    Example:
        >>> round(100 * baseline(0.93), 3)
        84.264
        >>> baseline([0.8, 0.9], "imagenetv2").round(5).tolist()
        [0.68767, 0.82308]

    Args:
        accuracy: Accuracy in distribution, fractions; a number or an array.
        shift: ``"cifar10.1"`` (from CIFAR-10) or ``"imagenetv2"`` (from ImageNet).

    Returns:
        Fractions, in the shape of ``accuracy``.

    Raises:
        ValueError: If an accuracy is outside [0, 1], or ``shift`` has no published line.

    Source:
        Andreassen et al. 2021, "The Evolution of Out-of-Distribution Robustness Throughout
        Fine-Tuning", arXiv:2106.15831.
    """
    return _published(shift)(accuracy)


@overload
def effective_robustness(in_dist: float, out_dist: float, shift: str = ...) -> float: ...
@overload
def effective_robustness(
    in_dist: ArrayLike, out_dist: ArrayLike, shift: str = ...
) -> NDArray[np.float64]: ...
def effective_robustness(
    in_dist: ArrayLike, out_dist: ArrayLike, shift: str = "cifar10.1"
) -> float | NDArray[np.float64]:
    """Accuracy beyond the published line, in points.

    Example:
        >>> round(effective_robustness(0.93, 0.85), 3)
        0.736

    Args:
        in_dist: Accuracy in distribution, fractions.
        out_dist: Accuracy on the shifted set, fractions.
        shift: As in `baseline`.

    Returns:
        Points (per cent), in the common shape of both.

    Raises:
        ValueError: As `baseline`.

    Source:
        Taori et al. 2020, arXiv:2007.00644; line of Andreassen et al. 2021, arXiv:2106.15831.
    """
    return _published(shift).residual(in_dist, out_dist)


@dataclass(frozen=True)
class FittedLine(Line):
    """A line fitted through models, with the uncertainty of its two numbers.

    Args:
        slope: Slope in logit space.
        intercept: Intercept in logit space.
        slope_interval: Confidence interval of the slope.
        intercept_interval: Confidence interval of the intercept.
        r_squared: Share of the variance of logit(out) that the line explains.
        n_models: Models fitted. Another set of models gives another line: name it.
        confidence: Of the two intervals, each by itself.
    """

    slope_interval: tuple[float, float]
    intercept_interval: tuple[float, float]
    r_squared: float
    n_models: int
    confidence: float

    def covers(self, line: Line) -> bool:
        """Whether the slope and the intercept of another line are inside both intervals."""
        (low, high), (lower, higher) = self.slope_interval, self.intercept_interval
        return low <= line.slope <= high and lower <= line.intercept <= higher


def fit_line(in_dist: ArrayLike, out_dist: ArrayLike, *, confidence: float = 0.95) -> FittedLine:
    """Fits the line through models by least squares in logit space.

    Every model weighs the same; the intervals are those of ordinary least squares (Student's t
    with two degrees of freedom fewer than models).

    Example:
        >>> from ensembles.experiments.robustness.reference import published_models
        >>> models = published_models()
        >>> line = fit_line(
        ...     [model.cifar10.accuracy for model in models],
        ...     [model.v6.accuracy for model in models],
        ... )
        >>> round(line.slope, 4), round(line.intercept, 4), round(line.r_squared, 4)
        (0.8393, -0.4715, 0.9816)
        >>> line.covers(LINES["cifar10.1"])
        True

    Args:
        in_dist: Accuracy of each model in distribution, (model,), fractions.
        out_dist: Accuracy of each model out of distribution, (model,), fractions.
        confidence: Of the two intervals, in (0, 1).

    Returns:
        The line with its intervals.

    Raises:
        ValueError: If there are fewer than 3 models, all have one accuracy in distribution, or an
            accuracy is 0 or 1: its logit is infinite, and no line goes through it.
    """
    _check_confidence(confidence)
    x, y = _fractions(in_dist, "in_dist"), _fractions(out_dist, "out_dist")
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(
            f"in_dist and out_dist must be two lists of one length, got shapes {x.shape}, {y.shape}"
        )
    if len(x) < 3:
        raise ValueError(f"a line with intervals needs at least 3 models, got {len(x)}")
    for name, values in (("in_dist", x), ("out_dist", y)):
        (infinite,) = np.nonzero((values == 0) | (values == 1))
        if len(infinite):
            raise ValueError(
                f"{name}[{infinite[0]}] is {values[infinite[0]]:g}: its logit is infinite, and no "
                "line goes through it. Leave the model out, or measure it on more samples"
            )
    if np.ptp(x) == 0:
        raise ValueError(f"all {len(x)} models have in_dist {x[0]:g}: no line is determined")
    fit = stats.linregress(logit(x), logit(y))
    quantile = stats.t.ppf((1 + confidence) / 2, len(x) - 2)

    def interval(centre: float, error: float) -> tuple[float, float]:
        return float(centre - quantile * error), float(centre + quantile * error)

    return FittedLine(
        slope=float(fit.slope),
        intercept=float(fit.intercept),
        slope_interval=interval(fit.slope, fit.stderr),
        intercept_interval=interval(fit.intercept, fit.intercept_stderr),
        r_squared=float(fit.rvalue**2),
        n_models=len(x),
        confidence=confidence,
    )


def _published(shift: str) -> Line:
    if shift not in LINES:
        raise ValueError(
            f"there is no published line for {shift!r}: choose one of {', '.join(LINES)}, "
            "or fit one with fit_line"
        )
    return LINES[shift]


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")


def _fractions(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    outside = ~((array >= 0) & (array <= 1))
    if outside.any():
        first = np.argwhere(outside)[0]
        place = f"{name}[{', '.join(map(str, first))}]" if array.ndim else name
        value = array[tuple(first)]
        hint = ": divide percent by 100" if 1 < value <= 100 else ""
        raise ValueError(f"{place} must be a fraction in [0, 1], got {value:g}{hint}")
    return array
