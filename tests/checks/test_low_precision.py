"""Both sides of every check that compares numbers, in each dtype, for small and large outputs.

Healthy subjects hold and faulty ones break in float64, float32, float16 and bfloat16 alike: what
dtypes can tell is one rule, `ensembles.tolerance`.
"""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear, nll_loss, one_hot

from ensembles import (
    assert_loss_scaled,
    assert_metric_of_prediction,
    assert_ownership,
    assert_prediction_reduced,
    assert_rates_effective,
    assert_round_trips_kept,
    assert_rows_independent,
    assert_trajectories_equal,
    measure_batch_independence,
    measure_loss_scale,
    measure_ownership_map,
    measure_prediction_reduction,
    measure_round_trips,
    measure_training_trajectory,
)
from ensembles.probes.owned import reach_of

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SIZES = [1e-4, 1.0, 1e3]
LABELS = torch.arange(8) % 5

in_every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
of_every_size = pytest.mark.parametrize("size", SIZES, ids=["small", "one", "large"])


class Sized(nn.Module):
    """A network whose outputs are about as large as is said."""

    def __init__(self, network, size, after=None):
        super().__init__()
        self.network, self.size, self.after = network, size, after or nn.Identity()

    def forward(self, x):
        y = self.network(x)
        return self.after(self.size * y)


def mlp(first=nn.Linear):
    return nn.Sequential(first(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 5))


def batch(dtype, *shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, *(shape or (12,)), generator=generator).to(dtype)


def several(dtype, size=1.0, after=None, count=3, network=mlp):
    torch.manual_seed(0)
    return [Sized(network(), size, after).to(dtype) for _ in range(count)]


# --- round trips ----------------------------------------------------------------------------------

CONVERSIONS = ["deepcopy", "state_dict", "half", "double", "channels_last", "functional_call"]
CONVERSIONS += ["vmap", "averaged_model", "export"]


class Masked(nn.Linear):
    """No state dict holds the mask."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.mask = torch.rand(sizes[1], sizes[0]) > 0.1

    def forward(self, x):
        return linear(x, self.weight * self.mask, self.bias)


class Patched(nn.Module):
    """A copy computes with the weights of its original."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 5)
        weight, bias = self.layer.weight, self.layer.bias
        self.layer.forward = lambda x: linear(x, weight, bias)

    def forward(self, x):
        return self.layer(x)


def cnn():
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def kept(make, x, conversions=CONVERSIONS):
    assert_round_trips_kept(measure_round_trips(make, x, conversions=conversions))


@in_every_dtype
@of_every_size
def test_conversions_keep_a_healthy_network(dtype, size):
    kept(lambda: Sized(mlp(), size).to(dtype), batch(dtype))


@in_every_dtype
def test_conversions_keep_a_healthy_convolutional_network(dtype):
    kept(lambda: cnn().to(dtype), batch(dtype, 3, 12, 12))


@in_every_dtype
def test_vmap_keeps_a_wide_layer(dtype):
    kept(lambda: nn.Linear(4096, 8).to(dtype), batch(dtype, 4096), ["vmap", "functional_call"])


@in_every_dtype
def test_vmap_keeps_what_amplifies_roundings(dtype):
    def make():
        layers = [(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU()) for _ in range(12)]
        return nn.Sequential(*(layer for group in layers for layer in group)).to(dtype)

    kept(make, batch(dtype, 64), ["vmap"])


@in_every_dtype
@of_every_size
def test_a_mask_that_is_not_saved_is_found(dtype, size):
    with pytest.raises(AssertionError, match=r"state_dict   function: outputs differ by"):
        kept(lambda: Sized(mlp(Masked), size).to(dtype), batch(dtype), ["state_dict"])


@in_every_dtype
@pytest.mark.parametrize("conversion", ["deepcopy", "vmap"])
def test_a_copy_that_computes_with_the_original_is_found(dtype, conversion):
    with pytest.raises(AssertionError, match="computes with other weights than it registers"):
        kept(lambda: Patched().to(dtype), batch(dtype), [conversion])


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_that_casts_its_outputs_back_is_seen(cast):
    class Autocast(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))

        def forward(self, x):
            with torch.autocast("cpu", cast):
                y = self.network(x)
            return y.float()

    kept(Autocast, batch(torch.float32, 64), ["vmap"])


# --- probabilities that are taken for logits ------------------------------------------------------


def of_logits(outputs, labels=LABELS):
    return sum(cross_entropy(y, labels) for y in outputs.values())


def of_probabilities(outputs, labels=LABELS):
    return sum(nll_loss(y.log(), labels) for y in outputs.values())


@in_every_dtype
@of_every_size
def test_a_cross_entropy_of_logits_holds(dtype, size):
    members = several(dtype, size)
    assert_loss_scaled(measure_loss_scale(members, batch(dtype), of_logits), "sum")


@in_every_dtype
@pytest.mark.parametrize(("classes", "size"), [(2, 1.0), (5, 1e-4), (5, 1.0), (20_000, 1.0)])
def test_a_softmax_of_a_softmax_is_found(dtype, classes, size):
    members = several(dtype, size, nn.Softmax(1), network=lambda: nn.Linear(12, classes))
    labels = torch.arange(8) % classes
    scale = partial(measure_loss_scale, members, batch(dtype))
    twice = partial(of_logits, labels=labels)
    with pytest.raises(AssertionError, match="which are probabilities, and takes them for logits"):
        assert_loss_scaled(scale(twice, member_loss=lambda y: cross_entropy(y, labels)), "sum")
    once = partial(of_probabilities, labels=labels)
    assert_loss_scaled(scale(once, member_loss=lambda y: nll_loss(y.log(), labels)), "sum")


@in_every_dtype
def test_a_brier_score_of_two_probabilities_is_no_softmax(dtype):
    labels = torch.arange(8) % 2

    def own(y):
        return (y - one_hot(labels, 2)).square().sum(1).mean()

    members = several(dtype, 1.0, nn.Softmax(1), network=lambda: nn.Linear(12, 2))
    scale = measure_loss_scale(
        members, batch(dtype), lambda ys: sum(map(own, ys.values())), member_loss=own
    )
    assert_loss_scaled(scale, "sum")


@in_every_dtype
@pytest.mark.parametrize("way", ["clamped", "weighted"])
def test_how_a_loss_takes_probabilities_hides_no_second_softmax(dtype, way):
    weight = torch.linspace(1, 2, 5).to(dtype)  # which takes no other dtype

    def own(y):
        if way == "clamped":
            return cross_entropy(y.clamp(0, 1), LABELS)
        return cross_entropy(y, LABELS, weight=weight)

    members = several(dtype, 1.0, nn.Softmax(1))
    scale = measure_loss_scale(
        members, batch(dtype), lambda ys: sum(map(own, ys.values())), member_loss=own
    )
    with pytest.raises(AssertionError, match="which are probabilities, and takes them for logits"):
        assert_loss_scaled(scale, "sum")


# --- loss scale -----------------------------------------------------------------------------------


@in_every_dtype
@of_every_size
@pytest.mark.parametrize("count", [2, 3, 7])
def test_a_mean_is_told_from_a_sum(dtype, size, count):
    def mean(outputs):
        return of_logits(outputs) / len(outputs)

    scale = measure_loss_scale(several(dtype, size, count=count), batch(dtype), mean)
    assert_loss_scaled(scale, "mean")
    with pytest.raises(AssertionError, match="and train on their mean"):
        assert_loss_scaled(scale, "sum")


@in_every_dtype
@of_every_size
def test_a_loss_of_the_mean_prediction_couples_members(dtype, size):
    def loss(outputs):
        return cross_entropy(torch.stack([*outputs.values()]).mean(0), LABELS)

    scale = measure_loss_scale(several(dtype, size), batch(dtype), loss)
    assert_loss_scaled(scale, "joint")
    with pytest.raises(AssertionError, match="and the loss couples them"):
        assert_loss_scaled(scale, "sum")


@in_every_dtype
def test_weights_of_members_are_known_as_well_as_the_dtype_allows(dtype):
    weights = [0.3, 0.45, 0.25]

    def loss(outputs):
        return sum(
            w * cross_entropy(y, LABELS) for w, y in zip(weights, outputs.values(), strict=True)
        )

    scale = measure_loss_scale(
        several(dtype),
        batch(dtype),
        loss,
        member_loss=lambda y: cross_entropy(y, LABELS),
        optimizer=lambda m: [torch.optim.SGD(one.parameters(), 0.1) for one in m],
    )
    assert_loss_scaled(scale, weights)
    with pytest.raises(AssertionError, match="and train on other multiples"):
        assert_loss_scaled(scale, [0.31, 0.44, 0.25])
    for member, weight in zip(scale.members, weights, strict=True):
        (rate,) = member.rates
        assert rate.effective is not None
        assert rate.effective[0] == pytest.approx(0.1 * weight, rel=0.02)


@in_every_dtype
def test_effective_rates_are_those_of_the_mean(dtype):
    def mean(outputs):
        return of_logits(outputs) / len(outputs)

    scale = measure_loss_scale(
        several(dtype),
        batch(dtype),
        mean,
        optimizer=lambda m: [torch.optim.SGD(one.parameters(), 0.3) for one in m],
    )
    assert_rates_effective(scale, lr=0.1)
    with pytest.raises(AssertionError, match=r"expected lr 0\.11"):
        assert_rates_effective(scale, lr=0.11)


@in_every_dtype
def test_clipping_by_one_norm_couples_members(dtype):
    def joint(members):
        nn.utils.clip_grad_norm_([p for m in members for p in m.parameters()], 0.01)

    def each(members):
        for member in members:
            nn.utils.clip_grad_norm_(member.parameters(), 0.01)

    measured = partial(measure_loss_scale, several(dtype), batch(dtype), of_logits)
    assert_loss_scaled(measured(clip=each), "sum")
    with pytest.raises(AssertionError, match="and one norm couples them"):
        assert_loss_scaled(measured(clip=joint), "sum")


# --- prediction -----------------------------------------------------------------------------------


def arithmetic(members, x):
    return torch.stack([member(x).softmax(1) for member in members]).mean(0)


def geometric(members, x):
    return torch.stack([member(x).log_softmax(1) for member in members]).mean(0).softmax(1)


def summed(members, x):
    return sum(member(x).softmax(1) for member in members) / len(members)


def nll(members, x, labels):
    return nll_loss(arithmetic(members, x).log(), labels)


def mean_of_nll(members, x, labels):
    return torch.stack([cross_entropy(member(x), labels) for member in members]).mean()


@in_every_dtype
@of_every_size
@pytest.mark.parametrize("count", [2, 8])
def test_arithmetic_and_geometric_means_are_told_apart(dtype, size, count):
    members, x = several(dtype, size, count=count), batch(dtype)
    for predict, reduction, other in (
        (arithmetic, "arithmetic", "geometric"),
        (summed, "arithmetic", "geometric"),
        (geometric, "geometric", "arithmetic"),
    ):
        measured = measure_prediction_reduction(members, x, predict)
        assert_prediction_reduced(measured, reduction)
        with pytest.raises(AssertionError, match=f"found the {reduction} mean"):
            assert_prediction_reduced(measured, other)


@in_every_dtype
def test_the_metric_of_the_prediction_is_told_from_the_mean_of_metrics(dtype):
    measured = partial(measure_prediction_reduction, several(dtype), batch(dtype), arithmetic)
    assert_metric_of_prediction(measured(evaluate=nll), "nll")
    with pytest.raises(AssertionError, match="found the mean of the members' nll"):
        assert_metric_of_prediction(measured(evaluate=mean_of_nll), "nll")


# --- trajectories ---------------------------------------------------------------------------------


class Halves(nn.Linear):
    """The same sums in another order."""

    def forward(self, x):
        half = self.in_features // 2
        first, second = (
            linear(x[:, s], self.weight[:, s]) for s in (slice(half), slice(half, None))
        )
        return first + second + self.bias


def trajectory(dtype, size, first=nn.Linear, lr=0.1):
    return measure_training_trajectory(
        lambda: Sized(mlp(first), size).to(dtype),
        batch(dtype),
        optimizer=lambda m: torch.optim.SGD(m.parameters(), lr, momentum=0.9),
        loss=of_logits,
        seed=0,
        values=True,
    )


@in_every_dtype
@of_every_size
def test_a_run_with_sums_in_another_order_is_the_same_run(dtype, size):
    lr = 0.1 / size
    run, reordered = trajectory(dtype, size, lr=lr), trajectory(dtype, size, Halves, lr=lr)
    with pytest.raises(AssertionError, match="claimed equal bit by bit, and part at step 1"):
        assert_trajectories_equal(run, reordered)
    assert_trajectories_equal(run, reordered, tolerance="recomputed")
    other = trajectory(dtype, size, lr=2 * lr)
    with pytest.raises(AssertionError, match="and part at step"):
        assert_trajectories_equal(run, other, tolerance="recomputed")


# --- rows -----------------------------------------------------------------------------------------


class OverRows(nn.Module):
    """A norm over the batch."""

    def forward(self, x):
        return x - x.mean(0)


class Placed(nn.Module):
    """A table of positions that is added along the batch."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.linspace(-1, 1, 8)[:, None].repeat(1, 5))

    def forward(self, y):
        return y + y.abs().amax().detach() * self.table[: len(y)]


@in_every_dtype
@of_every_size
def test_rows_of_a_healthy_network_are_independent(dtype, size):
    for network, shape in ((mlp, (12,)), (cnn, (3, 12, 12))):
        model = Sized(network(), size).to(dtype)
        assert_rows_independent(measure_batch_independence(model, batch(dtype, *shape)))


@in_every_dtype
@of_every_size
def test_rows_that_reach_each_other_are_found(dtype, size):
    model = Sized(mlp(), size, OverRows()).to(dtype)
    with pytest.raises(AssertionError, match="and reach each other"):
        assert_rows_independent(measure_batch_independence(model, batch(dtype)))


# --- what reaches what ----------------------------------------------------------------------------


class Encoder(nn.Module):
    """Deep enough for gradients that underflow in float16, and that cancel in bfloat16."""

    def __init__(self, layers):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        return self.head(self.layers(x).mean(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_every_weight_of_a_wide_network_moves_its_output(dtype):
    layers = [nn.Linear(12, 512), nn.LayerNorm(512), nn.Linear(512, 512), nn.LayerNorm(512)]
    net = nn.Sequential(*layers, nn.GELU(), nn.Linear(512, 5)).to(dtype)
    for masks in reach_of(net, batch(dtype)).values():
        assert all(bool(mask.all()) for mask in masks.values())
        assert list(masks) == ["model"]
    assert {p.dtype for p in net.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_rows_of_a_deep_network_are_independent(dtype):
    model, x = Encoder(12).to(dtype), batch(dtype, 6, 32)
    assert_rows_independent(measure_batch_independence(model, x))


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "around"])
def test_what_autocast_computes_is_looked_at_in_float32(inside):
    seen = set()

    class Recorded(nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16) if inside else nullcontext():
                y = super().forward(x)
            seen.add(y.dtype)
            return y

    net, x = Recorded(12, 5), batch(torch.float32)
    with nullcontext() if inside else torch.autocast("cpu", torch.bfloat16):
        assert list(reach_of(net, x)) == ["weight", "bias"]
        assert seen == {torch.float32}
        net(x)
        assert seen == {torch.float32, torch.bfloat16}


def test_a_network_that_takes_one_dtype_is_looked_at_in_it():
    class Strict(nn.Linear):
        def forward(self, x):
            assert x.dtype is torch.bfloat16
            return super().forward(x)

    two = [Strict(12, 5).bfloat16() for _ in range(2)]
    assert_ownership(measure_ownership_map(two, batch(torch.bfloat16)), "independent")
