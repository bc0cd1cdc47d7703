"""The rule of tolerance: kinds and dtypes."""

import re

import pytest
import torch

from ensembles.tolerance import KINDS, coarsest, tolerance_of, unit_of

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kinds_are_ordered_by_what_computations_have_in_common(dtype):
    tolerances = [tolerance_of(kind, dtype) for kind in KINDS]
    assert tolerances[0] == 0.0
    assert tolerances == sorted(tolerances)
    assert len(set(tolerances)) == len(KINDS)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bitwise"])
def test_coarser_dtypes_tell_less(kind):
    tolerances = [tolerance_of(kind, dtype) for dtype in DTYPES]
    assert tolerances == sorted(set(tolerances))


@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_narrow_numbers_are_kept_in_float32(kind):
    stored, summed = KINDS[kind].stored, KINDS[kind].summed
    for dtype in (torch.float16, torch.bfloat16):
        unit = torch.finfo(dtype).eps
        assert tolerance_of(kind, dtype) == stored * unit + summed * torch.finfo(torch.float32).eps
    unit = torch.finfo(torch.float64).eps
    assert tolerance_of(kind, torch.float64) == (stored + summed) * unit


def test_the_coarsest_of_all_that_took_part_counts():
    wide, narrow = torch.ones(1), torch.ones(1, dtype=torch.bfloat16)
    assert tolerance_of("recomputed", wide, narrow) == tolerance_of("recomputed", torch.bfloat16)
    assert tolerance_of("recomputed", wide, torch.qint8) > tolerance_of("recomputed", wide)
    # float16 has more digits than bfloat16, though it holds smaller numbers
    assert coarsest(torch.float16, torch.bfloat16) is torch.bfloat16


def test_complex_numbers_round_as_their_parts_do():
    assert unit_of(torch.complex64) == unit_of(torch.float32)
    assert tolerance_of("recomputed", torch.complex128) == tolerance_of("recomputed", torch.float64)


def test_whole_numbers_are_not_rounded():
    assert coarsest(torch.int64, torch.bool) is None
    assert tolerance_of("recomputed", torch.arange(3)) == 0.0
    assert tolerance_of("recomputed") == 0.0


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_what_tells_nothing_is_refused(dtype):
    message = f"numbers of {dtype} are rounded by up to"
    with pytest.raises(ValueError, match=re.escape(message)):
        tolerance_of("recomputed", dtype)
    assert tolerance_of("reordered", dtype) == pytest.approx(unit_of(dtype), rel=1e-3)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'near' is no kind of comparison: it is bitwise, reorder"):
        tolerance_of("near", torch.float32)
