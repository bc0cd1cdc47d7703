import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ensembles.checks.graph.claim import parse
from ensembles.checks.graph.judgement import assert_graph_equal
from ensembles.checks.graph.measurement import measure_autograd_graph
from ensembles.claims import ClaimError
from ensembles.gate.conformance import check_ensemble
from ensembles.models import Ensemble, NStreams, resnet18
from ensembles.models.resnet import ResidualBlock
from ensembles.subject import Subject

MATS = Path(__file__).parents[2] / "test_mats"


def images() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


def narrow_resnet18() -> nn.Module:
    return resnet18(num_classes=10, stem="cifar", base_channels=4)


# --- goldens ------------------------------------------------------------------------------------


def test_resnet18(golden):
    network = resnet18(num_classes=10, stem="cifar")
    golden(str(measure_autograd_graph(network, images())), "graphs/resnet18.txt")


def test_an_ensemble_of_three_at_inference(golden, small_resnet):
    ensemble = Ensemble.of(small_resnet, 3)
    text = str(measure_autograd_graph(ensemble, images()))
    golden(text, "graphs/ensemble_of_three_inference.txt")


def test_an_ensemble_of_three_in_training(golden, small_resnet):
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


def test_parent_and_subnet_of_width_two(golden, parent_and_subnet):
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


def test_streams_in_place_of_members_are_broken(golden, small_resnet):
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
    with pytest.raises(AssertionError, match="claimed to be the recorded one, but it is another"):
        assert_graph_equal(measure_autograd_graph(changed, images()), str(recorded))


# --- findings are data --------------------------------------------------------------------------


def found_between(recorded, graph):
    with pytest.raises(AssertionError) as broken:
        assert_graph_equal(graph, recorded)
    return broken.value.findings


def test_every_line_that_differs_is_a_finding():
    def graph(*layers):
        return measure_autograd_graph(nn.Sequential(nn.Linear(3, 2), *layers), torch.ones(1, 3))

    found = found_between(str(graph(nn.ReLU(), nn.Tanh())), graph(nn.Tanh()))
    assert [(item.place, item.expected, item.found) for item in found] == [
        ("0:Relu", "(:Addmm)", "nothing"),
        ("0:Tanh", "(:Relu)", "(:Addmm)"),
    ]
    assert found.kinds == ("operation",)
    assert [item.members for item in found] == [(), ("model",)]
    assert [str(count) for count in found.affected] == ["2 of 8 lines"]


def test_a_parameter_that_is_shared_now_and_one_that_is_resized_are_told_apart():
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    recorded = str(measure_autograd_graph([one, nn.Sequential(two)], torch.ones(1, 3)))
    shared = measure_autograd_graph([one, nn.Sequential(one)], torch.ones(1, 3))
    (weight, bias) = found_between(recorded, shared).of_kind("other members")
    assert (weight.place, bias.place) == ("0.weight", "0.bias")
    assert weight.found == "(3, 3), used by every member, also named 1.0.weight"
    wider = measure_autograd_graph([nn.Linear(3, 4), nn.Sequential(two)], torch.ones(1, 3))
    assert found_between(recorded, wider).kinds == ("parameter",)


def test_parameters_that_are_frozen_without_a_trace_are_a_finding():
    """Only the title counts what is registered."""
    model = nn.Sequential(nn.Linear(3, 2))
    recorded = str(measure_autograd_graph(model, torch.ones(1, 3)))
    model.unused = nn.Parameter(torch.ones(2), requires_grad=False)
    (item,) = found_between(recorded, measure_autograd_graph(model, torch.ones(1, 3)))
    assert (item.kind, item.place) == ("parameter", "autograd graph")


def test_members_in_another_order_are_found():
    members = {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}
    recorded = str(measure_autograd_graph(members, torch.ones(1, 3)))
    turned = measure_autograd_graph(dict(reversed(members.items())), torch.ones(1, 3))
    assert any(item.found.endswith("in another order") for item in found_between(recorded, turned))


def test_what_a_merge_left_in_the_text_is_found():
    graph = measure_autograd_graph(nn.Linear(3, 2), torch.ones(1, 3))
    for left in ("<<<<<<< HEAD", "=======", ">>>>>>> branch"):
        (item,) = found_between(f"{graph}\n{left}\n", graph)
        assert item.found == "nothing"


# --- every process writes the same text ---------------------------------------------------------

SCRIPT = """
import torch
from ensembles.checks.graph.measurement import measure_autograd_graph
from ensembles.models import SubnetResNet
network = SubnetResNet(
    18, num_classes=10, stem="cifar", width=2, base_channels=4, construction="zero_padded"
)
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


# --- wrong use ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", "the claimed graph is no recorded graph"),
        ("graphs/resnet18.txt", "the claimed graph is no recorded graph"),
        (Path(__file__), r"test_graph\.py is no recorded graph"),
        (Path("nowhere.txt"), r"there is no recorded graph at nowhere\.txt\. Record it once"),
        (3, "graph cannot be claimed to be 3. It can be: the text of a recorded graph or the"),
    ],
    ids=["empty", "name", "file", "missing", "number"],
)
def test_what_is_no_recorded_graph_cannot_be_claimed(given, said):
    with pytest.raises(ClaimError, match=said):
        parse(given)


# --- the fixture and the gate -------------------------------------------------------------------


def test_the_fixture_compares_with_a_file(autograd_graph, tmp_path):
    path = tmp_path / "linear.txt"
    with pytest.raises(ValueError, match=r"there is no recorded graph at .*linear\.txt. Record"):
        autograd_graph.assert_equals(nn.Linear(3, 2), torch.ones(1, 3), path)
    path.write_text(str(autograd_graph.measure(nn.Linear(3, 2), torch.ones(1, 3))))
    autograd_graph.assert_equals(nn.Linear(3, 2), torch.ones(5, 3), path)
    with pytest.raises(AssertionError, match=r"weight +expected \(2, 3\) +found \(4, 3\)"):
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

    outcome("nn.ReLU()").stdout.fnmatch_lines(
        ["*File not found in data directory, created*", "*Look at it, commit it, and run again."]
    )
    outcome("nn.ReLU()").assert_outcomes(passed=1)
    changed = outcome("nn.Tanh()")
    changed.assert_outcomes(failed=1)
    changed.stdout.fnmatch_lines(
        [
            "*the autograd graph is claimed to be the recorded one, but it is another",
            "*0:Relu   expected (:Addmm)   found nothing",
            "*0:Tanh   expected nothing    found (:Addmm)",
            "*replay: pytest test_recorded.py::test_graph *",
        ]
    )
    outcome("nn.Tanh()", "--force-regen").assert_outcomes(failed=1)
    outcome("nn.Tanh()").assert_outcomes(passed=1)
    (golden,) = pytester.path.glob("test_recorded/*.txt")
    golden.write_text("what a failed merge left")
    outcome("nn.Tanh()").stdout.fnmatch_lines(["*ClaimError: *is no recorded graph*"])
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
    with pytest.raises(ClaimError, match=r"subject 'model': there is no recorded graph at nowhere"):
        status(Path("nowhere.txt"))
