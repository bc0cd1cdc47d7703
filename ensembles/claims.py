"""What can be claimed: every check by name, with how it reads a subject and its claim.

What a subject claims is `Subject.claims`, check name to claim. A factory that returns bare
modules claims by default:

- a list or dict of modules, of which there must be two: `DEFAULT_ENSEMBLE_CLAIMS`;
- one module that keeps two or more modules in an attribute `members`, a list or dict of modules:
  `DEFAULT_CONTAINER_CLAIMS`. That they are members says nothing of what they share;
- any other module: `DEFAULT_MODULE_CLAIMS`, whatever it returns, because nothing says that its
  outputs are members. Say so with a `Subject` and its `outputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ensembles.checks import (
    alone,
    batch,
    cost,
    coupling,
    coverage,
    data,
    determinism,
    diversity,
    effective_rates,
    graph,
    hygiene,
    loading,
    loss_scale,
    ownership,
    prediction,
    round_trips,
    sharing,
    trajectory,
)
from ensembles.subject import (
    Model,
    Partition,
    Subject,
    is_one_module,
    member_outputs,
    named_members,
)

__all__ = [
    "CHECKS",
    "DEFAULT_CONTAINER_CLAIMS",
    "DEFAULT_ENSEMBLE_CLAIMS",
    "DEFAULT_MODULE_CLAIMS",
    "Check",
]

DEFAULT_ENSEMBLE_CLAIMS: Mapping[str, Any] = {
    "sharing": "independent",
    "ownership": "independent",
    "coupling": "independent",
    "coverage": "complete",
    "diversity": "distinct",
}
DEFAULT_MODULE_CLAIMS: Mapping[str, Any] = {"sharing": "distinct", "coverage": "complete"}
DEFAULT_CONTAINER_CLAIMS: Mapping[str, Any] = {**DEFAULT_MODULE_CLAIMS, "diversity": "distinct"}


@dataclass(frozen=True)
class Check:
    """A check by name: what it promises, and how it looks at a subject.

    Attributes:
        name: What claims, `-k`, `--ensembles-require` and reports call it.
        promise: One sentence.
        run: Measures the model and compares with the claim; returns the measurement.
    """

    name: str
    promise: str
    run: Callable[[Subject, Model, Any], object]


def _run_sharing(subject: Subject, model: Model, claim: Any) -> object:
    __tracebackhide__ = True
    words = {"independent": (), "tied": ("*",), "distinct": None}
    names = words[claim] if isinstance(claim, str) and claim in words else claim
    if isinstance(names, str) or not (names is None or isinstance(names, Sequence)):
        raise _unknown_claim("sharing", claim, [*words, "a list of name patterns"])
    measured = sharing.measure_parameter_sharing(model, members=subject.members)
    sharing.assert_parameters_distinct(
        measured if subject.members is None else sharing.measure_parameter_sharing(model)
    )
    if names is not None:
        sharing.assert_members_share(measured, names)
    return measured


def _run_ownership(subject: Subject, model: Model, claim: Any) -> object:
    __tracebackhide__ = True
    if subject.members is not None:
        named_members(model, subject.members)  # refuses none before outputs are looked at
    measured = ownership.measure_ownership_map(model, _batch(subject), outputs=subject.outputs)
    ownership.assert_ownership(measured, claim)
    return measured


def _run_coupling(subject: Subject, model: Model, claim: Any) -> object:
    __tracebackhide__ = True
    parent = claim.get("parent") if isinstance(claim, Mapping) and len(claim) == 1 else None
    if claim not in ("independent", "tied") and not isinstance(parent, str):
        raise _unknown_claim("coupling", claim, ["independent", "tied", '{"parent": its name}'])
    measured = coupling.measure_gradient_coupling(
        model,
        _batch(subject),
        outputs=subject.outputs,
        members=subject.members,
        optimizer=subject.optimizer,
        loss=subject.loss,
    )
    if isinstance(parent, str):
        coupling.assert_members_coupled_to(measured, parent)
    elif claim == "tied":
        coupling.assert_members_coupled(measured)
    else:
        coupling.assert_members_uncoupled(measured)
    return measured


def _run_coverage(subject: Subject, model: Model, claim: Any) -> object:
    __tracebackhide__ = True
    if claim != "complete":
        raise _unknown_claim("coverage", claim, ["complete"])
    measured = coverage.measure_optimizer_coverage(
        model, subject.optimizer, _batch(subject), outputs=subject.outputs, loss=subject.loss
    )
    coverage.assert_optimizer_complete(measured)
    return measured


def _batch(subject: Subject) -> Any:
    if subject.batch is None:
        raise ValueError(f"subject {subject.name!r} has no batch: give Subject(batch=...).")
    return subject.batch()


def _run_graph(subject: Subject, model: Model, claim: Any) -> object:
    __tracebackhide__ = True
    if not isinstance(claim, (str, Path)):
        words = ["the text of a recorded graph", "a pathlib.Path of its file"]
        raise _unknown_claim("graph", claim, words)
    recorded = graph.RecordedGraph.of(claim)
    measured = graph.measure_autograd_graph(
        model, _batch(subject), outputs=subject.outputs, training=recorded.training
    )
    graph.assert_graph_equal(measured, recorded.text)
    return measured


_BUDGETS = ("flops", "parameters", "kept_bytes", "wasted")


def _run_cost(subject: Subject, model: Model, claim: Any) -> object:
    __tracebackhide__ = True
    if not isinstance(claim, Mapping) or not claim or not set(claim) <= set(_BUDGETS):
        words = [f"a dict of budgets for a training step: {', '.join(_BUDGETS)}"]
        raise _unknown_claim("cost", claim, words)
    measured = cost.measure_compute_cost(model, _batch(subject), outputs=subject.outputs)
    cost.assert_cost_within(measured, **claim)
    return measured


def _run_determinism(subject: Subject, model: Model, claim: Any) -> object:
    __tracebackhide__ = True
    options = dict(claim) if isinstance(claim, Mapping) else {}
    weights, factory = options.pop("weights", "drawn"), options.pop("factory", None)
    loaders, steps = options.pop("loaders", None), options.pop("steps", determinism.STEPS)
    known = claim == "bitwise" or (isinstance(claim, Mapping) and claim and not options)
    words = (weights in ("drawn", "loaded"), loaders in (None, "augmented", "plain"))
    if not known or not all(words) or not _is_count(steps):
        raise _unknown_claim(
            "determinism",
            claim,
            [
                *("bitwise", '{"weights": "loaded"}', '{"factory": "package.module:factory"}'),
                *('{"loaders": "augmented"}', '{"loaders": "plain"}', '{"steps": a number}'),
            ],
        )
    if loaders is None:
        del model  # large, maybe, and two others are built
    measured = determinism.measure_determinism(
        subject.make,
        subject.batch,
        outputs=subject.outputs,
        members=subject.members,
        optimizer=subject.optimizer,
        loss=subject.loss,
        clip=subject.clip,
        scheduler=subject.scheduler,
        steps=steps,
        factory=factory,
    )
    determinism.assert_deterministic(measured, loaded=weights == "loaded")
    if loaders is not None:
        read, names = _data_of(subject), _members_of_data(subject, model)
        for name in range(names) if isinstance(names, int) else names:
            loading.assert_loader_deterministic(
                loading.measure_loader_determinism(partial(read, name)),
                augmented=loaders == "augmented",
            )
    return measured


def _run_trajectory(subject: Subject, model: Model, claim: Any) -> object:
    __tracebackhide__ = True
    options = dict(claim) if isinstance(claim, Mapping) else {}
    follow, loss_is = options.pop("members", None), options.pop("loss", "sum")
    tolerance, steps = options.pop("tolerance", 0.0), options.pop("steps", trajectory.STEPS)
    known = follow in ("single", "separate") and loss_is in ("sum", "mean") and not options
    if not known or not _is_count(steps):
        words = ['{"members": "single"}', '{"members": "separate"}', 'with "loss": "mean"']
        words += ['with "tolerance": a number, or "recomputed"', 'with "steps": a number']
        raise _unknown_claim("trajectory", claim, words)
    measured = alone.measure_member_trajectories(
        model,
        _batch(subject),
        outputs=subject.outputs,
        members=subject.members,
        optimizer=subject.optimizer,
        loss=subject.loss,
        clip=subject.clip,
        scheduler=subject.scheduler,
        steps=steps,
        identical=follow == "single",
        loss_is=loss_is,
        values=bool(tolerance),
    )
    alone.assert_members_trained_alone(measured, tolerance=tolerance)
    return measured


def _run_prediction(subject: Subject, model: Model, claim: Any) -> object:
    __tracebackhide__ = True
    claim = claim if isinstance(claim, Mapping) else {"reduction": claim}
    known = {"reduction", "weights", "ties", "metric"}
    if not set(claim) <= known or not isinstance(claim.get("reduction", ""), str):
        words = [*prediction.REDUCTIONS, f"a dict of {', '.join(sorted(known))}"]
        raise _unknown_claim("prediction", claim, words)
    if subject.predict is None:
        raise ValueError(
            f"subject {subject.name!r} claims a prediction, and has none: give "
            "Subject(predict=...), a function of the model and the batch."
        )
    measured = prediction.measure_prediction_reduction(
        model,
        _batch(subject),
        subject.predict,
        outputs=subject.outputs,
        members=subject.members,
        weights=claim.get("weights"),
        evaluate=subject.evaluate,
    )
    prediction.assert_prediction_reduced(
        measured, claim.get("reduction", "arithmetic"), ties=claim.get("ties", "lowest")
    )
    if "metric" in claim:
        prediction.assert_metric_of_prediction(measured, claim["metric"])
    return measured


def _run_loss_scale(subject: Subject, model: Model, claim: Any) -> object:
    __tracebackhide__ = True
    known = {"loss", "clipping", "shared", "lr", "weight_decay", "warmup", "steps"}
    words = ["sum", "mean", "joint", "a number", "one for each member"]
    multiples = isinstance(claim, Mapping) and all(
        isinstance(x, (int, float)) for x in claim.values()
    )
    if isinstance(claim, Mapping) and "loss" not in claim and not multiples:
        words.append(f"a dict of loss and {', '.join(sorted(known - {'loss'}))}")
        raise _unknown_claim("loss_scale", claim, words)
    claim = claim if isinstance(claim, Mapping) and "loss" in claim else {"loss": claim}
    if not set(claim) <= known:
        raise _unknown_claim("loss_scale", claim, [f"a dict of {', '.join(sorted(known))}"])
    if isinstance(claim["loss"], str) and claim["loss"] not in words:
        raise _unknown_claim("loss_scale", claim["loss"], words)
    if subject.loss is None:
        raise ValueError(
            f"subject {subject.name!r} claims a loss scale, and has no loss: give "
            "Subject(loss=...), a function of the dict of member outputs."
        )
    rates = {key: claim[key] for key in ("lr", "weight_decay", "warmup") if key in claim}
    measured = loss_scale.measure_loss_scale(
        model,
        _batch(subject),
        subject.loss,
        outputs=subject.outputs,
        member_loss=subject.member_loss,
        optimizer=subject.optimizer,
        scheduler=subject.scheduler,
        steps=claim.get("steps", 100),
        clip=subject.clip,
    )
    loss_scale.assert_loss_scaled(
        measured,
        claim["loss"],
        clipping=claim.get("clipping", "member"),
        shared=claim.get("shared", _shared_by_design(subject)),
    )
    if rates:
        effective_rates.assert_rates_effective(measured, **rates)
    return measured


def _shared_by_design(subject: Subject) -> Sequence[str]:
    """Patterns of the parameters that the subject's other claims call shared."""
    sharing, ownership = subject.claims.get("sharing"), subject.claims.get("ownership")
    if isinstance(ownership, Mapping):
        return [name for name, said in ownership.items() if said not in ("independent", "unused")]
    if ownership in ("tied", "partition") or isinstance(ownership, Partition):
        return ["*"]
    return sharing if isinstance(sharing, (list, tuple)) else ()


def _run_diversity(subject: Subject, model: Model, claim: Any) -> object:
    __tracebackhide__ = True
    alike = () if claim in ("distinct", "independent", "seeded") else claim
    if isinstance(alike, str) or not isinstance(alike, Sequence):
        words = ["distinct", "independent", "seeded", "a list of patterns of names that are alike"]
        raise _unknown_claim("diversity", claim, words)
    del model  # large, maybe, and two others are built
    measured = diversity.measure_member_diversity(
        subject.make, _batch(subject), outputs=subject.outputs, members=subject.members
    )
    if claim == "distinct":
        diversity.assert_members_distinct(measured)
    else:
        diversity.assert_members_diverse(measured, alike, seeded=claim == "seeded")
    return measured


_DATA: Mapping[str, Callable[[data.MemberData], None]] = {
    "bagged": data.assert_members_bagged,
    "paired": data.assert_members_paired,
    "shuffled": data.assert_members_shuffled,
}


def _run_data(subject: Subject, model: Model, claim: Any) -> object:
    __tracebackhide__ = True
    if not isinstance(claim, str) or claim not in _DATA:
        raise _unknown_claim("data", claim, list(_DATA))
    measured = data.measure_member_data(
        _data_of(subject), _members_of_data(subject, model), size=subject.data_size
    )
    _DATA[claim](measured)
    return measured


def _data_of(subject: Subject) -> Callable[[Any], Any]:
    if subject.data is None:
        raise ValueError(
            f"subject {subject.name!r} has no data: give Subject(data=...), a function of the "
            "member to its sample indices or its loader."
        )
    return subject.data


def _members_of_data(subject: Subject, model: Model) -> int | list[str]:
    """How many members read data, or their names where they have any."""
    if is_one_module(model) and subject.members is None:
        names = list(member_outputs(model, _batch(subject), outputs=subject.outputs))
    else:
        names = list(named_members(model, subject.members))
    return len(names) if names == [str(i) for i in range(len(names))] else names


def _run_batch(subject: Subject, model: Model, claim: Any) -> object:
    __tracebackhide__ = True
    if claim not in ("rows", "rows in training"):
        raise _unknown_claim("batch", claim, ["rows", "rows in training"])
    measured = batch.measure_batch_independence(
        model, _batch(subject), outputs=subject.outputs, training=claim == "rows in training"
    )
    batch.assert_rows_independent(measured)
    return measured


def _run_round_trips(subject: Subject, model: Model, claim: Any) -> object:
    __tracebackhide__ = True
    options = dict(claim) if isinstance(claim, Mapping) else {"conversions": claim}
    factory = options.pop("factory", None)
    names = options.pop("conversions", "all")
    listing = isinstance(names, Sequence) and not isinstance(names, str)
    if options or not (names == "all" or (listing and names)):
        words = [
            "all",
            "a list of conversions",
            '{"conversions": ..., "factory": "module:factory"}',
        ]
        raise _unknown_claim("round_trips", claim, words)
    measured = round_trips.measure_round_trips(
        subject.make,
        _batch(subject),
        outputs=subject.outputs,
        conversions=names,
        factory=factory,
    )
    round_trips.assert_round_trips_kept(measured, names)
    return measured


def _run_hygiene(subject: Subject, model: Model, claim: Any) -> object:
    __tracebackhide__ = True
    options = dict(claim) if isinstance(claim, Mapping) else {}
    updates = options.pop("updates", 1)
    known = claim == "clean" or (isinstance(claim, Mapping) and claim and not options)
    if not known or isinstance(updates, bool) or not isinstance(updates, int) or updates < 0:
        words = ["clean", '{"updates": how often norms update in a step}']
        raise _unknown_claim("hygiene", claim, words)
    measured = hygiene.measure_state_hygiene(
        model,
        _batch(subject),
        outputs=subject.outputs,
        optimizer=subject.optimizer,
        loss=subject.loss,
    )
    hygiene.assert_state_clean(measured, updates=updates)
    return measured


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0


def _unknown_claim(check: str, claim: Any, words: Sequence[str]) -> ValueError:
    known = " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
    return ValueError(f"{check} cannot be claimed to be {claim!r}. It is {known}.")


CHECKS: Mapping[str, Check] = {
    check.name: check
    for check in (
        Check("sharing", "members share exactly the memory that they claim to share", _run_sharing),
        Check(
            "ownership",
            "every scalar weight moves the outputs of exactly the members that own it",
            _run_ownership,
        ),
        Check(
            "coupling",
            "a training step on one member moves that member only, or all that are tied to it",
            _run_coupling,
        ),
        Check(
            "coverage",
            "training reaches every trainable parameter, and steps each exactly once",
            _run_coverage,
        ),
        Check("graph", "the autograd graph of the model is the recorded one", _run_graph),
        Check("cost", "a training step costs no more than its budgets", _run_cost),
        Check(
            "determinism",
            "one seed gives the same bits in construction and training",
            _run_determinism,
        ),
        Check(
            "trajectory",
            "every member trains as it would alone, step by step and bit by bit",
            _run_trajectory,
        ),
        Check(
            "prediction",
            "the prediction is the reduction of the members' outputs that it claims to be",
            _run_prediction,
        ),
        Check(
            "loss_scale",
            "every member's gradient is the claimed multiple of its gradient alone",
            _run_loss_scale,
        ),
        Check(
            "diversity",
            "members start different in every drawn parameter and in their outputs",
            _run_diversity,
        ),
        Check("data", "members see the samples that they are claimed to see", _run_data),
        Check("batch", "row i of the output depends on row i of the input only", _run_batch),
        Check(
            "round_trips",
            "copies, files, casts and wrappers keep ties, function and what is trained",
            _run_round_trips,
        ),
        Check("hygiene", "state is registered, and moves only when it should", _run_hygiene),
    )
}
