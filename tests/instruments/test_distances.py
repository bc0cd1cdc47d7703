import math

import pytest
import torch

from ensembles.instruments.distances import distance

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("one", "two", "by"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.0], [1.5, 0.0], 2.0),
        ([1.0, NAN], [1.0, NAN], 0.0),
        ([1.0, NAN], [1.25, NAN], 0.25),
        ([1.0, NAN], [1.0, 3.0], INF),
        ([1.0, INF], [1.0, INF], 0.0),
        ([1.0, INF], [1.5, INF], 0.5),
        ([1.0, INF], [1.0, -INF], INF),
        ([0.0, 0.0], [-0.0, 0.0], 0.0),
        ([2.0**-140], [0.0], 2.0**-140),
        ([3e38], [-3e38], 6e38),
    ],
)
def test_the_greatest_difference_is_found(one, two, by):
    expected = pytest.approx(by, rel=1e-6, abs=1e-46)
    assert distance(torch.tensor(one), torch.tensor(two)) == expected
    assert distance(torch.tensor(two), torch.tensor(one)) == expected


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.complex64, torch.int64, torch.bool]
)
def test_every_type_is_compared(dtype):
    one, two = torch.tensor([0, 1], dtype=dtype), torch.tensor([1, 1], dtype=dtype)
    assert distance(one, two) == 1.0
    assert distance(one, one.clone()) == 0.0


def test_what_cannot_be_compared_differs():
    assert distance(torch.ones(2), torch.ones(2, dtype=torch.float64)) == INF
    assert distance(torch.ones(2), None) == INF
    assert distance(None, None) == 0.0
    assert distance(torch.eye(2).to_sparse(), 3 * torch.eye(2)) == 2.0
