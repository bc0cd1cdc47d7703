"""A head for each group of features: what it computes, and what it is next to an ordinary head."""

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, linear

from ensembles.models import GroupedLinear, MeanField, predict


def head_of(groups: int = 3, **kinds) -> GroupedLinear:
    return GroupedLinear(12, 5, groups, dtype=torch.float64, **kinds)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 4),
    each=st.integers(1, 3),
    classes=st.integers(1, 4),
    samples=st.integers(0, 3),
    bias=st.booleans(),
)
def test_every_group_is_a_linear_layer_on_its_slice(groups, each, classes, samples, bias):
    head = GroupedLinear(groups * each, classes, groups, bias=bias, dtype=torch.float64)
    assert head.weight.shape == (groups, classes, each)
    x = torch.randn(samples, groups * each).double()
    logits = head(x)
    assert logits.shape == (samples, groups, classes)
    for group, part in enumerate(x.chunk(groups, dim=1)):
        own = head.bias[group] if bias else None
        expected = linear(part, head.weight[group], own)
        torch.testing.assert_close(logits[:, group], expected, rtol=1e-12, atol=1e-14)


def test_a_group_sees_its_own_features_only():
    head, x = head_of(), torch.randn(2, 12).double().requires_grad_()
    for group in range(3):
        (gradient,) = torch.autograd.grad(head(x)[:, group].sum(), x)
        seen = gradient.ne(0).all(0)
        assert seen.tolist() == [place // 4 == group for place in range(12)]


def test_a_groups_loss_moves_its_slice_of_the_head_only():
    head = head_of()
    logits = head(torch.randn(2, 12).double())[:, 1]
    cross_entropy(logits, torch.tensor([0, 1])).backward()
    for gradient in (head.weight.grad, head.bias.grad):
        assert gradient[1].ne(0).any()
        assert not gradient[[0, 2]].any()


def test_dimensions_before_the_features_stay():
    head, x = head_of(), torch.randn(2, 3, 12).double()
    torch.testing.assert_close(head(x)[1, 2], head(x[1, 2]), rtol=1e-12, atol=1e-14)
    assert head(x).shape == (2, 3, 3, 5)
    assert head(x.transpose(0, 1)).shape == (3, 2, 3, 5)


@pytest.mark.parametrize("bias", [True, False])
def test_groups_start_as_heads_that_are_built_one_after_another(bias):
    torch.manual_seed(4)
    head = head_of(bias=bias)
    after = torch.rand(1)
    torch.manual_seed(4)
    for group in range(3):
        alone = nn.Linear(4, 5, bias=bias, dtype=torch.float64)
        assert torch.equal(head.weight[group], alone.weight)
        if bias:
            assert torch.equal(head.bias[group], alone.bias)
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize("bias", [True, False])
def test_the_merged_head_gives_the_mean_of_the_logits_and_draws_nothing(bias):
    head, x = head_of(bias=bias).eval(), torch.randn(4, 12).double()
    before = torch.get_rng_state()
    merged = head.merged()
    assert torch.equal(torch.get_rng_state(), before)
    assert type(merged) is nn.Linear
    assert not merged.training
    assert (merged.bias is None) == (not bias)
    torch.testing.assert_close(merged(x), head(x).mean(1), rtol=1e-12, atol=1e-14)
    groups = {f"group_{g}": logits for g, logits in enumerate(head(x).unbind(1))}
    torch.testing.assert_close(
        merged(x).log_softmax(1), predict(groups, "geometric"), rtol=0, atol=1e-13
    )
    labels = torch.tensor([0, 1, 2, 3])
    assert cross_entropy(merged(x), labels) < MeanField()(groups, labels)
    merged.weight.data.zero_()
    assert head.weight.all()


def test_an_ordinary_head_is_the_sum_of_its_groups_and_one_bias():
    plain, x = nn.Linear(12, 5).double(), torch.randn(4, 12).double()
    head = head_of(bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.stack(plain.weight.chunk(3, dim=1)))
    torch.testing.assert_close(plain(x), head(x).sum(1) + plain.bias, rtol=1e-12, atol=1e-14)


def test_one_group_is_an_ordinary_head():
    torch.manual_seed(2)
    head = head_of(1)
    torch.manual_seed(2)
    plain, x = nn.Linear(12, 5, dtype=torch.float64), torch.randn(4, 12).double()
    torch.testing.assert_close(head(x)[:, 0], plain(x), rtol=1e-12, atol=1e-14)


def test_states_travel_and_copies_are_apart():
    head = head_of()
    other = head_of()
    other.load_state_dict(head.state_dict())
    x = torch.randn(2, 12).double()
    assert torch.equal(other(x), head(x))
    assert list(head.state_dict()) == ["weight", "bias"]
    assert list(head_of(bias=False).state_dict()) == ["weight"]
    copied = copy.deepcopy(head)
    copied.weight.data.zero_()
    assert head.weight.all()
    assert GroupedLinear(12, 5, 3, device="meta").weight.is_meta
    assert repr(head) == "GroupedLinear(in_features=12, out_features=5, groups=3, bias=True)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 5, 3), "10 features cannot be divided into 3 equal groups"),
        ((0, 5, 3), "in_features must be at least 1, got 0"),
        ((12, 0, 3), "out_features must be at least 1, got 0"),
        ((12, 5, 0), "groups must be at least 1, got 0"),
    ],
    ids=str,
)
def test_numbers_that_make_no_head_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        GroupedLinear(*arguments)


@pytest.mark.parametrize("shape", [(2, 11), (12, 2), ()])
def test_an_input_of_other_features_is_refused(shape):
    message = f"the input has shape {shape}, and its last dimension must be the 12 features"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        head_of()(torch.zeros(shape).double())
