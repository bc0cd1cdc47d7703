import copy
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ensembles.checks.graph import assert_graph_equal, measure_autograd_graph
from ensembles.conformance import check_ensemble
from ensembles.drawings import draw_autograd_graph
from ensembles.models import Ensemble, NStreams, SubnetResNet, resnet18
from ensembles.models.resnet import ResidualBlock
from ensembles.subject import Subject, split_axis, split_batch

MATS = Path(__file__).parent.parent / "test_mats"
needs_dot = pytest.mark.skipif(
    shutil.which("dot") is None, reason="Graphviz's program `dot` is not installed"
)


def images() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


def small_resnet() -> nn.Module:
    """Every kind of layer that a ResNet has, and few of each: a drawing of it can be read."""
    block = ResidualBlock(
        [nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1)],
        downsample=nn.Conv2d(4, 8, 1, stride=2, bias=False),
    )
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    network = nn.Sequential()
    for name, module in (("stem", stem), ("block", block), ("head", head)):
        network.add_module(name, module)
    return network


def narrow_resnet18() -> nn.Module:
    return resnet18(num_classes=10, stem="cifar", base_channels=4)


def parent_and_subnet() -> tuple[nn.Module, dict[str, object]]:
    network = SubnetResNet(18, num_classes=10, stem="cifar", width=2, base_channels=4)
    return network, {"x": images(), "members": ("parent", "subnet_0_1")}


# --- goldens ------------------------------------------------------------------------------------


def test_resnet18(golden):
    network = resnet18(num_classes=10, stem="cifar")
    golden(str(measure_autograd_graph(network, images())), "graphs/resnet18.txt")


def test_an_ensemble_of_three_at_inference(golden):
    ensemble = Ensemble.of(small_resnet, 3)
    text = str(measure_autograd_graph(ensemble, images()))
    golden(text, "graphs/ensemble_of_three_inference.txt")


def test_an_ensemble_of_three_in_training(golden):
    ensemble = Ensemble.of(small_resnet, 3)
    graph = measure_autograd_graph(ensemble, images(), training=True)
    golden(str(graph), "graphs/ensemble_of_three_training.txt")


def test_weightshare_resnet18(golden):
    """The network that was taken for an ensemble of two."""
    streams = NStreams(resnet18(num_classes=10, stem="cifar"), 2)
    graph = measure_autograd_graph(streams, images())
    golden(str(graph), "graphs/weightshare_resnet18.txt")
    assert {leaf.members for leaf in graph.leaves} == {("0", "1")}
    assert len(graph.leaves) == len(list(streams.parameters()))


def test_parent_and_subnet_of_width_two(golden):
    network, batch = parent_and_subnet()
    graph = measure_autograd_graph(network, batch)
    golden(str(graph), "graphs/parent_and_subnet.txt")
    shared = {leaf.names[0] for leaf in graph.leaves if len(leaf.members) == 2}
    convs = (n for n, m in network.parent.named_modules() if isinstance(m, nn.Conv2d))
    assert shared == {f"parent.{conv}.weight" for conv in convs}


# --- the graph is the recorded one --------------------------------------------------------------


def test_the_recorded_graph_holds():
    recorded = str(measure_autograd_graph(narrow_resnet18(), images()))
    assert_graph_equal(
        measure_autograd_graph(narrow_resnet18(), torch.ones(5, 3, 16, 16)), recorded
    )


def test_a_lost_relu_is_broken(golden):
    network = narrow_resnet18()
    recorded = str(measure_autograd_graph(network, images()))

    class WithoutActivation(ResidualBlock):
        def forward(self, x, *_):
            out = self.bn2(self.conv2(self.bn1(self.conv1(x))))
            return self.activation(out + x)

    network.layer2[1].__class__ = WithoutActivation
    with pytest.raises(AssertionError) as broken:
        assert_graph_equal(measure_autograd_graph(network, images()), recorded)
    golden(str(broken.value), "messages/graph_lost_relu.txt")


def test_streams_in_place_of_members_are_broken(golden):
    recorded = str(measure_autograd_graph([small_resnet() for _ in range(2)], images()))
    with pytest.raises(AssertionError) as broken:
        assert_graph_equal(measure_autograd_graph([small_resnet()] * 2, images()), recorded)
    golden(str(broken.value), "messages/graph_streams.txt")


def test_the_other_mode_is_broken(golden):
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    recorded = str(measure_autograd_graph(network, torch.randn(4, 3)))
    with pytest.raises(AssertionError) as broken:
        assert_graph_equal(
            measure_autograd_graph(network, torch.randn(4, 3), training=True), recorded
        )
    golden(str(broken.value), "messages/graph_mode.txt")


def test_line_ends_do_not_matter(tmp_path):
    graph = measure_autograd_graph(nn.Linear(3, 2), torch.ones(1, 3))
    path = tmp_path / "golden.txt"
    path.write_bytes(str(graph).replace("\n", "\r\n").encode() + b"\r\n")
    assert_graph_equal(graph, path)
    assert_graph_equal(graph, path.read_bytes().decode())


@pytest.mark.parametrize(
    "changed",
    [
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ReLU()),
        nn.Sequential(nn.Conv2d(3, 4, 3)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid()),
        nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU()),
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(3, 4, 3, dilation=2), nn.ReLU()),
        nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.ReLU()),
        nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU()),
        nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()),
    ],
    ids=[
        "layer_added",
        "layer_removed",
        "layer_replaced",
        "stride",
        "padding",
        "dilation",
        "groups",
        "bias",
        "shape",
    ],
)
def test_a_change_changes_the_text(changed):
    recorded = measure_autograd_graph(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), images())
    with pytest.raises(AssertionError, match="claimed to be the recorded one, and is another"):
        assert_graph_equal(measure_autograd_graph(changed, images()), str(recorded))


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


# --- canonical form -----------------------------------------------------------------------------

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
            one, two = values[left % len(values)], values[right % len(values)]
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


def test_negative_axes_are_the_same_as_positive_ones():
    class Cut(nn.Module):
        def __init__(self, cut):
            super().__init__()
            self.weight, self.cut = nn.Parameter(torch.ones(4, 6)), cut

        def forward(self, x):
            return self.cut(self.weight)

    cuts = [
        lambda w: w[:, 4:],
        lambda w: w[:, -2:],
        lambda w: w[:, 4:6],
        lambda w: w.narrow(-1, 4, 2),
        lambda w: w.narrow(1, 4, 2),
    ]
    texts = {str(measure_autograd_graph(Cut(cut), torch.ones(1))) for cut in cuts}
    (text,) = texts
    assert "weight:Slice(weight) dim=1 start=4 end=6" in text


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


def test_a_selected_index_is_shown():
    """Attention selects query, key and value from one tensor."""

    class Pick(nn.Linear):
        def __init__(self, index):
            super().__init__(3, 2)
            self.index = index

        def forward(self, x):
            return super().forward(x)[self.index]

    graphs = [measure_autograd_graph(Pick(index), torch.ones(4, 3)) for index in (0, 1, -1)]
    assert len({str(graph) for graph in graphs}) == 3
    assert graphs[2] == measure_autograd_graph(Pick(-1), torch.ones(5, 3))


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


def test_fused_layers_are_written_out():
    """So that a machine that has no such kernel finds the same graph."""

    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.attention = nn.GRU(4, 4), nn.MultiheadAttention(4, 2)

        def forward(self, x):
            y, _ = self.rnn(x)
            return self.attention(y, y, y, need_weights=False)[0]

    graph = measure_autograd_graph(Fused(), torch.randn(3, 2, 4))
    operations = {operation.name.rpartition(":")[2].split(".")[0] for operation in graph.operations}
    assert {"Sigmoid", "Tanh", "Bmm"} <= operations
    assert not [name for name in operations if "Attention" in name or "Rnn" in name]


def test_a_graph_of_five_thousand_operations_in_a_row():
    chain = nn.Sequential(nn.Linear(2, 2), *(nn.ReLU() for _ in range(5000)))
    graph = measure_autograd_graph(chain, torch.ones(1, 2))
    assert len(graph.operations) == 5002
    assert str(graph).endswith("model = 0:Relu.5000")


SCRIPT = """
import torch
from ensembles.checks.graph import measure_autograd_graph
from ensembles.models import SubnetResNet
network = SubnetResNet(18, num_classes=10, stem="cifar", width=2, base_channels=4)
batch = {"x": torch.randn(2, 3, 8, 8), "members": ("parent", "subnet_0_1")}
print(measure_autograd_graph(network, batch))
"""


def test_every_process_writes_the_same_text():
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for hash_seed in ("1", "4242")
    ]
    recorded = (MATS / "graphs/parent_and_subnet.txt").read_text(encoding="utf-8")
    for run in runs:
        text, _ = run.communicate(timeout=120)
        assert run.returncode == 0
        assert text.strip() == recorded.strip()


# --- nothing is changed by looking --------------------------------------------------------------


def test_looking_changes_nothing():
    model = small_resnet()
    model.stem.eval()
    model.head[2].weight.grad = torch.ones(10, 8)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    kernels = (torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled)
    batch = images()
    state = torch.get_rng_state()
    measure_autograd_graph(nn.Sequential(model, nn.Dropout()), batch, training=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert (torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled) == kernels
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    grads = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert grads == {"head.2.weight"}
    assert torch.equal(model.head[2].weight.grad, torch.ones(10, 8))


def test_no_grad_around_the_call_does_not_matter():
    model = nn.Linear(3, 2)
    with torch.no_grad():
        graph = measure_autograd_graph(model, torch.ones(1, 3))
        assert not torch.is_grad_enabled()
    assert graph == measure_autograd_graph(model, torch.ones(1, 3))


# --- wrong use ----------------------------------------------------------------------------------


class Detached(nn.Linear):
    def forward(self, x):
        return [super().forward(x), super().forward(x).detach()]


def test_an_output_without_a_graph_is_an_error():
    with pytest.raises(ValueError, match=r"output of member 1 has no autograd graph.*detach"):
        measure_autograd_graph(Detached(3, 2), torch.ones(1, 3))


def test_a_model_that_is_frozen_is_an_error():
    with pytest.raises(ValueError, match=r"output of member model has no autograd graph.*frozen"):
        measure_autograd_graph(nn.Linear(3, 2).requires_grad_(False), torch.ones(1, 3))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Linear(3, 2, device="meta"), r"parameter model\.weight is on the meta device"),
        (nn.LazyLinear(2), r"parameter model\.weight is lazy"),
        ([], "the model has no members"),
        (nn.Linear(4, 2), "calling the model"),
    ],
    ids=["meta", "lazy", "no_members", "call_fails"],
)
def test_a_model_that_cannot_be_called_is_an_error(model, said):
    with pytest.raises(ValueError, match=said):
        measure_autograd_graph(model, torch.ones(1, 3))


@pytest.mark.parametrize("text", ["", "graphs/resnet18.txt", 3], ids=["empty", "name", "number"])
def test_a_text_that_is_no_graph_is_an_error(text):
    graph = measure_autograd_graph(nn.Linear(3, 2), torch.ones(1, 3))
    with pytest.raises(ValueError, match="the golden is no recorded graph"):
        assert_graph_equal(graph, text)


# --- the fixture and the gate -------------------------------------------------------------------


def test_the_fixture_compares_with_a_file(autograd_graph, tmp_path):
    path = tmp_path / "linear.txt"
    with pytest.raises(ValueError, match=r"there is no recorded graph at .*linear\.txt. Record"):
        autograd_graph.assert_equals(nn.Linear(3, 2), torch.ones(1, 3), path)
    path.write_text(str(autograd_graph.measure(nn.Linear(3, 2), torch.ones(1, 3))))
    autograd_graph.assert_equals(nn.Linear(3, 2), torch.ones(5, 3), path)
    with pytest.raises(AssertionError, match=r"- weight \(2, 3\)"):
        autograd_graph.assert_equals(nn.Linear(3, 4), torch.ones(1, 3), path)


RECORDED = """
import torch
from torch import nn

def test_graph(autograd_graph):
    model = nn.Sequential(nn.Linear(3, 2), {layer})
    autograd_graph.assert_recorded(model, torch.ones(1, 3))
"""


def test_the_fixture_records_and_prints_its_own_message(pytester):
    def outcome(layer, *options):
        pytester.makepyfile(test_recorded=RECORDED.format(layer=layer))
        return pytester.runpytest_inprocess("-p", "no:randomly", *options)

    outcome("nn.ReLU()").stdout.fnmatch_lines(["*File not found in data directory, created*"])
    outcome("nn.ReLU()").assert_outcomes(passed=1)
    changed = outcome("nn.Tanh()")
    changed.assert_outcomes(failed=1)
    changed.stdout.fnmatch_lines(
        [
            "*the autograd graph is claimed to be the recorded one, and is another",
            "*- 0:Relu(:Addmm)",
            "*+ 0:Tanh(:Addmm)",
            "*replay: pytest test_recorded.py::test_graph *",
        ]
    )
    outcome("nn.Tanh()", "--force-regen").assert_outcomes(failed=1)
    outcome("nn.Tanh()").assert_outcomes(passed=1)
    (golden,) = pytester.path.glob("test_recorded/*.txt")
    golden.write_text("what a failed merge left")
    outcome("nn.Tanh()").stdout.fnmatch_lines(["*ValueError: *is no recorded graph*"])
    outcome("nn.Tanh()", "--force-regen").assert_outcomes(failed=1)
    outcome("nn.Tanh()").assert_outcomes(passed=1)


def test_without_pytest_regressions_the_fixture_says_how_to_get_it(pytester):
    pytester.makepyfile(test_recorded=RECORDED.format(layer="nn.ReLU()"))
    result = pytester.runpytest_inprocess("-p", "no:regressions")
    result.stdout.fnmatch_lines(['*UsageError: *pip install "pytest-ensembles*goldens*"*'])


def test_the_gate_compares_with_the_golden():
    def model():
        return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))

    def status(claim):
        subject = Subject(make=model, batch=lambda: torch.randn(4, 3), claims={"graph": claim})
        (result,) = [result for result in check_ensemble(subject) if result.check == "graph"]
        return result.status, result.message

    for training in (False, True):
        graph = measure_autograd_graph(model(), torch.randn(4, 3), training=training)
        assert status(str(graph)) == ("held", "")
    broken, message = status(str(graph).replace("Addmm", "Mm"))
    assert (broken, message[:18]) == ("broken", "the autograd graph")
    for claim, said in (
        (Path("nowhere.txt"), "there is no recorded graph at nowhere.txt"),
        (True, "'graph' cannot be claimed to be True"),
        ("nowhere.txt", "the golden is no recorded graph"),
    ):
        assert status(claim)[0] == "error"
        assert said in status(claim)[1]


# --- drawings -----------------------------------------------------------------------------------


def titles(svg: Path) -> Counter[str | None]:
    """What the nodes and edges of a drawing are called."""
    return Counter(
        title.text
        for group in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}g")
        if group.get("class") in ("node", "edge")
        for title in group.findall("{http://www.w3.org/2000/svg}title")
    )


@pytest.fixture
def drawing(request, tmp_path):
    """Compares what is drawn now with a recorded drawing; `--force-regen` records it anew.

    Nodes and edges are compared, and not bytes: the layout is Graphviz's own.
    """
    pytest.importorskip("torchviz")

    def check(model, batch, *names, training=False):
        drawn = draw_autograd_graph(model, batch, tmp_path / "drawing", training=training)
        if request.config.getoption("force_regen"):
            for file, name in zip(drawn, names, strict=True):
                (MATS / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, MATS / name)
        pdf, svg = (MATS / name for name in names)
        assert pdf.read_bytes().startswith(b"%PDF")
        assert titles(svg) == titles(drawn[1])

    return check


@needs_dot
def test_the_drawing_of_resnet18(drawing):
    network = resnet18(num_classes=10, stem="cifar")
    drawing(network, images(), "drawings/resnet18.pdf", "drawings/resnet18.svg")


@needs_dot
def test_the_drawing_of_an_ensemble_of_three_at_inference(drawing):
    drawing(
        Ensemble.of(small_resnet, 3),
        images(),
        "drawings/ensemble_of_three_inference.pdf",
        "drawings/ensemble_of_three_inference.svg",
    )


@needs_dot
def test_the_drawing_of_an_ensemble_of_three_in_training(drawing):
    drawing(
        Ensemble.of(small_resnet, 3),
        images(),
        "drawings/ensemble_of_three_training.pdf",
        "drawings/ensemble_of_three_training.svg",
        training=True,
    )


@needs_dot
def test_the_drawing_of_weightshare_resnet18(drawing):
    drawing(
        NStreams(resnet18(num_classes=10, stem="cifar"), 2),
        images(),
        "drawings/weightshare_resnet18.pdf",
        "drawings/weightshare_resnet18.svg",
    )


@needs_dot
def test_the_drawing_of_parent_and_subnet(drawing):
    drawing(
        *parent_and_subnet(), "drawings/parent_and_subnet.pdf", "drawings/parent_and_subnet.svg"
    )


@needs_dot
@pytest.mark.parametrize("kind", ["ensemble", "streams", "subnet"])
def test_the_drawing_is_of_the_same_graph(kind, tmp_path):
    pytest.importorskip("torchviz")
    model, batch = {
        "ensemble": lambda: (Ensemble.of(small_resnet, 2), images()),
        "streams": lambda: (NStreams(small_resnet(), 2), images()),
        "subnet": parent_and_subnet,
    }[kind]()
    graph = measure_autograd_graph(model, batch)
    _, svg = draw_autograd_graph(model, batch, tmp_path / "drawing")
    leaves = [leaf.names[0] for leaf in graph.leaves]
    # torchviz shows a leaf as two nodes: the tensor, and where its gradient is added up.
    expected = Counter(leaves)
    for leaf in leaves:
        expected.update([f"gradient of {leaf}", f"{leaf}->gradient of {leaf}"])
    for operation in graph.operations:
        expected[operation.name] += 1
        for operand in operation.operands:
            if operand != "-":
                source = re.sub(r"\[\d+\]$", "", operand)
                source = f"gradient of {source}" if source in leaves else source
                expected[f"{source}->{operation.name}"] += 1
    for member, (end,) in graph.outputs:
        expected.update([f"output {member}", f"{end}->output {member}"])
    assert titles(svg) == expected
    drawn = svg.read_text(encoding="utf-8")
    for leaf in graph.leaves:
        for name in leaf.names:
            assert f">{name}</text>" in drawn, name


@needs_dot
def test_the_same_graph_gives_the_same_drawing(tmp_path):
    pytest.importorskip("torchviz")
    one = draw_autograd_graph(small_resnet(), images(), tmp_path / "one")
    two = draw_autograd_graph(small_resnet(), images(), tmp_path / "two.svg")
    assert [path.name for path in two] == ["two.pdf", "two.svg"]
    for first, second in zip(one, two, strict=True):
        assert first.read_bytes() == second.read_bytes()


@needs_dot
def test_a_deep_graph_can_be_handed_to_torchviz(tmp_path, autograd_graph):
    pytest.importorskip("torchviz")
    limit = sys.getrecursionlimit()
    chain = nn.Sequential(nn.Linear(2, 2), *(nn.ReLU() for _ in range(limit // 2)))
    pdf, svg = autograd_graph.draw(chain, torch.ones(1, 2), tmp_path / "chain")
    assert pdf.stat().st_size > 0
    assert svg.stat().st_size > 0
    assert sys.getrecursionlimit() == limit


@needs_dot
def test_files_are_not_overwritten_unasked(tmp_path):
    pytest.importorskip("torchviz")
    (tmp_path / "mine.svg").write_text("mine")
    with pytest.raises(FileExistsError, match=r"mine\.svg exists: .*overwrite=True"):
        draw_autograd_graph(nn.Linear(3, 2), torch.ones(1, 3), tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.svg"]
    draw_autograd_graph(nn.Linear(3, 2), torch.ones(1, 3), tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine.svg").read_text().startswith("<?xml")


def test_without_dot_drawing_says_how_to_get_it(tmp_path, monkeypatch):
    pytest.importorskip("torchviz")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="apt-get install graphviz"):
        draw_autograd_graph(nn.Linear(3, 2), torch.ones(1, 3), tmp_path / "drawing")


def test_without_torchviz_drawing_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchviz", None)
    with pytest.raises(ImportError, match=r'pip install "pytest-ensembles\[drawings\]"'):
        draw_autograd_graph(nn.Linear(3, 2), torch.ones(1, 3), tmp_path / "drawing")
