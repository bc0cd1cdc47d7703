"""The storage check of 10,000 parameters with 10,000 views into them; the goal is under 1 s."""

import torch
from torch import nn

from ensembles import measure_parameter_sharing

COUNT = 10_000


class Views(nn.Module):
    """A view without the first row and column, for every parameter of another module."""

    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        for name, parameter in parent.named_parameters():
            self.register_parameter(name, nn.Parameter(parameter.detach()[1:, 1:]))


def of_sizes(*sides: int) -> dict[str, nn.Module]:
    memories = (torch.zeros(2 * [sides[i % len(sides)]]) for i in range(COUNT))
    parent = nn.ParameterDict({f"p{i}": nn.Parameter(memory) for i, memory in enumerate(memories)})
    return {"parent": parent, "views": Views(parent)}


def check(benchmark, model: dict[str, nn.Module]) -> None:
    sharing = benchmark.pedantic(measure_parameter_sharing, args=(model,), rounds=5)
    expected = [(side - 1) ** 2 * 4 for side in (len(p) for p in model["parent"].values())]
    assert [memory.bytes for memory in sharing.shared] == expected
    assert len(sharing.between_members) == COUNT


def test_bench_sharing_of_ten_thousand_views(benchmark):
    check(benchmark, of_sizes(4))


def test_bench_sharing_of_ten_thousand_views_of_many_shapes(benchmark):
    check(benchmark, of_sizes(*range(2, 22)))


def test_bench_sharing_of_ten_thousand_parameters_that_share_nothing(benchmark):
    model = [nn.ParameterList(torch.zeros(4, 4) for _ in range(COUNT // 2)) for _ in range(2)]
    sharing = benchmark.pedantic(measure_parameter_sharing, args=(model,), rounds=5)
    assert sharing.shared == ()
