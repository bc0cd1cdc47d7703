import re

import pytest
import torch
from torch import nn

from ensembles.sources.inferred_batch import inferred_batch


class Stated(nn.Module):
    """A module that says what it is called with, as Lightning modules do."""

    def __init__(self, example: object) -> None:
        super().__init__()
        self.example_input_array = example

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b


def classifier(side: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Takes images of this side only."""
    return nn.Sequential(
        nn.Conv2d(3, 2, 8, stride=8), nn.Flatten(), nn.Linear(2 * (side // 8) ** 2, 2)
    ).to(dtype)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Linear(12, 3), (4, 12)),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Linear(3, 2)), (4, 12)),
        (nn.Conv1d(5, 3, 3), (4, 5, 32)),
        (nn.Conv2d(1, 3, 3), (4, 1, 32, 32)),
        (nn.Conv3d(2, 3, 3), (4, 2, 32, 32, 32)),
        (classifier(64), (4, 3, 64, 64)),
        (classifier(224), (4, 3, 224, 224)),
        (nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)), (4, 16)),
        ([nn.Linear(12, 3), nn.Linear(12, 2)], (4, 12)),
        ({"a": nn.Linear(12, 3)}, (4, 12)),
    ],
    ids=[
        *("linear", "flattened", "signal", "image", "volume", "tiny_imagenet", "imagenet"),
        *("tokens", "list", "dict"),
    ],
)
def test_the_first_layer_with_weights_gives_the_shape(model, shape):
    assert inferred_batch(model).shape == shape


def test_tokens_are_numbers_of_the_vocabulary():
    batch = inferred_batch(nn.Embedding(3, 4))
    assert batch.dtype == torch.int64
    assert set(batch.flatten().tolist()) == {0, 1, 2}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_batch_has_the_models_dtype(dtype):
    assert inferred_batch(classifier(32, dtype)).dtype == dtype


def test_the_batch_is_on_the_models_device():
    assert inferred_batch(nn.Linear(12, 3, device="meta")).device.type == "meta"


def test_the_batch_is_drawn_from_the_global_generator():
    torch.manual_seed(1)
    first = inferred_batch(nn.Linear(12, 3))
    torch.manual_seed(1)
    assert torch.equal(inferred_batch(nn.Linear(12, 3)), first)


def test_a_module_that_states_its_input_is_believed():
    example = (torch.ones(2), torch.ones(2))
    assert inferred_batch(Stated(example)) is example


def test_trying_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Dropout())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inferred_batch(model)
    assert all(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_model_of_no_known_layer_is_refused():
    told = (
        "no batch was given, and none could be inferred for ReLU. Return a Subject(make=..., "
        "batch=...). Its batch is a function that returns what the model is called with: a tensor, "
        "a tuple of positional arguments, or a dict of keyword arguments."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        inferred_batch(nn.ReLU())


def test_a_model_that_takes_no_image_of_a_known_side_is_refused_with_what_was_tried():
    told = (
        "Tried: calling the model (Sequential) on the batch (4, 3, 299, 299) torch.float32 on cpu"
    )
    with pytest.raises(ValueError, match=re.escape(told)):
        inferred_batch(classifier(48))


def test_a_lazy_model_is_refused():
    told = "parameter weight is lazy and has no shape yet."
    with pytest.raises(ValueError, match=re.escape(told)):
        inferred_batch(nn.LazyLinear(2))


def test_a_member_that_takes_another_input_is_refused():
    told = "Tried: calling member 1 (Linear) on the batch (4, 12) torch.float32 on cpu raised"
    with pytest.raises(ValueError, match=re.escape(told)):
        inferred_batch([nn.Linear(12, 3), nn.Linear(11, 3)])


def test_an_error_of_the_models_own_is_told_at_once():
    class Misspelt(nn.Linear):
        def forward(self, x):
            return {"logit": super().forward(x)}["logits"]

    line = Misspelt.forward.__code__.co_firstlineno + 1
    told = (
        "calling the model (Misspelt) on the batch (4, 12) torch.float32 on cpu raised KeyError: "
        f"'logits' (tests/sources/test_inferred_batch.py:{line}). No batch was given, so this one "
        "was inferred from the first layer: if the model takes another, return a "
        "Subject(make=..., batch=...)."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        inferred_batch(Misspelt(12, 3))
