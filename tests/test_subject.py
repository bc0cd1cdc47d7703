import re
from collections import namedtuple

import pytest
import torch
from torch import nn

from ensembles.handling.members import call, member_outputs, named_members, named_modules_of
from ensembles.handling.numbers import checked_numbers
from ensembles.subject import Subject, split_axis, split_batch


class Returning(nn.Module):
    """Returns what it was made with, whatever it is called on."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self, *args, **kwargs):
        return self.value


def refused(told: str):
    return pytest.raises(ValueError, match=f"^{re.escape(told)}")


def plain(outputs: dict) -> dict:
    return {name: [y.tolist() for y in tensors] for name, tensors in outputs.items()}


# --- the subject --------------------------------------------------------------------------------


def test_a_model_in_place_of_its_recipe_is_refused():
    with refused("Subject(make=...) takes a function that builds the model, but got an object of"):
        Subject(make=[nn.Linear(2, 2)])


def test_a_subject_is_named_after_its_recipe():
    def wide_resnet():
        return nn.Linear(2, 2)

    assert Subject(make=wide_resnet).name == "wide_resnet"
    assert Subject(make=Returning(None)).name == "subject"


def test_a_subject_prints_its_name_and_claims():
    subject = Subject(make=list, name="three", claims={"sharing": "tied"})
    assert repr(subject) == "Subject(name='three', claims={'sharing': 'tied'})"


def test_other_claims_leave_the_subject_as_it_was():
    subject = Subject(make=list, claims={"sharing": "tied"})
    assert dict(subject.claiming(ownership="tied").claims) == {"ownership": "tied"}
    assert dict(subject.claims) == {"sharing": "tied"}


# --- modules and members ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (nn.Linear(2, 2), ["model"]),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU()), ["model"]),
        ([nn.Linear(2, 2), nn.ReLU()], ["0", "1"]),
        ((nn.Linear(2, 2), nn.ReLU()), ["0", "1"]),
        ({"b": nn.Linear(2, 2), "a": nn.ReLU()}, ["b", "a"]),
        (nn.ModuleList([nn.Linear(2, 2)]), ["0"]),
        (nn.ModuleDict({"left": nn.Linear(2, 2)}), ["left"]),
    ],
    ids=["module", "sequential", "list", "tuple", "dict", "module_list", "module_dict"],
)
def test_modules_are_named(model, names):
    assert list(named_modules_of(model)) == names


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (None, "the model is an object of type NoneType: give a list or dict"),
        ("resnet18", "the model is an object of type str: give a list or dict"),
        ([], "the model has no members: there is nothing to compare."),
        ({}, "the model has no members: there is nothing to compare."),
        ([nn.ReLU(), 3], "the model: member 1 is an object of type int, not a torch.nn.Module."),
        (
            [nn.ReLU(), torch.zeros(2)],
            "the model: member 1 is a tensor of dtype torch.float32 and shape (2,), not a",
        ),
    ],
    ids=["none", "name", "empty_list", "empty_dict", "number", "tensor"],
)
def test_what_is_no_model_is_refused(model, told):
    with refused(told):
        named_modules_of(model)


def test_members_are_found_inside_a_module():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert named_members(model, list) == {"0": model[0], "1": model[1]}


def test_members_that_are_not_there_are_refused():
    with refused("members=... raised AttributeError: 'Linear' object has no attribute"):
        named_members(nn.Linear(2, 2), lambda model: model.heads)
    with refused("members=... has no members: there is nothing to compare."):
        named_members(nn.Linear(2, 2), lambda model: [])


# --- outputs ------------------------------------------------------------------------------------

LEFT, RIGHT = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
Pair = namedtuple("Pair", "logits hidden")


@pytest.mark.parametrize(
    ("value", "outputs", "expected"),
    [
        (LEFT, None, {"model": [[1.0, 2.0]]}),
        ([LEFT, RIGHT], None, {"0": [[1.0, 2.0]], "1": [[3.0]]}),
        ({"a": LEFT, "b": {"logits": RIGHT}}, None, {"a": [[1.0, 2.0]], "b": [[3.0]]}),
        ([Pair(LEFT, RIGHT), RIGHT], None, {"0": [[1.0, 2.0], [3.0]], "1": [[3.0]]}),
        ([(torch.tensor(1), LEFT), RIGHT], None, {"0": [[1.0, 2.0]], "1": [[3.0]]}),
        (torch.stack([LEFT, LEFT + 1]), split_axis(0), {"0": [[1.0, 2.0]], "1": [[2.0, 3.0]]}),
        (torch.stack([LEFT, LEFT + 1], 1), split_axis(-1), {"0": [[1.0, 2.0]], "1": [[2.0, 3.0]]}),
        (torch.arange(4.0), split_batch(2), {"0": [[0.0, 1.0]], "1": [[2.0, 3.0]]}),
        ((LEFT, RIGHT), lambda output: {"both": output}, {"both": [[1.0, 2.0], [3.0]]}),
    ],
    ids=[
        *("tensor", "list", "dict", "named_tuple", "integers_beside", "axis", "last_axis"),
        *("batch", "function"),
    ],
)
def test_outputs_are_split_into_members(value, outputs, expected):
    assert plain(member_outputs(Returning(value), LEFT, outputs=outputs)) == expected


@pytest.mark.parametrize(
    ("value", "outputs", "told"),
    [
        (3, None, "the output of member model is an object of type int, and holds no floating"),
        ([], None, "the model's output has no members: there is nothing to compare."),
        ([LEFT, "cat"], None, "the output of member 1 is an object of type str, and holds no"),
        ([torch.tensor(1)], None, "the output of member 0 is a tensor of dtype torch.int64 and"),
        ([LEFT], split_axis(0), "split_axis(0) splits a tensor, but the model returned an object"),
        (LEFT, split_axis(1), "split_axis(1): the model's output has shape (2,), which has no"),
        (LEFT, split_axis(-2), "split_axis(-2): the model's output has shape (2,), which has no"),
        (LEFT, split_batch(3), "split_batch(3): the model's output has shape (2,), and its number"),
        ("cat", split_batch(2), "split_batch(2) splits a tensor, but the model returned an object"),
        (LEFT, lambda y: y.heads, "outputs=... raised AttributeError: 'Tensor' object has no"),
        (LEFT, lambda y: y, "the model's output is a tensor of dtype torch.float32 and shape (2,)"),
    ],
    ids=[
        *("number", "none", "text", "integers", "no_tensor", "no_axis", "no_negative_axis"),
        *("uneven_batch", "no_batch", "no_attribute", "no_split"),
    ],
)
def test_outputs_that_are_no_members_are_refused(value, outputs, told):
    with refused(told):
        member_outputs(Returning(value), LEFT, outputs=outputs)


def test_a_batch_cannot_be_split_into_no_members():
    with refused("split_batch(0): the number of members must be at least 1."):
        split_batch(0)


# --- the call -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch", [LEFT, (LEFT, RIGHT), {"input": LEFT}], ids=["tensor", "tuple", "dict"]
)
def test_the_batch_is_given_as_it_is_written(batch):
    class Echo(nn.Module):
        def forward(self, *args, **kwargs):
            return args, kwargs

    args, kwargs = call(Echo(), batch, place="the model")
    expected = batch if isinstance(batch, (tuple, dict)) else (batch,)
    assert (args or kwargs) == expected


def test_an_error_of_the_call_names_member_and_batch():
    told = "calling member 1 (Linear) on the batch (5, 4) torch.float32 on cpu raised RuntimeError"
    with refused(told):
        member_outputs([nn.Linear(4, 2), nn.Linear(3, 2)], torch.randn(5, 4))


def test_an_error_of_the_call_names_the_devices_where_there_are_several():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2, device="meta"))
    with pytest.raises(ValueError, match="Several devices are in use: ") as raised:
        member_outputs(model, torch.randn(5, 4))
    assert str(raised.value).endswith(
        "cpu holds 0.weight; meta holds 1.weight. Move model and batch to one."
    )


# --- numbers ------------------------------------------------------------------------------------


def infinite() -> nn.Module:
    layer = nn.Linear(4, 2)
    layer.bias.data[1] = float("inf")
    return layer


def of_dtype(dtype: torch.dtype) -> nn.Module:
    layer = nn.Linear(4, 2)
    layer.weight = nn.Parameter(torch.ones(2, 4, dtype=dtype), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (nn.LazyLinear(2), "parameter b.head.weight is lazy and has no shape yet."),
        (nn.Linear(4, 2, device="meta"), "parameter b.head.weight is on the meta device, but"),
        (of_dtype(torch.int32), "parameter b.head.weight has dtype torch.int32, but this check"),
        (of_dtype(torch.bool), "parameter b.head.weight has dtype torch.bool, but this check"),
        (of_dtype(torch.complex64), "parameter b.head.weight has dtype torch.complex64, but this"),
        (infinite(), "parameter b.head.bias holds NaN or infinity in 1 of 2 elements."),
    ],
    ids=["lazy", "meta", "integer", "boolean", "complex", "infinite"],
)
def test_parameters_that_hold_no_numbers_are_refused(layer, told):
    other = nn.Sequential()
    other.add_module("head", layer)
    with refused(told):
        checked_numbers({"a": nn.Linear(4, 2), "b": other})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_real_parameters_are_accepted(dtype):
    assert checked_numbers([nn.Linear(4, 2, dtype=dtype), nn.ReLU()]) is None
