"""Whether the optimizer steps every trainable parameter once, and each gets a gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from ensembles.checks.coverage.claim import CoverageClaim
from ensembles.checks.coverage.measurement import OptimizerCoverage
from ensembles.findings import Count, Finding, Findings
from ensembles.message import Explanation, assert_held, in_common

__all__ = ["assert_optimizer_complete", "judge"]


def assert_optimizer_complete(coverage: OptimizerCoverage) -> None:
    """Checks that every trainable parameter is stepped exactly once and has a gradient.

    Args:
        coverage: From `measure_optimizer_coverage`; what it did not look at is not judged.

    Raises:
        AssertionError: If there is any finding.

    Example:
        >>> from ensembles import measure_optimizer_coverage
        >>> net = nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> coverage = measure_optimizer_coverage(net, torch.randn(3, 4), optimizer=optimizer)
        >>> assert_optimizer_complete(coverage)
    """
    __tracebackhide__ = True
    assert_held(judge(coverage, CoverageClaim()))


def judge(coverage: OptimizerCoverage, claim: CoverageClaim) -> Findings:
    """Where training does not do what it seems to do."""
    items = tuple(replace(found, **_explained(coverage, found)) for found in coverage.findings)
    sentence = "every trainable parameter is claimed to get a gradient and exactly one step"
    unseen = Count(0, "gradient", of=len(coverage.trainable))
    return Findings(
        claim=f"{sentence}, but {_KINDS[items[0].kind].but}" if items else sentence,
        items=items,
        affected=tuple(_affected(coverage)),
        looked_at=() if coverage.called else (unseen,),
    )


def _affected(coverage: OptimizerCoverage) -> Iterator[Count]:
    places = {found.place for found in coverage.findings}
    trainable = set(coverage.trainable)
    if touched := len(places & trainable):
        yield Count(touched, "trainable parameter", of=len(coverage.trainable))
    for kind, words in _KINDS.items():
        others = [place for place in coverage.places(kind) if place not in trainable]
        if words.noun and others:
            yield Count(len(others), words.noun)


def _explained(coverage: OptimizerCoverage, found: Finding) -> Explanation:
    words = _KINDS[found.kind]
    if found.kind != "repeated" or not found.members:
        return Explanation(meaning=words.meaning, cause=words.cause, remedy=words.remedy)
    whole = found.members in coverage.one_networks
    common = in_common(found.members, whole=whole)
    return Explanation(
        meaning=f"{words.meaning} {common['meaning']}",
        cause=common["cause"],
        remedy=common["remedy"] if whole else "Make it in each member, or list it once.",
    )


class _Kind(NamedTuple):
    """How a kind of finding is told; `noun` for its places that are no trainable parameters."""

    but: str
    meaning: str
    cause: str
    remedy: str
    noun: str = ""


_KINDS = {
    "missing": _Kind(
        "some are in no group of the optimizer",
        "What is in no group keeps its initial values.",
        "groups made by hand, or by the rule of another model",
        "Build the groups from model.parameters() of every member.",
    ),
    "repeated": _Kind(
        "some are listed several times",
        "What is listed several times is stepped and decayed several times.",
        "groups made by hand that list a weight again, such as a tied one under each of its names",
        "List it once, as model.parameters() does.",
    ),
    "several objects": _Kind(
        "some are several Parameters over one memory",
        "The optimizer steps and decays such memory once for each Parameter.",
        "nn.Parameter(other.weight) or .data",
        "Assign the Parameter itself: b.weight = a.weight.",
    ),
    "stale": _Kind(
        "the optimizer steps tensors that are not in the model",
        "The optimizer steps stale tensors in vain: the model computes with others.",
        "layers that were replaced, or members that were added, after the optimizer was built",
        "Build the optimizer when the model is final.",
        "stale entry",
    ),
    "unregistered": _Kind(
        "parameters() does not list all that forward() uses",
        "What is unregistered is absent from parameters(), to() and state_dict().",
        "modules in a Python list or dict, or nn.Parameter(...).to(device), which returns a tensor",
        "Use nn.ModuleList, ModuleDict or ParameterList; wrap last: nn.Parameter(x.to(device)).",
        "unregistered tensor",
    ),
    "unused output": _Kind(
        "the loss does not use every member",
        "A member whose output the loss does not use learns nothing.",
        "a loss that leaves a member out, or multiplies its part by 0",
        "Add its output to the loss, or freeze the member.",
        "unused output",
    ),
    "without gradient": _Kind(
        "some get no gradient",
        "What has no gradient is never trained.",
        "detach, .data, no_grad, use_reentrant=True, or a layer that forward() does not use",
        "Mend it, or freeze what is not to be trained.",
    ),
    "zero gradient": _Kind(
        "some have gradient zero, whatever their values are",
        "Such a parameter is decayed, but never trained.",
        "a mask, or a block that reads channels which are always zero",
        "Let the layer read channels that are used, or freeze what is not to be trained.",
    ),
    "stuck at zero": _Kind(
        "some can never leave zero",
        "Of two factors that are both zero, neither ever gets a gradient.",
        "an initialisation that sets both factors of a product to zero",
        "Draw one of the two, as LoRA draws A and sets B to zero.",
    ),
    "rate zero": _Kind(
        "some have a learning rate of 0",
        "What is stepped at rate 0 keeps its initial values.",
        "a rate of 0 in place of a freeze, or a warm-up that is built later",
        "Freeze such parameters, or build the warm-up in the function that builds the optimizer.",
    ),
    "false freeze": _Kind(
        "what seems frozen is trained",
        "Such an assignment freezes nothing: the parameters are trained.",
        "module.requires_grad = False, which sets a new attribute that nothing reads",
        "Call module.requires_grad_(False).",
        "false freeze",
    ),
    "undone freeze": _Kind(
        "what was frozen is trained",
        "Training changes weights that it is meant to keep.",
        "an own train() or forward() that calls requires_grad_(True) on more than it means to",
        "Leave out what is frozen.",
        "undone freeze",
    ),
    "frozen in forward": _Kind(
        "forward() freezes some before backward() runs",
        "What is frozen when backward() runs gets no gradient from it.",
        "a forward() that makes one part at a time trainable, and leaves the others frozen",
        "Let forward() put the flags back before it returns.",
        "frozen parameter",
    ),
}
