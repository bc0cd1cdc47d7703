"""The table of promises: the name of each, what it says, and its folder.

Standard library only. The gate, pytest's fixtures, the public names and the choices of options come
from this table. A test compares the tables of the README with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType
from typing import Any

__all__ = ["KINDS", "PROMISES", "PUBLIC", "Promise", "default_claims"]


@dataclass(frozen=True, kw_only=True)
class Promise:
    """One promise: a row of the table.

    Attributes:
        name: The name in claims, `-k`, `--ensembles-require` and reports, and of the folder.
        fixture: The fixture that tests ask for.
        sentence: The promise itself, in one sentence.
        catches: Some faults that break it, for the README.
        public: What `ensembles` exports from the folder, as "module.name".
        by_default: What a bare model claims. It depends on what was given: "module" (one network),
            "container" (a network that keeps modules in an attribute `members`) or "ensemble" (a
            list or dict of modules). The outputs of a "module" are not taken as members, because
            nothing says that they are.

    Example:
        >>> PROMISES["sharing"].fixture, PROMISES["sharing"].folder
        ('parameter_sharing', 'ensembles.checks.sharing')
    """

    name: str
    fixture: str
    sentence: str
    catches: str
    public: tuple[str, ...]
    by_default: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The package that holds claim, measurement, judgement and fixture."""
        return f"ensembles.checks.{self.name}"

    def module(self, name: str) -> Any:
        """One file of the folder: "claim", "measurement", "judgement" or "fixture"."""
        return import_module(f"{self.folder}.{name}")


_ROWS = (
    Promise(
        name="sharing",
        fixture="parameter_sharing",
        sentence="Members share exactly the memory that they claim to share.",
        catches='one module under four names; "tied" weights that are copies; a layer from a '
        "default argument",
        public=(
            "measurement.measure_parameter_sharing",
            "judgement.assert_members_share",
            "judgement.assert_parameters_distinct",
        ),
        by_default={"module": "distinct", "container": "distinct", "ensemble": "independent"},
    ),
    Promise(
        name="ownership",
        fixture="ownership_map",
        sentence="Every scalar weight moves the outputs of exactly the members that own it.",
        catches="a layer with `groups=1` between packed members; a subnet whose shortcut reads an "
        "empty group; a stem that is not tied",
        public=("measurement.measure_ownership_map", "judgement.assert_ownership"),
        by_default={"ensemble": "independent"},
    ),
    Promise(
        name="coupling",
        fixture="gradient_coupling",
        sentence="A training step on one member moves that member only, or all that are tied to "
        "it.",
        catches="a loss on the mean prediction; a BatchNorm that two members update; another "
        "member's detached features",
        public=(
            "measurement.measure_gradient_coupling",
            "judgement.assert_members_coupled",
            "judgement.assert_members_coupled_to",
            "judgement.assert_members_uncoupled",
        ),
        by_default={"ensemble": "independent"},
    ),
    Promise(
        name="coverage",
        fixture="optimizer_coverage",
        sentence="The optimizer steps every trainable parameter exactly once, and each gets a "
        "gradient.",
        catches="members in a Python list; an optimizer that was built before the last layer; a "
        "branch that `detach` cuts off",
        public=("measurement.measure_optimizer_coverage", "judgement.assert_optimizer_complete"),
        by_default={"module": "complete", "container": "complete", "ensemble": "complete"},
    ),
    Promise(
        name="graph",
        fixture="autograd_graph",
        sentence="The autograd graph is the recorded one.",
        catches="a lost ReLU; streams that run through one network; a subnet that no longer reads "
        "its parent's weight",
        public=(
            "measurement.measure_autograd_graph",
            "judgement.assert_graph_equal",
            "drawing.draw_autograd_graph",
        ),
    ),
    Promise(
        name="cost",
        fixture="compute_cost",
        sentence="A call costs what is claimed: FLOPs, parameters, bytes kept for backward, and "
        "multiplications by structural zeros.",
        catches="a masked subnet that costs as much as its parent; a tied layer that is stored "
        "twice; a block that runs twice",
        public=(
            "measurement.measure_compute_cost",
            "judgement.assert_cost_equals",
            "judgement.assert_cost_within",
        ),
    ),
    Promise(
        name="determinism",
        fixture="seeded_determinism",
        sentence="One seed gives the same bits in construction and in every training step, and "
        "another seed gives other weights.",
        catches="weights drawn at import; `torch.manual_seed(0)` in a constructor; layers in the "
        "order of a set; loader workers that repeat one random stream",
        public=(
            "measurement.measure_determinism",
            "judgement.assert_deterministic",
            "loaders.measure_loader_determinism",
            "judgement.assert_loader_deterministic",
        ),
    ),
    Promise(
        name="trajectory",
        fixture="training_trajectory",
        sentence="Every member trains exactly as it would alone, and two runs that are claimed "
        "equal are equal at every step.",
        catches="averaged losses; a gradient norm that is clipped over all members; one network "
        "under several names",
        public=(
            "measurement.measure_member_trajectories",
            "judgement.assert_members_trained_alone",
            "runs.measure_training_trajectory",
            "judgement.assert_trajectories_equal",
        ),
    ),
    Promise(
        name="prediction",
        fixture="prediction_reduction",
        sentence="The ensemble's prediction is the claimed reduction of its members' outputs, row "
        "for row, and its metric is computed from it.",
        catches="averaged logits where probabilities are claimed; a second softmax; a `view` where "
        "a `permute` is meant; cross-entropy of probabilities",
        public=(
            "measurement.measure_prediction_reduction",
            "judgement.assert_prediction_reduced",
            "judgement.assert_metric_of_prediction",
        ),
    ),
    Promise(
        name="loss_scale",
        fixture="loss_scale",
        sentence="Every member's gradient is the claimed multiple of its gradient alone, and it "
        "trains at the claimed learning rate.",
        catches="a mean that divides the learning rate by M and multiplies weight decay by M; one "
        "clipping norm for all members; an `eta_min` that does not scale",
        public=(
            "measurement.measure_loss_scale",
            "judgement.assert_loss_scaled",
            "judgement.assert_rates_effective",
        ),
    ),
    Promise(
        name="diversity",
        fixture="member_diversity",
        sentence="Members start different in every parameter that is drawn, and in their outputs.",
        catches="copies of one initialised network; a reset that misses a layer; a constructor "
        "that seeds; a permuted twin",
        public=(
            "measurement.measure_member_diversity",
            "judgement.assert_members_diverse",
        ),
        by_default={"container": "distinct", "ensemble": "distinct"},
    ),
    Promise(
        name="data",
        fixture="member_data",
        sentence="Members see the samples that they claim to see, in the claimed order.",
        catches="bagged members that all get the same indices; a bootstrap without replacement; a "
        "paired loader that shuffles",
        public=(
            "measurement.measure_member_data",
            "judgement.assert_members_bagged",
            "judgement.assert_members_paired",
            "judgement.assert_members_shuffled",
        ),
    ),
    Promise(
        name="batch",
        fixture="batch_independence",
        sentence="Row i of the output depends on row i of the input only.",
        catches="a `view` where a `permute` is meant; batch statistics in eval mode; a missing "
        "`batch_first`; a softmax over all rows",
        public=("measurement.measure_batch_independence", "judgement.assert_rows_independent"),
    ),
    Promise(
        name="round_trips",
        fixture="round_trip",
        sentence="What is copied, saved, loaded, cast, wrapped or compiled is still the model that "
        "it was.",
        catches="a random mask that no state_dict holds; a copy that computes with the weights of "
        "its original; `load_state_dict(assign=True)` of tied weights",
        public=("measurement.measure_round_trips", "judgement.assert_round_trips_kept"),
    ),
    Promise(
        name="hygiene",
        fixture="state_hygiene",
        sentence="State is registered, and it moves only when it should.",
        catches="a mask that is a plain attribute; `F.dropout(x, p)` in eval mode; a frozen "
        "BatchNorm whose statistics move; `best = model.state_dict()`",
        public=(
            "measurement.measure_state_hygiene",
            "judgement.assert_state_clean",
            "judgement.assert_snapshot_detached",
        ),
    ),
)

PROMISES: Mapping[str, Promise] = MappingProxyType({row.name: row for row in _ROWS})
"""Every promise by name, in the order of reports."""

_OTHERS = {
    "ensembles.subject": ("Partition", "Subject", "split_axis", "split_batch", "whole"),
    "ensembles.gate.results": ("Result", "Results"),
    "ensembles.gate.conformance": ("check_ensemble", "checks_for", "parametrize_with_checks"),
}

KINDS = ("module", "container", "ensemble")
"""What a bare model can be: see `Promise.by_default`."""


def default_claims(kind: str) -> dict[str, str]:
    """What a bare model of one of `KINDS` claims.

    Example:
        >>> default_claims("module")
        {'sharing': 'distinct', 'coverage': 'complete'}
    """
    return {row.name: row.by_default[kind] for row in _ROWS if kind in row.by_default}


PUBLIC: Mapping[str, str] = MappingProxyType(
    {
        **{name: module for module, names in _OTHERS.items() for name in names},
        **{
            name: f"{promise.folder}.{module}"
            for promise in _ROWS
            for module, _, name in (place.partition(".") for place in promise.public)
        },
    }
)
"""Every name that `ensembles` exports, and the module that defines it."""
