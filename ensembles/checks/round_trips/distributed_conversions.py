"""Conversions that need several processes: DDP and FSDP2, on two gloo processes of this machine.

Each process knows nothing that this one has done: it makes the model from "package.module:factory".
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from ensembles.case import Case
from ensembles.checks.round_trips.conversion_outcomes import Original, Spare, together
from ensembles.checks.round_trips.conversions import Conversion, Converted, NotLookedAt, Source
from ensembles.checks.round_trips.differences import Difference, Outcome
from ensembles.handling.state import seed_generators
from ensembles.instruments.processes import answer_of
from ensembles.subject import Subject

__all__ = ["DISTRIBUTED", "convert_in_rank", "outcomes_in_processes"]

RANKS = 2
"""Processes: as many as are needed to differ."""

TIMEOUT = 120
"""Seconds for both processes."""


def _ddp(source: Source) -> Converted:
    wrapped = torch.nn.parallel.DistributedDataParallel(source.module)
    return Converted(wrapped, wrapped.module)


def _fsdp2(source: Source) -> Converted:
    if torch.__version__ < "2.7":
        raise NotLookedAt("this PyTorch shards on GPUs only: from 2.7 on it does on CPUs")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    sharded: Any = fully_shard(source.module, mesh=init_device_mesh("cpu", (RANKS,)))
    return Converted(sharded, sharded)


DISTRIBUTED: Mapping[str, Conversion] = {
    "ddp": Conversion("ddp", _ddp, "shared", "recomputed"),
    "fsdp2": Conversion("fsdp2", _fsdp2, "in place", "recomputed"),
}
"""Every conversion that needs several processes."""


def outcomes_in_processes(case: Case, factory: str, names: Sequence[str]) -> dict[str, Outcome]:
    """What these conversions do, as both processes see it.

    Args:
        case: Its batch and seed are used.
        factory: "package.module:factory", a function that returns a model or a `Subject`.
        names: Keys of `DISTRIBUTED`.

    Raises:
        ValueError: If a process fails; with the last line of its error.

    Example:
        >>> outcomes_in_processes(Case.of(nn.Identity()), "torch.nn:Identity", [])
        {}
    """
    if not (distributed.is_available() and distributed.is_gloo_available()):
        return {name: Outcome(name, reason="this PyTorch has no gloo") for name in names}
    if not names:
        return {}
    first, *others = _seen_by_ranks(case, factory, names)
    # What differs between the processes differs from the model in one of them at least.
    return {
        name: next((seen[name] for seen in others if seen[name] != first[name]), first[name])
        for name in names
    }


def _seen_by_ranks(case: Case, factory: str, names: Sequence[str]) -> list[dict[str, Outcome]]:
    with tempfile.TemporaryDirectory() as folder:
        torch.save(case.batch, Path(folder, "batch.pt"))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([os.getcwd(), *filter(None, sys.path)]),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
        code = f"from {__name__} import convert_in_rank as run; run"
        given = f"{folder!r}, {factory!r}, {list(names)!r}, {case.seed}"
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", f"{code}({given}, {rank})"],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(RANKS)
        ]
        try:
            errors = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"{factory} took more than {TIMEOUT} s.") from error
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.communicate()
        answers = [
            answer_of(process, said, Path(folder, f"{rank}.json"), factory)
            for rank, (process, said) in enumerate(zip(processes, errors, strict=True))
        ]
        return [{name: _outcome_of(plain) for name, plain in one.items()} for one in answers]


def convert_in_rank(folder: str, factory: str, names: Sequence[str], seed: int, rank: int) -> None:
    """What each process does; it leaves what it saw in the folder.

    Example::

        convert_in_rank("/tmp/rank", "torch.nn:Identity", ["ddp"], 1729, 0)
    """
    module, _, attribute = factory.partition(":")
    made: Any = import_module(module)
    for part in attribute.split("."):
        made = getattr(made, part)
    models = []
    if not isinstance(made, Subject):
        seed_generators(seed)
        thing = made()
        models = [] if isinstance(thing, Subject) else [thing]
        made = thing if isinstance(thing, Subject) else Subject(make=made)
    batch: Any = torch.load(Path(folder, "batch.pt"), weights_only=False)
    case = Case(replace(made, batch=lambda: batch), seed=seed)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS
    )
    seen = {}
    try:
        for name in names:  # each on a model of its own: wrappers leave hooks that nobody sees
            original = Original(case, together(models.pop() if models else case.built()))
            seen[name] = asdict(original.after(DISTRIBUTED[name], Spare(case)))
    finally:
        distributed.destroy_process_group()
    Path(folder, f"{rank}.json").write_text(json.dumps(seen))


def _outcome_of(plain: Mapping[str, Any]) -> Outcome:
    def tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
        return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}

    differences = [Difference(**tuples(one)) for one in plain["differences"]]
    return Outcome(**tuples({**plain, "differences": differences}))
