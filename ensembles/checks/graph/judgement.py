"""Whether the autograd graph is the recorded one, line by line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import NamedTuple

from ensembles.checks.graph.claim import TITLE, GraphClaim, parse
from ensembles.checks.graph.measurement import AutogradGraph
from ensembles.findings import Count, Finding, Findings
from ensembles.message import Explanation, assert_held

__all__ = ["assert_graph_equal", "judge"]


def assert_graph_equal(graph: AutogradGraph, expected_text: str | Path) -> None:
    """Checks that a graph is the recorded one.

    Args:
        graph: From `measure_autograd_graph`.
        expected_text: Its `str`, as it was recorded, or the path of a file that holds it. Line
            ends and indentation do not matter.

    Raises:
        ValueError: If the file is missing, or the text is no recorded graph.
        AssertionError: If the graph is another one, with the lines that differ.

    Example:
        >>> from ensembles import measure_autograd_graph
        >>> recorded = str(measure_autograd_graph(nn.Linear(3, 2), torch.ones(1, 3)))
        >>> assert_graph_equal(measure_autograd_graph(nn.Linear(3, 2), torch.ones(5, 3)), recorded)
    """
    __tracebackhide__ = True
    assert_held(judge(graph, parse(expected_text)))


def judge(graph: AutogradGraph, claim: GraphClaim) -> Findings:
    """What differs between the graph and the recorded one: a finding for each line."""
    expected, found = _lines(claim.text), _lines(str(graph))
    # The title counts everything, and so differs whenever anything does.
    first = int(claim.training == graph.training and expected[1:] != found[1:])
    reaching = {
        **{leaf.names[0]: leaf.members for leaf in graph.leaves},
        **{operation.name: operation.members for operation in graph.operations},
    }
    items = list(_differences(expected[first:], found[first:]))
    for i, item in enumerate(items):
        # The remedy is one for all kinds, and stands below the first.
        remedy = f"{item.remedy} {_REMEDY}".strip() if item.kind == items[0].kind else item.remedy
        items[i] = replace(item, members=reaching.get(item.place, ()), remedy=remedy)
    another = ", but it is another" if items else ""
    return Findings(
        claim=f"the autograd graph is claimed to be the recorded one{another}",
        items=tuple(items),
        affected=(Count(len(items), "line", of=len({line.place for line in (*expected, *found)})),),
    )


_REMEDY = (
    "If the change was meant, record the graph anew (pytest --force-regen, or write "
    "str(measure_autograd_graph(...)) to the golden file) and review the golden's diff. If not, "
    "begin with the first line above: later lines often only follow from it."
)
_MEANINGS = {
    "mode": Explanation(
        meaning="One graph is of a call in training mode, and the other of a call at inference.",
        cause="training=True was given for one of them only",
        remedy="Measure in the mode of the recorded graph.",
    ),
    "other members": Explanation(
        meaning="Parameters are used by other members than when the graph was recorded.",
        cause="members that became one network, or a tie that was lost",
        remedy="",
    ),
    "parameter": Explanation(
        meaning="Other tensors are trained, or tensors of another shape, than when the graph was "
        "recorded.",
        cause="a layer that was added, removed, resized, frozen or cut off",
        remedy="",
    ),
    "operation": Explanation(
        meaning="The outputs are computed in another way than when the graph was recorded.",
        cause="",
        remedy="",
    ),
}


# --- the lines of a text ------------------------------------------------------------------------


class _Line(NamedTuple):
    """A line of the text of a graph.

    Attributes:
        place: Its section, and what it is about: a leaf, an operation or a member.
        text: What it says of that.
        header: The header above it.
    """

    place: tuple[str, str]
    text: str
    header: str


_HEADERS = {"leaves": "parameter", "operations": "operation", "outputs": "operation"}
_USED_BY = ", used by "


def _lines(text: str) -> list[_Line]:
    """What a text says, with the other names of a parameter in its line."""
    head, *rest = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [_Line(("title", TITLE), head.removeprefix(TITLE).strip(), "")]
    section, header = "operation", ""
    for line in rest:
        if line.partition(" ")[0] in _HEADERS and not re.search(r"[=(]", line):
            section, header = _HEADERS[line.partition(" ")[0]], line
        elif line.startswith("= "):
            lines[-1] = lines[-1]._replace(text=f"{lines[-1].text}, also named {line[2:]}")
        else:
            name, text = re.fullmatch(r"([^ (]*)(.*)", line).groups()  # type: ignore[union-attr]
            lines.append(_Line((section, name), text.strip(), header))
    return lines


def _differences(expected: Sequence[_Line], found: Sequence[_Line]) -> Iterator[Finding]:
    """A finding for each line that was changed, lost, moved or put in, in the order of the text."""
    before, after = ({line.place: line for line in lines} for lines in (expected, found))
    matcher = SequenceMatcher(None, expected, found, autojunk=False)
    for _, i, j, m, n in matcher.get_opcodes():
        if expected[i:j] == found[m:n]:
            continue
        for line in expected[i:j]:
            yield _difference(line, after.get(line.place))
        for line in found[m:n]:
            if line.place not in before:
                yield _difference(None, line)


def _difference(expected: _Line | None, found: _Line | None) -> Finding:
    line = expected or found
    assert line is not None, "a difference is of a line"
    section, name = line.place
    old, new = (other.text if other else "nothing" for other in (expected, found))
    if expected and found and old == new:  # it stands under another header, or elsewhere
        moved = expected.header != found.header
        old, new = (expected.header, found.header) if moved else (old, f"{new}, in another order")
    kind = section
    if section == "title":
        same_mode = old.partition(":")[0] == new.partition(":")[0]
        kind = "parameter" if same_mode else "mode"
    elif section == "parameter" and old.partition(_USED_BY)[0] == new.partition(_USED_BY)[0]:
        kind = "other members"
    return Finding(kind=kind, place=name, expected=old, found=new, **_MEANINGS[kind])
