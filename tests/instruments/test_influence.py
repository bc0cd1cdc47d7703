import subprocess
import sys

import pytest
import torch
from torch import nn

from ensembles.instruments.influence import influence, probing


def reached(model, batch, **options):
    return {
        name: None if mask is None else int(mask.sum())
        for _, masks in influence(model, batch, **options)
        for name, mask in masks.items()
    }


def test_a_tap_that_sees_only_padding_counts_as_its_neighbours():
    conv = nn.Conv2d(2, 3, 3, padding=1, bias=False)
    assert reached(conv, torch.randn(1, 2, 1, 1)) == {"model.weight": conv.weight.numel()}


def test_a_masked_tap_does_not_count():
    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1, 1, 3))
            self.register_buffer("mask", torch.tensor([1.0, 1.0, 0.0]))

        def forward(self, x):
            return nn.functional.conv1d(x, self.weight * self.mask, padding=1)

    assert reached(Causal(), torch.randn(1, 1, 5)) == {"model.weight": 2}


def test_masks_among_the_inputs_are_kept():
    class Attended(nn.Module):
        def __init__(self):
            super().__init__()
            self.values = nn.Parameter(torch.randn(4, 2))

        def forward(self, scores, gate):
            return torch.softmax(scores, -1) @ (self.values * gate)

    scores = torch.tensor([[0.0, 0.0, float("-inf"), 0.0]])
    gate = torch.tensor([[1.0], [0.0], [1.0], [1.0]])
    assert reached(Attended(), (scores, gate)) == {"model.values": 4}


def test_dropout_drops_nothing_in_training_mode():
    model = nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.99), nn.Dropout1d(0.99), nn.Linear(50, 1))
    found = reached(model, torch.randn(1, 3), training=True)
    assert found == {
        "model.0.weight": 150,
        "model.0.bias": 50,
        "model.3.weight": 50,
        "model.3.bias": 1,
    }


def test_outputs_that_overflow_at_one_scale_are_looked_at_at_another():
    class Exploding(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(40, 40))

        def forward(self, x):
            return torch.exp(x @ self.weight @ self.weight)

    assert reached(Exploding(), torch.randn(2, 40)) == {"model.weight": 1600}


def test_outputs_that_are_never_finite_are_an_error():
    class Nothing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return torch.log(-self.weight.abs()) * x

    with (
        pytest.raises(ValueError, match="the output of member model is NaN, infinite or all zero"),
        probing(Nothing(), torch.randn(2, 3)),
    ):
        pass


def test_a_compiled_module_is_looked_at_eagerly():
    model = torch.compile(nn.Linear(3, 2), backend="eager")
    assert reached(model, torch.randn(1, 3)) == {
        "model._orig_mod.weight": 6,
        "model._orig_mod.bias": 2,
    }


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
def test_a_scripted_module_hides_nothing():
    model = torch.jit.script(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    assert reached(model, torch.randn(1, 3)) == {"model.0.weight": 6, "model.0.bias": 2}


def test_probing_does_not_import_the_compiler():
    program = (
        "import sys, torch; from torch import nn\n"
        "from ensembles.instruments.influence import influence\n"
        "list(influence(nn.Linear(2, 1), torch.ones(1, 2)))\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_a_checkpointed_attention_is_looked_through():
    from torch.utils.checkpoint import checkpoint

    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return checkpoint(self.layer, x, use_reentrant=False)

    found = reached(Checkpointed(), torch.randn(2, 5, 8))
    assert found == {f"model.layer.{name}": p.numel() for name, p in layer.named_parameters()}


def test_rounding_ends_influence():
    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.second(self.first(x).round() + x)

    assert reached(Rounded(), torch.randn(2, 3))["model.first.weight"] == 0
