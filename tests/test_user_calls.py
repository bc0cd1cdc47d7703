"""Calls of what the user wrote: an error names argument, file and line, and what to do."""

import sys
import unittest
from functools import partial

import pytest
from torch import nn

from ensembles.subject import split_axis
from ensembles.user_calls import LONGEST, NOT_LOOKED_AT, asked, called, raised, said

THEN = "It takes nothing."


def here(function, ahead=1) -> str:
    return f"tests/test_user_calls.py:{function.__code__.co_firstlineno + ahead}"


def below(count):
    return nn.Linear(count, 2)


def told(function, *given) -> str:
    with pytest.raises(ValueError, match="raised") as refused:
        asked("make", function, *given, then=THEN)
    return str(refused.value)


def test_what_a_function_returns_is_given_back():
    assert asked("make", lambda x, y: x - y, 5, 3, then=THEN) == 2


def test_the_innermost_line_of_the_users_is_named_and_not_that_of_pytorch():
    found = told(lambda: below("a"))
    assert found.startswith("make=... raised TypeError: empty(): argument 'size' failed")
    assert found.endswith(f" ({here(below)}). {THEN}")


def test_a_function_that_cannot_be_called_is_named_with_where_it_stands():
    assert told(below) == (
        "make=below raised TypeError: below() missing 1 required positional argument: 'count' "
        f"({here(below, 0)}). {THEN}"
    )


def test_a_library_is_named_only_where_it_is_what_the_user_gave(tmp_path, monkeypatch):
    (tmp_path / "builder.py").write_text("def build():\n    raise KeyError('width')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("ensembles.user_calls.LIBRARIES", (str(tmp_path),))
    import builder

    assert told(builder.build).startswith(
        f"make=build raised KeyError: 'width' ({tmp_path}/builder.py:2)."
    )

    def build():
        return builder.build()

    assert told(build).startswith(f"make=build raised KeyError: 'width' ({here(build)}).")
    sys.modules.pop("builder")


def test_layers_of_pytorch_have_no_place():
    assert told(partial(nn.Linear, "a", 2)).partition("but got ")[2] == f'str". {THEN}'


def test_an_error_that_is_told_already_is_left_as_it_is():
    with pytest.raises(ValueError, match=r"^split_axis\(1\) splits a tensor"):
        asked("outputs", split_axis(1), {}, then=THEN)
    with pytest.raises(ValueError, match=r"^batch=\.\.\. raised KeyError: 'images' \("):
        asked("make", lambda: asked("batch", lambda: {}["images"], then=THEN), then=THEN)


def skipping():
    pytest.skip("needs a GPU")


def expecting_to_fail():
    pytest.xfail("known")


def skipping_as_unittest_does():
    raise unittest.SkipTest("no data")


def exiting():
    sys.exit(0)


def ending_the_run():
    pytest.exit("enough", returncode=0)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (skipping, f"Skipped: needs a GPU ({here(skipping)}). {NOT_LOOKED_AT} {THEN}"),
        (expecting_to_fail, f"XFailed: known ({here(expecting_to_fail)}). {NOT_LOOKED_AT} {THEN}"),
        (
            skipping_as_unittest_does,
            f"SkipTest: no data ({here(skipping_as_unittest_does)}). {NOT_LOOKED_AT} {THEN}",
        ),
        (exiting, f"SystemExit: 0 ({here(exiting)}). {THEN}"),
        (ending_the_run, f"Exit: enough ({here(ending_the_run)}). {THEN}"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_function_that_skips_or_exits_is_an_error_of_its_own(function, text):
    assert told(function) == f"make={function.__name__} raised {text}"


@pytest.mark.parametrize("passing", [KeyboardInterrupt, pytest.fail.Exception])
def test_what_stops_a_person_or_a_clock_passes(passing):
    def stopped():
        raise passing("now")

    with pytest.raises(passing, match=r"^now$"):
        asked("make", stopped, then=THEN)


def test_names_are_those_of_functions_also_below_a_partial():
    assert (called(below), called(partial(below, 3)), called(lambda: 1)) == (
        "below",
        "below",
        "...",
    )


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("no such file."), "ValueError: no such file"),
        (ValueError("and so on..."), "ValueError: and so on..."),
        (ValueError("two\n\tlines"), "ValueError: two lines"),
        (ValueError(), "ValueError"),
        (KeyError("width"), "KeyError: 'width'"),
    ],
)
def test_every_error_is_one_line_without_a_full_stop(error, text):
    assert said(error) == text


def test_a_long_error_is_cut_between_words_and_says_so():
    found = said(ValueError("key " * LONGEST))
    assert found.endswith("key ...")
    assert LONGEST - 10 < len(found.removeprefix("ValueError: ")) <= LONGEST


def test_there_is_one_full_stop_with_and_without_what_to_do():
    assert raised("step()", ValueError("no closure.")) == "step() raised ValueError: no closure."
    assert raised("a", ValueError("b"), "Do c.") == "a raised ValueError: b. Do c."


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Is it so?", "x raised ValueError: Is it so? Do this."),
        ("It is so.", "x raised ValueError: It is so. Do this."),
    ],
)
def test_what_was_asked_is_not_ended_again(text, told):
    assert raised("x", ValueError(text), "Do this.") == told
