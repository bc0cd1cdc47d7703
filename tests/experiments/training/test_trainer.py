"""Training: against plain loops, against facts, and what stops it."""

import logging
import math
import os
import random
import re
import signal
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from ensembles.experiments.data.batches import MemberBatches
from ensembles.experiments.data.sources import load_images, split_validation
from ensembles.experiments.training.checkpoints import load_network, read_checkpoint
from ensembles.experiments.training.networks import (
    NamedEnsemble,
    NamedStreams,
    NetworkOptions,
    SingleNetwork,
    build_network,
)
from ensembles.experiments.training.runs import RunFolder
from ensembles.experiments.training.schedules import Schedule
from ensembles.experiments.training.trainer import Execution, TrainingOptions, train
from ensembles.models.objectives import Interpolated, Joint, Mean, MeanField, Stochastic, Sum
from ensembles.models.predictions import predict

QUIET = Execution(accelerator="cpu", progress=False, tensorboard=False)
EVERY_STEP = Execution(accelerator="cpu", progress=False, tensorboard=False, checkpoint_every=1)
STEP = {"epochs": 1, "batch_size": 40, "validation": 20}
"""Two steps of 40 images, and 20 to validate on."""


@pytest.fixture(scope="module")
def images():
    return load_images("digits", "train").select(range(100))


def small(seed=0, *, batch_norm=True):
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(4) if batch_norm else nn.Identity()
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


class Family(NamedEnsemble):
    """Independent members under the names that objectives with a parent know."""

    member_names = ("parent", "subnet_0_0", "subnet_0_1")


def state_of(run):
    return read_checkpoint(run.checkpoint).state


def assert_same(one, two):
    assert list(one) == list(two)
    different = [name for name, value in one.items() if not torch.equal(value, two[name])]
    assert different == []


def part(state, prefix):
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }


# --- what is computed ---------------------------------------------------------------------------


def plain_loop(network, options, images, optimizer):
    """The same training without any of our training code but batches and rates."""
    training, _ = split_validation(images, options.validation, options.split_seed)
    batches = MemberBatches(
        training,
        batch_size=options.batch_size,
        seed=options.seed,
        members=network.member_names,
        order=options.order,
        augment=options.augment,
    )
    rates = options.schedule.shares(epochs=options.epochs, steps_per_epoch=len(batches))
    losses = []
    for epoch in range(options.epochs):
        for step, (x, labels) in enumerate(batches.epoch(epoch)):
            optimizer.param_groups[0]["lr"] = options.lr * rates[epoch * len(batches) + step]
            shared = isinstance(x, torch.Tensor)
            logits = network(x) if shared else {n: network(x[n], [n])[n] for n in x}
            loss = options.objective(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            if options.clip_norm is not None:
                nn.utils.clip_grad_norm_(network.parameters(), options.clip_norm)
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("options", "optimizer"),
    [
        (
            {"objective": Joint(0.3), "schedule": Schedule(warmup_epochs=0.7, floor=0.1)},
            lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
        ),
        (
            {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "clip_norm": 0.01},
            lambda p: torch.optim.SGD(p, 0.1),
        ),
        (
            {"order": "own", "augment": "own"},
            lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
        ),
        (
            {"optimizer": "adam", "lr": 1e-3, "eps": 1e-4, "schedule": Schedule(name="step")},
            lambda p: torch.optim.Adam(p, 1e-3, eps=1e-4, weight_decay=5e-4),
        ),
        (
            {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.1, "augment": None},
            lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.1),
        ),
    ],
    ids=["sgd", "clipped", "own", "adam", "adamw"],
)
def test_training_is_the_plain_loop_bit_by_bit(images, tmp_path, options, optimizer):
    options = TrainingOptions(**{**STEP, "epochs": 3, **options})
    by_hand = NamedEnsemble([small(1), small(2)])
    losses = plain_loop(by_hand, options, images, optimizer(by_hand.parameters()))
    trained = NamedEnsemble([small(1), small(2)])
    run = train(trained, options, images, tmp_path, execution=QUIET)
    assert_same(state_of(run), by_hand.state_dict())
    assert_same(trained.state_dict(), by_hand.state_dict())
    assert [row["loss"] for row in run.steps_taken()] == pytest.approx(losses, rel=1e-7)


@pytest.mark.parametrize("kept", ["shared", "own"])
def test_members_of_a_summed_loss_train_as_they_do_alone_bit_by_bit(images, tmp_path, kept):
    """Through the whole trainer, with one order and augmentation for all or each its own."""
    options = TrainingOptions(**STEP, objective=Sum(), order=kept, augment=kept, seed=7)
    together = NetworkOptions(kind="ensemble", members=3, base_channels=2)
    run = train(together, options, images, tmp_path / "together", execution=QUIET)
    for number in range(3):
        one = NetworkOptions(base_channels=2, first_member=number)
        alone = train(one, options, images, tmp_path / f"{number}", execution=QUIET)
        assert_same(part(state_of(run), f"members.{number}."), part(state_of(alone), "network."))
        losses = [row[f"member_{number}/loss"] for row in run.steps_taken()]
        assert losses == [row["single/loss"] for row in alone.steps_taken()]
        for column in ("loss", "accuracy", "n"):
            found = run.epochs()[0][f"val/member_{number}/{column}"]
            assert found == alone.epochs()[0][f"val/single/{column}"]


def test_members_with_their_own_order_see_other_images_than_each_other(images, tmp_path):
    """Two members of one start: what they see is all that can part them."""
    losses = {}
    for order, augment in (("shared", "shared"), ("own", "shared"), ("shared", "own")):
        options = TrainingOptions(**STEP, order=order, augment=augment)
        network = NamedEnsemble([small(0), small(0)])
        run = train(network, options, images, tmp_path / (order + augment), execution=QUIET)
        losses[order, augment] = [
            row["member_0/loss"] == row["member_1/loss"] for row in run.steps_taken()
        ]
        # A mean prediction of members that see other images would mean nothing.
        assert ("train/ensemble/n" in run.epochs()[0]) == (order == augment)
    assert losses.pop(("shared", "shared")) == [True, True]
    assert not any(same for found in losses.values() for same in found)


def test_mean_loss_at_twice_the_rate_and_half_the_decay_is_the_summed_loss(images, tmp_path):
    """Bit by bit for two members (facts.md), through warm-up, floor and Nesterov momentum."""
    schedule = Schedule(warmup_epochs=0.5, floor=0.25)
    runs = [
        train(
            NamedEnsemble([small(1), small(2)]),
            TrainingOptions(**STEP, objective=objective, lr=lr, weight_decay=wd, schedule=schedule),
            images,
            tmp_path / type(objective).__name__,
            execution=QUIET,
        )
        for objective, lr, wd in ((Sum(), 0.1, 5e-4), (Mean(), 0.2, 2.5e-4))
    ]
    assert_same(state_of(runs[0]), state_of(runs[1]))


def test_streams_with_the_mean_loss_train_the_single_network_but_its_statistics(images, tmp_path):
    """The diary's run of 10/26: weights are those of the single network, BatchNorm's are not."""
    mean = TrainingOptions(**STEP, objective=Mean())
    streams = train(NamedStreams(small(), 2), mean, images, tmp_path / "streams", execution=QUIET)
    single = train(SingleNetwork(small()), mean, images, tmp_path / "single", execution=QUIET)
    found, expected = state_of(streams), state_of(single)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == [
        f"network.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    ]
    assert found["network.1.num_batches_tracked"] == 2 * expected["network.1.num_batches_tracked"]


def test_the_coin_is_written_down_and_only_who_was_asked_is_trained(images, tmp_path):
    options = TrainingOptions(
        epochs=4, batch_size=40, validation=20, objective=Stochastic(0.5, "one"), seed=2
    )
    run = train(Family([small(n) for n in range(3)]), options, images, tmp_path, execution=QUIET)
    rows = run.steps_taken()
    expected = [options.objective.asked(Family.member_names, step=s, seed=2) for s in range(8)]
    assert [tuple(row["asked"].split()) for row in rows] == expected
    state = state_of(run)
    for number, name in enumerate(Family.member_names):
        asked = sum(name in names for names in expected)
        assert state[f"members.{number}.1.num_batches_tracked"] == asked
        assert sum(f"{name}/loss" in row for row in rows) == asked
        counted = sum(row.get(f"train/{name}/n", 0) for row in run.epochs())
        assert counted == 40 * asked
        assert 0 < asked < 8


def test_members_of_no_weight_are_left_as_they_were(images, tmp_path):
    options = TrainingOptions(**STEP, objective=Interpolated(1.0))
    run = train(Family([small(n) for n in range(3)]), options, images, tmp_path, execution=QUIET)
    for number in (1, 2):
        assert_same(part(state_of(run), f"members.{number}."), small(number).state_dict())


def test_every_kind_of_network_is_trained(images, tmp_path):
    for kind, more, objective in (
        ("subnets", {"width": 2, "construction": "zero_padded"}, Interpolated(0.5)),
        ("mean_field", {"members": 2}, MeanField()),
    ):
        network = NetworkOptions(kind=kind, base_channels=2, **more)
        options = TrainingOptions(**STEP, objective=objective)
        run = train(network, options, images, tmp_path / kind, execution=QUIET)
        start = build_network(network).state_dict()
        unmoved = [name for name, value in state_of(run).items() if torch.equal(value, start[name])]
        assert unmoved == [], kind
        assert load_network(run.checkpoint).member_names == build_network(network).member_names


# --- what is written down -------------------------------------------------------------------------


def test_the_tables_say_what_the_network_does(images, tmp_path):
    """Of the last epoch's validation, from the checkpoint and by another way."""
    options = TrainingOptions(**{**STEP, "epochs": 2}, split_seed=3)
    run = train(Family([small(n) for n in range(3)]), options, images, tmp_path, execution=QUIET)
    network = Family([small() for _ in range(3)])
    network.load_state_dict(state_of(run))
    _, validation = split_validation(images, 20, 3)
    with torch.no_grad():
        logits = network.eval()(validation.normalised())
    row = run.epochs()[-1]
    for name, found in logits.items():
        loss = F.cross_entropy(found, validation.labels)
        assert row[f"val/{name}/loss"] == pytest.approx(float(loss), rel=1e-6)
        right = int((found.argmax(1) == validation.labels).sum())
        assert row[f"val/{name}/accuracy"] == right / 20
    # The ensemble is that of the subnets: the parent is no member of it.
    scores = predict({name: logits[name] for name in Family.member_names[1:]})
    loss = F.nll_loss(scores, validation.labels)
    assert row["val/ensemble/loss"] == pytest.approx(float(loss), rel=1e-6)
    assert row["val/ensemble/accuracy"] == int((scores.argmax(1) == validation.labels).sum()) / 20


def test_epochs_add_up_their_steps(images, tmp_path):
    """The last batch is smaller: a mean of the batches' means would be another number."""
    options = TrainingOptions(
        epochs=2, batch_size=30, validation=20, drop_last=False, schedule=Schedule(floor=0.5)
    )
    run = train(NamedEnsemble([small(1), small(2)]), options, images, tmp_path, execution=QUIET)
    steps, sizes = run.steps_taken(), [30, 30, 20]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    shares = options.schedule.shares(epochs=2, steps_per_epoch=3)
    assert [row["lr"] for row in steps] == pytest.approx([0.1 * share for share in shares])
    for epoch, row in enumerate(run.epochs()):
        own = steps[3 * epoch : 3 * epoch + 3]
        assert (row["epoch"], row["step"]) == (epoch, 3 * epoch + 3)
        for found, expected in (("train/loss", "loss"), ("train/member_1/loss", "member_1/loss")):
            total = sum(n * step[expected] for n, step in zip(sizes, own, strict=True))
            assert row[found] == pytest.approx(total / 80, rel=1e-12)
        for name in ("member_0", "member_1", "ensemble"):
            assert row[f"train/{name}/n"] == 80
            assert (row[f"train/{name}/accuracy"] * 80) % 1 == 0


def test_tensorboard_shows_the_table_of_epochs(images, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    execution = Execution(accelerator="cpu", progress=False)
    options = TrainingOptions(**{**STEP, "epochs": 2})
    run = train(SingleNetwork(small()), options, images, tmp_path, execution=execution)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for column in ("train/loss", "val/single/accuracy", "lr"):
        shown = [(event.step, event.value) for event in events.Scalars(column)]
        table = [(row["step"], pytest.approx(row[column], rel=1e-6)) for row in run.epochs()]
        assert shown == table


def test_the_progress_bar_shows_loss_and_accuracy(images, tmp_path, capsys):
    execution = Execution(accelerator="cpu", tensorboard=False)
    train(SingleNetwork(small()), TrainingOptions(**STEP), images, tmp_path, execution=execution)
    shown = "".join(capsys.readouterr())
    assert "Epoch 0: 100%" in shown
    assert "loss=" in shown


def test_without_validation_all_images_are_trained_on(images, tmp_path):
    options = TrainingOptions(epochs=1, batch_size=40, validation=0, drop_last=False)
    run = train(SingleNetwork(small()), options, images, tmp_path, execution=QUIET)
    (row,) = run.epochs()
    assert row["train/single/n"] == 100
    assert not [name for name in row if name.startswith("val/")]


def test_a_last_batch_that_is_not_full_is_left_out(images, tmp_path):
    options = TrainingOptions(epochs=1, batch_size=30, validation=20)
    run = train(SingleNetwork(small()), options, images, tmp_path, execution=QUIET)
    assert (run.steps, run.epochs()[0]["train/single/n"]) == (2, 60)
    assert run.epochs()[0]["val/single/n"] == 20


def test_a_last_batch_that_is_too_small_for_batch_norm_is_told(images, tmp_path):
    """Of 80 images: 38, 38 and 4. Half of a batch of 12 is well, and all without BatchNorm."""

    def told(name, size, *, batch_norm=True, drop_last=False):
        options = TrainingOptions(epochs=1, batch_size=size, validation=20, drop_last=drop_last)
        network = SingleNetwork(small(batch_norm=batch_norm))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(network, options, images, tmp_path / name, execution=QUIET)
        return [str(w.message) for w in caught if "BatchNorm" in str(w.message)]

    (few,) = told("few", 38)
    assert few.startswith("the last batch of every epoch has 4 of 80 images, the others 38: the ")
    assert told("again", 38) == [*told("few", 38), few]  # of a finished run nothing is told
    assert told("plain", 38, batch_norm=False) == []
    assert told("left_out", 38, drop_last=True) == []
    assert told("sixteen", 64) == []
    assert told("fifteen", 65) != []
    assert told("half", 12) == []


# --- how it is computed ---------------------------------------------------------------------------


def test_precision_and_layout_are_as_asked(images, tmp_path):
    seen, losses = {}, {}
    for name, options in (
        ("plain", {}),
        ("double", {"precision": "64-true"}),
        ("half", {"precision": "bf16-mixed"}),
        ("last", {"channels_last": True}),
    ):

        def look(conv, inputs, output, name=name):
            layouts = [
                tensor.is_contiguous(memory_format=torch.channels_last)
                for tensor in (inputs[0], conv.weight)
            ]
            seen.setdefault(name, (output.dtype, conv.weight.dtype, *layouts))

        network = SingleNetwork(small())
        network.network[0].register_forward_hook(look)
        options = TrainingOptions(**STEP, **options)
        run = train(network, options, images, tmp_path / name, execution=QUIET)
        losses[name] = run.epochs()[0]["train/single/loss"]
    assert seen == {
        "plain": (torch.float32, torch.float32, False, False),
        "double": (torch.float64, torch.float64, False, False),
        "half": (torch.bfloat16, torch.float32, False, False),
        "last": (torch.float32, torch.float32, True, True),
    }
    assert losses["double"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["last"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["half"] == pytest.approx(losses["plain"], rel=0.05)
    assert losses["half"] != losses["plain"]


def test_compilation_is_of_the_whole_network_and_changes_no_name(images, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, backend: compiled.append((self, backend))
    )
    network = SingleNetwork(small())
    run = train(
        network, TrainingOptions(**STEP, compile="inductor"), images, tmp_path, execution=QUIET
    )
    assert compiled == [(network, "inductor")]
    assert list(state_of(run)) == list(SingleNetwork(small()).state_dict())


def test_deterministic_training_refuses_what_is_not_and_leaves_no_trace(images, tmp_path):
    before = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    seen = []
    network = SingleNetwork(small())
    network.register_forward_hook(
        lambda *_: seen.append(torch.are_deterministic_algorithms_enabled())
    )
    options = TrainingOptions(**STEP, deterministic=True)
    train(network, options, images, tmp_path, execution=QUIET)
    assert set(seen) == {True}
    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == before


def test_training_leaves_generators_warnings_and_loggers_as_they_were(images, tmp_path):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    level = logging.getLogger("lightning.pytorch").level
    filters = list(warnings.filters)
    expected = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    network = NetworkOptions(base_channels=2, dropout=0.3)
    train(network, TrainingOptions(**STEP), images, tmp_path, execution=QUIET)
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected
    assert logging.getLogger("lightning.pytorch").level == level
    assert list(warnings.filters) == filters


def test_dropout_follows_the_seed_and_not_what_was_drawn_before(images, tmp_path):
    states = []
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        network = SingleNetwork(nn.Sequential(small(0), nn.Dropout(0.5)))
        torch.manual_seed(len(name))
        options = TrainingOptions(**STEP, seed=seed, augment=None)
        states.append(state_of(train(network, options, images, tmp_path / name, execution=QUIET)))
    assert_same(states[0], states[1])
    assert not torch.equal(states[0]["network.0.4.weight"], states[2]["network.0.4.weight"])


# --- what stops it --------------------------------------------------------------------------------


class Failing(nn.Module):
    """Gives logits of its own kind from a call on."""

    def __init__(self, logits, after):
        super().__init__()
        self.network, self.logits, self.left = small(1), logits, after

    def forward(self, x):
        self.left -= self.training
        found = self.network(x)
        return found if self.left >= 0 else self.logits(found)


class NaNGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


@pytest.mark.parametrize(
    ("logits", "told"),
    [
        (lambda z: z * math.nan, "logits of member_1 are no distribution: NaN in row 0"),
        (lambda z: z + math.inf, r"logits of member_1 are no distribution: \+inf in row 0"),
        (lambda z: z.index_fill(1, torch.arange(1, 10), -math.inf), "the loss of member_1 is inf"),
        (NaNGradient.apply, r"the gradient of members.1.network.0.weight is not"),
    ],
    ids=["nan", "inf", "infinite loss", "gradient"],
)
def test_what_is_no_number_stops_training_before_it_moves_a_weight(images, tmp_path, logits, told):
    """Names the step and the member, and keeps the checkpoint of the step before."""
    network = NamedEnsemble([small(0), Failing(logits, after=3)])
    options = TrainingOptions(epochs=3, batch_size=40, validation=20)
    with pytest.raises(FloatingPointError, match=told) as caught:
        train(network, options, images, tmp_path, execution=EVERY_STEP)
    message = str(caught.value)
    assert message.startswith("training diverged in step 4 (epoch 1) at a rate of 0.05: ")
    assert "The last good checkpoint is " in message
    assert "step_00000003.ckpt" in message
    good = read_checkpoint(tmp_path / "checkpoints" / "step_00000003.ckpt").state
    assert all(value.isfinite().all() for value in good.values())
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, good[name]), name


def test_divergence_in_the_first_step_says_that_there_is_no_checkpoint(images, tmp_path):
    network = SingleNetwork(Failing(lambda z: z * math.nan, after=0))
    with pytest.raises(FloatingPointError, match="There is no checkpoint yet"):
        train(network, TrainingOptions(**STEP), images, tmp_path, execution=QUIET)


def interrupting(logits):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("after", "told"),
    [(0, "interrupted; given again, the same goes on anew"), (3, "goes on from .*00000003.ckpt$")],
)
def test_an_interrupt_is_raised_and_later_ones_are_heard(images, tmp_path, after, told):
    """Lightning by itself ends the process with status 1, and ignores the signal from then on."""
    options = TrainingOptions(epochs=3, batch_size=40, validation=20)
    handler = signal.getsignal(signal.SIGINT)
    network = SingleNetwork(Failing(interrupting, after=after))
    with pytest.raises(KeyboardInterrupt, match=told):
        train(network, options, images, tmp_path, execution=EVERY_STEP)
    assert signal.getsignal(signal.SIGINT) is handler
    whole = SingleNetwork(Failing(lambda z: z, after=0))
    assert train(whole, options, images, tmp_path, execution=EVERY_STEP).finished


@pytest.mark.parametrize(
    ("execution", "changes", "told"),
    [
        pytest.param(
            Execution(accelerator="mps"),
            {},
            "accelerator='mps' with devices=1 cannot be used: ",
            id="accelerator",
            marks=pytest.mark.skipif(torch.backends.mps.is_available(), reason="it is there"),
        ),
        pytest.param(
            QUIET,
            {"compile": "inducter"},
            "compile='inducter' cannot be used: Invalid backend",
            id="backend",
        ),
    ],
)
def test_what_this_machine_cannot_do_is_told(images, tmp_path, execution, changes, told):
    with pytest.raises(ValueError, match=told):
        train(
            SingleNetwork(small()),
            TrainingOptions(**changes),
            images,
            tmp_path / "run",
            execution=execution,
        )
    assert not (tmp_path / "run").exists()


def test_a_test_set_is_not_trained_on(tmp_path):
    test = load_images("digits", "test")
    with pytest.raises(ValueError, match="digits is a test set: nothing is trained on it"):
        train(NetworkOptions(), TrainingOptions(), test, tmp_path, execution=QUIET)
    assert not list(tmp_path.iterdir())


def test_validation_images_are_never_trained_on(images, tmp_path):
    seen = []
    network = SingleNetwork(small())
    network.register_forward_pre_hook(
        lambda module, inputs: seen.append((module.training, inputs[0].clone()))
    )
    options = TrainingOptions(**STEP, augment=None)
    train(network, options, images, tmp_path, execution=QUIET)
    rows = {
        kind: {
            tuple(row.flatten().tolist()) for training, x in seen if training == kind for row in x
        }
        for kind in (True, False)
    }
    assert (len(rows[True]), len(rows[False])) == (80, 20)
    assert not rows[True] & rows[False]


def test_an_objective_of_other_members_is_refused_before_the_folder_is_taken(images, tmp_path):
    """The folder stays free for the run with the right options."""
    options = TrainingOptions(**STEP, objective=Interpolated(0.5))
    network = NetworkOptions(kind="ensemble", members=2, base_channels=2)
    told = (
        "the objective interpolated trains a parent and its subnets, and a network of kind "
        "'ensemble' has none: set kind='subnets' (--network.kind subnets --network.width 2)"
    )
    with pytest.raises(ValueError, match=re.escape(told)):
        train(network, options, images, tmp_path, execution=QUIET)
    with pytest.raises(ValueError, match="no member is named 'parent', as the parent is"):
        train(NamedEnsemble([small()]), options, images, tmp_path, execution=QUIET)
    assert not list(tmp_path.iterdir())


def test_a_network_of_other_classes_is_refused(images, tmp_path):
    with pytest.raises(ValueError, match="the network has 100 classes, and digits has 10"):
        train(NetworkOptions(classes=100), TrainingOptions(), images, tmp_path, execution=QUIET)


# --- whose folder it is ---------------------------------------------------------------------------


def test_a_finished_run_is_returned_and_nothing_is_touched(images, tmp_path):
    network, options = NetworkOptions(base_channels=2), TrainingOptions(**STEP)
    run = train(network, options, images, tmp_path, execution=QUIET)
    assert run.finished
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files(tmp_path)}
    assert train(network, options, images, tmp_path, execution=QUIET) == run
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in files(tmp_path)} == before


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("options", "training.lr: 0.1 there, 0.2 here"),
        ("network", "network.depth: 18 there, 34 here"),
        ("images", "data.sha256: "),
        ("weights", "network.weights: "),
    ],
)
def test_the_folder_of_another_run_is_refused(images, tmp_path, change, told):
    network = NetworkOptions(base_channels=2) if change == "network" else SingleNetwork(small(0))
    options = TrainingOptions(**STEP)
    train(network, options, images, tmp_path, execution=QUIET)
    before = {path: path.read_bytes() for path in files(tmp_path)}
    if change == "network":
        network = NetworkOptions(base_channels=2, depth=34)
    else:
        network = SingleNetwork(small(change == "weights"))
    if change == "options":
        options = TrainingOptions(**STEP, lr=0.2)
    if change == "images":
        images = images.select(range(99))
    with pytest.raises(ValueError, match="belongs to another run, which differs in") as caught:
        train(network, options, images, tmp_path, execution=QUIET)
    assert told in str(caught.value)
    assert {path: path.read_bytes() for path in files(tmp_path)} == before


def test_a_folder_of_other_things_is_refused(images, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"holds 'thesis\.tex' and no options\.json"):
        train(NetworkOptions(), TrainingOptions(), images, tmp_path, execution=QUIET)
    assert [path.name for path in files(tmp_path)] == ["thesis.tex"]


def test_two_processes_do_not_train_in_one_folder(images, tmp_path):
    with (
        RunFolder(tmp_path, {}).locked(),
        pytest.raises(RuntimeError, match="another process is training in"),
    ):
        train(NetworkOptions(), TrainingOptions(), images, tmp_path, execution=QUIET)


def test_a_run_goes_on_only_with_the_devices_it_began_with(images, tmp_path):
    options = TrainingOptions(**STEP)
    failing = SingleNetwork(Failing(lambda z: z * math.nan, after=1))
    with pytest.raises(FloatingPointError):
        train(failing, options, images, tmp_path, execution=EVERY_STEP)
    path = tmp_path / "checkpoints" / "step_00000001.ckpt"
    content = torch.load(path, weights_only=True)
    content["ensembles"]["generators"] *= 2
    torch.save(content, path)
    again = SingleNetwork(Failing(lambda z: z, after=1))
    with pytest.raises(ValueError, match="the run began on 2 devices and cannot go on"):
        train(again, options, images, tmp_path, execution=EVERY_STEP)


def test_a_checkpoint_of_another_architecture_names_the_first_keys(images, tmp_path):
    """The folder's options cannot say what changed in the code of a network."""
    options = TrainingOptions(**STEP)
    failing = SingleNetwork(Failing(lambda z: z * math.nan, after=1))
    with pytest.raises(FloatingPointError):
        train(failing, options, images, tmp_path, execution=EVERY_STEP)
    path = tmp_path / "checkpoints" / "step_00000001.ckpt"
    content = torch.load(path, weights_only=True)
    moved = content["state_dict"].pop("network.network.network.0.weight")
    content["state_dict"]["network.network.network.0.kernel"] = moved
    torch.save(content, path)
    again = SingleNetwork(Failing(lambda z: z, after=1))
    with pytest.raises(ValueError, match="the checkpoint is of another architecture") as caught:
        train(again, options, images, tmp_path, execution=EVERY_STEP)
    assert "network.network.0.weight  (4, 3, 3, 3) in the network, missing in" in str(caught.value)
