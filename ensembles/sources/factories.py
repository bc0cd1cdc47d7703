"""Makes a subject of a model, of a function that returns one, or of the path of either."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch

from ensembles.case import Case
from ensembles.handling.members import is_one_module, named_modules_of
from ensembles.handling.state import generators_kept, seed_generators
from ensembles.present_run import seed as present_seed
from ensembles.registry import default_claims
from ensembles.sources.inferred_batch import inferred_batch
from ensembles.subject import Model, Subject, whole
from ensembles.user_calls import STOPS, called, raised, said

__all__ = ["as_subject", "resolve"]

_NOTHING = object()


def as_subject(thing: Any, *, name: str = "") -> Subject:
    """Makes a `Subject` of what a user gave; it gets default claims and a batch if it has none.

    Raises:
        ValueError: If no subject can be made of it.

    Example:
        >>> as_subject(nn.Linear(2, 2), name="head").claims
        {'sharing': 'distinct', 'coverage': 'complete'}
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
        raise ValueError(
            f"the factory {name!r} did not return a model: {error} {returns}"
        ) from error
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
        for part in attribute.split("."):  # a package may import the name only when it is asked
            found = getattr(found, part, _NOTHING)
    except (Exception, *STOPS) as error:
        script = ' Put the work of a script below `if __name__ == "__main__":`.'
        raise ValueError(
            f"cannot import {module_name!r} for the subject {path!r}: {said(error)}."
            f"{script if isinstance(error, SystemExit) else ''}"
        ) from error
    if found is _NOTHING:
        raise ValueError(f"{module_name!r} has no {attribute!r}, which {path!r} names.")
    return as_subject(found, name=attribute)


def _claiming_defaults(make: Callable[[], Model], model: Model, name: str) -> Subject:
    name = name or type(model).__name__
    if not is_one_module(model):  # a list of one has lost members, which the checks shall report
        return Subject(make=make, name=name, claims=default_claims("ensemble"))
    kept = getattr(model, "members", None)
    if isinstance(kept, (torch.nn.ModuleList, torch.nn.ModuleDict)) and len(kept) > 1:
        return Subject(
            make=make,
            name=name,
            outputs=partial(_of_members, len(kept)),
            members=attrgetter("members"),
            claims=default_claims("container"),
        )
    return Subject(make=make, name=name, outputs=whole, claims=default_claims("module"))


def _of_members(count: int, output: Any) -> Mapping[str, Any] | Sequence[Any]:
    """One output for each member if there are as many; otherwise one output of the whole model."""
    several = isinstance(output, (Mapping, Sequence)) and len(output) == count
    return output if several else whole(output)


def _batch_for(subject: Subject) -> Any:
    with generators_kept():
        return inferred_batch(Case(subject).built())
