"""Whether conversions keep the model that they are claimed to keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ensembles.checks.round_trips.claim import RoundTripsClaim, parse
from ensembles.checks.round_trips.differences import BROKEN, PYTORCHS, Outcome
from ensembles.checks.round_trips.measurement import ADVICE, RoundTrips
from ensembles.findings import Count, Finding, Findings
from ensembles.message import Explanation, assert_held, listed

__all__ = ["assert_round_trips_kept", "judge"]


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
        >>> from ensembles import measure_round_trips
        >>> assert_round_trips_kept(measure_round_trips(
        ...     nn.Linear(4, 2), torch.ones(3, 4), conversions=["deepcopy", "pickle"]))
    """
    __tracebackhide__ = True
    assert_held(judge(trips, parse(conversions)))


def judge(trips: RoundTrips, claim: RoundTripsClaim) -> Findings:
    """What the claimed conversions break; of a claim of all, what PyTorch breaks is let pass."""
    by_name = {one.conversion: one for one in trips.outcomes}
    named = claim.conversions is not None
    names = claim.conversions or tuple(by_name)
    _refuse(by_name, names, named=named)
    statuses = (BROKEN, PYTORCHS) if named else (BROKEN,)
    found = [item for name in names for item in _found(by_name[name], statuses)]
    failed = list(dict.fromkeys(item.place for item in found))
    told = listed(names, 4) if named or len(names) <= 4 else f"all {len(names)} conversions"
    does_not = "does not" if failed == list(names) else f"does not survive {listed(failed, 4)}"
    apply = [one for one in trips.outcomes if one.applies]
    looked_at = Count(len(trips.seen), "conversion", of=len(apply))
    return Findings(
        claim=f"the model is claimed to survive {told}" + (f", but {does_not}" if found else ""),
        # What the model breaks comes first.
        items=tuple(sorted(found, key=lambda item: item.kind == PYTORCHS)),
        affected=(Count(len(failed), "conversion", of=len(names)),) if found else (),
        looked_at=() if named or looked_at.complete else (looked_at,),
        notes=() if named else tuple(f"Let pass: {text}." for text in trips.let_pass()),
    )


def _refuse(by_name: Mapping[str, Outcome], names: Sequence[str], *, named: bool) -> None:
    missing = [name for name in names if name not in by_name]
    if missing:
        raise ValueError(
            f"{listed(missing)} was not measured. Name it in measure_round_trips(conversions=...)."
        )
    blind = [f"{name} ({by_name[name].reason})" for name in names if by_name[name].reason]
    if (blind and named) or len(blind) == len(names):
        raise ValueError(
            f"claimed to keep the model, but not looked at: {listed(blind, 3)}. Take it from the "
            "claim, or make it possible."
        )


# --- findings -----------------------------------------------------------------------------------


def _explained(meaning: str, cause: str = "", remedy: str = "") -> Explanation:
    return Explanation(meaning=meaning, cause=cause, remedy=remedy)


_APART = _explained(
    "Weights that were one are trained apart from here on.",
    "a tie that the constructor does not make, or an own __deepcopy__ or _apply",
    "Tie in the constructor, by assigning the Parameter: b.weight = a.weight.",
)
_ONE = _explained(
    "Weights that were several are one from here on.",
    "an own __deepcopy__ or __setstate__ that hands one tensor to several modules",
    "Copy each Parameter by itself.",
)
_ERROR = _explained("Nothing comes back that can be called.")
_STATE = (
    "state in a plain attribute, a closure or a hook, which is neither saved nor copied",
    "Use register_buffer, nn.Parameter and submodules.",
)
_FUNCTION = _explained("The model that comes back computes something else.", *_STATE)
_ELSEWHERE = _explained("The result computes with other weights than it registers.", *_STATE)
_SHARED = _explained(
    "Copy and original hold tensors in common, so that training one changes the other.",
    "an own __deepcopy__ or __reduce__ that hands tensors on",
    "Clone them in the copy.",
)
_OWNERS = _explained(
    "Training moves other weights than before.",
    "a mask that is drawn anew, or a forward that detaches or runs under no_grad by then",
    "Keep no tensor that was computed from weights, and switch no gradients off by state.",
)
_NAMES = (
    "names that differ between two calls of the constructor, or a layer that is made later",
    "Register in the constructor what forward needs, with the same names at each call.",
)
_LOST = _explained("What is not registered is neither trained nor saved.", *_NAMES)
_ADDED = _explained("What is registered besides is in no state_dict of before.", *_NAMES)
_FREEZE = _explained(
    "Training moves other weights than before.",
    "requires_grad, which no state_dict holds",
    "Freeze in the constructor, or again after the conversion.",
)
_OPTIMIZER = _explained(
    "An optimizer made before steps Parameters that the model no longer has.",
    remedy="Build the optimizer after the conversion.",
)
_WORDS: Mapping[str, tuple[Explanation, str]] = {
    "came apart": (_APART, "{names} came apart"),
    "became one": (_ONE, "{names} became one"),
    "error": (_ERROR, "raised {one.error}"),
    "other outputs": (
        _FUNCTION,
        "outputs differ by {one.amount:.1g} of the greatest (at most {one.limit:.1g} is rounding)",
    ),
    "moves the original": (_SHARED, "a change of the copy changes the original"),
    "other weights": (
        _ELSEWHERE,
        "outputs differ by {one.amount:.1g} after the same change of every weight",
    ),
    "moves the original's buffers": (_SHARED, "training the copy moves the original's {names}"),
    "other in training": (
        _FUNCTION,
        "in train mode outputs or statistics differ by {one.amount:.1g}",
    ),
    "not saved": (_FUNCTION, "no state_dict holds {names}"),
    "other owners": (
        _OWNERS,
        "{names}: {one.amount:,} of {one.limit:,} elements belonged to {before}, but now to {now}",
    ),
    "no owners": (_OWNERS, "no output depends on a weight by autograd any more"),
    "not registered": (_LOST, "no longer registered: {names}"),
    "registered besides": (_ADDED, "registered besides: {names}"),
    "frozen": (_FREEZE, "frozen, but was trained: {names}"),
    "not frozen": (_FREEZE, "trained, but was frozen: {names}"),
    "not held": (_OPTIMIZER, "an optimizer made before lacks {names}"),
}
"""What each kind of difference means, and how it is told."""


def _found(outcome: Outcome, statuses: Sequence[str]) -> Iterator[Finding]:
    for one in outcome.differences:
        status = outcome.status(one.aspect)
        if status not in statuses:
            continue
        explained, told = _WORDS[one.kind]
        if status == PYTORCHS:
            explained = _explained(explained["meaning"], remedy=ADVICE[outcome.conversion])
        yield Finding(
            kind=one.aspect if status == BROKEN else status,
            place=outcome.conversion,
            members=tuple(dict.fromkeys([*one.now, *one.before])),
            found=told.format(
                one=one,
                names=listed(one.names, 3),
                now=listed(one.now) or "nobody",
                before=listed(one.before) or "nobody",
            ),
            amount=one.amount,
            **explained,
        )
