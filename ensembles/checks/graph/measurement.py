"""The autograd graph in canonical form, and its text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Unpack

from ensembles.case import Case, Given
from ensembles.checks.graph.canonical import canonical_form
from ensembles.checks.graph.claim import GraphClaim, title
from ensembles.message import counted
from ensembles.subject import Recipe

__all__ = ["AutogradGraph", "Leaf", "Operation", "measure", "measure_autograd_graph"]


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
            f"{title(training=self.training)}: {counted(self.members, 'member')}, "
            f"{used} of {self.registered} parameters, {counted(self.operations, 'operation')}",
            "",
            "leaves",
        ]
        for leaf in self.leaves:
            note = {"parameter": "", "batch": ""}.get(leaf.kind, ", not in parameters()")
            reach = "" if len(self.members) == 1 else f", used by {self._told(leaf.members)}"
            lines.append(f"  {leaf.names[0]} {leaf.shape}{note}{reach}")
            lines += [f"    = {name}" for name in leaf.names[1:]]
        group: tuple[str, ...] | None = None
        for operation in self.operations:
            if operation.members != group:
                group = operation.members
                of = "" if len(self.members) == 1 else f" of {self._told(group)}"
                lines += ["", f"operations{of}"]
            lines.append(f"  {operation}")
        lines += ["", "outputs", *(f"  {m} = {', '.join(names)}" for m, names in self.outputs)]
        return "\n".join(lines)

    def _told(self, members: tuple[str, ...]) -> str:
        if members == self.members:
            return "every member"
        return f"member{'s' if len(members) > 1 else ''} {', '.join(members)}"


def measure_autograd_graph(
    model: Given, batch: Any = None, *, training: bool = False, **recipe: Unpack[Recipe]
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
        training: Whether the model is called in training mode.
        **recipe: `outputs` splits what one module returns into member outputs.

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
    return measure(Case.of(model, batch, **recipe), GraphClaim(training=training))


def measure(case: Case, claim: GraphClaim | None = None) -> AutogradGraph:
    """The graph of a case, in the mode that the recorded graph was recorded in."""
    __tracebackhide__ = True
    training = claim is not None and claim.training
    form = canonical_form(case, training=training)
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
