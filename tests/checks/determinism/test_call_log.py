import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ensembles.checks.determinism.call_log import CallLog, first_unlike


def names(log: CallLog) -> list[str]:
    return [name for name, _ in log.calls]


def scaled(x: torch.Tensor) -> torch.Tensor:
    return x.mul(2)


def test_operations_of_forward_and_backward_are_written_down_with_their_caller():
    weight = torch.ones(2, requires_grad=True)
    with CallLog() as log:
        scaled(weight).sum().backward()
    assert names(log)[0] == "aten::mul in scaled"
    assert names(log).count("aten::mul in scaled") == 1
    assert any(name.startswith("aten::expand") for name in names(log)), "the backward of a sum"


def test_modules_of_pytorch_are_told_by_what_called_them():
    layer = nn.Linear(2, 2)
    with CallLog() as log:
        checkpoint(layer, torch.ones(1, 2), use_reentrant=False)
    test = test_modules_of_pytorch_are_told_by_what_called_them.__name__
    assert f"aten::addmm in {test}" in names(log)


def test_the_same_calls_have_the_same_digests_and_others_have_others():
    logs = []
    for factor in (1.0, 1.0, 1.5):
        with CallLog() as log:
            scaled(torch.full((2,), factor)).add(1)
        logs.append(log.calls)
    assert first_unlike(logs[0], logs[1]) == ""
    caller = test_the_same_calls_have_the_same_digests_and_others_have_others.__name__
    assert first_unlike(logs[0], logs[2]) == f"aten::full in {caller}"


def test_another_order_of_calls_is_told_with_both_names():
    one, two = [("aten::add", "a"), ("aten::mul", "b")], [("aten::mul", "b"), ("aten::add", "a")]
    assert first_unlike(one, two) == "aten::add (in the second run aten::mul)"
    assert first_unlike(one, one[:1]) == ""


def test_memory_that_was_not_written_is_no_result():
    with CallLog() as log:
        torch.empty(3)
        torch.empty_like(torch.ones(3))
    assert [name.partition(" ")[0] for name in names(log)] == ["aten::ones"]


def test_tensors_without_bits_are_left_out():
    with CallLog() as log:
        torch.ones(3, device="meta").add(1)
    assert log.calls == []
