import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from ensembles.checks.graph.drawing import draw_autograd_graph
from ensembles.checks.graph.measurement import measure_autograd_graph
from ensembles.models import Ensemble, NStreams, resnet18

MATS = Path(__file__).parents[2] / "test_mats"
needs_dot = pytest.mark.skipif(
    shutil.which("dot") is None, reason="Graphviz's program `dot` is not installed"
)


def images() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


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
def test_the_drawing_of_an_ensemble_of_three_at_inference(drawing, small_resnet):
    drawing(
        Ensemble.of(small_resnet, 3),
        images(),
        "drawings/ensemble_of_three_inference.pdf",
        "drawings/ensemble_of_three_inference.svg",
    )


@needs_dot
def test_the_drawing_of_an_ensemble_of_three_in_training(drawing, small_resnet):
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
def test_the_drawing_of_parent_and_subnet(drawing, parent_and_subnet):
    drawing(
        *parent_and_subnet(), "drawings/parent_and_subnet.pdf", "drawings/parent_and_subnet.svg"
    )


@needs_dot
@pytest.mark.parametrize("kind", ["ensemble", "streams", "subnet"])
def test_the_drawing_is_of_the_same_graph(kind, tmp_path, small_resnet, parent_and_subnet):
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
def test_the_same_graph_gives_the_same_drawing(tmp_path, small_resnet):
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
    chain = nn.Sequential(nn.Linear(2, 2), *(nn.ReLU() for _ in range(limit)))
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
