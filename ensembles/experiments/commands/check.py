"""`ensembles check`: the suite for those who do not know pytest."""

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

    The factory returns a module, a list or dict of modules, or an `ensembles.Subject`, which says
    what is claimed. A list or dict of modules claims by default that its members are independent
    and that training reaches every parameter. Modules are found from the current folder.

    The exit status is 0 where every claim holds, 1 where one is broken, 3 where none is broken and
    a check could not look, and 2 where the subject cannot be made or claims nothing.

    Args:
        subject: What to check, as package.module:factory.
        seed: Set before the model is made, for every check.
        require: Checks that must be claimed, separated by commas; one that is not is an error.

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
                f"require names {name!r}, but there is no such check. "
                f"There are {', '.join(PROMISES)}"
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
