"""What can be claimed of conversions."""

from __future__ import annotations

from dataclasses import dataclass

from ensembles.claims import is_patterns, options_of, unknown

__all__ = ["CONVERSIONS", "RoundTripsClaim", "parse"]

CONVERSIONS = (
    "deepcopy",
    "pickle",
    "state_dict",
    "strict=False",
    "assign=True",
    "safetensors",
    "to_empty",
    "half",
    "double",
    "channels_last",
    "weight_norm",
    "functional_call",
    "vmap",
    "averaged_model",
    "compile",
    "export",
    "quantize_dynamic",
    "ddp",
    "fsdp2",
)
"""Every conversion by name, in the order of reports."""


@dataclass(frozen=True)
class RoundTripsClaim:
    """Conversions keep the model.

    Attributes:
        conversions: The names of those that must keep it; None for all, where what PyTorch itself
            breaks is let pass and shown.
        factory: "package.module:factory", for conversions on two processes; None without them.
    """

    conversions: tuple[str, ...] | None = None
    factory: str | None = None


def parse(given: object) -> RoundTripsClaim:
    """The claim that a user wrote.

    Args:
        given: "all", one or a list of the names of `CONVERSIONS`, or a dict of `conversions` (one
            of these) and `factory`.

    Raises:
        ClaimError: If it is none of these, or a conversion is unknown.

    Example:
        >>> parse("deepcopy").conversions, parse({"factory": "models:build"}).conversions
        (('deepcopy',), None)
    """
    options = options_of(given, ["conversions", "factory"]) or {"conversions": given}
    names, factory = options.get("conversions", "all"), options.get("factory")
    if factory is None or (isinstance(factory, str) and ":" in factory):
        if names == "all":
            return RoundTripsClaim(None, factory)
        names = [names] if isinstance(names, str) else names
        if names and is_patterns(names) and set(names) <= set(CONVERSIONS):
            return RoundTripsClaim(tuple(dict.fromkeys(names)), factory)
    words = ["all", *CONVERSIONS, "a list of conversions"]
    raise unknown(
        "round_trips",
        given,
        [*words, '{"conversions": ..., "factory": "package.module:factory"}'],
    )
