"""Every public name resolves, is documented, and shows an example; the registry lists them."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import ensembles
from ensembles import plugin
from ensembles.registry import PROMISES, PUBLIC

ROOT = Path(__file__).parents[1]
STUB = ROOT / "ensembles" / "__init__.pyi"


@pytest.mark.parametrize("name", ensembles.__all__)
def test_a_public_name_is_documented_with_an_example(name):
    documented = inspect.getdoc(getattr(ensembles, name))
    assert documented
    # an example that draws needs Graphviz, and is shown but not run
    assert re.search(r"^Example(:\n    >>> |::\n\n    draw_)", documented, re.MULTILINE)


def test_public_names_are_listed_and_others_are_refused():
    assert set(ensembles.__all__) < set(dir(ensembles))
    with pytest.raises(
        AttributeError, match=re.escape("module 'ensembles' has no attribute 'subnets'")
    ):
        ensembles.subnets  # noqa: B018


def test_the_version_is_that_of_the_project():
    text = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{ensembles.__version__}"' in text


def stub() -> str:
    """What type checkers read in place of `ensembles/__init__.py`, from the registry."""
    lines = ['"""Public names for type checkers; a test writes them from the registry."""', ""]
    for name, module in sorted(PUBLIC.items(), key=lambda item: item[::-1]):
        line = f"from {module} import {name} as {name}"
        if len(line) > 100:
            line = f"from {module} import (\n    {name} as {name},\n)"
        lines.append(line)
    return "\n".join([*lines, "", "__version__: str"]) + "\n"


def test_type_checkers_read_the_names_of_the_registry(request):
    """`--force-regen` writes the stub anew, as it does goldens."""
    if request.config.getoption("force_regen", False):
        STUB.write_text(stub())
    assert STUB.read_text() == stub()


@pytest.mark.parametrize("promise", PROMISES.values(), ids=lambda promise: promise.name)
def test_a_promise_is_worded_once(promise):
    source = ROOT / promise.folder.replace(".", "/") / "__init__.py"
    folder = ast.get_docstring(ast.parse(source.read_text()))
    assert " ".join(folder.split()).startswith(promise.sentence)
    fixture = inspect.getdoc(_function(promise))
    assert " ".join(fixture.split()).startswith(promise.sentence)


@pytest.mark.parametrize("promise", PROMISES.values(), ids=lambda promise: promise.name)
def test_a_fixture_states_fault_example_and_failure(promise):
    documented = inspect.getdoc(_function(promise))
    places = [documented.find(part) for part in ("Catches ", "Example::", "Prints on failure::")]
    assert -1 not in places
    assert places == sorted(places)
    assert f"({promise.fixture})" in documented


@pytest.mark.parametrize("promise", PROMISES.values(), ids=lambda promise: promise.name)
def test_a_fixture_has_two_words_and_is_registered(promise):
    assert len(promise.fixture.split("_")) == 2
    assert hasattr(plugin, promise.fixture)


@pytest.mark.parametrize("promise", PROMISES.values(), ids=lambda promise: promise.name)
def test_the_fixtures_assertions_say_what_they_check(promise):
    module = promise.module("fixture")
    (fixture,) = (c for n, c in vars(module).items() if n.endswith("Fixture"))
    for name, method in inspect.getmembers(fixture, inspect.isfunction):
        if name.startswith("assert_"):
            assert (method.__doc__ or "").startswith("Checks "), f"{fixture.__name__}.{name}"


@pytest.mark.parametrize("promise", PROMISES.values(), ids=lambda promise: promise.name)
def test_a_promise_exports_one_measurement_and_its_assertions(promise):
    names = [name for _, _, name in (place.partition(".") for place in promise.public)]
    verbs = [name.partition("_")[0] for name in names]
    assert set(verbs) <= {"measure", "assert", "draw"}
    assert {"measure", "assert"} <= set(verbs)


def _function(promise):
    """The function behind a fixture, whose docstring `pytest --fixtures` shows."""
    found = getattr(promise.module("fixture"), promise.fixture)
    return inspect.unwrap(getattr(found, "__wrapped__", found))
