"""Dependencies point one way: read from the import statements of every file of the package."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from ensembles.claims import CHECKS

PACKAGE = Path(__file__).parents[1] / "ensembles"

ARROWS = {
    "__init__": set(),
    "message": set(),
    "calling": set(),
    "kernels": set(),
    "subject": {"calling", "message"},
    "probes.*": {"probes.*", "subject", "calling", "kernels", "message"},
    "inputs": {"probes.*", "subject", "message"},
    "checks.*": {"checks.*", "probes.*", "subject", "message"},
    "drawings": {"checks.*", "probes.*", "subject", "message"},
    "claims": {"checks.*", "subject"},
    "conformance": {"claims", "inputs", "probes.*", "subject", "calling", "message"},
    "suite": {"conformance", "subject", "message"},
    "fixtures.*": {"fixtures.*", "message"},
    "plugin": {"fixtures.*", "message"},
    "faults.*": {"faults.*", "subject", "message"},
    "models.*": {"models.*", "kernels"},
    "models.example": {"models.*", "subject"},
    "experiments.*": {"*"},
}
"""Pattern of file to what it may import when it is imported; the last pattern that fits counts."""

WHEN_USED = {
    "__init__": {"*"},
    "fixtures.*": {"checks.*", "drawings", "probes.*", "subject", "inputs"},
    "plugin": {"claims"},
    "faults.*": {"checks.*", "conformance"},
}
"""What it may import besides, inside functions or for types only: that costs nothing at start."""

FILES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")
)


def path_of(name: str) -> Path:
    return PACKAGE / (name.replace(".", "/") + ".py")


def imported(name: str) -> Iterator[tuple[str, bool]]:
    """Our files that a file imports, and whether only when a function runs or types are read."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively in line {node.lineno}"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            modules = []
        yield from ((home, lazy) for module in modules if (home := home_of(module)))
        for child in ast.iter_child_nodes(node):
            inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            yield from visit(child, lazy or inside or for_types)

    yield from visit(ast.parse(path_of(name).read_text()), False)


def home_of(module: str) -> str | None:
    """The file of ours that holds a module or a name in it; None for others'."""
    parts = module.split(".")
    if parts[0] != "ensembles":
        return None
    for end in range(len(parts), 1, -1):
        name = ".".join(parts[1:end])
        if path_of(name).exists():
            return name
        if path_of(f"{name}.__init__").exists():
            return f"{name}.__init__"
    return "__init__"


def allowed(rules: dict[str, set[str]], name: str) -> set[str]:
    fitting = [targets for pattern, targets in rules.items() if fnmatchcase(name, pattern)]
    return fitting[-1] if fitting else set()


@pytest.mark.parametrize("name", FILES)
def test_every_file_imports_only_what_stands_below_it(name):
    assert any(fnmatchcase(name, pattern) for pattern in ARROWS), f"no rule for {name}"
    at_start, when_used = allowed(ARROWS, name), allowed(WHEN_USED, name)
    upwards = [
        target
        for target, lazy in imported(name)
        if not any(
            fnmatchcase(target, pattern) for pattern in (at_start | when_used if lazy else at_start)
        )
    ]
    assert upwards == []


@pytest.mark.parametrize(
    "name", [n for n in FILES if n in ("__init__", "plugin") or n.startswith("fixtures.")]
)
def test_what_pytest_always_loads_imports_only_itself_and_the_standard_library(name):
    import sys

    tree = ast.parse(path_of(name).read_text())
    heads = {
        module.partition(".")[0]
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for module in (
            [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
    }
    assert heads <= {*sys.stdlib_module_names, "pytest", "ensembles"}


@pytest.mark.parametrize(
    "name", [n for n in FILES if n.startswith("checks.") and not n.endswith("__init__")]
)
def test_a_check_makes_only_measurements_and_assertions_public(name):
    tree = ast.parse(path_of(name).read_text())
    (listing,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    public = set(ast.literal_eval(listing))
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    verbs = ("measure_", "assert_")
    assert public <= classes | functions
    assert [f for f in sorted(public & functions) if not f.startswith(verbs)] == []
    assert {f for f in functions if f.startswith(verbs)} <= public


def test_a_fixture_stands_in_the_file_that_is_called_as_its_check():
    named = {n.partition(".")[2] for n in FILES if n.startswith("fixtures.")}
    assert named - {"__init__"} == set(CHECKS)


def test_an_upward_arrow_would_be_seen():
    assert dict(imported("claims"))["checks.sharing"] is False
    assert dict(imported("fixtures.sharing"))["checks.sharing"] is True
    assert not any(fnmatchcase("conformance", p) for p in allowed(ARROWS, "checks.sharing"))
