import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from ensembles.checks.hygiene.claim import HygieneClaim, parse
from ensembles.checks.hygiene.judgement import (
    _KINDS,
    assert_snapshot_detached,
    assert_state_clean,
    judge,
)
from ensembles.checks.hygiene.measurement import KINDS, measure_state_hygiene
from ensembles.claims import ClaimError
from ensembles.findings import Count
from ensembles.instruments import tensor_locations as homes
from ensembles.message import Broken
from ensembles.models import Ensemble, NStreams, subnet_resnet18
from ensembles.subject import whole

ROWS = torch.linspace(-1, 1, 5 * 4).sin().view(5, 4)
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().view(2, 3, 32, 32)


@pytest.fixture(autouse=True)
def _same_weights_in_every_run():
    torch.manual_seed(0)


def net(*more: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), *more, nn.Linear(4, 2))


def decaying(model) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


class Calling(nn.Module):
    """A layer and something else, which a function computes with."""

    def __init__(self, function, **attributes) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(4, 4), function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.function(self, self.layer(x))


def message(model, batch=ROWS, *, updates=1, **more) -> str:
    measured = measure_state_hygiene(model, batch, **more)
    with pytest.raises(AssertionError) as broken:
        assert_state_clean(measured, updates=updates)
    return str(broken.value)


# --- in order -------------------------------------------------------------------------------------


class Teacher(nn.Module):
    """A student, and a frozen teacher that follows it in train mode; its norm sees every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.student = net()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
                for old, new in pairs:
                    old.lerp_(new, 0.1)
        return self.student(x), self.teacher(x)


class FrozenNorm(nn.BatchNorm1d):
    def train(self, mode=True):
        return super().train(False)


class DroppedPath(nn.Module):
    """In train mode a path is multiplied by 0 now and then, and its gradient is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        keep = torch.bernoulli(torch.tensor(0.5)) if self.training else 0.5
        return self.one(x) + keep * self.two(x)


class ZeroInitialised(nn.Module):
    """The gradient of the first factor is zero at the start, and it decays."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.b(self.a(x))


class Merging(nn.Linear):
    """A low-rank change of a frozen weight, which eval() merges into it and train() takes out."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.weight.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(4, 1)), nn.Parameter(torch.randn(1, 4))
        self.merged = False

    def train(self, mode=True):
        if self.merged is mode:
            self.weight.data.add_((self.a @ self.b).detach(), alpha=-1 if mode else 1)
            self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        y = super().forward(x)
        return y if self.merged else y + x @ (self.a @ self.b).t()


class Kept(nn.Linear):
    """Keeps what it has made of its weight while it is in eval mode; it may be `dropped` then."""

    def __init__(self, dropped=True) -> None:
        super().__init__(4, 4)
        self.made, self.dropped = None, dropped

    def train(self, mode=True):
        self.made = None if self.dropped else self.made
        return super().train(mode)

    def forward(self, x):
        if self.training or self.made is None:
            made = F.normalize(self.weight)
            self.made = None if self.training else made.detach()
        return F.linear(x, made if self.training else self.made)


class Rotary(nn.Module):
    """A table that is made in the first call, and attention that is kept to be drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.table, self.shown, self.longest = None, None, 0

    def forward(self, x):
        if len(x) > self.longest:
            self.table, self.longest = torch.arange(float(len(x)))[:, None].cos(), len(x)
        y = self.layer(x) * self.table[: len(x)]
        self.shown = (y.detach(),)
        return y


HEALTHY = {
    "batchnorm": net,
    "dropout": lambda: net(nn.Dropout(0.5)),
    "teacher": Teacher,
    "frozen norm": lambda: net(FrozenNorm(4).requires_grad_(False)),
    "norm in eval, trained": lambda: net(FrozenNorm(4)),
    "dropped path": DroppedPath,
    "zero initialised": ZeroInitialised,
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    "activation in a dict": lambda: Calling(lambda m, x: m.acts["r"](x), acts={"r": nn.ReLU()}),
    "mask that forward moves": lambda: Calling(
        lambda m, x: x * m.mask.to(x.device), mask=torch.ones(4)
    ),
    "index": lambda: Calling(lambda m, x: x[:, m.order], order=torch.tensor([1, 0, 3, 2])),
    "copied best weights": lambda: Calling(lambda m, x: x, best={"w": torch.ones(4)}),
    "merged in eval": Merging,
    "cache that train() drops": Kept,
    "table of the first call": Rotary,
    "detached beside others": lambda: Calling(lambda m, x: x, kept=[torch.ones(4)]),
    "members": lambda: [net(), net()],
    "ensemble": lambda: Ensemble.of(net, 3),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_model_is_clean(name):
    torch.manual_seed(0)
    model = HEALTHY[name]()
    loss = (
        (lambda y: sum(F.mse_loss(v, torch.ones_like(v)) for v in y.values()))
        if (name != "members")
        else None
    )
    optimizer = None if name == "members" else decaying
    assert_state_clean(measure_state_hygiene(model, ROWS, optimizer=optimizer, loss=loss))


def test_a_recurrent_network_and_a_transformer_are_clean():
    sequence = torch.randn(5, 2, 4)
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    for model in (nn.LSTM(4, 4, 2, dropout=0.5), nn.TransformerEncoder(layer, 1)):
        assert_state_clean(measure_state_hygiene(model, sequence, outputs=whole))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "googlenet"])
def test_torchvision_classifiers_are_clean(name):
    more = {"init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, num_classes=3, **more)
    found = measure_state_hygiene(model, IMAGES, outputs=whole, optimizer=decaying)
    assert_state_clean(found)
    assert {count for _, count in found.updates} == {1}


def test_our_subnets_are_clean():
    model = subnet_resnet18(width=2, base_channels=2, stem="cifar", num_classes=3)
    assert_state_clean(measure_state_hygiene(model, IMAGES))


@pytest.mark.parametrize("streams", [2, 4])
def test_streams_update_every_norm_once_each(streams):
    found = measure_state_hygiene(NStreams(net(), streams), ROWS)
    assert found.updates == (("network.1", streams),)
    assert_state_clean(found, updates=streams)


# --- not in order ---------------------------------------------------------------------------------


def test_a_mask_that_is_an_attribute_is_broken(golden):
    model = Calling(lambda m, x: x * m.mask, mask=torch.ones(4))
    golden(message(model), "messages/hygiene_mask.txt")


class OfTheClass(nn.Linear):
    """A mask that all instances have in common, and none registers."""

    mask = torch.tensor([1.0, 0.0])

    def forward(self, x):
        return super().forward(x) * self.mask


class ByDefault(nn.Linear):
    def forward(self, x, mask=OfTheClass.mask):
        return super().forward(x) * mask


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        (OfTheClass, "model.mask   shape (2,), kept as a class attribute"),
        (ByDefault, "model.forward   shape (2,), kept as a default argument"),
    ],
)
def test_a_mask_outside_of_every_instance_is_broken(kind, place):
    assert place in message(kind(4, 2))


def test_a_hidden_module_is_broken(golden):
    model = Calling(lambda m, x: m.parts[0](x), parts=[nn.BatchNorm1d(4, affine=False)])
    golden(message(model), "messages/hygiene_hidden_module.txt")


def test_a_mode_that_stops_on_its_way_is_broken(golden):
    class Deaf(nn.Sequential):
        def train(self, mode=True):
            self.training = mode
            return self

    golden(message(nn.Sequential(Deaf(nn.Dropout(0.5)))), "messages/hygiene_mode.txt")


def test_a_train_that_returns_nothing_and_an_eval_that_merges_twice_are_broken():
    class Forgets(nn.Linear):
        def train(self, mode=True):
            super().train(mode)

    class Merges(nn.Linear):
        def train(self, mode=True):
            if not mode:
                self.weight.data.add_(1.0)
            return super().train(mode)

    assert "model.train()   returns NoneType, not itself" in message(Forgets(4, 2))
    assert "a second eval() changes it" in message(Merges(4, 2))


def test_dropout_in_eval_is_broken(golden):
    model = Calling(lambda m, x: F.dropout(x, 0.5))
    golden(message(model), "messages/hygiene_dropout.txt")


class Woken(nn.Module):
    """Wakes up after each call, as an evaluation inside a training loop does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5))

    def forward(self, x):
        y = self.layers(x)
        self.layers.train()
        return y


def test_a_call_that_seeds_is_broken(golden):
    def noisy(module, x):
        torch.manual_seed(0)
        return x + torch.randn_like(x)

    golden(message(Calling(noisy)), "messages/hygiene_seeds.txt")


def test_a_call_that_seeds_in_train_mode_only_is_broken():
    def noisy(module, x):
        if module.training:
            torch.manual_seed(0)
        return x

    found = measure_state_hygiene(Calling(noisy), ROWS)
    assert [(one.kind, one.place, one.found) for one in found.findings] == [
        (
            "global state",
            "generator torch",
            "in one state after every call in train mode, whatever the seed",
        )
    ]


def test_a_call_that_seeds_behind_a_fork_is_clean():
    def noisy(module, x):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return x + torch.randn_like(x)

    assert_state_clean(measure_state_hygiene(Calling(noisy), ROWS))


def test_a_call_that_switches_gradients_off_is_broken():
    def frozen(module, x):
        torch.set_grad_enabled(module.training)
        return x

    place = "gradients   switched off by a call in eval mode"
    assert place in message(Calling(frozen))


def test_a_cache_of_weights_that_outlives_them_is_broken(golden):
    golden(message(Kept(dropped=False)), "messages/hygiene_stale.txt")


def test_a_cache_by_width_that_outlives_its_weights_is_broken():
    def sliced(module, x):
        if module.training:
            return x[:, :2] @ module.layer.weight[:2]
        cut = module.cache.setdefault(2, module.layer.weight[:2].detach().clone())
        return x[:, :2] @ cut

    assert "outputs after other weights   differ by" in message(Calling(sliced, cache={}))


def test_what_a_call_leaves_in_an_attribute_for_the_next_is_broken():
    def counted(module, x):
        module.calls += 1
        return x / module.calls

    def mixed(module, x):
        x = x if module.last is None else x + module.last
        module.last = x.detach()
        return x

    for model in (Calling(counted, calls=0), Calling(mixed, last=None)):
        assert "outputs of a second call   differ by" in message(model)


def test_a_constant_of_a_layer_that_a_call_in_eval_mode_changes_is_broken():
    def dropped(module, x):
        module.drop.p += 0.125
        return module.drop(x)

    text = message(Calling(dropped, drop=nn.Dropout(0.0)))
    assert "model.drop.p   changes from 0.125 to 0.25 in one call" in text


@pytest.mark.parametrize("trained", [3, 1])
def test_a_call_that_freezes_what_it_has_used_is_broken(trained, freezing_heads):
    model = freezing_heads(4, put_back=False)
    model.heads[trained:].requires_grad_(False)
    text = message(model)
    assert "but a call changes which parameters are trained" in text
    assert "heads.0.weight   changes from True to False in one call in eval mode" in text
    assert "stale" not in text
    assert [p.requires_grad for head in model.heads for p in head.parameters()] == [
        i < trained for i in range(3) for _ in range(2)
    ]


def test_a_call_that_freezes_in_train_mode_is_broken():
    def frozen(module, x):
        module.layer.requires_grad_(not module.training)
        return x

    text = message(Calling(frozen))
    assert "layer.weight   changes from True to False in one call in train mode" in text


def test_a_call_that_puts_its_freezes_back_is_clean(freezing_heads):
    assert_state_clean(measure_state_hygiene(freezing_heads(4, put_back=True), ROWS))


class Entry:
    """Of a data set; it may hold anything."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


def test_where_not_all_was_searched_nothing_holds(monkeypatch, golden):
    monkeypatch.setattr(homes, "MOST_OBJECTS", 500)
    monkeypatch.setattr(homes, "AT_ONCE", 100)
    mask = torch.ones(4)
    clean, hidden = Calling(lambda m, x: x), Calling(lambda m, x: x * m.near[0]["mask"])
    hidden.near = [{"mask": mask}]
    for model in (clean, hidden):
        assert measure_state_hygiene(model, ROWS).all_searched
        model.entries = [Entry(i) for i in range(2_000)]
    assert_state_clean(measure_state_hygiene(Calling(lambda m, x: x), ROWS))
    measured = measure_state_hygiene(clean, ROWS)
    assert str(measured) == (
        "2 modules, 2 parameters and buffers, 0 findings; searched 500 objects, but there are more"
    )
    with pytest.raises(ValueError, match="the first 500 objects below the model were") as error:
        assert_state_clean(measured)
    golden(str(error.value), "messages/hygiene_not_all.txt")
    measured = measure_state_hygiene(hidden, ROWS)
    with pytest.raises(Broken, match="looked at 500 objects of the model, but there are more\n"):
        assert_state_clean(measured)
    assert judge(measured, HygieneClaim()).kinds == ("hidden tensor",)
    (looked_at,) = judge(measured, HygieneClaim()).looked_at
    assert looked_at.number == measured.searched == 500


def test_a_call_that_leaves_train_mode_behind_is_broken():
    place = "model.layers   in train mode after a call in eval mode"
    assert place in message(Woken())


def test_a_part_that_forward_puts_into_eval_mode_is_clean():
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = net().requires_grad_(False), nn.Linear(2, 2)

        def forward(self, x):
            return self.head(self.trunk.eval()(x))

    assert_state_clean(measure_state_hygiene(Frozen(), ROWS))


# --- moves ----------------------------------------------------------------------------------------


class KeptBack(nn.Linear):
    """Moves, and puts its mask back where it was."""

    def __init__(self) -> None:
        super().__init__(4, 2)
        self.register_buffer("mask", torch.ones(2))

    def forward(self, x):
        return super().forward(x) * self.mask

    def _apply(self, fn, recurse=True):
        mask = self.mask
        super()._apply(fn, recurse)
        self.mask = mask
        return self


class Deaf(nn.Linear):
    def _apply(self, fn, recurse=True):
        return self


def test_a_buffer_that_a_move_leaves_behind_is_broken(golden):
    golden(message(nn.Sequential(nn.Linear(4, 4), KeptBack())), "messages/hygiene_stays.txt")


def test_a_layer_that_no_move_reaches_is_broken():
    found = measure_state_hygiene([nn.Linear(4, 2), Deaf(4, 2)], ROWS)
    assert found.places("stays behind") == ("1.bias", "1.weight")


def test_a_part_that_is_its_own_copy_stays_where_it_is():
    class Teacher(nn.Linear):
        def __deepcopy__(self, memo):
            return self

    class Distilled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = Teacher(4, 2).requires_grad_(False)
            self.student = nn.Linear(4, 2)

        def forward(self, x):
            return self.student(x) + self.teacher(x)

    model = Distilled()
    assert_state_clean(measure_state_hygiene(model, ROWS))
    assert model.teacher.weight.device.type == "cpu"


def test_what_is_bound_to_the_original_is_put_back():
    net = nn.Linear(4, 2)
    weight, moved = net.weight, net._apply
    net._apply = lambda fn, recurse=True: moved(fn, recurse)
    measure_state_hygiene(net, ROWS)
    assert net.weight is weight
    assert weight.device.type == "cpu"


def test_a_weight_that_is_expanded_is_looked_at():
    net = nn.Linear(4, 3)
    net.bias = nn.Parameter(torch.zeros(1).expand(3), requires_grad=False)
    assert_state_clean(measure_state_hygiene(net, ROWS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_merged_and_taken_apart_again_rounds_as_its_type_does(dtype):
    class Merged(nn.Linear):
        """A low-rank update that is added to the weight in eval mode (Hu et al. 2021, LoRA)."""

        def __init__(self) -> None:
            super().__init__(4, 2)
            self.a, self.b = (nn.Parameter(torch.randn(*shape)) for shape in ((2, 1), (1, 4)))
            self.merged = False

        def train(self, mode=True):
            if self.merged == mode:
                self.weight.data += (self.a @ self.b).data * (-1 if mode else 1)
                self.merged = not mode
            return super().train(mode)

        def forward(self, x):
            weight = self.weight if self.merged else self.weight + self.a @ self.b
            return nn.functional.linear(x, weight, self.bias)

    found = measure_state_hygiene(Merged().to(dtype), ROWS.to(dtype))
    assert found.places("stale") == ()


def test_what_cannot_be_copied_may_move_as_it_does():
    class Uncopied(nn.Linear):
        def __deepcopy__(self, memo):
            raise TypeError("holds a lock")

    assert_state_clean(measure_state_hygiene(Uncopied(4, 2), ROWS))


# --- the batch ------------------------------------------------------------------------------------


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x.mul_(0.5))


def test_a_member_that_writes_into_the_batch_is_broken(golden):
    golden(message(Ensemble([net(), Scales(), net()])), "messages/hygiene_batch.txt")


def test_a_batch_is_watched_in_all_its_parts_and_in_train_mode():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x, masks):
            if self.training:
                masks["kept"].mul_(0)
            return self.layer(x * masks["kept"])

    told = message(Noisy(), (ROWS, {"kept": torch.ones(5, 4), "second": torch.ones(2)}))
    place = "batch[1]['kept']   changes by 1e+00 in one call in train mode, first in"
    assert place in told
    assert "second" not in told


def test_an_activation_in_place_is_clean_behind_a_layer_and_broken_before_it():
    layers = nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)
    assert_state_clean(measure_state_hygiene(nn.Sequential(*layers), ROWS))
    assert "first in 0 (ReLU)" in message(nn.Sequential(nn.ReLU(inplace=True), *layers))


def test_two_updates_of_a_norm_are_broken(golden):
    golden(message(NStreams(net(), 2)), "messages/hygiene_updates.txt")


class Widths(nn.Module):
    """A layer of several widths, normalised by slices of one norm's statistics."""

    def __init__(self, *slices) -> None:
        super().__init__()
        self.layer, self.norm, self.slices = nn.Linear(4, 4), nn.BatchNorm1d(4), slices

    def forward(self, x):
        norm, found = self.norm, []
        for part in self.slices:
            state = norm.running_mean[part], norm.running_var[part], norm.weight[part]
            found.append(
                F.batch_norm(self.layer(x)[:, part], *state, norm.bias[part], self.training)
            )
        return torch.cat(found, 1)


def test_two_widths_of_one_norm_update_it_twice(golden):
    assert measure_state_hygiene(Widths(slice(4)), ROWS).updates == (("norm", 1),)
    golden(message(Widths(slice(2), slice(4))), "messages/hygiene_widths.txt")


def test_two_norms_in_one_buffer_update_it_once_each():
    found = measure_state_hygiene(Widths(slice(2), slice(2, 4)), ROWS)
    assert found.updates == (("norm", 1),)
    assert_state_clean(found)


def test_norms_under_vmap_are_no_wrong_updates():
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 4, 4))
            self.register_buffer("running_mean", torch.zeros(2, 4))
            self.register_buffer("running_var", torch.ones(2, 4))

        def forward(self, x):
            def member(weight, mean, var):
                return F.batch_norm(x @ weight, mean, var, training=self.training)

            return list(torch.vmap(member)(self.weight, self.running_mean, self.running_var))

    assert_state_clean(measure_state_hygiene(Mapped(), ROWS))


def test_a_recomputed_norm_updates_twice():
    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=False)

    assert measure_state_hygiene(Recomputed(), ROWS).updates == (("net.1", 2),)


def test_a_frozen_norm_whose_statistics_move_is_broken(golden):
    model = net()
    model[1].requires_grad_(False)
    golden(message(model), "messages/hygiene_frozen.txt")


def test_a_norm_without_weights_in_a_frozen_part_is_frozen_too():
    def with_trunk(*, frozen: bool) -> nn.Module:
        trunk = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))
        return nn.Sequential(trunk.requires_grad_(not frozen), nn.Linear(4, 2))

    assert "0.1.running_mean   a call moves it, though its module is frozen" in message(
        with_trunk(frozen=True)
    )
    assert_state_clean(measure_state_hygiene(with_trunk(frozen=False), ROWS))
    # Nothing is frozen of a norm whose neighbours train.
    standardised = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))
    standardised[1].bias.requires_grad_(False)
    assert_state_clean(measure_state_hygiene(standardised, ROWS))


def test_a_gradient_of_before_the_freeze_is_broken():
    model = nn.Linear(4, 2)
    model(ROWS).sum().backward()
    model.requires_grad_(False)
    model.bias.requires_grad_(True)
    assert "weight   the optimizer steps its gradient of before the freeze" in message(
        model, optimizer=decaying
    )


def test_a_loss_times_zero_lets_weights_drift(golden):
    text = message(
        Ensemble([nn.Linear(4, 2), nn.Linear(4, 2)]),
        optimizer=decaying,
        loss=lambda y: y["0"].square().sum() + 0.0 * y["1"].square().sum(),
    )
    golden(text, "messages/hygiene_drifting.txt")


# --- behind masks ---------------------------------------------------------------------------------


HALF = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])


class Masked(nn.Linear):
    """A layer whose weight `use` makes of its own weight and a mask."""

    def __init__(self, use=lambda w, mask: w * mask, mask=HALF) -> None:
        super().__init__(4, 2)
        self.use = use
        self.register_buffer("mask", mask)

    def forward(self, x):
        return F.linear(x, self.use(self.weight, self.mask), self.bias)


USES = {
    "product": lambda w, mask: w * mask,
    "product of the mask": lambda w, mask: mask * w,
    "filled": lambda w, mask: w.masked_fill(mask == 0, 0.0),
    "where": lambda w, mask: torch.where(mask != 0, w, torch.zeros(())),
    "one of two rows": lambda w, mask: w * torch.tensor([[1.0], [0.0]]),
    "twice": lambda w, mask: w * mask + (w * mask).tanh(),
}


@pytest.mark.parametrize("use", USES)
def test_decay_of_what_a_mask_hides_is_broken(use):
    found = measure_state_hygiene(Masked(USES[use]), ROWS, optimizer=decaying)
    assert [(one.kind, one.place) for one in found.findings] == [("masked moves", "weight")]
    assert found.findings[0].found.startswith("4 of 8 elements")
    # Without decay nothing moves what has no gradient.
    assert measure_state_hygiene(Masked(USES[use]), ROWS).findings == ()


def test_the_message_of_what_a_mask_hides(golden):
    golden(message(Masked(), optimizer=decaying), "messages/hygiene_masked.txt")


def test_a_norm_of_the_whole_weight_trains_what_the_mask_hides():
    def whole_norm(w, mask):
        return w / w.norm(dim=1, keepdim=True) * mask

    def visible_norm(w, mask):
        return w * mask / (w * mask).norm(dim=1, keepdim=True)

    assert measure_state_hygiene(Masked(whole_norm), ROWS).places("masked moves") == ("weight",)
    assert measure_state_hygiene(Masked(visible_norm), ROWS).findings == ()


def zeroed() -> nn.Module:
    layer = Masked()
    with torch.no_grad():
        layer.weight.mul_(HALF)
    return layer


class DropConnect(nn.Linear):
    def forward(self, x):
        return F.linear(x, F.dropout(self.weight, 0.5, self.training), self.bias)


class Parent(nn.Module):
    """The parent uses the whole weight, and each of two subnets a half of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("mask", HALF)

    def forward(self, x):
        w = self.layer.weight
        return {
            "parent": F.linear(x, w),
            "0": F.linear(x, w * self.mask),
            "1": F.linear(x, w * (1 - self.mask)),
        }


@pytest.mark.parametrize(
    "make",
    [
        zeroed,
        lambda: DropConnect(4, 2),
        Parent,
        lambda: Masked(lambda w, mask: w * (mask + 1)),
        lambda: Masked(lambda w, mask: torch.where(mask != 0, w, 0.1 * w)),
        # A mask of activations is none of weights, though it has the shape of the weight.
        lambda: Calling(lambda m, x: x * torch.eye(5, 4)),
        lambda: nn.Conv1d(5, 5, 3, padding=1),
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9)),
    ],
    ids=[
        "zeros", "drop connect", "all elements used", "no zeros", "leaky", "activations",
        "padding", "dropout",
    ],
)  # fmt: skip
def test_what_hides_no_weight_for_good_is_clean(make):
    assert measure_state_hygiene(make(), ROWS, optimizer=decaying).places("masked moves") == ()


# --- averages -------------------------------------------------------------------------------------


class Averaging(nn.Module):
    """A network that is trained, and its average, which predicts."""

    def __init__(self, follow) -> None:
        super().__init__()
        self.live = net()
        self.average = copy.deepcopy(self.live).requires_grad_(False)
        self.follow = follow

    def forward(self, x):
        return self.live(x) if self.training else self.average(x)

    def update(self, *_):
        with torch.no_grad():
            for mean, now in zip(self.average.parameters(), self.live.parameters(), strict=True):
                mean.lerp_(now, 0.1)
            for mean, now in zip(self.average.buffers(), self.live.buffers(), strict=True):
                self.follow(mean, now)


def stepping(model: nn.Module) -> torch.optim.Optimizer:
    built = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    built.register_step_post_hook(model.update)
    return built


def with_the_weights(mean, now):
    if mean.is_floating_point():
        mean.lerp_(now, 0.1)


def test_an_average_with_its_own_statistics_is_clean():
    """Also: a hook of the optimizer moves frozen weights, which the optimizer does not hold."""
    found = measure_state_hygiene(Averaging(with_the_weights), ROWS, optimizer=stepping)
    assert found.findings == ()


def test_an_average_whose_norms_see_every_batch_is_clean():
    class Student(Averaging):
        def forward(self, x):
            return self.live(x), self.average(x)

    found = measure_state_hygiene(Student(lambda mean, now: None), ROWS, optimizer=stepping)
    assert found.findings == ()


def test_an_average_that_does_not_predict_is_clean():
    class Kept(Averaging):
        def forward(self, x):
            return self.live(x)

    found = measure_state_hygiene(Kept(lambda mean, now: None), ROWS, optimizer=stepping)
    assert found.findings == ()


@pytest.mark.parametrize(
    ("follow", "told"),
    [
        (lambda mean, now: None, "its statistics stay as they were"),
        (lambda mean, now: mean.copy_(now), "its statistics are those of live.1"),
    ],
    ids=["first", "last"],
)
def test_an_average_with_statistics_of_other_weights_is_broken(follow, told):
    text = message(Averaging(follow), optimizer=stepping)
    assert f"average.1   its weights are averaged, but {told}" in text


class AveragedBefore(nn.Module):
    """Averages, before each training call, what the last one left; a whole copy is `taken`."""

    def __init__(self, taken=False) -> None:
        super().__init__()
        self.live = net()
        self.average = torch.optim.swa_utils.AveragedModel(self.live)
        self.taken = taken

    def forward(self, x):
        if not self.training:
            return self.average(x)
        if not self.taken:
            self.average.update_parameters(self.live)
        elif int(self.live[1].num_batches_tracked) == 2:
            self.average.module.load_state_dict(self.live.state_dict())
        return self.live(x)


def test_an_average_with_statistics_of_the_step_before_is_broken():
    """PyTorch's AveragedModel copies the buffers of the model, and averages its weights."""
    text = message(AveragedBefore())
    told = "its weights are averaged, but its statistics are those of live.1"
    assert f"average.module.1   {told}" in text


def test_a_snapshot_of_weights_and_statistics_that_predicts_is_clean():
    found = measure_state_hygiene(AveragedBefore(taken=True), ROWS)
    assert found.places("averaged norm") == ()


def test_the_message_of_an_average_with_other_statistics(golden):
    text = message(Averaging(lambda mean, now: None), optimizer=stepping)
    golden(text, "messages/hygiene_averaged.txt")


@pytest.mark.parametrize("buffers", [True, False])
def test_swapping_an_average_in_takes_its_statistics_along(buffers):
    class Swapping(Averaging):
        def train(self, mode=True):
            if mode != self.training:
                for name, now in self.live.state_dict().items():
                    if buffers or "running" not in name:
                        other, kept = self.average.state_dict()[name], now.clone()
                        now.copy_(other)
                        other.copy_(kept)
            return super().train(mode)

        def forward(self, x):
            return self.live(x)

    found = measure_state_hygiene(Swapping(with_the_weights), ROWS, optimizer=stepping)
    assert found.places("averaged norm") == (() if buffers else ("live.1",))


# --- snapshots ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "names"),
    [
        (lambda m: {"best." + k: v for k, v in m.state_dict().items()}, "weight, bias"),
        (lambda m: [p.data for p in m.parameters()], "weight, bias"),
        (lambda m: tuple(p.detach() for p in m.parameters()), "weight, bias"),
    ],
    ids=["prefix", "data", "detach"],
)
def test_a_snapshot_that_a_model_keeps_under_any_name_is_told(keep, names):
    model = nn.Linear(4, 2)
    model.kept = keep(model)
    found = measure_state_hygiene(model, ROWS)
    assert [(one.kind, one.place, one.found) for one in found.findings] == [
        ("alias", "model.kept", f"is the live memory of {names}")
    ]


@pytest.mark.parametrize(
    "keep",
    [
        lambda m: list(m.parameters()),
        lambda m: [p.detach().clone() for p in m.parameters()],
        lambda m: [m.weight.detach(), torch.ones(2)],
        lambda m: [m.weight.detach()[:1]],
    ],
    ids=["parameters", "copies", "among others", "a part"],
)
def test_a_list_that_is_no_snapshot_by_reference_is_clean(keep):
    model = nn.Linear(4, 2)
    model.kept = keep(model)
    assert measure_state_hygiene(model, ROWS).places("alias") == ()


def test_a_copied_snapshot_is_detached():
    model = net()
    assert_snapshot_detached(copy.deepcopy(model.state_dict()), model)
    assert_snapshot_detached([copy.deepcopy(model), {"epoch": 3}], model)


def test_a_snapshot_by_reference_is_broken(golden):
    model = net()
    with pytest.raises(AssertionError) as broken:
        assert_snapshot_detached({"epoch": 3, "weights": model.state_dict()}, model)
    golden(str(broken.value), "messages/hygiene_snapshot.txt")


def test_a_snapshot_of_nothing_is_refused():
    with pytest.raises(ValueError, match="holds no tensors"):
        assert_snapshot_detached({"epoch": 3}, net())


# --- as data --------------------------------------------------------------------------------------


def test_findings_are_data_and_every_kind_is_told():
    """A mask that is an attribute, and a norm that two streams go through."""

    class Streams(NStreams):
        def forward(self, x):
            return [y * self.mask for y in super().forward(x)]

    model = Streams(net(), 2)
    model.mask = torch.ones(2)
    hygiene = measure_state_hygiene(model, ROWS)
    with pytest.raises(Broken) as broken:
        assert_state_clean(hygiene)
    hidden, norm = broken.value.findings
    assert (hidden.kind, hidden.place, hidden.amount) == ("hidden tensor", "model.mask", 2)
    assert (norm.kind, norm.place, norm.amount) == ("norm updates", "network.1", 2)
    assert (norm.expected, norm.found) == ("1 update a step", "2 updates a step")
    assert broken.value.findings.affected == (Count(1, "norm", of=1),)
    assert "Hidden tensor: A tensor that is no buffer" in str(broken.value)
    assert "Norm updates: Where running statistics" in str(broken.value)
    assert judge(hygiene, HygieneClaim(updates=2)).kinds == ("hidden tensor",)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (net, "norms update their statistics once a step"),
        (lambda: NStreams(net(), 2), "norms update their statistics twice a step"),
        (lambda: NStreams(net(), 4), "norms update their statistics 4 times a step"),
        (lambda: net(FrozenNorm(4)), "norms update their statistics once a step or not at all"),
        (lambda: FrozenNorm(4), "norms do not update their statistics in a step"),
    ],
)
def test_the_measurement_says_how_often_norms_update(make, told):
    head = str(measure_state_hygiene(make(), ROWS)).splitlines()[0]
    assert head.endswith(f"0 findings; {told}")


def test_every_kind_of_finding_is_explained():
    assert tuple(_KINDS) == KINDS


def test_a_claim_that_is_not_known_is_refused():
    assert parse("clean") == HygieneClaim(updates=1)
    with pytest.raises(ClaimError, match="cannot be claimed to be 'tidy'"):
        parse("tidy")


# --- wrong use ------------------------------------------------------------------------------------


def test_a_kind_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="'masks' is no kind of finding"):
        measure_state_hygiene(net(), ROWS).places("masks")


def test_an_optimizer_that_needs_a_closure_is_refused():
    with pytest.raises(ValueError, match=r"LBFGS\.step\(\) raised TypeError"):
        measure_state_hygiene(net(), ROWS, optimizer=lambda m: torch.optim.LBFGS(m.parameters()))


def loud(*, moves: bool = False) -> nn.Module:
    """Gradients are 1e18 times as large as weights; optionally, a call in eval mode moves it."""

    def function(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if moves:
            module.kept += 1
        return 1e18 * x.square()

    model = Calling(function)
    model.register_buffer("kept", torch.zeros(1))
    return model


def sum_of_squares(outputs):
    return outputs["model"].square().sum()


@pytest.mark.parametrize("given", [{}, {"optimizer": decaying}], ids=["nothing", "optimizer"])
def test_steps_of_the_check_itself_do_not_run_away(given):
    assert_state_clean(measure_state_hygiene(loud(), ROWS, **given), updates=0)
    assert "kept" in message(loud(moves=True), updates=0, **given)


def test_training_that_runs_away_says_so_and_what_to_do():
    def slow(model):
        return torch.optim.SGD(model.parameters(), lr=1e-37)

    assert_state_clean(
        measure_state_hygiene(loud(), ROWS, optimizer=slow, loss=sum_of_squares), updates=0
    )
    with pytest.raises(ValueError) as raised:
        measure_state_hygiene(loud(), ROWS, optimizer=decaying, loss=sum_of_squares)
    assert str(raised.value) == (
        "the training loss became infinite in step 2: training runs away. Nothing can be concluded "
        "from it. Likely the learning rate is too large for this batch. Give a smaller one, or a "
        "batch of more rows."
    )


def test_weights_that_are_no_numbers_after_a_step_are_told():
    def fast(model):
        return torch.optim.SGD(model.parameters(), lr=1e38)

    with pytest.raises(ValueError, match=r"^parameter layer\.weight became infinite in step 1: "):
        measure_state_hygiene(loud(), ROWS, optimizer=fast, loss=sum_of_squares)


def test_looking_changes_nothing():
    model = Calling(lambda m, x: m.parts[0](x), parts=[nn.BatchNorm1d(4)], norm=nn.BatchNorm1d(4))
    model.norm.eval()
    model.layer.weight.grad = torch.ones(4, 4)
    before, generator = copy.deepcopy(model), torch.get_rng_state()
    measure_state_hygiene(model, ROWS, optimizer=decaying)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(model.layer.weight.grad, torch.ones(4, 4))
    assert (model.training, model.norm.training, model.parts[0].training) == (True, False, True)
    pairs = [(model, before), (model.parts[0], before.parts[0])]
    for one, other in pairs:
        state = other.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


def test_the_fixture_does_the_same(state_hygiene):
    state_hygiene.assert_clean(NStreams(net(), 3), ROWS, updates=3)
    state_hygiene.assert_detached(copy.deepcopy(net()), net())
    with pytest.raises(AssertionError, match="expected 1 update a step   found 3 updates a step"):
        state_hygiene.assert_clean(NStreams(net(), 3), ROWS)
