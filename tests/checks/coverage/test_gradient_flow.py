import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ensembles.case import Case
from ensembles.checks.coverage.gradient_flow import gradient_flow


class Net(nn.Module):
    def __init__(self, **parts) -> None:
        super().__init__()
        self.trunk, self.head, self.spare = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(1, 1)
        self.mask = nn.Parameter(torch.zeros(4), requires_grad=False)
        self.scale = [torch.ones(2, requires_grad=True)]

    def forward(self, x):
        hidden = self.trunk(x)
        return {"main": self.head(hidden * self.mask) * self.scale[0], "side": hidden.detach()}


def test_what_a_call_reaches_and_what_it_does_not():
    net, weight = Net(), torch.ones(2, requires_grad=True)
    flow = gradient_flow(
        Case.of(net, torch.ones(5, 3), loss=lambda y: (y["main"] * weight).square().sum())
    )
    assert list(flow.lost) == [id(net.scale[0])]
    assert id(weight) in flow.of_loss
    assert flow.without_gradient == ("model.spare.weight", "model.spare.bias")
    assert flow.zero_gradient == ("model.trunk.weight", "model.trunk.bias", "model.head.weight")
    assert flow.unused_members == ()  # what nothing trains is a target, as a teacher's output is


def test_a_trained_output_that_the_loss_does_not_use_is_told():
    class Features(Net):
        def forward(self, x):
            return {**super().forward(x), "side": self.trunk(x)}

    flow = gradient_flow(
        Case.of(Features(), torch.ones(5, 3), loss=lambda y: y["main"].square().sum())
    )
    assert flow.unused_members == ("side",)


def test_a_reentrant_checkpoint_leaves_no_gradient_behind():
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return checkpoint(self[1], self[0](x) * self.scale[0], use_reentrant=True)

    net = Checkpointed(nn.Linear(3, 4), nn.Linear(4, 2))
    net.scale = [torch.ones(4, requires_grad=True)]
    flow = gradient_flow(Case.of(net, torch.ones(5, 3)))
    assert list(flow.lost) == [id(net.scale[0])]
    assert net.scale[0].grad is None
    assert [p.grad for p in net.parameters()] == [None] * 4


def test_a_tied_parameter_has_its_first_name():
    first = nn.Linear(2, 2, bias=False)
    second = nn.Sequential(nn.Linear(2, 2, bias=False))
    second[0].weight = first.weight
    cut = {"a": first, "b": second}
    for member in cut.values():
        member.register_forward_hook(lambda module, args, y: y.detach())
    assert gradient_flow(Case.of(cut, torch.ones(3, 2))).without_gradient == ("a.weight",)
