"""What a call of a model uses: modules, unregistered tensors in arithmetic, random numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = ["Usage"]

RANDOM = frozenset(
    {"dropout", "alpha_dropout", "feature_dropout", "bernoulli", "multinomial", "rand", "randn"}
    | {"rand_like", "randn_like", "randint", "randperm", "normal", "rrelu", "gumbel_softmax"}
    | {f"dropout{n}d" for n in (1, 2, 3)}
    | {f"{word}_" for word in ("bernoulli", "normal", "uniform", "exponential", "random")}
    | {"feature_alpha_dropout", "scaled_dot_product_attention"}
)


class Usage(TorchFunctionMode):
    """Records, while it is entered, what calls use.

    Args:
        watched: Tensors, by id, of which it is to be known whether arithmetic mixes them with
            others.

    Attributes:
        modules: Every module that was called, by id.
        mixed: The ids of watched tensors that an operation took together with another tensor, as
            only tensors on one device can be. Indexing and moving are none, and what was
            moved before is not listed.
        random: The names of functions that drew random numbers, in order.

    Example:
        >>> mask = torch.ones(2)
        >>> with Usage({id(mask): mask}) as usage:
        ...     _ = torch.zeros(2) * mask
        >>> id(mask) in usage.mixed
        True
    """

    def __init__(self, watched: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.watched = watched
        self.modules: dict[int, nn.Module] = {}
        self.sent: set[int] = set()
        self.mixed: dict[int, None] = {}
        self.random: dict[str, None] = {}

    def __enter__(self) -> Usage:
        def enters(module: nn.Module, args: Any) -> None:
            self.modules[id(module)] = module

        self._hook = nn.modules.module.register_module_forward_pre_hook(enters)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hook.remove()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Looks at the arguments, and calls."""
        given = kwargs or {}
        name = str(getattr(func, "__name__", ""))
        tensors = [x for x in pytree.tree_leaves((args, given)) if isinstance(x, Tensor)]
        if name in ("to", "type_as", "cuda", "cpu") and _names_a_device(name, args, given):
            self.sent.add(id(args[0]))  # where it is there already, `to` returns it itself
        if len({id(x) for x in tensors}) > 1 and name not in ("__getitem__", "__setitem__", "to"):
            for x in tensors:
                if id(x) in self.watched and x.ndim and id(x) not in self.sent:
                    self.mixed[id(x)] = None
        if name in RANDOM:
            state = torch.get_rng_state()
            result = func(*args, **given)
            if not torch.equal(state, torch.get_rng_state()):
                self.random[name] = None
            return result
        return func(*args, **given)


def _names_a_device(name: str, args: Any, given: Mapping[str, Any]) -> bool:
    """Whether a call of `to` and its like may move the tensor, and not only cast it."""
    return (
        name != "to"
        or "device" in given
        or any(isinstance(x, (torch.device, str, int, Tensor)) for x in args[1:2])
    )
