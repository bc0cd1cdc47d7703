"""What can be claimed of the autograd graph: the recorded text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ensembles.claims import ClaimError, unknown

__all__ = ["TITLE", "GraphClaim", "parse", "title"]

TITLE = "autograd graph"
"""How the text of a graph begins."""


@dataclass(frozen=True)
class GraphClaim:
    """The recorded graph.

    Attributes:
        text: As it was recorded; "" where nothing is compared.
        training: Whether the model is called in training mode, as it was for the record.
    """

    text: str = ""
    training: bool = False


def title(*, training: bool) -> str:
    """The first words of the text of a graph.

    Example:
        >>> title(training=True)
        'autograd graph in training'
    """
    return f"{TITLE} {'in training' if training else 'at inference'}"


def parse(given: object) -> GraphClaim:
    """The claim that a user wrote.

    Args:
        given: The text of a recorded graph, or the `pathlib.Path` of the file that holds it.

    Raises:
        ClaimError: If it is neither, the file is missing, or the text is no recorded graph.

    Example:
        >>> parse("autograd graph in training: 1 member, ...").training
        True
        >>> parse("ReLU")
        Traceback (most recent call last):
        ensembles.claims.ClaimError: the claimed graph is no recorded graph: it starts with ...
    """
    __tracebackhide__ = True
    if not isinstance(given, (str, Path)):
        known = ["the text of a recorded graph", "the pathlib.Path of its file"]
        raise unknown("graph", given, known)
    text, name = given, "the claimed graph"
    if isinstance(text, Path):
        name = str(text)
        if not text.is_file():
            raise ClaimError(
                f"there is no recorded graph at {name}. Record it once, from a model that is "
                "right: pathlib.Path(...).write_text(str(measure_autograd_graph(model, batch))), "
                "or run a test with autograd_graph.assert_recorded."
            )
        text = text.read_text(encoding="utf-8")
    if not text.lstrip().startswith(TITLE):
        raise ClaimError(
            f"{name} is no recorded graph: it starts with {text[:40]!r}, not with {TITLE!r}. Give "
            "str(measure_autograd_graph(model, batch)) of a model that is right, or the "
            "pathlib.Path of a file that holds it."
        )
    return GraphClaim(text, training=text.lstrip().startswith(title(training=True)))
