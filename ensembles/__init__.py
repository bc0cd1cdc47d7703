"""Verify that ensembles and weight-sharing networks are what they claim to be.

Public names only. They are resolved on first use, so that `import ensembles`, which the pytest
plugin does in every run on the machine, imports no torch.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "ensembles.subject": ("Partition", "Subject", "split_axis", "split_batch", "whole"),
    "ensembles.conformance": (
        "Result",
        "Results",
        "check_ensemble",
        "checks_for",
        "parametrize_with_checks",
    ),
    "ensembles.checks.alone": ("assert_members_trained_alone", "measure_member_trajectories"),
    "ensembles.checks.batch": ("assert_rows_independent", "measure_batch_independence"),
    "ensembles.checks.cost": (
        "assert_cost_equals",
        "assert_cost_within",
        "measure_compute_cost",
    ),
    "ensembles.checks.coupling": (
        "assert_members_coupled",
        "assert_members_coupled_to",
        "assert_members_uncoupled",
        "measure_gradient_coupling",
    ),
    "ensembles.checks.coverage": ("assert_optimizer_complete", "measure_optimizer_coverage"),
    "ensembles.checks.data": (
        "assert_members_bagged",
        "assert_members_paired",
        "assert_members_shuffled",
        "measure_member_data",
    ),
    "ensembles.checks.determinism": ("assert_deterministic", "measure_determinism"),
    "ensembles.checks.diversity": ("assert_members_diverse", "measure_member_diversity"),
    "ensembles.checks.effective_rates": ("assert_rates_effective",),
    "ensembles.checks.loss_scale": ("assert_loss_scaled", "measure_loss_scale"),
    "ensembles.checks.prediction": (
        "assert_metric_of_prediction",
        "assert_prediction_reduced",
        "measure_prediction_reduction",
    ),
    "ensembles.checks.hygiene": (
        "assert_snapshot_detached",
        "assert_state_clean",
        "measure_state_hygiene",
    ),
    "ensembles.checks.loading": ("assert_loader_deterministic", "measure_loader_determinism"),
    "ensembles.checks.ownership": ("assert_ownership", "measure_ownership_map"),
    "ensembles.checks.graph": ("assert_graph_equal", "measure_autograd_graph"),
    "ensembles.checks.round_trips": ("assert_round_trips_kept", "measure_round_trips"),
    "ensembles.checks.sharing": (
        "assert_members_share",
        "assert_parameters_distinct",
        "measure_parameter_sharing",
    ),
    "ensembles.checks.trajectory": ("assert_trajectories_equal", "measure_training_trajectory"),
    "ensembles.drawings": ("draw_autograd_graph",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ensembles' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
