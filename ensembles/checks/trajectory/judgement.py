"""Whether members train as they would alone, and whether two runs are equal."""

from __future__ import annotations

from dataclasses import replace

from ensembles.checks.trajectory.claim import TrajectoryClaim
from ensembles.checks.trajectory.measurement import MemberTrajectories
from ensembles.checks.trajectory.runs import TrainingTrajectory
from ensembles.findings import Count, Finding, Findings
from ensembles.instruments.divergence import Divergence, divergences, tolerated
from ensembles.instruments.recording import KINDS, Entry
from ensembles.message import assert_held, counted, listed
from ensembles.tolerance import Kind

__all__ = ["assert_members_trained_alone", "assert_trajectories_equal", "judge"]


def assert_members_trained_alone(
    trajectories: MemberTrajectories, *, tolerance: float | Kind = 0.0
) -> None:
    """Checks that every member of an ensemble trains as it does alone.

    Args:
        trajectories: From `measure_member_trajectories`.
        tolerance: As in `assert_trajectories_equal`: 0.0 compares bits; a number or a word, such as
            "recomputed", needs `values=True`.

    Raises:
        AssertionError: If a member leaves its own run; it names the step and the tensor.

    Example:
        >>> from ensembles import measure_member_trajectories
        >>> one = nn.Linear(4, 2)
        >>> assert_members_trained_alone(measure_member_trajectories([one, one], torch.ones(5, 4)))
        Traceback (most recent call last):
        AssertionError: members 0, 1 are claimed to train as they do alone, but do not
        ...
    """
    __tracebackhide__ = True
    claim = TrajectoryClaim(trajectories.identical, trajectories.loss, tolerance)
    assert_held(judge(trajectories, claim))


def assert_trajectories_equal(
    one: TrainingTrajectory, two: TrainingTrajectory, *, tolerance: float | Kind = 0.0
) -> None:
    """Checks that two training runs are the same: bit by bit, or within a tolerance.

    Args:
        one: From `measure_training_trajectory`; also one member's, or some kinds of entries only.
        two: The other, of as many steps. Where both have one member, its name does not matter.
        tolerance: The greatest difference in a tensor, as a share of the greatest element of that
            kind (of gradients, of parameters) in that step. 0.0 compares bits; "recomputed" lets
            pass what the coarsest recorded dtype cannot tell, such as other kernels or another
            order of sums (`ensembles.tolerance`). Both need trajectories with `values=True`.

    Raises:
        ValueError: If they have no entries in common, or are of different lengths.
        AssertionError: If they differ; it names the first step and tensor.

    Example:
        >>> from ensembles import measure_training_trajectory
        >>> def run(momentum):
        ...     return measure_training_trajectory(
        ...         lambda: nn.Linear(2, 1), torch.ones(3, 2),
        ...         optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=momentum))
        >>> assert_trajectories_equal(run(0.9), run(0.9))
        >>> assert_trajectories_equal(run(0.9), run(0.8))
        Traceback (most recent call last):
        AssertionError: two training runs are claimed equal bit by bit, but differ from step 2 on
        ...
    """
    __tracebackhide__ = True
    if one.steps != two.steps:
        raise ValueError(
            f"one trajectory has {counted(range(one.steps), 'step')}, but the other has "
            f"{counted(range(two.steps), 'step')}: record both with the same steps=..."
        )
    compared = _compared(one, two)
    allowed = tolerated(tolerance, *compared)
    found = divergences(*compared, allowed)
    first = found[0].step if found else 0
    assert_held(
        Findings(
            claim=f"two training runs are claimed equal {_within(allowed)}, but differ from step "
            f"{first} on",
            items=tuple(
                Finding(
                    kind="differs",
                    place=f"step {each.step}, {each.what}",
                    found=str(each),
                    amount=each.ratio,
                    meaning="Everything before is the same; what comes later follows from the "
                    "first difference.",
                    remedy=_AFTER[found[0].kind],
                )
                for each in found
            ),
            affected=(Count(len(found), "recorded value", of=len(one.entries)),),
        )
    )


def judge(trajectories: MemberTrajectories, claim: TrajectoryClaim) -> Findings:
    """The members that leave their own runs, each with the first value that differs."""
    runs = [run for name in trajectories.alone for run in trajectories.compared(name)]
    allowed = tolerated(claim.tolerance, *(run.entries for run in runs))  # type: ignore[arg-type]
    found = {
        name: each
        for name in trajectories.alone
        if (each := trajectories.divergences(name, allowed))
    }
    follow = "to follow the single model" if claim.identical else "to train as they do alone"
    at_rates = " at the rates of a mean loss" if claim.loss == "mean" else ""
    items: tuple[Finding, ...] = ()
    if found:
        first = min((each[0] for each in found.values()), key=_rank)
        kind, meaning, cause, remedy = _explained(trajectories, first)
        items = tuple(
            Finding(
                kind=kind,
                place=f"member {name}, step {each[0].step}",
                members=(name,),
                found=f"{each[0].what}: {each[0]}; {len(each)} values differ",
                amount=each[0].ratio,
                meaning=meaning,
                cause=cause,
                remedy=remedy,
            )
            for name, each in found.items()
        )
    return Findings(
        claim=f"members {listed(list(trajectories.alone))} are claimed {follow}{at_rates}, but do "
        "not",
        items=items,
        affected=(Count(len(found), "member", of=len(trajectories.alone)),) if found else (),
    )


def _within(tolerance: float) -> str:
    return f"within {tolerance:.3g}" if tolerance else "bit by bit"


def _rank(found: Divergence) -> tuple[int, int]:
    """What was computed first explains what came later, also in other members."""
    return found.step, KINDS.index(found.kind)


# --- what is told -------------------------------------------------------------------------------

_AFTER = {
    "batch": "The data are drawn from a generator that the seed does not reach.",
    "output": "Parameters and buffers were the same: the data, the order of random numbers, the "
    "mode (train or eval) or the network's code differs.",
    "loss": "The outputs were the same: the loss, or its labels, differs.",
    "gradient": "The outputs were the same: the loss is scaled or reduced in another way (sum "
    "against mean), a branch is detached, or gradients are accumulated.",
    "parameter": "The gradients were the same: the optimizer, its rates or groups, clipping or "
    "the initial weights differ.",
    "buffer": "The parameters were the same: BatchNorm has another momentum, is updated more than "
    "once a step, or starts from other statistics.",
    "state": "Parameters were the same so far: the optimizer keeps another state.",
}
"""By kind of the first value that differs between two runs: what is left as a reason."""

_CAUSES = {
    "output": "members that read each other, a layer or statistics in common, or an ensemble that "
    "feeds its members, or returns of them, something else than their own call does",
    "gradient": "a loss that couples the members (the loss of the mean prediction), weights in "
    "common, or a factor on the loss",
    "parameter": "one gradient norm that is clipped over all members, a weight in common, or "
    "groups with other rates",
    "buffer": "a BatchNorm that several members update",
    "state": "optimizer state that members have in common",
}
"""By kind of the first value of a member that differs: the usual cause."""


def _explained(trajectories: MemberTrajectories, first: Divergence) -> tuple[str, str, str, str]:
    """Kind of finding, what it means, the usual cause, and what to do."""
    count = len(trajectories.alone)
    if trajectories.members_are_one:
        return (
            "one network",
            "Members are one network: the gradients of all streams add up, and BatchNorm is "
            f"updated {count} times a step.",
            "[model] * n, or one network that is run n times",
            "Build each member anew.",
        )
    if first.kind == "gradient" and abs(first.ratio * count - 1) < MEAN:
        return (
            "averaged loss",
            f"Every member's gradient is 1/{count} of what it is alone. Under SGD this is the "
            f"learning rate divided by {count}, and weight decay times {count}.",
            "the mean over members",
            f"Sum their losses, or train at lr times {count} and weight decay divided by {count}, "
            "and claim the mean.",
        )
    return (
        f"another {first.kind}",
        "The members of this ensemble become other models than they would be alone.",
        _CAUSES.get(first.kind, _CAUSES["state"]),
        "Clip each member by itself." if first.kind == "parameter" else "",
    )


MEAN = 1e-2
"""How far M times the ratio of gradient norms may be from 1 to be told as a mean over M members.
bfloat16 rounds 1/M by up to 4e-3."""


# --- two runs -----------------------------------------------------------------------------------


def _compared(one: TrainingTrajectory, two: TrainingTrajectory) -> tuple[list[Entry], list[Entry]]:
    """The entries of both, under one name where each has one member."""
    if len(one.members) == 1 == len(two.members):
        two = _renamed(two, one.members[0])
    if not {entry.key for entry in one.entries} & {entry.key for entry in two.entries}:
        raise ValueError(
            "the two trajectories have nothing in common to compare: members "
            f"{listed(one.members) or 'none'} and {listed(two.members) or 'none'}. Compare one "
            "member with one: trajectory.member(name)."
        )
    return list(one.entries), list(two.entries)


def _renamed(trajectory: TrainingTrajectory, name: str) -> TrainingTrajectory:
    """The one member's trajectory under another name."""
    entries = (replace(e, member=name if e.member else "") for e in trajectory.entries)
    return TrainingTrajectory(trajectory.seed, (name,), tuple(entries))
