from collections import deque
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ensembles.instruments import tensor_locations as homes
from ensembles.instruments.tensor_locations import homes_of


def lost() -> torch.Tensor:
    return torch.ones(2, requires_grad=True)


def found(model, tensor):
    return homes_of(model, {id(tensor): tensor}).get(id(tensor))


def with_attribute(value) -> nn.Module:
    model = nn.Linear(2, 2)
    model.kept = value
    return model


@pytest.mark.parametrize(
    ("wrap", "place"),
    [
        (lambda t: t, ("model.kept", "as a plain attribute")),
        (lambda t: [[], [t]], ("model.kept[1][0]", "in a Python list")),
        (lambda t: {"scale": (t,)}, ("model.kept['scale'][0]", "in a Python dict")),
        (lambda t: {t}, ("model.kept[0]", "in a Python set")),
        (lambda t: deque([1, t]), ("model.kept[1]", "in a Python deque")),
        (lambda t: partial(torch.mul, t), ("model.kept", "in a partial")),
        (lambda t: lambda x: x * t, ("t of model.kept", "in a closure")),
        (
            lambda t: SimpleNamespace(scale=t),
            ("model.kept.scale", "in an object of type SimpleNamespace"),
        ),
        (lambda t: [with_attribute(t)], ("model.kept[0].kept", "in a Python list")),
    ],
    ids=[
        "attribute", "list", "dict", "set", "deque", "partial", "closure", "object", "module",
    ],
)  # fmt: skip
def test_a_tensor_is_named_by_where_it_is_kept(wrap, place):
    tensor = lost()
    assert found(with_attribute(wrap(tensor)), tensor) == place


class Slotted:
    __slots__ = ("empty", "scale")

    def __init__(self, scale: torch.Tensor) -> None:
        self.scale = scale


def test_slots_class_attributes_and_default_arguments_are_places():
    in_slot, in_class, in_default, by_keyword = lost(), lost(), lost(), lost()

    class Parent(nn.Linear):
        scale = in_class

    class Net(Parent):
        def forward(self, x, *, bias=by_keyword, factor=(in_default,)):
            return super().forward(x) * factor[0] + bias

    net = Net(2, 2)
    net.kept = Slotted(in_slot)
    assert found(net, in_slot) == ("model.kept.scale", "in an object of type Slotted")
    assert found(net, in_class) == ("model.scale", "as a class attribute")
    assert found(net, by_keyword) == ("model.forward", "as a default argument")
    assert found(net, in_default) == ("model.forward[0]", "as a default argument")


def test_an_attribute_hides_that_of_the_class():
    in_class = lost()

    class Net(nn.Linear):
        scale = in_class

    net = Net(2, 2)
    net.scale = None
    assert found(net, in_class) is None


def test_members_are_named_by_their_name():
    tensor = lost()
    assert found({"first": nn.Linear(1, 1), "second": with_attribute([tensor])}, tensor) == (
        ("second.kept[0]", "in a Python list")
    )


def test_the_shortest_path_names_a_tensor():
    tensor = lost()
    model = with_attribute([[[tensor]]])
    model.near = tensor
    assert found(model, tensor) == ("model.near", "as a plain attribute")


def test_what_was_computed_from_one_tensor_names_it_unless_it_is_kept_itself():
    tensor = nn.Parameter(torch.ones(2))
    model = with_attribute(tensor.to(torch.float64))
    how = "only as a tensor that was computed from it (.to() does that)"
    assert found(model, tensor) == ("model.kept", how)
    model.others = [tensor]
    assert found(model, tensor) == ("model.others[0]", "in a Python list")


def test_what_was_computed_from_several_tensors_names_none():
    tensor = lost()
    assert found(with_attribute(tensor * lost()), tensor) is None


def test_a_cycle_ends():
    model = with_attribute([])
    model.kept.append(model.kept)
    assert found(model, lost()) is None


def test_a_variable_that_is_not_bound_yet_is_no_place():
    tensor = lost()

    def make(bound):
        if bound:
            later = tensor
        return with_attribute(lambda x: x * later)

    assert found(make(True), tensor) == ("later of model.kept", "in a closure")
    assert found(make(False), tensor) is None


def test_the_search_ends_at_a_cap(monkeypatch):
    tensor = lost()
    model = with_attribute([[[i] for i in range(100)], [[tensor]]])
    assert found(model, tensor) == ("model.kept[1][0][0]", "in a Python list")
    monkeypatch.setattr(homes, "MOST_OBJECTS", 50)
    assert found(model, tensor) is None


def test_nothing_wanted_is_nothing_searched():
    assert homes_of(with_attribute([lost()]), {}) == {}
