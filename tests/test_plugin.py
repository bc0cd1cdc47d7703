"""The plugin as its user meets it: every test runs pytest in a directory of its own."""

import re
import subprocess
import sys

import pytest

import ensembles.suite  # noqa: F401  (before pytester forgets what inner runs import)
from ensembles.registry import PROMISES

CLAIMS = """
    from torch import nn
    from ensembles import Subject, parametrize_with_checks

    one = nn.Linear(4, 2)
    apart = Subject(
        name="apart", make=lambda: [nn.Linear(4, 2) for _ in range(2)],
        claims={"sharing": "independent"},
    )
    same = Subject(name="same", make=lambda: [one, one], claims={"sharing": "independent"})
    silent = Subject(name="silent", make=lambda: one)
    failing = Subject(name="failing", make=lambda: 1 / 0, claims={"sharing": "distinct"})
"""
EVERY_STATUS = (
    CLAIMS
    + """
    @parametrize_with_checks([apart, same, silent, failing])
    def test_claims(subject, check):
        check(subject)

    known = {"sharing": "known"}
    other_apart = Subject(
        name="xpass", make=apart.make, claims=apart.claims, expected_failures=known
    )
    other_same = Subject(name="xfail", make=same.make, claims=same.claims, expected_failures=known)

    @parametrize_with_checks([other_apart, other_same])
    def test_known(subject, check):
        check(subject)
"""
)
OTHERS = [name for name in PROMISES if name != "sharing"]
ALL = list(PROMISES)


@pytest.fixture(autouse=True)
def without_hypothesis(pytester, monkeypatch):
    """Its plugin loads the whole of hypothesis anew in every inner run."""
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:hypothesispytest")


def said_of(result: pytest.RunResult) -> list[str]:
    """The lines of our section of the terminal report; empty where there is none."""
    found: list[str] = []
    inside = False
    for line in result.outlines:
        if line.startswith("==="):
            inside = "ensembles" in line
        elif inside and line:
            found.append(line)
    return found


def silence(names: list[str]) -> list[str]:
    return [f"  {len(names)} not claimed: {', '.join(names)}"] if names else []


def expected_table(pytester: pytest.Pytester) -> list[str]:
    found = "2 members, 4 parameters and buffers, nothing shared"
    broken = "members 0, 1 are claimed independent, but share parameters"
    (file,) = pytester.path.glob("test_*.py")
    (line,) = (i for i, text in enumerate(file.read_text().splitlines(), 1) if "1 / 0" in text)
    error = (
        "the factory of subject 'failing' raised ZeroDivisionError: division by zero "
        f"({file.name}:{line})."
    )
    rest = silence(OTHERS)
    return [
        *("apart", f"  sharing   held                  {found}", *rest),
        *("failing", f"  sharing   error                 {error}", *rest),
        *("same", f"  sharing   broken                {broken}", *rest),
        *("silent", *silence(ALL)),
        *("xfail", f"  sharing   fails as expected     {broken}", *rest),
        *("xpass", f"  sharing   passes unexpectedly   {found}", *rest),
    ]


# --- cost ---------------------------------------------------------------------------------------


def test_neither_the_package_nor_the_plugin_imports_torch_at_start(tmp_path):
    (tmp_path / "test_nothing.py").write_text("def test_nothing(): pass\n")
    script = (
        "import re, sys, ensembles, pytest\n"
        "code = pytest.main(['-q', '-p', 'ensembles.plugin', '--markers'])\n"
        "code |= pytest.main(['-q', '-p', 'ensembles.plugin', '-p', 'no:randomly'])\n"
        r"light = r'ensembles\.(plugin|registry|claims|message|present_run|"
        r"checks(\.\w+(\.(fixture|claim))?)?)'"
        "\n"
        "heavy = [m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy')\n"
        "         or m.startswith('ensembles.') and not re.fullmatch(light, m)]\n"
        "print('exit', int(code), 'imported', heavy)\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=tmp_path,
        env={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines()[-1] == "exit 0 imported []"


# --- silence ------------------------------------------------------------------------------------


def test_an_ordinary_test_file_reads_as_without_the_plugin(pytester):
    pytester.makepyfile("def test_nothing(): pass")
    result = pytester.runpytest_inprocess("-p", "no:randomly")
    assert result.ret == pytest.ExitCode.OK
    said = [line for line in result.outlines if "ensembles" in line.lower()]
    # pytest itself names the plugin, and with it the directory of a test of this name
    assert [line for line in said if not line.startswith(("plugins: ", "rootdir: "))] == []


def test_the_header_names_the_seed_only_where_it_was_given(pytester):
    pytester.makepyfile("def test_nothing(): pass")
    result = pytester.runpytest_inprocess("--ensembles-seed=5")
    assert "ensembles: seed 5" in result.outlines


# --- options and markers ------------------------------------------------------------------------


def test_every_option_has_the_prefix(pytester):
    text = pytester.runpytest_inprocess("--help").stdout.str()
    group = text.partition("ensembles: checks what models claim:\n")[2].partition("\n\n")[0]
    options = re.findall(r"^  (-\S+?)(?:[= ]|$)", group, re.MULTILINE)
    assert options == ["--ensembles-seed", "--ensembles-subject", "--ensembles-require"]


def test_every_marker_is_registered(pytester):
    pytester.makepyfile(EVERY_STATUS)
    listed = pytester.runpytest_inprocess("--markers").stdout.str()
    assert "@pytest.mark.ensembles: tests one claim of a subject; " in listed
    strict = pytester.runpytest_inprocess("--strict-markers", "--collect-only", "-q")
    assert strict.ret == pytest.ExitCode.OK


def test_generated_tests_pass_under_every_strictness(pytester):
    pytester.makepyfile(
        CLAIMS
        + """
    @parametrize_with_checks([apart, silent])
    def test_claims(subject, check):
        check(subject)
    """
    )
    result = pytester.runpytest_inprocess("--strict", "--strict-config", "-W", "error")
    result.assert_outcomes(passed=1, skipped=2 * len(ALL) - 1)


def test_the_seed_is_set_before_the_model_is_made_and_reaches_the_replay(pytester):
    pytester.makepyfile(
        """
        import random
        import numpy
        import torch
        from torch import nn
        from ensembles import Subject, parametrize_with_checks

        def make():
            drawn = (random.random(), float(numpy.random.rand()), float(torch.rand(())))
            random.seed(5), numpy.random.seed(5), torch.manual_seed(5)
            again = (random.random(), float(numpy.random.rand()), float(torch.rand(())))
            assert drawn == again
            one = nn.Linear(2, 2)
            return [one, one]

        @parametrize_with_checks([Subject(make=make, claims={"sharing": "independent"})])
        def test_claims(subject, check):
            check(subject)
        """
    )
    result = pytester.runpytest_inprocess("--ensembles-seed=5", "-k", "sharing")
    replay = "*replay: pytest 'test_the_seed*.py::test_claims[make-sharing]' --ensembles-seed=5"
    result.stdout.fnmatch_lines([replay.replace("[", "[[]", 1)])


def test_the_fixture_fails_with_the_message_and_none_of_our_frames(pytester):
    pytester.makepyfile(
        """
        from torch import nn

        def test_share_nothing(parameter_sharing):
            parameter_sharing.assert_independent([nn.Linear(4, 2)] * 3)
        """
    )
    result = pytester.runpytest_inprocess("--ensembles-seed=7", "-p", "no:randomly")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            ">       parameter_sharing.assert_independent([[]nn.Linear(4, 2)] [*] 3)",
            "E       AssertionError: members 0, 1, 2 are claimed independent, but share parameters",
            "*replay: pytest test_*.py::test_share_nothing --ensembles-seed=7",
        ]
    )
    assert "sharing.py:" not in result.stdout.str()
    assert said_of(result) == []


def test_a_fixture_fails_where_the_function_that_it_is_given_skips(pytester):
    pytester.makepyfile(
        """
        import pytest
        import torch
        from torch import nn

        class Skipping(nn.Linear):
            def forward(self, x):
                pytest.skip("no data here")

        def make():
            pytest.skip("no data here")

        def test_make(member_diversity):
            member_diversity.assert_independent(make, torch.ones(3, 4))

        def test_forward(ownership_map):
            ownership_map.assert_independent([Skipping(4, 2), Skipping(4, 2)], torch.ones(3, 4))

        def test_runs(seeded_determinism):
            seeded_determinism.assert_bitwise(make, torch.ones(3, 4))

        def test_copies(round_trip):
            round_trip.measure(make, torch.ones(3, 4), conversions=["deepcopy"])

        def test_training(training_trajectory):
            training_trajectory.measure(make, torch.ones(3, 4))

        def test_alone(training_trajectory):
            training_trajectory.assert_members_separate(make, torch.ones(3, 4))

        def test_own():
            pytest.skip("not here")
        """
    )
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(failed=6, skipped=1)
    raised = [line for line in result.outlines if "ValueError: " in line and line[0] == "E"]
    made = re.compile(r"make'? raised Skipped: no data here \(")
    assert sum(bool(made.search(line)) for line in raised) == 5
    assert sum("calling member 0 (Skipping) on the batch" in line for line in raised) == 1


# --- summary ------------------------------------------------------------------------------------


def test_the_summary_shows_every_claim_and_what_was_found(pytester):
    pytester.makepyfile(EVERY_STATUS)
    result = pytester.runpytest_inprocess("-p", "no:randomly")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert said_of(result) == expected_table(pytester)
    skipped = 5 * len(OTHERS) + len(ALL)
    result.assert_outcomes(passed=1, failed=3, xfailed=1, skipped=skipped)


def test_the_summary_is_the_same_in_random_order(pytester):
    pytester.makepyfile(EVERY_STATUS)
    pytest.importorskip("pytest_randomly")
    result = pytester.runpytest_inprocess("--randomly-seed=3")
    assert said_of(result) == expected_table(pytester)


def test_the_summary_is_the_same_with_xdist(pytester):
    pytester.makepyfile(EVERY_STATUS)
    result = pytester.runpytest_inprocess("-n", "2", "-p", "no:randomly")
    assert said_of(result) == expected_table(pytester)


def test_a_claim_that_unexpectedly_holds_fails_the_run(pytester):
    pytester.makepyfile(EVERY_STATUS)
    result = pytester.runpytest_inprocess("-k", "xpass and sharing")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["[[]XPASS(strict)] known"])


# --- a subject that nothing looks at ---------------------------------------------------------

MODELS = """
from torch import nn

def build():
    return [nn.Linear(4, 2) for _ in range(2)]
"""
UNSEEN = "--ensembles-subject was given, but no test looks at it. Add --pyargs ensembles.suite."
LEFT_OUT = "but -k, -m or --deselect leaves out all of its tests."
GATE = ["--pyargs", "ensembles.suite", "--ensembles-subject=models:build"]


@pytest.fixture
def own(pytester):
    """A test of the user's own, beside a module with a model."""
    return pytester.makepyfile(models=MODELS, test_own="def test_own(): pass")


@pytest.mark.parametrize(
    ("subject", "how"),
    [
        ("models:build", ["-p", "no:xdist"]),
        ("nosuch:thing", ["-p", "no:xdist"]),
        ("models:build", ["-n", "1"]),
        ("models:build", ["-n", "1", "-p", "no:terminal"]),
    ],
    ids=["alone", "unknown", "xdist", "silent"],
)
def test_a_subject_that_no_test_looks_at_is_a_usage_error(pytester, own, subject, how):
    result = pytester.runpytest_inprocess("test_own.py", f"--ensembles-subject={subject}", *how)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    told = f"ERROR: {UNSEEN}" in [*result.outlines, *result.errlines]
    assert told == ("no:terminal" not in how)


def test_a_subject_is_missed_also_where_tests_are_listed_only(pytester, own):
    options = ["--collect-only", "--ensembles-subject=models:build"]
    result = pytester.runpytest_inprocess("test_own.py", *options)
    assert (result.ret, result.errlines[0]) == (pytest.ExitCode.USAGE_ERROR, f"ERROR: {UNSEEN}")
    result = pytester.runpytest_inprocess("test_own.py", "--collect-only", *GATE)
    assert result.ret == pytest.ExitCode.OK


def test_claims_of_other_subjects_are_no_look_at_that_of_the_command_line(pytester):
    pytester.makepyfile(EVERY_STATUS)
    result = pytester.runpytest_inprocess("--ensembles-subject=models:build", "-k", "apart")
    assert (result.ret, result.errlines[0]) == (pytest.ExitCode.USAGE_ERROR, f"ERROR: {UNSEEN}")


@pytest.mark.parametrize(
    ("selection", "status"),
    [
        (["-k", "sharing or own"], pytest.ExitCode.OK),
        (["-k", "sharing or own", "-n", "1"], pytest.ExitCode.OK),
        (["-k", "own and not ownership"], pytest.ExitCode.USAGE_ERROR),
        (["-k", "own and not ownership", "-n", "1"], pytest.ExitCode.USAGE_ERROR),
        (["-m", "not ensembles"], pytest.ExitCode.USAGE_ERROR),
        (["-k", "nothing_at_all"], pytest.ExitCode.USAGE_ERROR),
    ],
    ids=["some", "some-xdist", "own", "own-xdist", "mark", "none"],
)
def test_a_subject_whose_tests_are_all_left_out_is_a_usage_error(pytester, own, selection, status):
    result = pytester.runpytest_inprocess("test_own.py", *GATE, *selection)
    assert result.ret == status
    told = f"ERROR: --ensembles-subject was given, {LEFT_OUT}"
    refused = told in [*result.outlines, *result.errlines]
    assert refused == (status == pytest.ExitCode.USAGE_ERROR)


def test_tests_that_another_run_takes_are_not_missed(pytester, own):
    """A shard of the tests, or those that failed last."""
    pytester.makeconftest(
        "def pytest_collection_modifyitems(items):\n"
        "    items[:] = [item for item in items if item.name == 'test_own']\n"
    )
    result = pytester.runpytest_inprocess("test_own.py", *GATE, "--ensembles-require=sharing")
    result.assert_outcomes(passed=1)
    assert result.ret == pytest.ExitCode.OK


def test_a_file_that_takes_the_suite_into_itself_looks_at_the_subject(pytester, own):
    pytester.makepyfile(test_gate="from ensembles.suite import *  # noqa: F403")
    options = ["--ensembles-subject=models:build", "-k", "sharing"]
    result = pytester.runpytest_inprocess("test_gate.py", *options)
    result.assert_outcomes(passed=1, deselected=len(PROMISES) - 1)


def test_a_file_that_cannot_be_imported_is_the_news_where_a_subject_is_given(pytester):
    pytester.makepyfile("import nowhere")
    result = pytester.runpytest_inprocess("--ensembles-subject=models:build")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    assert UNSEEN not in result.stdout.str() + result.stderr.str()


# --- required claims ----------------------------------------------------------------------------


def test_a_required_claim_that_is_missing_is_an_error(pytester):
    pytester.makepyfile(EVERY_STATUS)
    result = pytester.runpytest_inprocess("--ensembles-require=sharing", "-k", "apart or silent")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=1, errors=1, skipped=2 * len(OTHERS))
    assert "  sharing   missing" in said_of(result)
    told = (
        "silent does not claim sharing, which --ensembles-require asks for. Add it to the "
        "claims: Subject(claims={'sharing': ...})."
    )
    assert told in result.outlines


def test_a_required_claim_that_holds_passes(pytester):
    pytester.makepyfile(EVERY_STATUS)
    result = pytester.runpytest_inprocess("--ensembles-require=sharing,", "-k", "apart")
    assert result.ret == pytest.ExitCode.OK


def test_requiring_an_unknown_check_is_a_usage_error(pytester):
    pytester.makepyfile(EVERY_STATUS)
    result = pytester.runpytest_inprocess("--ensembles-require=sharing,shring")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert result.errlines == [
        "ERROR: --ensembles-require names shring, but there is no such check. "
        f"Checks are: {', '.join(PROMISES)}.",
        "",
    ]


@pytest.mark.parametrize("how", [["-p", "no:xdist"], ["-n", "1"]], ids=["alone", "xdist"])
def test_requiring_claims_where_none_are_collected_is_a_usage_error(pytester, how):
    pytester.makepyfile("def test_nothing(): pass")
    result = pytester.runpytest_inprocess("--ensembles-require=sharing", *how)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    told = "ERROR: --ensembles-require asks for claims, but no test of a subject was collected."
    assert told in result.stdout.str() + result.stderr.str()


@pytest.mark.parametrize("how", [["-p", "no:xdist"], ["-n", "1"]], ids=["alone", "xdist"])
def test_a_file_that_cannot_be_imported_is_the_news_where_claims_are_required(pytester, how):
    pytester.makepyfile("import nowhere")
    result = pytester.runpytest_inprocess("--ensembles-require=sharing", *how)
    assert result.ret == (
        pytest.ExitCode.TESTS_FAILED if "-n" in how else pytest.ExitCode.INTERRUPTED
    )
    told = result.stdout.str() + result.stderr.str()
    assert "ModuleNotFoundError: No module named 'nowhere'" in told
    assert "no test of a subject was collected" not in told


SKIPPED = {
    "mark": '@pytest.mark.skip(reason="no data here")',
    "fixture": '@pytest.mark.usefixtures("data")',
    "test": "",
    "xfail": '@pytest.mark.xfail(reason="no data here", run=False)',
}
SKIPPING = (
    CLAIMS
    + """
    import pytest

    @pytest.fixture
    def data():
        pytest.skip("no data here")

    MARK
    @parametrize_with_checks([apart, silent])
    def test_claims(subject, check):
        pytest.skip("no data here")
"""
)


@pytest.mark.parametrize("way", SKIPPED)
def test_a_required_check_that_is_skipped_fails_the_run(pytester, way):
    pytester.makepyfile(SKIPPING.replace("MARK", SKIPPED[way]))
    result = pytester.runpytest_inprocess("-k", "apart")
    assert result.ret == pytest.ExitCode.OK  # it was skipped by the user, and not asked for
    result = pytester.runpytest_inprocess("-k", "apart", "--ensembles-require=sharing")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert said_of(result)[:2] == ["apart", "  sharing   not looked at"]
    reason = "[NOTRUN] no data here" if way == "xfail" else "no data here"
    assert (
        f"sharing of apart was not looked at ({reason}), but --ensembles-require asks for it. "
        "Remove what skips it, or do not require it here."
    ) in result.outlines


def test_a_required_claim_that_is_missing_is_an_error_also_where_its_test_is_skipped(pytester):
    pytester.makepyfile(SKIPPING.replace("MARK", SKIPPED["mark"]))
    result = pytester.runpytest_inprocess("-k", "silent", "--ensembles-require=sharing")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert "  sharing   missing" in said_of(result)


def test_a_required_check_that_fails_as_expected_was_looked_at(pytester):
    pytester.makepyfile(EVERY_STATUS)
    result = pytester.runpytest_inprocess("--ensembles-require=sharing", "-k", "[xfail")
    assert result.ret == pytest.ExitCode.OK


def test_a_required_check_that_could_not_look_does_not_fail_as_expected(pytester):
    pytester.makepyfile(
        CLAIMS
        + """
    import pytest

    @pytest.mark.xfail(reason="known")
    @parametrize_with_checks([failing])
    def test_claims(subject, check):
        check(subject)
    """
    )
    assert pytester.runpytest_inprocess().ret == pytest.ExitCode.OK
    result = pytester.runpytest_inprocess("--ensembles-require=sharing")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert any("sharing of failing was not looked at (known)" in line for line in result.outlines)


def test_an_error_is_not_the_failure_that_a_subject_expects(pytester):
    pytester.makepyfile(
        CLAIMS
        + """
    from dataclasses import replace

    @parametrize_with_checks([replace(failing, expected_failures={"sharing": "known"})])
    def test_claims(subject, check):
        check(subject)
    """
    )
    pytester.runpytest_inprocess().assert_outcomes(failed=1, skipped=len(OTHERS))


def test_requiring_a_check_whose_tests_are_all_left_out_is_a_usage_error(pytester):
    pytester.makepyfile(EVERY_STATUS)
    options = ["--ensembles-require=sharing,ownership", "-k", "apart and sharing"]
    result = pytester.runpytest_inprocess(*options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert result.errlines[0] == f"ERROR: --ensembles-require asks for ownership, {LEFT_OUT}"


def test_one_test_by_its_name_runs_also_where_more_is_required(pytester):
    file = pytester.makepyfile(EVERY_STATUS)
    one = f"{file.name}::test_claims[apart-sharing]"
    result = pytester.runpytest_inprocess(one, "--ensembles-require=sharing,ownership")
    result.assert_outcomes(passed=1)


def test_a_test_that_does_not_call_its_check_fails(pytester):
    pytester.makepyfile(
        CLAIMS
        + """
    @parametrize_with_checks([apart])
    def test_called(subject, check):
        check(subject)

    @parametrize_with_checks([apart])
    def test_claims(subject, check):
        pass
    """
    )
    result = pytester.runpytest_inprocess("-p", "no:randomly")
    result.assert_outcomes(passed=1 + len(OTHERS), failed=1, skipped=len(OTHERS))
    assert (
        "test_claims[apart-sharing] passed, but did not look at sharing of apart: "
        "call check(subject)."
    ) in result.outlines
    assert "  sharing   not looked at" in said_of(result)[2]


def test_a_check_that_a_mark_skips_is_shown_as_skipped(pytester):
    pytester.makepyfile(
        CLAIMS
        + """
    import pytest

    @pytest.mark.skip(reason="no data here")
    @parametrize_with_checks([apart])
    def test_claims(subject, check):
        check(subject)
"""
    )
    assert said_of(pytester.runpytest())[:2] == ["apart", "  sharing   skipped"]


def test_pytest_folds_what_is_not_claimed(pytester):
    pytester.makepyfile(EVERY_STATUS)
    result = pytester.runpytest("-rs")
    folded = [line for line in result.outlines if line.startswith("SKIPPED")]
    assert len(folded) == 2  # a line for each test function, whatever the number of checks
    assert all(line.endswith(": not claimed") for line in folded)
