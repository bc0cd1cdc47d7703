"""How far two computations of one thing may lie apart: one rule, by dtype and kind of comparison.

Numbers are rounded at two places. Inside a sum they are kept in the accumulator's dtype: float32
for what is narrower than float32, and else the dtype itself. What an operation returns is rounded
once more, to the dtype in which it is stored. So a tolerance is

    stored * eps(dtype) + summed * eps(accumulator)

as a part of the greatest number, or of the 2-norm, that it is compared with. `stored` and `summed`
are what differs between kinds of comparison, and `KINDS` has both. The dtype is the coarsest of all
that took part: parameters, inputs, outputs, what autocast computes in, what weights were cast to.

Sources. A rounding is off by at most eps / 2 (Higham 2002, "Accuracy and Stability of Numerical
Algorithms", section 2.2). A sum of n terms is off by at most l sqrt(n) eps / 2 of the sum of their
sizes, but for a probability of 2 n exp(-l^2 / 2) (Higham and Mary 2019, "A New Approach to
Probabilistic Rounding Error Analysis"), and two of them by twice as much: with l = 8 that is 64
units for 64 terms and 1000 for 15,000; kernels add in blocks and need less. How networks amplify
roundings was measured on one thread of a CPU, with kernels for AVX-512, for AVX2 and for neither,
of MLPs of up to 50 layers and 4096 units, CNNs, transformers, an LSTM, and
torchvision's ResNet-18 and -50, DenseNet-121, MobileNet-V2, EfficientNet-B0, ViT and ConvNeXt.
`KINDS` says how much it was for each kind.

A tolerance of 1 or more can tell nothing, so it is refused. That is so for the 8-bit floating types
in networks: their outputs were 0.6 of the greatest apart after 20 layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["KINDS", "Kind", "Roundings", "clear_change", "coarsest", "tolerance_of", "unit_of"]

Kind = Literal["bitwise", "reordered", "rewritten", "rescaled", "recomputed"]
"""What the two computations have in common; see `KINDS`."""


@dataclass(frozen=True)
class Roundings:
    """How many roundings two computations may lie apart.

    Attributes:
        stored: In units of the dtype in which results are stored.
        summed: In units of the dtype in which sums are kept.
    """

    stored: int
    summed: int


KINDS: Mapping[Kind, Roundings] = {
    "bitwise": Roundings(0, 0),
    "reordered": Roundings(1, 64),
    "rewritten": Roundings(4, 1000),
    "rescaled": Roundings(8, 1000),
    "recomputed": Roundings(16, 1000),
}
"""By kind of comparison:

- `bitwise`: the same operations on the same numbers, in the same order.
- `reordered`: the same, but numbers lie elsewhere in memory, and a kernel may add them in another
  order. Measured: 0 everywhere; torch.testing.assert_close takes 1 unit in float16, 2 in bfloat16
  and 11 in float32 for one operation.
- `rewritten`: one formula of a few operations, written in another way: a mean, a softmax, a loss.
  Measured: 1.2 units for geometric means of 32 members, 2.3 of 128, in every dtype.
- `rescaled`: the gradient of one network, times a factor, in the 2-norm. Measured: 2.8 units in
  bfloat16 and float16 (ResNet-50), 24 in float32, 49 in float64 (ResNet-18).
- `recomputed`: one network by other kernels, for another size of the batch, or with weights that
  were cast, relative to the greatest output. Measured: 7.5 units in float16, 6.7 in bfloat16, 21 in
  float32, 17 in float64; 14.1 of 2^-7 with 8-bit weights; 2.3 of float16 where weights were cast
  to it. All of these are of 20 layers with norms and without shortcuts, where noise grows.
"""

CLEAR = 4
"""Tolerances by which an experiment changes weights at least, so that outputs differ by some."""

UNITS: Mapping[torch.dtype, float] = {torch.qint8: 2.0**-7, torch.quint8: 2.0**-7}
"""Of what is no floating type: 127 steps up to the greatest weight."""


def unit_of(dtype: torch.dtype) -> float:
    """The distance from 1 to the next number; 0.0 for whole numbers, which are not rounded.

    Example:
        >>> unit_of(torch.bfloat16), unit_of(torch.qint8), unit_of(torch.int64)
        (0.0078125, 0.0078125, 0.0)
    """
    if dtype in UNITS:
        return UNITS[dtype]
    if dtype.is_floating_point or dtype.is_complex:
        return float(torch.finfo(dtype).eps)
    return 0.0


def coarsest(*took_part: Tensor | torch.dtype) -> torch.dtype | None:
    """The dtype with the largest unit; None where nothing is rounded.

    Args:
        took_part: Tensors, or dtypes.

    Example:
        >>> coarsest(torch.ones(1), torch.bfloat16, torch.int64)
        torch.bfloat16
    """
    dtypes = [x.dtype if isinstance(x, Tensor) else x for x in took_part]
    found = max(dtypes, key=unit_of, default=None)
    return found if found is not None and unit_of(found) else None


def tolerance_of(kind: Kind, *took_part: Tensor | torch.dtype) -> float:
    """How far two computations may lie apart, as a part of the greatest number or of the 2-norm.

    Args:
        kind: One of `KINDS`.
        took_part: All tensors, or dtypes, that took part in either computation.

    Returns:
        The tolerance; 0.0 where nothing is rounded.

    Raises:
        ValueError: If there is no such kind, or the dtype is so coarse that nothing could be told.

    Example:
        >>> f"{tolerance_of('recomputed', torch.float32):.1e}"
        '1.2e-04'
        >>> f"{tolerance_of('recomputed', torch.ones(1), torch.bfloat16):.1e}"
        '1.3e-01'
        >>> tolerance_of("bitwise", torch.bfloat16)
        0.0
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of comparison: it is {', '.join(get_args(Kind))}.")
    dtype = coarsest(*took_part)
    if dtype is None:
        return 0.0
    unit, roundings = unit_of(dtype), KINDS[kind]
    accumulator = min(unit, unit_of(torch.float32))
    tolerance = roundings.stored * unit + roundings.summed * accumulator
    if tolerance >= 1:
        raise ValueError(
            f"numbers of {dtype} are rounded by up to {unit / 2:.0%}, and a network that is "
            "computed in another way may give any outputs: nothing can be told from them. Compare "
            "it in bfloat16 or more."
        )
    return tolerance


def clear_change(least: float, *took_part: Tensor | torch.dtype) -> float:
    """By what share an experiment changes numbers, so that outputs of a network differ clearly.

    Args:
        least: The share that is enough where the dtype can tell it.
        took_part: As for `tolerance_of`.

    Example:
        >>> clear_change(0.1, torch.float32), round(clear_change(0.1, torch.bfloat16), 1)
        (0.1, 0.5)
    """
    return max(least, CLEAR * tolerance_of("recomputed", *took_part))
