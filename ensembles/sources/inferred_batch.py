"""Makes a batch for a model that came without one: a module or list from the command line."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ensembles.handling.members import member_outputs, named_modules_of
from ensembles.handling.numbers import checked_initialised
from ensembles.handling.state import preserved
from ensembles.handling.training import hidden_modules
from ensembles.subject import Model

__all__ = ["inferred_batch"]

ROWS = 4
TOKENS = 16
SIDES = (32, 64, 224, 299)
"""Image sides that published classifiers take: CIFAR, Tiny ImageNet, ImageNet, Inception."""

MISMATCHES = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)
"""What a model raises for a batch that it does not accept; other errors are its own."""


def inferred_batch(model: Model) -> Any:
    """A random batch that the model accepts. Its shape comes from the first layer with weights.

    If a module gives its input in `example_input_array` (as Lightning modules do), that is taken.
    Otherwise the first convolution, linear or embedding layer gives the shape, and images are tried
    at the sides `SIDES`.

    Args:
        model: One module, or the members as a list or dict of modules.

    Returns:
        A tensor of `ROWS` samples, or what `example_input_array` holds.

    Raises:
        ValueError: If the model accepts no such batch; it says what was tried. An error of the
            model itself, such as a KeyError, is raised at once.

    Example:
        >>> inferred_batch(nn.Sequential(nn.Linear(12, 3), nn.ReLU())).shape
        torch.Size([4, 12])
    """
    first = next(iter(named_modules_of(model).values()))
    stated = getattr(first, "example_input_array", None)
    if stated is not None:
        return stated
    candidates = _candidates(first)
    errors = []
    for batch in candidates:
        try:
            with preserved(model), torch.no_grad():
                for module in named_modules_of(model).values():
                    module.eval()
                member_outputs(model, batch)
        except ValueError as error:
            if error.__cause__ is not None and not isinstance(error.__cause__, MISMATCHES):
                raise ValueError(
                    f"{error} No batch was given, so this one was inferred from the first layer: "
                    "if the model takes another, return a Subject(make=..., batch=...)."
                ) from error.__cause__
            errors.append(str(error))
        else:
            return batch
    tried = f" Tried: {errors[-1]}" if errors else ""
    raise ValueError(
        f"no batch was given, and none could be inferred for {type(first).__name__}. Return a "
        "Subject(make=..., batch=...). Its batch is a function that returns what the model is "
        "called with: a tensor, a tuple of positional arguments, or a dict of keyword arguments."
        f"{tried}"
    )


def _candidates(module: nn.Module) -> list[Tensor]:
    for name, parameter in module.named_parameters():
        checked_initialised(parameter, f"parameter {name}")
    # Also layers that a Python list hides from the model, so that a check can report them.
    layers = [each for one in (module, *hidden_modules([module])) for each in one.modules()]
    parameters = (p for layer in layers for p in layer.parameters(recurse=False))
    like = next(parameters, torch.zeros(()))
    if not like.is_floating_point():
        like = torch.zeros((), device=like.device)
    for layer in layers:
        if isinstance(layer, nn.Embedding):
            tokens = torch.randint(layer.num_embeddings, (ROWS, TOKENS), device=like.device)
            return [tokens]
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            space = len(layer.kernel_size)
            return [
                torch.randn(ROWS, layer.in_channels, *[side] * space, dtype=like.dtype).to(like)
                for side in (SIDES if space < 3 else SIDES[:2])
            ]
        if isinstance(layer, nn.Linear):
            return [torch.randn(ROWS, layer.in_features, dtype=like.dtype).to(like)]
    return []
