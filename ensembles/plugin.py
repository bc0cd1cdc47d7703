"""The pytest plugin: options, markers, header and summary.

Every pytest run on the machine loads this file. So it imports only the standard library and pytest;
torch is imported when a fixture or a check is first used.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from typing import Any

import pytest

from ensembles import message, present_run
from ensembles.claims import ClaimError
from ensembles.registry import PROMISES

for _promise in PROMISES.values():  # pytest finds fixtures by name in a plugin
    globals()[_promise.fixture] = getattr(_promise.module("fixture"), _promise.fixture)

MARKERS = {
    "ensembles": "tests one claim of a subject; ensembles.parametrize_with_checks sets it",
}
SUITE = "ensembles.suite"
REFUSED = "ensembles_refused"
"""The key under which an xdist worker tells why it collects nothing."""
MISCLAIMED = "ensembles_misclaimed"
"""The key under which an xdist worker tells that a claim could not be parsed."""
CLAIM = "ensembles_claim"
"""The key under which a test report carries its claim to the summary, also from xdist workers."""
UNSEEN = "--ensembles-subject was given, but no test looks at it. Add --pyargs ensembles.suite."
LEFT_OUT = "but -k, -m or --deselect leaves out all of its tests."
NO_CLAIMS = (
    "--ensembles-require asks for claims, but no test of a subject was collected. Add "
    "--pyargs ensembles.suite, or a test with @ensembles.parametrize_with_checks."
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds one option group; every option has the prefix --ensembles-."""
    group = parser.getgroup("ensembles", "ensembles: checks what models claim")
    group.addoption(
        "--ensembles-seed",
        type=int,
        default=present_run.DEFAULT_SEED,
        metavar="N",
        help="seed that is set before a model is made and before each check (default: %(default)s)",
    )
    group.addoption(
        "--ensembles-subject",
        metavar="PACKAGE.MODULE:FACTORY",
        help="the subject that `pytest --pyargs ensembles.suite` checks, given as a function. The "
        "function returns a module, a list or dict of modules, or a Subject",
    )
    group.addoption(
        "--ensembles-require",
        metavar="CHECK,...",
        default="",
        help="checks that must be claimed and run, separated by commas. The run fails if a subject "
        "does not claim one of them, or if its test is skipped",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Registers the markers and makes the seed known to checks and messages."""
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    config.stash[_TOKENS] = (
        present_run.seed.set(config.getoption("--ensembles-seed")),
        present_run.subject.set(config.getoption("--ensembles-subject") or ""),
    )
    _refuse_unknown(_required(config))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Puts seed and subject back, so that an inner run does not change the outer one."""
    seed, subject = config.stash[_TOKENS]
    present_run.seed.reset(seed)
    present_run.subject.reset(subject)


def pytest_report_header(config: pytest.Config) -> str | None:
    """One line, and only if the user gave an option."""
    seed = config.getoption("--ensembles-seed")
    subject = config.getoption("--ensembles-subject")
    said = [f"subject {subject}"] if subject else []
    if subject or seed != present_run.DEFAULT_SEED:
        said.append(f"seed {seed}")
    return f"ensembles: {', '.join(said)}" if said else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attaches the claim of a generated test to its report."""
    report = yield
    check = _check_of(item)
    if check and (report.when == "call" or (report.when == "setup" and not report.passed)):
        unlooked = _unlooked(item, check, report, call)
        if unlooked:
            report.outcome, report.longrepr = "failed", unlooked
            vars(report).pop("wasxfail", None)
        looked = not unlooked or not check.claimed
        status = _status(check, report, call) if looked else "not looked at"
        report.user_properties.append((CLAIM, check.row(status)))
        in_gate = getattr(item, "module", None) is sys.modules.get(SUITE)
        if status == "broken" and in_gate and call.excinfo:
            report.longrepr = str(call.excinfo.value)  # no frame of the gate says more
    return report


def _check_of(item: pytest.Item) -> Any:
    """The check that a generated test runs; None for every other test."""
    callspec = getattr(item, "callspec", None)
    generated = callspec is not None and item.get_closest_marker("ensembles") is not None
    return callspec.params.get("check") if callspec and generated else None


def _unlooked(
    item: pytest.Item, check: Any, report: pytest.TestReport, call: pytest.CallInfo[None]
) -> str:
    """Why a test that did not fail has not looked at its claim; "" where it has, or need not."""
    name, subject = check.name, check.subject.name
    if report.passed and check.claimed and not check.seen:
        return f"{item.name} passed, but did not look at {name} of {subject}: call check(subject)."
    if not report.skipped or name not in _required(item.config):
        return ""
    reason = getattr(report, "wasxfail", "")
    if call.excinfo is not None and call.excinfo.errisinstance(AssertionError):
        return ""  # broken, as expected
    if isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
    return (
        f"{name} of {subject} was not looked at ({reason}), but --ensembles-require asks for it. "
        "Remove what skips it, or do not require it here."
    )


def _status(check: Any, report: pytest.TestReport, call: pytest.CallInfo[None]) -> str:
    if not check.claimed:
        return "missing" if report.failed else "not claimed"
    if report.skipped and not hasattr(report, "wasxfail"):  # by a mark of the user's
        return "skipped"
    if report.passed:
        return "held"
    if hasattr(report, "wasxfail"):
        return "fails as expected"
    if call.excinfo is None:  # a strict xfail that passed
        return "passes unexpectedly"
    return "broken" if call.excinfo.errisinstance(AssertionError) else "error"


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> Generator[None, None, None]:
    """Refuses a run in which nothing looks at what its options ask for."""
    collected = list(items)
    yield
    if session.testsfailed:  # collection errors are told first; the missing tests may be in there
        return
    refused = _refusal(config, collected, items)
    if refused and not hasattr(config, "workerinput"):
        raise pytest.UsageError(refused)
    if refused:  # in an xdist worker, which tells its controller when it ends
        config.workeroutput[REFUSED] = refused  # type: ignore[attr-defined]
        items.clear()


def _refusal(config: pytest.Config, collected: list[pytest.Item], left: list[pytest.Item]) -> str:
    """Which option asks for a check that no test runs, and what to do; "" where there is none."""
    # Another run does what a shard or --lf leaves out, but no run does what these leave out.
    here = any(config.getoption(name, None) for name in ("keyword", "markexpr", "deselect"))
    chosen = left if here else collected
    if config.getoption("--ensembles-subject") and not any(map(_is_of_suite, chosen)):
        gated = any(map(_is_of_suite, collected))
        return f"--ensembles-subject was given, {LEFT_OUT}" if gated else UNSEEN
    required = _required(config)
    there, kept = map(_checks_of, (collected, chosen))
    if required and not there:
        return NO_CLAIMS
    missing = [name for name in required if name in there - kept]
    return f"--ensembles-require asks for {', '.join(missing)}, {LEFT_OUT}" if missing else ""


def _checks_of(items: list[pytest.Item]) -> set[str]:
    return {check.name for check in map(_check_of, items) if check}


def _is_of_suite(item: pytest.Item) -> bool:
    """Whether its file takes the subject from the command line, as `ensembles.suite` does."""
    generator = getattr(getattr(item, "module", None), "pytest_generate_tests", None)
    return getattr(generator, "__module__", "") == SUITE


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Reads that an xdist worker refused: only the controller can set the exit status."""
    refused = getattr(node, "workeroutput", {}).get(REFUSED)
    if refused:
        node.config.stash[_REFUSALS] = refused
    if getattr(node, "workeroutput", {}).get(MISCLAIMED):
        node.config.stash[_MISCLAIMED] = True


def pytest_exception_interact(node: pytest.Item | pytest.Collector, call: Any) -> None:
    """A claim that cannot be parsed is a usage error rather than a failed test."""
    error = call.excinfo.value
    if isinstance(node, pytest.Collector) and any(
        isinstance(one, ClaimError) for one in (error, error.__cause__)
    ):
        node.config.stash[_MISCLAIMED] = True
        if hasattr(node.config, "workeroutput"):
            node.config.workeroutput[MISCLAIMED] = True


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Refuses the run that an xdist worker refused."""
    refused = session.config.stash.get(_REFUSALS, "")
    if session.config.stash.get(_MISCLAIMED, False):
        session.exitstatus = pytest.ExitCode.USAGE_ERROR
    if not refused:
        return
    session.exitstatus = pytest.ExitCode.USAGE_ERROR
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter:
        reporter.write_line(f"ERROR: {refused}", red=True)


def _refuse_unknown(required: list[str]) -> None:
    if not required:
        return
    unknown = [name for name in required if name not in PROMISES]
    if unknown:
        raise pytest.UsageError(
            f"--ensembles-require names {', '.join(unknown)}, but there is no such check. "
            f"Checks are: {', '.join(PROMISES)}."
        )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fails a test whose claim is required, but not made."""
    check = _check_of(item)
    if check:
        check.seen.clear()  # another test of the same check may have filled it
    if check and not check.claimed and check.name in _required(item.config):
        pytest.fail(
            f"{check.subject.name} does not claim {check.name}, which --ensembles-require "
            f"asks for. Add it to the claims: Subject(claims={{{check.name!r}: ...}}).",
            pytrace=False,
        )


def _required(config: pytest.Config) -> list[str]:
    names = config.getoption("--ensembles-require").split(",")
    return [name.strip() for name in names if name.strip()]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A table of every claim that this run checked; nothing is shown if it checked none."""
    rows = _rows(terminalreporter)
    if not rows:
        return
    terminalreporter.section("ensembles: what the models claim")
    rows.sort(key=lambda row: (row["subject"], row["order"]))
    told = [row for row in rows if row["status"] != "not claimed"]
    # One table, so that the columns of all subjects stand below each other.
    table = message.aligned([(row["check"], row["status"], row["found"]) for row in told])
    lines = {id(row): line for row, line in zip(told, table, strict=True)}
    for subject in dict.fromkeys(row["subject"] for row in rows):
        terminalreporter.write_line(subject, bold=True)
        mine = [row for row in rows if row["subject"] == subject]
        for row in mine:
            if row["status"] != "not claimed":
                good = row["status"] in ("held", "fails as expected")
                bad = not good and row["status"] != "skipped"
                terminalreporter.write_line(f"  {lines[id(row)]}", green=good, red=bad)
        silent = [row["check"] for row in mine if row["status"] == "not claimed"]
        if silent:
            terminalreporter.write_line(
                f"  {len(silent)} not claimed: {', '.join(silent)}", yellow=True
            )
    if not terminalreporter.config.getoption("--ensembles-subject") and _suite_ran(
        terminalreporter
    ):
        terminalreporter.write_line(
            "no --ensembles-subject was given: the suite checked its own example", yellow=True
        )


def _suite_ran(terminalreporter: Any) -> bool:
    return any(
        "suite.py::test_claim[" in getattr(report, "nodeid", "")
        for reports in terminalreporter.stats.values()
        for report in reports
    )


def _rows(terminalreporter: Any) -> list[dict[str, Any]]:
    return [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        for key, value in getattr(report, "user_properties", ())
        if key == CLAIM
    ]


_TOKENS = pytest.StashKey[Any]()
_REFUSALS = pytest.StashKey[str]()
_MISCLAIMED = pytest.StashKey[bool]()
