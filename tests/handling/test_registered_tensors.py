import torch
from torch import nn

from ensembles.handling.registered_tensors import registered


def test_names_are_those_of_the_module_and_have_the_member_in_front_where_there_are_several():
    model = nn.BatchNorm1d(2)
    names = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    kinds = ["parameter"] * 2 + ["buffer"] * 3
    assert [entry.names for entry in registered(model)] == [(name,) for name in names]
    assert [entry.kind for entry in registered(model)] == kinds
    assert [entry.names for entry in registered([model])] == [(f"0.{name}",) for name in names]
    assert all(entry.tensor is getattr(model, entry.names[0]) for entry in registered(model))


def test_what_is_a_parameter_anywhere_is_one():
    first, second = nn.Module(), nn.Module()
    second.weight = nn.Parameter(torch.ones(2))
    first.register_buffer("table", second.weight.data)
    first.register_buffer("weight", second.weight)
    found = [(entry.names, entry.kind) for entry in registered({"a": first, "b": second})]
    assert found == [(("a.table",), "buffer"), (("a.weight", "b.weight"), "parameter")]
