"""What conversions do to a model: what each keeps, what it breaks, and what PyTorch breaks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

from ensembles.case import Case, Given
from ensembles.checks.round_trips.claim import CONVERSIONS, RoundTripsClaim, parse
from ensembles.checks.round_trips.conversion_outcomes import outcomes
from ensembles.checks.round_trips.conversions import LOCAL, trace_kept_apart
from ensembles.checks.round_trips.differences import ASPECTS, BROKEN, PYTORCHS, Outcome
from ensembles.checks.round_trips.distributed_conversions import DISTRIBUTED, outcomes_in_processes
from ensembles.handling.registered_tensors import registered
from ensembles.handling.state import generators_kept
from ensembles.message import aligned, counted
from ensembles.subject import Recipe

__all__ = ["ADVICE", "RoundTrips", "measure", "measure_round_trips"]

_FUNCTIONAL = (
    "functional_call, with tie_weights=True, leaves the given tensors in a module that is "
    "registered under several names. Call it with tie_weights=False, or on a deepcopy."
)
ADVICE: Mapping[str, str] = {
    "assign=True": "load_state_dict(assign=True) makes one Parameter of every name. Tie again "
    "(b.weight = a.weight), and build the optimizer, after loading.",
    "to_empty": "to_empty makes one Parameter of every name, and memory without values. After it, "
    "tie again (b.weight = a.weight), load, and fill what state_dict does not hold.",
    "weight_norm": "parametrize replaces the Parameter on one module only. Share the module "
    "itself, or parametrize first and then tie the originals on both sides.",
    "functional_call": _FUNCTIONAL,
    "vmap": _FUNCTIONAL,
    "export": "export makes Parameters of its own. Train the model, and export it afterwards.",
    "fsdp2": "fully_shard replaces Parameters by sharded ones. Build the optimizer after it.",
}
"""What to do about what PyTorch breaks, by conversion."""


@dataclass(frozen=True)
class RoundTrips:
    """What conversions do to a model.

    Attributes:
        tied: How many tensors have several names.
        outcomes: Of every conversion that was asked for, in the order of reports.
    """

    tied: int
    outcomes: tuple[Outcome, ...]

    @property
    def seen(self) -> tuple[Outcome, ...]:
        """The conversions that were looked at."""
        return tuple(one for one in self.outcomes if not one.reason)

    def let_pass(self) -> Iterator[str]:
        """What a claim of all conversions lets pass: what PyTorch breaks, and what was not seen."""
        if expected := [one.conversion for one in self._expected]:
            again = any(one.status("ties") == PYTORCHS for one in self._expected)
            note = " (tie again afterwards: b.weight = a.weight)" if again else ""
            yield f"{len(expected)} broken by PyTorch: {', '.join(expected)}{note}"
        for applies, told in ((True, "not looked at"), (False, "not applicable")):
            reasons: dict[str, list[str]] = {}
            for one in self.outcomes:
                what, reason = one.unseen
                if reason and one.applies == applies:
                    reasons.setdefault(reason, []).append(what)
            if reasons:
                unseen = [f"{', '.join(those)} ({reason})" for reason, those in reasons.items()]
                yield f"{sum(map(len, reasons.values()))} {told}: {', '.join(unseen)}"

    @property
    def _expected(self) -> list[Outcome]:
        """Those of which PyTorch breaks something, and the model nothing."""
        return [one for one in self.seen if one.having(PYTORCHS) and not one.having(BROKEN)]

    def __str__(self) -> str:
        kept = [one for one in self.seen if not one.differences]
        broken = [one for one in self.seen if one.having(BROKEN)]
        head = (
            f"{counted(self.seen, 'conversion')}, {counted(range(self.tied), 'tied tensor')}: "
            f"{len(kept)} kept, {len(broken)} broken"
        )
        rows = [(one.conversion, *map(one.status, ASPECTS)) for one in self.seen]
        lines = aligned([("", *ASPECTS), *rows]) if rows else []
        lines += [f"{one.conversion}: {ADVICE[one.conversion]}" for one in self._expected]
        # The gate shows the first line only, so that it names what is let pass.
        return "\n".join(["; ".join([head, *self.let_pass()]), *(f"  {line}" for line in lines)])


def measure_round_trips(
    model: Given,
    batch: Any = None,
    *,
    conversions: Sequence[str] | str = "all",
    factory: str | None = None,
    **recipe: Unpack[Recipe],
) -> RoundTrips:
    """Converts the model in every way, and compares what is left of it.

    The model is called once in train mode and its weights are moved, so that what a conversion
    carries over is told from what the factory makes anew. Outputs are compared in eval mode, and in
    train mode too where the same operations are computed, within what the coarsest dtype that took
    part can tell (`ensembles.tolerance`): as "reordered" where operations are the same, and else as
    "recomputed". Owners of weights are compared by one transparent forward pass (see `owners`)
    where the result is a module with modes and whole weights: not after functional_call, vmap,
    export, quantize_dynamic, fsdp2.

    Args:
        model: A function that builds a new model at each call: a module, or the members as a list
            or dict. For conversions that only copy the model, the model itself will do.
        batch: What the model is called with.
        conversions: Names among "deepcopy", "pickle", "state_dict" (saved, and loaded into a new
            model), "strict=False", "assign=True" (of load_state_dict), "safetensors", "to_empty"
            (after construction on meta), "half" and "double" (and back), "channels_last",
            "weight_norm" (on one of the modules that share a weight), "functional_call", "vmap"
            (with stack_module_state), "averaged_model", "compile" (backend "eager"), "export",
            "quantize_dynamic", "ddp" and "fsdp2" (two gloo processes); or "all" of them.
        factory: "package.module:factory", for the two processes of "ddp" and "fsdp2".
        **recipe: `outputs` splits what one module returns into member outputs, whose weights are
            compared.

    Returns:
        The measurement. The model and the random generators are as before. Cost: the model is
        built once more, and anew after each conversion that cannot be undone and on meta.

    Raises:
        ValueError: If a conversion has no such name, or needs a new model and none is built.

    Example:
        >>> def tied():
        ...     net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        ...     net[1].weight = net[0].weight
        ...     return net
        >>> names = ["deepcopy", "assign=True"]
        >>> print(measure_round_trips(tied, torch.randn(3, 4), conversions=names))
        2 conversions, 1 tied tensor: 1 kept, 0 broken; 1 broken by PyTorch: assign=True (tie ...)
                        ties                function   ownership   parameters   optimizer
          deepcopy      kept                kept       kept        kept         -
          assign=True   broken by PyTorch   kept       kept        kept         broken by PyTorch
          assign=True: load_state_dict(assign=True) makes one Parameter of every name. Tie again ...
    """
    claimed: Any = {"conversions": conversions, "factory": factory}
    claim = parse(conversions if factory is None else claimed)
    return measure(Case.of(model, batch, **recipe), claim)


def measure(case: Case, claim: RoundTripsClaim | None = None) -> RoundTrips:
    """What `measure_round_trips` finds in a case, after the conversions of the claim."""
    __tracebackhide__ = True
    claim = claim or RoundTripsClaim()
    names = [n for n in CONVERSIONS if claim.conversions is None or n in claim.conversions]
    apart = [name for name in names if name in DISTRIBUTED]
    with generators_kept(), trace_kept_apart():
        found = outcomes(case, [LOCAL[name] for name in names if name in LOCAL])
        if claim.factory is None:
            why = 'two processes are needed: give factory="package.module:factory"'
            found |= {name: Outcome(name, reason=why) for name in apart}
        else:
            found |= outcomes_in_processes(case, claim.factory, apart)
    return RoundTrips(
        tied=sum(len(entry.names) > 1 for entry in registered(case.model)),
        outcomes=tuple(found.values()),
    )
