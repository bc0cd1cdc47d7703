"""Faults wherever they stand: in any architecture, member and layer, with any number of members."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ensembles import check_ensemble
from ensembles.faults.architectures import ARCHITECTURES, LAYERS, Packed, Subnets
from ensembles.faults.catalogue import FAULTS, kill_matrix
from ensembles.faults.fault import Place
from ensembles.handling.members import member_outputs, named_modules_of

SECTIONS = ("members", "training", "sharing", "cost", "state")


@st.composite
def planted(draw):
    """A fault, an architecture in which it makes sense, and a place."""
    fault = draw(st.sampled_from(list(FAULTS.values())))
    members, layers = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    place = Place(
        members=members,
        member=draw(st.integers(0, members - 1)),
        layer=draw(st.integers(0, layers - 1)),
        layers=layers,
    )
    return fault, draw(st.sampled_from(fault.architectures)), place


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(planted(), st.integers(0, 2**16))
def test_a_fault_is_caught_wherever_it_stands(example, seed):
    fault, architecture, place = example
    results = check_ensemble(fault.subject(architecture, place=place), seed=seed)
    states = {result.check: result.status for result in results}
    assert {check: states[check] for check in fault.caught_by} == dict.fromkeys(
        fault.caught_by, "broken"
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(planted(), st.integers(0, 2**16))
def test_a_healthy_twin_is_silent_wherever_the_defect_would_stand(example, seed):
    fault, architecture, place = example
    results = check_ensemble(fault.twin(architecture, place=place), seed=seed)
    assert {result.status for result in results} <= {"held", "not claimed"}, str(results)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_and_its_twin_differ_in_the_defect_alone(name):
    """The same claims, the same batch, and networks of the same kind."""
    fault = FAULTS[name]
    assert fault.section in SECTIONS
    assert fault.summary.endswith(".")
    assert fault.name == name
    for architecture in fault.architectures:
        subject, twin = fault.subject(architecture), fault.twin(architecture)
        # A new process imports either of two factories, which are nothing but the defect.
        claimed = str(dict(subject.claims)).replace(".set'", ".list'")
        assert claimed == str(dict(twin.claims))
        assert subject.name == f"{name} ({architecture})"
        assert twin.name == f"healthy twin of {name} ({architecture})"
        made = []
        for one in (subject, twin):
            torch.manual_seed(0)
            model = one.make()
            found = member_outputs(model, one.batch(), outputs=one.outputs)
            made.append((list(found), [tuple(y[0].shape) for y in found.values()]))
        assert made[0] == made[1]


def test_subjects_are_built_anew_at_each_call():
    for fault in FAULTS.values():
        subject = fault.subject(fault.architectures[0])
        one, two = ({id(p) for p in parameters(subject.make())} for _ in range(2))
        held = [subject.make() for _ in range(2)]
        one, two = ({id(p) for p in parameters(model)} for model in held)
        assert one
        assert not one & two


def parameters(model):
    return [p for module in named_modules_of(model).values() for p in module.parameters()]


def test_a_fault_that_makes_no_sense_in_an_architecture_says_so():
    with pytest.raises(ValueError, match="'shared-statistics' makes no sense in 'mlp'"):
        FAULTS["shared-statistics"].subject("mlp")


@pytest.mark.parametrize("wrong", [{"member": 2}, {"members": 1, "member": 0}, {"layer": 2}])
def test_a_place_that_does_not_exist_is_refused(wrong):
    with pytest.raises(ValueError, match="is no place"):
        Place(**wrong)


def test_every_section_of_the_catalogue_has_faults():
    assert {fault.section for fault in FAULTS.values()} == set(SECTIONS)
    assert len(FAULTS) >= 90


# --- the architectures are what they say --------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_members_compute_what_members_alone_compute(name):
    """Another input to one member's channels leaves the others as they are, in every mode."""
    packed = Packed(ARCHITECTURES[name], members=2)
    with torch.no_grad():
        before = packed(ARCHITECTURES[name].batch().fill_(0.5))
        for parameter in packed.parameters():
            half = parameter[: parameter.shape[0] // 2]
            half.mul_(2.0)
        after = packed(ARCHITECTURES[name].batch().fill_(0.5))
    assert not torch.equal(before[0], after[0])
    torch.testing.assert_close(before[1], after[1])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_subnet_is_zero_outside_its_group(name):
    """The other groups of its last layer's channels do not move its logits."""
    model = Subnets(ARCHITECTURES[name])
    batch = ARCHITECTURES[name].batch()
    before = model(batch)
    with torch.no_grad():
        for member, (start, shift) in {
            "subnet_0_0": (0, 0),
            "subnet_0_1": (0, 1),
            "subnet_1_0": (1, 0),
            "subnet_1_1": (1, 1),
        }.items():
            last = (start + LAYERS * shift) % 2
            columns = model.heads[member].weight.unflatten(1, (2, -1))
            columns[:, 1 - last] = 100.0
    after = model(batch)
    for member in model.steps:
        torch.testing.assert_close(before[member], after[member], rtol=0, atol=0)


def test_the_matrix_of_nothing_is_an_empty_table():
    assert kill_matrix([]).checks == ()
