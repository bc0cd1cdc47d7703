"""Promise: training reaches every trainable parameter, and steps each of them exactly once.

Catches parameters that the optimizer never got or got twice, optimizers of a model that has
changed since, members in a Python list, tensors that forward uses and nothing registers, branches
that are cut from the loss, pairs of factors that are both zero, rates of zero, and freezes that
froze nothing, or what forward has used.

Healthy networks stay silent: a gradient that is zero or missing at the present values is a
finding only where the parameter reaches no output by structure either, in train or in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ensembles.checks.sharing import measure_parameter_sharing
from ensembles.message import aligned, broken, counted, listed, told_in_common
from ensembles.probes.flow import Flow, gradient_flow
from ensembles.probes.homes import homes_of
from ensembles.probes.registers import Registered, holders_of, one_network, registered
from ensembles.probes.state import preserved
from ensembles.probes.training import Loss, optimizers_of
from ensembles.subject import Model, Outputs, checked_numbers, named_modules_of

__all__ = [
    "Finding",
    "OptimizerCoverage",
    "assert_optimizer_complete",
    "measure_optimizer_coverage",
]


@dataclass(frozen=True, order=True)
class Finding:
    """One place where training does not do what it seems to do.

    Attributes:
        kind: A key of `Finding.KINDS`.
        place: The parameter's name, or where the tensor was found.
        detail: What was found there.
        cause: The usual cause and what to do, where the kind has several; "" where it has one.
    """

    kind: str
    place: str
    detail: str
    cause: str = field(default="", compare=False)

    KINDS = (
        "missing",
        "repeated",
        "stale",
        "unregistered",
        "without gradient",
        "zero gradient",
        "stuck at zero",
        "rate zero",
        "false freeze",
        "undone freeze",
        "frozen in forward",
    )


@dataclass(frozen=True)
class OptimizerCoverage:
    """What training reaches, and what it does not.

    Attributes:
        trainable: The names of all trainable parameters; a tied one under its first name.
        optimizers: How many optimizers were looked at; 0 if none was given.
        called: Whether the model was called, so that gradients and unregistered tensors are known.
        findings: All places where training does not do what it seems to do, kind by kind.
    """

    trainable: tuple[str, ...]
    optimizers: int
    called: bool
    findings: tuple[Finding, ...]

    def places(self, kind: str) -> tuple[str, ...]:
        """The places of one kind of finding, such as "missing" or "unregistered".

        Raises:
            ValueError: If there is no such kind.
        """
        if kind not in Finding.KINDS:
            raise ValueError(f"{kind!r} is no kind of finding: {', '.join(Finding.KINDS)}.")
        return tuple(found.place for found in self.findings if found.kind == kind)

    def __str__(self) -> str:
        looked = [
            *([counted(range(self.optimizers), "optimizer")] if self.optimizers else []),
            *(["gradients"] if self.called else []),
        ]
        head = (
            f"{counted(self.trainable, 'trainable parameter')}, "
            f"{counted(self.findings, 'finding')} ({' and '.join(looked)} looked at)"
        )
        rows = aligned([(found.place, found.kind, found.detail) for found in self.findings])
        return "\n".join([head, *(f"  {row}" for row in rows)])


def measure_optimizer_coverage(
    model: Model,
    optimizer: Optimizer | Sequence[Optimizer] | Callable[[Any], Any] | None = None,
    batch: Any = None,
    *,
    outputs: Outputs | None = None,
    loss: Loss | None = None,
) -> OptimizerCoverage:
    """Finds the parameters that training does not reach, or reaches more than once.

    Gradients are those of the training loss in train mode, or of a random projection of all
    outputs. Where one is missing or zero in every element, the structure decides:
    `ensembles.probes.influence` says whether the parameter reaches an output when weights are
    generic and activations transparent, in train or in eval mode. So zero-initialised branches,
    dead ReLUs, dropped blocks and auxiliary heads are no findings, and a detached branch is one.

    And so that an expert to which hard routing sends no row of this batch is not taken for cut,
    other weights are drawn before something is.

    Limits: with many more experts than rows some stay without any row, and count as cut. Tensors
    behind a re-entrant checkpoint are not in the autograd graph, so unregistered ones are not
    found there.

    Args:
        model: One module, or the members as a list or dict of modules.
        optimizer: The optimizer, a list of them (one for each member, say), or a function of the
            model that builds them. Without it, groups are not looked at.
        batch: What the model is called with. Without it, gradients are not looked at.
        outputs: Splits what one module returns into member outputs.
        loss: The training loss, a function of the dict of member outputs; every member's output
            must have a gradient in it.

    Returns:
        The measurement. The model, its gradients, the optimizer and the random generators are as
        before.

    Raises:
        ValueError: If neither optimizer nor batch is given, the model has no trainable
            parameters, or something given does not fit.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> net[1] = nn.Linear(4, 3)
        >>> print(measure_optimizer_coverage(net, optimizer, torch.randn(5, 4)))
        4 trainable parameters, 4 findings (1 optimizer and gradients looked at)
          model.1.weight                      missing   in no group
          model.1.bias                        missing   in no group
          optimizer 0, group 0, position 2    stale     shape (2, 4), not in the model
          optimizer 0, group 0, position 3    stale     shape (2,), not in the model
    """
    if optimizer is None and batch is None:
        raise ValueError(
            "neither an optimizer nor a batch was given, so that there is nothing to look at. "
            "Give optimizer=, and batch= to have gradients looked at too."
        )
    checked_numbers(model)
    false_freezes = tuple(_false_freezes(model))
    flow = Flow()
    # What the function that builds the optimizer freezes is frozen here, and what it replaces
    # afterwards is what is trained.
    with preserved(model):
        optimizers = _given_optimizers(optimizer, model)
        parameters = {
            id(entry.tensor): entry
            for entry in registered(named_modules_of(model))
            if entry.kind == "parameter"
        }
        if batch is not None:
            with torch.inference_mode(False), torch.enable_grad():
                flow = gradient_flow(model, batch, outputs=outputs, loss=loss)
        trainable = {key: entry for key, entry in parameters.items() if entry.tensor.requires_grad}
        if not trainable and not flow.lost:
            raise ValueError(
                "the model registers no trainable parameters: there is nothing to train. Usual "
                "cause: everything is frozen, or members sit in a Python list instead of "
                "nn.ModuleList."
            )
        slots = _slots(optimizers)
        known = parameters.keys() | flow.lost.keys() | flow.of_loss
        foreign = {key: tensor for key, (tensor, _) in slots.items() if key not in known}
        homes = homes_of(model, {**flow.lost, **foreign})
        found = [
            *(_missing(trainable, slots) if optimizers else ()),
            *_listed_twice(model, slots, parameters),
            *_made_twice(model, trainable),
            *_foreign(foreign, slots, homes),
            *_unregistered(flow.lost, slots, homes),
            *_cut(flow),
            *_at_rate_zero(optimizers, trainable),
            *false_freezes,
        ]
    return OptimizerCoverage(
        trainable=tuple(entry.names[0] for entry in trainable.values()),
        optimizers=len(optimizers),
        called=batch is not None,
        findings=tuple(sorted(found, key=lambda finding: Finding.KINDS.index(finding.kind))),
    )


def assert_optimizer_complete(coverage: OptimizerCoverage) -> None:
    """Checks that every trainable parameter is stepped exactly once and has a gradient.

    Args:
        coverage: From `measure_optimizer_coverage`; what it did not look at is not judged.

    Raises:
        AssertionError: If there is any finding.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> assert_optimizer_complete(
        ...     measure_optimizer_coverage(net, optimizer, torch.randn(3, 4)))
    """
    __tracebackhide__ = True
    if not coverage.findings:
        return
    kinds = list(dict.fromkeys(found.kind for found in coverage.findings))
    counts = [f"{len(coverage.places(kind))} {kind}" for kind in kinds]
    raise AssertionError(
        broken(
            "training is claimed to reach every trainable parameter exactly once, and does not",
            [(found.place, f"{found.kind}:", found.detail) for found in coverage.findings],
            total=f"{', '.join(counts)}; {counted(coverage.trainable, 'trainable parameter')} "
            "in all",
            meaning="\n".join(_MEANINGS[kind] for kind in kinds),
            remedy="\n".join(
                dict.fromkeys(found.cause or _REMEDIES[found.kind] for found in coverage.findings)
            ),
        )
    )


# --- how the assertion looks --------------------------------------------------------------------

_MEANINGS = {
    "missing": "What is missing keeps its initial values.",
    "repeated": "What is repeated is stepped several times, with several decays.",
    "stale": "Stale parameters are stepped in vain: the model computes with others.",
    "unregistered": "What is unregistered is absent from parameters(), to() and state_dict().",
    "without gradient": "What has no gradient is never trained.",
    "zero gradient": "What has gradient zero whatever its values is only decayed, never trained.",
    "stuck at zero": "Of two factors that are both zero, neither ever gets a gradient.",
    "rate zero": "What is stepped at rate 0 keeps its initial values.",
    "false freeze": "What seems frozen is trained.",
    "undone freeze": "What was frozen is trained after all.",
    "frozen in forward": "What is frozen when backward() runs gets nothing from it.",
}

_REMEDIES = {
    "missing": "Missing: groups made by hand, or by another model's rule. Build them from "
    "model.parameters() (of every member).",
    "repeated": "Repeated: groups made by hand that list a weight again, as a tied one under each "
    "of its names. List it once, as model.parameters() does.",
    "stale": "Stale: layers replaced or members added after the optimizer was built. Build the "
    "optimizer when the model is final.",
    "unregistered": "Unregistered: use nn.ModuleList, nn.ModuleDict or nn.ParameterList for "
    "containers, and wrap last: nn.Parameter(tensor.to(device)).",
    "without gradient": "Without gradient: detach, .data, no_grad, a checkpoint with "
    "use_reentrant=True, a layer that forward does not use, or a member that the loss leaves "
    "out. Mend it, or freeze it.",
    "zero gradient": "Zero gradient: a mask, or a block that reads channels which are always "
    "zero. Mend the route, or freeze it.",
    "stuck at zero": "Stuck at zero: draw one of the two factors, as LoRA draws A and zeroes B.",
    "rate zero": "Rate zero: freeze it instead, or build the schedule that raises its rate in the "
    "function that builds the optimizer.",
    "false freeze": "False freeze: modules have no attribute requires_grad. Call "
    "module.requires_grad_(False).",
    "undone freeze": "Undone freeze: an own train() or forward calls requires_grad_(True) on more "
    "than it means to. Leave what is frozen out of it.",
    "frozen in forward": "Frozen in forward: forward calls requires_grad_(False) on what it has "
    "used. Before it returns, put the flags back as they were.",
}


_MADE_TWICE = (
    "Repeated: two Parameters over one memory. Tie by assigning the Parameter itself, "
    "b.weight = a.weight."
)

# --- groups -------------------------------------------------------------------------------------


Slots = Mapping[int, tuple[Tensor, list[str]]]
"""By id, what the optimizers hold: the tensor, and every place in which it is listed."""


def _given_optimizers(optimizer: Any, model: Model) -> tuple[Optimizer, ...]:
    if optimizer is None:
        return ()
    given = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
    if isinstance(given, (list, tuple)):
        if given and all(isinstance(one, Optimizer) for one in given):
            return tuple(given)
        raise ValueError(
            "optimizer is a list with something else than optimizers "
            f"({', '.join(type(one).__name__ for one in given) or 'it is empty'}). Give a "
            "torch.optim.Optimizer, a list of them, or a function of the model."
        )
    try:
        return optimizers_of(optimizer, model)
    except ValueError:
        if any(entry.tensor.requires_grad for entry in registered(named_modules_of(model))):
            raise
        return ()  # none can be built of nothing: why nothing is registered is told in its place


def _slots(optimizers: Sequence[Optimizer]) -> Slots:
    found: dict[int, tuple[Tensor, list[str]]] = {}
    for number, optimizer in enumerate(optimizers):
        for group, settings in enumerate(optimizer.param_groups):
            for position, tensor in enumerate(settings["params"]):
                place = f"optimizer {number}, group {group}, position {position}"
                found.setdefault(id(tensor), (tensor, []))[1].append(place)
    return found


def _missing(trainable: Mapping[int, Registered], slots: Slots) -> Iterator[Finding]:
    for key, entry in trainable.items():
        if key not in slots:
            yield Finding("missing", entry.names[0], "in no group")


def _at_rate_zero(
    optimizers: Sequence[Optimizer], trainable: Mapping[int, Registered]
) -> Iterator[Finding]:
    """A warm-up that begins at zero keeps the rate that it goes up to as `initial_lr`."""
    for number, optimizer in enumerate(optimizers):
        for group, settings in enumerate(optimizer.param_groups):
            rate, goal = settings.get("lr"), settings.get("initial_lr", 0)
            if rate is None or float(rate) or float(goal):
                continue
            for tensor in settings["params"]:
                if id(tensor) in trainable:
                    place = f"lr 0 in optimizer {number}, group {group}"
                    yield Finding("rate zero", trainable[id(tensor)].names[0], place)


def _listed_twice(
    model: Model, slots: Slots, parameters: Mapping[int, Registered]
) -> Iterator[Finding]:
    holders = holders_of(model)
    for key, (tensor, places) in slots.items():
        if len(places) > 1 and tensor.requires_grad:
            name = parameters[key].names[0] if key in parameters else _nowhere(tensor)
            more = f" and {len(places) - 2} more" if len(places) > 2 else ""
            detail = f"{places[0]}; {places[1]}{more}"
            among = holders.get(key, ())
            if len(among) > 1:
                yield Finding(
                    "repeated",
                    name,
                    f"in members {listed(among)}: {detail}",
                    _in_common(among, one_network(model, among)),
                )
            else:
                yield Finding("repeated", name, detail)


def _in_common(members: Sequence[str], whole: bool) -> str:
    """The usual cause where a list of all members' parameters holds what several register."""
    meaning, remedy = told_in_common(members, whole=whole)
    design = "" if whole else " What is shared by design, list once."
    return f"Repeated: listed for each member that has it. {meaning} {remedy}{design}"


def _made_twice(model: Model, trainable: Mapping[int, Registered]) -> Iterator[Finding]:
    """Several Parameters over one memory; a frozen one among them is stepped by nobody."""
    firsts = {name: entry.names[0] for entry in trainable.values() for name in entry.names}
    for memory in measure_parameter_sharing(model).shared:
        places = [str(place) for place in memory.places if place.kind == "parameter"]
        names = list(dict.fromkeys(firsts[place] for place in places if place in firsts))
        if len(names) > 1:
            extent = "the same memory" if memory.whole else "overlapping memory"
            others = ", ".join(names[1:])
            detail = f"{extent} as the Parameter {others}"
            yield Finding("repeated", names[0], detail, _MADE_TWICE)


def _foreign(
    foreign: Mapping[int, Tensor], slots: Slots, homes: Mapping[int, str]
) -> Iterator[Finding]:
    for key, tensor in foreign.items():
        if key in homes:
            yield Finding("unregistered", homes[key], _lost(tensor, True))
        else:
            yield Finding(
                "stale", slots[key][1][0], f"shape {tuple(tensor.shape)}, not in the model"
            )


def _unregistered(
    lost: Mapping[int, Tensor], slots: Slots, homes: Mapping[int, str]
) -> Iterator[Finding]:
    found = [key for key in homes if key in lost]
    for key in [*found, *(key for key in lost if key not in homes)]:
        place = homes.get(key, _nowhere(lost[key]))
        yield Finding("unregistered", place, _lost(lost[key], key in slots))


def _cut(flow: Flow) -> Iterator[Finding]:
    for name in flow.without_gradient:
        yield Finding("without gradient", name, "cut from every output, or unused")
    for name in flow.zero_gradient:
        yield Finding("zero gradient", name, "zero in every element")
    for name in flow.stuck:
        yield Finding("stuck at zero", name, "zero, and so is whatever multiplies it")
    for name in flow.thawed:
        yield Finding("undone freeze", name, "frozen, until train() or forward")
    for name in flow.refrozen:
        yield Finding("frozen in forward", name, "used while it was trainable, and frozen since")
    for member in flow.unused_members:
        yield Finding("without gradient", f"output of member {member}", "the loss does not use it")


def _nowhere(tensor: Tensor) -> str:
    return f"a leaf of shape {tuple(tensor.shape)}"


def _lost(tensor: Tensor, stepped: bool) -> str:
    what = "Parameter" if isinstance(tensor, nn.Parameter) else "tensor"
    after = ", though the optimizer has it" if stepped else ""
    return f"{what} of shape {tuple(tensor.shape)} that parameters() does not list{after}"


# --- freezes ------------------------------------------------------------------------------------


def _false_freezes(model: Model) -> Iterator[Finding]:
    for member, module in named_modules_of(model).items():
        for name, inner in module.named_modules():
            training = [p for p in inner.parameters() if p.requires_grad]
            for word in ("requires_grad", "requires_grad_", "require_grad"):
                if vars(inner).get(word) is False and training:
                    yield Finding(
                        "false freeze",
                        f"{member}.{name}.{word} = False" if name else f"{member}.{word} = False",
                        f"{counted(training, 'parameter')} below it still "
                        f"{'requires' if len(training) == 1 else 'require'} gradients",
                    )
        for name, parameter in module.named_parameters():
            for word in ("requires_grad_", "require_grad"):
                if vars(parameter).get(word) is False and parameter.requires_grad:
                    yield Finding(
                        "false freeze",
                        f"{member}.{name}.{word} = False",
                        "the parameter still requires gradients",
                    )
