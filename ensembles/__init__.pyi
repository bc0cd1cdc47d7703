"""Public names for type checkers; a test writes them from the registry."""

from ensembles.checks.batch.judgement import assert_rows_independent as assert_rows_independent
from ensembles.checks.batch.measurement import (
    measure_batch_independence as measure_batch_independence,
)
from ensembles.checks.cost.judgement import assert_cost_equals as assert_cost_equals
from ensembles.checks.cost.judgement import assert_cost_within as assert_cost_within
from ensembles.checks.cost.measurement import measure_compute_cost as measure_compute_cost
from ensembles.checks.coupling.judgement import assert_members_coupled as assert_members_coupled
from ensembles.checks.coupling.judgement import (
    assert_members_coupled_to as assert_members_coupled_to,
)
from ensembles.checks.coupling.judgement import assert_members_uncoupled as assert_members_uncoupled
from ensembles.checks.coupling.measurement import (
    measure_gradient_coupling as measure_gradient_coupling,
)
from ensembles.checks.coverage.judgement import (
    assert_optimizer_complete as assert_optimizer_complete,
)
from ensembles.checks.coverage.measurement import (
    measure_optimizer_coverage as measure_optimizer_coverage,
)
from ensembles.checks.data.judgement import assert_members_bagged as assert_members_bagged
from ensembles.checks.data.judgement import assert_members_paired as assert_members_paired
from ensembles.checks.data.judgement import assert_members_shuffled as assert_members_shuffled
from ensembles.checks.data.measurement import measure_member_data as measure_member_data
from ensembles.checks.determinism.judgement import assert_deterministic as assert_deterministic
from ensembles.checks.determinism.judgement import (
    assert_loader_deterministic as assert_loader_deterministic,
)
from ensembles.checks.determinism.loaders import (
    measure_loader_determinism as measure_loader_determinism,
)
from ensembles.checks.determinism.measurement import measure_determinism as measure_determinism
from ensembles.checks.diversity.judgement import assert_members_diverse as assert_members_diverse
from ensembles.checks.diversity.measurement import (
    measure_member_diversity as measure_member_diversity,
)
from ensembles.checks.graph.drawing import draw_autograd_graph as draw_autograd_graph
from ensembles.checks.graph.judgement import assert_graph_equal as assert_graph_equal
from ensembles.checks.graph.measurement import measure_autograd_graph as measure_autograd_graph
from ensembles.checks.hygiene.judgement import assert_snapshot_detached as assert_snapshot_detached
from ensembles.checks.hygiene.judgement import assert_state_clean as assert_state_clean
from ensembles.checks.hygiene.measurement import measure_state_hygiene as measure_state_hygiene
from ensembles.checks.loss_scale.judgement import assert_loss_scaled as assert_loss_scaled
from ensembles.checks.loss_scale.judgement import assert_rates_effective as assert_rates_effective
from ensembles.checks.loss_scale.measurement import measure_loss_scale as measure_loss_scale
from ensembles.checks.ownership.judgement import assert_ownership as assert_ownership
from ensembles.checks.ownership.measurement import measure_ownership_map as measure_ownership_map
from ensembles.checks.prediction.judgement import (
    assert_metric_of_prediction as assert_metric_of_prediction,
)
from ensembles.checks.prediction.judgement import (
    assert_prediction_reduced as assert_prediction_reduced,
)
from ensembles.checks.prediction.measurement import (
    measure_prediction_reduction as measure_prediction_reduction,
)
from ensembles.checks.round_trips.judgement import (
    assert_round_trips_kept as assert_round_trips_kept,
)
from ensembles.checks.round_trips.measurement import measure_round_trips as measure_round_trips
from ensembles.checks.sharing.judgement import assert_members_share as assert_members_share
from ensembles.checks.sharing.judgement import (
    assert_parameters_distinct as assert_parameters_distinct,
)
from ensembles.checks.sharing.measurement import (
    measure_parameter_sharing as measure_parameter_sharing,
)
from ensembles.checks.trajectory.judgement import (
    assert_members_trained_alone as assert_members_trained_alone,
)
from ensembles.checks.trajectory.judgement import (
    assert_trajectories_equal as assert_trajectories_equal,
)
from ensembles.checks.trajectory.measurement import (
    measure_member_trajectories as measure_member_trajectories,
)
from ensembles.checks.trajectory.runs import (
    measure_training_trajectory as measure_training_trajectory,
)
from ensembles.gate.conformance import check_ensemble as check_ensemble
from ensembles.gate.conformance import checks_for as checks_for
from ensembles.gate.conformance import parametrize_with_checks as parametrize_with_checks
from ensembles.gate.results import Result as Result
from ensembles.gate.results import Results as Results
from ensembles.subject import Partition as Partition
from ensembles.subject import Subject as Subject
from ensembles.subject import split_axis as split_axis
from ensembles.subject import split_batch as split_batch
from ensembles.subject import whole as whole

__version__: str
