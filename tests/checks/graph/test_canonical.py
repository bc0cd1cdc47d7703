import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ensembles.checks.graph.measurement import measure_autograd_graph
from ensembles.subject import split_axis, split_batch

BINARY = {
    "add": torch.add,
    "mul": torch.mul,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "sub": torch.sub,
    "scaled": lambda a, b: torch.add(a, b, alpha=2),
}
COMMUTATIVE = ("add", "mul", "maximum", "minimum")


class Program(nn.Module):
    """A straight-line program on two parameters; `swapped` is the set of lines to turn round."""

    def __init__(self, lines, ends, swapped=frozenset()):
        super().__init__()
        self.a = nn.Parameter(torch.ones(2))
        self.b = nn.Parameter(torch.ones(2))
        self.lines, self.ends, self.swapped = lines, ends, swapped

    def forward(self, x):
        values = [self.a, self.b]
        for number, (operation, left, right) in enumerate(self.lines):
            operands = [*values, torch.ones(2)]  # the last one is a constant
            one, two = values[left % len(values)], operands[right % len(operands)]
            if operation in BINARY:
                pair = (two, one) if number in self.swapped else (one, two)
                values.append(BINARY[operation](*pair))
            else:
                values.append(getattr(torch, operation)(one))
        return [values[end % len(values)] for end in self.ends]


@st.composite
def programs(draw):
    operations = st.sampled_from([*BINARY, "relu", "tanh"])
    index = st.integers(0, 11)
    lines = draw(st.lists(st.tuples(operations, index, index), min_size=1, max_size=10))
    return lines, draw(st.lists(index, min_size=1, max_size=3))


@settings(max_examples=200, deadline=None)
@given(program=programs(), data=st.data())
def test_operands_of_commutative_operations_may_be_swapped(program, data):
    lines, ends = program
    may = [number for number, (operation, *_) in enumerate(lines) if operation in COMMUTATIVE]
    swapped = data.draw(st.sets(st.sampled_from(may))) if may else set()
    one = measure_autograd_graph(Program(lines, ends), torch.ones(1))
    two = measure_autograd_graph(Program(lines, ends, swapped), torch.ones(1))
    assert str(one) == str(two)
    assert one == two


@pytest.mark.parametrize("operation", ["sub", "scaled"])
def test_operands_of_other_operations_may_not_be_swapped(operation):
    one = measure_autograd_graph(Program([(operation, 0, 1)], [2]), torch.ones(1))
    two = measure_autograd_graph(Program([(operation, 0, 1)], [2], {0}), torch.ones(1))
    assert one != two


def test_equal_operands_that_are_used_differently_are_told_apart():
    class Twice(nn.Module):
        def __init__(self, swapped):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.swapped = swapped

        def forward(self, x):
            one, two = self.weight.tanh().exp(), self.weight.tanh().exp()
            used = two if self.swapped else one
            return [one * two, used.sin()]

    one, two = (measure_autograd_graph(Twice(swapped), torch.ones(1)) for swapped in (False, True))
    assert one == two


def test_a_layer_put_in_renames_nothing_else():
    layers = [nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)]
    before = str(measure_autograd_graph(nn.Sequential(*layers), torch.ones(1, 3))).splitlines()[1:]

    class Doubled(nn.Sequential):
        def forward(self, x):
            return self[4](self[3](self[2](self[1](self[0](x)).tanh())))

    after = str(measure_autograd_graph(Doubled(*layers), torch.ones(1, 3))).splitlines()[1:]
    assert sorted(set(after) - set(before)) == [
        "  0:Tanh(:Relu)",
        "  2:Addmm(.bias, 0:Tanh, :T)",
    ]
    assert set(before) - set(after) == {"  2:Addmm(.bias, 0:Relu, :T)"}


def test_blocks_of_a_weight_can_be_told_apart():
    """The rows of a weight are shown, the rows of a batch are not."""

    class Block(nn.Module):
        def __init__(self, rows):
            super().__init__()
            self.weight, self.rows = nn.Parameter(torch.ones(4, 3)), rows

        def forward(self, x):
            return (x @ self.weight[self.rows : self.rows + 2].T)[: len(x) // 2]

    first, second = (measure_autograd_graph(Block(rows), torch.ones(4, 3)) for rows in (0, 2))
    assert first != second
    assert first == measure_autograd_graph(Block(0), torch.ones(8, 3))


def test_a_tied_parameter_has_all_its_names():
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False))
    model[1].weight = model[0].weight
    graph = measure_autograd_graph(model, torch.tensor([1, 2]))
    assert [leaf.names for leaf in graph.leaves] == [("0.weight", "1.weight")]
    assert graph.registered == 1
    assert "  0.weight (8, 4)\n    = 1.weight\n" in str(graph)
    assert set(graph.parameters.values()) == {("0.weight", "1.weight")}


def test_names_have_the_member_in_front_where_there_are_several():
    shared = nn.Linear(3, 3)
    model = {"left": nn.Sequential(shared), "right": nn.Sequential(shared, nn.Linear(3, 2))}
    graph = measure_autograd_graph(model, torch.ones(1, 3))
    assert graph.leaves[0].names == ("left.0.weight", "right.0.weight")
    assert [operation.name for operation in graph.operations] == [
        "left/left.0:T",
        "left/left.0:Addmm",
        "right/left.0:T",
        "right/left.0:Addmm",
        "right.1:T",
        "right.1:Addmm",
    ]


def test_what_is_not_registered_is_shown_as_such():
    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [nn.Linear(3, 3)]
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.layers[0](x))

    graph = measure_autograd_graph(Loose(), torch.ones(1, 3, requires_grad=True))
    assert [(leaf.names, leaf.kind) for leaf in graph.leaves] == [
        (("head.weight",), "parameter"),
        (("head.bias",), "parameter"),
        (("unregistered",), "unregistered"),
        (("batch",), "batch"),
        (("unregistered-2",), "unregistered"),
    ]
    assert "  unregistered (3,), not in parameters()" in str(graph)
    assert "  unregistered:Addmm(unregistered, batch, :T)" in str(graph)
    assert "  head:Addmm(.bias, unregistered:Addmm, :T)" in str(graph)


def test_frozen_parameters_are_counted_and_not_shown():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    graph = measure_autograd_graph(model, torch.ones(1, 3))
    assert str(graph).startswith("autograd graph at inference: 1 member, 2 of 4 parameters")


@pytest.mark.parametrize("split", [split_axis(1), split_batch(3)], ids=["axis", "batch"])
def test_stacked_outputs_are_members(split):
    graph = measure_autograd_graph(nn.Linear(4, 3), torch.ones(3, 4), outputs=split)
    assert graph.members == ("0", "1", "2")
    assert [leaf.members for leaf in graph.leaves] == [("0", "1", "2")] * 2


def test_a_parameter_may_be_an_output():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return {"weight": (self.weight, torch.ones(2)), "twice": self.weight * 2}

    graph = measure_autograd_graph(Constant(), torch.ones(1))
    assert graph.outputs == (("weight", ("weight", "-")), ("twice", ("twice/weight:Mul",)))


def test_a_graph_of_five_thousand_operations_in_a_row():
    chain = nn.Sequential(nn.Linear(2, 2), *(nn.ReLU() for _ in range(5000)))
    graph = measure_autograd_graph(chain, torch.ones(1, 2))
    assert len(graph.operations) == 5002
    assert str(graph).endswith("model = 0:Relu.5000")
