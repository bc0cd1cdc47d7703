"""The options of the present run: its seed, and the subject that the command line names.

Standard library only. pytest's options set both, and `check_ensemble` sets the seed. A case reads
the seed when it is made. A message names both in the command that replays it.
"""

from __future__ import annotations

from contextvars import ContextVar

DEFAULT_SEED = 1729

seed: ContextVar[int] = ContextVar("seed", default=DEFAULT_SEED)
"""The seed of the present run, as `--ensembles-seed` or `check_ensemble(seed=...)` set it."""

subject: ContextVar[str] = ContextVar("subject", default="")
"""The subject of the present run, as `--ensembles-subject` names it."""
