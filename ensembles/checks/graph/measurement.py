"""The measurement of `graph`, and its assertions."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensembles.case import Case
from ensembles.checks.graph.canonical import canonical_form
from ensembles.checks.graph.claim import GraphClaim
from ensembles.message import broken, counted
from ensembles.subject import Model, Outputs

__all__ = [
    "AutogradGraph",
    "Leaf",
    "Operation",
    "RecordedGraph",
    "assert_graph_equal",
    "measure",
    "measure_autograd_graph",
]


@dataclass(frozen=True)
class Leaf:
    """A tensor that gradients arrive at.

    Attributes:
        names: All names under which it is registered, with the member's name in front where a
            list or dict of modules was given. What is not registered is called "unregistered".
        shape: Its shape.
        kind: "parameter", "buffer", "batch" or "unregistered".
        members: The members whose outputs it reaches.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    kind: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class Operation:
    """A node of the graph.

    Attributes:
        name: Layer and operation, such as "layer1.0.conv1:Convolution".
        layer: The layer that it is named after.
        operands: Names of operations and leaves; "-" where no gradient flows.
        attributes: What of its arguments is shown, such as ("stride", "2").
        members: The members whose outputs it reaches.
    """

    name: str
    layer: str
    operands: tuple[str, ...]
    attributes: tuple[tuple[str, str], ...]
    members: tuple[str, ...]

    def __str__(self) -> str:
        call = f"{self.name}({', '.join(self._short(operand) for operand in self.operands)})"
        return " ".join([call, *(f"{key}={value}" for key, value in self.attributes)])

    def _short(self, operand: str) -> str:
        """Names without the layer, where it is the same: ":Relu" and ".weight"."""
        here = self.name.rpartition(":")[0] + ":"
        if operand.startswith(here):
            return operand[len(here) - 1 :]
        layer, _, own = operand.rpartition(".")
        return f".{own}" if layer == self.layer else operand


@dataclass(frozen=True)
class AutogradGraph:
    """The autograd graph in canonical form; `str` is the text that goldens hold.

    Attributes:
        training: Whether the model was called in training mode.
        registered: How many different parameters the model has.
        leaves: The tensors that gradients arrive at: parameters in the order of registration.
        operations: From leaves to outputs; what several members share comes first.
        outputs: Every member with the names of what it returns; "-" where that has no graph.
    """

    training: bool
    registered: int
    leaves: tuple[Leaf, ...]
    operations: tuple[Operation, ...]
    outputs: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def members(self) -> tuple[str, ...]:
        """The members' names."""
        return tuple(name for name, _ in self.outputs)

    @property
    def parameters(self) -> dict[str, tuple[str, ...]]:
        """All names of the parameters that an operation reads itself, by the operation's name."""
        names = {leaf.names[0]: leaf.names for leaf in self.leaves if leaf.kind == "parameter"}
        read = {
            operation.name: tuple(n for o in operation.operands for n in names.get(o, ()))
            for operation in self.operations
        }
        return {operation: found for operation, found in read.items() if found}

    def __str__(self) -> str:
        used = sum(leaf.kind == "parameter" for leaf in self.leaves)
        lines = [
            f"{_title(training=self.training)}: {counted(self.members, 'member')}, "
            f"{used} of {self.registered} parameters, {counted(self.operations, 'operation')}",
            "",
            "leaves",
        ]
        for leaf in self.leaves:
            note = {"parameter": "", "batch": ""}.get(leaf.kind, ", not in parameters()")
            reach = "" if len(self.members) == 1 else f", used by {self._called(leaf.members)}"
            lines.append(f"  {leaf.names[0]} {leaf.shape}{note}{reach}")
            lines += [f"    = {name}" for name in leaf.names[1:]]
        group: tuple[str, ...] | None = None
        for operation in self.operations:
            if operation.members != group:
                group = operation.members
                of = "" if len(self.members) == 1 else f" of {self._called(group)}"
                lines += ["", f"operations{of}"]
            lines.append(f"  {operation}")
        lines += ["", "outputs", *(f"  {m} = {', '.join(names)}" for m, names in self.outputs)]
        return "\n".join(lines)

    def _called(self, members: tuple[str, ...]) -> str:
        if members == self.members:
            return "every member"
        return f"member{'s' if len(members) > 1 else ''} {', '.join(members)}"


@dataclass(frozen=True)
class RecordedGraph:
    """A golden: the text of a graph as it was recorded.

    Attributes:
        text: `str` of an `AutogradGraph`.
    """

    text: str

    @property
    def training(self) -> bool:
        """Whether the model was called in training mode."""
        return self.text.lstrip().startswith(_title(training=True))

    @classmethod
    def of(cls, golden: str | Path) -> RecordedGraph:
        """Reads and checks a golden.

        Args:
            golden: The text, or the path of a file that holds it.

        Raises:
            ValueError: If the file is missing, or the text is no recorded graph.

        Example:
            >>> RecordedGraph.of("ReLU")
            Traceback (most recent call last):
            ValueError: the golden is no recorded graph: it starts with 'ReLU', ...
        """
        text, name = golden, "the golden"
        if isinstance(golden, Path):
            if not golden.is_file():
                raise ValueError(
                    f"there is no recorded graph at {golden}. Record it once, from a model that is "
                    "right: pathlib.Path(...).write_text(str(measure_autograd_graph(model, "
                    "batch))), or run a test with autograd_graph.assert_recorded."
                )
            text, name = golden.read_text(encoding="utf-8"), str(golden)
        if not isinstance(text, str) or not text.lstrip().startswith(_TITLE):
            shown = repr(text[:40]) if isinstance(text, str) else type(text).__name__
            raise ValueError(
                f"{name} is no recorded graph: it starts with {shown}, not with {_TITLE!r}. Give "
                "str(measure_autograd_graph(model, batch)) of a model that is right, or the "
                "pathlib.Path of a file that holds it."
            )
        return cls(text)


def measure_autograd_graph(
    model: Model, batch: Any, *, outputs: Outputs | None = None, training: bool = False
) -> AutogradGraph:
    """Calls the model once and writes down its autograd graph in canonical form.

    An operation is called by the layer whose parameter is nearest to it (of several, the one that
    was registered last), its own name, and a number where that occurs more than once; where the
    parameter is used by several members, the members that the operation is of stand in front
    ("*" is all of them). Among operands, the operation's own layer is left out: in
    "bn1:Relu(:BatchNorm)" that is bn1:BatchNorm, and ".weight" is the layer's weight.

    Operands of `+`, `*`, maximum and minimum are put in order: by layer, and within a layer by a
    hash of everything that they are computed from and used for. What follows from the machine is
    left out: implementations of BatchNorm, convolution, attention, dropout and recurrent layers
    have one name, and the call is made without cuDNN, oneDNN and fused attention.

    Values are never shown, so a mask or another constant is seen only as the operand that has no
    gradient. Start and end of a slice along axis 0 are shown for weights only, since axis 0 of
    activations is the batch. A compiled model is one operation. Layers that choose a kernel by
    the memory format of their input (channels_last) may have a graph of their own for each.

    Args:
        model: One module, or the members as a list or dict of modules.
        batch: A tensor, a tuple of positional arguments, or a dict of keyword arguments. Small is
            enough: the graph does not depend on the number of samples.
        outputs: Splits what one module returns into member outputs.
        training: Whether the model is called in training mode.

    Returns:
        The graph. Cost: one forward pass, and time linear in the size of the graph.

    Raises:
        ValueError: If a member's output has no graph, a parameter is lazy, on meta or not finite,
            or the call fails or changes parameters.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU())
        >>> print(measure_autograd_graph(model, torch.randn(2, 3, 8, 8)))
        autograd graph at inference: 1 member, 2 of 2 parameters, 2 operations
        <BLANKLINE>
        leaves
          0.weight (4, 3, 3, 3)
          0.bias (4,)
        <BLANKLINE>
        operations
          0:Convolution(-, .weight, .bias) stride=2
          0:Relu(:Convolution)
        <BLANKLINE>
        outputs
          model = 0:Relu
    """
    form = canonical_form(model, batch, outputs=outputs, training=training)
    return AutogradGraph(
        training=training,
        registered=sum(entry.kind == "parameter" for entry in form.registered),
        leaves=tuple(
            Leaf(leaf.names, tuple(leaf.tensor.shape), leaf.kind, form.members_of(i))
            for i, leaf in form.leaves.items()
        ),
        operations=tuple(
            Operation(
                name=form.names[i],
                layer=form.layer_of(i),
                operands=tuple(form.name_of(edge) for edge in form.operands[i]),
                attributes=form.attributes[i],
                members=form.members_of(i),
            )
            for i in form.operations
        ),
        outputs=tuple(
            (member, tuple(form.name_of(edge) for edge in ends))
            for member, ends in form.ends.items()
        ),
    )


def assert_graph_equal(graph: AutogradGraph, expected_text: str | Path) -> None:
    """Checks that a graph is the recorded one.

    Args:
        graph: From `measure_autograd_graph`.
        expected_text: Its `str`, as it was recorded, or the path of a file that holds it. The
            kind of line ends does not matter.

    Raises:
        ValueError: If the file is missing, or the text is no recorded graph.
        AssertionError: If the graph is another one, with the lines that differ.

    Example:
        >>> recorded = str(measure_autograd_graph(nn.Linear(3, 2), torch.ones(1, 3)))
        >>> assert_graph_equal(measure_autograd_graph(nn.Linear(3, 2), torch.ones(5, 3)), recorded)
    """
    __tracebackhide__ = True
    recorded = RecordedGraph.of(expected_text)
    expected = [line.rstrip() for line in recorded.text.splitlines() if line.strip()]
    found = [line for line in str(graph).splitlines() if line]
    if found == expected:
        return
    # The first line counts operations, and so differs whenever anything does.
    same_mode = recorded.training == graph.training
    skipped = 1 if same_mode and found[1:] != expected[1:] else 0
    changes = list(_changes(expected[skipped:], found[skipped:]))
    gone, new = (sum(sign == one for one, _ in changes) for sign in "-+")
    users = any(" used by " in line for _, line in changes)
    raise AssertionError(
        broken(
            "the autograd graph is claimed to be the recorded one, and is another",
            [(f"{sign} {line.strip()}",) for sign, line in changes],
            total=f"- recorded: {gone} of {len(expected)} lines; + found: {new} of {len(found)}",
            meaning="One graph is in training mode and the other at inference."
            if not same_mode
            else "Parameters are used by other members than when the graph was recorded."
            if users
            else "The outputs are computed in another way than when the graph was recorded.",
            remedy="If that was meant, record the graph anew (pytest --force-regen, or write "
            "str(measure_autograd_graph(...)) to the golden file) and review the golden's diff. "
            "If not, begin with the first line above: later lines often only follow from it.",
        )
    )


_TITLE = "autograd graph"


def _title(*, training: bool) -> str:
    return f"{_TITLE} {'in training' if training else 'at inference'}"


def _changes(expected: Sequence[str], found: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Lines that were recorded ("-") or found ("+") only; what has one name stands together."""
    before, after = _entries(expected), _entries(found)
    for _, i, j, m, n in difflib.SequenceMatcher(None, before, after).get_opcodes():
        gone, new = before[i:j], after[m:n]
        if gone == new:
            continue
        for entry in gone:
            partner = next((other for other in new if _named(other) == _named(entry)), ())
            if partner:
                new.remove(partner)
            yield from (("-", line) for line in entry if line not in partner)
            yield from (("+", line) for line in partner if line not in entry)
        yield from (("+", line) for entry in new for line in entry)


def _entries(lines: Sequence[str]) -> list[tuple[str, ...]]:
    """Every line with the other names that follow a parameter."""
    entries: list[tuple[str, ...]] = []
    for line in lines:
        if entries and line.startswith("    = "):
            entries[-1] += (line,)
        else:
            entries.append((line,))
    return entries


def _named(entry: tuple[str, ...]) -> str:
    return re.split(r"[ (]", entry[0].strip(), maxsplit=1)[0]


def measure(case: Case, claim: GraphClaim) -> AutogradGraph:
    """What `graph` looks at, for this claim."""
    __tracebackhide__ = True
    return measure_autograd_graph(
        case.model, case.batch, outputs=case.subject.outputs, training=claim.training
    )
