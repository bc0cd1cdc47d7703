import copy
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from ensembles import check_ensemble
from ensembles.case import Case
from ensembles.checks.cost.claim import parse
from ensembles.checks.cost.judgement import assert_cost_equals, assert_cost_within
from ensembles.checks.cost.measurement import measure_compute_cost
from ensembles.claims import ClaimError
from ensembles.models import resnet18, subnet_resnet18
from ensembles.subject import Subject


def cost_of(model, *shape, **options):
    return measure_compute_cost(model, torch.randn(*shape), **options)


before_2_7 = pytest.mark.skipif(
    torch.__version__ < "2.7",
    reason="torch 2.6 keeps other copies of weights",
)


class Masked(nn.Module):
    """A layer of which a mask leaves the first inputs and outputs, at the price of all."""

    def __init__(self, inputs: int, outputs: int, live_inputs: int, live_outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)
        mask = torch.zeros(outputs, inputs)
        mask[:live_outputs, :live_inputs] = 1
        self.register_buffer("mask", mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.layer.weight * self.mask, self.layer.bias)


# --- within its budgets -------------------------------------------------------------------------


def test_a_linear_layer_costs_what_its_shapes_say():
    # 5 samples, 7 to 3 units: 5 * 7 * 3 multiply-adds forward, and as many for the weight's
    # gradient; the batch needs none. Kept is the batch, 5 * 7 floats.
    cost = cost_of(nn.Linear(7, 3), 5, 7)
    assert_cost_equals(
        cost, forward=210, backward=210, parameters=24, buffers=0, kept_bytes=140, wasted=0
    )
    assert_cost_within(cost, flops=420, parameters=24, kept_bytes=140, wasted=0)


def test_a_mask_is_waste(golden):
    model = nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), Masked(8, 4, 4, 2), nn.Tanh(), nn.Linear(4, 3)
    )
    with pytest.raises(AssertionError) as broken:
        assert_cost_within(cost_of(model, 2, 6), wasted=0)
    golden(str(broken.value), "messages/cost_wasted.txt")


def test_more_flops_than_claimed_are_broken(golden):
    members = [nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2)]
    cost = measure_compute_cost(members, torch.randn(4, 6))
    with pytest.raises(AssertionError) as broken:
        assert_cost_within(cost, flops=1000, parameters=100)
    golden(str(broken.value), "messages/cost_flops.txt")


def test_a_tie_that_is_a_copy_is_broken(golden):
    tied = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False))
    tied[1].weight = tied[0].weight
    batch = torch.arange(3)
    assert_cost_within(measure_compute_cost(tied, batch), parameters=32)
    tied[1].weight = nn.Parameter(tied[0].weight.detach().clone())
    with pytest.raises(AssertionError) as broken:
        assert_cost_within(measure_compute_cost(tied, batch), parameters=32)
    golden(str(broken.value), "messages/cost_parameters.txt")


def test_more_bytes_kept_than_claimed_are_broken(golden):
    model = nn.Sequential(nn.Linear(8, 8), Masked(8, 8, 4, 4))
    with pytest.raises(AssertionError) as broken:
        assert_cost_within(cost_of(model, 2, 8), kept_bytes=128)
    golden(str(broken.value), "messages/cost_kept.txt")


def test_costing_less_than_claimed_is_not_equal(golden):
    with pytest.raises(AssertionError) as broken:
        assert_cost_equals(cost_of(nn.Linear(7, 3), 5, 7), forward=420, buffers=0)
    golden(str(broken.value), "messages/cost_less.txt")


# --- findings are data --------------------------------------------------------------------------


def test_every_budget_that_is_exceeded_is_found_with_its_layers():
    model = nn.Sequential(nn.Linear(7, 3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(AssertionError) as broken:
        assert_cost_within(cost_of(model, 5, 7), flops=500, parameters=40, kept_bytes=0, wasted=0)
    found = broken.value.findings
    assert found.kinds == ("more FLOPs", "more bytes kept")
    # 5 samples, 7 * 3 and 3 * 2 products forward; backward the batch needs no gradient.
    assert [(item.place, item.amount) for item in found.of_kind("more FLOPs")] == [
        ("in all", 2 * 5 * (2 * 21 + 3 * 6)),
        ("0", 420),
        ("2", 180),
    ]
    assert found.of_kind("more FLOPs")[0].expected == "at most 500 FLOPs"
    # The batch, and what the activation yields: it is kept once.
    assert [item.amount for item in found.of_kind("more bytes kept")] == [200, 140, 60]
    assert [str(count) for count in found.affected] == ["2 of 3 layers"]


def test_zeros_that_could_not_be_looked_for_are_told():
    class Pair(nn.Bilinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x, x)

    subject = Subject(
        make=lambda: nn.Sequential(nn.Linear(2, 2), Pair(2, 2, 3)),
        batch=lambda: torch.randn(1, 2),
        claims={"cost": {"wasted": 0}},
    )
    assert "(looked at 1 of 2 kinds of product)" in check_ensemble(subject)["cost"].found


# --- each by hand -------------------------------------------------------------------------------


def test_a_grouped_convolution_is_counted_by_group():
    # 2 images of 5 x 5 positions, 6 outputs that each read 4/2 channels through 3 x 3 taps; the
    # backward pass makes the weight's gradient from the same pairs, and no image's.
    products = 2 * 25 * 6 * 2 * 9
    grouped = nn.Conv2d(4, 6, 3, padding=1, groups=2)
    assert_cost_equals(
        cost_of(grouped, 2, 4, 5, 5), forward=2 * products, backward=2 * products, wasted=0
    )
    # Behind another layer the images need a gradient too: once more. In the common counter the
    # weight's gradient takes part `groups` times.
    first = nn.Conv2d(4, 4, 1)
    cost = cost_of(nn.Sequential(first, grouped), 2, 4, 5, 5)
    assert cost.layer("1").backward == 4 * products
    transposed = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
    cost = cost_of(nn.Sequential(first, transposed), 2, 4, 5, 5)
    # Every one of 25 positions of 4 channels meets 3 outputs through 3 x 3 taps.
    assert (cost.layer("1").forward, cost.layer("1").backward) == (10800 * 1, 21600)
    assert cost.wasted == 0


class Stacked(nn.Module):
    """Members whose parameters are stacked, called all at once."""

    def __init__(self, members: int, member: nn.Module) -> None:
        super().__init__()
        self.template = [copy.deepcopy(member).to("meta")]  # not a submodule
        self.names = [name for name, _ in member.named_parameters()]
        self.stacked = nn.ParameterList(
            [torch.stack([p.detach()] * members) for p in member.parameters()]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def one(*tensors: torch.Tensor) -> torch.Tensor:
            named = dict(zip(self.names, tensors, strict=True))
            return functional_call(self.template[0], named, (x,))

        return vmap(one)(*self.stacked)


def test_vmap_over_stacked_members_costs_as_much_as_the_members():
    # It runs as convolutions of several groups and as batched products.
    member = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(2, 5)
    )
    # 2 images of 5 x 5: 9 positions of 3 x 3 x 3 x 4, 1 position of 3 x 3 x 4 x 2, and 2 x 5.
    forward = 2 * 2 * (9 * 108 + 72 + 10)
    # Twice that without the gradient of the image.
    backward = 2 * 2 * (9 * 108 + 2 * 72 + 2 * 10)
    alone = cost_of(member, 2, 3, 5, 5)
    assert_cost_equals(alone, forward=forward, backward=backward, wasted=0)
    together = cost_of(Stacked(3, member), 2, 3, 5, 5)
    assert_cost_equals(
        together,
        forward=3 * forward,
        backward=3 * backward,
        parameters=3 * alone.parameters,
        wasted=0,
    )


def test_a_layer_that_is_called_twice_costs_twice_and_is_stored_once():
    layer = nn.Linear(4, 4)
    cost = cost_of(nn.Sequential(layer, nn.ReLU(), layer), 3, 4)
    product = 2 * 3 * 4 * 4
    # The second call's input needs a gradient; the first call's is the batch.
    assert_cost_equals(cost, forward=2 * product, backward=3 * product, parameters=20, wasted=0)
    (operation,) = cost.layer("0").operations
    assert operation.flops == cost.flops


def test_views_of_one_memory_are_stored_once():
    model = nn.Module()
    memory = torch.zeros(6, 4)
    model.whole, model.rows = nn.Parameter(memory), nn.Parameter(memory[2:4])
    model.register_buffer("other", torch.zeros(5))
    model.register_buffer("again", model.other)
    model.forward = lambda x: x @ model.whole.T
    cost = measure_compute_cost(model, torch.randn(1, 4))
    assert (cost.parameters, cost.buffers) == (24, 5)


class Attention(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.scale, self.causal = nn.Parameter(torch.ones(4)), causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x * self.scale, x, x, is_causal=self.causal)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_is_two_products(device):
    # 2 samples, 3 heads, 5 queries and 5 keys of 4 numbers: scores, and their product with values.
    x = torch.randn(2, 3, 5, 4, device=device)
    cost = measure_compute_cost(Attention(False).to(device), x)
    one = 2 * 2 * 3 * 5 * 5 * 4
    assert cost.forward == 2 * one
    # Of query, key and value only the query needs a gradient: the plain kernels make that of the
    # probabilities, and of the query. The fused one makes all, and the scores again.
    fused = "attention" in cost.layers[0].operations[0].name
    assert cost.backward == (5 if fused else 2) * one
    assert cost.wasted == (None if device == "meta" else 0)


def test_what_a_causal_mask_hides_is_waste():
    cost = cost_of(Attention(True), 2, 3, 5, 4, training=False)
    # 10 of 25 probabilities are zero, and meet 4 numbers of a value each.
    assert cost.wasted_flops == 2 * 2 * 3 * 10 * 4


def test_recurrent_layers_use_every_weight_at_every_step():
    # 4 steps of 2 sequences; 4 gates of 3 units read 5 inputs and 3 states.
    model = nn.LSTM(5, 3)
    cost = measure_compute_cost(model, torch.randn(4, 2, 5), outputs=lambda y: [y[0]])
    assert cost.forward == 2 * 4 * 2 * (4 * 3 * (5 + 3))
    assert cost.parameters == 4 * 3 * (5 + 3 + 2)


def test_recomputed_activations_are_paid_in_the_backward_pass():
    class Again(nn.Module):
        def __init__(self, again: bool) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.again = again

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            def block(x: torch.Tensor) -> torch.Tensor:
                return self.second(torch.tanh(self.first(x)))

            return checkpoint(block, x, use_reentrant=False) if self.again else block(x)

    product = 2 * 3 * 4 * 4
    plain, again = cost_of(Again(False), 3, 4), cost_of(Again(True), 3, 4)
    assert (plain.forward, plain.backward) == (2 * product, 3 * product)
    # The first layer is computed again; the second only as far as its input is needed.
    assert (again.forward, again.backward) == (2 * product, 4 * product)
    assert again.layer("first").backward == 2 * product
    assert again.kept_bytes < plain.kept_bytes
    assert again.kept_bytes == 3 * 4 * 4  # the batch


def test_a_dense_network_wastes_nothing():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(),
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(6),
        nn.Linear(6, 3),
    )
    nn.init.zeros_(model[0].weight)  # what training moves at once is no structure
    cost = cost_of(model, 4, 3, 8, 8)
    assert (cost.wasted, cost.wasted_kept) == (0, 0)


def test_gradients_of_outputs_that_nobody_reads_are_waste():
    class First(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)[:1]

    # All 4 rows are computed and used as far as anybody knows; 3 of 4 gradients are zero.
    cost = cost_of(First(5, 2), 4, 5)
    assert (cost.forward, cost.backward, cost.wasted_flops) == (80, 80, 60)


# --- figures of others --------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "products"), [(1, 140_186_624), (2, 557_197_312)])
def test_the_products_of_resnet18_are_the_known_ones(width, products):
    with torch.device("meta"):
        model = resnet18(num_classes=10, stem="cifar_maxpool", width=width)
    cost = measure_compute_cost(model, torch.empty(1, 3, 32, 32, device="meta"), training=False)
    assert cost.forward == 2 * products
    assert cost.parameters == {1: 11_173_962, 2: 44_662_922}[width]


@pytest.mark.parametrize(
    "name",
    [
        "alexnet",
        "convnext_tiny",
        "densenet121",
        "efficientnet_b0",
        "mnasnet1_0",
        "mobilenet_v2",
        "mobilenet_v3_large",
        "resnet18",
        "resnet50",
        "resnext50_32x4d",
        "shufflenet_v2_x1_0",
        "squeezenet1_0",
        "vgg11",
        "vit_b_16",
        "wide_resnet50_2",
    ],
)
def test_torchvision_publishes_the_same_figures(name):
    models = pytest.importorskip("torchvision.models")
    weights = models.get_model_weights(name).DEFAULT
    with torch.device("meta"):
        model = models.get_model(name, weights=None)
    side = weights.transforms.keywords["crop_size"]
    batch = torch.empty(1, 3, side, side, device="meta")
    cost = measure_compute_cost(model, batch, training=False)
    # Billions of multiply-adds, rounded to three places.
    assert round(cost.forward / 2e9, 3) == weights.meta["_ops"]
    assert cost.parameters == weights.meta["num_params"]
    assert (cost.backward, cost.kept_bytes, cost.wasted) == (0, 0, None)


# --- a parent and its subnets -------------------------------------------------------------------


def subnets(construction: str) -> nn.Module:
    return subnet_resnet18(
        width=2, base_channels=4, num_classes=10, stem="cifar", construction=construction
    )


def only_one():
    return {"x": torch.randn(2, 3, 8, 8), "members": ["subnet_0_1"]}


# 2 images; convs of 3 x 3 taps at ordinary width: layer1 has four of 4 to 4 channels at 8 x 8, and
# every further layer halves the sides and doubles the channels. Without stem and classifier:
LAYER1 = 4 * (2 * 64 * 9 * 4 * 4)
FURTHER = 3 * (2 * 64 * 9 * 4 * 4) + (2 * 16 * 9 * 4 * 8) + (2 * 16 * 4 * 8)
NARROW = 2 * (LAYER1 + 3 * FURTHER)
STEM = 2 * (2 * 64 * 9 * 3 * 4)
HEAD = 2 * (2 * 32 * 10)


@before_2_7
def test_a_zero_padded_subnet_wastes_three_quarters_of_every_conv():
    cost = measure_compute_cost(subnets("zero_padded"), only_one())
    # The stem writes twice the channels, every other conv reads and writes twice as many; the
    # classifier is narrow. Backward: the image needs no gradient.
    assert cost.forward == 2 * STEM + 4 * NARROW + HEAD
    assert cost.backward == 2 * STEM + 2 * (4 * NARROW + HEAD)
    assert cost.wasted_flops == 2 * STEM + 3 * 3 * NARROW
    for layer in cost.layers:
        for operation in layer.operations:
            expected = {
                "subnets.subnet_0_1": Fraction(1, 2),
                "subnets.subnet_0_1.fc": Fraction(0),
            }.get(layer.name, Fraction(3, 4))
            assert Fraction(operation.wasted_flops, operation.flops) == expected, layer.name
    # Kept for the backward pass are masked weights, and masks: a number for every pair of channels.
    weights = [p for p in subnets("zero_padded").parent.parameters() if p.ndim == 4]
    assert cost.kept_weight_bytes == 4 * sum(w.numel() + w[:, :, 0, 0].numel() for w in weights)
    assert cost.wasted_kept > Fraction(1, 2)


def test_an_extracted_network_and_a_subnet_without_zeros_cost_the_same():
    model = subnets("sum_of_subnets")
    cost = measure_compute_cost(model, only_one())
    narrow = cost_of(model.subnets["subnet_0_1"].extract(), 2, 3, 8, 8)
    for found in (cost, narrow):
        assert_cost_equals(
            found,
            forward=STEM + NARROW + HEAD,
            backward=STEM + 2 * (NARROW + HEAD),
            wasted=0,
        )
        assert (found.kept_weight_bytes, found.kept_zero_bytes) == (0, 0)


def test_all_members_without_zeros_cost_two_parents():
    model = subnets("sum_of_subnets")
    cost = cost_of(model, 2, 3, 8, 8)
    # The parent's stem serves all; its other convs are computed once whole, and once in blocks;
    # the parent's classifier reads twice the channels, and there are four narrow ones.
    assert cost.forward == 2 * STEM + 2 * 4 * NARROW + (2 + 4) * HEAD
    assert cost.wasted == 0
    padded = cost_of(subnets("zero_padded"), 2, 3, 8, 8)
    assert padded.forward == (1 + 4) * (2 * STEM + 4 * NARROW) + (2 + 4) * HEAD


def test_the_table_of_resnet18_is_the_recorded_one(golden):
    cost = cost_of(resnet18(num_classes=10, stem="cifar", base_channels=8), 2, 3, 32, 32)
    golden(f"{cost.table()}\n", "cost/resnet18.txt")


def test_the_table_of_a_wide_parent_is_the_recorded_one(golden):
    model = resnet18(num_classes=10, stem="cifar", base_channels=8, width=2)
    golden(f"{cost_of(model, 2, 3, 32, 32).table()}\n", "cost/resnet18_width2.txt")


def test_the_cost_of_a_zero_padded_subnet_is_the_recorded_one(golden):
    cost = measure_compute_cost(subnets("zero_padded"), only_one())
    golden(f"{cost}\n\n{cost.table()}\n", "cost/zero_padded_subnet.txt")


# --- nothing is changed -------------------------------------------------------------------------


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    model.eval()
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones(2, 4)
    before = copy.deepcopy(model.state_dict())
    generator = torch.get_rng_state()
    batch = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    one = measure_compute_cost(model, batch)
    assert torch.equal(torch.get_rng_state(), generator)
    assert {k: torch.equal(v, before[k]) for k, v in model.state_dict().items()} == dict.fromkeys(
        before, True
    )
    assert not any(module.training for module in model.modules())
    assert [p.requires_grad for p in model[0].parameters()] == [False, True]
    assert torch.equal(model[3].weight.grad, torch.ones(2, 4))
    assert not model[0]._forward_hooks
    assert measure_compute_cost(model, batch) == one


class Hidden(nn.Module):
    """A layer that nothing lists, and an operation on the batch in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.others = nn.Linear(3, 3), [nn.BatchNorm1d(3)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.others[0](x.mul_(2)))


def test_a_batch_that_is_written_to_and_a_layer_that_nothing_lists_are_as_before():
    case = Case.of(Hidden(), torch.randn(4, 3))
    assert case.batch is not None  # made
    before = case.digest()
    measure_compute_cost(case)
    assert case.is_as(before)


def test_a_function_of_the_users_may_have_a_variable():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.variable = 2
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            return ctx.variable * gradient

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Twice.apply(super().forward(x))

    cost = cost_of(Doubled(7, 3), 5, 7)
    assert (cost.forward, cost.backward) == (210, 210)


def test_a_frozen_weight_has_no_gradient_to_pay_for():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    cost = cost_of(model, 3, 4)
    assert (cost.layer("0").backward, cost.layer("1").backward) == (0, 2 * 3 * 4 * 2)
    assert cost.wasted == 0


# --- wrong use ----------------------------------------------------------------------------------


def test_no_budget_is_an_error():
    cost = cost_of(nn.Linear(2, 2), 1, 2)
    with pytest.raises(ValueError, match="no budget was given"):
        assert_cost_within(cost)
    with pytest.raises(ValueError, match="no budget was given"):
        assert_cost_equals(cost)


@pytest.mark.parametrize("budget", [{"flops": 1.5}, {"flops": -1}, {"wasted": 75}, {"flops": "4"}])
def test_what_is_no_budget_is_refused(budget):
    with pytest.raises(ValueError, match="is no budget"):
        assert_cost_within(cost_of(nn.Linear(2, 2), 1, 2), **budget)


def test_a_budget_of_what_was_not_looked_at_is_an_error():
    meta = measure_compute_cost(nn.Linear(2, 2, device="meta"), torch.empty(1, 2, device="meta"))
    assert meta.flops == 16
    assert "zeros were not looked for" in str(meta)
    with pytest.raises(ValueError, match="no numbers on the meta device"):
        assert_cost_within(meta, wasted=0)
    prediction = cost_of(nn.Linear(2, 2), 1, 2, training=False)
    with pytest.raises(ValueError, match="a prediction keeps nothing"):
        assert_cost_within(prediction, kept_bytes=0)


def test_an_operation_without_formula_is_named():
    class Pair(nn.Bilinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x, x)

    cost = cost_of(Pair(2, 2, 3), 1, 2)
    assert cost.uncounted == ("_trilinear",)
    assert "for want of a formula: _trilinear" in str(cost)
    with pytest.raises(ValueError, match="no formula for the FLOPs of _trilinear"):
        assert_cost_within(cost, flops=100)


def test_a_model_that_cannot_be_called_is_an_error():
    with pytest.raises(ValueError, match=r"calling the model \(Linear\) on the batch"):
        cost_of(nn.Linear(2, 2), 1, 3)


def test_a_lazy_model_is_an_error():
    with pytest.raises(ValueError, match="is lazy and has no shape yet"):
        cost_of(nn.LazyLinear(2), 1, 2)


def test_an_output_without_a_tensor_is_an_error():
    class Length(nn.Linear):
        def forward(self, x: torch.Tensor) -> int:
            return len(x)

    with pytest.raises(ValueError, match="holds no floating-point tensor"):
        cost_of(Length(2, 2), 1, 2)


def test_a_model_that_does_nothing_is_an_error():
    with pytest.raises(ValueError, match="there is no cost to measure"):
        cost_of(nn.Identity(), 1, 2)


def test_a_re_entrant_checkpoint_is_an_error():
    class Again(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(super().forward, x.requires_grad_(), use_reentrant=True)

    with pytest.raises(ValueError, match="use_reentrant=False"):
        cost_of(Again(2, 2), 1, 2)


def test_an_unknown_layer_is_an_error():
    with pytest.raises(KeyError, match="no layer 'head'"):
        cost_of(nn.Linear(2, 2), 1, 2).layer("head")


# --- the fixture and the claim ------------------------------------------------------------------


def claiming(**budgets):
    return Subject(
        make=lambda: nn.Linear(7, 3), batch=lambda: torch.randn(5, 7), claims={"cost": budgets}
    )


def test_budgets_can_be_claimed():
    assert check_ensemble(claiming(flops=420, wasted=0)).held
    (broken,) = [r for r in check_ensemble(claiming(flops=419)) if r.status == "broken"]
    assert broken.check == "cost"


@pytest.mark.parametrize("claim", [{"flop": 1}, {}, "cheap"])
def test_a_claim_that_is_no_dict_of_budgets_is_an_error(claim):
    with pytest.raises(ClaimError, match=r"cost cannot be claimed to be .* a dict of budgets"):
        check_ensemble(claiming().claiming(cost=claim))


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ({"flops": 1.5}, r"flops=1\.5 is no budget: it is a whole number"),
        ({"wasted": 75}, r"wasted=75 is no budget: it is a share from 0 to 1"),
        ({"kept_bytes": True}, "kept_bytes=True is no budget"),
        ({"flops": 1, "exact": 3}, "cost cannot be claimed to be"),
        ({"training": False}, "cost cannot be claimed to be"),
    ],
)
def test_a_budget_that_is_no_number_is_told_before_a_model_is_made(claim, said):
    with pytest.raises(ClaimError, match=said):
        parse(claim)
    assert parse({"wasted": 1, "flops": 0}).budgets == {"wasted": 1, "flops": 0}


def test_exact_costs_and_those_of_a_prediction_can_be_claimed():
    assert check_ensemble(claiming(flops=210, training=False)).held
    assert check_ensemble(claiming(flops=420, backward=210, exact=True)).held
    assert not check_ensemble(claiming(flops=421, exact=True)).held


def test_the_fixture_measures_and_asserts(compute_cost):
    model, batch = nn.Linear(7, 3), torch.randn(5, 7)
    assert compute_cost.measure(model, batch).flops == 420
    compute_cost.assert_within(model, batch, flops=420)
    compute_cost.assert_exactly(model, batch, training=False, flops=210)
    with pytest.raises(AssertionError, match="claimed to take at most 419 FLOPs, but takes 420"):
        compute_cost.assert_within(model, batch, flops=419)
    with pytest.raises(AssertionError, match="claimed to take 421 FLOPs, but takes 420"):
        compute_cost.assert_exactly(model, batch, flops=421)
