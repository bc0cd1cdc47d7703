"""Each side of the rule, and PyTorch's own word on layouts."""

import pytest
import torch
from torch._prims_common import suggest_memory_format

from ensembles.kernels import BLOCK, is_channels_last, overruns_channels_last

LAST = torch.channels_last


@pytest.mark.parametrize("channels", [1, 2, 7, 8, 15])
@pytest.mark.parametrize("stride", [(2, 2), (1, 2), (2, 1), (3, 3), (2,)])
def test_a_strided_conv_of_few_channels_overruns(channels, stride):
    assert overruns_channels_last(channels, (1,) * len(stride), stride)


@pytest.mark.parametrize(
    "changed",
    [
        {"channels": BLOCK},
        {"channels": 64},
        {"stride": (1, 1)},
        {"kernel_size": (3, 3)},
        {"kernel_size": (1, 3)},
        {"groups": 2},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float64},
        {"device": "cuda"},
    ],
    ids=str,
)
def test_a_conv_that_differs_in_one_thing_does_not(changed):
    conv = {"channels": 4, "kernel_size": (1, 1), "stride": (2, 2)}
    assert overruns_channels_last(**conv)
    assert not overruns_channels_last(**{**conv, **changed})


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.ones(2, 4, 3, 3), False),
        (torch.ones(2, 4, 3, 3).to(memory_format=LAST), True),
        (torch.ones(2, 1, 3, 3), False),
        (torch.ones(2, 1, 3, 3).to(memory_format=LAST), True),
        (torch.ones(2, 4, 1, 1), False),
        (torch.ones(2, 4, 1, 1).to(memory_format=LAST), True),
        (torch.ones(2, 1, 1, 1).to(memory_format=LAST), False),
        (torch.ones(4, 6, 1, 1)[:, :3], False),
        (torch.ones(4, 6, 1, 1).to(memory_format=LAST)[:, :3], True),
        (torch.ones(4, 6, 1, 1).to(memory_format=LAST)[:, :1], True),
        (torch.ones(2, 4, 3, 5).to(memory_format=LAST).transpose(2, 3), False),
        (torch.ones(2, 4, 1, 1).expand(2, 4, 3, 3), False),
        (torch.ones(2, 1, 1, 1).expand(2, 4, 3, 3), False),
        (torch.ones(0, 4, 3, 3).to(memory_format=LAST), False),
        (torch.ones(4, 3, 3).permute(1, 2, 0), False),
    ],
)
def test_a_layout_is_what_pytorch_takes_it_for(x, expected):
    assert is_channels_last(x) is expected
    assert (suggest_memory_format(x) == LAST) is expected
