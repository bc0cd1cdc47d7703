import random
import re

import numpy
import pytest
import torch
from torch import nn

from ensembles.handling.state import (
    _COPIES,
    Snapshot,
    copy_of,
    generators_kept,
    graph_kept,
    parameters_kept,
    preserved,
    seed_generators,
)


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    model[3].eval()
    model(torch.randn(5, 3)).sum().backward()
    return model


def bits(model: nn.Module) -> dict[str, bytes]:
    """Every value of a module, and of its gradients, bit by bit."""
    values = dict(model.state_dict())
    values |= {f"{n}.grad": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: value.numpy().tobytes() for name, value in values.items()}


def fail_after_a_step(model: nn.Module) -> None:
    train_a_step(model)
    raise RuntimeError("out of memory")


def train_a_step(model: nn.Module) -> None:
    model.train()
    model(torch.randn(5, 3)).square().sum().backward()
    torch.optim.SGD(model.parameters(), 0.1, momentum=0.9).step()


# --- preserved ----------------------------------------------------------------------------------


def test_a_training_step_inside_leaves_every_bit_as_it_was():
    model = network()
    before = bits(model)
    with preserved(model):
        train_a_step(model)
        assert bits(model) != before
    assert bits(model) == before


def test_plain_attributes_come_back():
    model = network()
    model.merged, model.cache, model.table = False, None, torch.ones(2)
    table = model.table
    with preserved(model):
        model.merged, model.cache, model.table, model.new = True, (torch.ones(1),), None, table
    assert (model.merged, model.cache, model.table) == (False, None, table)
    assert not hasattr(model, "new")


def test_what_is_in_an_attribute_comes_back():
    model = network()
    model.cache, model.seen, model.kept = {}, [1], {"a": torch.ones(1)}
    cache, seen, kept, value = model.cache, model.seen, model.kept, model.kept["a"]
    with preserved(model):
        model.cache[8] = model.kept.pop("a")
        model.seen.append(2)
        model.kept = {}
    assert (model.cache, model.seen) == ({}, [1])
    assert (model.cache is cache, model.seen is seen, model.kept is kept) == (True, True, True)
    assert list(kept) == ["a"]
    assert kept["a"] is value


def test_modes_come_back_module_by_module():
    model = network()
    with preserved(model):
        model.train()
    assert [m.training for m in model] == [True, True, True, False]


def test_gradients_are_absent_inside_and_the_same_objects_afterwards():
    model = network()
    gradients = [p.grad for p in model.parameters()]
    with preserved(model):
        assert [p.grad for p in model.parameters()] == [None] * 6
        train_a_step(model)
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))


def test_an_absent_gradient_stays_absent():
    model = nn.Linear(3, 4)
    with preserved(model):
        train_a_step(model)
    assert model.weight.grad is None


def test_a_frozen_parameter_stays_frozen():
    model = network()
    model[0].weight.requires_grad_(False)
    with preserved(model):
        model.requires_grad_(True)
        model[3].bias.requires_grad_(False)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["0.weight"]


def test_a_method_that_a_false_freeze_hides_is_not_needed():
    model = network()
    model[0].weight.requires_grad_ = False
    before = bits(model)
    with preserved(model):
        train_a_step(model)
        model[0].weight.requires_grad = False
    assert bits(model) == before
    assert model[0].weight.requires_grad
    assert model[0].weight.requires_grad_ is False


def test_replaced_and_added_tensors_give_way_to_the_old_objects():
    model = network()
    weight, mean = model[0].weight, model[1].running_mean
    names = list(model.state_dict())
    before = bits(model)
    with preserved(model):
        model[0].weight = nn.Parameter(torch.zeros(4, 3))
        model[1].running_mean = torch.ones(4)
        model[3].register_buffer("calls", torch.ones(1))
        del model[3].bias
    assert model[0].weight is weight
    assert model[1].running_mean is mean
    assert list(model.state_dict()) == names
    assert bits(model) == before


def test_a_conversion_inside_is_undone_in_the_same_memory():
    model = network()
    address = model[0].weight.data_ptr()
    before = bits(model)
    with preserved(model):
        model.double()
        model[3].weight.data = model[3].weight.data[:1]
    assert bits(model) == before
    assert model[0].weight.data_ptr() == address
    assert model[3].weight.shape == (2, 4)


def test_ties_and_views_survive():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model.register_buffer("rows", model[0].weight.detach()[1:3])
    before = bits(model)
    with preserved(model):
        train_a_step(nn.Sequential(nn.Linear(3, 4), model))
    assert bits(model) == before
    assert model[1].weight is model[0].weight
    with torch.no_grad():
        model[0].weight.fill_(7)
    assert torch.equal(model.rows, torch.full((2, 4), 7.0))


def test_an_expanded_buffer_comes_back():
    model = nn.Linear(2, 2)
    model.register_buffer("scale", torch.full((1, 3), 2.0).expand(4, 3))
    model.register_buffer("count", torch.zeros(()))
    with preserved(model):
        model.scale[0].zero_()
        model.count.add_(1)
    assert torch.equal(model.scale, torch.full((4, 3), 2.0))
    assert model.scale.stride() == (0, 1)
    assert model.count == 0


def test_values_that_are_not_numbers_come_back():
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[float("nan"), -0.0], [float("inf"), 1.0]]))
    before = bits(model)
    with preserved(model), torch.no_grad():
        model.weight.zero_()
    assert bits(model) == before


def test_everything_comes_back_after_an_exception():
    model = network()
    before, state = bits(model), torch.get_rng_state()
    with pytest.raises(RuntimeError, match=r"^out of memory$"), preserved(model):
        fail_after_a_step(model)
    assert bits(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not model[3].training


def test_members_that_share_a_module_come_back():
    shared = network()
    before = bits(shared)
    with preserved({"a": shared, "b": nn.Sequential(shared)}):
        train_a_step(shared)
    assert bits(shared) == before


def test_the_state_on_entry_can_be_restored_inside_as_often_as_needed():
    model = network()
    before, gradient = bits(model), model[0].weight.grad
    with preserved(model) as start:
        shown = []
        for _ in range(3):
            train_a_step(model)
            shown.append(bits(model))
            start.restore()
            assert [p.grad for p in model.parameters()] == [None] * 6
            assert not model[3].training
        assert shown[0] == shown[1] == shown[2]
    assert model[0].weight.grad is gradient
    assert bits(model) == before


# --- snapshots ----------------------------------------------------------------------------------


def one_element(model):
    model[3].weight.data[1, 2] += 1


def sign_of_zero(model):
    model[1].running_mean.neg_()


def another_object(model):
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def another_type(model):
    model[3].double()


def another_memory_with_other_values(model):
    model[0].weight.data = model[0].weight.data + 1


@pytest.mark.parametrize(
    "change",
    [one_element, sign_of_zero, another_object, another_type, another_memory_with_other_values],
)
def test_a_change_is_seen_until_it_is_undone(change):
    model = network()
    model[1].running_mean.zero_()
    start = Snapshot(model)
    assert not start.changed()
    change(model)
    assert start.changed()
    start.restore()
    assert not start.changed()


def test_values_that_are_not_numbers_are_no_change():
    model = nn.Linear(2, 2)
    model.weight.data.fill_(float("nan"))
    assert not Snapshot(model).changed()


# --- graphs -------------------------------------------------------------------------------------


def gradients_after_an_undone_step(model: nn.Module, output: torch.Tensor) -> list[torch.Tensor]:
    start = Snapshot(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), model[1].running_mean):
            tensor.add_(1)
    start.restore()
    return list(torch.autograd.grad(output.sum(), list(model.parameters())))


def test_a_graph_is_usable_after_a_step_that_was_undone():
    model, x = network().eval(), torch.randn(5, 3)
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    with graph_kept([model]):
        output = model(x)
    for mine, theirs in zip(gradients_after_an_undone_step(model, output), expected, strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients_after_an_undone_step(model, model(x))


def test_a_graph_may_hold_a_sparse_buffer():
    model = network().eval()
    model.register_buffer("adjacency", torch.eye(5).to_sparse())
    with graph_kept([model]):
        output = torch.sparse.mm(model.adjacency, model(torch.randn(5, 3)))
    gradients = gradients_after_an_undone_step(model, output)
    assert torch.equal(gradients[-1], torch.full((2,), 5.0))


def test_a_graph_whose_activations_were_overwritten_is_refused():
    model = network()
    with graph_kept([model]):
        hidden = model[0](torch.ones(5, 3)).sigmoid()
        output = model[3](hidden)
        hidden.detach().zero_()
    with pytest.raises(
        ValueError, match=r"shape \(5, 4\) that the backward pass needs was overwritten"
    ):
        output.sum().backward()


# --- random generators --------------------------------------------------------------------------


def drawn() -> tuple[float, float, float]:
    return random.random(), float(numpy.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize(
    "block", [lambda: preserved(nn.ReLU()), generators_kept], ids=["preserved", "generators_kept"]
)
def test_all_random_generators_continue_where_they_were(block):
    seed_generators(3)
    expected = drawn()
    seed_generators(3)
    with block():
        drawn()
        seed_generators(4)
    assert drawn() == expected


def test_a_seed_larger_than_numpy_takes_is_accepted():
    with generators_kept():
        seed_generators(2**40 + 1)
        first = drawn()
        seed_generators(2**40 + 1)
        assert drawn() == first


# --- parameters kept ----------------------------------------------------------------------------


def changed_value(layer: nn.Linear) -> None:
    layer.weight.data[1, 2] = 9.0


def changed_last_bit(layer: nn.Linear) -> None:
    layer.weight.data[1, 2] = torch.nextafter(layer.weight.data[1, 2], torch.tensor(9.0))


def swapped_elements(layer: nn.Linear) -> None:
    layer.weight.data.copy_(layer.weight.data.flip(0))


def moved_elsewhere(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data.clone()


@pytest.mark.parametrize(
    "change", [changed_value, changed_last_bit, swapped_elements, moved_elsewhere]
)
def test_a_call_that_changes_a_parameter_is_refused(change):
    model = nn.Sequential(nn.ReLU(), nn.Linear(3, 2))
    told = "calling the model changes its own parameter member.1.weight, so a measurement"
    with pytest.raises(ValueError, match=re.escape(told)), parameters_kept({"member": model}):
        change(model[1])


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64], ids=str
)
def test_a_call_that_changes_nothing_is_accepted(dtype):
    model = nn.Linear(3, 2, dtype=dtype)
    before = model.weight.detach().clone()
    with parameters_kept(model):
        model(torch.ones(1, 3, dtype=dtype))
    assert torch.equal(model.weight, before)


def test_hooks_that_were_added_to_parameters_are_gone_and_others_are_kept():
    layer = nn.Linear(2, 2)
    layer.weight.register_hook(lambda gradient: gradient * 2)
    with preserved(layer):
        layer.weight.register_hook(lambda gradient: gradient * 0)
        layer.bias.register_hook(lambda gradient: gradient * 0)
    layer(torch.ones(1, 2)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.full((2, 2), 2.0))
    assert torch.equal(layer.bias.grad, torch.ones(2))


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
def test_what_a_forward_hook_computed_is_kept():
    layer = torch.nn.utils.weight_norm(nn.Linear(2, 2))
    before = layer.weight
    with preserved(layer), torch.no_grad():
        layer.weight_g.mul_(3)
        layer(torch.ones(1, 2))
    assert layer.weight is before


def test_layers_that_the_call_made_are_gone():
    class Growing(nn.Module):
        def forward(self, x):
            self.late = nn.Linear(2, 2)
            self.seen = x
            return self.late(x)

    model = Growing()
    with preserved(model):
        model(torch.ones(1, 2))
    assert (list(model.children()), hasattr(model, "seen")) == ([], False)


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_buffers_are_restored(layout):
    model = nn.Linear(2, 2)
    dense = torch.eye(3)
    sparse = dense.to_sparse() if layout == "coo" else dense.to_sparse_csr()
    model.register_buffer("graph", sparse)
    with preserved(model) as state:
        model.graph = sparse * 2
        assert state.changed()
    assert model.graph is sparse
    assert torch.equal(model.graph.to_dense(), dense)


# --- copies ---------------------------------------------------------------------------------------


def test_snapshots_of_one_state_have_one_copy():
    model = network()
    one, two = Snapshot(model), Snapshot(model)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    three, four = Snapshot(model), Snapshot(model)
    copies = [
        {values.data_ptr() for *_, values in each._tensors} for each in (one, two, three, four)
    ]
    floating = {t.data_ptr() for t in model.state_dict().values() if t.is_floating_point()}
    assert len(copies[0] & copies[1]) == len(floating) == 8
    assert len(copies[0] & copies[2]) == 7  # all but the weight that was moved
    assert len(copies[2] & copies[3]) == 8
    before = bits(model)
    one.restore()
    assert bits(model)["0.weight"] != before["0.weight"]
    assert {v.data_ptr() for *_, v in Snapshot(model)._tensors} & copies[0] == copies[0] & copies[1]


@pytest.mark.parametrize(
    ("first", "then"),
    [(0.0, -0.0), (1.0, 2.0), (float("nan"), 1.0)],
    ids=["sign_of_zero", "another", "nan"],
)
def test_a_copy_is_that_of_the_present_bits(first, then):
    tensor = torch.full((3,), first)
    before = copy_of(tensor)
    assert copy_of(tensor) is before
    after = copy_of(tensor.fill_(then))
    assert after.numpy().tobytes() == tensor.numpy().tobytes() != before.numpy().tobytes()
    assert copy_of(tensor.fill_(first)) is before


def test_a_copy_is_of_the_kind_of_its_tensor():
    memory = torch.zeros(4)
    whole, part = copy_of(memory), copy_of(memory[:2])
    other = copy_of(memory.view(torch.int32))
    assert (whole.shape, part.shape, other.dtype) == ((4,), (2,), torch.int32)
    sparse = torch.eye(2).to_sparse()
    assert torch.equal(copy_of(sparse).to_dense(), torch.eye(2))
    assert copy_of(torch.ones(2, device="meta")).is_meta


def test_copies_without_a_holder_are_forgotten():
    tensor = torch.zeros(3)
    states = [copy_of(tensor.add_(1.0)) for _ in range(5)]
    assert [float(state[0]) for state in states] == [1.0, 2.0, 3.0, 4.0, 5.0]
    place = {key for key in _COPIES if key[0] == tensor.data_ptr()}
    assert len(place) == 3
    del states
    assert not place & {*_COPIES}
