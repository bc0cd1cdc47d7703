"""Which dtypes take part in a call."""

import torch
from torch import nn

from ensembles.handling.precision import autocasts, dtypes_of


def test_parameters_inputs_and_outputs_take_part_and_buffers_do_not():
    net = nn.Linear(2, 2)
    net.register_buffer("mask", torch.ones(2).half())
    batch = ({"x": torch.ones(1, dtype=torch.float64), "text": "a"}, torch.arange(3), object())
    assert dtypes_of(net, batch) == {torch.float32, torch.float64}
    assert dtypes_of([net.bfloat16()], torch.qint8) == {torch.bfloat16, torch.qint8}


def test_weights_of_eight_bits_are_cast_before_they_compute():
    net = nn.Linear(2, 2)
    net.weight = nn.Parameter(net.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert dtypes_of(net) == {torch.float32}


def test_autocast_around_a_call_takes_part():
    with torch.autocast("cpu", torch.bfloat16):
        assert dtypes_of(nn.Linear(2, 2)) == {torch.float32, torch.bfloat16}
    assert dtypes_of(nn.Linear(2, 2)) == {torch.float32}


def test_autocast_inside_a_call_is_seen_while_it_is_looked_for():
    entered = torch.autocast.__enter__
    with autocasts() as seen, torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert seen == set()
        with torch.autocast("cpu", torch.float16):
            pass
    assert seen == {torch.float16}
    assert torch.autocast.__enter__ is entered
    with torch.autocast("cpu", torch.bfloat16):
        pass
    assert seen == {torch.float16}


def test_looking_for_autocast_changes_no_bits():
    net, x = nn.Linear(8, 8), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        before = net(x)
    with autocasts(), torch.autocast("cpu", torch.bfloat16):
        after = net(x)
    assert after.dtype is torch.bfloat16
    assert torch.equal(before, after)
