"""Whether a call costs what is claimed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import NamedTuple, Unpack

from ensembles.checks.cost.claim import BUDGETS, Budgets, CostClaim
from ensembles.checks.cost.measurement import ComputeCost, percent
from ensembles.findings import Count, Finding, Findings
from ensembles.message import Explanation, assert_held, listed

__all__ = ["assert_cost_equals", "assert_cost_within", "judge"]


def assert_cost_within(cost: ComputeCost, **budgets: Unpack[Budgets]) -> None:
    """Checks that a call costs no more than its budgets.

    Args:
        cost: From `measure_compute_cost`.
        **budgets: One or more of `flops`, `forward`, `backward` (FLOPs), `parameters`, `buffers`
            (elements), `kept_bytes` (for the backward pass), each a whole number, and `wasted`,
            the share of FLOPs that multiply by structural zeros, 0 to 1.

    Raises:
        ValueError: If there is no budget, if it is no such number, or if it is about something
            that was not looked at.
        AssertionError: If the cost exceeds a budget.

    Example:
        >>> from ensembles import measure_compute_cost
        >>> cost = measure_compute_cost(nn.Linear(3, 4), torch.randn(2, 3))
        >>> assert_cost_within(cost, flops=100, parameters=16, wasted=0)
    """
    __tracebackhide__ = True
    assert_held(judge(cost, CostClaim(budgets)))


def assert_cost_equals(cost: ComputeCost, **budgets: Unpack[Budgets]) -> None:
    """Checks that a call costs exactly what is claimed.

    Args:
        cost: From `measure_compute_cost`.
        **budgets: As for `assert_cost_within`; `wasted` is exact as a `Fraction`.

    Raises:
        ValueError: As for `assert_cost_within`.
        AssertionError: If the cost is another.

    Example:
        >>> from ensembles import measure_compute_cost
        >>> cost = measure_compute_cost(nn.Linear(3, 4), torch.randn(2, 3))
        >>> assert_cost_equals(cost, forward=48, parameters=16)
    """
    __tracebackhide__ = True
    assert_held(judge(cost, CostClaim(budgets, exact=True)))


def judge(cost: ComputeCost, claim: CostClaim) -> Findings:
    """Which budgets are exceeded (if exact: missed), and by which layers."""
    _refuse(cost, claim)
    found: dict[str, float | Fraction] = {name: getattr(cost, name) for name in claim.budgets}
    broken = [
        name
        for name, limit in claim.budgets.items()
        if (found[name] != limit if claim.exact else found[name] > limit)
    ]
    at_most = "" if claim.exact else "at most "
    clauses = []
    for name in broken or claim.budgets:
        verb, told = _MEASURES[name].verb, _told(name, claim.budgets[name])
        but = f", but {verb}s {_number(name, found[name])}" if broken else ""
        clauses.append(f"to {verb} {at_most}{told}{but}")
    findings = [list(_exceeded(cost, name, claim, found[name])) for name in broken]
    costly = len(findings[0]) - 1 if findings else 0
    return Findings(
        claim=f"{'a training step' if cost.training else 'a prediction'} is claimed "
        f"{', and '.join(clauses)}",
        items=tuple(item for items in findings for item in items),
        affected=(Count(costly, "layer", of=len(cost.layers)),) if costly else (),
        looked_at=tuple(_looked_at(cost)) if "wasted" in claim.budgets else (),
    )


def _refuse(cost: ComputeCost, claim: CostClaim) -> None:
    """Refuses budgets of nothing, and of what was not looked at."""
    budgets = claim.budgets
    if not budgets:
        raise ValueError(
            "no budget was given: there is nothing to compare. Give one or more of "
            f"{', '.join(BUDGETS)}."
        )
    if "wasted" in budgets and cost.wasted is None:
        raise ValueError(
            "zeros were not looked for, because there are no numbers on the meta device. Measure "
            "the model on a real device, or leave out wasted=..."
        )
    if "kept_bytes" in budgets and not cost.training:
        raise ValueError(
            "a prediction keeps nothing for a backward pass: measure the cost with training=True, "
            "or leave out kept_bytes=..."
        )
    if cost.uncounted and budgets.keys() & {"flops", "forward", "backward"}:
        raise ValueError(
            f"there is no formula for the FLOPs of {listed(cost.uncounted)}, which the model "
            "calls, so that a budget would say nothing."
        )


def _looked_at(cost: ComputeCost) -> Iterator[Count]:
    """Zeros are not looked for in operations without a formula."""
    if cost.uncounted:
        kinds = {op.name.rstrip(" 0123456789") for layer in cost.layers for op in layer.operations}
        yield Count(len(kinds), "kind of product", of=len(kinds) + len(cost.uncounted))


# --- findings -----------------------------------------------------------------------------------


class _Measure(NamedTuple):
    """How a measure is told: a step <verb>s so many <unit>, and more <noun> than claimed."""

    verb: str
    unit: str
    noun: str


_MEASURES = {
    "flops": _Measure("take", "FLOPs", "FLOPs"),
    "forward": _Measure("take", "FLOPs forward", "FLOPs forward"),
    "backward": _Measure("take", "FLOPs backward", "FLOPs backward"),
    "parameters": _Measure("use", "parameters", "parameters"),
    "buffers": _Measure("use", "elements of buffers", "buffers"),
    "kept_bytes": _Measure("keep", "bytes", "bytes kept"),
    "wasted": _Measure("spend", "of FLOPs on zeros", "zeros"),
}

_FLOPS = Explanation(
    meaning="Every step computes more than is claimed, and takes longer.",
    cause="a masked layer at full width, a network that is called once too often, or a larger "
    "batch or width",
    remedy="Compare the table of `print(cost)` with an older one.",
)
_DEARER: Mapping[str, Explanation] = {
    "flops": _FLOPS,
    "forward": _FLOPS,
    "backward": _FLOPS,
    "parameters": Explanation(
        meaning="There are more weights to train, store and send than are claimed.",
        cause="a layer that was meant to be tied but is a copy, or one that nothing uses",
        remedy="Tie by assigning the Parameter itself: b.weight = a.weight.",
    ),
    "buffers": Explanation(
        meaning="There are more buffers to store and send than are claimed.",
        cause="masks or statistics that every member registers for itself",
        remedy="",
    ),
    "kept_bytes": Explanation(
        meaning="A step needs more memory than is claimed, and fits smaller batches.",
        cause="masked copies of weights, activations at full width that are mostly zero, or a "
        "forward pass that runs twice",
        remedy="Compute with blocks of the weight, or use activation checkpointing.",
    ),
    "wasted": Explanation(
        meaning="Such products take time and change nothing.",
        cause="a subnet that is its parent under a mask, or outputs that nobody reads, whose "
        "gradients are zero",
        remedy="Compute with the block of the weight that is not zero, on the channels that are "
        "not zero.",
    ),
}
_CHEAPER = Explanation(
    meaning="It costs less than is claimed.",
    cause="a layer that forward no longer calls, a smaller batch or width, or work that was saved",
    remedy="Claim the new cost if it is meant.",
)


def _exceeded(
    cost: ComputeCost, name: str, claim: CostClaim, found: float | Fraction
) -> Iterator[Finding]:
    """What a call costs in all, and then every layer that has a part in it, the dearest first."""
    limit = claim.budgets[name]
    dearer = found > limit
    kind = f"{'more' if dearer else 'fewer'} {_MEASURES[name].noun}"
    explained = _DEARER[name] if dearer else _CHEAPER
    times = f", {float(found / limit):.4g} times as many" if limit and name != "wasted" else ""
    yield Finding(
        kind=kind,
        place="in all",
        expected=("" if claim.exact else "at most ") + _told(name, limit),
        found=_told(name, found) + times,
        amount=float(found),
        **explained,
    )
    attribute = "wasted_flops" if name == "wasted" else name
    layers = () if name == "buffers" else cost.layers  # those are not counted by layer
    for layer in sorted(layers, key=lambda layer: -getattr(layer, attribute)):
        if part := getattr(layer, attribute):
            of_flops = f"{percent(layer.wasted)} of {layer.flops:,} FLOPs"
            yield Finding(
                kind=kind,
                place=layer.name or "(model)",
                found=of_flops if name == "wasted" else _told(name, part),
                amount=float(getattr(layer, name)),
                **explained,
            )


def _number(name: str, number: float | Fraction) -> str:
    return percent(number) if name == "wasted" else f"{number:,}"


def _told(name: str, number: float | Fraction) -> str:
    return f"{_number(name, number)} {_MEASURES[name].unit}"
