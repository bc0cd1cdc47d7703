"""Options of training: plain values there and back, and what is refused."""

import json

import pytest

from ensembles.experiments.training.options import Execution, TrainingOptions
from ensembles.experiments.training.schedules import Schedule
from ensembles.models.objectives import (
    OBJECTIVES,
    Interpolated,
    Joint,
    Mean,
    MeanField,
    Stochastic,
    Sum,
)

EVERY = [Sum(), Mean(), MeanField(), Interpolated(0.25), Stochastic(0.5, "one"), Joint(0.75)]


@pytest.mark.parametrize("objective", EVERY, ids=lambda objective: type(objective).__name__)
def test_every_objective_survives_a_plain_dict(objective):
    options = TrainingOptions(
        objective=objective,
        schedule=Schedule(name="step", milestones=(0.5,), warmup_epochs=2.5),
        clip_norm=1.0,
        validation=500,
        augment=None,
    )
    plain = json.loads(json.dumps(options.to_dict()))
    assert TrainingOptions.from_dict(plain) == options
    assert OBJECTIVES[plain["objective"]["name"]] is type(objective)


def test_no_objective_is_forgotten():
    assert {type(objective) for objective in EVERY} == set(OBJECTIVES.values())


class Own:
    def asked(self, names, *, step, seed):
        return tuple(names)

    def __call__(self, logits, labels):
        return next(iter(logits.values())).sum()


def test_an_objective_of_ones_own_is_named_and_cannot_be_built_from_its_name():
    plain = TrainingOptions(objective=Own()).to_dict()
    assert plain["objective"]["name"].endswith("test_options.Own")
    with pytest.raises(ValueError, match=r"objective must be one of .* got '.*Own'"):
        TrainingOptions.from_dict(plain)


def test_the_defaults_are_those_of_wide_resnets():
    """arXiv 1605.07146, section 3."""
    options = TrainingOptions()
    assert (options.lr, options.momentum, options.nesterov) == (0.1, 0.9, True)
    assert (options.weight_decay, options.batch_size, options.epochs) == (5e-4, 128, 200)


def test_a_rest_that_fills_no_batch_is_left_out_but_where_a_run_says_otherwise():
    """As of runs whose options were written when it was kept."""
    assert TrainingOptions().drop_last
    kept = {**TrainingOptions().to_dict(), "drop_last": False}
    assert TrainingOptions.from_dict(kept).to_dict() == kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be a finite number above 0, got 0.0"),
        ({"lr": float("nan")}, "lr must be a finite number above 0, got nan"),
        ({"eps": 0.0}, "eps must be a finite number above 0"),
        ({"weight_decay": -1e-4}, "weight_decay must be a finite number of at least 0"),
        ({"momentum": float("inf")}, "momentum must be a finite number of at least 0"),
        ({"validation": -1}, "validation must be a finite number of at least 0"),
        ({"clip_norm": 0.0}, "clip_norm must be a finite number above 0"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"optimizer": "lion"}, "optimizer must be one of"),
        ({"precision": "16"}, "precision must be one of"),
        ({"order": "random"}, "order must be one of"),
        ({"augment": "all"}, "augment must be one of"),
        ({"momentum": 0.0}, "nesterov=True needs a momentum above 0"),
        ({"objective": Joint(0.5), "order": "own"}, "predictions of the same images"),
        ({"epochs": 3, "schedule": Schedule(warmup_epochs=4)}, "longer than the run of 3"),
    ],
)
def test_values_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingOptions(**options)


def test_an_unknown_option_is_named():
    with pytest.raises(ValueError, match="unknown training option learning_rate"):
        TrainingOptions.from_dict({"learning_rate": 0.1})


@pytest.mark.parametrize("name", ["devices", "nodes", "checkpoint_every", "keep"])
def test_an_execution_has_at_least_one_of_everything(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Execution(**{name: 0})
