"""Runs the checks of what a subject claims.

`checks_for` generates the checks. `check_ensemble` runs them in a script or a notebook,
`parametrize_with_checks` makes pytest tests of them, and `ensembles.suite` collects them from the
command line. Claims are parsed when checks are generated, before any model is made. The model is
made once for all checks of its subject.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from traceback import walk_tb
from typing import Any

import pytest

from ensembles.case import Case
from ensembles.claims import ClaimError
from ensembles.findings import Findings
from ensembles.gate.results import Result, Results
from ensembles.message import Broken
from ensembles.present_run import DEFAULT_SEED
from ensembles.present_run import seed as present_seed
from ensembles.registry import PROMISES, Promise
from ensembles.sources.factories import as_subject
from ensembles.subject import Model, Subject
from ensembles.user_calls import STOPS, raised, said

__all__ = ["BoundCheck", "check_ensemble", "checks_for", "parametrize_with_checks"]


class _SharedCase:
    """The case of a subject, for all of its checks in a run; it is dropped after the last check.

    It is made when the first check needs it. After each check a digest tells whether the check
    changed it. If so, the next check gets a new one.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.waiting = {name for name in PROMISES if subject.claims.get(name) is not None}
        self._case: Case | None = None
        self._digest: tuple[str, str] = ("", "")

    def of(self, check: str, look: Callable[[Case], Any]) -> Any:
        """What a check sees of the case."""
        __tracebackhide__ = True
        seed = present_seed.get()
        if self._case is None or self._case.seed != seed:
            self._case = Case(self.subject, seed=seed)
            self._digest = self._case.digest()
        case = self._case
        try:
            with case.checked():
                return look(case)
        finally:
            self.waiting.discard(check)
            if not self.waiting or not case.is_as(self._digest):
                self._case = None


@dataclass(frozen=True, repr=False)
class BoundCheck:
    """A check with its subject: call it, or read what it would test.

    Calling returns the measurement. It raises `AssertionError` if the claim is broken, and
    `ValueError` if the check could not look. If the claim is not made, it raises pytest's skip.

    Attributes:
        promise: The promise that is checked.
        subject: The subject that is checked.
        claim: The claim as the user wrote it; None if nothing is claimed.
        parsed: The claim as the check reads it.
    """

    promise: Promise
    subject: Subject
    claim: Any = None
    parsed: Any = field(default=None, compare=False)
    shared: _SharedCase | None = field(default=None, compare=False)
    seen: list[Any] = field(default_factory=list, compare=False)
    """The line of the last call, which the summary shows."""

    @property
    def name(self) -> str:
        """The check's name."""
        return self.promise.name

    @property
    def claimed(self) -> bool:
        """Whether the subject claims what this check tests."""
        return self.claim is not None

    def __call__(self, subject: Subject | None = None) -> object:
        """Looks at the case of the subject, under the present seed."""
        __tracebackhide__ = True
        if not self.claimed:
            # The same reason for all, so that pytest's summary folds them. Ours names each.
            pytest.skip("not claimed")
        self.seen.clear()
        subject = subject or self.subject
        shared = self.shared
        if shared is None or shared.subject is not subject:
            shared = _SharedCase(subject)
        try:
            measurement, findings = shared.of(self.name, self._look)
        except (Exception, *STOPS) as error:
            told, cause = error, error.__cause__
            if isinstance(error, STOPS):  # unchanged, it would skip or end an unfinished check
                code = f"the code of subject {subject.name!r}"
                told, cause = ValueError(raised(code, error)), error
            self.seen.append(_first_line(_told(told)))
            if told is not error or _is_ours(error):  # the message says more than our frames
                raise told.with_traceback(None) from cause
            raise
        self.seen.append(_line(measurement, findings))
        return measurement

    def _look(self, case: Case) -> tuple[object, Findings]:
        __tracebackhide__ = True
        measurement = self.promise.module("measurement").measure(case, self.parsed)
        findings: Findings = self.promise.module("judgement").judge(measurement, self.parsed)
        if not findings.held:
            raise Broken(findings)
        return measurement, findings

    def __repr__(self) -> str:
        return f"<check {self.name} of {self.subject.name}>"

    def row(self, status: str) -> dict[str, Any]:
        """What the summary shows of this check, as plain data that processes can exchange."""
        return {
            "subject": self.subject.name,
            "check": self.name,
            "status": status,
            "found": "".join(self.seen),
            "order": list(PROMISES).index(self.name),
        }


def checks_for(subject: Subject) -> Iterator[BoundCheck]:
    """Every check of the subject, in the order of the registry, also those that are not claimed.

    Raises:
        ClaimError: If the subject claims something that no check tests, or that cannot be parsed.

    Example:
        >>> subject = as_subject([nn.Linear(2, 2), nn.Linear(2, 2)])
        >>> [bound.name for bound in checks_for(subject) if bound.claimed][0]
        'sharing'
    """
    for name in subject.claims:
        _known(name, f"subject {subject.name!r} claims {name!r}")
    for name in subject.expected_failures:
        _known(name, f"subject {subject.name!r} expects {name!r} to fail")
        if subject.claims.get(name) is None:
            raise ClaimError(
                f"subject {subject.name!r} expects {name} to fail, but does not claim it. Add "
                "it to the claims."
            )
    parsed = {}
    for name, promise in PROMISES.items():
        claim = subject.claims.get(name)
        if claim is not None:
            try:
                parsed[name] = promise.module("claim").parse(claim)
            except ClaimError as error:
                raise ClaimError(f"subject {subject.name!r}: {error}") from None
    shared = _SharedCase(subject)
    for name, promise in PROMISES.items():
        yield BoundCheck(promise, subject, subject.claims.get(name), parsed.get(name), shared)


def check_ensemble(
    model: Subject | Model | Callable[[], Any], *, seed: int = DEFAULT_SEED
) -> Results:
    """Runs every check that the subject claims, and returns what they found.

    Args:
        model: A `Subject`, a module, a list or dict of modules, or a function that returns one.
        seed: Set before the model is made, and before every check.

    Returns:
        One result for each check, also for those that are not claimed. Print it, or ask `.held`.

    Raises:
        ValueError: If no subject can be made of it, or if it claims something that no check tests.

    Example:
        >>> one = nn.Linear(2, 2)
        >>> results = check_ensemble(Subject(make=lambda: [one, one],
        ...                                  claims={"sharing": "independent"}))
        >>> results.held, results["sharing"].status
        (False, 'broken')
    """
    token = present_seed.set(seed)
    try:
        return Results(tuple(_result(bound) for bound in checks_for(as_subject(model))))
    finally:
        present_seed.reset(token)


def parametrize_with_checks(
    subjects: Iterable[Subject | Model | Callable[[], Any]],
) -> pytest.MarkDecorator:
    """Makes one test of every subject and check; the test calls `check(subject)`.

    A check that the subject expects to fail (`Subject.expected_failures`) is a strict xfail, so it
    is reported if it passes after all.

    Args:
        subjects: Each is anything that `check_ensemble` takes.

    Raises:
        ValueError: If there are no subjects, if two have the same name, or if a claim cannot be
            parsed.

    Example:
        >>> @parametrize_with_checks([[nn.Linear(2, 2), nn.Linear(2, 2)]])
        ... def test_claims(subject, check):
        ...     check(subject)
    """
    given = [as_subject(thing, name=f"subject{i}") for i, thing in enumerate(subjects)]
    if not given:
        raise ValueError("parametrize_with_checks got no subjects: there is nothing to check.")
    names = [subject.name for subject in given]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{names.count(name)} subjects are named {name!r}, so reports could not tell them "
                "apart. Give each its own name: Subject(name=...)."
            )
    return pytest.mark.parametrize(
        ("subject", "check"),
        [
            pytest.param(
                subject, bound, id=f"{subject.name}-{bound.name}", marks=list(_marks(bound))
            )
            for subject in given
            for bound in checks_for(subject)
        ],
    )


def _marks(bound: BoundCheck) -> Iterator[pytest.MarkDecorator]:
    yield pytest.mark.ensembles
    reason = bound.subject.expected_failures.get(bound.name)
    if reason is not None and bound.claimed:
        # A check that could not look did not fail as expected.
        yield pytest.mark.xfail(reason=reason, strict=True, raises=AssertionError)


def _result(bound: BoundCheck) -> Result:
    made_of = partial(Result, bound.subject.name, bound.name, bound.claim)
    if not bound.claimed:
        return made_of("not claimed")
    expected = bound.subject.expected_failures.get(bound.name)
    try:
        measurement = bound()
    except Exception as error:  # whatever the user's model raises, the other checks still run
        status = "broken" if isinstance(error, AssertionError) else "error"
        if status == "broken" and expected is not None:
            return made_of("fails as expected", found=expected, findings=_findings_of(error))
        text = _told(error)
        return made_of(status, found=_first_line(text), message=text, findings=_findings_of(error))
    status = "held" if expected is None else "passes unexpectedly"
    return made_of(status, found="".join(bound.seen), measurement=measurement)


def _findings_of(error: BaseException) -> Findings | None:
    return error.findings if isinstance(error, Broken) else None


def _line(measurement: object, findings: Findings) -> str:
    """The measurement in one line, and how much was looked at where that is not all."""
    partly = [str(count) for count in findings.looked_at if not count.complete]
    told = f" (looked at {', '.join(partly)})" if partly else ""
    return _first_line(str(measurement)) + told


def _told(error: BaseException) -> str:
    """The message of an error; with its type if it is not one of ours, or is empty."""
    ours = isinstance(error, (AssertionError, ValueError)) and str(error)
    return str(error) if ours else said(error)


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised it; otherwise the frames of the user's model are useful."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("ensembles.")


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def _known(name: str, where: str) -> None:
    if name not in PROMISES:
        raise ClaimError(f"{where}, but there is no such check. Checks are: {', '.join(PROMISES)}.")
