"""The folder of a training run: whose it is, who writes to it, and its tables.

A folder belongs to one run, which `options.json` describes. What is written there is written such
that a kill at any moment, or a full disk, leaves it usable: whole files appear under their names at
once, and tables are cut back to the checkpoint from which a run goes on.
"""

import csv
import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

__all__ = ["Run", "RunFolder", "Table", "make_folder", "write_whole"]

OPTIONS = "options.json"
LOCK = ".lock"
MISSING = "nothing"


@dataclass(frozen=True)
class Run:
    """A training run, finished or not.

    Attributes:
        folder: Its folder.
        checkpoint: The last checkpoint; None before the first.
        steps: Optimizer steps up to it.
        finished: Whether these are all.
    """

    folder: Path
    checkpoint: Path | None
    steps: int
    finished: bool

    def epochs(self) -> list[dict[str, float]]:
        """The table of epochs: losses in nats per sample, accuracies from 0 to 1.

        Returns:
            A row for every epoch, by column: ``train/member_0/loss``, ``val/ensemble/accuracy``.
            What was not measured in an epoch is not in its row.
        """
        return Table(self.folder / "epochs.csv").read()

    def steps_taken(self) -> list[dict[str, float | str]]:
        """The table of optimizer steps: rate, loss, members that were asked for, their losses."""
        return Table(self.folder / "steps.csv").read()


class RunFolder:
    """The folder of one run.

    Args:
        path: The folder; made where there is none.
        description: The run, as plain values by name; nested. Equal descriptions are one run.

    Example:
        >>> import tempfile
        >>> place = tempfile.mkdtemp()
        >>> RunFolder(place, {"training": {"lr": 0.1}}).claim()
        >>> RunFolder(place, {"training": {"lr": 0.2}}).claim()
        Traceback (most recent call last):
        ...
        ValueError: ... belongs to another run, which differs in
          training.lr: 0.1 there, 0.2 here
        Choose another folder, or the options of that run to go on with it.
    """

    def __init__(self, path: Path | str, description: Mapping[str, Any]) -> None:
        self.path = Path(path)
        # As it will be read again: tuples become lists, and no value is other than plain.
        self.description = json.loads(json.dumps(description))

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.path / "checkpoints"

    def claim(self) -> None:
        """Makes the folder this run's, or finds that it is.

        Raises:
            ValueError: If it belongs to another run, naming the options that differ, or holds
                other things, or its description is damaged.
        """
        options = self.path / OPTIONS
        if not options.exists():
            found = sorted(p.name for p in self.path.iterdir()) if self.path.exists() else []
            others = [name for name in found if not _ours(name)]
            if others:
                raise ValueError(
                    f"{self.path} holds {others[0]!r} and no {OPTIONS}: it is no folder of a "
                    "training run. Choose an empty or a new folder."
                )
            make_folder(self.path)
            text = json.dumps(self.description, indent=2) + "\n"
            write_whole(options, text.encode(), replace=False)
            return
        there = _described(options)
        differing = list(_differences(there, self.description))
        if differing:
            shown = "".join(f"  {line}\n" for line in differing[:10])
            more = f"  ... {len(differing) - 10} more\n" if len(differing) > 10 else ""
            raise ValueError(
                f"{self.path} belongs to another run, which differs in\n{shown}{more}"
                "Choose another folder, or the options of that run to go on with it."
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from writing to the folder; a killed process keeps nothing.

        Raises:
            RuntimeError: If another process has it.
            OSError: If the folder cannot be made, or written to.
        """
        make_folder(self.path)
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise RuntimeError(
                f"another process is training in {self.path}: wait for it, or choose another folder"
            ) from error
        except OSError as error:  # a folder that is there, and may not be written to
            raise _unusable(self.path, error) from error
        try:
            yield
        finally:
            lock.release()

    def tidy(self) -> None:
        """Removes what a killed process had not finished to write."""
        for folder in (self.path, self.checkpoints):
            for path in folder.glob(".*.tmp"):
                path.unlink(missing_ok=True)


class Table:
    """A CSV file of rows with a step, which survives kills and can be cut back.

    The first row fixes the columns. Numbers are written so that they read back to the bit.

    Args:
        path: The file; made at the first flush.
        columns: All columns, "step" among them; only needed to write.

    Example:
        >>> import tempfile
        >>> table = Table(Path(tempfile.mkdtemp(), "t.csv"), ["step", "loss"])
        >>> for step in (1, 2, 3):
        ...     table.append({"step": step, "loss": 1 / step})
        >>> table.flush(); table.cut(2); table.read()
        [{'step': 1, 'loss': 1.0}, {'step': 2, 'loss': 0.5}]
    """

    def __init__(self, path: Path, columns: Sequence[str] = ()) -> None:
        self.path = path
        self.columns = list(columns)
        self._waiting: list[Mapping[str, Any]] = []

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row, which is on the disk after the next flush."""
        unknown = sorted(set(row) - set(self.columns))
        if unknown:
            raise ValueError(f"{self.path.name} has no column {unknown[0]!r}")
        self._waiting.append(row)

    def flush(self) -> None:
        """Writes what is waiting, and returns when it is on the disk."""
        if not self._waiting:
            return
        with _explained(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerows(self._waiting)
            file.flush()
            os.fsync(file.fileno())
        self._waiting = []

    def cut(self, step: int) -> None:
        """Removes the rows of later steps, and a last row of which a kill left a part."""
        if not self.path.exists():
            return
        head, *lines = self.path.read_text("utf-8").splitlines(keepends=True) or [""]
        place = head.strip().split(",").index("step") if "step" in head else 0
        kept = []
        for line in lines:
            # Rows are in the order of their steps: what comes behind a later one is later.
            if not line.endswith("\n") or int(line.split(",")[place]) > step:
                break
            kept.append(line)
        if not head.endswith("\n"):
            self.path.unlink()
        elif len(kept) < len(lines):
            write_whole(self.path, "".join([head, *kept]).encode(), replace=True)

    def read(self) -> list[dict[str, Any]]:
        """The rows that are on the disk, numbers as numbers, without the empty cells."""
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return [
                {name: _value(cell) for name, cell in row.items() if cell}
                for row in csv.DictReader(file)
            ]


def make_folder(path: Path) -> None:
    """Makes a folder, and those that it is in, where there are none.

    Example:
        >>> import tempfile
        >>> make_folder(Path(tempfile.mkdtemp(), "runs", "first"))

    Raises:
        OSError: If it cannot be made, as under the name of a file.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(path, error) from error


def write_whole(path: Path, content: bytes | memoryview, *, replace: bool) -> None:
    """Writes a file such that under its name there is all of it or nothing, at any moment.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "a.bin")
        >>> write_whole(path, b"one", replace=False)
        >>> write_whole(path, b"two", replace=False)
        Traceback (most recent call last):
        ...
        FileExistsError: ...a.bin exists, and is not overwritten: choose another name

    Args:
        path: The file.
        content: All of it.
        replace: Whether a file of this name is exchanged for it. Otherwise it is left alone.

    Raises:
        FileExistsError: If there is such a file and ``replace`` is false.
        OSError: If it cannot be written, as on a full disk; what was there before still is.
    """
    if not replace and path.exists():
        raise _taken(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _explained(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if replace:
                os.replace(temporary, path)
            else:
                _publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _publish(temporary: Path, path: Path) -> None:
    """Gives the file its name, unless another process was faster."""
    try:
        os.link(temporary, path)
    except FileExistsError as error:
        raise _taken(path) from error
    except OSError:  # a file system without hard links
        if path.exists():
            raise _taken(path) from None
        os.replace(temporary, path)


def _taken(path: Path) -> FileExistsError:
    return FileExistsError(f"{path} exists, and is not overwritten: choose another name")


def _sync_folder(folder: Path) -> None:
    """Makes the name durable too, where the system can (not on Windows)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))
        advice = "Free some space" if full else "Mend it"
        raise OSError(
            error.errno,
            f"{os.strerror(error.errno or 0)} while writing {path}. What was written before is "
            f"whole. {advice}, and give the same command again: a training run goes on from its "
            "last checkpoint",
        ) from error


def _unusable(path: Path, error: OSError) -> OSError:
    said = os.strerror(error.errno or 0)
    return OSError(error.errno, f"{path} cannot be used as a folder ({said}): choose another one")


def _described(options: Path) -> dict[str, Any]:
    try:
        there = json.loads(options.read_bytes().decode("utf-8"))
    except ValueError as error:
        fault = f"it is no JSON text: {error}"
    else:
        if isinstance(there, dict):
            return there
        fault = f"it is a {type(there).__name__}, and no description of a run"
    raise ValueError(f"{options} is damaged: {fault}. Bring it back, or choose another folder.")


def _ours(name: str) -> bool:
    return name == LOCK or (name.startswith(".") and name.endswith(".tmp"))


def _differences(there: Any, here: Any, place: str = "") -> Iterator[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in dict.fromkeys([*there, *here]):
            inner = f"{place}.{key}" if place else key
            yield from _differences(there.get(key, MISSING), here.get(key, MISSING), inner)
    elif there != here:
        yield f"{place}: {_shown(there)} there, {_shown(here)} here"


def _shown(value: Any) -> str:
    return MISSING if value is MISSING else json.dumps(value)


def _value(cell: str) -> Any:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell
