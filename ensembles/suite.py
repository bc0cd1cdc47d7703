"""The gate for a repository that has no test files of its own.

`pytest --pyargs ensembles.suite --ensembles-subject=package.module:factory` collects one test for
every check of the subject that the factory returns. Without a subject, it takes the example of this
project, the wide ResNet-18 with its subnets.
"""

import sys

import pytest

from ensembles.gate.conformance import BoundCheck, parametrize_with_checks
from ensembles.sources.factories import resolve
from ensembles.subject import Subject

DEFAULT_SUBJECT = "ensembles.models.example:wide_resnet18_with_subnets"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each check of the subject that the command line names."""
    given = metafunc.config.getoption("--ensembles-subject")
    path = DEFAULT_SUBJECT if given is None else given
    here = str(metafunc.config.invocation_params.dir)
    if here not in sys.path:  # `pytest`, unlike `python -m pytest`, leaves it out
        sys.path.insert(0, here)
    try:
        named = resolve(path)
        if not named.claims:
            raise ValueError(
                f"subject {named.name!r} claims nothing, so there is nothing to check. "
                "Give Subject(claims={check: claim})."
            )
        tests = parametrize_with_checks([named])
    except ValueError as error:  # as a CollectError it is shown without our frames
        raise pytest.Collector.CollectError(f"--ensembles-subject={path}: {error}") from error
    metafunc.parametrize(*tests.args, **tests.kwargs)


def test_claim(subject: Subject, check: BoundCheck) -> None:
    """The subject is what it claims to be."""
    check(subject)
