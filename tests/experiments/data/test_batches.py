"""Batches: pure functions of seed, epoch, member and image."""

import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

from ensembles.checks.data.judgement import assert_members_paired, assert_members_shuffled
from ensembles.checks.data.measurement import measure_member_data
from ensembles.experiments.data.batches import MemberBatches, evaluation_batches
from ensembles.experiments.data.images import ImageSet
from ensembles.experiments.data.sources import load_images

NAMES = ("member_0", "member_1", "member_2")


def random_images(count=50, size=8, flippable=True):
    generator = torch.Generator().manual_seed(0)
    return ImageSet(
        name="random",
        version="1",
        pixels=torch.randint(
            1, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator
        ),
        labels=torch.arange(count) % 10,
        indices=torch.arange(count),
        classes=tuple("0123456789"),
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        split="train",
        flippable=flippable,
    )


IMAGES = random_images()
CHOICES = [(o, a) for o in ("shared", "own") for a in (None, "shared", "own")]


def batches(**given):
    return MemberBatches(given.pop("images", IMAGES), **{"batch_size": 16, "seed": 3, **given})


def as_dict(value):
    return value if isinstance(value, dict) else dict.fromkeys(NAMES, value)


def equal(one, two):
    one, two = as_dict(one), as_dict(two)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("order", "augment"), CHOICES)
def test_members_get_a_tensor_of_their_own_only_where_something_is_their_own(order, augment):
    x, labels = batches(order=order, augment=augment, members=NAMES).at(0, 0)
    assert isinstance(labels, dict) == (order == "own")
    assert isinstance(x, dict) == ("own" in (order, augment))
    for value, shape, dtype in ((x, (16, 3, 8, 8), torch.float32), (labels, (16,), torch.int64)):
        for tensor in as_dict(value).values():
            assert tensor.shape == shape
            assert tensor.dtype == dtype


@pytest.mark.parametrize(("order", "augment"), CHOICES)
@pytest.mark.parametrize("drop_last", [False, True])
def test_any_step_is_that_of_the_run_that_was_not_interrupted(order, augment, drop_last):
    more = {"order": order, "augment": augment, "members": NAMES, "drop_last": drop_last}
    whole = [batch for epoch in range(3) for batch in batches(**more).epoch(epoch)]
    steps = len(batches(**more))
    assert len(whole) == 3 * steps
    for epoch, step in [(2, 1), (0, 2), (1, 0), (2, steps - 1), (1, steps - 1)]:
        torch.manual_seed(step)
        x, labels = batches(**more).at(epoch, step)
        assert equal(x, whole[epoch * steps + step][0])
        assert equal(labels, whole[epoch * steps + step][1])
    resumed = list(batches(**more).epoch(1, start=2))
    assert len(resumed) == steps - 2
    assert all(
        equal(a[0], b[0]) for a, b in zip(resumed, whole[steps + 2 : 2 * steps], strict=True)
    )


def test_global_generators_are_not_moved():
    state = torch.get_rng_state()
    list(batches(order="own", augment="own", members=NAMES).epoch(0))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("order", ["shared", "own"])
def test_an_epoch_shows_every_image_once_with_its_label(order):
    made = batches(order=order, members=NAMES)
    assert len(made) == 4
    parts = list(made.epoch(0))
    assert [len(as_dict(labels)["member_0"]) for _, labels in parts] == [16, 16, 16, 2]
    for name in NAMES:
        rows = made.order_of(0, name)
        assert sorted(rows.tolist()) == list(range(50))
        assert torch.equal(torch.cat([as_dict(x)[name] for x, _ in parts]), IMAGES.normalised(rows))
        assert torch.equal(torch.cat([as_dict(y)[name] for _, y in parts]), IMAGES.labels[rows])


def test_shared_orders_are_paired_and_own_orders_are_shuffled_and_a_check_tells():
    shared, own = (batches(order=order, members=NAMES) for order in ("shared", "own"))
    paired, shuffled = (
        measure_member_data(lambda name, made=made: made.order_of(2, name), NAMES)
        for made in (shared, own)
    )
    assert_members_paired(paired)
    assert_members_shuffled(shuffled)
    with pytest.raises(AssertionError, match="claimed paired"):
        assert_members_paired(shuffled)
    with pytest.raises(AssertionError, match="claimed to see the same samples in orders of their"):
        assert_members_shuffled(paired)


@pytest.mark.parametrize(("augment", "paired"), [("shared", True), ("own", False)])
def test_the_images_themselves_are_paired_where_augmentation_is_shared(augment, paired):
    made = batches(augment=augment, members=NAMES)

    def seen(name):
        return [[as_dict(x)[name], labels] for x, labels in made.epoch(0)]

    measured = measure_member_data(seen, NAMES)
    assert measured.by_content
    if paired:
        assert_members_paired(measured)
    else:
        with pytest.raises(AssertionError, match="other samples"):
            assert_members_paired(measured)


def test_shared_augmentation_shows_an_image_alike_in_whatever_order():
    made = batches(order="own", augment="shared", members=NAMES)

    def images(name):
        x = torch.cat([as_dict(x)[name] for x, _ in made.epoch(1)])
        return x[made.order_of(1, name).argsort()]

    first = images("member_0")
    assert all(torch.equal(first, images(name)) for name in NAMES[1:])
    assert not torch.equal(first, IMAGES.normalised())


def test_a_member_alone_sees_what_it_sees_in_the_ensemble():
    more = {"order": "own", "augment": "own"}
    x, labels = batches(members=NAMES, **more).at(4, 2)
    alone, answers = batches(members=["member_1"], **more).at(4, 2)
    assert torch.equal(alone["member_1"], x["member_1"])
    assert torch.equal(answers["member_1"], labels["member_1"])


def test_epochs_and_seeds_differ():
    orders = [batches(seed=seed).order_of(epoch) for seed in (0, 1) for epoch in range(3)]
    assert len({tuple(order.tolist()) for order in orders}) == 6
    augmented = [batches(seed=seed, augment="shared") for seed in (0, 1)]
    images = [
        torch.cat([x for x, _ in made.epoch(epoch)])[made.order_of(epoch).argsort()]
        for made in augmented
        for epoch in range(3)
    ]
    assert len({image.numpy().tobytes() for image in images}) == 6


def windows(image, padding):
    """Every window of the padded image, and its mirror: the definition, one by one."""
    size = image.shape[-1]
    padded = F.pad(image, (padding,) * 4)
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            cut = padded[:, top : top + size, left : left + size]
            yield (top, left, False), cut
            yield (top, left, True), cut.flip(-1)


@pytest.mark.parametrize("flippable", [True, False])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_an_augmented_image_is_a_window_mirrored_where_that_keeps_the_label(flippable, padding):
    images = random_images(400, size=4, flippable=flippable)
    made = MemberBatches(images, batch_size=400, seed=0, augment="shared", padding=padding)
    x, _ = made.at(0, 0)
    drawn = []
    for row, found in zip(made.order_of(0).tolist(), x, strict=True):
        fitting = [
            choice
            for choice, window in windows(images.normalised([row])[0], padding)
            if torch.equal(window, found)
        ]
        assert fitting
        drawn.append(fitting[0])
    # all are drawn, and about equally often: six standard deviations of each part
    for part, choices in ((0, 2 * padding + 1), (1, 2 * padding + 1), (2, 1 + flippable)):
        values = [choice[part] for choice in drawn]
        expected = 400 / choices
        for value in range(choices):
            assert abs(values.count(value) - expected) <= 6 * (expected * (1 - 1 / choices)) ** 0.5
        assert len(set(values)) == choices


def test_the_window_and_the_mirror_are_drawn_independently():
    images = random_images(4000, size=4)
    made = MemberBatches(images, batch_size=4000, seed=0, augment="shared")
    made = replace_padding(made, 2)
    top, left, mirrored = (values.double() for values in made._window(0, ""))
    correlations = torch.corrcoef(torch.stack([top, left, mirrored, made.order_of(0).double()]))
    assert correlations.fill_diagonal_(0).abs().max() < 6 / 4000**0.5


def replace_padding(made, padding):
    return MemberBatches(
        made.images, batch_size=made.batch_size, seed=made.seed, augment="shared", padding=padding
    )


def test_digits_are_moved_by_one_pixel_and_never_mirrored():
    digits = load_images("digits", "train").select(slice(0, 100))
    made = MemberBatches(digits, batch_size=100, seed=0, augment="shared")
    assert made.padding == 1
    x, _ = made.at(0, 0)
    black = replace(digits, mean=(0.0,) * 3, std=(1.0,) * 3)
    plain = MemberBatches(black, batch_size=100, seed=0, augment="shared").at(0, 0)[0]
    for row, found in zip(made.order_of(0).tolist(), plain, strict=True):
        unmirrored = [w for (_, _, m), w in windows(black.normalised([row])[0], 1) if not m]
        assert any(torch.equal(window, found) for window in unmirrored)
    # padded with black before normalisation, as torchvision's RandomCrop on images does
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (digits.mean, digits.std))
    torch.testing.assert_close(x, (plain - mean) / std)
    assert MemberBatches(random_images(10, 32), batch_size=2, seed=0).padding == 4


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(1, 6),
    st.booleans(),
    st.sampled_from(CHOICES),
)
def test_replicas_divide_each_batch_into_equal_parts(count, replicas, each, drop_last, choice):
    images = random_images(40).select(slice(0, count))
    size = replicas * each
    used = count - (count % size if drop_last else count % size % replicas)
    more = {"order": choice[0], "augment": choice[1], "members": NAMES, "drop_last": drop_last}
    more |= {"images": images, "batch_size": size, "replicas": replicas}
    if not used:
        with pytest.raises(ValueError, match="do not fill one batch"):
            batches(**more)
        return
    parts = [batches(replica=replica, **more) for replica in range(replicas)]
    rows = {name: [] for name in NAMES}
    for step in range(len(parts[0])):
        found = [part.at(1, step) for part in parts]
        assert len({len(as_dict(labels)["member_0"]) for _, labels in found}) == 1
        for replica, (x, labels) in enumerate(found):
            own = as_dict(parts[replica].rows(1, step))
            for name in NAMES:
                assert len(own[name]) > 0
                rows[name] += own[name].tolist()
                assert torch.equal(as_dict(labels)[name], images.labels[own[name]])
                assert len(as_dict(x)[name]) == len(own[name])
    for name in NAMES:
        assert sorted(rows[name]) == sorted(parts[0].order_of(1, name).tolist())
        assert len(set(rows[name])) == len(rows[name]) == used


def test_replicas_see_together_what_one_device_sees():
    more = {"order": "own", "augment": "own", "members": NAMES}
    x, labels = batches(**more).at(0, 1)
    halves = [batches(replica=r, replicas=2, **more).at(0, 1) for r in (0, 1)]
    for name in NAMES:
        together = torch.stack([half[0][name] for half in halves], 1).flatten(0, 1)
        assert torch.equal(together, x[name])
        answers = torch.stack([half[1][name] for half in halves], 1).flatten()
        assert torch.equal(answers, labels[name])


def test_a_last_batch_is_dropped_only_when_asked_and_another_one_in_every_epoch():
    made = batches(drop_last=True)
    assert [len(labels) for _, labels in made.epoch(0)] == [16, 16, 16]
    left_out = [set(range(50)) - set(made.order_of(epoch).tolist()) for epoch in (0, 1)]
    assert [len(rows) for rows in left_out] == [2, 2]
    assert left_out[0] != left_out[1]


@pytest.mark.parametrize("size", [1, 7, 10, 49, 50, 51])
def test_evaluation_shows_every_image_in_order(size):
    parts = list(evaluation_batches(IMAGES, size))
    assert torch.equal(torch.cat([x for x, _ in parts]), IMAGES.normalised())
    assert torch.equal(torch.cat([labels for _, labels in parts]), IMAGES.labels)
    assert {len(labels) for _, labels in parts[:-1]} <= {size}


def test_evaluation_in_batches_of_nothing_is_refused_at_once():
    with pytest.raises(ValueError, match="batch_size=0: a batch has at least 1 image"):
        evaluation_batches(IMAGES, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"order": "random"}, "order='random' is neither"),
        ({"augment": "none"}, "augment='none' is none of"),
        ({"order": "own"}, "need the names of the members"),
        ({"augment": "own"}, "need the names of the members"),
        ({"members": "member_0"}, "expected a list of names, each once"),
        ({"members": ["a", "a"]}, "expected a list of names, each once"),
        ({"batch_size": 0}, "batch_size=0 cannot be divided between 1 devices"),
        ({"batch_size": 15, "replicas": 2}, "batch_size=15 cannot be divided between 2 devices"),
        ({"replica": 2, "replicas": 2}, "replica=2 of replicas=2: they count from 0"),
        ({"batch_size": 51, "drop_last": True}, "50 images do not fill one batch of 51. Take sm"),
        ({"padding": -1}, "padding=-1"),
    ],
)
def test_choices_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        batches(**given)


@pytest.mark.parametrize("given", [{"batch_size": 16.0}, {"seed": 0.5}, {"seed": None}])
def test_numbers_are_whole(given):
    with pytest.raises(TypeError, match="integer"):
        batches(**given)


def test_steps_and_epochs_that_do_not_exist_are_told():
    made = batches(order="own", members=NAMES)
    for step in (4, -1):
        with pytest.raises(IndexError, match=rf"step {step}: an epoch has the steps 0 to 3"):
            made.at(0, step)
    with pytest.raises(IndexError, match="epoch -1: epochs count from 0"):
        made.at(-1, 0)
    with pytest.raises(ValueError, match=r"no member 'member_7'\. There are member_0, member_1"):
        made.order_of(0, "member_7")


def test_only_one_epoch_is_kept_in_memory():
    made = batches(order="own", augment="own", members=NAMES)
    for epoch in range(5):
        made.at(epoch, 0)
    assert len(made._orders) == len(made._windows) == 3


def test_an_augmented_batch_costs_less_than_a_few_copies_of_it():
    # Side by side in one run: 2 copies here, over 20 with a loop over images.
    images = random_images(2000, size=32)
    made = MemberBatches(images, batch_size=128, seed=0, augment="shared")
    made.at(0, 0)

    def fastest(function):
        times = []
        for step in range(15):
            start = time.perf_counter()
            function(step)
            times.append(time.perf_counter() - start)
        return min(times)

    rows = made.order_of(0)[:128]
    assert fastest(lambda step: made.at(0, step)) < 8 * fastest(
        lambda step: images.normalised(rows)
    )
