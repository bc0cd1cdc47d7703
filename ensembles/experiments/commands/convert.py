"""`ensembles convert`: the plain state dict of a training checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from ensembles.experiments.commands.parsing import parser_of, values_of

__all__ = ["main", "parser", "run"]

EXAMPLE = "ensembles convert runs/single/checkpoints/step_00000070.ckpt single.pt --member single"


def run(checkpoint: Path, out: Path, *, member: str | None = None) -> int:
    """Converts a training checkpoint to a plain state dict.

    `torch.load(out, weights_only=True)` reads the new file. It needs neither Lightning nor this
    package.

    Args:
        checkpoint: A checkpoint of `ensembles train`, or the folder of a run. Of a run, the last
            checkpoint is taken.
        out: The new file. An existing file is never overwritten.
        member: The one member to write, as the state dict of a plain ResNet. A subnet is cut out of
            its parent. If not given, all members are written.

    Returns:
        The exit status.
    """
    from ensembles.experiments.evaluation.loading import checkpoint_of
    from ensembles.experiments.training.checkpoints import convert

    found = checkpoint_of(checkpoint)
    convert(found, out, member=member)
    print(f"{out}: {'all members' if member is None else member} of {found}")
    return 0


def parser() -> ArgumentParser:
    """The command's options."""
    return parser_of("convert", run, example=EXAMPLE)


def main(arguments: Sequence[str]) -> int:
    """Runs the command."""
    return run(**values_of(parser(), arguments))
