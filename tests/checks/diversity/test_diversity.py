import copy
import random

import pytest
import torch
from torch import nn

from ensembles import Subject, check_ensemble, split_axis
from ensembles.checks.diversity import similarity as likeness
from ensembles.checks.diversity.claim import DiversityClaim
from ensembles.checks.diversity.judgement import (
    assert_members_distinct,
    assert_members_diverse,
    judge,
)
from ensembles.checks.diversity.measurement import measure_member_diversity
from ensembles.claims import ClaimError
from ensembles.findings import Count
from ensembles.message import Broken


def classifier() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 3)
    )


BATCH = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def permuted(network: nn.Sequential) -> nn.Sequential:
    """The same function with its hidden units in another order."""
    twin, order = copy.deepcopy(network), torch.tensor([2, 0, 1, 5, 3, 4])
    with torch.no_grad():
        for layer in (twin[0], twin[3]):
            layer.weight.copy_(layer.weight[order])
            layer.bias.copy_(layer.bias[order])
        for layer in (twin[3], twin[5]):
            layer.weight.copy_(layer.weight[:, order])
    return twin


def message(model, batch=BATCH, **options) -> str:
    with pytest.raises(AssertionError) as broken:
        assert_members_diverse(measure_member_diversity(model, batch, **options))
    return str(broken.value)


def seeded() -> nn.Sequential:
    torch.manual_seed(0)
    return classifier()


# --- members start different --------------------------------------------------------------------


def test_members_that_are_drawn_one_by_one_hold():
    measured = measure_member_diversity(lambda: [classifier() for _ in range(3)], BATCH)
    assert_members_diverse(measured)
    assert measured.drawn == tuple(f"{i}.{name}" for i in (0, 3, 5) for name in ("weight", "bias"))
    assert str(measured) == (
        "3 members, 0 of 6 drawn parameters alike, outputs the same in 0 pairs"
    )


def test_constants_by_design_and_statistics_are_in_common():
    class Constants(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
            self.table = nn.Parameter(torch.linspace(0, 1, 6))

        def forward(self, x):
            return self.norm(self.linear(x)) + self.table

    measured = measure_member_diversity(lambda: [Constants(), Constants()], BATCH)
    assert measured.drawn == ("linear.weight", "linear.bias")
    assert_members_diverse(measured)


def test_what_a_file_gives_may_be_in_common():
    trunk = classifier().state_dict()

    def make():
        members = [nn.Sequential(classifier(), nn.Linear(3, 2)) for _ in range(2)]
        for member in members:
            member[0].load_state_dict(trunk)
        return members

    measured = measure_member_diversity(make, BATCH)
    assert measured.drawn == ("1.weight", "1.bias")
    assert measured.given == (
        "0.0.weight",
        "0.0.bias",
        "0.3.weight",
        "0.3.bias",
        "0.5.weight",
        "0.5.bias",
    )
    assert str(measured).endswith(", 6 given and in common")
    assert_members_diverse(measured)


def test_members_from_different_checkpoints_hold():
    saved = [classifier().state_dict() for _ in range(2)]

    def make():
        members = [classifier() for _ in saved]
        for member, state in zip(members, saved, strict=True):
            member.load_state_dict(state)
        return members

    measured = measure_member_diversity(make, BATCH)
    assert measured.drawn == ()
    assert_members_diverse(measured)


def test_a_head_that_starts_at_zero_holds():
    def member():
        network = classifier()
        nn.init.zeros_(network[5].weight)
        nn.init.zeros_(network[5].bias)
        return network

    measured = measure_member_diversity(lambda: [member(), member()], BATCH)
    assert measured.outputs == "constant"
    assert_members_diverse(measured)


def test_random_signs_may_agree_by_chance():
    class Signs(nn.Module):
        def __init__(self, inputs: int) -> None:
            super().__init__()
            self.linear = nn.Linear(inputs, 3)
            self.signs = nn.Parameter(torch.randint(2, (inputs,)).float() * 2 - 1)

        def forward(self, x):
            return self.linear(x * self.signs)

    for inputs in (4, 64):
        for seed in range(20):
            torch.manual_seed(seed)
            pair = [Signs(inputs), Signs(inputs)]
            assert_members_diverse(measure_member_diversity(pair, torch.randn(3, inputs)))
    pair[1].signs.data.copy_(pair[0].signs)
    assert "signs   equal in members 0, 1" in message(pair, torch.randn(3, 64))


def test_frozen_parameters_may_be_in_common():
    prior = nn.Linear(3, 2).requires_grad_(False)
    pair = [nn.Sequential(classifier(), copy.deepcopy(prior)) for _ in range(2)]
    assert_members_diverse(measure_member_diversity(pair, BATCH))


def test_outputs_are_compared_in_double_precision():
    """A millionth is rounding in float32, and another function in float64."""
    state = classifier().state_dict()

    def make():
        pair = [classifier(), classifier()]
        for i, member in enumerate(pair):
            member.load_state_dict({**state, "5.weight": state["5.weight"] * (1 + 1e-6 * i)})
        return pair

    assert measure_member_diversity(make, BATCH).twins == ()


def test_shared_names_are_claimed_alike():
    trunk = nn.Linear(4, 4)
    pair = [nn.Sequential(trunk, nn.Linear(4, 2)) for _ in range(2)]
    measured = measure_member_diversity(pair, BATCH)
    assert_members_diverse(measured, ["0.*"])
    with pytest.raises(AssertionError, match=r"0\.weight"):
        assert_members_diverse(measured)


def test_packed_members_hold():
    model = nn.Sequential(nn.Conv1d(4, 12, 1, groups=2), nn.Conv1d(12, 6, 1, groups=2))
    measured = measure_member_diversity(
        model, torch.randn(5, 4, 1), outputs=lambda y: y.chunk(2, 1)
    )
    assert_members_diverse(measured)
    assert "0.weight" in measured.drawn


# --- members are alike --------------------------------------------------------------------------


def test_copied_members_are_broken(golden):
    def make():
        first = classifier()
        return [first, *(copy.deepcopy(first) for _ in range(2))]

    golden(message(make), "messages/diversity_copied.txt")


def test_members_that_are_one_network_are_told_as_that(golden):
    one = classifier()
    golden(message([one] * 3), "messages/diversity_one_network.txt")
    assert "Members 0, 1, 2 are one network" in message([one] * 3, None)


def test_a_layer_of_several_members_is_no_copy():
    first, second = classifier(), classifier()
    second[0] = first[0]
    told = " ".join(message([first, second]).split())
    assert "a layer that was made once and passed to several members" in told
    assert "one network" not in told
    assert "a copy whose reset" not in told


def test_members_that_read_all_weights_otherwise_are_not_one_network():
    one = classifier()
    told = message([one, nn.Sequential(*one, nn.Tanh())])
    assert "A training step of one member moves the others" in told
    assert "one network" not in told


def test_without_a_factory_a_copy_and_a_seed_are_both_told():
    told = " ".join(message([seeded(), seeded()]).split())
    assert "deepcopy of one" in told
    assert "torch.manual_seed(...) inside a constructor" in told
    assert "a function that builds the members would show" in told
    assert "manual_seed" not in message(lambda: [copy.deepcopy(m) for m in [classifier()] * 2])


def test_a_reset_that_misses_layers_is_broken(golden):
    def make():
        members = [copy.deepcopy(one) for one in [classifier()] * 3]
        for member in members:
            member[0].reset_parameters()
            member[5].reset_parameters()
        return members

    golden(message(make), "messages/diversity_partly_reset.txt")


def test_a_constructor_that_seeds_is_broken(golden):
    golden(message(lambda: [seeded(), seeded()]), "messages/diversity_same_seed.txt")


def test_a_permuted_twin_is_broken(golden):
    def make():
        first = classifier()
        return {"first": first, "second": permuted(first)}

    golden(message(make), "messages/diversity_permuted.txt")


def test_members_with_a_seed_each_are_told_and_may_be_claimed(golden):
    def make():
        members = []
        for seed in range(2):
            torch.manual_seed(seed)
            members.append(classifier())
        return members

    golden(message(make), "messages/diversity_seeded.txt")
    assert_members_diverse(measure_member_diversity(make, BATCH), seeded=True)


def test_one_state_dict_in_two_members_is_broken():
    def make():
        members = [classifier(), classifier(), classifier()]
        members[2].load_state_dict(members[0].state_dict())
        return members

    told = message(make)
    assert "0.weight   equal in members 0, 2" in told
    assert "outputs    equal to rounding in members 0, 2" in told


def test_one_checkpoint_in_two_members_is_broken():
    saved = classifier().state_dict()

    def make():
        members = [classifier(), classifier()]
        for member in members:
            member.load_state_dict(saved)
        return members

    assert "They are one network, however it was loaded." in message(make)


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "3.weight", "5.bias"])
def test_one_parameter_in_common_is_enough(name):
    pair = [classifier(), classifier()]
    pair[1].get_parameter(name).data.copy_(pair[0].get_parameter(name))
    told = message(pair)
    assert f"  {name}   equal in members 0, 1\n  (1 of 6 drawn parameters)" in told


def test_a_part_of_a_parameter_is_enough():
    pair = [classifier(), classifier()]
    pair[1][3].weight.data[:3] = pair[0][3].weight[:3]
    assert "3.weight   50% of the elements equal in members 0, 1" in message(pair)


def test_the_same_numbers_in_another_order_are_broken():
    pair = [classifier(), classifier()]
    pair[1][0].weight.data.copy_(pair[0][0].weight.flip(0))
    told = message(pair)
    assert "0.weight   equal but for the order in members 0, 1" in told
    assert "hold the same numbers in another order" in told


@pytest.mark.parametrize(
    ("change", "by"),
    [
        (lambda w: w + 1e-3 * torch.randn_like(w), "1.00"),
        (lambda w: 0.3 * w, "1.00"),
        (lambda w: -w, "-1.00"),
    ],
    ids=["noise", "scaled", "negated"],
)
def test_what_was_made_from_another_members_weights_is_broken(change, by):
    def make():
        pair = [classifier(), classifier()]
        pair[1][3].weight.data = change(pair[0][3].weight.data)
        return pair

    assert f"3.weight   correlated by {by} in members 0, 1\n  (1 of 6" in message(make)
    assert_members_distinct(measure_member_diversity(make, BATCH))


def averaged(weights):
    """Three or more members, of which the last is a weighted sum of the others, and noise."""
    members = [classifier() for _ in weights]
    with torch.no_grad():
        for name, parameter in members[-1].named_parameters():
            others = [member.get_parameter(name) for member in members[:-1]]
            noise = weights[-1] * parameter
            parameter.copy_(sum(w * o for w, o in zip(weights, others, strict=False)) + noise)
    return members


@pytest.mark.parametrize(
    "weights",
    [(0.5, 0.5, 0.0), (1.0, -2.0, 0.0), (1 / 3, 1 / 3, 1 / 3, 0.0), (0.5, 0.5, 0.1)],
    ids=["mean", "difference", "of three", "with noise"],
)
def test_a_member_that_is_a_sum_of_others_is_broken(weights):
    members = ", ".join(str(i) for i in range(len(weights)))
    told = message(lambda: averaged(weights))
    assert f"3.weight   weighted sums of each other in members {members}" in told


def test_who_is_no_part_of_a_sum_is_not_named():
    def make():
        return [classifier(), *averaged((0.5, 0.5, 0.0))]

    assert "3.weight   weighted sums of each other in members 1, 2, 3\n" in message(make)


def test_a_mean_among_its_members_is_no_copy():
    assert_members_distinct(measure_member_diversity(lambda: averaged((0.5, 0.5, 0.0)), BATCH))


@pytest.mark.parametrize("noise", [1.0, 0.5])
def test_a_member_with_as_much_of_its_own_is_no_sum_of_others(noise):
    made = measure_member_diversity(lambda: averaged((0.5, 0.5, noise)), BATCH)
    assert not made.alike


@pytest.mark.parametrize("count", [3, 16, 64])
def test_of_as_many_members_as_are_compared_none_is_a_sum_of_others_by_chance(count):
    elements = max(likeness.ENOUGH_TO_CORRELATE, likeness.ENOUGH_EACH * count)

    def make(mean=False):
        members = [nn.Linear(elements, 1, bias=False) for _ in range(count)]
        if mean:
            mean_of = torch.stack([member.weight.detach() for member in members[:-1]]).mean(0)
            members[-1].weight.data = mean_of
        return members

    assert not measure_member_diversity(make).alike
    (found,) = measure_member_diversity(lambda: make(mean=True)).alike
    assert len(found.members) == count


def test_the_message_of_a_mean_of_others(golden):
    golden(message(lambda: averaged((0.5, 0.5, 0.0))), "messages/diversity_averaged.txt")


def test_the_message_of_copies_with_noise(golden):
    def make():
        first = classifier()
        second = copy.deepcopy(first)
        with torch.no_grad():
            for parameter in second.parameters():
                if parameter.ndim > 1:
                    parameter += 1e-3 * torch.randn_like(parameter)
                else:
                    nn.init.normal_(parameter)
        return [first, second]

    golden(message(make), "messages/diversity_perturbed.txt")


def test_noise_around_what_is_there_by_design_is_no_relation():
    class Identity(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4, 8) + 1e-3 * torch.randn(4, 8))

        def forward(self, x):
            return x @ self.weight

    assert_members_diverse(measure_member_diversity(lambda: [Identity(), Identity()], BATCH))


def from_one_stream(*, apart: int, seeds: tuple[int, int] = (0, 0)) -> list[nn.Module]:
    members = []
    for position, seed in enumerate(seeds):
        torch.manual_seed(seed)
        torch.rand(apart * position)
        members.append(classifier())
    return members


@pytest.mark.parametrize("apart", [1, 2, 7])
def test_members_that_draw_from_one_stream_are_broken(apart):
    def make():
        return from_one_stream(apart=apart)

    measured = measure_member_diversity(make, BATCH)
    with pytest.raises(
        AssertionError, match=r"0\.weight +\d+% of the elements equal, at other places,"
    ):
        assert_members_diverse(measured, seeded=True)
    other = measure_member_diversity(lambda: from_one_stream(apart=apart, seeds=(0, 1)), BATCH)
    assert_members_diverse(other, seeded=True)


def test_the_message_of_one_stream(golden):
    golden(message(lambda: from_one_stream(apart=1)), "messages/diversity_one_stream.txt")


def test_zeros_at_other_places_are_no_relation():
    """A layer that was pruned before it is given away: no second construction tells zeros."""
    members = [nn.Linear(40, 40) for _ in range(2)]
    with torch.no_grad():
        for member in members:
            member.weight *= torch.rand(40, 40) > 0.5
    assert_members_diverse(measure_member_diversity(members))


def test_scaled_twins_are_one_function():
    first = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    second = copy.deepcopy(first)
    with torch.no_grad():
        second[0].weight.mul_(2), second[0].bias.mul_(2), second[2].weight.div_(2)
        second[2].bias.copy_(first[2].bias)
    with pytest.raises(Broken) as broken:
        assert_members_diverse(measure_member_diversity([first, second], BATCH))
    assert broken.value.findings.kinds == ("equal", "same function")
    assert [(item.place, item.found) for item in broken.value.findings] == [
        ("2.bias", "equal in members 0, 1"),
        ("outputs", "equal to rounding in members 0, 1"),
    ]


def test_packed_members_with_equal_slices_are_broken():
    model = nn.Sequential(nn.Conv1d(4, 12, 1, groups=2), nn.Conv1d(12, 6, 1, groups=2))
    options = {"outputs": lambda y: y.chunk(2, 1)}
    with torch.no_grad():
        model[1].weight[3:] = model[1].weight[:3]
    told = message(model, torch.randn(5, 4, 1), **options)
    assert "1.weight   equal in members 0, 1" in told


def test_members_of_which_nothing_can_be_compared_are_refused():
    def of_classes(*counts):
        return lambda: [nn.Linear(4, count) for count in counts]

    unlike = measure_member_diversity(of_classes(2, 3, 5), BATCH)
    assert str(unlike) == (
        "3 members, 0 of 0 drawn parameters alike, outputs of different shapes, and not compared"
    )
    for claim in (assert_members_diverse, assert_members_distinct):
        with pytest.raises(ValueError, match=r"^no two members have a drawn"):
            claim(unlike)
    assert_members_diverse(measure_member_diversity(of_classes(2, 3, 2), BATCH))


def test_packed_members_with_equal_outputs_are_broken():
    class Repeated(nn.Linear):
        def forward(self, x):
            return torch.stack([super().forward(x)] * 2)

    assert "outputs   equal to rounding" in message(Repeated(4, 3), outputs=split_axis(0))


def test_python_and_numpy_generators_are_named():
    def make():
        random.seed(3)
        return [classifier(), classifier()]

    assert "generator python" in message(make)


def test_a_claim_of_diversity_is_checked_for_a_subject():
    subject = Subject(
        make=lambda: [seeded(), seeded()],
        batch=lambda: BATCH,
        claims={"diversity": "independent"},
    )
    (result,) = (r for r in check_ensemble(subject) if r.claim)
    assert result.status == "broken"
    with pytest.raises(ClaimError, match="diversity cannot be claimed to be 'other'"):
        check_ensemble(subject.claiming(diversity="other"))


def test_the_fixture_asserts_independence(member_diversity):
    member_diversity.assert_independent(lambda: [classifier(), classifier()], BATCH)
    with pytest.raises(AssertionError, match="start different, but are alike"):
        member_diversity.assert_independent([classifier()] * 2)


# --- how it looks -------------------------------------------------------------------------------


def test_one_more_is_built_and_it_is_drawn_after_the_first():
    made = []

    def make():
        made.append([classifier(), classifier()])
        return made[-1]

    subject = Subject(make=make, batch=lambda: BATCH, claims={"diversity": "independent"})
    assert check_ensemble(subject, seed=3).held
    torch.manual_seed(3)
    for members in made:
        for member in members:
            drawn = classifier()
            assert all(map(torch.equal, member.parameters(), drawn.parameters()))
    assert len(made) == 2


def test_findings_are_data():
    pair = [classifier(), classifier()]
    pair[1][3].weight.data[:3] = pair[0][3].weight[:3]
    findings = judge(measure_member_diversity(pair, BATCH), DiversityClaim())
    (found,) = findings
    assert (found.kind, found.place, found.members) == ("equal", "3.weight", ("0", "1"))
    assert (found.amount, findings.affected) == (0.5, (Count(1, "drawn parameter", of=6),))


def test_several_kinds_are_told_together_and_one_network_first():
    def make():
        first = classifier()
        members = [first, classifier(), copy.deepcopy(first), permuted(first), classifier()]
        members[4][3] = members[1][3]
        members[4][0].weight.data = 0.3 * members[1][0].weight.data
        torch.manual_seed(0)
        return members

    measured = measure_member_diversity(make, BATCH)
    findings = judge(measured, DiversityClaim())
    assert findings.kinds == ("permuted", "one tensor", "construction")
    findings = judge(measured, DiversityClaim(seeded=True, alike=("3.*",)))
    assert {item.members for item in findings} == {("0", "2"), ("0", "3"), ("0", "2", "3")}


def test_what_is_not_compared_is_a_figure_of_the_result():
    """Few signs may agree by chance, and a layer of one member has none to compare with."""

    def make():
        members = [classifier(), nn.Sequential(*classifier(), nn.Linear(3, 3))]
        for member in members:
            member.signs = nn.Parameter(torch.randint(2, (6,)).float())
        return members

    measured = measure_member_diversity(make, BATCH)
    assert measured.looked_at == (Count(6, "drawn parameter", of=9),)
    subject = Subject(make=make, batch=lambda: BATCH, claims={"diversity": "distinct"})
    (result,) = (r for r in check_ensemble(subject) if r.claim)
    assert result.status == "held"
    assert result.found.endswith("(looked at 6 of 9 drawn parameters)")


def test_of_a_large_tensor_a_part_is_correlated_and_the_result_says_so():
    measured = measure_member_diversity(lambda: [nn.Linear(100, 100) for _ in range(2)])
    told = "element of tensors, for correlations"
    assert measured.looked_at == (Count(4096 + 100, told, of=10_100),)


# --- wrong use ----------------------------------------------------------------------------------


def test_what_cannot_be_compared_is_an_error():
    with pytest.raises(ValueError, match="one was given"):
        measure_member_diversity(classifier())
    with pytest.raises(ValueError, match="one was given"):
        measure_member_diversity([classifier()], BATCH)
    with pytest.raises(ValueError, match="nothing to compare"):
        measure_member_diversity([nn.ReLU(), nn.ReLU()])
    one = classifier()
    with pytest.raises(ValueError, match="the same parameters at both calls"):
        measure_member_diversity(lambda: [one, classifier()])
    with pytest.raises(ValueError, match="an object of type int"):
        measure_member_diversity(3)
    with pytest.raises(ValueError, match="they are the same for all rows"):
        assert_members_diverse(measure_member_diversity([nn.ReLU(), nn.ReLU()], torch.zeros(2, 3)))
    pair = measure_member_diversity([classifier(), classifier()])
    with pytest.raises(ValueError, match=r"no drawn parameter is named 'stem\.\*'"):
        assert_members_diverse(pair, ["stem.*"])


def test_what_gives_itself_for_a_copy_is_called_as_it_is():
    class Own(nn.Linear):
        def __deepcopy__(self, memo):
            return self

    pair = [Own(4, 2), Own(4, 2)]
    assert measure_member_diversity(pair, torch.randn(3, 4)).outputs == "compared"
    assert all(m.weight.dtype == torch.float32 and m.training for m in pair)


def test_looking_changes_nothing():
    members = [classifier().train(), classifier().eval()]
    members[0][0].weight.grad = torch.ones(6, 4)
    before = [copy.deepcopy(m.state_dict()) for m in members]
    state = torch.get_rng_state()
    measure_member_diversity(members, BATCH)
    measure_member_diversity(lambda: [classifier(), classifier()], BATCH)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in members] == [True, False]
    assert bool((members[0][0].weight.grad == 1).all())
    for member, saved in zip(members, before, strict=True):
        for name, tensor in member.state_dict().items():
            assert torch.equal(tensor, saved[name])
            assert tensor.dtype == torch.float32
