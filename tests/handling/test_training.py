import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ensembles.handling.training import (
    TrainingParts,
    fresh,
    gradients_of,
    hidden_modules,
    loss_of,
    optimizers_of,
    output_gradients,
    plain_sgd,
    projected_gradients,
    restrain,
    set_training,
    values_of,
)
from ensembles.instruments.autograd import leaves_of

# --- the batch and the model --------------------------------------------------------------------


def test_a_fresh_batch_has_the_same_structure_values_and_demands():
    batch = {"x": [torch.arange(3.0, requires_grad=True), torch.zeros(2)], "name": "first"}
    copy = fresh(batch)
    assert copy["name"] == "first"
    assert [x.requires_grad for x in copy["x"]] == [True, False]
    for mine, theirs in zip(copy["x"], batch["x"], strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()


def test_hidden_modules_are_found_in_containers_and_below_each_other_once():
    inner, outer, tied = nn.BatchNorm1d(1), nn.Sequential(nn.ReLU()), nn.BatchNorm1d(2)
    outer.extra = {"deep": [(inner,)]}
    model = nn.Linear(1, 1)
    model.others = [outer, tied, tied]
    model.others.append(model.others)  # a cycle
    assert {id(module) for module in hidden_modules([model])} == {
        id(m) for m in (inner, outer, tied)
    }
    assert len(hidden_modules([model])) == 3


def test_registered_modules_are_not_hidden():
    model = nn.Sequential(nn.Linear(1, 1))
    model.again = [model[0]]
    assert hidden_modules([model]) == []


def test_train_mode_is_set_for_what_is_trained_only():
    members = {"a": nn.Sequential(nn.Dropout()), "b": nn.Sequential(nn.Dropout())}
    set_training(members, {"b": members["b"]})
    assert [members[name][0].training for name in "ab"] == [False, True]


# --- gradients ----------------------------------------------------------------------------------


def test_a_projection_is_the_same_each_time_and_cancels_no_sum():
    logits = torch.zeros(4, 3, requires_grad=True)
    # The sum of a softmax is constant: its plain sum has no gradient at all.
    first, second = (
        projected_gradients([torch.softmax(logits, -1)], [logits])[0] for _ in range(2)
    )
    assert torch.equal(first, second)
    assert bool((first != 0).all())


def test_gradients_of_nothing_are_none():
    weight = torch.ones(2, requires_grad=True)
    assert gradients_of([torch.ones(2)], [torch.ones(2)], [weight]) == [None]
    assert gradients_of([weight * 2], [torch.ones(2)], []) == []


def test_a_reentrant_checkpoint_leaves_no_gradient_behind():
    layers = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    before = [torch.full_like(p, 7.0) for p in layers.parameters()]
    for parameter, gradient in zip(layers.parameters(), before, strict=True):
        parameter.grad = gradient
    output = checkpoint(layers[1], layers[0](torch.ones(2, 3)), use_reentrant=True)
    found = gradients_of([output], [torch.ones_like(output)], list(layers.parameters()))
    assert all(p.grad is g for p, g in zip(layers.parameters(), before, strict=True))
    plain = layers(torch.ones(2, 3)).sum()
    for mine, expected in zip(found, torch.autograd.grad(plain, layers.parameters()), strict=True):
        assert torch.equal(mine, expected)


def test_the_graph_stays_usable():
    weight = torch.ones(2, requires_grad=True)
    output = weight.exp()
    gradients_of([output], [torch.ones(2)], [weight])
    assert torch.equal(torch.autograd.grad(output.sum(), weight)[0], output.detach())


def test_values_of_a_sparse_gradient_are_added_up():
    table = nn.Embedding(4, 2, sparse=True)
    (gradient,) = torch.autograd.grad(table(torch.tensor([1, 1])).sum(), table.weight)
    assert torch.equal(values_of(gradient), torch.full((1, 2), 2.0))


def test_leaves_are_parameters_and_outputs_that_are_leaves_themselves():
    weight, other, unused = (torch.ones(2, requires_grad=True) for _ in range(3))
    found = list(leaves_of([other, torch.ones(2), (weight * other).exp()]))
    assert {id(leaf) for leaf in found} == {id(weight), id(other)}
    assert id(unused) not in {id(leaf) for leaf in found}


def test_a_node_of_the_users_with_a_variable_is_no_leaf():
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.variable = torch.ones(1)
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 2

    weight = torch.ones(2, requires_grad=True)
    assert [leaf is weight for leaf in leaves_of([Scaled.apply(weight)])] == [True]


# --- losses and optimizers ----------------------------------------------------------------------


def test_a_member_with_several_tensors_gives_them_all_to_the_loss():
    outputs = {"one": (torch.ones(2),), "two": (torch.ones(3), torch.ones(4))}
    assert loss_of(lambda y: y["one"].sum() + 10 * y["two"][1].sum(), outputs) == 42


def test_a_loss_that_works_in_place_changes_no_prediction():
    values = {"a": (torch.ones(2),), "b": (torch.ones(2),)}
    found = output_gradients(lambda y: y["a"].mul_(3).sum(), values)
    assert torch.equal(found["a"][0], torch.full((2,), 3.0))
    assert found["b"] == [None]
    assert torch.equal(values["a"][0], torch.ones(2))


def test_optimizers_may_be_a_list():
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    built = optimizers_of(
        lambda model: [torch.optim.SGD(m.parameters(), lr=0.1) for m in model], [first, second]
    )
    assert [o.param_groups[0]["params"][0] for o in built] == [first.weight, second.weight]


def test_plain_sgd_steps_each_trainable_parameter_once():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    second.bias.requires_grad_(False)
    held = plain_sgd([first, second]).param_groups[0]["params"]
    assert [id(p) for p in held] == [id(first.weight), id(first.bias)]
    with pytest.raises(ValueError, match="no trainable parameters, so no training step"):
        plain_sgd(first.requires_grad_(False))


# --- steps that stay small ----------------------------------------------------------------------


def with_gradient(values, gradient):
    parameter = nn.Parameter(torch.as_tensor(values))
    parameter.grad = torch.as_tensor(gradient)
    return parameter


@pytest.mark.parametrize(
    ("values", "gradient", "expected"),
    [
        ([3.0, 4.0], [3.0, 4.0], [3.0, 4.0]),
        ([3.0, 4.0], [6.0, 8.0], [3.0, 4.0]),
        ([3.0, 4.0], [0.0, -1e30], [0.0, -5.0]),
        ([0.0, 0.0], [0.6, 0.8], [0.6, 0.8]),
        ([0.0, 0.0], [6.0, 8.0], [0.6, 0.8]),
        ([3.0, 4.0], [math.inf, 1.0], [math.inf, 1.0]),
    ],
    ids=["as_large", "twice", "no_overflow", "at_zero", "large_at_zero", "infinite"],
)
def test_a_gradient_larger_than_its_parameter_is_scaled_to_its_size(values, gradient, expected):
    parameter = with_gradient(values, gradient)
    restrain([parameter, parameter])
    assert torch.allclose(parameter.grad, torch.tensor(expected), rtol=1e-6, atol=0)


def test_what_is_small_enough_keeps_its_bits():
    parameter = with_gradient(torch.randn(100), 0.5 * torch.randn(100))
    before = parameter.grad.clone()
    restrain([parameter])
    assert torch.equal(parameter.grad, before)


def test_one_parameter_does_not_scale_another_nor_one_gradient_two_parameters():
    # Autograd gives both terms of a sum the same tensor.
    same = torch.tensor([8.0])
    one, two, calm = (
        with_gradient([1.0], same),
        with_gradient([2.0], same),
        with_gradient([1.0], [1.0]),
    )
    restrain([one, two, calm, nn.Parameter(torch.ones(1))])
    assert [p.grad.item() for p in (one, two, calm)] == [1.0, 2.0, 1.0]


def test_the_sparse_gradient_of_an_embedding_is_scaled_too():
    table = nn.Embedding(4, 2, sparse=True)
    nn.init.ones_(table.weight)
    (100 * table(torch.tensor([1, 1]))).sum().backward()
    restrain([table.weight])
    assert table.weight.grad.is_sparse
    assert float(table.weight.grad.to_dense().norm()) == pytest.approx(8**0.5)


RAN_AWAY = "the training loss became NaN in step 3: training runs away. Nothing can be concluded"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            TrainingParts(loss=True, optimizer=True),
            "Likely the learning rate is too large for this batch. Give a smaller one, or a batch "
            "of more rows.",
        ),
        (
            TrainingParts(loss=False, optimizer=True),
            "Likely the learning rate is too large for this batch. Give a smaller one, or a batch "
            "of more rows, or the loss=... that the model is trained with.",
        ),
        (
            TrainingParts(loss=True, optimizer=False),
            "The check's own steps are small: likely a gradient is not finite, as of BatchNorm "
            "over few rows, of a root at zero, or in float16. Give a batch of more rows.",
        ),
    ],
    ids=["all_given", "no_loss", "no_optimizer"],
)
def test_a_loss_that_is_no_number_after_steps_is_told_as_training_that_runs_away(given, told):
    outputs = {"a": (torch.ones(1),)}
    assert given.loss_of(lambda y: y["a"].sum(), outputs, 3) == 1.0
    with pytest.raises(ValueError) as raised:
        given.loss_of(lambda y: y["a"].sum() * math.nan, outputs, 3)
    assert str(raised.value) == f"{RAN_AWAY} from it. {told}"


def test_a_loss_that_is_no_number_before_any_step_is_told_as_itself():
    with pytest.raises(ValueError, match=r"^loss=\.\.\. is nan for this model and batch\. Nothing"):
        TrainingParts(loss=True, optimizer=True).loss_of(
            lambda y: y["a"].sum() * math.nan, {"a": (torch.ones(1),)}, 1
        )


# --- what a LightningModule returns -------------------------------------------------------------


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def scheduled(model):
    optimizer = sgd(model)
    return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


def in_two_lists(model):
    optimizers = [sgd(model), sgd(model)]
    return optimizers, [torch.optim.lr_scheduler.StepLR(each, 1) for each in optimizers]


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (sgd, 1),
        (scheduled, 1),
        (in_two_lists, 2),
        (lambda model: ([sgd(model)], []), 1),
        (lambda model: (scheduled(model), scheduled(model), sgd(model)), 3),
    ],
    ids=["optimizer", "dict", "two_lists", "no_schedulers", "mixed"],
)
def test_every_form_of_configure_optimizers_gives_its_optimizers(build, count):
    model = nn.Linear(2, 2)
    found = optimizers_of(build, model)
    assert [type(one) for one in found] == [torch.optim.SGD] * count
    assert all(one.param_groups[0]["params"][0] is model.weight for one in found)


def test_optimizers_in_lists_of_lists_are_all_taken():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    assert len(optimizers_of(lambda model: [[sgd(model[0])], [sgd(model[1])]], model)) == 2


@pytest.mark.parametrize(
    "build",
    [lambda m: None, lambda m: {"lr_scheduler": sgd(m)}, lambda m: ([], []), lambda m: [sgd(m), 3]],
    ids=["none", "dict", "two_lists", "list"],
)
def test_what_holds_no_optimizer_is_refused(build):
    with pytest.raises(ValueError, match=r"^optimizer=\.\.\. returned an object of type "):
        optimizers_of(build, nn.Linear(2, 2))


def test_an_optimizer_of_a_model_that_registers_nothing_is_refused_with_the_cause():
    told = (
        r"^optimizer=sgd raised ValueError: optimizer got an empty parameter list "
        r"\(tests/handling/test_training.py:\d+\)\. It takes the model and returns its optimizer, "
        r"or a list of them\. The model registers no trainable parameters, so no training step is "
        r"possible\. Usual cause: members in a Python list instead of nn\.ModuleList, or all "
        r"parameters are frozen\.$"
    )
    with pytest.raises(ValueError, match=told):
        optimizers_of(sgd, nn.ReLU())
