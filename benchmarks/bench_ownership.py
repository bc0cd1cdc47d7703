"""Ownership of ResNet-18 with 4 members, in passes of the model; the goal is at most 6."""

import torch
from torchvision.models import resnet18

from ensembles import assert_ownership, measure_ownership_map

MEMBERS = 4


def test_bench_ownership_in_forward_and_backward_passes(side_by_side):
    members = [resnet18(num_classes=10) for _ in range(MEMBERS)]
    batch = torch.randn(2, 3, 64, 64)

    def ownership() -> None:
        assert_ownership(measure_ownership_map(members, batch), "independent")

    def forward_and_backward() -> None:
        sum(member(batch).square().sum() for member in members).backward()
        for member in members:
            member.zero_grad()

    side_by_side(ownership, forward_and_backward, rounds=5, what="ownership against one pass")
    assert all(parameter.grad is None for member in members for parameter in member.parameters())
