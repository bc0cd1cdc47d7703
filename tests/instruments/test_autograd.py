import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ensembles.case import Case
from ensembles.instruments.autograd import (
    attributes_of,
    nodes_of,
    operation_of,
    outputs_with_graph,
)

# --- nodes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "operation"),
    [
        ("NativeBatchNormBackward0", "BatchNorm"),
        ("CudnnBatchNormBackward0", "BatchNorm"),
        ("MiopenBatchNormBackward0", "BatchNorm"),
        ("CudnnConvolutionBackward0", "Convolution"),
        ("MkldnnConvolutionBackward0", "Convolution"),
        ("ThnnConv2DBackward0", "Convolution"),
        ("MpsConvolutionTransposeBackward0", "ConvolutionTranspose"),
        ("MaxPool2DWithIndicesBackward0", "MaxPool2D"),
        ("MkldnnMaxPool3DBackward0", "MaxPool3D"),
        ("NativeLayerNormBackward0", "LayerNorm"),
        ("FusedDropoutBackward0", "Mul"),
        ("UnsafeViewBackward0", "View"),
        ("ReluBackward0", "Relu"),
        ("torch::autograd::CopySlices", "CopySlices"),
        ("TwiceBackward", "Twice"),
    ],
)
def test_implementations_have_the_name_of_their_operation(node, operation):
    assert operation_of(SimpleNamespace(name=lambda: node)) == operation


def test_a_transposed_convolution_is_told_from_a_convolution():
    layers = (nn.Conv2d(3, 3, 3), nn.ConvTranspose2d(3, 3, 3))
    found = [operation_of(layer(torch.ones(1, 3, 4, 4)).grad_fn) for layer in layers]
    assert found == ["Convolution", "ConvolutionTranspose"]


def test_operands_stand_before_what_uses_them_and_members_share_nodes():
    weight = torch.ones(2, requires_grad=True)
    shared = weight.exp()
    nodes = nodes_of({"a": [shared.sin()], "b": [shared + 1, torch.ones(2)]})
    names = [function.name() for function in nodes.functions]
    assert sorted(names[:2]) == ["ExpBackward0", "torch::autograd::AccumulateGrad"]
    assert all(
        edge.node < i for i, operands in enumerate(nodes.operands) for edge in operands if edge
    )
    assert list(nodes.leaves.values()) == [weight]
    assert [end and names[end.node] for end in nodes.ends["a"]] == ["SinBackward0"]
    assert [end and names[end.node] for end in nodes.ends["b"]] == ["AddBackward0", None]


def test_a_slice_of_everything_is_left_out():
    weight = torch.ones(4, 6, requires_grad=True)
    nodes = nodes_of({"model": [weight[:, 2:][:]]})
    assert [operation_of(function) for function in nodes.functions] == ["AccumulateGrad", "Slice"]


def test_negative_axes_are_the_same_as_positive_ones():
    weight = torch.ones(4, 6, requires_grad=True)
    cuts = [
        weight[:, 4:],
        weight[:, -2:],
        weight[:, 4:6],
        weight.narrow(-1, 4, 2),
        weight.narrow(1, 4, 2),
    ]
    found = {attributes_of(cut.grad_fn, of_weight=True) for cut in cuts}
    assert found == {(("dim", "1"), ("start", "4"), ("end", "6"))}


def test_rows_are_shown_of_weights_only():
    rows = torch.ones(4, 6, requires_grad=True)[2:].grad_fn
    assert attributes_of(rows, of_weight=True) == (("dim", "0"), ("start", "2"), ("end", "4"))
    assert attributes_of(rows, of_weight=False) == (("dim", "0"),)


def test_a_selected_index_is_shown():
    """Attention selects query, key and value from one tensor; the size of a batch is not known."""
    for rows in (4, 5):
        batch = torch.ones(rows, 3, requires_grad=True)
        found = [attributes_of(batch[i].grad_fn, of_weight=False) for i in (0, 1, -1)]
        assert found == [(("dim", "0"), ("index", index)) for index in ("0", "1", "-1")]


# --- the call -----------------------------------------------------------------------------------


def test_fused_layers_are_written_out():
    """So that a machine that has no such kernel finds the same graph."""

    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.attention = nn.GRU(4, 4), nn.MultiheadAttention(4, 2)

        def forward(self, x):
            y, _ = self.rnn(x)
            return self.attention(y, y, y, need_weights=False)[0]

    with outputs_with_graph(Case.of(Fused(), torch.randn(3, 2, 4))) as outputs:
        operations = {operation_of(function) for function in nodes_of(outputs).functions}
    assert {"Sigmoid", "Tanh", "Bmm"} <= operations
    assert not [name for name in operations if "Attention" in name or "Rnn" in name]


def test_looking_changes_nothing(small_resnet):
    model = small_resnet()
    model.stem.eval()
    model.head[2].weight.grad = torch.ones(10, 8)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    kernels = (torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled)
    batch = torch.randn(2, 3, 8, 8)
    state = torch.get_rng_state()
    with outputs_with_graph(
        Case.of(nn.Sequential(model, nn.Dropout()), batch), training=True
    ) as outputs:
        assert model.stem.training
        assert operation_of(outputs["model"][0].grad_fn) == "Mul"  # of dropout
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert (torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled) == kernels
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    grads = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert grads == {"head.2.weight"}
    assert torch.equal(model.head[2].weight.grad, torch.ones(10, 8))


def test_a_batch_that_is_written_to_and_a_layer_that_nothing_lists_are_as_before():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.others = nn.Linear(3, 3), [nn.BatchNorm1d(3)]

        def forward(self, x):
            return self.layer(self.others[0](x.mul_(2)))

    case = Case.of(Hidden(), torch.randn(4, 3))
    assert case.batch is not None  # made
    before = case.digest()
    with outputs_with_graph(case, training=True):
        pass
    assert case.is_as(before)


def test_no_grad_around_the_call_does_not_matter():
    model, batch = nn.Linear(3, 2), torch.ones(1, 3)
    for disabled in (torch.no_grad(), torch.inference_mode()):
        with disabled, outputs_with_graph(Case.of(model, batch)) as outputs:
            assert not torch.is_grad_enabled()
            assert outputs["model"][0].requires_grad


class Detached(nn.Linear):
    def forward(self, x):
        return [super().forward(x), super().forward(x).detach()]


def test_an_output_without_a_graph_is_an_error():
    with (
        pytest.raises(ValueError, match=r"output of member 1 has no autograd graph.*detach"),
        outputs_with_graph(Case.of(Detached(3, 2), torch.ones(1, 3))),
    ):
        pass


def test_a_model_that_is_frozen_is_an_error():
    with (
        pytest.raises(ValueError, match=r"output of member model has no autograd graph.*frozen"),
        outputs_with_graph(Case.of(nn.Linear(3, 2).requires_grad_(False), torch.ones(1, 3))),
    ):
        pass


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
    with (
        pytest.raises(ValueError, match=said),
        outputs_with_graph(Case.of(model, torch.ones(1, 3))),
    ):
        pass
