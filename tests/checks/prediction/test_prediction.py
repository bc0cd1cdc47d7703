import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, nll_loss, one_hot

from ensembles.checks.prediction.claim import PredictionClaim
from ensembles.checks.prediction.judgement import (
    assert_metric_of_prediction,
    assert_prediction_reduced,
    judge,
)
from ensembles.checks.prediction.measurement import measure_prediction_reduction
from ensembles.claims import ClaimError
from ensembles.gate.conformance import check_ensemble
from ensembles.subject import Subject, split_axis, split_batch

WEIGHTS = (0.5, 0.3, 0.2)


def mlp(classes: int = 4) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(18, 8), nn.ReLU(), nn.Linear(8, classes))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4, 4)
    )


def with_softmax() -> nn.Module:
    return nn.Sequential(*mlp(), nn.Softmax(1))


def with_log_softmax() -> nn.Module:
    return nn.Sequential(*mlp(), nn.LogSoftmax(1))


def several(make=mlp, count: int = 3) -> list[nn.Module]:
    torch.manual_seed(0)
    return [make() for _ in range(count)]


def batch(rows: int = 5) -> Tensor:
    return torch.randn(rows, 2, 3, 3, generator=torch.Generator().manual_seed(1))


def stacked(members, x) -> Tensor:
    return torch.stack([member(x) for member in members])


def arithmetic(members, x) -> Tensor:
    return stacked(members, x).softmax(-1).mean(0)


def geometric(members, x) -> Tensor:
    return stacked(members, x).mean(0).softmax(-1)


def weighted(members, x) -> Tensor:
    return torch.einsum("m,mrc->rc", torch.tensor(WEIGHTS), stacked(members, x).softmax(-1))


def votes(members, x) -> Tensor:
    return one_hot(stacked(members, x).argmax(-1), 4).sum(0)


class Together(nn.Module):
    """Members in one module, whose call returns the prediction itself."""

    def __init__(self, members) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x):
        return arithmetic(self.members, x)


class Stacked(Together):
    """Members in one module, whose call returns all outputs, stacked along an axis."""

    def __init__(self, members, axis: int) -> None:
        super().__init__(members)
        self.axis = axis

    def forward(self, x):
        return torch.stack([member(x) for member in self.members], self.axis)


def assert_reduced(
    predict, reduction="arithmetic", *, members=None, x=None, ties="lowest", **kinds
):
    measured = measure_prediction_reduction(
        several() if members is None else members,
        batch() if x is None else x,
        predict=predict,
        **kinds,
    )
    assert_prediction_reduced(measured, reduction, ties=ties)


# --- it holds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("make", [mlp, conv])
@pytest.mark.parametrize(
    ("predict", "claim"), [(arithmetic, "arithmetic"), (geometric, "geometric")]
)
def test_a_mean_of_members_is_the_reduction_that_is_claimed(make, count, predict, claim):
    assert_reduced(predict, claim, members=several(make, count))


def test_log_probabilities_and_classes_are_predictions_too():
    assert_reduced(lambda m, x: arithmetic(m, x).log())
    assert_reduced(lambda m, x: stacked(m, x).mean(0).log_softmax(-1), "geometric")
    assert_reduced(lambda m, x: arithmetic(m, x).argmax(1))
    assert_reduced(lambda m, x: geometric(m, x).argmax(1), "geometric")


def test_members_that_emit_probabilities_or_their_logarithms_are_recognised():
    assert_reduced(lambda m, x: stacked(m, x).mean(0), members=several(with_softmax))
    assert_reduced(lambda m, x: stacked(m, x).exp().mean(0), members=several(with_log_softmax))
    assert_reduced(
        lambda m, x: stacked(m, x).mean(0).softmax(-1),
        "geometric",
        members=several(with_log_softmax),
    )


def test_the_mean_of_logits_holds_as_what_it_is():
    assert_reduced(lambda m, x: stacked(m, x).mean(0), "logits")


def test_the_largest_mean_of_logits_is_a_class_of_that_mean():
    assert_reduced(lambda m, x: stacked(m, x).mean(0).argmax(1), "logits")
    with pytest.raises(AssertionError, match="found the class of the arithmetic mean"):
        assert_reduced(lambda m, x: arithmetic(m, x).argmax(1), "logits")


def test_weights_are_claimed_with_the_reduction():
    assert_reduced(weighted, weights=WEIGHTS)


def test_votes_hold_as_classes_shares_counts_and_one_hot():
    assert_reduced(lambda m, x: votes(m, x).argmax(1), "vote")
    assert_reduced(lambda m, x: votes(m, x) / 3, "vote")
    assert_reduced(votes, "vote")
    assert_reduced(lambda m, x: one_hot(votes(m, x).argmax(1), 4).float(), "vote")


def highest(members, x):
    return 3 - votes(members, x).flip(1).argmax(1)


def first(members, x):
    chosen = stacked(members, x).argmax(-1)
    counts = votes(members, x).gather(1, chosen.T)
    return chosen.T.gather(1, counts.argmax(1, keepdim=True))[:, 0]


def by_probability(members, x):
    counts = votes(members, x)
    return torch.where(counts == counts.amax(1, keepdim=True), arithmetic(members, x), -1).argmax(1)


@pytest.mark.parametrize(
    ("predict", "ties"), [(highest, "highest"), (first, "first"), (by_probability, "probability")]
)
def test_what_decides_a_tie_is_part_of_the_claim(predict, ties):
    assert_reduced(predict, "vote", ties=ties)
    with pytest.raises(AssertionError, match="ties to the lowest class, but is not"):
        assert_reduced(predict, "vote")


def test_votes_of_two_classes_and_three_members_are_never_tied():
    two = several(lambda: mlp(2))
    assert_reduced(lambda m, x: stacked(m, x).argmax(-1).mode(0).values, "vote", members=two)


def test_two_members_and_two_classes_have_one_class_whatever_the_mean():
    two = several(lambda: mlp(2), 2)
    assert_reduced(lambda m, x: arithmetic(m, x).argmax(1), members=two)


def test_members_inside_one_module_are_found():
    measured = measure_prediction_reduction(
        Together(several()), batch(), predict=lambda m, x: m(x), members=lambda m: m.members
    )
    assert_prediction_reduced(measured)


class Heads(nn.Module):
    """Members are heads of one trunk: they cannot be called on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(18, 6), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(6, 4) for _ in range(3))

    def forward(self, x):
        features = self.trunk(x)
        return [head(features) for head in self.heads]


@pytest.mark.parametrize("members", [None, lambda model: model.heads])
def test_heads_of_one_trunk_are_members(members):
    measured = measure_prediction_reduction(
        Heads(),
        batch(),
        predict=lambda m, x: torch.stack(m(x)).softmax(-1).mean(0),
        members=members,
    )
    assert_prediction_reduced(measured)


def test_one_module_called_with_the_weights_of_each_member_is_looked_at_in_real_outputs():
    def predict(members, x):
        stacks = [dict(member.named_parameters()) for member in members]
        calls = [torch.func.functional_call(members[0], weights, x) for weights in stacks]
        return torch.stack(calls).softmax(-1).mean(0)

    assert_reduced(predict, members=scaled(30))


def test_members_stacked_by_vmap_are_looked_at_in_real_outputs():
    members = nn.ModuleList(scaled(30)).eval()
    base = copy.deepcopy(members[0]).to("meta")

    def predict(found, x):
        stacks = torch.func.stack_module_state(found)

        def call(parameters, buffers, inputs):
            return torch.func.functional_call(base, (parameters, buffers), (inputs,))

        return torch.vmap(call, (0, 0, None))(*stacks, x).softmax(-1).mean(0)

    assert_reduced(predict, members=members)


def test_one_module_under_vmap_is_looked_at_in_real_outputs():
    members = nn.ModuleList(scaled(30))

    def predict(found, x):
        parameters, buffers = torch.func.stack_module_state(list(found))

        def call(*state):
            return torch.func.functional_call(found[0], state, (x,))

        return torch.vmap(call)(parameters, buffers).softmax(-1).mean(0)

    assert_reduced(predict, members=members)


@pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated")
def test_scripted_members_are_looked_at_in_real_outputs():
    members = [torch.jit.script(member) for member in scaled(30)]
    assert_reduced(arithmetic, members=members)


def test_many_members_and_few_rows_are_told_apart():
    assert_reduced(arithmetic, members=several(lambda: mlp(2), 12), x=batch(3))


@pytest.mark.parametrize("axis", [0, 1])
def test_members_stacked_in_one_output_are_looked_at_in_the_output(axis):
    measured = measure_prediction_reduction(
        Stacked(several(), axis),
        batch(),
        predict=lambda m, x: m(x).softmax(-1).mean(axis),
        outputs=split_axis(axis),
    )
    assert_prediction_reduced(measured)


def test_members_stacked_along_the_batch_are_looked_at_in_the_output():
    class Repeated(Together):
        def forward(self, x):
            return torch.cat([member(x) for member in self.members])

    def predict(model, x, members=3):
        return model(x).view(members, -1, 4).softmax(-1).mean(0)

    measured = measure_prediction_reduction(
        Repeated(several()), batch(), predict=predict, outputs=split_batch(3)
    )
    assert_prediction_reduced(measured)


def test_a_loader_that_goes_through_the_batch_in_chunks_holds():
    assert_reduced(lambda m, x: torch.cat([arithmetic(m, part) for part in x.split(2)]))


def test_dense_predictions_have_classes_on_the_second_axis():
    dense = several(lambda: nn.Conv2d(2, 4, 1))
    assert_reduced(lambda m, x: stacked(m, x).softmax(2).mean(0), members=dense)
    last = several(lambda: nn.Linear(3, 4))
    assert_reduced(arithmetic, members=last, axis=-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_precision_is_that_of_the_members(dtype):
    members = [member.to(dtype) for member in several()]
    assert_reduced(arithmetic, members=members, x=batch().to(dtype))
    with pytest.raises(AssertionError):
        assert_reduced(geometric, members=members, x=batch().to(dtype))


# --- it breaks, and says what the prediction is -------------------------------------------------


def test_logits_averaged_for_probabilities_are_broken(golden):
    with pytest.raises(AssertionError) as broken:
        assert_reduced(geometric)
    golden(str(broken.value), "messages/prediction_average_of_logits.txt")


def test_softmax_applied_twice_is_broken(golden):
    with pytest.raises(AssertionError) as broken:
        assert_reduced(arithmetic, members=several(with_softmax))
    golden(str(broken.value), "messages/prediction_softmax_twice.txt")


def test_rows_mixed_by_a_reshape_are_broken(golden):
    with pytest.raises(AssertionError) as broken:
        assert_reduced(
            lambda m, x: torch.stack([one(x) for one in m], 1).softmax(-1).view(3, 5, 4).mean(0)
        )
    golden(str(broken.value), "messages/prediction_rows_mixed.txt")


def test_weights_applied_twice_are_broken(golden):
    squares = torch.tensor(WEIGHTS).square()
    with pytest.raises(AssertionError) as broken:
        assert_reduced(
            lambda m, x: torch.einsum("m,mrc->rc", squares, stacked(m, x).softmax(-1)),
            weights=WEIGHTS,
        )
    golden(str(broken.value), "messages/prediction_weights_twice.txt")


def test_outputs_that_nobody_reduced_are_broken(golden):
    with pytest.raises(AssertionError) as broken:
        assert_reduced(stacked)
    golden(str(broken.value), "messages/prediction_not_reduced.txt")


FAULTS = {
    "member 2 alone": lambda m, x: stacked(m, x).softmax(-1)[-1],
    "the arithmetic mean of the probabilities without member 2": lambda m, x: arithmetic(m[:2], x),
    "the sum over members in place of the arithmetic mean of the probabilities": lambda m, x: (
        stacked(m, x).softmax(-1).sum(0)
    ),
    "the geometric mean of the probabilities, not normalised": lambda m, x: (
        stacked(m, x).log_softmax(-1).mean(0).exp()
    ),
    "the mean of the log-probabilities, not normalised": lambda m, x: (
        stacked(m, x).log_softmax(-1).mean(0)
    ),
    "the mean of the logits": lambda m, x: stacked(m, x).mean(0),
    "the softmax of the geometric mean (softmax twice)": lambda m, x: geometric(m, x).softmax(-1),
    "the softmax of the mean of the probabilities (softmax twice)": lambda m, x: arithmetic(
        m, x
    ).softmax(-1),
    "the uniform distribution, whatever members predict": lambda m, x: (
        stacked(m, x).softmax(0).mean(0) * 3 / 4
    ),
    "the maximum over the members": lambda m, x: stacked(m, x).softmax(-1).amax(0),
    "the median over the members": lambda m, x: stacked(m, x).softmax(-1).median(0).values,
    "with rows in another order: 4, 3, 2, 1, 0": lambda m, x: arithmetic(m, x).flip(0),
    "with classes in another order: 3, 2, 1, 0": lambda m, x: arithmetic(m, x).flip(1),
    "of members and rows that a reshape mixed": lambda m, x: (
        stacked(m, x).softmax(-1).reshape(5, 3, 4).mean(1)
    ),
    "no known reduction": lambda m, x: (stacked(m, x) / 2).softmax(-1).mean(0),
    "shape (4, 4) in place of (5, 4)": lambda m, x: arithmetic(m, x)[:4],
    "found the class of the geometric mean": lambda m, x: geometric(m, x).argmax(1),
    "found the class of member 1 alone": lambda m, x: stacked(m, x)[1].argmax(1),
}


@pytest.mark.parametrize("words", FAULTS)
def test_a_fault_is_named(words):
    with pytest.raises(AssertionError) as broken:
        assert_reduced(FAULTS[words])
    assert words in str(broken.value)


@pytest.mark.parametrize(
    ("words", "weights"),
    [
        ("with the weights of other members: weights 0.2, 0.3, 0.5", (0.2, 0.3, 0.5)),
        ("with the weights, and divided by 3 too", tuple(w / 3 for w in WEIGHTS)),
        ("with the weights applied twice, normalised", tuple(w * w / 0.38 for w in WEIGHTS)),
        ("without the weights", (1 / 3, 1 / 3, 1 / 3)),
        ("with weights 0.6, 0.3, 0.1", (0.6, 0.3, 0.1)),
    ],
)
def test_other_weights_are_named(words, weights):
    mixed = torch.tensor(weights)
    with pytest.raises(AssertionError) as broken:
        assert_reduced(
            lambda m, x: torch.einsum("m,mrc->rc", mixed, stacked(m, x).softmax(-1)),
            weights=WEIGHTS,
        )
    assert words in str(broken.value)


def test_softmax_over_the_rows_is_broken():
    with pytest.raises(AssertionError, match="expected to sum to 1"):
        assert_reduced(lambda m, x: stacked(m, x).softmax(1).mean(0))


def test_a_prediction_of_nan_is_broken():
    with pytest.raises(AssertionError, match="found no known reduction"):
        assert_reduced(lambda m, x: arithmetic(m, x) * torch.nan)


def test_it_breaks_in_members_that_were_never_trained_and_agree():
    """Their reductions are almost equal; the check makes them differ."""
    members = several()
    for member in members[1:]:
        member.load_state_dict(members[0].state_dict())
        with torch.no_grad():
            member[-1].bias += 1e-3 * torch.randn(4)
    assert_reduced(arithmetic, members=members)
    with pytest.raises(AssertionError, match=r"found +the geometric mean"):
        assert_reduced(geometric, members=members)


# --- the metric ---------------------------------------------------------------------------------


def metric_of(evaluate, name, *, predict=arithmetic, members=None):
    measured = measure_prediction_reduction(
        several() if members is None else members, batch(), predict=predict, evaluate=evaluate
    )
    assert_metric_of_prediction(measured, name)


def accuracy(p, y):
    return (p.argmax(1) == y).double().mean()


METRICS = {
    "accuracy": lambda m, x, y: accuracy(arithmetic(m, x), y),
    "error": lambda m, x, y: 1 - accuracy(arithmetic(m, x), y).item(),
    "nll": lambda m, x, y: nll_loss(arithmetic(m, x).log(), y),
    "brier": lambda m, x, y: (arithmetic(m, x) - one_hot(y, 4)).square().sum(1).mean(),
}


@pytest.mark.parametrize("name", METRICS)
def test_the_metric_of_the_prediction_holds(name):
    metric_of(METRICS[name], name)


def test_the_metric_of_logits_is_that_of_their_softmax():
    def evaluate(m, x, y):
        return cross_entropy(stacked(m, x).mean(0), y)

    metric_of(evaluate, "nll", predict=lambda m, x: stacked(m, x).mean(0))


def test_a_loss_that_takes_probabilities_for_logits_is_broken(golden):
    with pytest.raises(AssertionError) as broken:
        metric_of(lambda m, x, y: cross_entropy(arithmetic(m, x), y), "nll")
    golden(str(broken.value), "messages/prediction_loss_of_probabilities.txt")


def test_the_metric_of_the_last_member_is_broken(golden):
    with pytest.raises(AssertionError) as broken:
        metric_of(lambda m, x, y: accuracy(m[-1](x), y), "accuracy")
    golden(str(broken.value), "messages/prediction_last_member_metric.txt")


WRONG_METRICS = {
    "found the mean of the members' accuracy": (
        "accuracy",
        lambda m, x, y: sum(accuracy(one(x), y) for one in m) / 3,
    ),
    "found the mean of the members' nll": (
        "nll",
        lambda m, x, y: sum(cross_entropy(one(x), y) for one in m) / 3,
    ),
    "found the accuracy in per cent of the ensemble's": (
        "accuracy",
        lambda m, x, y: 100 * accuracy(arithmetic(m, x), y),
    ),
    "found no known metric": ("accuracy", lambda m, x, y: accuracy(arithmetic(m, x), y.flip(0))),
    "with probabilities taken for their logarithms": (
        "nll",
        lambda m, x, y: nll_loss(arithmetic(m, x), y),
    ),
}


@pytest.mark.parametrize("words", WRONG_METRICS)
def test_a_wrong_metric_is_named(words):
    name, evaluate = WRONG_METRICS[words]
    with pytest.raises(AssertionError, match=words.replace("found ", "found +")):
        metric_of(evaluate, name)


# --- wrong use ----------------------------------------------------------------------------------


def test_one_member_is_an_error():
    with pytest.raises(ValueError, match="only one was found"):
        assert_reduced(arithmetic, members=several(count=1))


def test_members_that_predict_the_same_are_an_error():
    member = mlp()
    with pytest.raises(ValueError, match="members 0 and 1 predict the same"):
        assert_reduced(arithmetic, members=[member, member])


def test_rows_that_are_equal_are_an_error():
    with pytest.raises(ValueError, match="rows cannot be told apart"):
        assert_reduced(arithmetic, x=torch.ones(5, 2, 3, 3))


def test_no_rows_are_an_error():
    with pytest.raises(ValueError, match="the batch has no rows"):
        assert_reduced(arithmetic, x=batch(0))


def test_one_row_is_an_error():
    with pytest.raises(ValueError, match="rows cannot be told apart"):
        assert_reduced(arithmetic, x=batch(1))


def of_copies(reduce):
    """A prediction by copies of the members, whose outputs cannot be changed from outside."""

    def predict(members, x):
        copies = [mlp() for _ in members]
        for one, other in zip(copies, members, strict=True):
            one.load_state_dict(other.state_dict())
        return reduce([one.eval() for one in copies], x)

    return predict


def scaled(factor: float) -> list[nn.Module]:
    members = several()
    for member in members:
        with torch.no_grad():
            member[-1].weight *= factor
            member[-1].bias *= factor
    return members


def test_real_outputs_that_are_too_equal_are_an_error():
    with pytest.raises(ValueError, match="cannot be told apart on this batch"):
        assert_reduced(of_copies(geometric), members=scaled(1e-2))


def test_real_outputs_that_differ_are_looked_at():
    assert_reduced(of_copies(arithmetic), members=scaled(30))
    with pytest.raises(AssertionError, match=r"found +the geometric mean"):
        assert_reduced(of_copies(geometric), members=scaled(30))


@pytest.mark.parametrize(
    ("words", "kinds"),
    [
        ("whose sum is 1", {"weights": (0.5, 0.5, 0.5)}),
        ("whose sum is 1", {"weights": (0.5, 0.5)}),
        ("no classes on axis 5", {"axis": 5}),
        ("predict=... raised KeyError", {"predict": lambda m, x: {}["missing"]}),
        ("predict=... returned an object of type list", {"predict": lambda m, x: [1]}),
        ("evaluate=... raised", {"evaluate": lambda m, x, y: stacked(m, x)}),
    ],
)
def test_what_does_not_fit_is_an_error(words, kinds):
    arguments = {"predict": arithmetic, **kinds}
    with pytest.raises(ValueError) as refused:
        measure_prediction_reduction(several(), batch(), **arguments)
    assert words in str(refused.value)


def test_members_that_emit_different_things_are_an_error():
    with pytest.raises(ValueError, match="0 logits, 1 probabilities"):
        assert_reduced(arithmetic, members=[mlp(), with_softmax()])


def test_claims_that_do_not_exist_are_errors():
    measured = measure_prediction_reduction(several(), batch(), predict=arithmetic)
    with pytest.raises(ValueError, match="It can be: arithmetic, geometric, vote or logits"):
        assert_prediction_reduced(measured, "mean")
    with pytest.raises(ValueError, match="ties of a vote cannot be claimed to be 'random'"):
        assert_prediction_reduced(measured, "vote", ties="random")
    with pytest.raises(ValueError, match="It can be: accuracy, error, nll or brier"):
        assert_metric_of_prediction(measured, "f1")
    with pytest.raises(ValueError, match="none was measured: give evaluate"):
        assert_metric_of_prediction(measured, "nll")
    of_softmax = measure_prediction_reduction(several(with_softmax), batch(), predict=arithmetic)
    with pytest.raises(ValueError, match="members emit probabilities"):
        assert_prediction_reduced(of_softmax, "logits")


# --- looking changes nothing --------------------------------------------------------------------


def test_looking_changes_nothing():
    members = several(conv)
    before = copy.deepcopy([member.state_dict() for member in members])
    state, x = torch.get_rng_state(), batch()
    kept = x.clone()

    def predict(m, inputs):
        return arithmetic(m, inputs.mul_(2))

    recipe = {"predict": predict, "evaluate": METRICS["nll"]}
    measured = measure_prediction_reduction(members, x, **recipe)
    assert measured == measure_prediction_reduction(members, x, **recipe)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, kept)
    assert all(m.training and not m._forward_hooks for member in members for m in member.modules())
    for member, saved in zip(members, before, strict=True):
        for name, tensor in member.state_dict().items():
            assert torch.equal(tensor, saved[name])


def test_the_model_predicts_in_eval_mode():
    modes = set()

    def predict(members, x):
        modes.update(m.training for member in members for m in member.modules())
        return arithmetic(members, x)

    assert_reduced(predict, members=several(conv))
    assert modes == {False}


def test_members_that_draw_random_numbers_in_eval_mode_draw_the_same():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = mlp()

        def forward(self, x):
            return self.network(x + torch.randn_like(x))

    assert_reduced(arithmetic, members=several(Noisy))


def test_hooks_are_gone_after_an_error():
    members = several()
    with pytest.raises(ValueError, match=r"predict=\.\.\. raised"):
        measure_prediction_reduction(members, batch(), predict=lambda m, x: 1 / 0)
    assert not any(m._forward_hooks for member in members for m in member.modules())


# --- the fixture, and the gate ------------------------------------------------------------------


def test_the_fixture_asserts_reductions_and_metrics(prediction_reduction):
    members, x = several(), batch()
    prediction_reduction.assert_reduced(members, x, "geometric", predict=geometric)
    of_mean = {"predict": arithmetic, "evaluate": METRICS["nll"]}
    prediction_reduction.assert_metric(members, x, "nll", **of_mean)
    with pytest.raises(AssertionError, match="is claimed to be the arithmetic mean"):
        prediction_reduction.assert_reduced(members, x, predict=geometric)
    with pytest.raises(AssertionError, match="the metric is claimed"):
        prediction_reduction.assert_metric(members, x, "brier", **of_mean)


@pytest.mark.parametrize(
    ("claim", "status"),
    [
        ("arithmetic", "held"),
        ("geometric", "broken"),
        ({"reduction": "arithmetic", "metric": "nll"}, "held"),
        ({"reduction": "arithmetic", "metric": "accuracy"}, "broken"),
        ({"reduction": "arithmetic", "weights": WEIGHTS}, "broken"),
        ({"reduction": "vote", "ties": "first"}, "broken"),
    ],
)
def test_the_gate_reads_the_claim(claim, status):
    subject = Subject(
        make=several,
        batch=batch,
        predict=arithmetic,
        evaluate=METRICS["nll"],
        claims={"prediction": claim},
    )
    (result,) = (r for r in check_ensemble(subject) if r.check == "prediction")
    assert result.status == status, result.message


@pytest.mark.parametrize("claim", ["mean", {"reductions": "arithmetic"}, 3, {"axis": "last"}])
def test_a_claim_that_is_no_reduction_is_refused(claim):
    subject = Subject(make=several, batch=batch, claims={"prediction": claim})
    with pytest.raises(ClaimError, match="prediction cannot be claimed to be"):
        check_ensemble(subject)


def test_a_wrong_reduction_and_a_wrong_metric_are_told_together():
    measured = measure_prediction_reduction(
        several(), batch(), predict=geometric, evaluate=lambda m, x, y: accuracy(m[-1](x), y)
    )
    found = judge(measured, PredictionClaim("arithmetic", metric="accuracy"))
    assert found.kinds == ("geometric", "another metric")
    assert found[1].found == "the accuracy of member 2 alone"


def test_the_class_axis_is_part_of_the_claim():
    last = several(lambda: nn.Linear(3, 4))
    subject = Subject(
        make=lambda: last,
        batch=batch,
        predict=lambda m, x: stacked(m, x).softmax(-1).mean(0),
        claims={"prediction": {"reduction": "arithmetic", "axis": -1}},
    )
    assert check_ensemble(subject)["prediction"].status == "held"


def test_the_gate_asks_for_the_prediction():
    subject = Subject(make=several, batch=batch, claims={"prediction": "arithmetic"})
    (result,) = (r for r in check_ensemble(subject) if r.check == "prediction")
    assert result.status == "error"
    assert "has no prediction: give predict=" in result.message
