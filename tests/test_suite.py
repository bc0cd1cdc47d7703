"""The gate from the command line, in a directory that holds the user's module and nothing else."""

import re

import pytest

import ensembles.suite  # noqa: F401  (before pytester forgets what inner runs import)
from ensembles.registry import PROMISES
from ensembles.user_calls import NOT_LOOKED_AT

ZOO = """
import sys
import pytest
import torch
from torch import nn
from ensembles import Subject

def model():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))

def members():
    return [model() for _ in range(3)]

def named():
    return {"left": model(), "right": model()}

def subject():
    return Subject(make=members, name="three models", claims={"sharing": "independent"})

ready = Subject(make=members, name="ready made", claims={"sharing": "independent"})

class Zoo:
    inner = staticmethod(members)

def repeated():
    return [model()] * 3

def silent():
    return Subject(make=members)

def misspelt():
    return Subject(make=members, claims={"shraing": "independent"})

def misclaimed():
    return Subject(make=members, claims={"sharing": "indepndent"})

def raising():
    raise RuntimeError("no such checkpoint: weights.pt")

def nothing():
    return None

def of_layers(count):
    return model()

def batchless():
    claims = {"ownership": "tied"}
    return Subject(make=members, batch=lambda: torch.load("nowhere.pt"), claims=claims)

in_one_line = lambda: Subject(make=lambda: [model(), model()], claims={"sharing": "independent"})

def number():
    return 3

def empty():
    return []

def numbers():
    return [model(), 3]

def lazy():
    return [nn.LazyLinear(2), nn.LazyLinear(2)]

def on_meta():
    return [nn.Linear(4, 2, device="meta") for _ in range(2)]

def memberless():
    return Subject(make=model, members=lambda m: m.towers, claims={"sharing": "independent"})

def skipping():
    pytest.skip("needs a GPU")

def exiting():
    sys.exit(0)

def makes_by_skipping():
    return Subject(make=skipping, claims={"sharing": "independent"})

def makes_by_exiting():
    return Subject(make=exiting, claims={"sharing": "independent"})

class Skipping(nn.Linear):
    def forward(self, x):
        pytest.skip("needs a GPU")

def calls_by_skipping():
    batch = lambda: torch.randn(5, 4)
    make = lambda: [Skipping(4, 2), Skipping(4, 2)]
    return Subject(make=make, batch=batch, claims={"sharing": "independent", "ownership": "tied"})

later = []

def raising_later():
    later.append(1)
    if len(later) > 1:
        raise RuntimeError("the second call fails")
    return members()
"""


@pytest.fixture
def gate(pytester, monkeypatch):
    """Runs the gate on an attribute of zoo.py, which is all that the directory holds."""
    (pytester.path / "zoo.py").write_text(ZOO)
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:hypothesispytest")  # slow to load, run after run

    def run(subject: str, *options: str) -> pytest.RunResult:
        return pytester.runpytest_inprocess(
            "-p", "no:randomly", "--pyargs", "ensembles.suite", subject, *options
        )

    return run


@pytest.mark.parametrize(
    ("factory", "name"),
    [
        ("model", "model"),
        ("members", "members"),
        ("named", "named"),
        ("subject", "three models"),
        ("ready", "ready made"),
        ("Zoo.inner", "members"),
    ],
)
def test_what_a_factory_returns_is_gated(gate, factory, name):
    result = gate(f"--ensembles-subject=zoo:{factory}", "-k", "sharing")
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=1, deselected=len(PROMISES) - 1)
    assert f"ensembles: subject zoo:{factory}, seed 1729" in result.outlines
    assert name in result.outlines


def test_a_broken_subject_fails_with_its_message_alone(gate):
    result = gate("--ensembles-subject=zoo:repeated", "-k", "sharing")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    start = next(i for i, line in enumerate(result.outlines) if line.startswith("____"))
    stop = next(i for i, line in enumerate(result.outlines) if "what the models claim" in line)
    assert result.outlines[start + 1 : stop] == [
        "members 0, 1, 2 are claimed independent, but share parameters",
        "",
        "  0.weight   one tensor in members 0, 1, 2",
        "  0.bias     one tensor in members 0, 1, 2",
        "  2.weight   one tensor in members 0, 1, 2",
        "  2.bias     one tensor in members 0, 1, 2",
        "  (4 of 4 parameters)",
        "",
        "  Members 0, 1, 2 are one network: training them trains one model 3 times.",
        "  Usual cause: [model] * n, or a registry that returns the same instance. "
        "Build each member",
        "  anew.",
        "  replay: pytest --pyargs 'ensembles.suite::test_claim[repeated-sharing]' "
        "--ensembles-subject=zoo:repeated --ensembles-seed=1729",
    ]


def test_the_replay_runs_the_same_check_again(pytester, gate):
    result = gate("--ensembles-subject=zoo:repeated", "-k", "sharing", "--ensembles-seed=3")
    replay = next(line for line in result.outlines if "replay: " in line)
    again = pytester.runpytest_inprocess(*replay.replace("'", "").split()[2:])
    assert replay in again.outlines
    again.assert_outcomes(failed=1)


def test_no_frame_of_the_gate_stands_before_the_error_of_a_model(gate):
    result = gate("--ensembles-subject=zoo:raising_later", "-k", "sharing")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert "conformance.py:" not in result.stdout.str()
    result.stdout.fnmatch_lines(
        [
            '>*raise RuntimeError("the second call fails")',
            "E       ValueError: the factory of subject 'raising_later' raised RuntimeError: "
            f"the second call fails (zoo.py:{line_of('the second call fails')}).",
        ]
    )


# --- bad input: what cannot be collected --------------------------------------------------------

NO_MODEL = "It returns a module, a list or dict of modules, or a Subject."


def line_of(text: str) -> int:
    """The line of zoo.py that holds this."""
    return next(i for i, line in enumerate(ZOO.splitlines(), 1) if text in line)


REFUSED = {
    "zoo:raising": (
        "the factory 'raising' raised RuntimeError: no such checkpoint: weights.pt "
        f"(zoo.py:{line_of('no such checkpoint')})."
    ),
    "zoo:of_layers": (
        "the factory 'of_layers' raised TypeError: of_layers() missing 1 required positional "
        f"argument: 'count' (zoo.py:{line_of('def of_layers')})."
    ),
    "zoo:skipping": (
        f"the factory 'skipping' raised Skipped: needs a GPU (zoo.py:{line_of('needs a GPU')}). "
        f"{NOT_LOOKED_AT}"
    ),
    "zoo:exiting": (
        f"the factory 'exiting' raised SystemExit: 0 (zoo.py:{line_of('sys.exit(0)')})."
    ),
    "": "'' names no factory: write package.module:factory.",
    "zoo": "'zoo' names no factory: write package.module:factory.",
    "zoo:": "'zoo:' names no factory: write package.module:factory.",
    ":model": "':model' names no factory: write package.module:factory.",
    "zou:model": (
        "cannot import 'zou' for the subject 'zou:model': "
        "ModuleNotFoundError: No module named 'zou'."
    ),
    "zoo:modle": "'zoo' has no 'modle', which 'zoo:modle' names.",
    "zoo:nothing": f"the factory 'nothing' returned an object of type NoneType. {NO_MODEL}",
    "zoo:number": f"the factory 'number' returned an object of type int. {NO_MODEL}",
    "zoo:empty": (
        "the factory 'empty' did not return a model: the model has no members: "
        f"there is nothing to compare. {NO_MODEL}"
    ),
    "zoo:numbers": (
        "the factory 'numbers' did not return a model: the model: member 1 is an object of type "
        f"int, not a torch.nn.Module. {NO_MODEL}"
    ),
    "zoo:silent": (
        "subject 'members' claims nothing, so there is nothing to check. "
        "Give Subject(claims={check: claim})."
    ),
    "zoo:misspelt": (
        "subject 'members' claims 'shraing', but there is no such check. "
        f"Checks are: {', '.join(PROMISES)}."
    ),
    "zoo:misclaimed": (
        "subject 'members': sharing cannot be claimed to be 'indepndent'. Did you mean "
        "'independent'? It can be: independent, tied, distinct or a list of name patterns."
    ),
}


@pytest.mark.parametrize("path", REFUSED)
def test_what_is_no_subject_is_refused_with_the_reason_alone(gate, path):
    result = gate(f"--ensembles-subject={path}")
    misread = path in ("zoo:misspelt", "zoo:misclaimed")
    code = pytest.ExitCode.USAGE_ERROR if misread else pytest.ExitCode.INTERRUPTED
    assert result.ret == code
    result.assert_outcomes(errors=1)
    start = next(i for i, line in enumerate(result.outlines) if line.startswith("____"))
    assert result.outlines[start + 1] == f"--ensembles-subject={path}: {REFUSED[path]}"
    assert result.outlines[start + 2].startswith("===")


# --- bad input: what a check refuses ------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "told"),
    [
        (
            "lazy",
            "parameter 0.weight is lazy and has no shape yet. "
            "Call the model on one batch in make() first.",
        ),
        (
            "memberless",
            "members=... raised AttributeError: 'Sequential' object has no attribute 'towers' "
            f"(zoo.py:{line_of('m.towers')}). It takes the model and returns its member modules, "
            "as a list or dict. The model is an object of type Sequential.",
        ),
        (
            "batchless",
            "batch=... raised FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.pt' "
            f"(zoo.py:{line_of('nowhere.pt')}). It takes no arguments and returns what the model "
            "is called with.",
        ),
    ],
    ids=["lazy", "memberless", "batchless"],
)
def test_a_check_that_cannot_look_is_an_error(gate, factory, told):
    check = "ownership" if factory == "batchless" else "sharing"
    result = gate(f"--ensembles-subject=zoo:{factory}", "-k", check)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert f"E       ValueError: {told}" in result.outlines
    assert f"  {check}   error   {told}" in result.outlines


@pytest.mark.parametrize(
    ("factory", "check", "told"),
    [
        (
            "makes_by_skipping",
            "sharing",
            "the factory of subject 'skipping' raised Skipped: needs a GPU "
            f"(zoo.py:{line_of('needs a GPU')}). {NOT_LOOKED_AT}",
        ),
        (
            "makes_by_exiting",
            "sharing",
            "the factory of subject 'exiting' raised SystemExit: 0 "
            f"(zoo.py:{line_of('sys.exit(0)')}).",
        ),
        (
            "calls_by_skipping",
            "ownership",
            "calling member 0 (Skipping) on the batch (5, 4) torch.float32 on cpu raised Skipped: "
            f"needs a GPU (zoo.py:{line_of('class Skipping') + 2}). {NOT_LOOKED_AT}",
        ),
    ],
    ids=["make_skips", "make_exits", "forward_skips"],
)
@pytest.mark.parametrize("required", [False, True], ids=["optional", "required"])
def test_a_subject_that_skips_or_exits_fails_the_gate(
    pytester, gate, factory, check, told, required
):
    pytester.makepyfile(test_own="def test_own():\n    assert 1 + 1 == 2\n")
    options = [f"--ensembles-require={check}"] if required else []
    result = gate(f"--ensembles-subject=zoo:{factory}", "test_own.py", *options)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    held = factory == "calls_by_skipping"
    result.assert_outcomes(
        passed=2 if held else 1, failed=1, skipped=len(PROMISES) - (2 if held else 1)
    )
    assert f"E       ValueError: {told}" in result.outlines
    (row,) = (line for line in result.outlines if re.match(rf"  {check} +error", line))
    assert row.endswith(told)


def test_a_script_in_place_of_a_module_is_refused_and_pytest_goes_on(pytester, gate):
    pytester.makepyfile(script="import sys\nsys.exit(0)\n")
    result = gate("--ensembles-subject=script:build")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    told = "--ensembles-subject=script:build: cannot import 'script' for the subject 'script:build'"
    assert any(line.startswith(f"{told}: SystemExit: 0 (script.py:2).") for line in result.outlines)
    assert "INTERNALERROR" not in result.stdout.str() + result.stderr.str()


def test_a_subject_of_a_lambda_is_called_as_what_the_command_line_names(gate):
    result = gate("--ensembles-subject=zoo:in_one_line", "-k", "sharing")
    assert result.ret == pytest.ExitCode.OK
    assert "in_one_line" in result.outlines


def test_sharing_is_gated_on_the_meta_device(gate):
    result = gate("--ensembles-subject=zoo:on_meta", "-k", "sharing")
    assert result.ret == pytest.ExitCode.OK
