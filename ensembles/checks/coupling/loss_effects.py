"""What a loss makes of one member that depends on another: on its prediction, or on its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ensembles.case import Case
from ensembles.checks.coupling.step_effects import Moved, other_members
from ensembles.handling.memory import as_kind_of
from ensembles.handling.state import Snapshot, generators_kept
from ensembles.handling.training import gradients_of, output_gradients, set_training
from ensembles.instruments.distances import distance
from ensembles.subject import Loss

__all__ = ["loss_effects"]

Values = Mapping[str, tuple[Tensor, ...]]


def loss_effects(case: Case, members: Sequence[str]) -> list[Moved]:
    """Which gradients of the training loss, if there is one, depend on another member.

    A penalty may be computed in forward and kept for the loss, so that the model is called anew
    for other weights. Parameters that several members use, or none, are nobody's: what they change
    is not looked at.

    Args:
        case: What is trained.
        members: The members that the model yields in eval mode.

    Raises:
        ValueError: If the model yields other members in train mode, or the loss does not fit.

    Example:
        >>> one, two = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> def drawn_together(outputs):
        ...     own = sum(y.square().sum() for y in outputs.values())
        ...     return own + (one.weight - two.weight).square().sum()
        >>> case = Case.of([one, two], torch.ones(1, 2), loss=drawn_together)
        >>> [(moved.step, moved.member, moved.kind) for moved in loss_effects(case, ["0", "1"])]
        [('0', '1', 'penalty'), ('1', '0', 'penalty')]
    """
    if case.subject.loss is None:
        return []
    with case.preserved() as start:
        outputs = _train_call(case)
        if list(outputs) != list(members):
            raise other_members(members, outputs)
        values = {m: tuple(y.detach().clone() for y in ys) for m, ys in outputs.items()}
        found = [
            *_by_predictions(case.subject.loss, values),
            *_by_weights(case, start, outputs, values),
        ]
    return [moved for moved in found if moved.by and moved.member != moved.step]


def _train_call(case: Case) -> Values:
    """Calls the model in train mode, with the same random numbers at each call."""
    set_training(case.model, case.model)
    with generators_kept():
        return case.call()


def _by_predictions(loss: Loss, values: Values) -> Iterator[Moved]:
    """How far each member's gradient goes if another predicts something else."""

    def gradients(values: Values) -> dict[str, list[Tensor | None]]:
        with generators_kept():
            return output_gradients(loss, values)

    expected = gradients(values)
    for step, ys in values.items():
        seen = [
            gradients({**values, step: tuple(change(y) for y in ys)})
            for change in (_nudged, _turned)
        ]
        for member in values:
            by = max(
                distance(a, b)
                for changed in seen
                for a, b in zip(expected[member], changed[member], strict=True)
            )
            yield Moved(step, member, "loss", "", by)


def _by_weights(case: Case, start: Snapshot, outputs: Values, values: Values) -> Iterator[Moved]:
    """How far each member's gradient goes if another has other weights, and predicts the same."""
    parameters = (p for module in case.everything for p in module.parameters() if p.requires_grad)
    weights = list({id(p): p for p in parameters}.values())
    before = _by_itself(case, values, weights)
    if all(gradient is None for gradient in before):
        return
    reached = {
        member: gradients_of(list(ys), [torch.ones_like(y) for y in ys], weights)
        for member, ys in outputs.items()
    }
    own: dict[str, list[int]] = {member: [] for member in reached}
    for i in range(len(weights)):
        users = [member for member, gradients in reached.items() if gradients[i] is not None]
        if len(users) == 1:
            own[users[0]].append(i)
    for step in own:
        start.restore()
        with torch.no_grad():
            for i in own[step]:
                weights[i].copy_(_nudged(weights[i]))
        _train_call(case)
        after = _by_itself(case, values, weights)
        for member in own:
            by = max((distance(before[i], after[i]) for i in own[member]), default=0.0)
            yield Moved(step, member, "penalty", "", by)


def _by_itself(case: Case, values: Values, weights: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of the loss in weights, where outputs are leaves that no weight reaches."""
    leaves = {m: tuple(y.detach().requires_grad_() for y in ys) for m, ys in values.items()}
    with generators_kept():
        # Clones, because a loss may change what it is given in place.
        value = case.loss({m: tuple(y.clone() for y in ys) for m, ys in leaves.items()})
        return gradients_of([value], [torch.ones_like(value)], weights)


def _nudged(output: Tensor) -> Tensor:
    """Another prediction of the same kind: probabilities stay in [0, 1], signs stay."""
    generator = torch.Generator().manual_seed(0)
    share = as_kind_of(0.25 * (1 - torch.rand(output.shape, generator=generator)), output)
    return torch.where(output == 0, share, output * (1 - share))


def _turned(output: Tensor) -> Tensor:
    """The same numbers for other classes: who is right, or the surest, is somebody else."""
    return output.flip(-1) if output.ndim else -output
