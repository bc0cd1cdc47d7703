"""Promise: the autograd graph of the model is the recorded one.

Catches a change of what is computed that no test of shapes sees: a layer that is skipped, a ReLU
that was lost, streams that run through one network, a subnet that does not read its parent's
weight, a branch that was detached.

The graph is compared as a text, which is the same in every process and on every machine. One line
is one operation; it is named after the layer whose parameter is nearest, and not by a running
number, so that the diff of two graphs shows what was changed and little else.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from ensembles.message import broken, counted
from ensembles.probes.state import parameters_kept, preserved
from ensembles.subject import (
    Model,
    Outputs,
    checked_numbers,
    is_one_module,
    member_outputs,
    named_modules_of,
)

__all__ = [
    "AutogradGraph",
    "Leaf",
    "Operation",
    "RecordedGraph",
    "assert_graph_equal",
    "draw_autograd_graph",
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
    with _called(model, batch, outputs, training) as results:
        return _Canonical(model, batch, results).graph(training)


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


def draw_autograd_graph(
    model: Model,
    batch: Any,
    path: str | os.PathLike[str],
    *,
    outputs: Outputs | None = None,
    training: bool = False,
    overwrite: bool = False,
) -> tuple[Path, Path]:
    """Draws the graph that `measure_autograd_graph` writes down, as PDF and as SVG.

    Drawn by torchviz: parameters are blue and have all of their names, outputs are green, and
    operations have the names of the canonical text. The same graph gives the same files.

    Args:
        model: One module, or the members as a list or dict of modules.
        batch: What the model is called with.
        path: Where to write: path.pdf and path.svg. A suffix .pdf or .svg is left out.
        outputs: Splits what one module returns into member outputs.
        training: Whether the model is called in training mode.
        overwrite: Whether files that exist are replaced.

    Returns:
        The paths of the PDF and of the SVG.

    Raises:
        ImportError: If torchviz is not installed.
        RuntimeError: If Graphviz's program `dot` is not installed, or fails.
        FileExistsError: If one of the files exists, and `overwrite` is not set.
        ValueError: As `measure_autograd_graph` does.

    Example::

        draw_autograd_graph(resnet18(), torch.randn(1, 3, 32, 32), "drawings/resnet18")
    """
    make_dot = _torchviz()
    program = shutil.which("dot")
    if program is None:
        raise RuntimeError(
            "drawing needs Graphviz's program `dot`, which is not on the PATH. Get it with: "
            "apt-get install graphviz (Debian, Ubuntu), brew install graphviz (macOS)."
        )
    stem = Path(path)
    stem = stem.with_suffix("") if stem.suffix in (".pdf", ".svg") else stem
    files = (stem.with_name(f"{stem.name}.pdf"), stem.with_name(f"{stem.name}.svg"))
    for file in files:
        if file.exists() and not overwrite:
            raise FileExistsError(f"{file} exists: give another path, or overwrite=True.")
    with _called(model, batch, outputs, training) as results:
        source = _Canonical(model, batch, results).drawn(make_dot)
    # Both are drawn before one is written: a failure leaves no half of a pair.
    drawings = [_rendered(program, source, file.suffix[1:]) for file in files]
    stem.parent.mkdir(parents=True, exist_ok=True)
    for file, drawing in zip(files, drawings, strict=True):
        file.write_bytes(drawing)
    return files


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


# --- the call ------------------------------------------------------------------------------------


@contextmanager
def _called(
    model: Model, batch: Any, outputs: Outputs | None, training: bool
) -> Iterator[dict[str, tuple[Tensor, ...]]]:
    """The member outputs with their graph; afterwards the model is as before."""
    checked_numbers(model)
    with preserved(model):
        for module in named_modules_of(model).values():
            module.train(training)
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            _plain_kernels(),
            parameters_kept(model),
        ):
            results = member_outputs(model, batch, outputs=outputs)
        for member, tensors in results.items():
            if not any(tensor.requires_grad for tensor in tensors):
                raise ValueError(
                    f"the output of member {member} has no autograd graph. Usual causes: "
                    "torch.no_grad or .detach() inside forward, or every parameter frozen "
                    "(requires_grad=False)."
                )
        yield results


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Turns off what one machine fuses into one operation and another computes in several."""
    backends: list[Any] = [torch.backends.cudnn, torch.backends.mkldnn]
    before = [backend.enabled for backend in backends]
    for backend in backends:
        backend.enabled = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for backend, enabled in zip(backends, before, strict=True):
            backend.enabled = enabled


# --- from nodes to names ------------------------------------------------------------------------

_COMMUTATIVE = frozenset({"Add", "Mul", "Maximum", "Minimum"})

# One name for implementations among which the device, the build or the version decides.
_SYNONYMS = (
    (r"(Native|Cudnn|Miopen|Mkldnn|Mps)?_?BatchNorm(Legit\w*|WithUpdate\w*)?", "BatchNorm"),
    (r"(Cudnn|Miopen|Mps)ConvolutionTranspose", "ConvolutionTranspose"),
    (r"(Cudnn|Miopen|Mkldnn|Mps|SlowNd)?Convolution(Overrideable)?", "Convolution"),
    (r"(MiopenDepthwiseConvolution|ThnnConv2D|SlowConv\w*|ConvDepthwise\w*)", "Convolution"),
    (r"(Mkldnn)?MaxPool(\dD)(WithIndices)?", r"MaxPool\2"),
    (r"Native(LayerNorm|GroupNorm)", r"\1"),
    (r"(Fused|Native)Dropout", "Mul"),  # on a CPU, dropout multiplies by a mask
    (r"(View|UnsafeView|ReshapeAlias)", "View"),  # which of them depends on strides
)
_SYNONYM = tuple((re.compile(pattern), name) for pattern, name in _SYNONYMS)

_WINDOW = ("stride", "padding", "dilation", "groups", "output_padding")
_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")

# What is shown where a node has it. Only integers that torch has saved under the same name since
# 2.6, and that do not depend on the number of samples.
_SHOWN: Mapping[str, tuple[str, ...]] = {
    "Add": ("alpha",),
    "Sub": ("alpha",),
    "AvgPool2D": _POOL,
    "BatchNorm": ("training",),
    "Cat": ("dim",),
    "ConstantPadNd": ("pad",),
    "Convolution": _WINDOW,
    "ConvolutionTranspose": _WINDOW,
    "LogSoftmax": ("dim",),
    "MaxPool2D": _POOL,
    "Mean": ("dim",),
    "Permute": ("dims",),
    "Roll": ("dims", "shifts"),
    "Select": ("dim", "index"),
    "Slice": ("dim", "start", "end", "step"),
    "Softmax": ("dim",),
    "Split": ("dim", "split_size"),
    "Stack": ("dim",),
    "Sum": ("dim",),
    "Transpose": ("dim0", "dim1"),
    "Unbind": ("dim",),
}
_USUAL = {
    "alpha": 1,
    "ceil_mode": False,
    "dilation": 1,
    "groups": 1,
    "output_padding": 0,
    "padding": 0,
    "step": 1,
    "stride": 1,
    "training": False,
}
_WEIGHT_VIEWS = frozenset({"Permute", "Select", "Slice", "T", "Transpose", "Unsqueeze", "View"})


def _operation(fn: Any) -> str:
    """The operation that a node is the backward of, without what a build or a version adds."""
    bare = re.sub(r"Backwards?\d*$", "", fn.name().rpartition("::")[2])
    for pattern, name in _SYNONYM:
        if pattern.fullmatch(bare):
            bare = pattern.sub(name, bare)
            break
    if bare == "Convolution" and getattr(fn, "_saved_transposed", False):
        return "ConvolutionTranspose"
    return bare


def _signed(number: int) -> int:
    """Torch hands out saved negative numbers as unsigned ones."""
    return number - 2**64 if number >= 2**63 else number


def _attributes(fn: Any, operation: str, *, of_weight: bool) -> tuple[tuple[str, str], ...]:
    sizes = getattr(fn, "_saved_self_sym_sizes", None)
    saved: dict[str, bool | int | tuple[int, ...]] = {}
    for key in _SHOWN.get(operation, ()):
        value = getattr(fn, f"_saved_{key}", None)
        if isinstance(value, bool):
            saved[key] = value
        elif isinstance(value, int):
            saved[key] = _signed(value)
        elif isinstance(value, (tuple, list)) and all(type(entry) is int for entry in value):
            saved[key] = tuple(_signed(entry) for entry in value)
    if sizes is not None:
        _counted_from_the_front(saved, tuple(sizes), of_weight=of_weight)
    if saved.get("dim") == 0 and not of_weight:
        for key in ("start", "end", "split_size"):
            saved.pop(key, None)
    shown = []
    for key, value in saved.items():
        if isinstance(value, tuple) and key in (*_WINDOW, *_POOL) and len(set(value)) == 1:
            value = value[0]
        if value == () or (key in _USUAL and value == _USUAL[key]):
            continue
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        shown.append((key, text))
    return tuple(shown)


def _counted_from_the_front(
    saved: dict[str, Any], sizes: tuple[int, ...], *, of_weight: bool
) -> None:
    """Writes negative axes and indices as positive ones, so that both spellings are one text."""
    for key in ("dim", "dims"):
        if isinstance(value := saved.get(key), tuple):
            saved[key] = tuple(axis % len(sizes) for axis in value)
        elif isinstance(value, int):
            saved[key] = value % len(sizes)
    axis = saved.get("dim")
    if not isinstance(axis, int) or (axis == 0 and not of_weight):
        return  # the size is that of the batch
    for key in ("start", "end", "index"):
        if isinstance(value := saved.get(key), int):
            saved[key] = min(value + sizes[axis] if value < 0 else value, sizes[axis])


# --- canonical form -----------------------------------------------------------------------------


class _Edge(NamedTuple):
    """Output number `output` of node `node`."""

    node: int
    output: int


class _Layer(NamedTuple):
    """Which leaf is nearest; the least is the one that a node is named after."""

    distance: int
    last_registered_first: int
    name: str
    members: int


class _Canonical:
    """The nodes of a graph in an order, and with names, that follow from its structure alone.

    A node is known by its index in `self.fns`, where operands precede what uses them. Sets of
    members are bit masks. Every step is a loop over nodes: graphs may be deep.
    """

    def __init__(self, model: Model, batch: Any, results: Mapping[str, tuple[Tensor, ...]]) -> None:
        self.members = tuple(results)
        self.tensors = results
        self.parameters = _registered(model)
        self.places = {id(t): (names, kind) for t, names, kind in self.parameters}
        for names, tensor in _batch_tensors(batch):
            self.places.setdefault(id(tensor), ((names,), "batch"))
        self.ranks = {id(t): rank for rank, (t, _, _) in enumerate(self.parameters)}

        ends = {
            member: [
                _past_whole_slices(*torch.autograd.graph.get_gradient_edge(tensor)[:2])
                if tensor.requires_grad
                else None
                for tensor in tensors
            ]
            for member, tensors in results.items()
        }
        self.fns = _operands_first([end[0] for found in ends.values() for end in found if end])
        index = {fn: i for i, fn in enumerate(self.fns)}
        self.ends = {
            member: [_Edge(index[end[0]], end[1]) if end else None for end in found]
            for member, found in ends.items()
        }
        # AccumulateGrad, and not whatever has an attribute `variable`: users name theirs so too.
        self.leaves = {
            i: fn.variable for i, fn in enumerate(self.fns) if fn.name().endswith("AccumulateGrad")
        }
        self.operands: list[list[_Edge | None]] = [
            [_Edge(index[used], nr) if used is not None else None for used, nr in _edges(fn)]
            for fn in self.fns
        ]
        self._label()
        self._reach()
        self._own()
        self._look_near()
        self._color()
        self._sort_operands()
        self._name()

    def graph(self, training: bool) -> AutogradGraph:
        """What is shown of it."""
        known = [
            (self.ranks.get(id(leaf), len(self.ranks)), place, i)
            for place, i in enumerate(self.order)
            if (leaf := self.leaves.get(i)) is not None
        ]
        # What more members share comes first, so that operands still precede what uses them.
        operations = sorted(
            (i for i in self.order if i not in self.leaves),
            key=lambda i: (-self.reach[i].bit_count(), self.first[self.reach[i]]),
        )
        return AutogradGraph(
            training=training,
            registered=sum(kind == "parameter" for _, _, kind in self.parameters),
            leaves=tuple(
                Leaf(
                    names=names if kind != "unregistered" else (self.names[i],),
                    shape=tuple(self.leaves[i].shape),
                    kind=kind,
                    members=self._members(self.reach[i]),
                )
                for _, _, i in sorted(known)
                for names, kind in [self._place(i)]
            ),
            operations=tuple(
                Operation(
                    name=self.names[i],
                    layer=self.layers[i].name,
                    operands=tuple(self._called(edge) for edge in self.operands[i]),
                    attributes=self.attributes[i],
                    members=self._members(self.reach[i]),
                )
                for i in operations
            ),
            outputs=tuple(
                (member, tuple(self._called(edge) for edge in ends))
                for member, ends in self.ends.items()
            ),
        )

    def drawn(self, make_dot: Callable[..., Any]) -> str:
        """Torchviz's drawing as DOT, with canonical names in place of addresses."""
        ids: dict[str, str] = {}
        labels: dict[str, str] = {}
        for i, fn in enumerate(self.fns):
            leaf = self.leaves.get(i)
            if leaf is None:
                ids[str(id(fn))] = self.names[i]
                shown = " ".join(f"{key}={value}" for key, value in self.attributes[i])
                labels[str(id(fn))] = "\n".join(filter(None, [self.names[i], shown]))
            else:
                ids[str(id(fn))] = f"gradient of {self.names[i]}"
                ids[str(id(leaf))] = self.names[i]
        ends = [
            (tensor, f"output {member}" + (f" [{number}]" if number else ""))
            for member, tensors in self.tensors.items()
            for number, tensor in enumerate(tensors)
            if tensor.requires_grad
        ]
        for tensor, name in ends:
            ids.setdefault(str(id(tensor)), name)
        named = {name: tensor for tensor, name in ends}
        named |= {"\n".join(names): tensor for tensor, names, _ in self.parameters}
        limit = sys.getrecursionlimit()
        # Torchviz follows the graph by recursion.
        sys.setrecursionlimit(max(limit, 4 * len(self.fns) + 1000))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # it compares versions so
                dot = make_dot(tuple(dict.fromkeys(t for t, _ in ends)), params=named)
        finally:
            sys.setrecursionlimit(limit)
        dot.body[:] = [_with_names(line, ids, labels) for line in dot.body]
        return str(dot.source)

    # Every step below fills one attribute, and uses those of the steps before it.

    def _label(self) -> None:
        """What a node computes, regardless of where it stands."""
        self.operations: list[str] = []
        self.attributes: list[tuple[tuple[str, str], ...]] = []
        weights: set[int] = set()
        for i, fn in enumerate(self.fns):
            if i in self.leaves:
                self.operations.append("")
                self.attributes.append(())
                if self._place(i)[1] != "batch":
                    weights.add(i)
                continue
            operation = _operation(fn)
            operands = self.operands[i]
            of_weight = all(edge is not None and edge.node in weights for edge in operands)
            if of_weight and operation in _WEIGHT_VIEWS:
                weights.add(i)
            self.operations.append(operation)
            self.attributes.append(_attributes(fn, operation, of_weight=of_weight))
            # How many operands without gradient there are at the end depends on the kernel.
            while operands and operands[-1] is None:
                operands.pop()

    def _reach(self) -> None:
        """The members whose outputs a node reaches."""
        self.reach = [0] * len(self.fns)
        for bit, ends in enumerate(self.ends.values()):
            for end in filter(None, ends):
                self.reach[end.node] |= 1 << bit
        for i in reversed(range(len(self.fns))):
            for edge in filter(None, self.operands[i]):
                self.reach[edge.node] |= self.reach[i]

    def _own(self) -> None:
        """The layer that a node is named after: that of the nearest leaf."""
        self.layers: list[_Layer] = []
        for i in range(len(self.fns)):
            if i in self.leaves:
                (name, *_), kind = self._place(i)
                # Last is the batch: it may be near, and is no layer.
                rank = self.ranks.get(id(self.leaves[i]), -2 if kind == "batch" else -1)
                self.layers.append(_Layer(0, -rank, name.rpartition(".")[0] or name, self.reach[i]))
                continue
            near = min((self.layers[e.node] for e in filter(None, self.operands[i])), default=None)
            if near is None:
                near = _Layer(len(self.fns), 0, "model", self.reach[i])
            self.layers.append(near._replace(distance=near.distance + 1))

    def _look_near(self) -> None:
        """A hash of what a node is computed from within its layer."""
        self.near: list[str] = []
        for i, operands in enumerate(self.operands):
            seen = []
            for edge in operands:
                if edge is None:
                    seen.append("-")
                    continue
                other = self.layers[edge.node].name
                what = f"{other}:{self.operations[edge.node]}"
                if other == self.layers[i].name and edge.node not in self.leaves:
                    what = self.near[edge.node]
                elif edge.node in self.leaves:
                    what = self._place(edge.node)[0][0]
                seen.append(f"{what}[{edge.output}]")
            self.near.append(
                _digest(
                    self.operations[i],
                    str(self.attributes[i]),
                    *(sorted(seen) if self._commutes(i) else seen),
                )
            )

    def _color(self) -> None:
        """A hash of all that a node is computed from and used for.

        Two rounds up and down the graph tell nodes apart that differ only in what the operands of
        their users are used for. What is still equal then is put in the order of the program.
        """
        users: list[list[tuple[int, str]]] = [[] for _ in self.fns]
        for i, operands in enumerate(self.operands):
            for place, edge in enumerate(operands):
                if edge is not None:
                    at = "" if self._commutes(i) else str(place)
                    users[edge.node].append((i, f"{at}[{edge.output}]"))
        ends: dict[int, str] = defaultdict(str)
        for bit, found in enumerate(self.ends.values()):
            for number, end in enumerate(found):
                if end is not None:
                    ends[end.node] += f"{bit}.{number}[{end.output}] "
        colors = [
            _digest(
                self.operations[i],
                str(self.attributes[i]),
                str(self._place(i)[0]) + str(tuple(self.leaves[i].shape))
                if i in self.leaves
                else "",
                ends[i],
            )
            for i in range(len(self.fns))
        ]
        for _ in range(2):
            for i, operands in enumerate(self.operands):
                below = [f"{colors[e.node]}[{e.output}]" if e else "-" for e in operands]
                colors[i] = _digest(colors[i], *(sorted(below) if self._commutes(i) else below))
            for i in reversed(range(len(self.fns))):
                above = sorted(f"{colors[user]}@{at}" for user, at in users[i])
                colors[i] = _digest(colors[i], *above)
        self.colors = colors

    def _sort_operands(self) -> None:
        for i, operands in enumerate(self.operands):
            if self._commutes(i):
                operands.sort(key=self._operand_key)
                while operands and operands[-1] is None:
                    operands.pop()

    def _operand_key(self, edge: _Edge | None) -> tuple[Any, ...]:
        """What is near first: the order of operands does not change when what is far does."""
        if edge is None:
            return (1,)
        i = edge.node
        layer = self.layers[i]
        return (
            0,
            -layer.last_registered_first,
            layer.distance,
            self.operations[i],
            self.near[i],
            edge.output,
            self.colors[i],
            self.fns[i]._sequence_nr(),
        )

    def _name(self) -> None:
        """The order of the lines, and the names."""
        roots = [end.node for ends in self.ends.values() for end in ends if end]
        self.order = _postorder(
            roots, lambda i: [edge.node for edge in self.operands[i] if edge is not None]
        )
        self.first: dict[int, int] = {}
        self.names = [""] * len(self.fns)
        seen: Counter[str] = Counter()
        for place, i in enumerate(self.order):
            self.first.setdefault(self.reach[i], place)
            layer = self.layers[i]
            if i in self.leaves:
                name = self._place(i)[0][0]
            else:
                name = f"{layer.name}:{self.operations[i]}"
                if layer.members.bit_count() > 1:
                    everyone = self.reach[i].bit_count() == len(self.members)
                    mine = "*" if everyone else "+".join(self._members(self.reach[i]))
                    name = f"{mine}/{name}"
            seen[name] += 1
            # A dot would make the number of a leaf look like a parameter's own name.
            mark = "-" if i in self.leaves else "."
            self.names[i] = name if seen[name] == 1 else f"{name}{mark}{seen[name]}"

    def _commutes(self, i: int) -> bool:
        # With alpha, a + alpha * b is computed.
        return self.operations[i] in _COMMUTATIVE and not self.attributes[i]

    def _place(self, i: int) -> tuple[tuple[str, ...], str]:
        return self.places.get(id(self.leaves[i]), (("unregistered",), "unregistered"))

    def _members(self, mask: int) -> tuple[str, ...]:
        return tuple(name for bit, name in enumerate(self.members) if mask >> bit & 1)

    def _called(self, edge: _Edge | None) -> str:
        if edge is None:
            return "-"
        return self.names[edge.node] + (f"[{edge.output}]" if edge.output else "")


def _registered(model: Model) -> list[tuple[Tensor, tuple[str, ...], str]]:
    """Every parameter and buffer once, with all of its names, in the order of registration."""
    found: dict[int, tuple[Tensor, list[str], str]] = {}
    for member, module in named_modules_of(model).items():
        prefix = "" if is_one_module(model) else f"{member}."
        for kind, named in (
            ("parameter", module.named_parameters(remove_duplicate=False)),
            ("buffer", module.named_buffers(remove_duplicate=False)),
        ):
            for name, tensor in named:
                names = found.setdefault(id(tensor), (tensor, [], kind))[1]
                names.append(prefix + name)
    return [(tensor, tuple(dict.fromkeys(names)), kind) for tensor, names, kind in found.values()]


def _batch_tensors(batch: Any) -> Iterator[tuple[str, Tensor]]:
    for path, value in pytree.tree_flatten_with_path(batch)[0]:
        if isinstance(value, Tensor):
            yield f"batch{pytree.keystr(path)}", value


def _operands_first(roots: Iterable[Any]) -> list[Any]:
    return _postorder(roots, lambda fn: [used for used, _ in _edges(fn) if used is not None])


def _edges(fn: Any) -> list[tuple[Any, int]]:
    return [_past_whole_slices(used, nr) for used, nr in fn.next_functions]


def _past_whole_slices(fn: Any, nr: int) -> tuple[Any, int]:
    """Leaves out the ":" of x[:, 2:], which is a node in some versions of torch."""
    while fn is not None and fn.name().startswith("SliceBackward"):
        if (fn._saved_start, fn._saved_end, fn._saved_step) != (0, 2**63 - 1, 1):
            break
        fn, nr = fn.next_functions[0]
    return fn, nr


def _postorder(roots: Iterable[Any], operands: Callable[[Any], Sequence[Any]]) -> list[Any]:
    """Nodes with operands before what uses them, in the order in which operands are listed."""
    order: list[Any] = []
    seen: set[Any] = set()
    for root in roots:
        if root in seen:
            continue
        seen.add(root)
        stack = [(root, iter(operands(root)))]
        while stack:
            node, rest = stack[-1]
            for operand in rest:
                if operand not in seen:
                    seen.add(operand)
                    stack.append((operand, iter(operands(operand))))
                    break
            else:
                stack.pop()
                order.append(node)
    return order


def _digest(*parts: str) -> str:
    # repr tells ("a", "b") from ("ab",); Python's own hash differs from process to process.
    return blake2b(repr(parts).encode(), digest_size=16).hexdigest()


# --- drawing ------------------------------------------------------------------------------------


def _torchviz() -> Callable[..., Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it imports distutils
            from torchviz import make_dot
    except ImportError as error:
        hint = "" if error.name != "distutils" else " setuptools"
        raise ImportError(
            f"drawing needs torchviz, which cannot be imported ({error}). "
            f'Get it with: pip install "pytest-ensembles[drawings]"{hint}'
        ) from error
    return make_dot  # type: ignore[no-any-return]


def _with_names(line: str, ids: dict[str, str], labels: dict[str, str]) -> str:
    """A statement of DOT with names in place of addresses, and with labels for operations.

    Addresses that are not known belong to what the canonical graph has not: tensors that a custom
    function has saved, bases of views, and slices that are left out. They are numbered as they
    occur.
    """
    head, bracket, rest = line.partition(" [")

    def named(match: re.Match[str]) -> str:
        address = match.group()
        if address not in ids:
            ids[address] = f"other {sum(n.startswith('other ') for n in ids.values()) + 1}"
        return _quoted(ids[address])

    if head.strip() in labels:
        rest = f"label={_quoted(labels[head.strip()])}]\n"
    return re.sub(r"\b\d+\b", named, head) + bracket + rest


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _rendered(program: str, source: str, form: str) -> bytes:
    # The same graph gives the same file: newer cairo takes the time in a PDF from this variable,
    # and where an older one has written it, it is replaced below by one of the same length.
    fixed_time = {"SOURCE_DATE_EPOCH": os.environ.get("SOURCE_DATE_EPOCH", "0")}
    done = subprocess.run(
        [program, f"-T{form}"],
        input=source.encode(),
        capture_output=True,
        env=os.environ | fixed_time,
        check=False,
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise RuntimeError(f"{program} -T{form} failed: {said}")
    if form == "pdf":
        return re.sub(rb"(?<=/CreationDate \(D:)\d{14}", b"19700101000000", done.stdout)
    # Graphviz repeats every title as a comment.
    return re.sub(rb"<!--.*?-->\n?", b"", done.stdout)
