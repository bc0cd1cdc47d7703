"""A plugin of pytest: tests that use a golden, with every result rounded as on another CPU.

`python -m pytest -p tests.rounded_otherwise tests/checks` finds a golden that holds one machine's
figures: a count of roundings, or a number that is near nothing but roundings. Kernels of another
CPU add in another order. So here each element of a sum or product that has no exact result in its
dtype moves by a unit in the last place of its greatest term, up, down or not, as its digits say:
the same numbers are rounded alike wherever they are computed, and powers of two scale exactly.
"""

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

SALT = int(os.environ.get("ROUNDING", "1"))
"""Another number is another CPU."""

DTYPE = torch.float32

REDUCTIONS = {
    *(
        "addmm",
        "baddbmm",
        "bmm",
        "convolution",
        "convolution_backward",
        "dot",
        "linalg_vector_norm",
    ),
    *("linear", "matmul", "mean", "mkldnn_convolution", "mm", "mse_loss", "mv", "sum", "var"),
    *("native_batch_norm", "native_batch_norm_backward", "_native_batch_norm_legit"),
    *("native_group_norm", "native_group_norm_backward"),
    *("native_layer_norm", "native_layer_norm_backward"),
    *("_log_softmax", "_log_softmax_backward_data", "_softmax", "_softmax_backward_data"),
    *("cos", "exp", "log", "sigmoid", "sin", "tanh"),
}


class RoundedOtherwise(TorchDispatchMode):
    """Moves what is not exact."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ not in REDUCTIONS:
            return func(*args, **kwargs)
        exact = _called(func, args, kwargs, lambda x: x.double())
        terms = _called(func, args, kwargs, lambda x: x.double().abs())
        out = func(*args, **kwargs)
        for y, e, t in zip(_tensors(out), exact, terms, strict=False):
            if y.dtype == DTYPE and y.layout == torch.strided:
                y.copy_(_moved(y.detach(), e, t))
        return out


def _called(func: Any, args: Any, kwargs: Any, as_wide: Any) -> list[Tensor]:
    """The results in double precision; none where an operation takes no other dtype."""

    def wide(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return as_wide(x.detach()) if x.dtype == DTYPE else x.detach().clone()

    try:
        with torch.no_grad():
            return _tensors(func(*tree_map(wide, args), **tree_map(wide, kwargs)))
    except (RuntimeError, TypeError):
        return []


def _tensors(out: Any) -> list[Tensor]:
    return [y for y in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(y, Tensor)]


def _moved(y: Tensor, exact: Tensor, terms: Tensor) -> Tensor:
    exact, terms = exact.contiguous(), terms.abs().nan_to_num(0.0, 0.0)
    digits = (exact.abs().view(torch.int64) & ((1 << 52) - 1)) >> 8
    by = ((digits * (2654435761 + 2 * SALT)) >> 24) % 3 - 1
    greatest = torch.maximum(terms, y.double().abs())
    moved = (y.double() + by * exact.sign() * torch.finfo(DTYPE).eps * greatest).to(DTYPE)
    return torch.where((exact.to(DTYPE).double() != exact) & moved.isfinite(), moved, y)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if "golden" in getattr(item, "fixturenames", ())]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    with RoundedOtherwise():
        return (yield)
