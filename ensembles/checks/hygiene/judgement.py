"""Whether state is registered, and moves only when it should; whether a snapshot is a copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from ensembles.checks.hygiene.claim import HygieneClaim
from ensembles.checks.hygiene.hidden_state import memory_of
from ensembles.checks.hygiene.measurement import KINDS, StateHygiene
from ensembles.findings import Count, Finding, Findings
from ensembles.handling.registered_tensors import registered
from ensembles.message import assert_held
from ensembles.subject import Model

__all__ = ["assert_snapshot_detached", "assert_state_clean", "judge"]


def assert_state_clean(hygiene: StateHygiene, *, updates: int = HygieneClaim.updates) -> None:
    """Checks that state is registered, and moves only when it should.

    Args:
        hygiene: From `measure_state_hygiene`.
        updates: How often the statistics of a norm move in one training step: N where N streams
            go through one network. A norm that the step does not call is let pass.

    Raises:
        ValueError: If there is none, and not all below the model was searched for what is hidden.
        AssertionError: If there is any finding, or a norm updates another number of times.

    Example:
        >>> from ensembles import measure_state_hygiene
        >>> assert_state_clean(measure_state_hygiene(nn.BatchNorm1d(3), torch.randn(4, 3)))
    """
    __tracebackhide__ = True
    assert_held(judge(hygiene, HygieneClaim(updates)))


def judge(hygiene: StateHygiene, claim: HygieneClaim) -> Findings:
    """What is not in order, and norms that update another number of times than claimed.

    Raises:
        ValueError: If nothing was found, and not all below the model was searched.
    """
    claimed = _a_step(claim.updates)
    wrong = [
        Finding(kind="norm updates", place=name, expected=claimed, found=_a_step(n), amount=n)
        for name, n in hygiene.updates
        if n not in (0, claim.updates)
    ]
    items = sorted([*hygiene.findings, *wrong], key=lambda one: KINDS.index(one.kind))
    if not items and not hygiene.all_searched:
        raise ValueError(
            f"the first {hygiene.searched:,} objects below the model were searched for hidden "
            "modules and tensors, but there are more, of which nothing is known. Usual cause: a "
            "data set that is an attribute of the model. Keep it outside of the model, or in "
            "tensors."
        )
    sentence = "state is claimed to be registered and to move only when it should"
    return Findings(
        claim=f"{sentence}, but {_KINDS[items[0].kind].but}" if items else sentence,
        items=tuple(map(_explained, items)),
        affected=tuple(_affected(hygiene, items)),
        looked_at=tuple(_looked_at(hygiene)),
    )


def assert_snapshot_detached(snapshot: Any, model: Model) -> None:
    """Checks that a snapshot of weights is a copy, and not the live weights under another name.

    Args:
        snapshot: What was kept: a state_dict, a list or dict of tensors or of such, or modules.
        model: What it was taken of, and is trained on.

    Raises:
        ValueError: If the snapshot holds no tensors.
        AssertionError: If a tensor of the snapshot is memory of the model.

    Example:
        >>> import copy
        >>> net = nn.Linear(3, 2)
        >>> assert_snapshot_detached(copy.deepcopy(net.state_dict()), net)
    """
    __tracebackhide__ = True
    kept = list(_tensors_of(snapshot, "snapshot"))
    if not kept:
        raise ValueError(
            f"the snapshot, an object of type {type(snapshot).__name__}, holds no tensors: there "
            "is nothing to compare. Give what model.state_dict() returned, or the copied modules."
        )
    live = {memory_of(e.tensor): e.names[0] for e in registered(model) if e.tensor.numel()}
    found = [
        Finding(kind="alias", place=place, found=f"is the live memory of {live[memory_of(tensor)]}")
        for place, tensor in kept
        if tensor.numel() and memory_of(tensor) in live
    ]
    claim = "a snapshot is claimed to keep past weights, but holds the live ones"
    affected = (Count(len(found), "tensor", of=len(kept)),)
    assert_held(Findings(claim=claim, items=tuple(map(_explained, found)), affected=affected))


def _a_step(updates: int) -> str:
    return f"{Count(updates, 'update')} a step"


def _explained(found: Finding) -> Finding:
    words = _KINDS[found.kind]
    return replace(found, meaning=words.meaning, cause=words.cause, remedy=words.remedy)


def _affected(hygiene: StateHygiene, items: list[Finding]) -> Iterator[Count]:
    for noun, total in (("registered tensor", hygiene.tensors), ("norm", len(hygiene.updates))):
        if places := {one.place for one in items if _KINDS[one.kind].noun == noun}:
            yield Count(len(places), noun, of=total)


def _looked_at(hygiene: StateHygiene) -> Iterator[Count]:
    if not hygiene.all_searched:  # how many there are is not known
        yield Count(hygiene.searched, "object of the model, but there are more")


def _tensors_of(thing: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(thing, Tensor):
        yield path, thing
    elif isinstance(thing, nn.Module):
        for name, tensor in thing.state_dict(keep_vars=True).items():
            yield from _tensors_of(tensor, f"{path}.{name}")
    elif isinstance(thing, (Mapping, list, tuple)):
        pairs = thing.items() if isinstance(thing, Mapping) else enumerate(thing)
        for key, value in pairs:
            yield from _tensors_of(value, f"{path}[{key!r}]")


# --- words --------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """How a kind of finding is told, and of what its places are some."""

    but: str
    meaning: str
    cause: str
    remedy: str
    noun: str = ""


_KINDS = {
    "hidden module": _Kind(
        "modules() does not list all that a call uses",
        "What is hidden is absent from to(), train(), eval() and state_dict().",
        "modules in a Python list or dict",
        "Use nn.ModuleList or nn.ModuleDict, or make the module an attribute.",
    ),
    "hidden tensor": _Kind(
        "a call computes with tensors that are not registered",
        "A tensor that is no buffer stays where it is when the model moves, and is not saved.",
        "self.mask = torch.ones(...)",
        "Write self.register_buffer(name, tensor).",
    ),
    "stays behind": _Kind(
        "a move of the model does not move all of it",
        "A move of the model leaves this on the device where it was.",
        "an own _apply() that puts tensors back, or does not call super()._apply(fn, recurse)",
        "Let _apply() move everything, and return what it got from super().",
        "registered tensor",
    ),
    "mode": _Kind(
        "modes are not what train() and eval() set",
        "Part of the model is in another mode than the rest, or changes when a mode is set again.",
        "an own train() that does not reach every child, or a forward() that sets a mode",
        "Let train() call super().train(mode) and return self; set no mode in forward().",
    ),
    "requires_grad": _Kind(
        "a call changes which parameters are trained",
        "What is frozen when backward() runs gets no gradient, and an optimizer that is built "
        "after the call gets other parameters.",
        "a forward() that calls requires_grad_() and does not put the flags back",
        "Freeze where the model is built. What forward() changes for a while, it puts back before "
        "it returns.",
        "registered tensor",
    ),
    "moves in eval": _Kind(
        "a call in eval mode changes it",
        "What evaluation reports depends on how often, and on what, the model was called before.",
        "a forward() that writes to a buffer or an attribute in every mode",
        "Change state only if self.training.",
    ),
    "stale": _Kind(
        "evaluation uses what was computed from past weights",
        "After training, evaluation still predicts with values of the weights before it.",
        "a cache of something that was computed from weights",
        "Drop it in train(), or compute it in each call.",
    ),
    "random in eval": _Kind(
        "evaluation depends on the random state",
        "Two evaluations of one model differ.",
        "F.dropout(x, p), which drops in every mode",
        "Write F.dropout(x, p, training=self.training).",
    ),
    "global state": _Kind(
        "a call changes the state of the whole program",
        "A call decides what the whole program draws next, or whether it can train.",
        "torch.manual_seed or torch.set_grad_enabled in forward()",
        "Seed once, outside; draw a constant in the constructor; use with torch.no_grad().",
    ),
    "changes the batch": _Kind(
        "a call writes into the batch",
        "Whoever reads the batch next, such as another member, reads other values.",
        "an operation in place on what forward() is given",
        "Write x = x * 2, and use ReLU(inplace=True) only behind a layer.",
    ),
    "norm updates": _Kind(
        "norms do not update their statistics as often as claimed",
        "Where running statistics move n times a step, momentum m acts as 1 - (1 - m)^n.",
        "several streams, subnets or a recomputed checkpoint that go through one norm",
        "Give each its own norm, or claim the number.",
        "norm",
    ),
    "frozen moves": _Kind(
        "what is frozen moves in training",
        "What is frozen changes, and with it every output.",
        "requires_grad_(False), which leaves statistics running, or gradients of before the freeze",
        "Keep a frozen norm in eval mode by an own train(), and set old gradients to None.",
        "registered tensor",
    ),
    "drifting": _Kind(
        "weights move in steps whose loss does not use them",
        "Momentum and weight decay move weights that the loss of the step does not use.",
        "a loss that is multiplied by 0, so that gradients are zero and not None",
        "Leave the loss out instead.",
        "registered tensor",
    ),
    "masked moves": _Kind(
        "weights move behind their mask",
        "What a mask hides is trained: norms, decay and pruning see the whole weight.",
        "a weight that is normalised before it is masked, or decay of weights that are not zero",
        "Mask the weight before it is normalised, and once for good (weight.mul_(mask)), so that "
        "decay finds zeros.",
        "registered tensor",
    ),
    "averaged norm": _Kind(
        "averaged weights predict with statistics of other weights",
        "A norm that predicts has averaged weights, but statistics of other weights.",
        "an average of parameters only",
        "Average the buffers too, or call torch.optim.swa_utils.update_bn before it predicts.",
    ),
    "alias": _Kind(
        "a snapshot in the model is the live weights",
        "After more training, such a snapshot is the last model and not the best.",
        "best = model.state_dict(), which holds the live tensors",
        "Write copy.deepcopy(model.state_dict()).",
    ),
}
