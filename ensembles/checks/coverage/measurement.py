"""What training reaches: the groups of the optimizer, the gradients of a call, and freezes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ensembles.case import Case
from ensembles.checks.coverage.claim import CoverageClaim
from ensembles.checks.coverage.gradient_flow import Flow, gradient_flow
from ensembles.findings import Finding
from ensembles.handling.numbers import checked_numbers
from ensembles.handling.registered_tensors import Registered, holders_of, one_network, registered
from ensembles.instruments.storage import shared_memory
from ensembles.instruments.tensor_locations import Location, homes_of
from ensembles.message import aligned, counted, listed
from ensembles.subject import Model, Recipe

__all__ = ["KINDS", "OptimizerCoverage", "measure", "measure_optimizer_coverage"]

KINDS = (
    *("missing", "repeated", "several objects", "stale", "unregistered", "unused output"),
    *("without gradient", "zero gradient", "stuck at zero", "rate zero"),
    *("false freeze", "undone freeze", "frozen in forward"),
)
"""Of findings, in the order in which they are told."""


@dataclass(frozen=True)
class OptimizerCoverage:
    """What training reaches, and what it does not.

    Attributes:
        trainable: The names of all trainable parameters; a tied one under its first name.
        optimizers: How many optimizers were looked at; 0 if none was given.
        called: Whether the model was called, so that gradients and unregistered tensors are known.
        one_networks: Groups of members that are listed together, and are one network.
        findings: All places where training does not do what it seems to do, kind by kind.
    """

    trainable: tuple[str, ...]
    optimizers: int
    called: bool
    one_networks: tuple[tuple[str, ...], ...]
    findings: tuple[Finding, ...]

    def places(self, kind: str) -> tuple[str, ...]:
        """The places of one kind of finding, such as "missing" or "unregistered".

        Raises:
            ValueError: If there is no such kind.
        """
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is no kind of finding: {', '.join(KINDS)}.")
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
        rows = aligned([(found.place, found.kind, found.found) for found in self.findings])
        return "\n".join([head, *(f"  {row}" for row in rows)])


def measure_optimizer_coverage(
    model: Case | Model, batch: Any = None, **recipe: Unpack[Recipe]
) -> OptimizerCoverage:
    """Finds the parameters that training does not reach, or reaches more than once.

    Args:
        model: One module, or the members as a list or dict of modules.
        batch: What the model is called with. Without it, gradients are not looked at.
        **recipe: `optimizer` is a function of the model as in every check, but may be here an
            optimizer that is built already, or a list of them. Without it, groups are not looked
            at. Of the `loss`, every member's output must have a gradient.

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
        >>> print(measure_optimizer_coverage(net, torch.randn(5, 4), optimizer=optimizer))
        4 trainable parameters, 4 findings (1 optimizer and gradients looked at)
          model.1.weight                      missing   in no group
          model.1.bias                        missing   in no group
          optimizer 0, group 0, position 2    stale     tensor of shape (2, 4), not in the model
          optimizer 0, group 0, position 3    stale     tensor of shape (2,), not in the model
    """
    if isinstance(given := recipe.get("optimizer"), (Optimizer, list, tuple)):
        built = [given] if isinstance(given, Optimizer) else list(given)
        if not built or not all(isinstance(one, Optimizer) for one in built):
            raise ValueError(
                "optimizer is a list with something else than optimizers "
                f"({', '.join(type(one).__name__ for one in built) or 'it is empty'}). Give a "
                "torch.optim.Optimizer, a list of them, or a function of the model."
            )
        recipe["optimizer"] = lambda model: built  # which is read only, and takes no step
    return measure(Case.of(model, batch, **recipe))


def measure(case: Case, claim: CoverageClaim | None = None) -> OptimizerCoverage:
    """What `measure_optimizer_coverage` finds in a case; what is claimed needs a batch."""
    __tracebackhide__ = True
    called = claim is not None or case.has_batch
    if case.subject.optimizer is None and not called:
        raise ValueError(
            "neither an optimizer nor a batch was given, so that there is nothing to look at. "
            "Give optimizer=, and batch= to have gradients looked at too."
        )
    checked_numbers(case.model)
    found = list(_false_freezes(case))
    flow = Flow()
    # What the function that builds the optimizer freezes is frozen here, and what it replaces
    # afterwards is what is trained.
    with case.preserved():
        optimizers = _optimizers(case)
        parameters = {id(e.tensor): e for e in registered(case.modules) if e.kind == "parameter"}
        if called:
            with torch.inference_mode(False), torch.enable_grad():
                flow = gradient_flow(case)
        trainable = {key: entry for key, entry in parameters.items() if entry.tensor.requires_grad}
        if not trainable and not flow.lost:
            raise ValueError(
                "the model registers no trainable parameters: there is nothing to train. Usual "
                "cause: everything is frozen, or members sit in a Python list instead of "
                "nn.ModuleList."
            )
        slots = _slots(optimizers)
        known = parameters.keys() | flow.lost.keys() | flow.of_loss
        foreign = {key: slots[key][0].tensor for key in slots if key not in known}
        homes = homes_of(case.model, {**flow.lost, **foreign})
        holders = holders_of(case.members)
        found += [
            *(_missing(trainable, slots) if optimizers else ()),
            *_repeated(slots, parameters, holders),
            *_several_objects(case, trainable),
            *_unregistered(flow.lost, foreign, slots, homes),
            *_cut(flow),
            *_at_rate_zero(optimizers, trainable),
        ]
    several = dict.fromkeys(one.members for one in found if one.kind == "repeated" and one.members)
    return OptimizerCoverage(
        trainable=tuple(entry.names[0] for entry in trainable.values()),
        optimizers=len(optimizers),
        called=called,
        one_networks=tuple(group for group in several if one_network(case.members, group)),
        findings=tuple(sorted(found, key=lambda finding: KINDS.index(finding.kind))),
    )


# --- groups -------------------------------------------------------------------------------------


class _Slot(NamedTuple):
    """A place in which an optimizer lists a tensor."""

    tensor: Tensor
    optimizer: int
    group: int
    position: int


_Slots = Mapping[int, Sequence[_Slot]]
"""By the id of a tensor, every place in which it is listed."""


def _optimizers(case: Case) -> tuple[Optimizer, ...]:
    if case.subject.optimizer is None:
        return ()
    try:
        return case.optimizers()
    except ValueError:
        if any(entry.tensor.requires_grad for entry in registered(case.modules)):
            raise
        return ()  # none can be built of nothing: why nothing is registered is told in its place


def _slots(optimizers: Sequence[Optimizer]) -> _Slots:
    found: defaultdict[int, list[_Slot]] = defaultdict(list)
    for number, optimizer in enumerate(optimizers):
        for group, settings in enumerate(optimizer.param_groups):
            for position, tensor in enumerate(settings["params"]):
                found[id(tensor)].append(_Slot(tensor, number, group, position))
    return found


def _missing(trainable: Mapping[int, Registered], slots: _Slots) -> Iterator[Finding]:
    for key, entry in trainable.items():
        if key not in slots:
            yield Finding(kind="missing", place=entry.names[0], found="in no group")


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
                    name = trainable[id(tensor)].names[0]
                    where = f"lr 0 in optimizer {number}, group {group}"
                    yield Finding(kind="rate zero", place=name, found=where, amount=0)


def _repeated(
    slots: _Slots,
    parameters: Mapping[int, Registered],
    holders: Mapping[int, tuple[str, ...]],
) -> Iterator[Finding]:
    for key, among in slots.items():
        tensor = among[0].tensor
        if len(among) > 1 and tensor.requires_grad:
            members = holders.get(key, ())
            yield Finding(
                kind="repeated",
                place=parameters[key].names[0] if key in parameters else _nowhere(tensor),
                members=members if len(members) > 1 else (),
                found=f"listed {len(among)} times: {_where(among)}",
                amount=len(among),
            )


def _where(slots: Sequence[_Slot]) -> str:
    positions: defaultdict[str, list[str]] = defaultdict(list)
    for slot in slots:
        positions[f"optimizer {slot.optimizer}, group {slot.group}"].append(str(slot.position))
    told = [
        f"{group}, {'position' if len(at) == 1 else 'positions'} {listed(at, 3)}"
        for group, at in positions.items()
    ]
    return "; ".join(told[:2]) + (f" and {len(told) - 2} more groups" if len(told) > 2 else "")


def _several_objects(case: Case, trainable: Mapping[int, Registered]) -> Iterator[Finding]:
    """Several Parameters over one memory; a frozen one among them is stepped by nobody."""
    firsts = {name: entry.names[0] for entry in trainable.values() for name in entry.names}
    for memory in shared_memory(case.modules)[1]:
        places = [str(place) for place in memory.places if place.kind == "parameter"]
        names = list(dict.fromkeys(firsts[place] for place in places if place in firsts))
        if len(names) > 1:
            extent = "the same memory as" if memory.whole else "memory in common with"
            yield Finding(
                kind="several objects",
                place=names[0],
                found=f"{extent} the Parameter {listed(names[1:], 3)}",
                amount=len(names),
            )


def _unregistered(
    lost: Mapping[int, Tensor],
    foreign: Mapping[int, Tensor],
    slots: _Slots,
    homes: Mapping[int, Location],
) -> Iterator[Finding]:
    """What the model computes with, or an optimizer steps, and nothing registers."""
    every = {**lost, **foreign}
    for key in [*homes, *(key for key in every if key not in homes)]:
        tensor, home = every[key], homes.get(key)
        shape = f"of shape {tuple(tensor.shape)},"
        if home is None and key in foreign:
            kind, place = "stale", _where(slots[key])
            found = f"tensor {shape} not in the model"
        else:
            kind, place = "unregistered", home.path if home else _nowhere(tensor)
            what = "Parameter" if isinstance(tensor, nn.Parameter) else "tensor"
            kept = f"kept {home.how}" if home else "kept in a place that was not found"
            found = f"{what} {shape} {kept}"
            found += ", though the optimizer has it" if key in slots else ""
        yield Finding(kind=kind, place=place, found=found, amount=tensor.numel())


def _nowhere(tensor: Tensor) -> str:
    return f"a leaf of shape {tuple(tensor.shape)}"


# --- gradients and freezes ----------------------------------------------------------------------


def _cut(flow: Flow) -> Iterator[Finding]:
    for member in flow.unused_members:
        place = f"output of member {member}"
        yield Finding(
            kind="unused output", place=place, members=(member,), found="the loss does not use it"
        )
    for kind, names, found in (
        ("without gradient", flow.without_gradient, "cut from every output, or unused"),
        ("zero gradient", flow.zero_gradient, "zero in every element"),
        ("stuck at zero", flow.stuck, "zero, and so is whatever multiplies it"),
        ("undone freeze", flow.thawed, "train() or forward() makes it trainable"),
        ("frozen in forward", flow.refrozen, "forward() uses it, and then freezes it"),
    ):
        for name in names:
            yield Finding(kind=kind, place=name, found=found)


def _false_freezes(case: Case) -> Iterator[Finding]:
    for member, module in case.modules.items():
        for name, inner in module.named_modules():
            training = [p for p in inner.parameters() if p.requires_grad]
            for word in ("requires_grad", "requires_grad_", "require_grad"):
                if vars(inner).get(word) is False and training:
                    verb = "requires" if len(training) == 1 else "require"
                    yield Finding(
                        kind="false freeze",
                        place=".".join(filter(None, (member, name, f"{word} = False"))),
                        found=f"{counted(training, 'parameter')} below it still {verb} gradients",
                        amount=len(training),
                    )
        for name, parameter in module.named_parameters():
            for word in ("requires_grad_", "require_grad"):
                if vars(parameter).get(word) is False and parameter.requires_grad:
                    place = f"{member}.{name}.{word} = False"
                    still = "the parameter still requires gradients"
                    yield Finding(kind="false freeze", place=place, found=still, amount=1)
