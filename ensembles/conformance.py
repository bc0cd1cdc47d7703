"""The gate for any model: every check that a subject's claims call for, with several runners.

`checks_for` generates the checks, `check_ensemble` runs them in a script or a notebook,
`parametrize_with_checks` makes pytest tests of them, and `ensembles.suite` collects them from the
command line.

What a subject claims is `Subject.claims`, check name to claim: see `ensembles.claims`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from operator import attrgetter
from traceback import walk_tb
from typing import Any

import pytest
import torch

from ensembles.calling import ERRORS, STOPS, asked, called, raised, said
from ensembles.claims import (
    CHECKS,
    DEFAULT_CONTAINER_CLAIMS,
    DEFAULT_ENSEMBLE_CLAIMS,
    DEFAULT_MODULE_CLAIMS,
    Check,
)
from ensembles.inputs import inferred_batch
from ensembles.message import DEFAULT_SEED, aligned
from ensembles.message import seed as present_seed
from ensembles.probes.state import generators_kept, seed_generators
from ensembles.subject import Model, Subject, is_one_module, named_modules_of, whole

__all__ = [
    "BoundCheck",
    "Result",
    "Results",
    "as_subject",
    "check_ensemble",
    "checks_for",
    "parametrize_with_checks",
    "resolve",
]

NOTHING = object()


@dataclass(frozen=True, repr=False)
class BoundCheck:
    """A check with its subject: call it, or read what it would test.

    Calling returns the measurement, raises `AssertionError` where the claim is broken and
    `ValueError` where it could not look. A check whose claim is not made raises pytest's skip.
    """

    check: Check
    subject: Subject
    claim: Any = None
    seen: list[str] = field(default_factory=list, compare=False)
    """The first line of what the last call found: the summary shows it."""

    @property
    def claimed(self) -> bool:
        """Whether the subject claims what this check tests."""
        return self.claim is not None

    def __call__(self, subject: Subject | None = None) -> object:
        """Makes the model anew under the present seed, and looks."""
        __tracebackhide__ = True
        subject = _telling(subject or self.subject)
        if not self.claimed:
            # One reason for all, so that pytest's summary folds them; ours names each.
            pytest.skip("not claimed")
        self.seen.clear()
        try:
            with generators_kept():
                measurement = self.check.run(subject, made(subject), self.claim)
        except (Exception, *STOPS) as error:
            told, cause = error, error.__cause__
            if isinstance(error, STOPS):  # as it is, it would skip or end what it did not look at
                code = f"the code of subject {subject.name!r}"
                told, cause = ValueError(raised(code, error)), error
            self.seen.append(_first_line(_told(told)))
            if told is not error or _is_ours(error):  # the message says more than our frames
                raise told.with_traceback(None) from cause
            raise
        self.seen.append(_first_line(str(measurement)))
        return measurement

    def __repr__(self) -> str:
        return f"<check {self.check.name} of {self.subject.name}>"

    def row(self, status: str) -> dict[str, Any]:
        """What the summary shows of this check; plain data, so that it passes between processes."""
        return {
            "subject": self.subject.name,
            "check": self.check.name,
            "status": status,
            "found": "".join(self.seen),
            "order": list(CHECKS).index(self.check.name),
        }


def made(subject: Subject) -> Model:
    """The subject's model, made under the present seed.

    Raises:
        ValueError: If `make` raises, skips or exits, or returns no module and no list or dict of
            modules.
    """
    __tracebackhide__ = True
    seed_generators(present_seed.get())
    model = subject.make()
    named_modules_of(model)
    return model


def _telling(subject: Subject) -> Subject:
    """The same, whose errors in making model and batch say where they come from."""

    def make() -> Model:
        __tracebackhide__ = True
        try:
            return subject.make()
        except ERRORS as error:
            what = f"the factory of subject {subject.name!r}"
            raise ValueError(raised(what, error, of=subject.make)) from error

    then = "It takes nothing, and returns what the model is called with."
    batch = None if subject.batch is None else partial(asked, "batch", subject.batch, then=then)
    return replace(subject, make=make, batch=batch)


def checks_for(subject: Subject) -> Iterator[BoundCheck]:
    """Every check, bound to the subject, in the order of `CHECKS`; also those not claimed.

    Raises:
        ValueError: If the subject claims something that no check tests.

    Example:
        >>> subject = as_subject([nn.Linear(2, 2), nn.Linear(2, 2)])
        >>> [bound.check.name for bound in checks_for(subject) if bound.claimed][0]
        'sharing'
    """
    for name in subject.claims:
        _known(name, f"subject {subject.name!r} claims {name!r}")
    for name, check in CHECKS.items():
        yield BoundCheck(check, subject, subject.claims.get(name))


@dataclass(frozen=True)
class Result:
    """What one check found.

    Attributes:
        subject: The subject's name.
        check: The check's name.
        claim: What was claimed; None where nothing was.
        status: "held", "broken", "error" (the check could not look) or "not claimed".
        found: The measurement's first line, or the first line of the message.
        message: The whole message of a broken claim or an error.
        measurement: The measurement, where the claim held.
    """

    subject: str
    check: str
    claim: Any
    status: str
    found: str = ""
    message: str = ""
    measurement: object = None


@dataclass(frozen=True)
class Results(Sequence[Result]):
    """Results of all checks of a subject; `str` is a table, and `held` what a gate asks."""

    results: tuple[Result, ...]

    def __getitem__(self, index: Any) -> Any:
        return self.results[index]

    def __len__(self) -> int:
        return len(self.results)

    @property
    def held(self) -> bool:
        """Whether something was claimed, and every claim held."""
        states = {result.status for result in self.results}
        return "held" in states and not states & {"broken", "error"}

    def __str__(self) -> str:
        lines = aligned([(r.check, r.status, r.found) for r in self.results])
        details = [r.message for r in self.results if r.message]
        return "\n\n".join(["\n".join(lines), *details])


def check_ensemble(
    model: Subject | Model | Callable[[], Any], *, seed: int = DEFAULT_SEED
) -> Results:
    """Runs every check that the subject claims, and returns what they found.

    Args:
        model: A `Subject`, a module, a list or dict of modules, or a function that returns one.
        seed: Set before the model is made, for every check.

    Returns:
        One result for each check, also for those not claimed; `print` it, or ask `.held`.

    Raises:
        ValueError: If this is no subject at all, or claims what no check tests.

    Example:
        >>> one = nn.Linear(2, 2)
        >>> results = check_ensemble(Subject(make=lambda: [one, one],
        ...                                  claims={"sharing": "independent"}))
        >>> results.held, results[0].status
        (False, 'broken')
    """
    subject = as_subject(model)
    token = present_seed.set(seed)
    try:
        return Results(tuple(_result(bound) for bound in checks_for(subject)))
    finally:
        present_seed.reset(token)


def parametrize_with_checks(
    subjects: Iterable[Subject | Model | Callable[[], Any]],
    *,
    expected_failures: Mapping[str, str] | None = None,
) -> pytest.MarkDecorator:
    """Makes one test of every subject and check; the test calls `check(subject)`.

    Args:
        subjects: What `check_ensemble` takes, each.
        expected_failures: Check name to the reason why it is known to fail: a strict xfail, so
            that a check that passes after all is reported.

    Raises:
        ValueError: If there are no subjects, or a check name is unknown.

    Example:
        >>> @parametrize_with_checks([[nn.Linear(2, 2), nn.Linear(2, 2)]])
        ... def test_claims(subject, check):
        ...     check(subject)
    """
    reasons = dict(expected_failures or {})
    for name in reasons:
        _known(name, f"expected_failures names {name!r}")
    given = [as_subject(thing, name=f"subject{i}") for i, thing in enumerate(subjects)]
    if not given:
        raise ValueError("parametrize_with_checks got no subjects: there is nothing to check.")
    names = [subject.name for subject in given]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{names.count(name)} subjects are named {name!r}: reports could not tell them "
                "apart. Give each its own name: Subject(name=...)."
            )
    return pytest.mark.parametrize(
        ("subject", "check"),
        [
            pytest.param(
                subject,
                bound,
                id=f"{subject.name}-{bound.check.name}",
                marks=[
                    pytest.mark.ensembles,
                    *(
                        [pytest.mark.xfail(reason=reasons[bound.check.name], strict=True)]
                        if bound.check.name in reasons and bound.claimed
                        else []
                    ),
                ],
            )
            for subject in given
            for bound in checks_for(subject)
        ],
    )


def as_subject(thing: Any, *, name: str = "") -> Subject:
    """A `Subject` from what a user gave, with default claims and batch where it has none.

    Raises:
        ValueError: If it is nothing that can be looked at.

    Example:
        >>> as_subject(nn.Linear(2, 2), name="head").claims == DEFAULT_MODULE_CLAIMS
        True
    """
    if isinstance(thing, Subject):
        unnamed = thing.name == "<lambda>"
        subject: Subject = replace(thing, name=name or "subject") if unnamed else thing
        return subject if subject.batch else replace(subject, batch=partial(_batch_for, subject))
    if isinstance(thing, torch.nn.Module) or not callable(thing):
        named_modules_of(thing)
        return as_subject(_claiming_defaults(lambda: thing, thing, name))
    own = called(thing)
    name = own if own != "..." else name or "subject"
    try:
        with generators_kept():
            seed_generators(present_seed.get())
            result = thing()
    except (Exception, *STOPS) as error:
        raise ValueError(raised(f"the factory {name!r}", error, of=thing)) from error
    if isinstance(result, Subject):
        return as_subject(result, name=name)
    returns = "It returns a module, a list or dict of modules, or a Subject."
    if not isinstance(result, (torch.nn.Module, Mapping, Sequence)):
        kind = f"an object of type {type(result).__name__}"
        raise ValueError(f"the factory {name!r} returned {kind}. {returns}")
    try:
        named_modules_of(result)
    except ValueError as error:
        raise ValueError(f"the factory {name!r} returned no model: {error} {returns}") from error
    return as_subject(_claiming_defaults(thing, result, name))


def resolve(path: str) -> Subject:
    """The subject that "package.module:factory" names.

    Raises:
        ValueError: If the path is malformed, the module cannot be imported (it raises, skips or
            exits), or has no such name.

    Example:
        >>> resolve("torch.nn:Identity").name
        'Identity'
    """
    module_name, colon, attribute = path.partition(":")
    if not colon or not module_name or not attribute:
        raise ValueError(f"{path!r} names no factory: write package.module:factory.")
    try:
        found: Any = import_module(module_name)
        for part in attribute.split("."):  # a package may import it only now
            found = getattr(found, part, NOTHING)
    except (Exception, *STOPS) as error:
        script = ' Keep what a script does below `if __name__ == "__main__":`.'
        raise ValueError(
            f"cannot import {module_name!r} for the subject {path!r}: {said(error)}."
            f"{script if isinstance(error, SystemExit) else ''}"
        ) from error
    if found is NOTHING:
        raise ValueError(f"{module_name!r} has no {attribute!r}, which {path!r} names.")
    return as_subject(found, name=attribute)


def _claiming_defaults(make: Callable[[], Model], model: Model, name: str) -> Subject:
    name = name or type(model).__name__
    if not is_one_module(model):  # a list of one has lost members: an error, not a network
        return Subject(make=make, name=name, claims=DEFAULT_ENSEMBLE_CLAIMS)
    kept = getattr(model, "members", None)
    if isinstance(kept, (torch.nn.ModuleList, torch.nn.ModuleDict)) and len(kept) > 1:
        return Subject(
            make=make,
            name=name,
            outputs=partial(_of_members, len(kept)),
            members=attrgetter("members"),
            claims=DEFAULT_CONTAINER_CLAIMS,
        )
    return Subject(make=make, name=name, outputs=whole, claims=DEFAULT_MODULE_CLAIMS)


def _of_members(count: int, output: Any) -> Mapping[str, Any] | Sequence[Any]:
    """One output for each member, where there are as many; else what all of them make together."""
    several = isinstance(output, (Mapping, Sequence)) and len(output) == count
    return output if several else whole(output)


def _batch_for(subject: Subject) -> Any:
    with generators_kept():
        return inferred_batch(made(_telling(subject)))


def _result(bound: BoundCheck) -> Result:
    made_of = partial(Result, bound.subject.name, bound.check.name, bound.claim)
    if not bound.claimed:
        return made_of("not claimed")
    try:
        measurement = bound()
    except Exception as error:  # whatever the user's model raises, the other checks still run
        status = "broken" if isinstance(error, AssertionError) else "error"
        return made_of(status, found=_first_line(_told(error)), message=_told(error))
    return made_of("held", found=_first_line(str(measurement)), measurement=measurement)


def _told(error: BaseException) -> str:
    """The message; with its type where it is not one of ours, or says nothing."""
    ours = isinstance(error, (AssertionError, ValueError)) and str(error)
    return str(error) if ours else said(error)


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised it; else the frames of the user's model are worth reading."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("ensembles.")


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def _known(name: str, where: str) -> None:
    if name not in CHECKS:
        raise ValueError(f"{where}, and there is no such check. Checks are: {', '.join(CHECKS)}.")
