"""What a loss makes of weights beside what reaches them through outputs, as a penalty does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ensembles.handling.state import preserved
from ensembles.handling.training import gradients_of, loss_of
from ensembles.instruments.step_effects import distance
from ensembles.subject import Loss

__all__ = ["coupled_by_weights"]

Values = Mapping[str, tuple[Tensor, ...]]


def coupled_by_weights(
    called: Callable[[], Values],
    loss: Loss,
    values: Values,
    modules: Sequence[nn.Module],
    change: Callable[[Tensor], Tensor],
) -> Iterator[tuple[str, str, float]]:
    """Whose weights change the gradient that a loss has in another member's weights by itself.

    What members predict is kept as it is. Parameters that several members use, or none, are
    nobody's, and are not looked at.

    Args:
        called: Calls the model in train mode, with the same random numbers at each call, because
            a penalty may be computed in forward and kept for the loss.
        loss: The training loss, a function of the dict of member outputs.
        values: What members predict, without a graph.
        modules: All modules, which are as before afterwards.
        change: Gives other weights.

    Yields:
        The member whose weights were changed, the member whose gradient is another, and by how
        much.

    Example:
        >>> one, two = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> def called():
        ...     return {"one": (one(torch.ones(1, 2)),), "two": (two(torch.ones(1, 2)),)}
        >>> def drawn_together(outputs):
        ...     return (one.weight - two.weight).square().sum()
        >>> found = coupled_by_weights(called, drawn_together, called(), [one, two], torch.neg)
        >>> [pair for *pair, _ in found]
        [['one', 'two'], ['two', 'one']]
    """
    parameters = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    weights = list(parameters.values())
    with preserved(modules):
        found = called()
        before = _by_itself(loss, values, weights)
        if all(gradient is None for gradient in before):
            return
        reached = {
            member: gradients_of(list(ys), [torch.ones_like(y) for y in ys], weights)
            for member, ys in found.items()
        }
    own = {
        member: [
            i
            for i in range(len(weights))
            if [name for name in reached if reached[name][i] is not None] == [member]
        ]
        for member in reached
    }
    for step in own:
        with preserved(modules):
            with torch.no_grad():
                for i in own[step]:
                    weights[i].copy_(change(weights[i]))
            called()
            after = _by_itself(loss, values, weights)
        for member in own:
            by = max((distance(before[i], after[i]) for i in own[member]), default=0.0)
            if by and member != step:
                yield step, member, by


def _by_itself(loss: Loss, values: Values, weights: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of the loss in weights, where outputs are leaves that no weight reaches."""
    leaves = {m: tuple(y.detach().requires_grad_() for y in ys) for m, ys in values.items()}
    # Clones, because a loss may change what it is given in place.
    value = loss_of(loss, {m: tuple(y.clone() for y in ys) for m, ys in leaves.items()})
    return gradients_of([value], [torch.ones_like(value)], weights)
