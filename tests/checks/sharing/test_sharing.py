import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ensembles.checks.sharing.judgement import assert_members_share, assert_parameters_distinct
from ensembles.checks.sharing.measurement import measure_parameter_sharing


def classifier() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)
    )


class Holder(nn.Module):
    """Parameters over memory that somebody else laid out."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        super().__init__()
        for i, tensor in enumerate(tensors):
            kept = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)
            self.register_parameter(f"p{i}", kept)


# --- members share nothing ----------------------------------------------------------------------


def test_members_that_share_nothing_hold():
    assert_members_share(measure_parameter_sharing([classifier() for _ in range(4)]))


def test_one_module_four_times_is_broken(golden):
    with pytest.raises(AssertionError) as broken:
        assert_members_share(measure_parameter_sharing([classifier()] * 4))
    golden(str(broken.value), "messages/sharing_same_module.txt")


def test_a_shared_layer_is_broken(golden):
    members = [classifier() for _ in range(3)]
    members[2][4] = members[0][4]
    with pytest.raises(AssertionError) as broken:
        assert_members_share(measure_parameter_sharing(members))
    golden(str(broken.value), "messages/sharing_shared_layer.txt")


def test_a_shared_buffer_is_broken(golden):
    members = [classifier() for _ in range(2)]
    members[1][1].running_mean = members[0][1].running_mean
    with pytest.raises(AssertionError) as broken:
        assert_members_share(measure_parameter_sharing(members))
    golden(str(broken.value), "messages/sharing_shared_buffer.txt")


def test_a_view_into_another_member_is_broken(golden):
    parent = nn.Conv2d(8, 8, 3, bias=False)
    child = Holder(parent.weight.detach()[4:, 4:])
    with pytest.raises(AssertionError) as broken:
        assert_members_share(measure_parameter_sharing({"parent": parent, "child": child}))
    golden(str(broken.value), "messages/sharing_view.txt")


# --- members share what they claim --------------------------------------------------------------


def test_claimed_names_that_are_shared_hold():
    members = [classifier() for _ in range(3)]
    for member in members[1:]:
        member[0] = members[0][0]
    assert_members_share(measure_parameter_sharing(members), ["0.*"])


def test_one_network_in_all_members_is_tied():
    assert_members_share(measure_parameter_sharing([classifier()] * 3), ["*"])


def test_claimed_names_that_are_copies_are_broken(golden):
    members = [classifier() for _ in range(3)]
    members[1][0] = members[0][0]
    members[2][0] = copy.deepcopy(members[0][0])
    with pytest.raises(AssertionError) as broken:
        assert_members_share(measure_parameter_sharing(members), ["0.*"])
    golden(str(broken.value), "messages/sharing_untied.txt")


def test_sharing_more_than_claimed_is_broken(golden):
    members = [classifier() for _ in range(2)]
    members[1][0], members[1][4] = members[0][0], members[0][4]
    with pytest.raises(AssertionError) as broken:
        assert_members_share(measure_parameter_sharing(members), ["0.*"])
    golden(str(broken.value), "messages/sharing_undeclared.txt")


def test_a_part_of_a_claimed_parameter_is_not_enough():
    parent = nn.Conv2d(8, 8, 3, bias=False)
    child = nn.Conv2d(8, 8, 3, bias=False)
    child.weight = nn.Parameter(parent.weight.detach()[:4])
    with pytest.raises(AssertionError, match="are claimed to share weight, but do not"):
        assert_members_share(measure_parameter_sharing([parent, child]), ["weight"])


# --- ties are one object ------------------------------------------------------------------------


def test_a_tied_embedding_is_one_object():
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False))
    model[1].weight = model[0].weight
    assert_parameters_distinct(measure_parameter_sharing(model))


def test_two_objects_over_one_memory_are_broken(golden):
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.detach())
    with pytest.raises(AssertionError) as broken:
        assert_parameters_distinct(measure_parameter_sharing(model))
    golden(str(broken.value), "messages/sharing_two_objects.txt")


# --- exactness ----------------------------------------------------------------------------------


def test_interleaved_views_do_not_share():
    memory = torch.zeros(64)
    even, odd = Holder(memory[0::2]), Holder(memory[1::2])
    assert not measure_parameter_sharing([even, odd]).shared
    upper, lower = Holder(memory.view(8, 8)[:, 4:]), Holder(memory.view(8, 8)[:, :4])
    assert not measure_parameter_sharing([upper, lower]).shared


def test_two_storages_over_one_memory_share():
    numpy = pytest.importorskip("numpy")
    array = numpy.zeros(8, dtype="float32")
    one, two = Holder(torch.from_numpy(array)), Holder(torch.from_numpy(array[4:]))
    (memory,) = measure_parameter_sharing([one, two]).shared
    assert (memory.bytes, memory.whole) == (16, False)


def test_the_meta_device_is_compared_by_storage():
    one, two = nn.Linear(4, 4, device="meta"), nn.Linear(4, 4, device="meta")
    assert not measure_parameter_sharing([one, two]).shared
    two.weight = one.weight
    assert [m.names for m in measure_parameter_sharing([one, two]).shared] == [("weight",)]


@st.composite
def strided(draw):
    """Offset, sizes and strides of a view of 48 elements, also ones that overlap themselves."""
    dims = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 7)), max_size=3))
    reach = sum((size - 1) * stride for size, stride in dims)
    offset = draw(st.integers(0, 47 - reach)) if reach < 48 else 0
    return ([s for s, _ in dims], [t for _, t in dims], offset) if reach < 48 else ([1], [1], 0)


@settings(max_examples=150, deadline=None)
@given(views=st.lists(strided(), min_size=2, max_size=6), device=st.sampled_from(["cpu", "meta"]))
def test_shared_bytes_equal_brute_force(views, device):
    memory = torch.zeros(48, device=device)
    index = torch.arange(48)
    members = [Holder(memory.as_strided(*view)) for view in views]
    expected: dict[tuple[str, ...], int] = {}
    sets = [set(index.as_strided(*view).flatten().tolist()) for view in views]
    for element in range(48):
        holders = tuple(str(i) for i, held in enumerate(sets) if element in held)
        if len(holders) > 1:
            expected[holders] = expected.get(holders, 0) + 4
    found: dict[tuple[str, ...], int] = {}
    for shared in measure_parameter_sharing(members).shared:
        found[shared.members] = found.get(shared.members, 0) + shared.bytes
    assert found == expected


# --- wrong use ----------------------------------------------------------------------------------


def test_one_member_cannot_be_compared():
    with pytest.raises(ValueError, match="only one was given"):
        assert_members_share(measure_parameter_sharing(classifier()))


def test_no_members_are_an_error():
    with pytest.raises(ValueError, match="the model has no members"):
        measure_parameter_sharing([])


def test_members_without_parameters_are_an_error():
    with pytest.raises(ValueError, match="no parameters or buffers"):
        assert_members_share(measure_parameter_sharing([nn.ReLU(), nn.ReLU()]))


def test_a_claimed_name_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="no parameter or buffer is named 'stem"):
        assert_members_share(measure_parameter_sharing([classifier()] * 2), ["stem.*"])


def test_a_lazy_parameter_is_an_error():
    with pytest.raises(ValueError, match=r"parameter 1\.weight is lazy"):
        measure_parameter_sharing([nn.Linear(2, 2), nn.LazyLinear(2)])


def test_looking_changes_nothing():
    members = [classifier() for _ in range(2)]
    before = [copy.deepcopy(m.state_dict()) for m in members]
    state = torch.get_rng_state()
    measure_parameter_sharing(members)
    assert torch.equal(torch.get_rng_state(), state)
    for member, saved in zip(members, before, strict=True):
        for name, tensor in member.state_dict().items():
            assert torch.equal(tensor, saved[name])


def test_published_networks_are_compared_on_meta():
    vgg11_bn = pytest.importorskip("torchvision").models.vgg11_bn
    with torch.device("meta"):
        members = [vgg11_bn() for _ in range(3)]
    assert_members_share(measure_parameter_sharing(members))
    members[2].classifier = members[0].classifier
    with pytest.raises(AssertionError, match=r"classifier\.0\.weight +one tensor in members 0, 2"):
        assert_members_share(measure_parameter_sharing(members))
