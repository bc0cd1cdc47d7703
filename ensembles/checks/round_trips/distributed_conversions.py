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
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from ensembles.checks.round_trips.conversion_outcomes import Trip, owners_of, trip
from ensembles.checks.round_trips.conversions import Conversion, Converted, NotLookedAt, Source
from ensembles.instruments.processes import answer_of
from ensembles.subject import Subject

__all__ = ["DISTRIBUTED", "trip_in_rank", "trips_in_processes"]

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


def trips_in_processes(
    factory: str, batch: Any, names: Sequence[str], *, seed: int
) -> dict[str, Trip]:
    """What these conversions do, as both processes see it.

    Args:
        factory: "package.module:factory", a function that returns a model or a `Subject`.
        batch: What the model is called with.
        names: Keys of `DISTRIBUTED`.
        seed: As for `trip`.

    Raises:
        ValueError: If a process fails; with the last line of its error.

    Example:
        >>> trips_in_processes("torch.nn:Identity", None, [], seed=0)
        {}
    """
    if ":" not in factory:
        raise ValueError(f"{factory!r} names no factory: write package.module:factory.")
    if not (distributed.is_available() and distributed.is_gloo_available()):
        return {name: Trip(reason="this PyTorch has no gloo") for name in names}
    if not names:
        return {}
    first, *others = _seen_by_ranks(factory, batch, names, seed)
    # What differs between the processes differs from the model in one of them at least.
    return {
        name: next((seen[name] for seen in others if seen[name] != first[name]), first[name])
        for name in names
    }


def _seen_by_ranks(
    factory: str, batch: Any, names: Sequence[str], seed: int
) -> list[dict[str, Trip]]:
    with tempfile.TemporaryDirectory() as folder:
        torch.save(batch, Path(folder, "batch.pt"))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([os.getcwd(), *filter(None, sys.path)]),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
        command = f"from {__name__} import trip_in_rank as run; run"
        processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    f"{command}({folder!r}, {factory!r}, {list(names)!r}, {rank}, {seed})",
                ],
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
        return [{name: _trip_of(plain) for name, plain in one.items()} for one in answers]


def trip_in_rank(folder: str, factory: str, names: Sequence[str], rank: int, seed: int) -> None:
    """What each process does; it leaves what it saw in the folder.

    Example::

        trip_in_rank("/tmp/rank", "torch.nn:Identity", ["ddp"], 0, 1729)
    """
    module, _, attribute = factory.partition(":")
    made: Any = import_module(module)
    for part in attribute.split("."):
        made = getattr(made, part)
    outputs = None
    if isinstance(made, Subject) or isinstance(thing := made(), Subject):
        subject = made if isinstance(made, Subject) else thing
        made, outputs = subject.make, subject.outputs
    batch: Any = torch.load(Path(folder, "batch.pt"), weights_only=False)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS
    )
    try:
        owners = owners_of(made, batch, seed=seed, outputs=outputs)
        seen = {
            name: trip(made, batch, DISTRIBUTED[name], seed=seed, outputs=outputs, owners=owners)
            for name in names
        }
    finally:
        distributed.destroy_process_group()
    Path(folder, f"{rank}.json").write_text(
        json.dumps({name: asdict(one) for name, one in seen.items()})
    )


def _trip_of(plain: Mapping[str, Any]) -> Trip:
    def tuples(value: Any) -> Any:
        return tuple(tuples(one) for one in value) if isinstance(value, list) else value

    return Trip(**{name: tuples(value) for name, value in plain.items()})
