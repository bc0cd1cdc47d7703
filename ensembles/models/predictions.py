"""From the members' logits to the ensemble's prediction, in log space.

With p_m the members' distributions of one sample, the arithmetic mean is mean_m p_m, the geometric
mean softmax(mean_m log p_m), which is softmax of the mean of logits, and the vote the share of
members whose most probable class it is. They are three different classifiers.
"""

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["Reduction", "log_probabilities", "predict"]

Reduction = Literal["arithmetic", "geometric", "vote"]
"""How the members' distributions become one."""


def predict(logits: Mapping[str, Tensor], reduction: Reduction = "arithmetic") -> Tensor:
    """Reduces the members' logits to the ensemble's log-probabilities.

    Where shares of votes are equal, so are their log-probabilities, and `argmax` takes the lowest
    class. A member with several greatest logits votes for the lowest class of them.

    Example:
        >>> logits = {
        ...     "member_0": torch.tensor([[0.0, 4.0]]),
        ...     "member_1": torch.tensor([[1.0, 0.0]]),
        ...     "member_2": torch.tensor([[1.0, 0.0]]),
        ... }
        >>> predict(logits).exp()
        tensor([[0.4934, 0.5066]])
        >>> predict(logits, "geometric").exp()
        tensor([[0.3392, 0.6608]])
        >>> predict(logits, "vote").exp()
        tensor([[0.6667, 0.3333]])

    Args:
        logits: Of each member, by its name, of shape (sample, class).
        reduction: ``arithmetic``, ``geometric`` or ``vote``.

    Returns:
        Log-probabilities (sample, class), each row a distribution: in float32, or in float64 where
        a member's logits are. A class without probability, such as one without a vote, has -inf.

    Raises:
        ValueError: If ``reduction`` is unknown, as `log_probabilities` does, or if members that
            give the probability 0 leave no class to a row's geometric mean.
        FloatingPointError: As `log_probabilities` does.

    Source:
        Mania and Sra 2020 (arXiv 2012.15483) for votes; Abe et al. 2022 (arXiv 2202.06985) and Wood
        et al. 2023 (arXiv 2301.03962) for arithmetic against geometric means.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")
    stacked = torch.stack(list(log_probabilities(logits).values()))
    if reduction == "vote":
        return _votes(logits, stacked)
    if reduction == "geometric":
        return _geometric_mean(stacked)
    # logsumexp has no gradient where every member is at -inf.
    nowhere = stacked.isneginf().all(dim=0)
    total = stacked.masked_fill(nowhere, 0.0).logsumexp(dim=0)
    return total.masked_fill(nowhere, -math.inf) - math.log(len(stacked))


def log_probabilities(logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Checks the members' logits and normalises them, in float32 at least.

    Example:
        >>> log_probabilities({"member_0": torch.tensor([[0.0, 0.0]])})
        {'member_0': tensor([[-0.6931, -0.6931]])}

    Args:
        logits: Of each member, by its name, of shape (sample, class). -inf excludes a class.

    Returns:
        The log-probabilities of each member, of the same shape: float64 where one member's logits
        are, and float32 otherwise.

    Raises:
        TypeError: If ``logits`` is no mapping of tensors.
        ValueError: If it is empty, a member's logits are not floating-point numbers of shape
            (sample, class), or members differ in shape.
        FloatingPointError: If a row is no distribution, because of NaN, of +inf, or because -inf
            is all there is.
    """
    _check_shapes(logits)
    dtype = torch.float32
    for given in logits.values():
        dtype = torch.promote_types(dtype, given.dtype)
    normalised = {
        name: torch.log_softmax(given.to(dtype), dim=-1) for name, given in logits.items()
    }
    # All members at once: on an accelerator every look at a value waits for the device.
    if torch.stack([found.isnan().any() for found in normalised.values()]).any():
        for name, found in normalised.items():
            if found.isnan().any():
                raise FloatingPointError(_undefined(name, logits[name], found))
    return normalised


def _check_shapes(logits: Mapping[str, Tensor]) -> None:
    if not isinstance(logits, Mapping):
        raise TypeError(
            "logits must be a mapping of member names to tensors (sample, class), got a "
            f"{type(logits).__name__}"
        )
    if not logits:
        raise ValueError("logits is empty: give those of at least one member")
    for name, given in logits.items():
        if not isinstance(given, Tensor):
            raise TypeError(f"logits of {name} must be a tensor, got a {type(given).__name__}")
        if given.ndim != 2 or given.shape[1] == 0 or not given.is_floating_point():
            raise ValueError(
                f"logits of {name} must be floating-point numbers of shape (sample, class), got "
                f"{given.dtype} of shape {tuple(given.shape)}"
            )
    first, *others = logits
    for name in others:
        if logits[name].shape != logits[first].shape:
            raise ValueError(
                f"logits of {name} have shape {tuple(logits[name].shape)}, and those of {first} "
                f"{tuple(logits[first].shape)}: members predict the same samples and classes"
            )


def _undefined(name: str, given: Tensor, normalised: Tensor) -> str:
    rows = normalised.isnan().any(dim=1)
    row = int(rows.nonzero()[0])
    values = given[row]
    if values.isnan().any():
        what = "NaN"
    elif values.isposinf().any():
        what = "+inf"
    else:
        what = "-inf for every class"
    return (
        f"logits of {name} are no distribution: {what} in row {row} ({int(rows.sum())} of "
        f"{len(rows)} rows are none). Usual cause: training that diverges (a learning rate that "
        "is too high, or float16 that overflows), or a class mask that excludes everything."
    )


def _geometric_mean(stacked: Tensor) -> Tensor:
    # Divided before they are summed: logarithms near the end of the range would overflow.
    mean = (stacked / len(stacked)).sum(dim=0)
    empty = mean.isneginf().all(dim=1)
    if empty.any():
        raise ValueError(
            f"row {int(empty.nonzero()[0])} has no geometric mean ({int(empty.sum())} of "
            f"{len(empty)} rows): every class has the probability 0 with some member. Exclude the "
            "same classes for all members, or take the arithmetic mean."
        )
    return torch.log_softmax(mean, dim=-1)


def _votes(logits: Mapping[str, Tensor], stacked: Tensor) -> Tensor:
    # Of the logits as given: log_softmax can round different ones to the same.
    votes = torch.stack([given.argmax(dim=-1) for given in logits.values()])
    counts = torch.zeros_like(stacked[0])
    counts.scatter_add_(1, votes.T, torch.ones_like(votes.T, dtype=counts.dtype))
    return (counts / len(votes)).log()
