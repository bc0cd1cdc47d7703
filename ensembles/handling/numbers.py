"""Refuses parameters without usable numbers, before a check computes with them."""

from __future__ import annotations

from torch import Tensor
from torch.nn.parameter import is_lazy

from ensembles.handling.members import named_modules_of
from ensembles.handling.memory import numbers_in
from ensembles.subject import Model

__all__ = ["checked_initialised", "checked_numbers"]


def checked_numbers(model: Model) -> None:
    """Refuses parameters that hold no usable numbers, before a check computes with them.

    Raises:
        ValueError: If a parameter is lazy, on the meta device, integer, complex, NaN or infinite.
            It names the first one and says what to do.

    Example:
        >>> checked_numbers(nn.Linear(4, 2, device="meta"))
        Traceback (most recent call last):
        ValueError: parameter model.weight is on the meta device, ...
    """
    for member, module in named_modules_of(model).items():
        for name, parameter in module.named_parameters():
            place = f"parameter {member}.{name}"
            checked_initialised(parameter, place)
            if parameter.device.type == "meta":
                raise ValueError(
                    f"{place} is on the meta device, but this check computes with numbers. "
                    "Build the model on a real device. The sharing check works on meta."
                )
            if not parameter.is_floating_point():
                raise ValueError(
                    f"{place} has dtype {parameter.dtype}, but this check needs real "
                    "floating-point parameters. Make an integer table a buffer; store complex "
                    "weights as pairs of real numbers."
                )
            # A frozen parameter may be an additive mask that holds minus infinity.
            numbers = numbers_in(parameter, place)
            usable = numbers.isfinite()
            if not parameter.requires_grad:
                usable |= numbers.isinf()
            if not usable.all():
                wrong = int((~usable).sum())
                raise ValueError(
                    f"{place} holds NaN or infinity in {wrong} of {numbers.numel()} elements. "
                    "Nothing can be concluded from it: repair the initialisation or the checkpoint."
                )


def checked_initialised(tensor: Tensor, place: str) -> None:
    """Refuses a lazy parameter that has no shape yet.

    Example:
        >>> checked_initialised(nn.LazyLinear(2).weight, "parameter head.weight")
        Traceback (most recent call last):
        ValueError: parameter head.weight is lazy and has no shape yet. Call the model on ...
    """
    if is_lazy(tensor):
        raise ValueError(
            f"{place} is lazy and has no shape yet. Call the model on one batch in make() first."
        )
