"""Every public name resolves, is documented, and shows an example."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import ensembles
from ensembles import fixtures, plugin

ROOT = Path(__file__).parents[1]
FIXTURES = {
    node.name: node
    for path in sorted((ROOT / "ensembles" / "fixtures").glob("*.py"))
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.FunctionDef)
    and any(ast.unparse(d).startswith("pytest.fixture") for d in node.decorator_list)
}


@pytest.mark.parametrize("name", ensembles.__all__)
def test_a_public_name_is_documented_with_an_example(name):
    documented = inspect.getdoc(getattr(ensembles, name))
    assert documented
    if name not in ("Result", "Results"):  # what check_ensemble returns, and its example shows
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


@pytest.mark.parametrize("name", FIXTURES)
def test_a_fixture_states_promise_fault_example_and_failure(name):
    documented = ast.get_docstring(FIXTURES[name])
    assert documented
    parts = ["Promises", "Catches ", "Example::", "Prints on failure::"]
    places = [documented.find(part) for part in parts]
    assert -1 not in places
    assert places == sorted(places)
    assert f"({name})" in documented


@pytest.mark.parametrize("name", FIXTURES)
def test_a_fixture_has_two_words_and_is_registered(name):
    assert len(name.split("_")) == 2
    assert hasattr(plugin, name)


def test_the_fixtures_assertions_say_what_they_check():
    classes = [c for c in vars(fixtures).values() if inspect.isclass(c) and "Fixture" in c.__name__]
    assert len(classes) == len(FIXTURES)
    for fixture in classes:
        for name, method in inspect.getmembers(fixture, inspect.isfunction):
            if name.startswith("assert_"):
                assert method.__doc__, f"{fixture.__name__}.{name}"
                assert method.__doc__.startswith("Checks "), f"{fixture.__name__}.{name}"
