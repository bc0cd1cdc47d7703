"""`ensembles check`: the suite for users who do not know pytest."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from jsonargparse import ArgumentParser

from ensembles.experiments.commands.parsing import parser_of, values_of
from ensembles.present_run import DEFAULT_SEED

__all__ = ["main", "parser", "run"]

EXAMPLE = "ensembles check mypackage.models:build --require sharing,ownership"

BROKEN = 1
COULD_NOT_LOOK = 3


def run(subject: str, *, seed: int = DEFAULT_SEED, require: str = "") -> int:
    """Checks that a model is what it claims to be.

    The subject is the name of a function without arguments. The function returns a module, a list
    or dict of modules, or an `ensembles.Subject`, which says what is claimed. If it returns a list
    or dict of modules, the claims are these: the members are independent, and training reaches
    every parameter. The current folder is searched for the package.

    The exit status is 0 if every claim holds, and 1 if a claim is broken. It is 3 if no claim is
    broken but a check could not look. It is 2 if the subject cannot be made or claims nothing.

    Args:
        subject: The function that makes what to check, written as package.module:function.
        seed: The seed that is set before the model is made.
        require: Checks that must be claimed, separated by commas. If the subject does not claim one
            of them, this is an error.

    Returns:
        The exit status.
    """
    from ensembles import message
    from ensembles.gate.conformance import check_ensemble
    from ensembles.registry import PROMISES
    from ensembles.sources.factories import resolve

    here = str(Path.cwd())
    if here not in sys.path:  # a console script leaves it out
        sys.path.insert(0, here)
    required = [name.strip() for name in require.split(",") if name.strip()]
    for name in required:
        if name not in PROMISES:
            raise ValueError(
                f"--require names {name!r}, but there is no such check. "
                f"Checks are: {', '.join(PROMISES)}"
            )
    found = resolve(subject)
    missing = [name for name in required if found.claims.get(name) is None]
    if missing:
        raise ValueError(
            f"{found.name} does not claim {', '.join(missing)}: add it to Subject(claims=...)"
        )
    results = check_ensemble(found, seed=seed)
    claimed = [result for result in results if result.status != "not claimed"]
    if not claimed:
        raise ValueError(f"{found.name} claims nothing: give Subject(claims={{check: claim}})")
    print(found.name)
    for line in message.aligned([(r.check, r.status, r.found) for r in claimed]):
        print(f"  {line}")
    silent = [result.check for result in results if result.status == "not claimed"]
    if silent:
        print(f"  {len(silent)} not claimed: {', '.join(silent)}")
    for result in claimed:
        if result.message and result.message != result.found:
            print(f"\n{result.check}: {result.message}")
    states = [result.status for result in claimed]
    if set(states) == {"held"}:
        print(f"\n{len(states)} of {len(states)} claims hold")
        return 0
    print(
        f"\n{states.count('held')} of {len(states)} claims hold, {states.count('broken')} broken, "
        f"{states.count('error')} could not be looked at"
    )
    print(f"replay: ensembles check {quote(subject)} --seed {seed}")
    return BROKEN if "broken" in states else COULD_NOT_LOOK


def parser() -> ArgumentParser:
    """The command's options."""
    return parser_of("check", run, example=EXAMPLE)


def main(arguments: Sequence[str]) -> int:
    """Runs the command."""
    return run(**values_of(parser(), arguments))
