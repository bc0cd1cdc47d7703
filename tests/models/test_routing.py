"""Routes are bijections, both arms of a residual sum meet, and routes compose."""

import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensembles.models.routing import (
    ResidualRoute,
    ResidualShape,
    Route,
    all_subnets,
    residual_route,
    subnet_route,
)

WIDTHS = st.integers(1, 6)
SHAPES = st.lists(st.builds(ResidualShape, convs=st.integers(1, 5), downsample=st.booleans()))


@st.composite
def subnets(draw: st.DrawFn) -> tuple[int, int, int]:
    """A width, a start and a shift."""
    width = draw(WIDTHS)
    return width, draw(st.integers(0, width - 1)), draw(st.integers(0, width - 1))


def convs_of(route: Route) -> list[tuple[int, int]]:
    """The blocks of all convs behind the stem, in a fixed order."""
    blocks: list[tuple[int, int]] = []
    for residual in route.residuals:
        blocks.extend(residual.main)
        if residual.downsample is not None:
            blocks.append(residual.downsample)
    return blocks


@given(shapes=SHAPES, width=WIDTHS)
def test_subnets_partition_the_blocks_of_every_conv(shapes, width):
    every_block = sorted((i, j) for i in range(width) for j in range(width))
    routes = [
        convs_of(subnet_route(shapes, start=start, shift=shift, width=width))
        for start, shift in all_subnets(width)
    ]
    convs = sum(shape.convs + shape.downsample for shape in shapes)
    assert [len(route) for route in routes] == [convs] * width**2
    for conv in range(convs):
        assert sorted(route[conv] for route in routes) == every_block


@given(shapes=SHAPES, subnet=subnets())
def test_both_arms_of_every_residual_sum_arrive_in_one_group(shapes, subnet):
    width, start, shift = subnet
    route = subnet_route(shapes, start=start, shift=shift, width=width)
    for residual in route.residuals:
        shortcut = residual.entry
        if residual.downsample is not None:
            assert residual.downsample[1] == shortcut
            shortcut = residual.downsample[0]
        assert (shortcut + residual.switch) % width == residual.exit


@given(shapes=SHAPES, subnet=subnets())
def test_every_conv_reads_the_group_that_the_one_before_it_wrote(shapes, subnet):
    width, start, shift = subnet
    route = subnet_route(shapes, start=start, shift=shift, width=width)
    assert route.stem == (start, 0)
    group = start
    for shape, residual in zip(shapes, route.residuals, strict=True):
        assert len(residual.main) == shape.convs
        for block in residual.main:
            assert block == ((group + shift) % width, group)
            group = block[0]
    assert route.head == group


@given(shapes=SHAPES, subnet=subnets())
def test_a_conv_is_entered_where_the_sum_of_the_shifts_says(shapes, subnet):
    width, start, shift = subnet
    route = subnet_route(shapes, start=start, shift=shift, width=width)
    assert route.head == (start + shift * sum(shape.convs for shape in shapes)) % width


@given(shapes=SHAPES)
def test_width_one_is_the_plain_network(shapes):
    route = subnet_route(shapes, start=0, shift=0, width=1)
    assert all_subnets(1) == ((0, 0),)
    assert (route.stem, route.head) == ((0, 0), 0)
    assert set(convs_of(route)) <= {(0, 0)}
    assert [residual.switch for residual in route.residuals] == [0] * len(shapes)


@given(first=SHAPES, second=SHAPES, subnet=subnets())
def test_the_route_of_a_concatenation_is_the_concatenation_of_routes(first, second, subnet):
    width, start, shift = subnet
    whole = subnet_route(first + second, start=start, shift=shift, width=width)
    head = subnet_route(first, start=start, shift=shift, width=width)
    tail = subnet_route(second, start=head.head, shift=shift, width=width)
    assert whole == Route(head.stem, head.residuals + tail.residuals, tail.head)


@given(width=WIDTHS)
def test_every_row_block_of_the_stem_is_shared_by_the_subnets_that_start_there(width):
    stems = [
        subnet_route([], start=start, shift=shift, width=width).stem
        for start, shift in all_subnets(width)
    ]
    assert sorted(stems) == sorted([(i, 0) for i in range(width)] * width)


def test_the_two_groups_of_width_two_are_routed_as_written_by_hand():
    basic = ResidualShape(convs=2)
    stage = ResidualShape(convs=2, downsample=True)
    bottleneck = ResidualShape(convs=3)
    assert subnet_route([basic, stage, bottleneck], start=0, shift=1, width=2) == Route(
        stem=(0, 0),
        residuals=(
            ResidualRoute(main=((1, 0), (0, 1)), downsample=None, switch=0),
            ResidualRoute(main=((1, 0), (0, 1)), downsample=(1, 0), switch=1),
            ResidualRoute(main=((1, 0), (0, 1), (1, 0)), downsample=None, switch=1),
        ),
        head=1,
    )


def test_three_groups_are_routed_as_written_by_hand():
    stage = ResidualShape(convs=3, downsample=True)
    assert residual_route(stage, group=1, shift=2, width=3) == ResidualRoute(
        main=((0, 1), (2, 0), (1, 2)), downsample=(0, 1), switch=1
    )


@pytest.mark.parametrize("width", [0, -2])
def test_a_width_below_one_is_refused(width):
    message = f"^width must be at least 1, got {width}$"
    with pytest.raises(ValueError, match=message):
        all_subnets(width)
    with pytest.raises(ValueError, match=message):
        subnet_route([], start=0, shift=0, width=width)
    with pytest.raises(ValueError, match=message):
        residual_route(ResidualShape(2), group=0, shift=0, width=width)


@pytest.mark.parametrize("value", [-1, 3])
def test_a_group_outside_of_the_width_is_refused(value):
    ending = re.escape(f"must be in 0..2 for width 3, got {value}") + "$"
    with pytest.raises(ValueError, match=f"^start {ending}"):
        subnet_route([], start=value, shift=0, width=3)
    with pytest.raises(ValueError, match=f"^shift {ending}"):
        subnet_route([], start=0, shift=value, width=3)
    with pytest.raises(ValueError, match=f"^group {ending}"):
        residual_route(ResidualShape(2), group=value, shift=0, width=3)
    with pytest.raises(ValueError, match=f"^shift {ending}"):
        residual_route(ResidualShape(2), group=0, shift=value, width=3)


def test_a_residual_block_without_convs_is_refused():
    message = "^a residual block has at least 1 conv on its main path, got 0$"
    with pytest.raises(ValueError, match=message):
        ResidualShape(convs=0)


def test_routing_itself_needs_no_torch():
    # The package's __init__ imports torch, so the file is run by itself.
    from ensembles.models import routing

    program = (
        "import runpy, sys; runpy.run_path(sys.argv[1]); "
        "raise SystemExit('torch' in sys.modules and 'torch was imported')"
    )
    finished = subprocess.run(
        [sys.executable, "-S", "-c", program, routing.__file__],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (finished.returncode, finished.stderr) == (0, "")
