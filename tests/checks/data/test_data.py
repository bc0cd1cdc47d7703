import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from ensembles import Subject, check_ensemble
from ensembles.case import Case
from ensembles.checks.data.claim import DataClaim
from ensembles.checks.data.judgement import (
    assert_members_bagged,
    assert_members_paired,
    assert_members_shuffled,
    judge,
)
from ensembles.checks.data.measurement import measure_member_data
from ensembles.claims import ClaimError
from ensembles.findings import Count

SIZE = 200


def bootstrap(member: int, size: int = SIZE):
    return np.random.default_rng([7, member]).integers(size, size=size)


def order(member: int):
    return torch.randperm(SIZE, generator=torch.Generator().manual_seed(member))


def loader(member: int, *, seed: int | None = None) -> DataLoader:
    data = TensorDataset(torch.arange(SIZE).float().view(-1, 2), torch.arange(SIZE // 2) % 3)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(data, batch_size=7, shuffle=True, generator=generator)


def message(assertion, data, members=3, **options) -> str:
    with pytest.raises(AssertionError) as broken:
        assertion(measure_member_data(data, members, **options))
    return str(broken.value)


# --- what is claimed holds ----------------------------------------------------------------------


def test_bootstraps_hold():
    measured = measure_member_data(bootstrap, 4)
    assert_members_bagged(measured)
    assert all(abs(distinct / SIZE - 0.632) < 0.1 for distinct in measured.distinct)


@settings(max_examples=40, deadline=None)
@given(st.integers(8, 400), st.integers(8, 400), st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_every_bootstrap_holds_whatever_its_size(seen, size, members, seed):
    generator = np.random.default_rng(seed)
    drawn = {i: generator.integers(size, size=seen) for i in range(members)}
    if len({tuple(sorted(indices)) for indices in drawn.values()}) == members:
        assert_members_bagged(measure_member_data(drawn.__getitem__, members, size=size))


class Redrawn:
    """A sampler that draws a bootstrap whenever it is read, as `RandomSampler` does."""

    def __init__(self, member: int) -> None:
        self.generator = np.random.default_rng([7, member])

    def __iter__(self):
        return iter(self.generator.integers(SIZE, size=SIZE).tolist())


def test_bootstraps_that_are_drawn_anew_in_every_epoch_are_broken(golden):
    golden(message(assert_members_bagged, Redrawn), "messages/data_redrawn.txt")
    sampled = RandomSampler(range(SIZE), replacement=True)
    told = message(assert_members_bagged, lambda member: sampled if member else bootstrap(0))
    assert "draw anew in every epoch" in told
    assert "member 0" not in told


def test_a_bootstrap_whose_last_batch_is_left_out_holds():
    data = TensorDataset(torch.arange(1000.0)[:, None])
    kept = [bootstrap(member, size=1000) for member in range(3)]

    def loader_of(member):
        subset = Subset(data, kept[member].tolist())
        return DataLoader(subset, batch_size=64, shuffle=True, drop_last=True)

    assert_members_bagged(measure_member_data(loader_of, 3, size=1000))


def test_bootstraps_in_other_orders_and_what_is_read_once_hold():
    def reordered(member):
        subset = TensorDataset(torch.from_numpy(bootstrap(member)).double())
        return DataLoader(subset, batch_size=9, shuffle=True)

    assert_members_bagged(measure_member_data(reordered, 3, size=SIZE))
    assert_members_bagged(measure_member_data(lambda member: iter(bootstrap(member)), 3))


def test_indices_come_in_every_form():
    forms = {
        "range": range(20),
        "tensor": torch.arange(20),
        "array": np.arange(20),
        "sampler": SequentialSampler(range(20)),
        "batches": BatchSampler(SequentialSampler(range(20)), 6, drop_last=False),
        "tensors": torch.arange(20).split(3),
        "iterator": iter(range(20)),
    }
    assert_members_paired(measure_member_data(forms.__getitem__, list(forms)))


def test_one_loader_for_all_is_paired_by_content():
    measured = measure_member_data(lambda member: loader(member, seed=0), 3)
    assert measured.by_content
    assert measured.distinct == (100, 100, 100)
    assert_members_paired(measured)


def test_loaders_are_read_from_the_present_seed():
    measured = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        measured.append(measure_member_data(lambda member: torch.randint(90, (90,)), 3))
    assert measured[0] == measured[1]


def test_loaders_that_shuffle_by_themselves_are_shuffled():
    assert_members_shuffled(measure_member_data(loader, 3))
    assert_members_shuffled(measure_member_data(order, 3))
    assert_members_shuffled(measure_member_data(lambda member: RandomSampler(range(50)), 2))


# --- and is broken ------------------------------------------------------------------------------


def test_one_bootstrap_for_all_is_broken(golden):
    told = message(assert_members_bagged, lambda member: bootstrap(0))
    golden(told, "messages/data_same_bootstrap.txt")


def test_a_bootstrap_in_another_order_is_the_same_bootstrap():
    def data(member):
        return np.random.default_rng(member).permutation(bootstrap(0))

    assert "the same 200 samples in another order" in message(assert_members_bagged, data)


def test_samples_without_replacement_are_no_bootstrap(golden):
    def data(member):
        return order(member)[:150]

    told = message(assert_members_bagged, data, size=SIZE)
    golden(told, "messages/data_no_replacement.txt")


def test_bootstraps_that_overlap_too_much_are_broken():
    def data(member):
        return [*bootstrap(0)[:180], *bootstrap(member)[180:]]

    told = message(assert_members_bagged, data)
    assert "members 0, 1   expected" in told
    assert "in common" in told


def test_paired_members_that_shuffle_are_broken(golden):
    told = message(assert_members_paired, loader)
    assert "the same samples in another order" in told
    golden(message(assert_members_paired, order), "messages/data_not_paired.txt")


def test_a_sample_that_is_missing_is_not_paired():
    told = message(assert_members_paired, lambda member: range(20 - member), 2)
    assert "members 0, 1   other samples, from sample 19 on" in told


def test_shuffled_members_in_one_order_are_broken(golden):
    told = message(assert_members_shuffled, lambda member: order(0))
    golden(told, "messages/data_one_order.txt")


def test_shuffled_members_that_lose_samples_are_broken():
    told = message(assert_members_shuffled, lambda member: order(member)[:199], 2)
    assert "see different samples" in told
    assert "198 distinct samples in common, of 199 and 199" in told


# --- findings -----------------------------------------------------------------------------------


def test_several_kinds_are_told_together_as_data():
    """Members 0 and 1 have one bootstrap, and member 2 draws without replacement."""
    drawn = [bootstrap(0), bootstrap(0), order(2)]
    findings = judge(measure_member_data(drawn.__getitem__, 3), DataClaim("bagged"))
    assert findings.claim == "members 0, 1, 2 are claimed bagged, but see the same samples"
    assert findings.kinds == ("same samples", "no bootstrap")
    same, share = findings
    assert (same.members, same.found) == (("0", "1"), "the same 200 samples in the same order")
    assert (share.place, share.expected, share.found, share.amount) == (
        "member 2",
        "63.3% of the 200 samples",
        "100.0%",
        1.0,
    )
    assert findings.affected == (
        Count(1, "pair of members", of=3),
        Count(1, "member", of=3),
    )


# --- workers ------------------------------------------------------------------------------------


class Noisy(torch.utils.data.Dataset):
    """Samples with noise, from a generator of the data set or from the global one."""

    def __init__(self, generator=None) -> None:
        self.generator = generator

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        return index + torch.rand(2, generator=self.generator)


def noisy(generator=None, **options):
    def of_member(member):
        own = None if generator is None else torch.Generator().manual_seed(generator)
        paired = torch.Generator().manual_seed(0)
        return DataLoader(Noisy(own), batch_size=3, generator=paired, **options)

    return of_member


two_workers = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@two_workers
@pytest.mark.parametrize("workers", [1, 2])
def test_members_that_augment_alike_are_paired(workers):
    measured = measure_member_data(noisy(num_workers=workers))
    assert measured.repeated == ()
    assert_members_paired(measured)


@two_workers
def test_workers_that_copy_one_generator_are_broken(golden):
    text = message(assert_members_paired, noisy(3, num_workers=2), 2)
    golden(text, "messages/data_one_stream.txt")
    measured = measure_member_data(noisy(3, num_workers=2))
    assert "member 0   dataset.generator" in str(measured)
    for relation in ("bagged", "shuffled"):
        assert "one stream" in judge(measured, DataClaim(relation)).kinds


@two_workers
def test_one_worker_that_begins_anew_in_every_epoch_is_broken():
    measured = measure_member_data(noisy(3, num_workers=1))
    stream = ("dataset.generator", ("epoch 0 worker 0", "epoch 1 worker 0"))
    assert ("0", stream) in measured.repeated


def seed_with_a_constant(worker: int) -> None:
    torch.manual_seed(0)


@two_workers
def test_a_worker_that_is_seeded_with_a_constant_is_told_as_that():
    loaders = noisy(num_workers=1, worker_init_fn=seed_with_a_constant)
    told = " ".join(message(assert_members_paired, loaders, 2).split())
    assert "Usual cause: a worker_init_fn that seeds with a constant" in told


class Unending(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(torch.rand(12, 2))


@two_workers
def test_of_workers_a_part_is_looked_at_and_the_result_says_so():
    told = "sample of data sets, for workers' streams"
    measured = measure_member_data(noisy(num_workers=1))
    assert measured.looked_at == (Count(8, told, of=24),)

    def mixed(member):
        return DataLoader(Unending(), num_workers=1) if member else noisy(num_workers=1)(0)

    measured = measure_member_data(mixed)
    assert measured.looked_at == (Count(1, "pool of workers", of=2), Count(4, told, of=12))
    assert measure_member_data(noisy()).looked_at == ()


# --- subjects and fixture -----------------------------------------------------------------------


def subject(claim, data, make=lambda: [nn.Linear(2, 2) for _ in range(3)]) -> Subject:
    return Subject(make=make, data=data, claims={"data": claim})


def test_a_claim_of_data_is_checked_for_a_subject():
    def status(*given):
        (result,) = (r for r in check_ensemble(subject(*given)) if r.claim)
        return result.status, result.found

    assert status("bagged", bootstrap)[0] == "held"
    assert status("bagged", lambda member: bootstrap(0))[0] == "broken"
    assert status("shuffled", order)[0] == "held"
    names = {"a": 1, "b": 2}
    named = {name: nn.Linear(2, 2) for name in names}
    assert status("paired", lambda member: [names[member]], lambda: named)[0] == "broken"
    assert status("bagged", None)[0] == "error"
    assert "has no data: give Subject(data=...)" in status("bagged", None)[1]
    with pytest.raises(ClaimError, match="It can be: bagged, paired or shuffled"):
        status("drawn", order)


class Packed(nn.Module):
    """Two members in one module, which only a call tells apart."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x):
        return [self.norm(x), self.norm(x)]


def test_members_that_a_call_tells_apart_are_counted_and_the_call_leaves_no_trace():
    case = Case.of(Packed(), torch.randn(3, 2), data=bootstrap)
    before = case.digest()
    measured = measure_member_data(case)
    assert measured.members == ("0", "1")
    assert case.is_as(before)


def test_the_fixture_asserts_all_three(member_data):
    member_data.assert_bagged(bootstrap, 3)
    member_data.assert_shuffled(order, 3)
    member_data.assert_paired(lambda member: order(0), 3)
    with pytest.raises(AssertionError, match="claimed bagged"):
        member_data.assert_bagged(order, 3)
    with pytest.raises(AssertionError, match="claimed paired"):
        member_data.assert_paired(order, 3)
    with pytest.raises(AssertionError, match="orders of their own"):
        member_data.assert_shuffled(lambda member: order(0), 3)


# --- wrong use ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "members", "told"),
    [
        ([1, 2], 2, "an object of type list"),
        (order, 1, "1 was given"),
        (lambda member: [], 2, "member 0 sees no samples"),
        (lambda member: 1, 2, r"data\(0\) raised TypeError"),
        (lambda member: ["text"], 2, "neither an index nor a batch with tensors"),
    ],
    ids=["list", "one_member", "nothing", "not_iterable", "text"],
)
def test_what_cannot_be_read_is_an_error(data, members, told):
    with pytest.raises(ValueError, match=told):
        measure_member_data(data, members)


def test_data_without_an_end_are_an_error(monkeypatch):
    monkeypatch.setattr("ensembles.checks.data.samples.MOST", 50)
    with pytest.raises(ValueError, match="have not ended after 50 samples"):
        measure_member_data(lambda member: iter(int, 1), 2)


def test_too_few_samples_are_an_error():
    few = measure_member_data(lambda member: [member, 1, 2], 2)
    with pytest.raises(ValueError, match="cannot be told from fewer than 8"):
        assert_members_bagged(few)
    with pytest.raises(ValueError, match="agree by chance"):
        assert_members_shuffled(few)


def test_looking_changes_nothing():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    measure_member_data(loader, 2)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
