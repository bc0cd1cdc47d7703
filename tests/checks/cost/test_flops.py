"""FLOPs that multiply by zeros, against loops over every multiply-add."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ensembles.checks.cost.flops import flops_of, kind_of, useful_flops_of

aten = torch.ops.aten


def sparse(*shape: int) -> torch.Tensor:
    """Numbers, some of them zero, and now and then a whole channel."""
    numbers = torch.randn(shape) * (torch.rand(shape) > 0.4)
    return numbers * (torch.rand(shape[0], shape[1], *[1] * (len(shape) - 2)) > 0.3)


def convolutions(fine, weight, coarse, stride, padding, dilation, groups):
    """Every (coarse element, weight element, fine element or its channel) of a 1-d convolution."""
    samples, _, size = fine.shape
    outs, per_group, taps = weight.shape
    for n, o, p, c, t in product(
        range(samples), range(outs), range(coarse.shape[2]), range(per_group), range(taps)
    ):
        channel = (o // (outs // groups)) * per_group + c
        place = p * stride + t * dilation - padding
        alive = bool(fine[n, channel].any())
        read = bool(fine[n, channel, place]) if 0 <= place < size else alive
        yield bool(coarse[n, o, p]), bool(weight[o, c, t]), read


@st.composite
def geometries(draw):
    groups = draw(st.integers(1, 2))
    taps, stride, padding, dilation = (draw(st.integers(low, 3)) for low in (1, 1, 0, 1))
    # At least one window.
    size = draw(st.integers(max(1, dilation * (taps - 1) + 1 - 2 * padding), 9))
    return groups, taps, stride, padding, dilation, size


@settings(max_examples=60, deadline=None)
@given(geometries(), st.integers(0, 2**16), st.booleans())
def test_convolutions_equal_brute_force(geometry, seed, transposed):
    groups, taps, stride, padding, dilation, size = geometry
    torch.manual_seed(seed)
    if transposed:
        # The fine side is the output; the weight's first axis is the coarse side's, as always.
        coarse, weight = sparse(2, 2 * groups, size), sparse(2 * groups, 3, taps)
        options = ([stride], [padding], [dilation], True, [0], groups)
        length = (size - 1) * stride - 2 * padding + dilation * (taps - 1) + 1
        if length < 1:
            return
        fine = sparse(2, 3 * groups, length)
        x, grad = coarse, fine
    else:
        fine, weight = sparse(2, 3 * groups, size), sparse(2 * groups, 3, taps)
        options = ([stride], [padding], [dilation], False, [0], groups)
        coarse = sparse(*aten.convolution(fine, weight, None, *options).shape)
        x, grad = fine, coarse
    every = list(convolutions(fine, weight, coarse, stride, padding, dilation, groups))
    total = 2 * len(every)
    spread = 2 * sum(left and use for left, use, _ in every)
    windows = 2 * sum(use and right for _, use, right in every)
    pairs = 2 * sum(left and right for left, _, right in every)

    out = aten.convolution(x, weight, None, *options)
    assert flops_of(aten.convolution, (x, weight, None, *options), {}, out) == total
    full = bool(x.all()) and bool(weight.all())
    forward = None if full else (spread if transposed else windows)
    assert useful(aten.convolution, x, weight, None, *options) == forward
    for wanted, expected in (
        ([True, False, False], windows if transposed else spread),
        ([False, True, False], pairs),
        ([True, True, False], pairs + (windows if transposed else spread)),
    ):
        args = (grad, x, weight, None, *options, wanted)
        assert flops_of(aten.convolution_backward, args, {}, ()) == total * sum(wanted)
        full = all(bool(t.all()) for t in (grad, x, weight))
        assert useful(aten.convolution_backward, *args) == (None if full else expected)


def useful(packet, *args):
    return useful_flops_of(packet, args, {})


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**16))
def test_products_equal_brute_force(m, k, n, seed):
    torch.manual_seed(seed)
    a, b, bias = sparse(3, m, k), sparse(3, k, n), torch.zeros(m, n)
    both = [
        2 * int(((a[i, :, :, None] != 0) & (b[i, None] != 0)).sum()) for i in range(3)
    ]  # (m, k, n)
    full = bool(a[0].all()) and bool(b[0].all())
    assert useful(aten.mm, a[0], b[0]) == (None if full else both[0])
    assert useful(aten.addmm, bias, a[0], b[0]) == both[0]
    full = bool(a.all()) and bool(b.all())
    assert useful(aten.bmm, a, b) == (None if full else sum(both))
    vector = b[0, :, 0]
    expected = 2 * int(((a[0] != 0) & (vector != 0)).sum())
    full = bool(a[0].all()) and bool(vector.all())
    assert useful(aten.mv, a[0], vector) == (None if full else expected)
    assert flops_of(aten.mv, (a[0], vector), {}, None) == 2 * m * k


def met(a, b):
    """How many pairs of factors of a product of matrices are both not zero."""
    return int(((a[..., :, :, None] != 0) & (b[..., None, :, :] != 0)).sum())


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([(1, 1), (4, 2), (3, 3)]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from(["nothing", "causal", "bool", "bias"]),
    st.integers(0, 2**16),
)
def test_fused_attention_equals_its_plain_products(heads, queries, keys, masked, seed):
    torch.manual_seed(seed)
    shapes = (heads[0], queries, 8), (heads[1], keys, 8), (heads[1], keys, 6)
    query, key, value = (sparse(2, *shape) for shape in shapes)
    drawn = torch.rand(queries, keys) > 0.4
    shown = {
        "nothing": torch.ones(queries, keys, dtype=torch.bool),
        "causal": torch.ones(queries, keys, dtype=torch.bool).tril(),
    }.get(masked, drawn)
    mask = {"bool": drawn, "bias": torch.zeros(queries, keys).masked_fill(~drawn, -torch.inf)}
    named = {"attn_mask": mask.get(masked)}

    keys_of, values_of = (x.repeat_interleave(heads[0] // heads[1], 1) for x in (key, value))
    scores = (query @ keys_of.mT / 8**0.5).masked_fill(~shown, -torch.inf).requires_grad_()
    attends = scores.softmax(-1).nan_to_num(0.0)
    attends.retain_grad()
    grad = sparse(2, heads[0], queries, 6)
    (attends @ values_of).backward(grad)
    of_scores = scores.grad.nan_to_num(0.0)
    attends = attends.detach()

    forward = (query, key, value, 0.0, masked == "causal")
    packet = aten._scaled_dot_product_flash_attention_for_cpu
    expected = 2 * (met(query, keys_of.mT) + met(attends, values_of))
    assert useful_flops_of(packet, forward, named) == expected
    assert flops_of(packet, forward, named, None) == 2 * 2 * heads[0] * queries * keys * (8 + 6)

    backward = (grad, query, key, value, None, None, 0.0, masked == "causal")
    packet = aten._scaled_dot_product_flash_attention_for_cpu_backward
    products = [
        (query, keys_of.mT),
        (grad, values_of.mT),
        (attends.mT, grad),
        (of_scores, keys_of),
        (of_scores.mT, query),
    ]
    assert useful_flops_of(packet, backward, named) == 2 * sum(met(*pair) for pair in products)
    assert flops_of(packet, backward, named, None) == sum(
        2 * 2 * heads[0] * a.shape[-2] * a.shape[-1] * b.shape[-1] for a, b in products
    )


def test_an_operation_that_multiplies_no_matrices_has_no_flops():
    assert flops_of(aten.relu, (torch.ones(2),), {}, torch.ones(2)) is None
    assert useful_flops_of(aten.relu, (torch.zeros(2),), {}) is None


@pytest.mark.parametrize(
    ("packet", "kind"),
    [
        (aten.convolution, "convolution"),
        (aten.addmm, "product"),
        (aten.baddbmm, "batched product"),
        (aten._scaled_dot_product_flash_attention_for_cpu, "attention"),
        (aten._cudnn_rnn, "recurrence"),
    ],
)
def test_operations_have_readable_names(packet, kind):
    assert kind_of(packet) == kind
