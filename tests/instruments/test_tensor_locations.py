from collections import deque
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import nn

from ensembles.handling.atoms import holds_nothing
from ensembles.instruments import tensor_locations as homes
from ensembles.instruments.tensor_locations import Search, homes_of, things_below


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


def searched(model) -> tuple[set[int], Search]:
    search = Search()
    return {id(thing) for _, thing in things_below(model, search)}, search


def test_the_search_ends_at_a_cap_and_says_so(monkeypatch):
    tensor = lost()
    model = with_attribute([[[{"a": tensor}] for _ in range(100)], [[[[[lost()]]]]]])
    things, search = searched(model)
    assert id(model.kept[1][0][0][0][0][0]) in things
    assert search.ended
    for cap, ended in ((search.objects, True), (search.objects - 1, False)):
        monkeypatch.setattr(homes, "MOST_OBJECTS", cap)
        things, search = searched(model)
        assert (search.objects, search.ended) == (cap, ended)
    monkeypatch.setattr(homes, "MOST_OBJECTS", 50)
    assert id(model.kept[1][0][0][0][0][0]) not in searched(model)[0]
    assert found(model, model.kept[1][0][0][0][0][0]) is None


LONG = {
    "numbers": list(range(2_000)),
    "pairs": [(i, 0.5 * i) for i in range(2_000)],
    "records": [SimpleNamespace(path=Path(f"{i}.png"), box=(i, i)) for i in range(2_000)],
    "dicts": [{"image": f"{i}.png", "boxes": [(i, i)]} for i in range(2_000)],
    "numpy": [(number, None) for number in numpy.arange(2_000)],
    "a dict": {i: (i, b"") for i in range(2_000)},
    "a set": {(i, str(i)) for i in range(2_000)},
}


@pytest.mark.parametrize("kind", LONG)
def test_what_holds_atoms_only_is_passed_over(kind, monkeypatch):
    assert holds_nothing(LONG[kind])
    monkeypatch.setattr(homes, "MOST_OBJECTS", 100)
    tensor = lost()
    model = with_attribute(LONG[kind])
    model.late = [{"mask": tensor}]
    assert searched(model)[1].ended
    assert found(model, tensor) == ("model.late[0]['mask']", "in a Python list")


def test_the_one_entry_that_holds_a_tensor_is_found():
    tensor = lost()
    for thing, place in (
        ([*LONG["pairs"], (0, tensor)], ("model.kept[2000][1]", "in a Python list")),
        ([*LONG["records"], Slotted(tensor)], ("model.kept[2000].scale", "in a Python list")),
        ([*LONG["numbers"], lambda x: x * tensor], ("tensor of model.kept[2000]", "in a closure")),
        ([[[[[[tensor]]]]]], ("model.kept[0][0][0][0][0][0]", "in a Python list")),
        (
            SimpleNamespace(a=1, b={"c": [tensor]}),
            ("model.kept.b['c'][0]", "in an object of type SimpleNamespace"),
        ),
    ):
        assert not holds_nothing(thing)
        assert found(with_attribute(thing), tensor) == place


def test_a_long_list_does_not_keep_the_search_from_what_is_near(monkeypatch):
    tensor, last = lost(), lost()
    model = with_attribute([Slotted(lost()) for _ in range(5_000)])
    model.kept.append(Slotted(last))
    model.near = [[[{"mask": tensor}]]]
    assert found(model, last) == ("model.kept[5000].scale", "in a Python list")
    monkeypatch.setattr(homes, "MOST_OBJECTS", 2_000)
    assert found(model, tensor) == ("model.near[0][0][0]['mask']", "in a Python list")
    assert found(model, last) is None
    assert not searched(model)[1].ended


def test_nothing_wanted_is_nothing_searched():
    assert homes_of(with_attribute([lost()]), {}) == {}
