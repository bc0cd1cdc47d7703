"""Whether a training step on one member moves what it is claimed to move."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ensembles.checks.coupling.claim import CouplingClaim
from ensembles.checks.coupling.measurement import GradientCoupling
from ensembles.checks.coupling.step_effects import Moved
from ensembles.findings import Count, Finding, Findings
from ensembles.message import Explanation, assert_held, in_common, listed

__all__ = [
    "assert_members_coupled",
    "assert_members_coupled_to",
    "assert_members_uncoupled",
    "judge",
]


def assert_members_uncoupled(coupling: GradientCoupling) -> None:
    """Checks that a training step on one member moves nothing of another.

    Args:
        coupling: From `measure_gradient_coupling`.

    Raises:
        AssertionError: If something of another member moves, or the loss couples them.

    Example:
        >>> from ensembles.checks.coupling.measurement import measure_gradient_coupling
        >>> two = [nn.Linear(4, 2), nn.Linear(4, 2)]
        >>> assert_members_uncoupled(measure_gradient_coupling(two, torch.randn(3, 4)))
    """
    __tracebackhide__ = True
    assert_held(judge(coupling, CouplingClaim("independent")))


def assert_members_coupled(coupling: GradientCoupling) -> None:
    """Checks that members are tied: a training step on any of them moves all others.

    Args:
        coupling: From `measure_gradient_coupling`.

    Raises:
        AssertionError: If a step on one member leaves the output and all parameters of another.

    Example:
        >>> from ensembles.checks.coupling.measurement import measure_gradient_coupling
        >>> one = nn.Linear(4, 2)
        >>> assert_members_coupled(measure_gradient_coupling([one, one], torch.randn(3, 4)))
    """
    __tracebackhide__ = True
    assert_held(judge(coupling, CouplingClaim("tied")))


def assert_members_coupled_to(coupling: GradientCoupling, parent: str = "parent") -> None:
    """Checks that a step on any subnet moves the parent, and a step on the parent every subnet.

    Args:
        coupling: From `measure_gradient_coupling`, with the parent among the members.
        parent: The parent's name there. All other members are its subnets.

    Raises:
        ValueError: If no member has this name.
        AssertionError: If a step on a subnet leaves the parent, or the other way round.

    Example:
        >>> from ensembles.checks.coupling.measurement import measure_gradient_coupling
        >>> wide = nn.Linear(4, 4)
        >>> family = {"wide": wide, "0": nn.Sequential(wide, nn.ReLU())}
        >>> coupling = measure_gradient_coupling(family, torch.randn(3, 4))
        >>> assert_members_coupled_to(coupling, "wide")
    """
    __tracebackhide__ = True
    assert_held(judge(coupling, CouplingClaim("parent", parent)))


def judge(coupling: GradientCoupling, claim: CouplingClaim) -> Findings:
    """What moves though it should not, or stays though it should move."""
    if claim.relation == "independent":
        return _moving(coupling)
    if claim.relation == "tied":
        pairs = [(i, j) for i in coupling.members for j in coupling.members if i != j]
        claimed = f"members {listed(coupling.members)} are claimed tied, but a training step on one"
        return _staying(coupling, pairs, f"{claimed} leaves another as it was")
    if claim.parent not in coupling.members:
        raise ValueError(
            f"no member is named {claim.parent!r}, which is claimed to be the parent. "
            f"Members are {listed(coupling.members)}."
        )
    subnets = [name for name in coupling.members if name != claim.parent]
    return _staying(
        coupling,
        [pair for name in subnets for pair in ((name, claim.parent), (claim.parent, name))],
        f"members {listed(subnets)} are claimed to share weights with {claim.parent}, but a "
        "training step on one side leaves the other as it was",
    )


# --- findings -----------------------------------------------------------------------------------

_EXPLANATIONS = {
    "shared buffer": Explanation(
        meaning="A training call of one member changes how another predicts, though no weight is "
        "shared.",
        cause="one normalisation layer passed to several members, or its running statistics "
        "assigned",
        remedy="Give each member its own.",
    ),
    "mixed output": Explanation(
        meaning="A member's prediction depends on weights that train another.",
        cause="a layer that mixes packed members (groups=1, a channel shuffle, a norm over all "
        "channels), or features that are read from another member, also detached ones",
        remedy="Compute each member from its own features, or claim the coupling.",
    ),
    "common loss": Explanation(
        meaning="Each member is trained according to what the others predict: one may learn for "
        "all.",
        cause="the loss of the mean prediction",
        remedy="Sum the members' own losses, or claim the coupling.",
    ),
    "common penalty": Explanation(
        meaning="Each member is drawn to, or driven from, the weights of the others.",
        cause="a penalty on the distance between members, or one norm of all weights",
        remedy="Penalise each member's weights by themselves, or claim the coupling.",
    ),
    "not tied": Explanation(
        meaning="They do not train the same weights.",
        cause="deepcopy, clone, detach or load_state_dict where the module (or Parameter object) "
        "itself should be passed on; a frozen weight",
        remedy="Pass on the module itself, and leave it trainable.",
    ),
}

_MOVING = (
    *("one network", "shared weight", "shared buffer", "mixed output"),
    *("common loss", "common penalty"),
)
"""The kinds of what moves though it should not, the one that explains the most first."""

_BY_LOSS = {
    "loss": ("common loss", "what {} predicts", "changes"),
    "penalty": ("common penalty", "the weights of {}", "change"),
}
"""What the loss moves: the kind of finding, its place, and the verb of what was found."""

_READ = {"common loss": "what others predict", "common penalty": "the weights of others"}


def _moving(coupling: GradientCoupling) -> Findings:
    items = [
        finding for step, member in coupling.pairs for finding in _of_pair(coupling, step, member)
    ]
    items.sort(key=lambda finding: _MOVING.index(finding.kind))
    kinds = dict.fromkeys(item.kind for item in items)
    how = "a training step on one moves another"
    if items and kinds.keys() <= _READ.keys():
        how = f"the loss trains each by {' and '.join(_READ[kind] for kind in kinds)}"
    return Findings(
        claim=f"members {listed(coupling.members)} are claimed to train independently, but {how}",
        items=tuple(items),
        affected=(coupling.share,),
        looked_at=_draws(coupling),
    )


def _of_pair(coupling: GradientCoupling, step: str, member: str) -> Iterator[Finding]:
    """What a step moves of one other member; what the loss makes of the two is another finding."""
    moved = coupling.places(step, member)
    by_step = [one for one in moved if one.kind not in _BY_LOSS]
    if by_step:
        kind, explained = _mechanism(coupling, (step, member), {one.kind for one in by_step})
        told = listed([f"{one.by:.0e} ({one.place})" for one in by_step], 3)
        found = f"moves {member} by up to {told}"
        yield _finding(kind, f"step on {step}", by_step, found, explained)
    for one in moved:
        if one.kind in _BY_LOSS:
            kind, place, verb = _BY_LOSS[one.kind]
            told = f"{verb} the gradient of {member} by up to {one.by:.0e}"
            yield _finding(kind, place.format(step), [one], told, _EXPLANATIONS[kind])


def _mechanism(
    coupling: GradientCoupling, pair: tuple[str, str], kinds: set[str]
) -> tuple[str, Explanation]:
    """What explains the most: a shared weight moves outputs too."""
    if "parameter" not in kinds:
        kind = "shared buffer" if "buffer" in kinds else "mixed output"
        return kind, _EXPLANATIONS[kind]
    for group in coupling.same:
        if {*pair} <= {*group}:
            return "one network", in_common(group, whole=True)
    return "shared weight", in_common(pair, whole=False)


def _finding(
    kind: str, place: str, moved: Sequence[Moved], found: str, explained: Explanation
) -> Finding:
    return Finding(
        kind=kind,
        place=place,
        members=(moved[0].step, moved[0].member),
        found=found,
        amount=max(one.by for one in moved),
        **explained,
    )


def _staying(coupling: GradientCoupling, pairs: Sequence[tuple[str, str]], claim: str) -> Findings:
    """Only outputs and parameters count: shared statistics or a common loss are no tie."""
    moved = {(m.step, m.member) for m in coupling.moved if m.kind in ("output", "parameter")}
    still = [pair for pair in pairs if pair not in moved]
    return Findings(
        claim=claim,
        items=tuple(
            Finding(
                kind="not tied",
                place=f"step on {step}",
                members=(step, member),
                found=f"leaves {member} as it was",
                **_EXPLANATIONS["not tied"],
            )
            for step, member in still
        ),
        affected=(Count(len(still), "claimed pair", of=len(pairs)),),
        looked_at=_draws(coupling),
    )


def _draws(coupling: GradientCoupling) -> tuple[Count, ...]:
    return (Count(coupling.draws, "random draw of a training call"),) if coupling.draws > 1 else ()
