"""A subnet computes exactly what an ordinary narrow ResNet computes, and moves its parent."""

import copy
import io
import re
from collections import Counter

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from ensembles.models.layers import SubnetConv2d
from ensembles.models.resnet import ResNet
from ensembles.models.routing import all_subnets
from ensembles.models.subnets import (
    ParentResNet,
    Subnet,
    SubnetResNet,
    subnet_name,
    subnet_resnet18,
    subnet_resnet34,
    subnet_resnet50,
)

# Full width with masks and narrow without are different code paths for one function: compared in
# float64, relative to the largest element of a tensor (or to 1). A leak is of the size of the
# activations; the worst rounding of 405 random networks was 2.3e-11.
TOLERANCE = 1e-9

# Shrinking four small choices tells nobody more, and would take minutes.
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]

ACTIVATIONS = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
    "sigmoid": nn.Sigmoid,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "identity": nn.Identity,
    "prelu": nn.PReLU,
}


def make(depth=18, *, width=2, stem="cifar", seed=0, **options):
    """A small network in float64, zero-padded, whose BatchNorms are not at ones and zeros.

    Their eps is large: over the few values of these images a variance may vanish, and an eps of
    1e-5 would then magnify roundings 300-fold in each of up to 53 layers.
    """
    torch.manual_seed(seed)
    options = {"num_classes": 3, "base_channels": 4, "construction": "zero_padded", **options}
    network = SubnetResNet(depth, width=width, stem=stem, **options).double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.1
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


def images(size=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, size, size, dtype=torch.float64, generator=generator)


def loss_of(logits):
    labels = torch.arange(len(logits)) % logits.shape[1]
    return nn.functional.cross_entropy(logits, labels)


def assert_equal(mine, expected, name="output"):
    assert mine.shape == expected.shape, name
    scale = max(1.0, expected.detach().abs().max().item())
    assert_close(mine, expected, rtol=0, atol=TOLERANCE * scale, msg=lambda text: f"{name}: {text}")


def blocks_of(subnet):
    """(name, the parent's conv, slices of the subnet's block) for every conv of a subnet."""
    for name, (i, j) in subnet.blocks.items():
        conv = subnet.get_submodule(name)
        out, into = conv.weight.shape[0] // conv.grid[0], conv.weight.shape[1] // conv.grid[1]
        where = (slice(i * out, (i + 1) * out), slice(j * into, (j + 1) * into))
        yield name, conv, where


def assert_equal_networks(subnet, narrow):
    """Weights of the route's blocks, BatchNorms with statistics, activations and classifier."""
    state = dict(subnet.state_dict())
    for name, conv, where in blocks_of(subnet):
        state[f"{name}.weight"] = conv.weight.detach()[where]
    expected = narrow.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert_equal(state[name], tensor, name)


def assert_equal_gradients(subnet, narrow):
    """The parent's block has the narrow weight's gradient, and every other block exactly zero."""
    expected = {name: parameter.grad for name, parameter in narrow.named_parameters()}
    gradients = {name: parameter.grad for name, parameter in subnet.named_parameters()}
    for name, conv, where in blocks_of(subnet):
        elsewhere = conv.weight.grad.clone()
        elsewhere[where] = 0.0
        assert elsewhere.count_nonzero() == 0, name
        gradients[f"{name}.weight"] = conv.weight.grad[where]
    assert list(gradients) == list(expected)
    for name, gradient in expected.items():
        assert_equal(gradients[name], gradient, name)


def assert_subnet_is_narrow_network(subnet, x, *, steps=2):
    """Outputs, gradients, statistics and updates are those of the extracted network."""
    narrow = subnet.extract()
    assert_equal(subnet.eval()(x), narrow.eval()(x))
    loss_of(subnet(x)).backward()
    loss_of(narrow(x)).backward()
    assert_equal_gradients(subnet, narrow)

    subnet.train()
    narrow.train()
    # Decay acts on the parent's whole weights; the narrow network is compared with its blocks.
    optimizers = [
        torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9, weight_decay=0.01)
        for network in (subnet, narrow)
    ]
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        mine, theirs = subnet(x), narrow(x)
        assert_equal(mine, theirs)
        loss_of(mine).backward()
        loss_of(theirs).backward()
        assert_equal_gradients(subnet, narrow)
        for optimizer in optimizers:
            optimizer.step()
        assert_equal_networks(subnet, narrow)
    assert_equal(subnet.eval()(x), narrow.eval()(x))


@st.composite
def routes(draw):
    width = draw(st.integers(1, 3))
    return width, draw(st.integers(0, width - 1)), draw(st.integers(0, width - 1))


class TestExactness:
    @given(
        route=routes(),
        stem=st.sampled_from(["cifar", "cifar_maxpool", "imagenet"]),
        activation=st.sampled_from(sorted(ACTIVATIONS)),
        seed=st.integers(0, 99),
    )
    @settings(max_examples=12, deadline=None, phases=PHASES)
    def test_a_subnet_of_basic_blocks_is_the_narrow_network(self, route, stem, activation, seed):
        width, start, shift = route
        parent = make(width=width, stem=stem, activation=ACTIVATIONS[activation], seed=seed)
        subnet = parent.subnets[subnet_name(start, shift)]
        assert_subnet_is_narrow_network(subnet, images(16))

    @given(
        route=routes(),
        stem=st.sampled_from(["cifar", "cifar_maxpool", "imagenet"]),
        activation=st.sampled_from(sorted(ACTIVATIONS)),
        seed=st.integers(0, 99),
    )
    @settings(max_examples=5, deadline=None, phases=PHASES)
    def test_a_subnet_of_bottlenecks_is_the_narrow_network(self, route, stem, activation, seed):
        width, start, shift = route
        network = make(50, width=width, stem=stem, activation=ACTIVATIONS[activation], seed=seed)
        subnet = network.subnets[subnet_name(start, shift)]
        assert_subnet_is_narrow_network(subnet, images(16), steps=1)

    @pytest.mark.parametrize("depth", [18, 50])
    @pytest.mark.parametrize(("start", "shift"), all_subnets(2))
    def test_every_subnet_of_width_two_is_the_narrow_network(self, depth, start, shift):
        subnet = make(depth, base_channels=2).subnets[subnet_name(start, shift)]
        assert_subnet_is_narrow_network(subnet, images(16))

    @pytest.mark.parametrize(("start", "shift"), [(0, 0), (1, 1), (2, 2), (0, 2), (2, 1)])
    def test_subnets_of_width_three_are_narrow_networks(self, start, shift):
        subnet = make(width=3, base_channels=2).subnets[subnet_name(start, shift)]
        assert_subnet_is_narrow_network(subnet, images())

    def test_a_subnet_of_depth_34_is_the_narrow_network(self):
        subnet = make(34, base_channels=2).subnets["subnet_1_1"]
        assert_subnet_is_narrow_network(subnet, images(), steps=1)

    @pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
    def test_no_activation_leaks_into_the_zero_part(self, activation):
        subnet = make(activation=activation).subnets["subnet_0_1"]
        assert_subnet_is_narrow_network(subnet, images(), steps=4)

    @pytest.mark.parametrize("stem", ["cifar_maxpool", "imagenet"])
    @pytest.mark.parametrize("activation", [nn.LeakyReLU, nn.ELU, nn.Identity])
    def test_max_pooling_of_negative_values_does_not_see_the_zeros(self, stem, activation):
        subnet = make(stem=stem, activation=activation).subnets["subnet_1_1"]
        nn.init.constant_(subnet.bn1.bias, -4.0)
        pooled = []
        subnet.maxpool.register_forward_hook(lambda _, __, output: pooled.append(output.detach()))
        assert_subnet_is_narrow_network(subnet, images(16))
        # Three evaluations and two steps, of the subnet and of its extract, which has the hook too.
        assert len(pooled) == 2 * (3 + 2)
        assert all((output < 0).any() for output in pooled)

    def test_dead_channels_are_exactly_zero_behind_every_block(self):
        subnet = make(activation=nn.Softplus).subnets["subnet_0_1"].train()
        seen = []
        for name, module in subnet.named_modules():
            if name.startswith("layer") and name.count(".") == 1:
                module.register_forward_hook(
                    lambda block, _, output: seen.append((block.route.exit, output.detach()))
                )
        subnet(images())
        assert len(seen) == 8
        for live, output in seen:
            dead = output.chunk(2, dim=1)[1 - live]
            assert dead.count_nonzero() == 0
            assert output.chunk(2, dim=1)[live].count_nonzero() > 0

    def test_images_of_one_channel_are_taken(self):
        subnet = make(image_channels=1).subnets["subnet_0_1"]
        assert_subnet_is_narrow_network(subnet, images()[:, :1], steps=1)

    def test_every_shortcut_contributes(self):
        subnet = make().subnets["subnet_0_1"].eval()
        for layer in (subnet.layer1, subnet.layer2, subnet.layer3, subnet.layer4):
            for block in layer:
                arms = []
                hook = block.switcher.register_forward_hook(
                    lambda _, __, output, arms=arms: arms.append(output.detach())
                )
                subnet(images())
                hook.remove()
                live = arms[0].chunk(2, dim=1)[block.route.exit]
                # A shortcut of zeros is the bias of its BatchNorm: the same for all images.
                assert (live[0] - live[1]).abs().max() > 1e-3


class TestSharing:
    def test_every_conv_weight_is_listed_once_and_all_else_is_own(self):
        network = make()
        names = [name for name, _ in network.named_parameters()]
        convs = [name for name, parameter in network.named_parameters() if parameter.ndim == 4]
        assert convs == [
            f"parent.{name}"
            for name, parameter in network.parent.named_parameters()
            if parameter.ndim == 4
        ]
        assert len(convs) == 20
        narrow = dict(ResNet(18, num_classes=3, base_channels=4).named_parameters())
        own = [name for name, parameter in narrow.items() if parameter.ndim < 4]
        for subnet in network.subnets:
            prefix = f"subnets.{subnet}."
            mine = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
            assert mine == own
            for name in own:
                shape = network.get_parameter(prefix + name).shape
                assert shape == narrow[name].shape

    def test_the_number_of_parameters_is_the_parents_and_the_owns(self):
        with torch.device("meta"):
            network = subnet_resnet18(num_classes=10, stem="cifar")
        own = sum(
            parameter.numel()
            for parameter in ResNet(18, num_classes=10).parameters()
            if parameter.ndim < 4
        )
        # A subnet's BatchNorms: 2 * (5 * 64 + 5 * 128 + 5 * 256 + 5 * 512); fc: 10 * 512 + 10.
        assert own == 9_600 + 5_130
        assert sum(p.numel() for p in network.parameters()) == 44_662_922 + 4 * own

    def test_a_subnets_convs_are_the_parents_modules(self):
        network = make(50)
        for subnet in network.subnets.values():
            convs = [
                name for name, module in subnet.named_modules() if isinstance(module, SubnetConv2d)
            ]
            assert convs == list(subnet.blocks)
            assert len(convs) == 53
            for name in convs:
                assert subnet.get_submodule(name) is network.parent.get_submodule(name)

    @pytest.mark.parametrize("depth", [18, 50])
    @pytest.mark.parametrize("width", [1, 2, 3])
    def test_the_gradients_of_all_subnets_partition_every_parent_conv(self, depth, width):
        """Every weight is moved by the parent and one subnet; the stem's by those that start there.

        Identity for the activation, because a dead ReLU would hide what reaches a weight.
        """
        network = make(depth, width=width, base_channels=2, activation=nn.Identity).eval()
        x = images()
        reached = Counter()
        for name in network.subnets:
            network.zero_grad()
            network(x, members=[name])[name].square().sum().backward()
            for conv, weight in network.parent.named_parameters():
                if weight.ndim == 4:
                    touched = weight.grad.abs().sum(dim=(2, 3)) > 0
                    reached[conv] = reached[conv] + touched.int()
        assert len(reached) == len(network.subnets["subnet_0_0"].blocks)
        for conv, count in reached.items():
            owners = width if conv == "conv1.weight" else 1
            assert (count == owners).all(), conv

    def test_a_step_on_one_subnet_moves_the_parent_and_every_subnet_that_shares_the_block(self):
        network = make(width=3, activation=nn.Identity).eval()
        before = copy.deepcopy(network.state_dict())
        subnet = network.subnets["subnet_1_2"]
        optimizer = torch.optim.SGD(subnet.parameters(), lr=0.1)
        subnet(images()).square().sum().backward()
        optimizer.step()
        for name, _, where in blocks_of(subnet):
            moved = network.parent.get_submodule(name).weight != before[f"parent.{name}.weight"]
            assert moved[where].any(dim=-1).any(dim=-1).all(), name
            assert moved.count_nonzero() == moved[where].count_nonzero(), name
        changed = {
            name.split(".")[1] if name.startswith("subnets.") else "parent"
            for name, parameter in network.named_parameters()
            if not torch.equal(parameter, before[name])
        }
        assert changed == {"parent", "subnet_1_2"}

    def test_a_step_on_the_parent_moves_every_subnet(self):
        network = make().eval()
        x = images()
        before = network(x)
        optimizer = torch.optim.SGD(network.parent.parameters(), lr=0.1)
        before["parent"].square().sum().backward()
        optimizer.step()
        after = network(x)
        for name in network.member_names:
            assert (after[name] - before[name]).abs().max() > 1e-3, name

    @pytest.mark.parametrize(
        "change",
        [
            lambda network: copy.deepcopy(network),
            lambda network: network.float(),
            lambda network: network.to("meta").to_empty(device="cpu"),
            lambda network: pickled(network),
            lambda network: reloaded(network),
        ],
        ids=["deepcopy", "float", "to_empty", "pickle", "assign"],
    )
    def test_subnets_stay_tied_to_their_parent(self, change):
        original = make()
        count = len(list(original.parameters()))
        network = change(original)
        assert len(list(network.parameters())) == count
        for subnet in network.subnets.values():
            for name in subnet.blocks:
                conv = network.parent.get_submodule(name)
                assert subnet.get_submodule(name) is conv
                assert subnet.get_parameter(f"{name}.weight") is conv.weight

    def test_a_deepcopy_shares_nothing_with_the_original(self):
        network = make().eval()
        twin = copy.deepcopy(network)
        expected = twin(images())
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(1.0)
        for name, output in twin(images()).items():
            assert torch.equal(output, expected[name])

    def test_a_state_dict_makes_the_round_trip(self):
        network, other = make(seed=0).eval(), make(seed=1).eval()
        expected = network(images())
        other.load_state_dict(network.state_dict())
        for name, output in other(images()).items():
            assert torch.equal(output, expected[name])


def pickled(network):
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def reloaded(network):
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.load_state_dict(state, assign=True)
    return network


class TestParent:
    def test_the_parent_is_the_ordinary_wide_network_of_the_same_seed(self):
        torch.manual_seed(5)
        network = SubnetResNet(18, num_classes=3, base_channels=4, stem="cifar", width=2)
        torch.manual_seed(5)
        plain = ResNet(18, num_classes=3, base_channels=4, stem="cifar", width=2)
        assert list(network.parent.state_dict()) == list(plain.state_dict())
        x = images().float()
        output = network(x, members=["parent"])["parent"]
        assert torch.equal(output, plain(x))
        loss_of(output).backward()
        loss_of(plain(x)).backward()
        for mine, theirs in zip(network.parent.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad)

    def test_the_parent_of_width_one_and_its_subnet_differ_only_in_what_is_own(self):
        network = make(width=1)
        subnet = network.subnets["subnet_0_0"]
        for name, module in network.parent.named_modules():
            if isinstance(module, nn.BatchNorm2d | nn.Linear):
                subnet.get_submodule(name).load_state_dict(module.state_dict())
        outputs = network.eval()(images())
        assert torch.equal(outputs["subnet_0_0"], outputs["parent"])


class TestMembers:
    def test_outputs_are_named_in_a_fixed_order(self):
        network = make().eval()
        names = ["parent", "subnet_0_0", "subnet_0_1", "subnet_1_0", "subnet_1_1"]
        outputs = network(images())
        assert list(outputs) == names == list(network.member_names)
        assert {tuple(output.shape) for output in outputs.values()} == {(4, 3)}
        for name in names[1:]:
            assert torch.equal(outputs[name], network.subnets[name](images()))
        distances = torch.stack(list(outputs.values())).flatten(1)
        assert (torch.pdist(distances) > 1e-3).all()

    def test_only_the_selected_members_are_computed(self):
        network = make().train()
        ran = []
        for name in network.member_names:
            module = network.parent if name == "parent" else network.subnets[name]
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
        expected = {
            name: network.subnets[name].bn1.running_mean.clone() for name in network.subnets
        }
        selected = network(images(), members=("subnet_1_0", "parent", "subnet_1_0"))
        assert list(selected) == ran == ["parent", "subnet_1_0"]
        moved = [
            name
            for name, mean in expected.items()
            if not torch.equal(network.subnets[name].bn1.running_mean, mean)
        ]
        assert moved == ["subnet_1_0"]

    def test_an_unknown_member_is_refused_with_the_known_ones(self):
        message = (
            "no members named ['subnet_2_0', 'child']; there are "
            "['parent', 'subnet_0_0', 'subnet_0_1', 'subnet_1_0', 'subnet_1_1']"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            make()(images(), members=["subnet_2_0", "parent", "child"])

    def test_an_empty_selection_is_refused(self):
        message = "members is empty: name at least one member, or pass None for all"
        with pytest.raises(ValueError, match=f"^{message}$"):
            make()(images(), members=[])

    def test_one_string_is_not_taken_for_a_list_of_names(self):
        message = "^members must be a list of names, got the string 'parent'$"
        with pytest.raises(ValueError, match=message):
            make()(images(), members="parent")


class TestExtract:
    def test_the_extracted_network_shares_nothing(self):
        subnet = make().subnets["subnet_0_1"].eval()
        narrow = subnet.extract()
        assert type(narrow) is ResNet
        assert narrow.width == 1
        expected = narrow(images())
        with torch.no_grad():
            for tensor in subnet.state_dict().values():
                tensor.add_(1)
        assert torch.equal(narrow(images()), expected)

    def test_no_random_number_is_drawn(self):
        subnet = make().subnets["subnet_0_1"]
        before = torch.get_rng_state()
        subnet.extract()
        assert torch.equal(torch.get_rng_state(), before)

    def test_modes_and_frozen_parameters_are_copied(self):
        subnet = make().subnets["subnet_0_1"].train()
        subnet.layer2[0].bn1.eval()
        subnet.layer2[0].bn1.momentum = 0.5
        subnet.layer3[1].conv2.weight.requires_grad_(False)
        subnet.fc.bias.requires_grad_(False)
        narrow = subnet.extract()
        evaluated = [
            name
            for name, module in narrow.named_modules()
            if isinstance(module, nn.BatchNorm2d) and not module.training
        ]
        assert evaluated == ["layer2.0.bn1"]
        assert narrow.training
        assert narrow.layer2[0].bn1.momentum == 0.5
        frozen = [name for name, p in narrow.named_parameters() if not p.requires_grad]
        assert frozen == ["layer3.1.conv2.weight", "fc.bias"]

    def test_an_activation_of_several_modules_is_copied(self):
        def activation():
            return nn.Sequential(nn.PReLU(), nn.Softplus())

        subnet = make(activation=activation).subnets["subnet_1_1"]
        nn.init.constant_(subnet.layer1[0].activation[0].weight, 0.7)
        assert_subnet_is_narrow_network(subnet, images(), steps=1)
        assert subnet.extract().layer2[0].activation[1].beta == 1.0


class TestConstruction:
    @pytest.mark.parametrize(
        ("maker", "depth"), [(subnet_resnet18, 18), (subnet_resnet34, 34), (subnet_resnet50, 50)]
    )
    def test_the_constructors_make_their_depth(self, maker, depth):
        with torch.device("meta"):
            network = maker(width=3, base_channels=4, construction="zero_padded")
        assert network.parent.depth == depth
        assert network.parent.width == 3
        assert len(network.subnets) == 9
        assert network(torch.empty(2, 3, 32, 32, device="meta"))["subnet_2_1"].shape == (2, 1000)

    def test_an_unknown_construction_is_refused(self):
        message = "construction must be one of ['sum_of_subnets', 'zero_padded'], got 'one_padded'"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            SubnetResNet(18, base_channels=4, construction="one_padded")

    def test_a_subnet_can_be_put_into_a_parent_by_itself(self):
        torch.manual_seed(0)
        parent = ParentResNet(18, width=2, num_classes=3, base_channels=4, stem="cifar").double()
        subnet = Subnet(parent, start=1, shift=1)
        assert {parameter.dtype for parameter in subnet.parameters()} == {torch.float64}
        assert_subnet_is_narrow_network(subnet, images(), steps=1)

    def test_a_subnet_outside_of_the_parent_is_refused(self):
        parent = ParentResNet(18, width=2, base_channels=4)
        with pytest.raises(ValueError, match=r"^start must be in 0\.\.1 for width 2, got 2$"):
            Subnet(parent, start=2, shift=0)
        with pytest.raises(ValueError, match=r"^shift must be in 0\.\.1 for width 2, got -1$"):
            Subnet(parent, start=0, shift=-1)

    def test_one_inf_in_a_block_reaches_the_subnets_that_write_its_group_and_no_others(self):
        network = make(width=3, base_channels=2).eval()
        conv = "layer1.0.conv2"
        with torch.no_grad():
            network.parent.get_submodule(conv).weight[2, 0, 1, 1] = torch.inf
        outputs = network(images())
        poisoned = {name for name, output in outputs.items() if not output.isfinite().all()}
        writers = {name for name, sub in network.subnets.items() if sub.blocks[conv][0] == 1}
        assert len(writers) == 3
        assert poisoned == {"parent"} | writers

    def test_the_step_costs_one_parent_and_one_parent_for_each_subnet(self):
        with torch.device("meta"):
            network = subnet_resnet18(
                width=2, stem="cifar", num_classes=10, construction="zero_padded"
            )
        x = torch.empty(2, 3, 32, 32, device="meta")
        flops = []
        for members in (["parent"], None):
            with FlopCounterMode(display=False) as counter:
                network(x, members=members)
            flops.append(counter.get_total_flops())
        # Only the classifiers are narrow: 2 operations * 2 images * 512 * 10 a subnet.
        classifiers = 4 * 2 * 2 * 512 * 10 * (2 - 1)
        assert flops[1] == 5 * flops[0] - classifiers
