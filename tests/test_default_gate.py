"""What the gate says of ensembles that claim nothing: one network several times, or members."""

import copy

import pytest
import torch
from torch import nn

from ensembles import Subject, check_ensemble
from ensembles.models import Ensemble, NStreams


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def loaded(state) -> nn.Module:
    model = network()
    model.load_state_dict(state)
    return model


def with_new_head(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    model[3].reset_parameters()
    return model


def seeded(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return network()


def zeros() -> nn.Module:
    layer = nn.Linear(4, 3)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    return layer


class Lora(nn.Module):
    """Hu et al. 2022: at the start every member computes what the frozen network computes."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, 4))
        self.up = nn.Parameter(torch.zeros(3, 2))

    def forward(self, x):
        return self.base(x) + x @ self.down.t() @ self.up.t()


class Averaged(Ensemble):
    def forward(self, *inputs):
        return torch.stack(super().forward(*inputs)).mean(0)


def copies(count: int = 2) -> list[nn.Module]:
    first = network()
    return [first, *(copy.deepcopy(first) for _ in range(count - 1))]


def permuted(first: nn.Module) -> nn.Module:
    second, order = copy.deepcopy(first), torch.randperm(8)
    with torch.no_grad():
        for layer in second[:2]:
            layer.weight.copy_(layer.weight[order]), layer.bias.copy_(layer.bias[order])
        second[3].weight.copy_(second[3].weight[:, order])
    return second


def twins() -> list[nn.Module]:
    first = network()
    return [first, permuted(first)]


def partly_reset() -> list[nn.Module]:
    first = network()
    return [with_new_head(first) for _ in range(2)]


def one_seed() -> list[nn.Module]:
    return [seeded(0) for _ in range(2)]


def one_checkpoint() -> list[nn.Module]:
    state = torch.load(CHECKPOINTS[0])
    return [loaded(state) for _ in range(2)]


def checkpoints() -> list[nn.Module]:
    return [loaded(torch.load(file)) for file in CHECKPOINTS]


def pretrained_trunks() -> list[nn.Module]:
    return [with_new_head(loaded(torch.load(CHECKPOINTS[0]))) for _ in range(2)]


def pretrained_trunks_under_a_seed() -> list[nn.Module]:
    torch.manual_seed(3)
    return pretrained_trunks()


def seeds_of_their_own() -> list[nn.Module]:
    return [seeded(seed) for seed in range(3)]


def low_rank_updates() -> list[nn.Module]:
    state = torch.load(CHECKPOINTS[0])
    return [Lora(loaded(state)) for _ in range(2)]


def drawn() -> list[nn.Module]:
    return [network() for _ in range(3)]


def constants() -> list[nn.Module]:
    return [zeros(), zeros()]


CHECKPOINTS: list[str] = []


@pytest.fixture(autouse=True)
def trained_networks(tmp_path, monkeypatch):
    """Checkpoints of four networks, each trained by itself for a few steps."""
    files = []
    for i in range(4):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(6, 4)).square().mean().backward()
            optimizer.step()
        files.append(tmp_path / f"{i}.pt")
        torch.save(model.state_dict(), files[-1])
    monkeypatch.setattr(f"{__name__}.CHECKPOINTS", files)


def given_as(how: str, make):
    """The same members as users have them: to be built, in a list, in a module, or built before."""
    ways = {
        "factory": lambda: make,
        "list": make,
        "dict": lambda: dict(zip("abcd", make(), strict=False)),
        "ensemble": lambda: Ensemble(make()),
        "factory_of_ensemble": lambda: lambda: Ensemble(make()),
        "averaged": lambda: Averaged(make()),
        "function_of_a_list": lambda: (lambda members: lambda: list(members))(make()),
    }
    return ways[how]()


WAYS = (
    *("factory", "list", "dict", "ensemble", "factory_of_ensemble", "averaged"),
    "function_of_a_list",
)


def broken(thing) -> list[str]:
    results = check_ensemble(thing)
    assert {r.status for r in results} <= {"held", "broken", "not claimed"}, str(results)
    return [r.check for r in results if r.status == "broken"]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("make", [copies, one_seed, one_checkpoint])
def test_one_network_several_times_is_found(make, how):
    assert broken(given_as(how, make)) == ["diversity"]


@pytest.mark.parametrize("how", ["factory", "list", "ensemble"])
def test_permuted_twins_are_found(how):
    assert broken(given_as(how, twins)) == ["diversity"]


@pytest.mark.parametrize("how", ["factory", "factory_of_ensemble"])
def test_a_reset_that_misses_layers_is_found_where_construction_is_seen(how):
    assert broken(given_as(how, partly_reset)) == ["diversity"]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize(
    "make",
    [
        *(drawn, checkpoints, pretrained_trunks, pretrained_trunks_under_a_seed),
        *(seeds_of_their_own, low_rank_updates, constants),
    ],
)
def test_members_that_may_start_with_something_in_common_are_healthy(make, how):
    assert broken(given_as(how, make)) == []


def test_a_copy_among_others_is_named():
    members = [network(), network(), *copies()]
    (found,) = (r for r in check_ensemble(members) if r.status == "broken")
    assert "0.weight   equal in members 2, 3" in found.message
    assert "outputs    equal to rounding in members 2, 3" in found.message


def test_what_was_given_as_objects_is_said_to_be_so():
    (found,) = (r for r in check_ensemble(drawn()) if r.check == "diversity")
    assert found.found.endswith("construction not seen")
    (found,) = (r for r in check_ensemble(drawn) if r.check == "diversity")
    assert found.found == "3 members, 0 of 4 drawn parameters alike, outputs the same in 0 pairs"


def test_streams_of_one_network_claim_to_be_one():
    assert broken(NStreams(network(), 3)) == []


def test_a_trunk_in_common_is_a_matter_of_sharing():
    """One tensor in several members is claimed as shared, and is not said to be a copy."""

    def make():
        trunk = network()
        return [nn.Sequential(trunk, nn.Linear(3, 2)) for _ in range(2)]

    claims = {"sharing": ["0.*"], "diversity": "distinct"}
    subject = Subject(make=make, batch=lambda: torch.randn(5, 4), claims=claims)
    assert broken(subject) == []
    assert broken(subject.claiming(diversity="independent")) == ["diversity"]
