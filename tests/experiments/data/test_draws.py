"""Random numbers as pure functions of a key."""

import numpy as np
import pytest
import torch

from ensembles.experiments.data.draws import normals, permutation, words


def test_draws_are_the_same_on_every_machine():
    # Recorded once: a run that is repeated years later sees the same batches.
    found = words(2, "order", 0, 3, "member_0").tolist()
    assert found == [2239245971898465908, 17533830379066632807]
    assert permutation(8, "order", 0).tolist() == [6, 3, 4, 0, 1, 7, 2, 5]
    expected = [0.2351428003768563, -0.5113237117708774]
    assert normals(2, "noise", 7, 11).tolist() == pytest.approx(expected, rel=1e-12, abs=0)


def test_more_draws_begin_with_the_fewer():
    assert np.array_equal(words(1000, "a")[:10], words(10, "a"))
    assert np.array_equal(normals(1000, "a")[:10], normals(10, "a"))


def test_keys_that_could_be_confused_give_other_draws():
    keys = [(1,), (1, 0), (0, 1), ("1",), (1, ""), ("1", 0), ("10",), (10,), (2**32,), (0, 0, 1)]
    keys += [(-1,), ("a", "b"), ("ab",), ("a, b",), ("a', 'b",)]
    assert len({words(1, *key).item() for key in keys}) == len(keys)


def test_numbers_of_every_kind_of_integer_are_the_same_key():
    assert words(1, np.int64(3)) == words(1, 3) == words(1, torch.tensor(3))


def test_a_key_that_is_no_integer_is_refused():
    with pytest.raises(TypeError):
        words(1, 0.5)


def test_global_generators_are_neither_read_nor_moved():
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = permutation(50, "x"), normals(50, "x")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    torch.manual_seed(2)
    np.random.seed(2)
    assert torch.equal(permutation(50, "x"), first[0])
    assert np.array_equal(normals(50, "x"), first[1])


def test_orders_are_uniform():
    # 6000 draws of the 6 orders of 3: chi-square with 5 degrees of freedom, 99.99 % below 25.7.
    counts = torch.zeros(3, 3, 3)
    for key in range(6000):
        counts[tuple(permutation(3, "uniform", key).tolist())] += 1
    seen = counts[counts > 0]
    assert len(seen) == 6
    assert ((seen - 1000) ** 2 / 1000).sum() < 25.7


def test_normals_have_mean_zero_and_variance_one():
    drawn = normals(100_000, "normal")
    assert abs(drawn.mean()) < 4 / 100_000**0.5
    assert abs(drawn.var() - 1) < 4 * (2 / 100_000) ** 0.5
