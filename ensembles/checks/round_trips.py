"""Promise: what is copied, saved, loaded, cast or wrapped is still the model that it was.

Catches weights that were tied and come apart, masks and indices that no state_dict holds, copies
that compute with the weights of their original, or that gradients do not reach, parameters that
are no longer listed, and optimizers that are left with parameters of before.

Some conversions break ties by PyTorch's own rules. Those are shown as such, with the way to tie
again, and break a claim only where it names them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ensembles.message import aligned, broken, counted, listed
from ensembles.message import seed as present_seed
from ensembles.probes.conversions import CONVERSIONS, trace_kept_apart
from ensembles.probes.ranks import DISTRIBUTED, trips_in_processes
from ensembles.probes.state import generators_kept
from ensembles.probes.trips import Trip, owners_of, trip
from ensembles.subject import Model, Outputs, named_modules_of

__all__ = [
    "RoundTrip",
    "RoundTrips",
    "assert_round_trips_kept",
    "measure_round_trips",
]

EXPECTED = "broken by PyTorch"


@dataclass(frozen=True)
class RoundTrip:
    """What one conversion did: each cell is "kept", "broken", "broken by PyTorch" or "-".

    Attributes:
        conversion: Its name.
        ties: Whether names that were one tensor are one tensor, and no others.
        function: Whether outputs are the same, also after the same change of every weight, and in
            train mode, where the same operations are computed.
        ownership: Whether every element of every weight reaches the outputs of the same members.
        parameters: Whether the same parameters are registered and trainable.
        optimizer: Whether an optimizer made before still holds them; "-" for a new model, whose
            optimizer is made after.
        details: What was found where something is broken.
        reason: Why nothing was looked at; "" where something was.
        unowned: Why ownership alone was not, where a look would have ended the process.
    """

    conversion: str
    ties: str = "-"
    function: str = "-"
    ownership: str = "-"
    parameters: str = "-"
    optimizer: str = "-"
    details: tuple[str, ...] = ()
    reason: str = ""
    unowned: str = ""

    CELLS = ("ties", "function", "ownership", "parameters", "optimizer")

    def broken(self, status: str = "broken") -> tuple[str, ...]:
        """The cells with this status."""
        return tuple(cell for cell in self.CELLS if getattr(self, cell) == status)

    @property
    def unseen(self) -> tuple[str, str]:
        """What was not looked at, and why; empty where everything was."""
        if self.unowned:
            return f"ownership after {self.conversion}", self.unowned
        return (self.conversion if self.reason else ""), self.reason


@dataclass(frozen=True)
class RoundTrips:
    """What conversions do to a model.

    Attributes:
        tied: How many tensors have several names.
        trips: Every conversion that was asked for, in the order of reports.
    """

    tied: int
    trips: tuple[RoundTrip, ...]

    def __str__(self) -> str:
        seen = [one for one in self.trips if not one.reason]
        kept = [one for one in seen if not one.broken() and not one.broken(EXPECTED)]
        expected = [one for one in seen if one.broken(EXPECTED) and not one.broken()]
        head = (
            f"{counted(seen, 'conversion')}, {counted(range(self.tied), 'tied tensor')}: "
            f"{len(kept)} kept, {len(seen) - len(kept) - len(expected)} broken"
        )
        # The gate shows this line only, so that it names what is let pass.
        head = "; ".join([head, *_let_pass(self.trips)])
        rows = [("", *RoundTrip.CELLS), *(_row(one) for one in seen)]
        lines = aligned(rows) if seen else []
        lines += [f"{one.conversion}: {_BY_PYTORCH[one.conversion]}" for one in expected]
        unseen = [one.unseen for one in self.trips]
        lines += [f"{what}: not looked at, {reason}" for what, reason in unseen if reason]
        return "\n".join([head, *(f"  {line}" for line in lines)])


def _let_pass(trips: Sequence[RoundTrip]) -> list[str]:
    """What a claim of all conversions lets pass, by name: what PyTorch breaks, and the unseen."""
    told = []
    expected = [one for one in trips if one.broken(EXPECTED) and not one.broken()]
    if expected:
        again = "ties" in {cell for one in expected for cell in one.broken(EXPECTED)}
        told.append(
            f"{len(expected)} broken by PyTorch: {_names(expected)}"
            + (" (after these tie again: b.weight = a.weight)" if again else "")
        )
    reasons: dict[str, list[str]] = {}
    for what, reason in (one.unseen for one in trips):
        if reason:
            reasons.setdefault(reason, []).append(what)
    if reasons:
        unseen = [f"{', '.join(those)} ({reason})" for reason, those in reasons.items()]
        count = sum(len(those) for those in reasons.values())
        told.append(f"{count} not looked at: {', '.join(unseen)}")
    return told


def _names(trips: Sequence[RoundTrip]) -> str:
    return ", ".join(one.conversion for one in trips)


def measure_round_trips(
    make: Callable[[], Model],
    batch: Any,
    *,
    outputs: Outputs | None = None,
    conversions: Sequence[str] | str = "all",
    factory: str | None = None,
) -> RoundTrips:
    """Converts models of a factory in every way, and compares what is left of each.

    Every conversion gets a model of its own, which is called once in train mode and whose weights
    are moved, so that what a conversion carries over is told from what the factory makes anew.
    Outputs are compared in eval mode within 1e-6 of the greatest where the same operations are
    computed, and there in train mode too; within 1e-4 where others are, 3e-2 after float16, and 0.1
    after int8. Owners of weights are
    compared by one transparent look (`ensembles.probes.influence`) where the result is a module
    with modes and whole weights: not after functional_call, vmap, export, quantize_dynamic, fsdp2.

    Args:
        make: Builds a new model at each call: a module, or the members as a list or dict.
        batch: What the model is called with.
        outputs: Splits what one module returns into member outputs, whose weights are compared.
        conversions: Names among "deepcopy", "pickle", "state_dict" (saved, and loaded into a new
            model), "strict=False", "assign=True" (of load_state_dict), "safetensors", "to_empty"
            (after construction on meta), "half" and "double" (and back), "channels_last",
            "weight_norm" (on one of the modules that share a weight), "functional_call", "vmap"
            (with stack_module_state), "averaged_model", "compile" (backend "eager"), "export",
            "quantize_dynamic", "ddp" and "fsdp2" (two gloo processes); or "all" of them.
        factory: "package.module:factory", for the two processes of "ddp" and "fsdp2".

    Returns:
        The measurement. The random generators are as before.

    Raises:
        ValueError: If a conversion has no such name, or `make` builds no new model at each call.

    Example:
        >>> def tied():
        ...     net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        ...     net[1].weight = net[0].weight
        ...     return net
        >>> names = ["deepcopy", "assign=True"]
        >>> print(measure_round_trips(tied, torch.randn(3, 4), conversions=names))
        2 conversions, 1 tied tensor: 1 kept, 0 broken; 1 broken by PyTorch: assign=True (after ...)
                        ties                function   ownership   parameters   optimizer
          deepcopy      kept                kept       kept        kept         -
          assign=True   broken by PyTorch   kept       kept        kept         broken by PyTorch
          assign=True: load_state_dict(assign=True) makes one Parameter of every name. Tie again ...
    """
    known = [*CONVERSIONS, *DISTRIBUTED]
    names = known if conversions == "all" else _listed(conversions)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(
            f"conversions={conversions!r} names {listed(unknown) or 'nothing'}. There are "
            f'{listed(known, len(known))}, or "all".'
        )
    seed = present_seed.get()
    with generators_kept(), trace_kept_apart():
        _refuse_one_model(make)
        owners = owners_of(make, batch, seed=seed, outputs=outputs)
        found = {
            name: trip(make, batch, CONVERSIONS[name], seed=seed, outputs=outputs, owners=owners)
            for name in CONVERSIONS
            if name in names
        }
        wanted = [name for name in DISTRIBUTED if name in names]
        if wanted and factory is None:
            why = 'it needs two processes: give factory="package.module:factory"'
            found.update({name: Trip(reason=why) for name in wanted})
        elif wanted and factory is not None:
            found.update(trips_in_processes(factory, batch, wanted, seed=seed))
    return RoundTrips(
        tied=max(one.tied for one in found.values()),
        trips=tuple(_judged(name, one) for name, one in found.items()),
    )


def assert_round_trips_kept(trips: RoundTrips, conversions: Sequence[str] | str = "all") -> None:
    """Checks that conversions keep ties, function, owners, registered parameters and optimizer.

    Args:
        trips: From `measure_round_trips`.
        conversions: The names of those that must keep the model; or "all" that were measured,
            where what PyTorch itself breaks, and what was not looked at, is let pass and shown in
            the measurement.

    Raises:
        ValueError: If a named conversion was not looked at, or none was.
        AssertionError: If one breaks something.

    Example:
        >>> assert_round_trips_kept(measure_round_trips(
        ...     lambda: nn.Linear(4, 2), torch.ones(3, 4), conversions=["deepcopy", "pickle"]))
    """
    __tracebackhide__ = True
    by_name = {one.conversion: one for one in trips.trips}
    named = conversions != "all"
    names = _listed(conversions) if named else list(by_name)
    missing = [name for name in names if name not in by_name]
    if missing:
        raise ValueError(
            f"{listed(missing)} was not measured. Name it in measure_round_trips(conversions=...)."
        )
    blind = [f"{name} ({by_name[name].reason})" for name in names if by_name[name].reason]
    if (blind and named) or len(blind) == len(names):
        raise ValueError(
            f"claimed to keep the model, and not looked at: {listed(blind, 3)}. Take it from the "
            "claim, or make it possible."
        )
    statuses = ("broken", EXPECTED) if named else ("broken",)
    failed = [
        (by_name[name], statuses_of)
        for name in names
        if (statuses_of := tuple(c for status in statuses for c in by_name[name].broken(status)))
    ]
    if not failed:
        return
    cells = list(dict.fromkeys(cell for _, found in failed for cell in found))
    by_model = [cell for cell in cells if any(cell in one.broken() for one, _ in failed)]
    remedies = [
        *(_BY_PYTORCH[o.conversion] for o, _ in failed if o.broken(EXPECTED)),
        *(_REMEDIES[cell] for cell in RoundTrip.CELLS if cell in by_model),
        *(() if named else [f"Let pass: {told}." for told in _let_pass(trips.trips)]),
    ]
    raise AssertionError(
        broken(
            f"the model is claimed to survive {listed(names, 4)}, and does not",
            [
                (one.conversion, detail)
                for one, found in failed
                for detail in one.details
                if detail.partition(":")[0] in found
            ],
            total=f"{len(failed)} of {counted(names, 'conversion')}",
            meaning="\n".join(_MEANINGS[cell] for cell in RoundTrip.CELLS if cell in cells),
            remedy="\n".join(remedies),
        )
    )


# --- what a trip amounts to ---------------------------------------------------------------------

_BY_PYTORCH = {
    "assign=True": "load_state_dict(assign=True) makes one Parameter of every name. Tie again "
    "(b.weight = a.weight), and build the optimizer, after loading.",
    "to_empty": "to_empty makes one Parameter of every name, and memory without values. After it, "
    "tie again (b.weight = a.weight), load, and fill what state_dict does not hold.",
    "weight_norm": "parametrize replaces the Parameter on one module only. Share the module "
    "itself, or parametrize first and then tie the originals on both sides.",
    "functional_call": "functional_call, with tie_weights=True, leaves the given tensors in a "
    "module that is registered under several names. Call it with tie_weights=False, or on a "
    "deepcopy.",
    "vmap": "functional_call, with tie_weights=True, leaves the given tensors in a module that is "
    "registered under several names. Call it with tie_weights=False, or on a deepcopy.",
    "export": "export makes Parameters of its own. Train the model, and export it afterwards.",
    "quantize_dynamic": "quantization packs every weight by itself. Use it for inference only.",
    "fsdp2": "fully_shard replaces Parameters by sharded ones. Build the optimizer after it.",
}

_MAY_BREAK = {
    "assign=True": ("ties", "ownership", "optimizer"),
    "to_empty": ("ties", "ownership"),
    "weight_norm": ("ties", "ownership", "parameters", "optimizer"),
    "export": ("optimizer",),
    "fsdp2": ("optimizer",),
}
"""What PyTorch itself breaks; all else is the model's."""

_ALIASED = "a change of the copy changes the original"

_MEANINGS = {
    "ties": "Weights that were one are trained apart from here on.",
    "function": "The model that comes back computes something else.",
    "ownership": "Training moves other weights than before.",
    "parameters": "What is not registered is neither trained nor saved.",
    "optimizer": "An optimizer made before steps Parameters that the model no longer has.",
}

_REMEDIES = {
    "ties": "Ties: tie by assigning the Parameter, b.weight = a.weight, in the constructor.",
    "function": "Function: state in a plain attribute, a closure or a hook is neither saved nor "
    "copied. Use register_buffer, nn.Parameter, and submodules.",
    "ownership": "Ownership: forward detaches, or runs under no_grad, in what comes back. Keep no "
    "tensor that was computed from weights, and switch no gradients off by state.",
    "parameters": "Parameters: register in the constructor what forward needs, with the same "
    "names at each call.",
    "optimizer": "Optimizer: build it after the conversion.",
}


def _judged(name: str, found: Trip) -> RoundTrip:
    if found.reason:
        return RoundTrip(name, reason=found.reason)
    tolerance = {**CONVERSIONS, **DISTRIBUTED}[name].tolerance
    said: dict[str, list[str]] = {cell: [] for cell in RoundTrip.CELLS}
    if found.error:
        said["function"].append(f"raised {found.error}")
    said["ties"] += [f"came apart: {listed(group, 3)}" for group in found.untied]
    said["ties"] += [f"became one: {listed(group, 3)}" for group in found.newly_tied]
    said["function"] += _of_function(found, tolerance)
    said["ownership"] += _capped(found.owned_otherwise)
    if found.lost:
        said["parameters"].append(f"no longer registered: {listed(found.lost, 3)}")
    if found.added:
        said["parameters"].append(f"registered besides: {listed(found.added, 3)}")
    if found.stale:
        said["optimizer"].append(f"not in an optimizer made before: {listed(found.stale, 3)}")
    looked = {
        "ties": found.registers and bool(found.tied or found.newly_tied),
        "function": found.difference is not None or bool(found.error),
        "ownership": found.owned,
        "parameters": found.registers,
        "optimizer": found.optimized,
    }
    by_rule = {*_MAY_BREAK.get(name, ())}
    if name == "to_empty" and found.unsaved and said["function"]:
        by_rule.add("function")
        said["function"].append(f"no state_dict holds {listed(found.unsaved, 3)}")
    if name in ("functional_call", "vmap") and said["function"] == [_ALIASED]:
        by_rule.add("function")
    cells = {
        cell: (EXPECTED if cell in by_rule else "broken")
        if said[cell]
        else ("kept" if looked[cell] else "-")
        for cell in RoundTrip.CELLS
    }
    details = tuple(f"{cell}: {text}" for cell in RoundTrip.CELLS for text in said[cell])
    return RoundTrip(
        name,
        ties=cells["ties"],
        function=cells["function"],
        ownership=cells["ownership"],
        parameters=cells["parameters"],
        optimizer=cells["optimizer"],
        details=details,
        unowned=found.unowned,
    )


def _capped(sentences: Sequence[str]) -> list[str]:
    more = len(sentences) - 2
    return [*sentences[:2], *([f"and {more} more weights"] if more > 0 else [])]


def _of_function(found: Trip, tolerance: float) -> list[str]:
    """At most one sentence, of the first thing that differs."""
    if found.difference is not None and not found.difference <= tolerance:
        return [
            f"outputs differ by {found.difference:.0e} of the greatest (at most {tolerance:.0e})"
        ]
    if found.untied:  # of course outputs differ, once weights have moved apart
        return []
    if found.aliased:
        return [_ALIASED]
    if found.after_step is not None and not found.after_step <= tolerance:
        return [
            f"after a change of every weight outputs differ by {found.after_step:.0e}: it "
            "computes with other weights than it registers"
        ]
    if found.statistics:
        return [f"training the copy moves the original's {listed(found.statistics, 3)}"]
    if found.in_training is not None and not found.in_training <= tolerance:
        return [f"in train mode outputs or statistics differ by {found.in_training:.0e}"]
    return []


def _listed(conversions: Sequence[str] | str) -> list[str]:
    return [conversions] if isinstance(conversions, str) else list(conversions)


def _row(one: RoundTrip) -> tuple[str, ...]:
    return (one.conversion, *(getattr(one, cell) for cell in RoundTrip.CELLS))


def _refuse_one_model(make: Callable[[], Model]) -> None:
    if not callable(make) or isinstance(make, nn.Module):
        raise ValueError(
            f"round trips convert new models, and got an object of type {type(make).__name__}. "
            "Give a function that builds the model: lambda: ..."
        )
    one, two = (list(named_modules_of(make()).values()) for _ in range(2))
    if {id(m) for m in one} & {id(m) for m in two}:
        raise ValueError(
            "make returns the same module at each call, and a state is to be loaded into a new "
            "one. Build the model inside the function."
        )
