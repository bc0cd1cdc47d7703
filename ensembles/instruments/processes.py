"""What a process of its own answers, in which a factory is imported and run anew."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["answer_of"]


def answer_of(process: subprocess.Popen[str], errors: str, file: Path, factory: str) -> Any:
    """What a process left in its file.

    Args:
        process: It has ended.
        errors: What it wrote to stderr.
        file: JSON, which it writes last.
        factory: What it ran.

    Raises:
        ValueError: If it failed; with the last line of its error. Also if it ended without an
            answer, since the factory may call sys.exit(0).

    Example:
        >>> import sys
        >>> process = subprocess.Popen([sys.executable, "-c", ""], text=True)
        >>> process.wait()
        0
        >>> answer_of(process, "", Path("nowhere.json"), "models:build")
        Traceback (most recent call last):
        ValueError: models:build failed in a process of its own: exit status 0, and no answer
    """
    if not process.returncode and not file.exists():
        raise ValueError(f"{factory} failed in a process of its own: exit status 0, and no answer")
    if process.returncode:
        lines = errors.strip().splitlines() or [f"exit status {process.returncode}"]
        raise ValueError(f"{factory} failed in a process of its own: {lines[-1]}")
    return json.loads(file.read_text())
