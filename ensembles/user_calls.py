"""Calls functions of the user. An error names the argument, the user's file and line, and a remedy.

Standard library and pytest only. All of `make`, `batch`, `optimizer`, `loss` and the others are
called here, so that their errors read the same, whether they raise, skip the test or exit.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from textwrap import shorten
from traceback import walk_tb
from types import FrameType
from typing import Any
from unittest import SkipTest

import pytest

__all__ = ["ERRORS", "STOPS", "asked", "called", "raised", "said"]

LONGEST = 400
"""Characters that are shown of another package's error: some name every key of a state dict."""

OURS = (
    "ensembles.user_calls",
    "ensembles.gate.conformance",
    "ensembles.sources.inferred_batch",
    "ensembles.subject",
    "ensembles.case",
    "ensembles.handling.members",
    "ensembles.handling.numbers",
    "ensembles.sources.factories",
)

SKIPS = (SkipTest, pytest.skip.Exception, pytest.xfail.Exception)

NOT_LOOKED_AT = (
    "A claim does not hold if nothing looked at it: raise an error, or do not claim it here."
)
"""Said of a function that skips: on a machine without the data or the GPU, a gate is not green."""

STOPS = (SystemExit, pytest.exit.Exception, pytest.fail.Exception, *SKIPS)
"""What ends a run, or a test before its check has looked. No check lets any of them through."""

ERRORS = (Exception, SystemExit, *SKIPS)
"""What counts as an error of the function that raises it.

pytest.fail is not among them: it also ends a test that takes too long, and a check must not take
that for a model that cannot be called. KeyboardInterrupt stops the run.
"""

LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
"""Folders of libraries: a line in a library says less than the line that called it."""


def asked(argument: str, function: Callable[..., Any], *given: Any, then: str) -> Any:
    """What a function of the user returns.

    Args:
        argument: What the user gave it as, such as "optimizer".
        function: The function.
        given: What it is called with.
        then: What the function takes and returns, in a sentence.

    Raises:
        ValueError: If it raises, skips or exits. It names the argument, the error, and the place
            in the user's file.

    Example:
        >>> asked("batch", lambda: {}["images"], then="It returns what the model is called with.")
        Traceback (most recent call last):
        ValueError: batch=... raised KeyError: 'images'. It returns what the model is called with.
    """
    __tracebackhide__ = True
    try:
        return function(*given)
    except ERRORS as error:
        if _is_ours(error):
            raise
        what = f"{argument}={called(function)}"
        raise ValueError(raised(what, error, then, of=function)) from error


def called(function: Any) -> str:
    """The name of a function, or "..." if it has none.

    Example:
        >>> called(sum), called(lambda: 1), called(partial(sum))
        ('sum', '...', 'sum')
    """
    name = str(getattr(_inner(function), "__name__", type(function).__name__))
    return "..." if name == "<lambda>" else name


def raised(what: str, error: BaseException, then: str = "", *, of: Any = None) -> str:
    """Says in full sentences that something raised an error, where, and what to do.

    Args:
        what: What raised it.
        error: The error.
        then: What to do: a sentence, or "".
        of: The function or object that was called. Its own lines are shown even if it comes from a
            library.

    Example:
        >>> raised("clip=...", ZeroDivisionError("division by zero"), "It takes the model.")
        'clip=... raised ZeroDivisionError: division by zero. It takes the model.'
    """
    told = f"{what} raised {said(error, of=of)}"
    skipped = f"{NOT_LOOKED_AT} " if isinstance(error, SKIPS) else ""
    return f"{told}{'' if told.endswith(('?', '!')) else '.'} {skipped}{then}".rstrip()


def said(error: BaseException, *, of: Any = None) -> str:
    """An error in one line, without a full stop, with the place in the user's file.

    Example:
        >>> said(ValueError("no such file."))
        'ValueError: no such file'
    """
    text = shorten(str(error), LONGEST, placeholder=" ...")
    text = text if text.endswith("...") else text.removesuffix(".")
    place = _place(error, of)
    told = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"{told} ({place})" if place else told


def _place(error: BaseException, of: Any) -> str:
    frames = [(frame, line) for frame, line in walk_tb(error.__traceback__) if _is_file(frame)]
    mine = [(frame.f_code.co_filename, line) for frame, line in frames if not _is_others(frame)]
    if not mine:
        module = str(getattr(_inner(of), "__module__", None) or type(of).__module__)
        home = module.partition(".")[0]
        # A line of PyTorch or of this package says nothing about the user's code.
        if home not in ("torch", "ensembles", *sys.stdlib_module_names):
            mine = [(f.f_code.co_filename, line) for f, line in frames if _root(f) == home]
            mine = mine or list(_definition(of))
    if not mine:
        return ""
    path, line = mine[-1]
    below = os.path.relpath(path)
    return f"{path if below.startswith(os.pardir) else below}:{line}"


def _is_ours(error: BaseException) -> bool:
    """Whether it has a message already: from an inferred batch, `split_axis`, or an inner call."""
    frames = [str(frame.f_globals.get("__name__")) for frame, _ in walk_tb(error.__traceback__)]
    return isinstance(error, ValueError) and frames[-1] in OURS


def _inner(function: Any) -> Any:
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__wrapped__", function)


def _definition(of: Any) -> Iterator[tuple[str, int]]:
    """Where a function is defined that could not be called, because it takes other arguments."""
    code = getattr(_inner(of), "__code__", None)
    if code is not None and os.path.isfile(code.co_filename):
        yield code.co_filename, code.co_firstlineno


def _is_file(frame: FrameType) -> bool:
    return os.path.isfile(frame.f_code.co_filename)


def _is_others(frame: FrameType) -> bool:
    return _root(frame) in ("torch", "ensembles") or frame.f_code.co_filename.startswith(LIBRARIES)


def _root(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]
