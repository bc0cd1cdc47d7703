"""The console script `ensembles`: train, evaluate, plot, robustness, convert, check.

A command is imported only when it is called. So `ensembles --help` is quick, and it also works if
the extra is not installed. An error that the user can mend is told in one line, with exit status 2.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from traceback import walk_tb
from typing import TextIO

from ensembles import __version__

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "train": "Trains a network, or continues a run that was stopped.",
    "evaluate": "Evaluates a model on a set of images and on shifted sets, and writes a result.",
    "plot": "Draws results, or the training curves of runs.",
    "robustness": "Compares how accurate models are under distribution shift.",
    "convert": "Converts a training checkpoint to a plain state dict.",
    "check": "Checks that a model is what it claims to be.",
}
"""Each command, with the first line of its docstring."""

OURS = Path(__file__).resolve().parents[1]
"""The folder of this package."""

USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Without the program's name; by default those of the process.

    Returns:
        The exit status: 0, or 2 for an error that the user can mend. `check` also returns 1 for a
        broken claim, and 3 where a check could not look.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _overview()
    try:
        command = parser.parse_args(given[:1]).command
    except SystemExit as told:  # --help, --version, or an unknown command
        return int(told.code or 0)
    if command is None:
        parser.print_help()
        return USER_ERROR
    try:
        module = import_module(f"ensembles.experiments.commands.{command}")
        with _warnings_told(command):
            return int(module.main(given[1:]))
    except SystemExit as told:  # a command's --help
        return int(told.code or 0)
    except KeyboardInterrupt as error:
        return _told(command, str(error) or "interrupted", INTERRUPTED)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("ensembles"):
            raise
        advice = 'pip install "pytest-ensembles[experiments]"'
        return _told(command, f"{error.name} is not installed: {advice}", USER_ERROR)
    except argparse.ArgumentError as error:
        said = " ".join(str(error).split())
        return _told(command, f"{said} (ensembles {command} --help shows all options)", USER_ERROR)
    except (ValueError, OSError, FloatingPointError) as error:
        return _told(command, str(error), USER_ERROR)
    except (RuntimeError, TypeError) as error:
        if not _is_ours(error):
            raise
        return _told(command, str(error), USER_ERROR)


def _overview() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="ensembles",
        usage="ensembles COMMAND [options]",
        description="Train, evaluate and verify ensembles and weight-sharing networks.",
        epilog="commands:\n"
        + "\n".join(lines)
        + "\n\n`ensembles COMMAND --help` shows the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pytest-ensembles {__version__}")
    parser.add_argument(
        "command", nargs="?", choices=COMMANDS, metavar="COMMAND", help="one of the commands below"
    )
    return parser


def _told(command: str, message: str, status: int) -> int:
    print(f"ensembles {command}: error: {message}", file=sys.stderr)
    return status


@contextmanager
def _warnings_told(command: str) -> Iterator[None]:
    """Tells warnings of this package as errors are told; others are shown as Python does."""
    before = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if OURS in Path(filename).resolve().parents:
            print(f"ensembles {command}: warning: {message}", file=sys.stderr)
        else:
            before(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def _is_ours(error: Exception) -> bool:
    """Whether this package raised it on purpose; else its frames are worth reading."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("ensembles.")


if __name__ == "__main__":
    sys.exit(main())
