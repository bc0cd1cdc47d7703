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


# --- members that nothing registers -------------------------------------------------------------


class Listed(nn.Module):
    """The first fault that anybody makes: members in a Python list."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = [network(), network()]

    def forward(self, x):
        return [net(x) for net in self.nets]


def sgd(model) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def statuses(model) -> dict[str, tuple[str, str]]:
    return {r.check: (r.status, r.message) for r in check_ensemble(model) if r.claim}


@pytest.mark.parametrize("optimizer", [None, sgd])
def test_members_in_a_python_list_are_named_with_and_without_an_optimizer(optimizer):
    claims = {"ownership": "independent", "coverage": "complete", "hygiene": "clean"}
    batch = torch.randn(5, 4)
    subject = Subject(make=Listed, batch=lambda: batch, optimizer=optimizer, claims=claims)
    found = statuses(subject)
    assert found["ownership"] == (
        "error",
        "the model has no parameters that anybody could own. Usual cause: members in a Python list "
        "instead of nn.ModuleList.",
    )
    for check, place in (("coverage", "model.nets[0].3.weight"), ("hygiene", "model.nets[1]")):
        assert found[check][0] == "broken"
        assert place in found[check][1]
        assert "kept in a Python list" in found[check][1]


def test_an_optimizer_that_fails_for_another_reason_is_told_of_a_model_that_registers_all():
    def fails(model):
        raise RuntimeError("no such group")

    claims = {"coverage": "complete", "hygiene": "clean"}
    batch = torch.randn(5, 4)
    subject = Subject(make=network, batch=lambda: batch, optimizer=fails, claims=claims)
    for status, message in statuses(subject).values():
        assert status == "error"
        assert message.startswith("optimizer=fails raised RuntimeError: no such group (tests/")


def test_a_bare_module_that_keeps_its_members_in_a_python_list_is_broken():
    found = statuses(Listed)
    assert found["sharing"] == (
        "error",
        "the model has no parameters or buffers: there is nothing to compare. Usual cause: members "
        "in a Python list instead of nn.ModuleList.",
    )
    assert found["coverage"][0] == "broken"
    place = "model.nets[0].0.weight   Parameter of shape (8, 4), kept in a Python list"
    assert place in found["coverage"][1]


# --- a module that keeps its members ------------------------------------------------------------


class WithHead(Ensemble):
    """Beside the members, a head that seems tied to an embedding: two Parameters, one memory."""

    def __init__(self, members) -> None:
        super().__init__(members)
        self.table = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)

    def forward(self, x):
        return [self.head(y) + x @ self.table.weight for y in super().forward(x)]


def test_ties_beside_the_members_are_looked_at_too():
    def tied():
        model = WithHead([network(), network()])
        model.head.weight = nn.Parameter(model.table.weight.data)
        return model

    healthy = statuses(lambda: WithHead([network(), network()]))
    assert healthy["sharing"] == ("held", "")
    status, message = statuses(tied)["sharing"]
    assert status == "broken"
    assert "table.weight" in message
    assert "head.weight" in message


def test_the_mean_of_members_is_as_deterministic_as_each():
    claims = {"determinism": "bitwise"}
    batch = torch.randn(5, 4)
    subject = Subject(
        make=lambda: Averaged([network(), network()]),
        members=lambda model: model.members,
        batch=lambda: batch,
        claims=claims,
    )
    assert statuses(subject) == {"determinism": ("held", "")}


@pytest.mark.parametrize(
    ("claims", "place"),
    [
        ({"ownership": "independent"}, "but the model's output is one member's (model)"),
        ({"coupling": "independent"}, "and only one was found (model)"),
    ],
)
def test_the_mean_of_members_is_refused_with_the_way_to_have_them_looked_at(claims, place):
    batch = torch.randn(5, 4)
    subject = Subject(
        make=lambda: Averaged([network(), network()]),
        members=lambda model: model.members,
        batch=lambda: batch,
        claims=claims,
    )
    ((status, message),) = statuses(subject).values()
    assert status == "error"
    assert place in message
    assert message.endswith("give the members: make=lambda: list(Model().members).")
    apart = Subject(make=lambda: list(subject.make().members), batch=subject.batch, claims=claims)
    assert {found for found, _ in statuses(apart).values()} == {"held"}
