"""Both constructions compute the same; `sum_of_subnets` computes no zero, and nothing unasked."""

import os
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ensembles import check_ensemble
from ensembles.checks.cost.measurement import measure_compute_cost
from ensembles.checks.ownership.measurement import measure_ownership_map
from ensembles.models import constructions, stems
from ensembles.models.example import wide_resnet18_with_subnets
from ensembles.models.layers import SubnetConv2d
from ensembles.models.resnet import ResNet
from ensembles.models.routing import all_subnets
from ensembles.models.subnets import SubnetResNet, subnet_name

# Different code paths for one function, in float64, relative to the largest element of a tensor (or
# to 1); a wrong block is of the size of the activations.
TOLERANCE = 1e-9

# Shrinking small choices tells nobody more, and would take minutes.
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]

ACTIVATIONS = [nn.ReLU, nn.GELU, nn.Softplus, nn.Sigmoid, nn.LeakyReLU, nn.Identity, nn.PReLU]


def make(construction="sum_of_subnets", depth=18, *, seed=0, **options):
    """A small network in float64 whose BatchNorms are not at ones and zeros.

    Their eps is large: over the few values of these images a variance may vanish, and an eps of
    1e-5 would then magnify roundings 300-fold in each of up to 53 layers.
    """
    torch.manual_seed(seed)
    options = {"num_classes": 3, "base_channels": 2, "width": 2, "stem": "cifar", **options}
    network = SubnetResNet(depth, construction=construction, **options).double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.1
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


def make_both(*args, **options):
    return make("zero_padded", *args, **options), make("sum_of_subnets", *args, **options)


def images(size=8, count=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=generator)


def loss_of(outputs):
    labels = torch.arange(len(next(iter(outputs.values())))) % 3
    return sum(nn.functional.cross_entropy(logits, labels) for logits in outputs.values())


def assert_equal(mine, expected, name):
    assert (mine is None) == (expected is None), name
    if mine is None:
        return
    assert mine.shape == expected.shape, name
    scale = max(1.0, expected.detach().abs().max().item())
    assert_close(mine, expected, rtol=0, atol=TOLERANCE * scale, msg=lambda text: f"{name}: {text}")


def assert_all_equal(mine, expected):
    assert list(mine) == list(expected)
    for name, value in expected.items():
        assert_equal(mine[name], value, name)


def gradients(network):
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def assert_same_network(reference, network, x, members, *, steps=3):
    """Outputs in both modes, gradients, BatchNorm statistics and optimizer steps are equal."""
    assert_all_equal(network.eval()(x, members=members), reference.eval()(x, members=members))
    pair = (reference.train(), network.train())
    optimizers = [
        torch.optim.SGD(each.parameters(), lr=0.02, momentum=0.9, weight_decay=0.01)
        for each in pair
    ]
    for _ in range(steps):
        expected, mine = (each(x, members=members) for each in pair)
        assert_all_equal(mine, expected)
        for optimizer, outputs in zip(optimizers, (expected, mine), strict=True):
            optimizer.zero_grad()
            loss_of(outputs).backward()
        assert_all_equal(gradients(network), gradients(reference))
        for optimizer in optimizers:
            optimizer.step()
        assert_all_equal(network.state_dict(), reference.state_dict())
    assert_all_equal(network.eval()(x, members=members), reference.eval()(x, members=members))


@st.composite
def selections(draw, most):
    """A width and the members asked for: any set of subnets, with or without the parent."""
    width = draw(st.integers(1, 4))
    names = ["parent", *(subnet_name(*subnet) for subnet in all_subnets(width))]
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=most, unique=True))
    return width, draw(st.sampled_from([chosen, chosen, None])) if width < 3 else chosen


class TestEquality:
    @given(
        selection=selections(5),
        stem=st.sampled_from(["cifar", "cifar_maxpool", "imagenet"]),
        activation=st.sampled_from(ACTIVATIONS),
        size=st.sampled_from([8, 12, 16]),
        seed=st.integers(0, 99),
    )
    @settings(max_examples=6, deadline=None, phases=PHASES)
    def test_networks_of_basic_blocks_are_equal(self, selection, stem, activation, size, seed):
        width, members = selection
        pair = make_both(width=width, stem=stem, activation=activation, seed=seed)
        assert_same_network(*pair, images(size), members)

    @given(
        selection=selections(3),
        stem=st.sampled_from(["cifar", "cifar_maxpool", "imagenet"]),
        activation=st.sampled_from(ACTIVATIONS),
        seed=st.integers(0, 99),
    )
    @settings(max_examples=3, deadline=None, phases=PHASES)
    def test_networks_of_bottlenecks_are_equal(self, selection, stem, activation, seed):
        width, members = selection
        pair = make_both(depth=50, width=width, stem=stem, activation=activation, seed=seed)
        assert_same_network(*pair, images(), members, steps=1)

    @pytest.mark.parametrize("width", [2, 3, 4])
    def test_all_members_together_are_equal(self, width):
        assert_same_network(*make_both(width=width), images(), None)

    def test_a_parent_in_blocks_is_equal(self, monkeypatch):
        monkeypatch.setattr(constructions, "_LARGE_BLOCK", 0)
        called = []
        forward = SubnetConv2d.forward
        monkeypatch.setattr(
            SubnetConv2d,
            "forward",
            lambda conv, x, blocks=None: called.append(blocks) or forward(conv, x, blocks),
        )
        pair = make_both(width=3, seed=4)
        members = ["parent", "subnet_0_1", "subnet_2_2"]
        pair[1].eval()(images(), members=members)
        # Of 20 convs only the stem is computed whole: it has no groups at its input.
        assert [blocks is None for blocks in called] == [True] + 19 * [False]
        assert_same_network(*pair, images(), members)

    @pytest.mark.parametrize("depth", [18, 50])
    def test_subnets_in_every_layout_are_equal(self, monkeypatch, depth):
        # A block of 4 x 4 x 3 x 3 in float64 has 1,152 bytes: the bound falls between the layers.
        monkeypatch.setattr(constructions, "_SMALL_WEIGHT", 1500)
        pair = make_both(depth, seed=5, stem="cifar_maxpool")
        laid_out = layouts(pair[1], "subnets.subnet_0_1", images(16))
        assert set(laid_out) == {True, False}
        assert_same_network(*pair, images(16), ["parent", "subnet_0_1"], steps=1)

    def test_a_subnet_by_itself_is_what_it_is_among_the_others(self):
        network = make(width=3).eval()
        outputs = network(images())
        for name, subnet in network.subnets.items():
            assert_equal(subnet(images()), outputs[name], name)
            assert_equal(subnet.extract()(images()), outputs[name], name)

    @pytest.mark.parametrize(("depth", "width"), [(18, 2), (18, 3), (50, 2)])
    def test_ownership_maps_are_equal(self, depth, width):
        maps = [
            measure_ownership_map(network, images()) for network in make_both(depth, width=width)
        ]
        assert maps[0] == maps[1]

    def test_checkpoints_load_either_way(self):
        reference, network = make("zero_padded", seed=1), make("sum_of_subnets", seed=2)
        assert list(reference.state_dict()) == list(network.state_dict())
        network.load_state_dict(reference.state_dict())
        assert_all_equal(network.eval()(images()), reference.eval()(images()))
        other = make("zero_padded", seed=3)
        other.load_state_dict(network.state_dict())
        assert_all_equal(other.eval()(images()), reference(images()))

    def test_one_inf_in_a_block_reaches_its_owner_and_the_parent_only(self):
        network = make(width=3).eval()
        conv = "layer1.0.conv2"
        with torch.no_grad():
            network.parent.get_submodule(conv).weight[2, 0, 1, 1] = torch.inf
        outputs = network(images())
        poisoned = {name for name, output in outputs.items() if not output.isfinite().all()}
        owners = {name for name, sub in network.subnets.items() if sub.blocks[conv] == (1, 0)}
        assert len(owners) == 1
        assert poisoned == {"parent"} | owners


def operations(run, *, backward):
    with FlopCounterMode(display=False) as counter:
        outputs = run()
        if backward:
            sum(output.sum() for output in outputs.values()).backward()
    return counter.get_total_flops()


def derived_operations(depth, width, *, backward):
    """Operations of the parent's stem, of its other convs and of its classifier, from shapes."""
    found = {"stem": 0, "rest": 0, "classifier": 0}

    def count(module, _, output, part):
        # Every element of the output is a sum of products with one row of the weight.
        per_element = module.weight[0].numel()
        found[part] += 2 * output.numel() * per_element

    plain = ResNet(depth, width=width, num_classes=3, stem="cifar", base_channels=2).double()
    for name, module in plain.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            part = {"conv1": "stem", "fc": "classifier"}.get(name, "rest")
            module.register_forward_hook(partial(count, part=part))
    plain(images())
    # Backward: a gradient of the weight, and one of the input, which the image does not need.
    times = {"stem": 2, "rest": 3, "classifier": 3} if backward else dict.fromkeys(found, 1)
    return (times[part] * found[part] for part in found)


class TestCost:
    @pytest.mark.parametrize("backward", [False, True], ids=["forward", "step"])
    @pytest.mark.parametrize(("depth", "width"), [(18, 2), (18, 3), (18, 4), (50, 2)])
    def test_parent_and_all_subnets_cost_at_most_two_parents(self, depth, width, backward):
        stem, rest, classifier = derived_operations(depth, width, backward=backward)
        network = make(depth=depth, width=width)
        cost = operations(lambda: network(images()), backward=backward)
        assert cost == stem + 2 * rest + (1 + width) * classifier
        assert cost <= 2 * (stem + rest + classifier)

    @pytest.mark.parametrize(
        ("members", "stems", "parents", "subnets"),
        [
            ("parent", 3, 1, 0),
            ("subnet_0_0", 1, 0, 1),
            ("subnet_0_0 subnet_0_1", 1, 0, 2),
            ("subnet_0_1 subnet_2_2", 2, 0, 2),
            ("parent subnet_2_2", 3, 1, 1),
        ],
    )
    def test_only_what_is_asked_for_is_computed(self, members, stems, parents, subnets):
        stem, rest, classifier = derived_operations(18, 3, backward=True)
        network = make(width=3)
        cost = operations(lambda: network(images(), members=members.split()), backward=True)
        parent, subnet = rest + classifier, rest // 9 + classifier // 3
        assert cost == stems * stem // 3 + parents * parent + subnets * subnet

    def test_a_sum_of_block_products_costs_what_the_conv_costs(self):
        conv = SubnetConv2d(4, 8, 3, width=2)
        x = torch.randn(2, 4, 6, 6)
        flops = [
            operations(lambda blocks=blocks: {"y": conv(x, blocks)}, backward=True)
            for blocks in (None, conv.split_weight())
        ]
        assert flops[0] == flops[1]

    @pytest.mark.parametrize("width", [2, 3])
    def test_all_that_is_kept_for_backward_is_narrow_and_the_stem_is_kept_once(self, width):
        network = make(width=width)
        x = images(16)
        narrow = network.subnets["subnet_0_0"].extract()
        stem_bytes = network.parent.conv1(x).nbytes
        parent = kept_bytes(network.parent, x)
        subnet = kept_bytes(narrow, x)
        shared = width * stem_bytes  # k*k subnets have 1/k of the stem each
        assert kept_bytes(network, x) == parent + width**2 * subnet - shared

    @pytest.mark.parametrize("stem", ["cifar_maxpool", "imagenet"])
    @pytest.mark.parametrize("width", [2, 3])
    def test_a_stem_that_is_pooled_is_kept_once_in_all_that_is_in_front_of_the_pool(
        self, width, stem
    ):
        network = make(width=width, stem=stem)
        x = images(16)
        parent = kept_bytes(network.parent, x)
        subnet = kept_bytes(network.subnets["subnet_0_0"].extract(), x)
        product = network.parent.conv1(x)
        pooled = network.parent.maxpool(product)
        # Each keeps its product, the mean and the scale of its norm, what is activated of it, and
        # the indices of the pool; an index has 8 bytes, as a number has.
        statistics = 2 * product.shape[1] * 8
        by_each = product.nbytes + statistics + product.nbytes + pooled.nbytes
        readers = 1 + width  # k*k subnets have 1/k of the stem each
        # Once: as much, what is normalised in place of what is activated; the statistics that
        # running ones are moved by; what is scaled; and the image's copy.
        once = by_each + statistics + pooled.nbytes + x.nbytes
        network_alone = parent + width**2 * subnet
        assert kept_bytes(network, x) == network_alone - readers * by_each + once

    @pytest.mark.parametrize("width", [2, 3])
    def test_nothing_is_kept_twice_where_the_layout_changes(self, monkeypatch, width):
        network = make(width=width)
        at_once = kept_bytes(network, images(16))
        # In float64 the 3x3 blocks have 288, 576, 1,152, 2,304, ... bytes.
        monkeypatch.setattr(constructions, "_SMALL_WEIGHT", 1500)
        assert {True, False} == set(layouts(network, "subnets.subnet_0_1", images(32)))
        assert kept_bytes(network, images(16)) == at_once

    def test_weights_are_not_copied(self):
        network = make(width=2)
        weights = {p.untyped_storage().data_ptr() for p in network.parameters() if p.ndim == 4}
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            network(images())
        kernels = [tensor for tensor in saved if tensor.shape[2:] in {(3, 3), (1, 1)}]
        convs = [tensor for tensor in kernels if tensor.shape[0] != 4]  # not a batch of 4 images
        assert len(convs) > 50
        assert {tensor.untyped_storage().data_ptr() for tensor in convs} <= weights

    def test_statistics_of_members_that_are_not_asked_for_stay(self):
        network = make(width=2).train()
        network(images(), members=["subnet_0_1"])
        steps = {
            name: int(module.num_batches_tracked)
            for name, module in network.named_modules()
            if isinstance(module, nn.BatchNorm2d)
        }
        assert all(count == name.startswith("subnets.subnet_0_1.") for name, count in steps.items())


def kept_bytes(network, x):
    """Bytes that the backward pass needs, each memory once, without parameters and input."""
    owned = [*network.parameters(), *network.buffers(), x]
    known = {tensor.untyped_storage().data_ptr() for tensor in owned}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = network.train()(x)
    del outputs
    return sum(storage.nbytes() for at, storage in kept.items() if at not in known)


def layouts(network, prefix, x, members=None):
    """Whether the output of every BatchNorm that has more than one pixel is channels last."""
    found = []
    hooks = [
        module.register_forward_hook(
            lambda _, __, y: (
                found.append(y.is_contiguous(memory_format=torch.channels_last))
                if y.shape[-1] > 1
                else None
            )
        )
        for name, module in network.named_modules()
        if name.startswith(prefix) and isinstance(module, nn.BatchNorm2d)
    ]
    network.eval()  # statistics stay as they are
    network(x) if members is None else network(x, members=members)
    for hook in hooks:
        hook.remove()
    return found


class TestLayout:
    def test_narrow_subnets_on_a_cpu_compute_channels_last_behind_the_stem(self):
        stem, *others = layouts(make(base_channels=4), "subnets.subnet_1_0", images(32))
        assert not stem  # it keeps the product that the parent keeps
        assert len(others) >= 15
        assert all(others)

    def test_the_parent_of_two_groups_keeps_the_layout_of_its_image(self):
        assert not any(layouts(make(base_channels=4), "parent", images(32)))

    @pytest.mark.parametrize("member", ["parent", "subnets.subnet_1_0"])
    def test_behind_a_stem_whose_pool_is_shared_all_is_channels_last(self, member):
        prefix = f"{member}.layer"  # a hook on the stem's norm would make it compute by itself
        found = layouts(make(stem="cifar_maxpool"), prefix, images(32))
        assert len(found) >= 15
        assert all(found)

    @pytest.mark.parametrize("alone", [True, False], ids=["alone", "asked for"])
    def test_without_the_parent_a_stem_is_channels_last_at_once(self, alone):
        network = make(base_channels=4)
        members = None if alone else ["subnet_1_0", "subnet_1_1"]
        owner = network.subnets["subnet_1_0"] if alone else network
        found = layouts(owner, "" if alone else "subnets.subnet_1_0", images(32), members)
        assert len(found) >= 15
        assert all(found)

    def test_members_of_large_weights_keep_the_layout_of_the_image(self, monkeypatch):
        monkeypatch.setattr(constructions, "_SMALL_WEIGHT", 0)
        found = layouts(make(base_channels=4), "subnets.subnet_1_0", images(32))
        assert not any(found)

    def test_the_parent_leaves_channels_last_where_its_own_weight_is_large(self, monkeypatch):
        # In float64 its 3x3 convs have 2,592, 10,368, ... bytes, the blocks a ninth of that.
        monkeypatch.setattr(constructions, "_SMALL_WEIGHT", 3000)
        network = make(width=3, stem="cifar_maxpool")
        found = layouts(network, "parent.layer", images(32))
        assert found[:4] == 4 * [True]  # the first layer
        assert found[4] is False
        assert layouts(network, "subnets.subnet_1_0.layer", images(32))[4] is True


class TestUse:
    """What users do with a network."""

    def test_channels_last_is_kept_and_equal(self):
        reference, network = make(base_channels=4), make(base_channels=4)
        network.to(memory_format=torch.channels_last)
        x = images().contiguous(memory_format=torch.channels_last)
        layouts = []
        for name, module in network.named_modules():
            if name.count(".") in (2, 3) and name.rpartition(".")[0].endswith("layer2"):
                module.register_forward_hook(
                    lambda _, __, output: layouts.append(
                        output.is_contiguous(memory_format=torch.channels_last)
                    )
                )
        assert_same_network(reference, network, x, None, steps=1)
        assert layouts
        assert all(layouts)

    def test_bfloat16_autocast_is_near_float32(self):
        network = make(base_channels=4).float().eval()
        x = images().float()
        expected = network(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = network(x)
            loss_of(outputs).backward()
        for name, output in outputs.items():
            assert output.dtype == torch.bfloat16
            error = (output.float() - expected[name]).abs().max()
            # bfloat16 has 8 bits: roundings of 2**-9 in each of 20 layers.
            assert 0 < error < 0.1 * expected[name].abs().max(), name
        assert {gradient.dtype for gradient in gradients(network).values()} == {torch.float32}

    @pytest.mark.filterwarnings("ignore")  # the compiler's own deprecations
    def test_it_compiles_without_graph_breaks(self):
        torch._dynamo.reset()
        members = ["parent", "subnet_0_1"]
        network = make()
        compiled = torch.compile(network, fullgraph=True, backend="eager")
        expected = make()
        outputs = compiled(images(), members=members)
        assert_all_equal(outputs, expected(images(), members=members))
        loss_of(outputs).backward()
        loss_of(expected(images(), members=members)).backward()
        assert_all_equal(gradients(network), gradients(expected))

    @pytest.mark.parametrize("what", ["whole", "members", "layers"])
    def test_activations_can_be_recomputed(self, what):
        assert_recomputed(make(), make(), what)

    @pytest.mark.filterwarnings("ignore")  # the exporter's own deprecations
    def test_a_single_subnet_is_exported(self):
        network = make().eval()
        subnet = network.subnets["subnet_0_1"]
        x = images()
        exported = torch.export.export(subnet, (x,)).module()
        assert_equal(exported(x), subnet(x), "exported")
        narrow = torch.export.export(subnet.extract(), (x,)).module()
        assert_equal(narrow(x), subnet(x), "extracted and exported")

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
    def test_a_step_is_captured_in_a_cuda_graph(self):
        network = make().cuda().train()
        x = images().cuda()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                loss_of(network(x)).backward()
        torch.cuda.current_stream().wait_stream(side)
        network.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = sum(output.square().sum() for output in network(x).values())
            captured.backward()
        graph.replay()
        replayed = {name: gradient.clone() for name, gradient in gradients(network).items()}
        network.zero_grad(set_to_none=False)
        sum(output.square().sum() for output in network(x).values()).backward()
        assert_all_equal(gradients(network), replayed)

    def test_two_processes_have_the_gradients_of_one(self, tmp_path):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", TWO_PROCESSES, str(tmp_path / "rendezvous")],
                env={**environment, "RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        said = [process.communicate(timeout=120)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
        assert all("equal" in text for text in said)


def assert_recomputed(network, expected, what):
    """Gradients are those of another network of the same weights, bit by bit."""
    x = images()
    if what == "whole":
        outputs = checkpoint(network, x, use_reentrant=False)
    else:
        wrap_members(network) if what == "members" else wrap_layers(network)
        outputs = network(x)
    loss_of(outputs).backward()
    loss_of(expected(x)).backward()
    mine = {
        name.replace("_checkpoint_wrapped_module.", ""): gradient
        for name, gradient in gradients(network).items()
    }
    for name, gradient in gradients(expected).items():
        assert torch.equal(mine[name], gradient), name


def wrap_members(network):
    network.parent = checkpoint_wrapper(network.parent)
    for name, subnet in network.subnets.items():
        network.subnets[name] = checkpoint_wrapper(subnet)


def wrap_layers(network):
    for member in (network.parent, *network.subnets.values()):
        for name in ("layer1", "layer2", "layer3", "layer4"):
            setattr(member, name, checkpoint_wrapper(getattr(member, name)))


TWO_PROCESSES = """
import os, sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from ensembles.models import SubnetResNet

rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
torch.manual_seed(0)
options = dict(width=2, base_channels=2, num_classes=3, stem="cifar")
# In evaluation mode, because BatchNorm has other statistics for half of a batch.
network = SubnetResNet(18, construction="sum_of_subnets", **options).double().eval()
alone = SubnetResNet(18, construction="sum_of_subnets", **options).double().eval()
alone.load_state_dict(network.state_dict())
images = torch.randn(4, 3, 8, 8, dtype=torch.float64)

def loss_of(outputs):
    return sum(output.square().mean() for output in outputs.values())

loss_of(alone(images)).backward()
distributed = DistributedDataParallel(network)
loss_of(distributed(images.chunk(2)[rank])).backward()
for (name, mine), expected in zip(network.named_parameters(), alone.parameters(), strict=True):
    torch.testing.assert_close(mine.grad, expected.grad, rtol=1e-9, atol=1e-9, msg=name)
print("equal")
dist.destroy_process_group()
"""


def kept_in_eval_mode(norm):
    norm.eval()
    norm.train = lambda mode=True: norm


def without_statistics(member):
    channels = member.bn1.num_features
    member.bn1 = nn.BatchNorm2d(channels, eps=0.1, track_running_stats=False).double()


def without_weight(member):
    member.bn1 = nn.BatchNorm2d(member.bn1.num_features, eps=0.1, affine=False).double()


def without_bias(member):
    # The oldest torch has no such option; all see None in place of a bias.
    member.bn1.register_parameter("bias", None)


def statistics_taken_away(member):
    member.bn1.running_mean = member.bn1.running_var = None


def wrapped(module):
    """Doubles what a module computes, as those do who replace its forward."""
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)


UNLIKE = {
    "no statistics": (without_statistics, 5),
    "statistics that stand still": (
        lambda member: setattr(member.bn1, "track_running_stats", False),
        5,
    ),
    "statistics taken away": (statistics_taken_away, 5),
    "no bias": (without_bias, 4),
    "no norm": (lambda member: setattr(member, "bn1", nn.Identity()), 4),
    "a norm in another forward": (lambda member: wrapped(member.bn1), 4),
    "a pool in another forward": (lambda member: wrapped(member.maxpool), 4),
    "a cumulative average": (lambda subnet: setattr(subnet.bn1, "momentum", None), 5),
    "no weight": (without_weight, 4),
    "another eps": (lambda subnet: setattr(subnet.bn1, "eps", 0.2), 4),
    "eval mode": (lambda subnet: kept_in_eval_mode(subnet.bn1), 4),
    "another activation": (lambda subnet: setattr(subnet, "activation", nn.GELU()), 4),
    "another pool": (lambda subnet: setattr(subnet, "maxpool", nn.MaxPool2d(2)), 4),
    "another kind of pool": (lambda subnet: setattr(subnet, "maxpool", nn.AvgPool2d(2)), 4),
    "a hook": (lambda subnet: subnet.activation.register_forward_hook(lambda *_: None), 4),
}
"""What a member may have that others have not, and how many of five share the pool then."""


def traced(network, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the tracer itself
        return torch.jit.trace(network, x, strict=False, check_trace=False)


def recorded(network, x):
    program = make_fx(lambda weights, x: functional_call(network, weights, (x,)))
    weights = dict(network.named_parameters())
    return partial(program(weights, x), weights)


class TestPooledStem:
    """Members that max-pool one product do it once, and all is as if each had done it."""

    @pytest.fixture
    def readers(self, monkeypatch):
        found = []

        def pooled_stem(product, readers):
            found.append(len(readers))
            return stems.pooled_stem(product, readers)

        monkeypatch.setattr(constructions, "pooled_stem", pooled_stem)
        return found

    @pytest.mark.parametrize("member", ["parent", "subnet_1_0"])
    @pytest.mark.parametrize(("unlike", "sharing"), UNLIKE.values(), ids=UNLIKE)
    def test_a_member_that_is_unlike_the_others_is_equal(self, readers, unlike, sharing, member):
        pair = make_both(stem="cifar_maxpool")
        for network in pair:
            unlike(network.parent if member == "parent" else network.subnets[member])
        assert_same_network(*pair, images(), None)
        in_training = readers[1:-1]
        assert in_training == [sharing] * 3

    @pytest.mark.parametrize(("unlike", "sharing"), UNLIKE.values(), ids=UNLIKE)
    def test_a_first_subnet_that_is_unlike_the_others_is_equal(self, readers, unlike, sharing):
        pair = make_both(stem="cifar_maxpool")
        for network in pair:
            unlike(network.subnets["subnet_0_0"])
        assert_same_network(*pair, images(), None, steps=1)
        # Where it may share with its like only, that is itself.
        assert readers[1] in (sharing, 1)

    @pytest.mark.parametrize("members", [None, ["subnet_0_1", "subnet_1_0", "subnet_1_1"]])
    @pytest.mark.parametrize("width", [1, 2, 3])
    def test_negative_weights_are_equal(self, readers, width, members):
        if members and width == 1:
            members = ["subnet_0_0"]
        pair = make_both(stem="cifar_maxpool", width=width)
        for network in pair:
            for member in (network.parent, *network.subnets.values()):
                with torch.no_grad():
                    member.bn1.weight[0] *= -1
        assert_same_network(*pair, images(), members)
        assert readers

    def test_a_weight_that_becomes_negative_is_noticed(self):
        reference, network = make_both(stem="cifar_maxpool")
        assert_all_equal(network(images()), reference(images()))
        for each in (reference, network):
            with torch.no_grad():
                each.subnets["subnet_1_1"].bn1.weight.neg_()
        assert_all_equal(network(images()), reference(images()))

    def test_a_member_may_be_called_by_itself_before_and_after(self):
        pair = make_both(stem="cifar_maxpool")
        for network in pair:
            subnet = network.subnets["subnet_0_1"]
            outputs = {"before": subnet(images()), **network(images()), "after": subnet(images())}
            loss_of(outputs).backward()
        assert_all_equal(gradients(pair[1]), gradients(pair[0]))
        assert_all_equal(pair[1].state_dict(), pair[0].state_dict())

    def test_members_may_have_one_norm(self):
        pair = make_both(stem="cifar_maxpool")
        for network in pair:
            one, other = network.subnets["subnet_0_0"], network.subnets["subnet_0_1"]
            network.subnets["subnet_1_0"].bn1 = other.bn1 = one.bn1
            other.activation = nn.GELU()
        assert_same_network(*pair, images(), None)

    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    def test_one_image_without_a_batch_is_refused_by_the_norms(self, train):
        network = make(stem="cifar_maxpool").train(train)
        with pytest.raises(ValueError, match="expected 4D input"):
            network(images()[0])

    def test_hooks_are_called_with_what_their_module_is_given(self):
        network = make(stem="cifar_maxpool")
        seen = []
        subnet = network.subnets["subnet_0_1"]
        for module in (subnet.bn1, subnet.activation, subnet.maxpool):
            module.register_forward_hook(lambda _, given, y: seen.append((given[0].shape, y.shape)))
        network(images())
        whole, pooled = torch.Size([4, 2, 8, 8]), torch.Size([4, 2, 4, 4])
        assert seen == [(whole, whole), (whole, whole), (whole, pooled)]

    @pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
    def test_one_pool_is_computed(self, train):
        network = make(stem="cifar_maxpool", width=3).train(train)
        pools = count("max_pool2d_with_indices", lambda: network(images()))
        norms = count("native_batch_norm", lambda: network(images()))
        assert pools == 1
        # Of every member 19 norms behind the stem; in eval mode the stem's own too.
        assert norms == 10 * 19 + (1 if train else 10)

    def test_what_is_kept_for_all_is_put_down_to_the_network(self):
        network = make(stem="cifar_maxpool")
        kept = {
            layer.name: layer.kept_bytes for layer in measure_compute_cost(network, images()).layers
        }
        assert kept[""] > 0
        assert not [name for name in kept if name.endswith("maxpool") and kept[name]]

    def test_bfloat16_autocast_is_near_float32_in_training(self):
        network = make(stem="cifar_maxpool", base_channels=4).float()
        x = images(count=32).float()
        expected = network(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = network(x)
            loss_of(outputs).backward()
        for name, output in outputs.items():
            error = (output.float() - expected[name]).abs().mean()
            assert 0 < error < 0.1 * expected[name].abs().mean(), name
        assert {gradient.dtype for gradient in gradients(network).values()} == {torch.float32}

    def test_statistics_in_half_precision_are_those_of_the_norm_itself(self):
        expected, network = (each.half() for each in make_both(stem="cifar_maxpool"))
        for each in (expected, network):
            with torch.no_grad():
                each.parent.conv1.weight *= 300  # variances above 65504, the greatest number
                each(images().half())
        for name, statistic in expected.named_buffers():
            if ".bn1." in name and "layer" not in name:
                found = network.get_buffer(name)
                assert found.isfinite().all(), name
                assert_close(found, statistic, rtol=2e-3, atol=1e-2)

    @pytest.mark.filterwarnings("ignore")  # the compiler's own deprecations
    def test_what_is_compiled_does_not_look_at_weights_and_is_equal(self, readers):
        torch._dynamo.reset()
        expected, network = make_both(stem="cifar_maxpool")
        compiled = torch.compile(network, fullgraph=True, backend="eager")
        members = ["parent", "subnet_0_1"]
        assert_all_equal(compiled(images(), members=members), expected(images(), members=members))
        assert readers == []

    # What is recorded is the same program whatever the weights are by then.
    @pytest.mark.parametrize("record", [traced, recorded], ids=["jit.trace", "make_fx"])
    def test_what_is_recorded_does_not_look_at_weights(self, record):
        network = make(stem="cifar_maxpool").eval()
        program = record(network, images())
        with torch.no_grad():
            for member in (network.parent, *network.subnets.values()):
                member.bn1.weight.neg_()
        assert_all_equal(program(images()), network(images()))

    def test_every_check_holds_of_members_that_share_a_pool(self, readers):
        subject = replace(
            wide_resnet18_with_subnets(base_channels=2),
            make=partial(SubnetResNet, 18, stem="cifar_maxpool", base_channels=2, num_classes=10),
        )
        more = {"hygiene": "clean", "determinism": "bitwise", "batch": "rows"}
        results = check_ensemble(subject.claiming(**subject.claims, **more))
        assert results.held, str(results)
        assert set(readers) == {5}

    @pytest.mark.parametrize("what", ["whole", "members", "layers"])
    def test_activations_can_be_recomputed(self, readers, what):
        network, expected = make(stem="cifar_maxpool"), make(stem="cifar_maxpool")
        assert_recomputed(network, expected, what)
        assert set(readers) == {5}


def count(operation, run):
    """How often an operation of ATen is called."""
    with torch.profiler.profile() as profiled:
        run()
    return sum(
        event.count for event in profiled.key_averages() if event.key == f"aten::{operation}"
    )
