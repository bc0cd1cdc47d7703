import random

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler

from ensembles.checks.determinism.judgement import assert_loader_deterministic
from ensembles.checks.determinism.loaders import measure_loader_determinism

numpy = pytest.importorskip("numpy")

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Augmented(Dataset):
    """Eight samples, or more, each moved by what `draw` returns."""

    def __init__(self, draw, size=8) -> None:
        self.draw = draw
        self.samples = torch.arange(float(size))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.samples[index] + self.draw()


class Sized(Augmented):
    """Samples that are asked for by index and size."""

    def __getitem__(self, index) -> torch.Tensor:
        return super().__getitem__(index[0] if isinstance(index, tuple) else index)


class Held(Augmented):
    """A generator made with the data set, behind augmentation that is healthy."""

    def __init__(self, rng) -> None:
        super().__init__(lambda: rng.random() + float(torch.rand(())))
        self.rng = rng


def from_torch() -> float:
    return float(torch.rand(()))


def from_numpy() -> float:
    return float(numpy.random.rand())


def flipped() -> float:
    return float(torch.rand(()) < 0.5)


def nothing() -> float:
    return 0.0


def seed_zero(worker: int) -> None:
    numpy.random.seed(0)


def seed_worker(worker: int) -> None:
    numpy.random.seed(worker)


def seed_held(worker: int) -> None:
    torch.utils.data.get_worker_info().dataset.rng.seed(torch.initial_seed())


class Loader:
    """Builds a loader; what is not said is ordinary."""

    def __init__(self, dataset, **options) -> None:
        self.dataset = dataset
        self.options = {"batch_size": 4, "shuffle": True, "num_workers": 2, **options}

    def __call__(self) -> DataLoader:
        return DataLoader(self.dataset(), **self.options)


def assert_loader(make, **more) -> None:
    assert_loader_deterministic(measure_loader_determinism(make), **more)


# --- it holds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [from_numpy, flipped])
def test_streams_that_pytorch_seeds_are_of_their_own(draw):
    measured = measure_loader_determinism(Loader(lambda: Augmented(draw)))
    assert_loader_deterministic(measured)
    assert "the augmented samples" in measured.random
    assert not measured.repeated


def test_persistent_workers_hold():
    assert_loader(Loader(lambda: Augmented(from_torch), persistent_workers=True))


def test_a_loader_without_workers_holds():
    assert_loader(Loader(lambda: Augmented(from_torch), num_workers=0))


def test_a_held_generator_that_each_worker_seeds_anew_holds():
    assert_loader(Loader(lambda: Held(random.Random(0)), worker_init_fn=seed_held))


def test_data_that_is_not_augmented_holds_where_that_is_said():
    assert_loader(Loader(lambda: Augmented(nothing)), augmented=False)


def test_a_plain_iterable_can_be_compared_without_augmentation():
    assert_loader(lambda: [torch.ones(2), torch.zeros(2)], augmented=False)


class Rows(DistributedSampler):
    """The share of the first of two processes; `epoch` is told where an epoch ends."""

    def __init__(self, *, shuffle=True, told=False, size=16) -> None:
        super().__init__(range(size), num_replicas=2, rank=0, shuffle=shuffle)
        self.told = told

    def __iter__(self):
        yield from super().__iter__()
        if self.told:
            self.set_epoch(self.epoch + 1)


def sampled(sampler, dataset=Augmented):
    """Builds a loader, with a sampler that is built anew too."""
    return lambda: DataLoader(dataset(from_torch, 16), batch_size=2, sampler=sampler())


def test_a_shuffle_that_is_told_the_epoch_holds():
    measured = measure_loader_determinism(sampled(lambda: Rows(told=True)))
    assert (measured.shuffled, measured.one_order) == (True, False)
    assert_loader_deterministic(measured)


@pytest.mark.parametrize(
    ("sampler", "dataset"),
    [
        (lambda: Rows(shuffle=False), Augmented),
        (lambda: Rows(shuffle=False, size=15), Augmented),
        (lambda: [(3, "small"), (2, "large"), (1, "small"), (0, "large")], Sized),
    ],
    ids=["a share", "a share that begins anew", "no indices"],
)
def test_samples_in_order_hold(sampler, dataset):
    measured = measure_loader_determinism(sampled(sampler, dataset))
    assert (measured.shuffled, measured.one_order) == (False, True)
    assert_loader_deterministic(measured)


# --- it breaks ------------------------------------------------------------------------------------


def test_a_generator_held_by_the_data_set_is_broken(golden):
    with pytest.raises(AssertionError) as broken:
        assert_loader(Loader(lambda: Held(numpy.random.default_rng(0))))
    golden(str(broken.value), "messages/loading_held_generator.txt")


def test_every_kind_of_generator_is_found_behind_healthy_augmentation():
    held = [random.Random(0), numpy.random.RandomState(0), numpy.random.default_rng(0)]

    def draw() -> float:
        return sum(rng.random() for rng in held) + from_torch()

    measured = measure_loader_determinism(Loader(lambda: Augmented(draw)))
    names = {f"dataset.draw.held[{i}]" for i in range(3)}
    assert {what for what, _ in measured.repeated} == names


def test_one_seed_in_every_worker_is_broken(golden):
    with pytest.raises(AssertionError) as broken:
        assert_loader(Loader(lambda: Augmented(from_numpy), worker_init_fn=seed_zero))
    golden(str(broken.value), "messages/loading_same_seed.txt")


def test_a_shuffle_that_is_not_told_the_epoch_is_broken(golden):
    make = sampled(Rows)
    assert_loader(make, augmented=False)
    with pytest.raises(AssertionError) as broken:
        assert_loader(make)
    golden(str(broken.value), "messages/loading_one_order.txt")
    assert "shuffled once for all epochs" in str(measure_loader_determinism(make))


def test_the_worker_number_as_a_seed_repeats_in_every_epoch():
    measured = measure_loader_determinism(
        Loader(lambda: Augmented(from_numpy), worker_init_fn=seed_worker)
    )
    places = [places for what, places in measured.repeated if what == "the augmented samples"]
    assert places == [
        ("epoch 0 worker 0", "epoch 1 worker 0"),
        ("epoch 0 worker 1", "epoch 1 worker 1"),
    ]


def test_batches_that_do_not_repeat_under_the_seed_are_broken(golden):
    with pytest.raises(AssertionError) as broken:
        assert_loader(Loader(lambda: Held(numpy.random.default_rng()), num_workers=0))
    golden(str(broken.value), "messages/loading_unseeded.txt")


def test_a_shuffle_with_a_generator_of_its_own_is_broken():
    generator = torch.Generator()
    with pytest.raises(AssertionError, match="batches are claimed to repeat from seed"):
        assert_loader(
            Loader(lambda: Augmented(nothing), generator=generator, num_workers=0),
            augmented=False,
        )


def test_a_pass_that_ends_early_is_broken():
    lengths = iter([3, 2, 3])
    with pytest.raises(AssertionError, match="2 of 6 batches"):
        assert_loader(lambda: [torch.ones(1)] * next(lengths), augmented=False)


# --- wrong use ------------------------------------------------------------------------------------


def test_claimed_augmentation_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="4 samples were the same each of 6 times"):
        assert_loader(Loader(lambda: Augmented(nothing), num_workers=0))


def test_a_stream_of_data_cannot_be_asked_twice():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(torch.arange(4.0))

    with pytest.raises(ValueError, match="an IterableDataset"):
        assert_loader(lambda: DataLoader(Stream()))
    assert_loader(lambda: DataLoader(Stream()), augmented=False)


def test_a_loader_in_place_of_a_function_is_an_error():
    with pytest.raises(ValueError, match="give a function that builds it"):
        measure_loader_determinism(DataLoader(Augmented(nothing)))


def test_no_batches_are_an_error():
    with pytest.raises(ValueError, match="the loader gives no batches"):
        measure_loader_determinism(list)


def test_what_is_no_loader_is_an_error():
    with pytest.raises(ValueError, match="an object of type int, and no loader"):
        measure_loader_determinism(lambda: 3)


def test_one_epoch_is_an_error():
    with pytest.raises(ValueError, match="so give 2 or more"):
        measure_loader_determinism(Loader(lambda: Augmented(nothing)), epochs=1)


# --- looking and fixture --------------------------------------------------------------------------


def test_looking_changes_nothing():
    dataset = Augmented(from_numpy)
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    measure_loader_determinism(Loader(lambda: dataset))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == states[1:]
    assert torch.equal(dataset.samples, torch.arange(8.0))


def test_the_fixture_checks_loaders(seeded_determinism):
    seeded_determinism.assert_loader(Loader(lambda: Augmented(from_torch), num_workers=0))
    with pytest.raises(ValueError, match="claim augmented=False"):
        seeded_determinism.assert_loader(Loader(lambda: Augmented(nothing), num_workers=0))


class Passes(Sampler):
    """Reads all samples in order, several times in each epoch."""

    def __init__(self, size):
        self.size = size

    def __iter__(self):
        for _ in range(3):
            yield from range(self.size)

    def __len__(self):
        return 3 * self.size


def test_several_passes_in_order_are_no_shuffle():
    data = Augmented(lambda: float(torch.rand(())), size=32)
    measured = measure_loader_determinism(lambda: DataLoader(data, 4, sampler=Passes(len(data))))
    assert not measured.shuffled
