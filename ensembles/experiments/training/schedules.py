"""Learning-rate schedules as shares of the base rate, one value for every optimizer step.

Nothing here is an absolute rate: a run at M times the base rate goes through M times the same
rates. (A schedule that holds absolute rates, as torch's `CosineAnnealingLR(eta_min=...)` does, is
off by (M - 1) eta_min.) An absolute constant becomes a share by division: a floor of 1e-5 under a
base rate of 0.1 is ``floor=1e-4``.
"""

import bisect
import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["Schedule", "ScheduleName", "make_scheduler"]

ScheduleName: TypeAlias = Literal["constant", "cosine", "step"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The share of the base rate at every optimizer step.

    With w steps of warm-up in a run of T steps, the share of step t = 0, 1, ..., T - 1 is

        t < w            warmup_start + (1 - warmup_start) min(1, (t + 1) / w)
        t >= w, cosine   floor + (1 - floor) (1 + cos(pi (t - w) / (T - w))) / 2
        t >= w, step     decay ** (number of milestones m with t >= m T)

    so that no step is taken at a rate of zero, the first step after a warm-up of length 0 is at
    the full rate, and a fractional length never exceeds it. Without warm-up, cosine is torch's
    `CosineAnnealingLR(T_max=T)`.

    The defaults are those of Wide ResNets without their steps; with ``name="step"`` they are
    theirs: the rate falls to a fifth at 60, 120 and 160 of 200 epochs.

    Args:
        name: "constant", "cosine" (Loshchilov and Hutter 2017, arXiv 1608.03983) or "step".
        warmup_epochs: Length of the linear warm-up in epochs, which may be a fraction.
        warmup_start: Where the warm-up starts, as a share of the base rate, 0 to 1.
        floor: Where "cosine" ends (eta_min), as a share of the base rate, 0 to 1.
        milestones: When "step" lowers the rate, as increasing shares of the run.
        decay: The factor by which "step" multiplies the rate at every milestone.

    Source:
        Milestones and decay: Zagoruyko and Komodakis 2016, arXiv 1605.07146, section 3.

    Raises:
        ValueError: If a value is out of range.

    Example:
        >>> warm = Schedule(warmup_epochs=0.4)
        >>> [round(share, 3) for share in warm.shares(epochs=1, steps_per_epoch=5)]
        [0.5, 1.0, 1.0, 0.75, 0.25]
    """

    name: ScheduleName = "cosine"
    warmup_epochs: float = 0.0
    warmup_start: float = 0.0
    floor: float = 0.0
    milestones: tuple[float, ...] = (0.3, 0.6, 0.8)
    decay: float = 0.2

    def __post_init__(self) -> None:
        if self.name not in get_args(ScheduleName):
            raise ValueError(f"schedule must be one of {list(get_args(ScheduleName))}: {self.name}")
        if not (math.isfinite(self.warmup_epochs) and self.warmup_epochs >= 0):
            raise ValueError(f"warmup_epochs must be at least 0, got {self.warmup_epochs}")
        for name in ("warmup_start", "floor"):
            share = getattr(self, name)
            if not 0.0 <= share <= 1.0:
                raise ValueError(
                    f"{name} is a share of the base rate, from 0 to 1, got {share}: divide an "
                    "absolute rate by the base rate"
                )
        object.__setattr__(self, "milestones", tuple(self.milestones))
        rising = all(a < b for a, b in zip(self.milestones, self.milestones[1:], strict=False))
        if not rising or not all(0.0 < milestone < 1.0 for milestone in self.milestones):
            raise ValueError(
                "milestones are shares of the run, rising between 0 and 1, got "
                f"{list(self.milestones)}: divide epochs by the number of epochs"
            )
        if not (math.isfinite(self.decay) and self.decay > 0):
            raise ValueError(f"decay must be above 0, got {self.decay}")

    def share(self, step: int, *, epochs: int, steps_per_epoch: int) -> float:
        """The share of the base rate at one step.

        Args:
            step: Optimizer steps taken before, 0 for the first.
            epochs: Length of the run.
            steps_per_epoch: Optimizer steps of an epoch.

        Raises:
            ValueError: If the warm-up is longer than the run.
        """
        if epochs < 1 or steps_per_epoch < 1:
            raise ValueError(
                f"a run has at least 1 epoch of 1 step, got {epochs} of {steps_per_epoch}"
            )
        if self.warmup_epochs > epochs:
            raise ValueError(
                f"a warm-up of {self.warmup_epochs:g} epochs is longer than the run of {epochs}: "
                "the full rate would never be reached"
            )
        steps, warmup = epochs * steps_per_epoch, self.warmup_epochs * steps_per_epoch
        if step < warmup:
            return self.warmup_start + (1 - self.warmup_start) * min(1.0, (step + 1) / warmup)
        if self.name == "cosine":
            # After the last step the scheduler asks once more, where nothing may be left.
            progress = min(1.0, (step - warmup) / max(steps - warmup, 1e-9))
            return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2
        if self.name == "step":
            # Whole steps, because 0.3 * 10 is 3.0000000000000004 in some orders of rounding.
            due = [math.ceil(round(milestone * steps, 6)) for milestone in self.milestones]
            return self.decay ** bisect.bisect_right(due, step)
        return 1.0

    def shares(self, *, epochs: int, steps_per_epoch: int) -> list[float]:
        """The shares of all steps of a run."""
        return [
            self.share(step, epochs=epochs, steps_per_epoch=steps_per_epoch)
            for step in range(epochs * steps_per_epoch)
        ]


def make_scheduler(
    optimizer: Optimizer, schedule: Schedule, *, epochs: int, steps_per_epoch: int
) -> LambdaLR:
    """Makes the scheduler, which is stepped once after every optimizer step.

    Its state is the number of steps, so that a resumed run goes on where it was.

    Example:
        >>> sgd = torch.optim.SGD([torch.ones(1)], lr=0.1)
        >>> scheduler = make_scheduler(sgd, Schedule(), epochs=2, steps_per_epoch=1)
        >>> sgd.step(); scheduler.step(); round(scheduler.get_last_lr()[0], 6)
        0.05

    Args:
        optimizer: Built at the base rate.
        schedule: The shares.
        epochs: Length of the run.
        steps_per_epoch: Optimizer steps of an epoch.

    Returns:
        The scheduler; the optimizer is at the rate of the first step.

    Raises:
        ValueError: If the warm-up is longer than the run.
    """
    return LambdaLR(
        optimizer,
        lambda step: schedule.share(step, epochs=epochs, steps_per_epoch=steps_per_epoch),
    )
