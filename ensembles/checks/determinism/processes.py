"""A recorded run in a process of its own, which knows nothing that this one has done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ensembles.checks.determinism.seeding import seeded
from ensembles.handling.state import seed_generators
from ensembles.instruments.processes import answer_of
from ensembles.instruments.recording import Entry, RunOptions, recorded_anew
from ensembles.subject import Subject

__all__ = ["run_of_factory", "runs_in_processes"]

TIMEOUT = 600
"""Seconds for one process, which imports torch and the factory anew."""


def runs_in_processes(
    factory: str, batch: Any, run: RunOptions, *, algorithms: bool = True
) -> list[tuple[Entry, ...]]:
    """Records one run in each of two processes, with other hash seeds and other states at import.

    Args:
        factory: "package.module:factory", a function that returns a model or a `Subject`.
        batch: What the model is called with where the factory returns no subject with a batch.
        run: As for `recorded`.
        algorithms: As for `seeded`.

    Raises:
        ValueError: If a process fails; with the last line of its error.

    Example:
        >>> run = RunOptions(seed=0, steps=0)
        >>> first, second = runs_in_processes("torch.nn:Identity", None, run)
        >>> first == second
        True
    """
    if ":" not in factory:
        raise ValueError(f"{factory!r} names no factory: write package.module:factory.")
    with tempfile.TemporaryDirectory() as folder:
        torch.save(batch, Path(folder, "batch.pt"))
        asked = {"factory": factory, "algorithms": algorithms, "run": asdict(run)}
        started = []
        for number in range(2):
            Path(folder, f"asked{number}.json").write_text(json.dumps({**asked, "number": number}))
            environment = {
                **os.environ,
                "PYTHONHASHSEED": str(number),
                "PYTHONPATH": os.pathsep.join([os.getcwd(), *filter(None, sys.path)]),
                # Whatever measures this process is not to measure those.
                "OMP_NUM_THREADS": str(torch.get_num_threads()),
            }
            command = (
                "from ensembles.checks.determinism.processes import run_of_factory as run; run"
            )
            started.append(
                subprocess.Popen(
                    [sys.executable, "-c", f"{command}({folder!r}, {number})"],
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        try:
            return [
                _entries(process, Path(folder, f"entries{number}.json"), factory)
                for number, process in enumerate(started)
            ]
        finally:
            for process in started:
                process.kill()
                process.communicate()


def run_of_factory(folder: str, number: int) -> None:
    """What each process does; it leaves the entries in the folder that holds the question.

    Example::

        run_of_factory("/tmp/questions", 0)
    """
    asked = json.loads(Path(folder, f"asked{number}.json").read_text())
    # Generators are in another state in every process until the seed is set: what is drawn while
    # a module is imported must not matter.
    seed_generators(number + 1)
    module, _, attribute = asked["factory"].partition(":")
    made: Any = import_module(module)
    for part in attribute.split("."):
        made = getattr(made, part)
    batch: Any = torch.load(Path(folder, "batch.pt"), weights_only=False)
    run = RunOptions(**asked["run"])
    with seeded(run.seed, algorithms=asked["algorithms"]):
        subject = made if isinstance(made, Subject) else None
        if subject is None:
            thing = made()
            subject = thing if isinstance(thing, Subject) else Subject(make=made)
            seed_generators(run.seed)
        if subject.batch is None:
            subject = replace(subject, batch=lambda: batch)
        _, entries = recorded_anew(subject, run)
    Path(folder, f"entries{number}.json").write_text(json.dumps([_plain(e) for e in entries]))


def _plain(entry: Entry) -> list[Any]:
    return [entry.step, entry.kind, entry.member, entry.name, entry.digest, entry.norm]


def _entries(process: subprocess.Popen[str], file: Path, factory: str) -> tuple[Entry, ...]:
    try:
        _, errors = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{factory} took more than {TIMEOUT} s in its own process.") from error
    return tuple(Entry(*plain) for plain in answer_of(process, errors, file, factory))
