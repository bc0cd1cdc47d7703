"""Dependencies point one way: read from the import statements of every file of the package."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from ensembles.registry import PROMISES

PACKAGE = Path(__file__).parents[1] / "ensembles"

BASE = {"present_run", "findings", "claims", "tolerance", "message", "user_calls", "subject"}
"""What every room may use: words, numbers and the recipe."""

ARROWS = {
    "registry": set(),
    "__init__": {"registry"},
    "present_run": set(),
    "findings": set(),
    "claims": set(),
    "tolerance": set(),
    "message": {"present_run"},
    "user_calls": set(),
    "kernels": set(),
    "subject": {"user_calls"},
    "handling.*": {"handling.*", *BASE},
    "case": {"handling.*", *BASE},
    "instruments.*": {"instruments.*", "case", "handling.*", *BASE},
    "checks.*": {"instruments.*", "case", "handling.*", "kernels", *BASE},
    "sources.*": {"sources.*", "registry", "case", "handling.*", "instruments.*", *BASE},
    "gate.*": {"gate.*", "sources.*", "registry", "case", "handling.*", *BASE},
    "suite": {"gate.*", "sources.*", "subject"},
    "plugin": {"registry", "claims", "message", "present_run"},
    "faults.*": {"faults.*", "registry", "handling.*", "subject", "message"},
    "models.*": {"models.*", "kernels"},
    "models.example": {"models.*", "subject"},
    "experiments.*": {"*"},
}
"""Pattern of file to what it may import when it is imported; the last pattern that fits counts."""

WHEN_USED = {
    "message": {"findings"},
    "faults.*": {"checks.*", "gate.*"},
}
"""What it may import besides, inside functions or for types only: that costs nothing at start."""

HANDLING = [
    "atoms",
    "memory",
    "members",
    "numbers",
    "registered_tensors",
    "state",
    "training",
    "precision",
]
"""The files that handle a model, each above what it may import."""

INSTRUMENTS = [
    "processes",
    "autograd",
    "storage",
    "tensor_locations",
    "learning_rates",
    "recording",
    "divergence",
    "loader_rng",
    "transparency",
    "influence",
    "distances",
]
"""The shared instruments, each above what it may import."""

STAGES = ["claim", "*", "measurement", "judgement", "fixture"]
"""The files of a promise's folder, each above what it may import; * are instruments of its own."""

FILES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")
)
CHECKED = [name for name in FILES if name.startswith("checks.") and name.count(".") == 2]


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


def fits(name: str, patterns: set[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def upwards(name: str) -> list[str]:
    """What a file imports that does not stand below it."""
    at_start, when_used = set(allowed(ARROWS, name)), set(allowed(WHEN_USED, name))
    if name.startswith("checks.") and name != "checks.__init__":
        folder = name.split(".")[1]
        at_start.add(f"checks.{folder}.*")  # and no other promise's
    return [
        target
        for target, lazy in imported(name)
        if not fits(target, at_start | when_used if lazy else at_start)
    ]


@pytest.mark.parametrize("name", FILES)
def test_every_file_imports_only_what_stands_below_it(name):
    assert any(fnmatchcase(name, pattern) for pattern in ARROWS), f"no rule for {name}"
    assert upwards(name) == []


@pytest.mark.parametrize(("room", "order"), [("handling", HANDLING), ("instruments", INSTRUMENTS)])
def test_a_room_has_an_order_of_its_own(room, order):
    files = [name.removeprefix(f"{room}.") for name in FILES if name.startswith(f"{room}.")]
    assert sorted(order) == [name for name in files if name != "__init__"]
    for rank, name in enumerate(order):
        above = {f"{room}.{other}" for other in order[rank:]}
        assert [target for target, _ in imported(f"{room}.{name}") if target in above] == []


@pytest.mark.parametrize("name", PROMISES)
def test_a_promise_has_its_folder_with_claim_measurement_judgement_and_fixture(name):
    found = {file.split(".")[2] for file in CHECKED if file.startswith(f"checks.{name}.")}
    assert {"__init__", "claim", "measurement", "judgement", "fixture"} <= found


def test_every_folder_of_checks_is_a_promise():
    assert {name.split(".")[1] for name in CHECKED} == set(PROMISES)


@pytest.mark.parametrize("name", CHECKED)
def test_in_a_folder_the_claim_stands_below_the_measurement_and_that_below_the_judgement(name):
    def rank(file: str) -> int:
        stage = file.rpartition(".")[2]
        return STAGES.index(stage) if stage in STAGES else STAGES.index("*")

    _, folder, stage = name.split(".")
    if stage == "__init__":
        assert list(imported(name)) == []
        return
    for target, _ in imported(name):
        if target.startswith(f"checks.{folder}."):
            assert rank(target) <= rank(name), f"{name} imports {target}"


@pytest.mark.parametrize(
    "name",
    [n for n in FILES if n in ("__init__", "plugin", "registry", "message", "claims", "findings")]
    + [n for n in CHECKED if n.endswith(".fixture")],
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


def test_an_upward_arrow_would_be_seen():
    assert dict(imported("checks.sharing.measurement"))["case"] is False
    assert not fits("checks.sharing.measurement", allowed(ARROWS, "instruments.influence"))
    assert not fits("gate.conformance", allowed(ARROWS, "checks.sharing.judgement"))
