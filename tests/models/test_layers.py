"""Groups move as promised, and blocks compute with the parent's weight itself."""

import copy
import io
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from ensembles.models.layers import BlockConv2d, ChannelSwitcher, SubnetConv2d

# Different code paths for one function, in float64: a sum of at most 4 * 9 products of numbers
# near 1 is rounded at 1e-15, so 1e-12 leaves room and lets nothing else through.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def make(*args, width, **options):
    """Makes a seeded conv in float64."""
    torch.manual_seed(3)
    return SubnetConv2d(*args, width=width, dtype=torch.float64, **options)


def group_of(x, group, width):
    return x.chunk(width, dim=1)[group]


class TestChannelSwitcher:
    def test_two_groups_are_swapped(self):
        x = torch.arange(2 * 4 * 3.0).reshape(2, 4, 3)
        assert torch.equal(ChannelSwitcher(2)(x), torch.cat([x[:, 2:], x[:, :2]], dim=1))

    @given(width=st.integers(1, 5), shift=st.integers(-7, 7), channels=st.integers(1, 3))
    def test_content_of_group_g_arrives_in_group_g_plus_shift(self, width, shift, channels):
        x = torch.arange(2.0 * width * channels * 3).reshape(2, width * channels, 3, 1)
        y = ChannelSwitcher(width, shift)(x)
        assert y.shape == x.shape
        for group in range(width):
            arrived = group_of(y, (group + shift) % width, width)
            assert torch.equal(arrived, group_of(x, group, width))

    def test_two_swaps_are_the_identity(self):
        x = torch.arange(24.0).reshape(2, 4, 3)
        switch = ChannelSwitcher(2)
        assert not torch.equal(switch(x), x)
        assert torch.equal(switch(switch(x)), x)

    def test_three_groups_are_back_after_three_moves_and_not_after_two(self):
        x = torch.arange(12.0).reshape(2, 6)
        switch = ChannelSwitcher(3)
        assert not torch.equal(switch(switch(x)), x)
        assert torch.equal(switch(switch(switch(x))), x)

    def test_the_gradient_moves_back(self):
        x = torch.zeros(1, 6, requires_grad=True)
        (ChannelSwitcher(3)(x) * torch.arange(6.0)).sum().backward()
        assert x.grad.tolist() == [[2.0, 3.0, 4.0, 5.0, 0.0, 1.0]]

    @pytest.mark.parametrize(("width", "shift"), [(1, 1), (3, 0), (3, -3)])
    def test_where_nothing_moves_the_input_itself_is_returned(self, width, shift):
        x = torch.arange(6.0).reshape(1, 6)
        assert ChannelSwitcher(width, shift)(x) is x

    def test_it_has_no_parameters_and_no_state(self):
        switch = ChannelSwitcher(2)
        assert list(switch.parameters()) == []
        assert dict(switch.state_dict()) == {}

    def test_it_shows_its_arguments(self):
        assert repr(ChannelSwitcher(3, shift=2)) == "ChannelSwitcher(width=3, shift=2)"

    def test_channels_that_the_width_does_not_divide_are_refused(self):
        with pytest.raises(ValueError, match=r"^width 3 does not divide 8 channels$"):
            ChannelSwitcher(3)(torch.arange(8.0).reshape(1, 8))

    def test_an_input_without_channels_is_refused(self):
        message = re.escape("ChannelSwitcher expects (N, C, ...), got shape (8,)")
        with pytest.raises(ValueError, match=f"^{message}$"):
            ChannelSwitcher(2)(torch.arange(8.0))

    def test_a_width_below_one_is_refused(self):
        with pytest.raises(ValueError, match=r"^width must be at least 1, got 0$"):
            ChannelSwitcher(0)


OPTIONS = {
    "plain": {"kernel_size": 3},
    "pointwise": {"kernel_size": 1},
    "strided": {"kernel_size": 3, "stride": (2, 1), "padding": (1, 0)},
    "dilated": {"kernel_size": (3, 2), "dilation": (1, 2), "padding": 2},
    "same": {"kernel_size": (5, 3), "padding": "same"},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "replicate"},
    "circular": {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
}


class TestBlocks:
    @pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    @pytest.mark.parametrize("width", [1, 2, 3])
    def test_a_block_computes_what_a_narrow_conv_with_its_weight_does(self, width, options, bias):
        conv = make(2 * width, 4 * width, bias=bias, width=width, **options)
        x = torch.randn(2, 2 * width, 7, 6, dtype=torch.float64)
        for i in range(width):
            for j in range(width):
                narrow = nn.Conv2d(2, 4, bias=bias, dtype=torch.float64, **options)
                weight = conv.weight[4 * i : 4 * i + 4, 2 * j : 2 * j + 2]
                narrow.weight = nn.Parameter(weight.detach().clone())
                if bias:
                    narrow.bias = nn.Parameter(conv.subnet_bias[i, j].detach().clone())
                expected = narrow(group_of(x, j, width))
                block = conv.subnets[i, j]
                assert torch.equal(block(group_of(x, j, width)), expected)

                padded = block.zero_padded(x)
                assert padded.shape == conv(x).shape
                assert_close(group_of(padded, i, width), expected, **CLOSE)
                for other in set(range(width)) - {i}:
                    assert group_of(padded, other, width).count_nonzero() == 0

    @pytest.mark.parametrize("form", ["narrow", "zero_padded"])
    def test_the_gradient_reaches_the_block_and_nothing_else(self, form):
        conv = make(6, 9, 3, width=3)
        x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
        narrow = nn.Conv2d(2, 3, 3, dtype=torch.float64)
        narrow.weight = nn.Parameter(conv.weight[6:, 2:4].detach().clone())
        narrow.bias = nn.Parameter(conv.subnet_bias[2, 1].detach().clone())
        narrow(x[:, 2:4]).square().sum().backward()

        block = conv.subnets[2, 1]
        y = block(x[:, 2:4]) if form == "narrow" else block.zero_padded(x)
        y.square().sum().backward()

        expected = torch.zeros_like(conv.weight)
        expected[6:, 2:4] = narrow.weight.grad
        assert_close(conv.weight.grad, expected, **CLOSE)
        assert conv.weight.grad[:6].count_nonzero() == 0
        assert conv.weight.grad[6:, [0, 1, 4, 5]].count_nonzero() == 0
        expected = torch.zeros_like(conv.subnet_bias)
        expected[2, 1] = narrow.bias.grad
        assert_close(conv.subnet_bias.grad, expected, **CLOSE)
        assert conv.bias.grad is None

    def test_the_parent_is_the_sum_of_its_blocks(self):
        conv = make(6, 9, 3, padding=1, bias=False, width=3)
        x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
        blocks = sum(block.zero_padded(x) for block in conv.subnets)
        assert_close(blocks, conv(x), **CLOSE)

    @pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_the_conv_is_computed_in_blocks_too(self, options, bias):
        conv = make(6, 9, bias=bias, width=3, **options)
        x = torch.randn(2, 6, 7, 6, dtype=torch.float64)
        assert_close(conv(x, conv.split_weight()), conv(x), **CLOSE)
        assert_close(conv(x[0], conv.split_weight()), conv(x[0]), **CLOSE)

    def test_a_stem_is_computed_in_blocks_too(self):
        conv = make(3, 6, 3, width=2, split_input=False)
        x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
        assert_close(conv(x, conv.split_weight()), conv(x), **CLOSE)

    @pytest.mark.parametrize("split_input", [True, False], ids=["blocks", "stem"])
    def test_the_split_weight_holds_every_block_as_a_view(self, split_input):
        conv = make(6, 9, 3, width=3, split_input=split_input)
        blocks = conv.split_weight()
        assert list(blocks) == [(block.i, block.j) for block in conv.subnets]
        for (i, j), weight in blocks.items():
            assert torch.equal(weight, conv.subnets[i, j].weight)
            assert weight.untyped_storage().data_ptr() == conv.weight.untyped_storage().data_ptr()

    def test_gradients_of_split_blocks_reach_their_places(self):
        conv = make(4, 6, 3, bias=False, width=2)
        x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
        blocks = conv.split_weight()
        (conv.narrow(x, 0, 1, blocks=blocks) - conv.narrow(x, 1, 0, blocks=blocks)).sum().backward()
        mine, conv.weight.grad = conv.weight.grad, None
        (conv.narrow(x, 0, 1) - conv.narrow(x, 1, 0)).sum().backward()
        assert mine[:3, 2:].count_nonzero() > 0
        assert mine[3:, :2].count_nonzero() > 0
        assert torch.equal(mine, conv.weight.grad)

    def test_a_stem_has_row_blocks_that_read_the_whole_image(self):
        conv = make(3, 6, 3, padding=1, width=2, split_input=False)
        x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
        assert conv.grid == (2, 1)
        assert conv.subnet_bias.shape == (2, 1, 3)
        for i in range(2):
            block = conv.subnets[i, 0]
            rows = slice(3 * i, 3 * i + 3)
            assert torch.equal(block.weight, conv.weight[rows])
            bias = conv.subnet_bias[i, 0].reshape(3, 1, 1)
            live = conv(x)[:, rows] - conv.bias[rows].reshape(3, 1, 1) + bias
            assert_close(block(x), live, **CLOSE)
            padded = block.zero_padded(x)
            assert_close(padded[:, rows], live, **CLOSE)
            assert padded[:, 3 * (1 - i) :][:, :3].count_nonzero() == 0

    def test_the_zero_padded_form_ignores_what_stands_in_other_input_groups(self):
        conv = make(4, 4, 3, padding=1, width=2)
        x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
        dirty = x.clone()
        dirty[:, 2:] += 7.0
        assert torch.equal(conv.zero_padded(dirty, 1, 0), conv.zero_padded(x, 1, 0))

    def test_one_inf_in_another_block_makes_the_zero_padded_form_nan_and_not_the_narrow(self):
        conv = make(4, 4, 3, padding=1, bias=False, width=2)
        with torch.no_grad():
            conv.weight[0, 3, 0, 0] = torch.inf
        x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
        assert conv.zero_padded(x, 0, 0)[:, 0].isnan().any()
        assert conv.subnets[0, 0](x[:, :2]).isfinite().all()

    def test_an_input_without_batch_dimension_is_taken_as_conv2d_takes_it(self):
        conv = make(4, 6, 3, width=2)
        x = torch.randn(4, 5, 5, dtype=torch.float64)
        assert conv.subnets[1, 0](x[:2]).shape == (3, 3, 3)
        assert conv.zero_padded(x, 1, 0).shape == (6, 3, 3)

    def test_the_grid_lists_every_block_once(self):
        conv = make(4, 6, 3, width=2)
        assert [(block.i, block.j) for block in conv.subnets] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert len(conv.subnets) == 4

    def test_grid_block_and_parent_show_what_they_are(self):
        conv = SubnetConv2d(3, 6, 3, bias=False, width=2, split_input=False)
        shown = "SubnetConv2d(3, 6, kernel_size=(3, 3), stride=(1, 1), bias=False, width=2"
        assert repr(conv) == f"{shown}, split_input=False)"
        assert repr(conv.subnets) == f"SubnetGrid(2 x 1 blocks of {shown}, split_input=False))"
        inner = SubnetConv2d(4, 6, 3, bias=False, width=2)
        assert repr(inner).endswith("bias=False, width=2)")
        assert repr(inner.subnets[1, 0]).startswith("BlockConv2d(\n  i=1, j=0\n")

    @pytest.mark.parametrize("index", [(2, 0), (0, 2), (-1, 0), (0, -1)])
    def test_a_block_that_there_is_not_is_an_index_error_with_the_range(self, index):
        conv = make(4, 6, 3, width=2)
        message = f"no block {index}: i must be in 0..1 and j in 0..1"
        with pytest.raises(IndexError, match=f"^{re.escape(message)}$"):
            conv.subnets[index]
        with pytest.raises(IndexError, match=f"^{re.escape(message)}$"):
            conv.zero_padded(torch.randn(1, 4, 5, 5, dtype=torch.float64), *index)

    def test_a_stem_has_no_second_column(self):
        conv = make(4, 6, 3, width=2, split_input=False)
        message = re.escape("no block (0, 1): i must be in 0..1 and j in 0..0")
        with pytest.raises(IndexError, match=f"^{message}$"):
            conv.subnets[0, 1]

    @pytest.mark.parametrize("index", [0, (0,), (0, 0, 0)])
    def test_an_index_that_is_not_a_pair_is_an_index_error_with_the_range(self, index):
        message = f"expected two indices (i, j), got {index!r}: i must be in 0..1 and j in 0..1"
        with pytest.raises(IndexError, match=f"^{re.escape(message)}$"):
            make(4, 6, 3, width=2).subnets[index]


class TestTie:
    """Parent and blocks move together, whatever is done to them."""

    def test_a_step_on_a_block_moves_the_parent(self):
        conv = make(4, 6, 3, bias=False, width=2)
        before = conv.weight.detach().clone()
        block = conv.subnets[0, 1]
        optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
        block(torch.randn(2, 2, 5, 5, dtype=torch.float64)).square().sum().backward()
        gradient = conv.weight.grad.clone()
        optimizer.step()
        assert gradient[:3, 2:].count_nonzero() == gradient[:3, 2:].numel()
        assert torch.equal(conv.weight, torch.add(before, gradient, alpha=-0.1))
        moved = conv.weight != before
        assert moved[:3, 2:].all()
        assert moved.count_nonzero() == moved[:3, 2:].numel()

    def test_a_step_on_the_parent_moves_every_block_that_was_taken_before(self):
        conv = make(4, 6, 3, width=2)
        blocks = list(conv.subnets)
        before = [block.weight.detach().clone() for block in blocks]
        optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
        conv(torch.randn(2, 4, 5, 5, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        for block, old in zip(blocks, before, strict=True):
            assert (block.weight != old).all()
            rows, columns = slice(3 * block.i, 3 * block.i + 3), slice(2 * block.j, 2 * block.j + 2)
            assert torch.equal(block.weight, conv.weight[rows, columns])

    def test_blocks_are_views_and_not_copies(self):
        conv = make(4, 6, 3, width=2)
        block = conv.subnets[1, 1]
        storage = conv.weight.untyped_storage().data_ptr()
        assert block.weight.untyped_storage().data_ptr() == storage
        assert (
            block.bias.untyped_storage().data_ptr() == conv.subnet_bias.untyped_storage().data_ptr()
        )

    def test_the_parameters_of_a_block_are_those_of_the_parent(self):
        conv = make(4, 6, 3, width=2)
        block = conv.subnets[1, 0]
        assert isinstance(block, BlockConv2d)
        names = [name for name, _ in nn.Sequential(block, nn.ReLU()).named_parameters()]
        assert names == ["0.conv.weight", "0.conv.bias", "0.conv.subnet_bias"]
        pairs = zip(block.parameters(), conv.parameters(), strict=True)
        assert all(mine is parents for mine, parents in pairs)
        assert list(conv.children()) == []

    @pytest.mark.parametrize(
        "change",
        [
            lambda module: copy.deepcopy(module),
            lambda module: module.float(),
            lambda module: module.to("meta").to_empty(device="cpu"),
            lambda module: pickled(module),
            lambda module: reloaded(module),
        ],
        ids=["deepcopy", "float", "to_empty", "pickle", "assign"],
    )
    def test_a_block_kept_beside_its_parent_stays_tied(self, change):
        conv = make(4, 6, 3, width=2)
        pair = change(nn.ModuleList([conv, conv.subnets[1, 0]]))
        with torch.no_grad():
            pair[0].weight.copy_(torch.arange(6 * 4 * 9.0).reshape(6, 4, 3, 3))
        assert torch.equal(pair[1].weight, pair[0].weight[3:, :2])
        assert pair[1].weight[0, 0, 0, 1] == 3 * 4 * 9 + 1
        assert pair[1].conv is pair[0]

    def test_a_deepcopy_shares_nothing_with_the_original(self):
        conv = make(4, 6, 3, width=2)
        twin = copy.deepcopy(conv)
        before = twin.weight.detach().clone()
        with torch.no_grad():
            conv.weight.add_(1.0)
        assert torch.equal(twin.subnets[1, 1].weight, before[3:, 2:])

    def test_a_state_dict_makes_the_round_trip(self):
        conv = make(4, 6, 3, width=2)
        torch.manual_seed(4)
        other = SubnetConv2d(4, 6, 3, width=2, dtype=torch.float64)
        assert not torch.equal(other.subnet_bias, conv.subnet_bias)
        other.load_state_dict(conv.state_dict())
        x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
        assert torch.equal(other.subnets[1, 0](x), conv.subnets[1, 0](x))

    def test_a_parametrized_weight_is_followed(self):
        conv = make(4, 6, 3, bias=False, width=2)
        nn.utils.parametrizations.weight_norm(conv)
        with torch.no_grad():
            conv.parametrizations.weight.original0.mul_(3.0)
        assert torch.equal(conv.subnets[0, 1].weight, conv.weight[:3, 2:])


def pickled(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def reloaded(module):
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    return module


class TestParent:
    @pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
    def test_the_parent_is_an_ordinary_conv_of_the_same_seed(self, bias):
        torch.manual_seed(11)
        conv = SubnetConv2d(4, 6, 3, bias=bias, width=2)
        torch.manual_seed(11)
        plain = nn.Conv2d(4, 6, 3, bias=bias)
        x = torch.randn(2, 4, 5, 5)
        assert torch.equal(conv(x), plain(x))
        extra = ["subnet_bias"] if bias else []
        assert list(conv.state_dict()) == list(plain.state_dict()) + extra

    def test_an_ordinary_state_dict_loads_where_there_is_no_bias(self):
        plain = nn.Conv2d(4, 6, 3, bias=False)
        conv = SubnetConv2d(4, 6, 3, bias=False, width=2)
        conv.load_state_dict(plain.state_dict())
        assert torch.equal(conv.weight, plain.weight)

    def test_biases_of_blocks_are_drawn_as_those_of_narrow_convs(self):
        torch.manual_seed(5)
        conv = SubnetConv2d(8, 400, 3, width=2)
        narrow, wide = (4 * 9) ** -0.5, (8 * 9) ** -0.5
        assert conv.subnet_bias.shape == (2, 2, 200)
        assert wide < conv.subnet_bias.abs().max() <= narrow
        assert conv.subnet_bias.unique().numel() > 700

    def test_resetting_draws_everything_anew(self):
        conv = make(4, 6, 3, width=2)
        before = {name: tensor.clone() for name, tensor in conv.state_dict().items()}
        conv.reset_parameters()
        assert all((conv.state_dict()[name] != before[name]).all() for name in before)
        torch.manual_seed(3)
        conv.reset_parameters()
        assert all(torch.equal(conv.state_dict()[name], before[name]) for name in before)

    def test_it_can_be_made_on_meta_and_skips_initialisation_there(self):
        conv = SubnetConv2d(4, 6, 3, padding=1, width=2, device="meta", dtype=torch.bfloat16)
        tensors = [conv.weight, conv.bias, conv.subnet_bias, conv.subnets[1, 0].weight]
        assert {(tensor.device.type, tensor.dtype) for tensor in tensors} == {
            ("meta", torch.bfloat16)
        }
        x = torch.empty(2, 4, 5, 5, device="meta", dtype=torch.bfloat16)
        assert conv.zero_padded(x, 1, 0).shape == (2, 6, 5, 5)
        assert conv.subnets[1, 0](x[:, :2]).shape == (2, 3, 5, 5)
        skipped = nn.utils.skip_init(SubnetConv2d, 4, 6, 3, width=2)
        assert skipped.subnet_bias.device.type == "cpu"

    @given(dtype=st.sampled_from([torch.float32, torch.float64]), width=st.integers(1, 3))
    @settings(max_examples=6, deadline=None)
    def test_outputs_have_the_type_of_the_weights(self, dtype, width):
        conv = SubnetConv2d(width, 2 * width, 1, width=width, dtype=dtype)
        x = torch.randn(1, width, 2, 2, dtype=dtype)
        assert conv.subnets[0, 0](x[:, :1]).dtype == dtype
        assert conv.zero_padded(x, 0, 0).dtype == dtype

    def test_a_grouped_parent_is_refused_with_what_to_do(self):
        message = (
            "SubnetConv2d has no grouped form, got groups=2: blocks (i, j) with i != j would cross "
            "the groups. Use groups=1 here, or torch.nn.Conv2d for a conv that no subnet shares."
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            SubnetConv2d(4, 8, 3, groups=2, width=2)

    def test_channels_that_the_width_does_not_divide_are_refused(self):
        with pytest.raises(ValueError, match=r"^width 3 does not divide 8 out_channels$"):
            SubnetConv2d(6, 8, 3, width=3)
        with pytest.raises(ValueError, match=r"^width 3 does not divide 8 in_channels$"):
            SubnetConv2d(8, 6, 3, width=3)
        assert SubnetConv2d(8, 6, 3, width=3, split_input=False).grid == (3, 1)

    def test_a_width_below_one_is_refused(self):
        with pytest.raises(ValueError, match=r"^width must be at least 1, got 0$"):
            SubnetConv2d(4, 6, 3, width=0)
