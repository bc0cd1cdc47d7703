"""Whether members' gradients are the claimed multiples, and train at the claimed rates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from ensembles.checks.loss_scale.claim import LossScaleClaim, Multiples, Rates
from ensembles.checks.loss_scale.gradient_scale import Overlap
from ensembles.checks.loss_scale.measurement import LossScale, MemberScale, fraction
from ensembles.checks.loss_scale.schedules import (
    in_proportion,
    single_schedule,
    times_as_fast,
)
from ensembles.findings import Count, Finding, Findings
from ensembles.instruments.learning_rates import Rate, close, near
from ensembles.message import Explanation, assert_held, in_common, listed

__all__ = ["assert_loss_scaled", "assert_rates_effective", "judge"]


def assert_loss_scaled(
    scale: LossScale,
    claim: Multiples = "sum",
    *,
    clipping: str | None = None,
    shared: Sequence[str] | None = None,
) -> None:
    """Checks that every member's gradient is the claimed multiple of its gradient alone.

    Args:
        scale: From `measure_loss_scale`.
        claim: "sum" (each multiple is 1), "mean" (1/M), "joint" (members are coupled), one number,
            or one for each member, by name or in order.
        clipping: "member" where clipping must not couple members, "joint" where it may; by default
            it must not, where there is any.
        shared: Patterns (`fnmatch`) of the parameters that members share by design, as those of a
            trunk, or of a parent under its subnets: there the members' gradients add up, and what
            is claimed is the multiple of each in the sum. By default what the subject claims to be
            shared.

    Raises:
        ValueError: If the claim is none of these, or does not fit the members.
        AssertionError: If a multiple is another, members are coupled where they are not claimed
            to be, gradients add up in weights that are not claimed shared, or the loss takes
            probabilities for logits.

    Example:
        >>> from ensembles import measure_loss_scale
        >>> labels = torch.tensor([0, 1, 1])
        >>> def sum_of_losses(outputs):
        ...     return sum(nn.functional.cross_entropy(y, labels) for y in outputs.values())
        >>> two = [nn.Linear(4, 2), nn.Linear(4, 2)]
        >>> assert_loss_scaled(measure_loss_scale(two, torch.randn(3, 4), loss=sum_of_losses))
    """
    __tracebackhide__ = True
    by_design = shared if shared is None else tuple(shared)
    assert_held(judge(scale, LossScaleClaim(claim, clipping=clipping, shared=by_design)))


def assert_rates_effective(
    scale: LossScale,
    *,
    lr: Rates | None = None,
    weight_decay: float | None = None,
    warmup: float | None = None,
) -> None:
    """Checks that every member trains as a single model at these rates does.

    Args:
        scale: From `measure_loss_scale` with `optimizer=`.
        lr: The single model's learning rate. One number is what its optimizer is built with; its
            rates at every step are a list, or a function of a list of parameters that builds its
            optimizer and returns the scheduler.
        weight_decay: The single model's weight decay, in the groups that have any.
        warmup: After how many steps the full rate (that the optimizer is built with) is reached:
            0 at once, and a fraction at the next whole step. It is never exceeded.

    Raises:
        ValueError: If nothing is claimed, rates were not measured or do not exist, or one number
            is claimed where the loss scales gradients and the schedule holds absolute rates:
            whether those were scaled too, only the single model's schedule can say.
        AssertionError: If effective rates are others.

    Example:
        >>> from ensembles import measure_loss_scale
        >>> labels = torch.tensor([0, 1, 1])
        >>> def mean_of_losses(outputs):
        ...     return sum(nn.functional.cross_entropy(y, labels) for y in outputs.values()) / 2
        >>> two = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])
        >>> scale = measure_loss_scale(two, torch.randn(3, 4), loss=mean_of_losses,
        ...     optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.2, weight_decay=1e-4))
        >>> assert_rates_effective(scale, lr=0.1, weight_decay=2e-4)
    """
    __tracebackhide__ = True
    assert_held(judge(scale, LossScaleClaim(lr=lr, weight_decay=weight_decay, warmup=warmup)))


def judge(scale: LossScale, claim: LossScaleClaim) -> Findings:
    """The members whose gradients or rates are not as claimed."""
    if claim.multiples is None and not claim.rates:
        raise ValueError("no rate is claimed: give lr=, weight_decay= or warmup=.")
    items: list[Finding] = []
    if claim.multiples is not None:
        items += _of_loss(scale, claim)
    if claim.rates:
        items += _of_rates(scale, claim)
        if not items:
            _refuse_unknown(scale, claim)
    kind = items[0].kind if items else ""
    concerned = {name for item in items for name in item.members}
    common = sum(item.kind == "added gradients" for item in items)
    return Findings(
        claim=_sentence(scale, claim, kind),
        items=tuple(items),
        affected=(
            *([Count(len(concerned), "member", of=len(scale.members))] if items else []),
            *([Count(common, "parameter")] if common else []),
        ),
        looked_at=_looked_at(scale, claim) if claim.rates else (),
    )


def _sentence(scale: LossScale, claim: LossScaleClaim, kind: str) -> str:
    """What is claimed, and how the first kind of finding breaks it."""
    members, objective = f"members {listed(scale.names)}", scale.objective
    if kind == "joint clipping":
        return f"{members} are claimed to be clipped apart, but one norm couples them"
    if kind == "second softmax":
        taken = listed([member.member for member in scale.members if member.classes])
        return (
            f"the loss is claimed to fit what members {taken} emit, but takes their probabilities "
            "for logits"
        )
    apart = [member.member for member in scale.members if not member.coupled]
    alone = f"members {listed(apart)} train" if len(apart) > 1 else f"member {listed(apart)} trains"
    but = _BUT.get(kind, "").format(
        train=f"their {objective}" if objective in ("sum", "mean") else "other multiples",
        alone="all train" if len(apart) == len(scale.members) else alone,
    )
    of_rates = claim.multiples is None or kind in _OF_RATES
    how = _told_rates(claim) if of_rates else _told_multiples(scale, claim.multiples)
    return f"{members} are claimed to train {how}" + (f", but {but}" if but else "")


def _told_rates(claim: LossScaleClaim) -> str:
    lr, decay, warmup = claim.lr, claim.weight_decay, claim.warmup
    one = f"lr {lr:.4g}" if isinstance(lr, (int, float)) else "a schedule of its own"
    told = [
        *([one] if lr is not None else []),
        *([f"weight decay {decay:.4g}"] if decay is not None else []),
        *([f"a warm-up of {warmup:g} steps"] if warmup is not None else []),
    ]
    return f"as a single model with {' and '.join(told)}"


def _told_multiples(scale: LossScale, claim: Multiples | None) -> str:
    if claim == "joint":
        return "jointly"
    if isinstance(claim, str) or claim is None:
        return f"on the {claim} of their losses"
    shares = [f"{share:.4g}" for share in _expected(scale, claim).values()]
    return f"on {listed(shares if len({*shares}) > 1 else shares[:1])} times their losses"


# --- what each kind says ------------------------------------------------------------------------

_TEXTS = {
    "coupled": Explanation(
        meaning="Each member is trained by what the others predict: no learning rate makes that a "
        "training alone.",
        cause="the loss of the mean prediction, or weights that depend on all losses",
        remedy="Add up the members' own losses, or claim 'joint'.",
    ),
    "not coupled": Explanation(
        meaning="What other members predict does not change these gradients.",
        cause="the mean of the losses in place of the loss of the mean prediction, or a detached "
        "prediction",
        remedy="Claim 'sum' or 'mean' where it is meant.",
    ),
    "other multiple": Explanation(
        meaning="",
        cause="mean() or a division by the number of members where a sum is meant, or weights of "
        "members that do not add up",
        remedy="Sum the losses. Or scale lr, weight decay and all absolute rates of the schedule, "
        "and claim what it is.",
    ),
    "added gradients": Explanation(
        meaning="A step there follows the sum of these gradients: no learning rate makes that a "
        "training of one alone.",
        cause="a trunk or a parent's weights under several members, or features of one that "
        "another reads",
        remedy="",
    ),
    "second softmax": Explanation(
        meaning="A softmax of a softmax is nearly uniform: gradients are small where the "
        "prediction is wrong, and never vanish where it is right.",
        cause="softmax at the end of forward, and cross_entropy as the loss",
        remedy="Return logits, or use nll_loss(p.log(), labels).",
    ),
    "joint clipping": Explanation(
        meaning="A loud member silences the others: they are not trained as alone.",
        cause="clip_grad_norm_(model.parameters(), c)",
        remedy="Clip each member's parameters by themselves (with c/M for the mean), or claim "
        "clipping='joint'.",
    ),
    "other rates": Explanation(
        meaning="A single model trains the same at the rates that were found.",
        cause="the mean of M losses at the learning rate of one",
        remedy="With the mean under SGD, multiply lr by M and divide weight decay by M. With the "
        "sum, or under Adam, leave lr.",
    ),
    "fast schedule": Explanation(
        meaning="",
        cause="scheduler.step() inside the loop over members, or for each micro-batch",
        remedy="Step it once after each optimizer step.",
    ),
    "absolute rate": Explanation(
        meaning="The schedule holds absolute rates, which did not grow with the learning rate.",
        cause="eta_min, a warm-up's start or max_lr",
        remedy="Multiply these too, or sum the losses and leave all rates.",
    ),
    "warm-up": Explanation(
        meaning="The first steps are not taken at the rates that the warm-up is claimed to have.",
        cause="a division by the length of the warm-up",
        remedy="Use min(1, (step + 1) / length), and no warm-up for a length of 0.",
    ),
}

_BUT = {
    "coupled": "the loss couples them",
    "other multiple": "train on {train}",
    "not coupled": "{alone} alone",
    "added gradients": "have weights in common, where their gradients add up",
    "other rates": "train at other rates",
    "fast schedule": "go through their schedule too fast",
    "absolute rate": "their schedule holds absolute rates",
    "warm-up": "warm up in another way",
}

_OF_RATES = ("other rates", "fast schedule", "absolute rate", "warm-up")


def _finding(kind: str, member: MemberScale, at: str = "", **said: Any) -> Finding:
    place, members = at or f"member {member.member}", (member.member,)
    return Finding(**{**_TEXTS[kind], "kind": kind, "place": place, "members": members, **said})


# --- the loss -----------------------------------------------------------------------------------


def _of_loss(scale: LossScale, claim: LossScaleClaim) -> Iterator[Finding]:
    assert claim.multiples is not None
    if claim.multiples == "joint":
        yield from _not_coupled(scale)
    else:
        expected = _expected(scale, claim.multiples)
        yield from _coupled(scale, expected)
        told = fraction if isinstance(claim.multiples, str) else "{:.4g}".format
        yield from _multiples(scale, expected, told)
        designed = scale.designed
        if claim.shared is not None:
            designed = tuple((pattern, True) for pattern in claim.shared)
        yield from _added(scale, expected, designed)
    yield from _softmaxes(scale)
    yield from _clippings(scale, claim.clipping)


def _expected(scale: LossScale, claim: Multiples) -> dict[str, float]:
    names = scale.names
    if isinstance(claim, str):
        return dict.fromkeys(names, 1 / len(names) if claim == "mean" else 1.0)
    if isinstance(claim, (int, float)):
        return dict.fromkeys(names, float(claim))
    pairs = claim.items() if isinstance(claim, Mapping) else zip(names, claim, strict=False)
    given = {str(name): float(multiple) for name, multiple in pairs}
    if set(given) != set(names) or len(claim) != len(names):
        raise ValueError(
            f"{len(claim)} multiples are claimed ({listed(list(given))}), but members are "
            f"{listed(names)}. Give one for each."
        )
    return given


def _part(multiple: float | None, of: str, told: Any = fraction) -> str:
    """How much of a gradient, in words."""
    if not multiple:
        return f"{'no multiple' if multiple is None else 'nothing'} of {of}"
    if near(multiple, 1.0):
        return "all of it" if of == "it" else of
    return f"{told(multiple)} {'of' if abs(multiple) < 1 else 'times'} {of}"


def _coupled(scale: LossScale, expected: Mapping[str, float]) -> Iterator[Finding]:
    for member in scale.members:
        if member.coupled:
            yield _finding(
                "coupled",
                member,
                expected=_part(expected[member.member], "its gradient alone"),
                found=f"a gradient that depends on predictions of {listed(member.coupled)}",
            )


def _not_coupled(scale: LossScale) -> Iterator[Finding]:
    for member in scale.members:
        if not member.coupled:
            found = "gets a gradient that no other member changes"
            if member.multiple is not None:
                found = f"gets {_part(member.multiple, 'its gradient alone')}"
            yield _finding("not coupled", member, found=found, amount=member.multiple)


def _multiples(scale: LossScale, expected: Mapping[str, float], told: Any) -> Iterator[Finding]:
    # Where some are coupled, those that have no multiple may just not be known alone.
    known = scale.members
    if any(member.coupled for member in known):
        known = tuple(m for m in known if not m.coupled and m.multiple is not None)
    wrong = [m for m in known if not near(m.multiple, expected[m.member], m.precision)]
    ratios = {fraction((m.multiple or 0.0) / (expected[m.member] or 1.0)) for m in wrong}
    for member in wrong:
        wanted, found = expected[member.member], _part(member.multiple, "it", told)
        follows = ", ".join(_consequences(member))
        yield _finding(
            "other multiple",
            member,
            expected=_part(wanted, "its gradient alone", told),
            found=f"{found}: {follows}" if follows else found,
            amount=member.multiple,
            meaning=_meaning(member, wanted, alike=len(ratios) == 1),
        )


def _consequences(member: MemberScale) -> Iterator[str]:
    verb = "acts as"
    for rate in member.rates[:1]:
        if rate.response.kind == "proportional" and rate.effective_built:
            yield f"lr {rate.built:.4g} {verb} {rate.effective_built:.4g}"
            verb = "as"
        if rate.effective_decay is not None and rate.decay and rate.effective_decay != rate.decay:
            yield f"decay {rate.decay:.4g} {verb} {rate.effective_decay:.4g}"


def _meaning(member: MemberScale, expected: float, *, alike: bool) -> str:
    if member.multiple is None:
        return "Such a gradient is no multiple of the member's own: something else is added to it."
    if not member.multiple:
        return "A member of which nothing is left is not trained at all."
    if not expected:
        return "The member is trained, but is claimed not to be."
    if {rate.response.kind for rate in member.rates} == {"invariant"}:
        return (
            f"{member.rates[0].response.name} does not see the scale of a gradient but for eps: lr "
            "acts as it is set, and only weight decay that goes through the gradient changes."
        )
    by, over = "that part", "its inverse"
    if alike:
        by, over = fraction(member.multiple / expected), fraction(expected / member.multiple)
    return (
        f"Under SGD, whatever its momentum, this is exactly a training at {by} of the learning "
        f"rate and {over} times the weight decay."
    )


def _added(
    scale: LossScale, expected: Mapping[str, float], designed: Sequence[tuple[str, bool]]
) -> Iterator[Finding]:
    """Where members share weights, what arrives there is the multiple of nobody's gradient."""
    found: dict[tuple[str, ...], list[tuple[str, Overlap]]] = {}
    for member in scale.members:
        for overlap in member.shared:
            wrong = not near(overlap.multiple, expected[member.member], member.precision)
            if wrong and not _is_designed(overlap.names, designed):
                found.setdefault(overlap.names, []).append((member.member, overlap))
    members = list(dict.fromkeys(name for those in found.values() for name, _ in those))
    explained = _TEXTS["added gradients"]
    if all(len(n) >= max(2, len(those[0][1].members)) for n, those in found.items()):
        common = in_common(members, whole=scale.one_network)
        explained = common if scale.one_network else {**common, "meaning": explained["meaning"]}
    by_name = "What is shared by design is claimed by name: shared=[...]."
    explained = {**explained, "remedy": f"{explained['remedy']} {by_name}".strip()}
    for names, those in found.items():
        among = those[0][1].members
        multiples = [_part(overlap.multiple, "it") for _, overlap in those]
        wanted = [_part(expected[name], "one gradient alone") for name, _ in those]
        yield Finding(
            kind="added gradients",
            place=names[0] if names else "an unregistered parameter",
            members=among,
            expected=" or ".join(sorted({*wanted})),
            found=f"{' or '.join(sorted({*multiples}))}: members {listed(among)} add up",
            amount=those[0][1].multiple,
            **explained,
        )


def _is_designed(names: Sequence[str], designed: Sequence[tuple[str, bool]]) -> bool:
    """Whether a name, with its member in front or without, is claimed to be shared."""
    for name in names:
        written = (name, name.partition(".")[2])
        fits = (said for pattern, said in designed if any(fnmatchcase(n, pattern) for n in written))
        if next(fits, False):
            return True
    return False


def _softmaxes(scale: LossScale) -> Iterator[Finding]:
    for member in scale.members:
        if member.classes:
            most = math.log(math.e + member.classes - 1)
            yield _finding(
                "second softmax",
                member,
                found=f"cross-entropy of {member.classes} classes stays between "
                f"{most - 1:.5f} and {most:.5f}, whatever is predicted",
                amount=most - 1,
            )


def _clippings(scale: LossScale, claimed: str | None) -> Iterator[Finding]:
    if claimed == "member" and all(member.clipped is None for member in scale.members):
        raise ValueError("clipping is claimed to couple no members, but there is none: give clip=.")
    for member in scale.members:
        if member.clipped and claimed != "joint":
            found = "its gradient is clipped away when those of others are large"
            yield _finding("joint clipping", member, found=found)


# --- rates --------------------------------------------------------------------------------------


def _of_rates(scale: LossScale, claim: LossScaleClaim) -> Iterator[Finding]:
    rates = [(member, rate) for member in scale.members for rate in member.rates]
    several = len({rate.group for _, rate in rates}) > 1
    claimed = single_schedule(claim.lr, scale.steps) if rates else ()
    for member, rate in rates:
        at = f"member {member.member}" + (f", group {rate.group}" if several else "")
        yield from _of_numbers(scale, member, rate, claim, at)
        if claimed and rate.effective is not None:
            yield from _scheduled(scale, member, rate, claimed, at)
        if claim.warmup is not None:
            yield from _warmed_up(member, rate, claim.warmup, at)


def _refuse_unknown(scale: LossScale, claim: LossScaleClaim) -> None:
    """Refuses to say that rates are as claimed where that is not known."""
    bare = [member.member for member in scale.members if not member.rates]
    if bare:
        raise ValueError(
            f"no optimizer group holds parameters of member {listed(bare)}, so that it has no "
            "rates. Give optimizer=a function of the model; the coverage check says what it lacks."
        )
    if claim.lr is None and claim.weight_decay is None:
        return
    for member, rate in ((m, rate) for m in scale.members for rate in m.rates):
        if rate.effective is None:
            raise ValueError(
                f"member {member.member} has no effective rates to compare: {rate.response.name} "
                "neither scales its update with the gradient nor ignores the scale, or its "
                f"gradient ({fraction(member.multiple)} of its gradient alone) is no training "
                "alone."
            )
        if isinstance(claim.lr, (int, float)) and rate.absolute:
            raise ValueError(
                f"lr={claim.lr:.4g} does not say what a single model's rate is at step "
                f"{rate.absolute[0]}, because the schedule holds absolute rates (eta_min, a "
                "warm-up's start, max_lr), which may have been scaled or not. Give lr=a function "
                "of a list of parameters that builds the single model's optimizer and returns its "
                "scheduler."
            )


def _looked_at(scale: LossScale, claim: LossScaleClaim) -> tuple[Count, ...]:
    """Rates that are not known were not compared."""
    rates = [rate for member in scale.members for rate in member.rates]
    of = len(rates) + sum(not member.rates for member in scale.members)
    effective = claim.lr is not None or claim.weight_decay is not None
    seen = Count(sum(not effective or r.effective is not None for r in rates), "rate", of=of)
    return () if seen.complete else (seen,)


def _otherwise(
    scale: LossScale, member: MemberScale, at: str, expected: str, found: float
) -> Finding:
    meaning = f"{_TEXTS['other rates']['meaning']} {scale.told[:1].upper()}{scale.told[1:]}."
    said = {"expected": expected, "found": f"{found:.4g}", "amount": found, "meaning": meaning}
    return _finding("other rates", member, at, **said)


def _of_numbers(
    scale: LossScale, member: MemberScale, rate: Rate, claim: LossScaleClaim, at: str
) -> Iterator[Finding]:
    built, lr, decay = rate.effective_built, claim.lr, claim.weight_decay
    if built is None:
        return
    if isinstance(lr, (int, float)) and not close(built, lr, member.precision):
        yield _otherwise(scale, member, at, f"lr {lr:.4g}", built)
    bare = not any(other.decay for other in member.rates)  # biases and norms often have none
    if decay is not None and (rate.decay or bare):
        found = rate.effective_decay or 0.0
        if not close(found, decay, member.precision):
            yield _otherwise(scale, member, at, f"weight decay {decay:.4g}", found)


def _scheduled(
    scale: LossScale, member: MemberScale, rate: Rate, claimed: Sequence[float], at: str
) -> Iterator[Finding]:
    effective, built = rate.effective or (), rate.effective_built
    pairs = list(enumerate(zip(effective, claimed, strict=True)))
    off = {i: abs(x - y) for i, (x, y) in pairs if not close(x, y, member.precision)}
    if not off:
        return
    step = max(off, key=lambda i: off[i])
    at, expected, found = f"{at}, step {step}", f"lr {claimed[step]:.4g}", effective[step]
    said = partial(_finding, member=member, at=at, expected=expected, amount=found)
    times = times_as_fast(effective, claimed)
    if times:
        told = f"{found:.4g}, the rate of step {times * step}"
        meaning = f"The schedule goes {times} times as fast as the training."
        yield said("fast schedule", found=told, meaning=meaning)
    elif rate.absolute and built and not in_proportion(effective, claimed):
        by = (claimed[step] - found) * rate.built / built
        told = f"{found:.4g}, set {abs(by):.4g} too {'low' if by > 0 else 'high'}"
        yield said("absolute rate", found=told)
    else:
        yield _otherwise(scale, member, at, expected, found)


def _warmed_up(member: MemberScale, rate: Rate, warmup: float, at: str) -> Iterator[Finding]:
    full, rates = rate.built, rate.scheduled
    due = min(math.ceil(warmup), len(rates) - 1)
    peak = max(range(len(rates)), key=lambda i: (rates[i], -i))
    found = partial(_finding, "warm-up", member)
    if rates[peak] > full and not close(rates[peak], full):
        most, top = f"lr at most {full:.4g}", rates[peak]
        yield found(f"{at}, step {peak}", expected=most, found=f"{top:.4g}", amount=top)
    elif not any(close(x, full) for x in rates[: due + 1]):
        wanted, reached = f"lr {full:.4g}", rates[due]
        yield found(f"{at}, step {due}", expected=wanted, found=f"{reached:.4g}", amount=reached)
    elif warmup > 1 and close(rates[0], full):
        wanted = f"a warm-up of {warmup:g} steps"
        yield found(f"{at}, step 0", expected=wanted, found="the full rate at once", amount=full)
