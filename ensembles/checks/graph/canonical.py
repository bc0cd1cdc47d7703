"""An autograd graph in canonical form: an order, and names, that follow from its structure alone.

Two programs that compute the same in the same way have one form: in whatever order the operands
of a sum are written, in every process, on every machine, for every batch size.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ensembles.case import Case
from ensembles.handling.registered_tensors import registered
from ensembles.handling.training import fresh
from ensembles.instruments.autograd import (
    Edge,
    Nodes,
    attributes_of,
    nodes_of,
    operation_of,
    outputs_with_graph,
    postorder,
)

__all__ = ["CanonicalForm", "NamedLeaf", "canonical_form"]

_COMMUTATIVE = frozenset({"Add", "Mul", "Maximum", "Minimum"})
_WEIGHT_VIEWS = frozenset({"Permute", "Select", "Slice", "T", "Transpose", "Unsqueeze", "View"})


def canonical_form(case: Case, *, training: bool = False) -> CanonicalForm:
    """Calls the model once and puts the graph of its outputs in canonical form.

    Args:
        case: What is called.
        training: Whether the model is called in training mode.

    Raises:
        ValueError: As `outputs_with_graph`.

    Example:
        >>> case = Case.of(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), torch.ones(1, 3))
        >>> form = canonical_form(case)
        >>> [form.names[i] for i in form.operations]
        ['0:T', '0:Addmm', '0:Relu']
    """
    with torch.inference_mode(False):
        batch = fresh(case.batch)
    with outputs_with_graph(case, batch, training=training) as outputs:
        return CanonicalForm(case, batch, outputs)


class NamedLeaf(NamedTuple):
    """What a leaf is to the model.

    Attributes:
        tensor: The leaf.
        names: All names under which it is registered, or where it stands in the batch.
        kind: "parameter", "buffer", "batch" or "unregistered".
        rank: When it was registered; negative for what is not.
    """

    tensor: Tensor
    names: tuple[str, ...]
    kind: str
    rank: int


class _NearestLeaf(NamedTuple):
    """The leaf that a node is named after: the least of those that it is computed from."""

    distance: int
    last_registered_first: int
    layer: str
    members: int


class CanonicalForm:
    """The nodes of a graph with what they compute, in an order and with names.

    A node is known by its index, in lists where operands precede what uses them; sets of members
    are bit masks. Every step is a loop over nodes, since graphs may be deep.

    Attributes:
        tensors: Member name to its output tensors.
        registered: The model's parameters and buffers.
        functions: Torch's nodes.
        leaves: The nodes that gradients arrive at; what is registered first, in that order.
        operands: What each node reads; None where no gradient flows. Those of commutative
            operations are in order.
        ends: Every member with the edges to what it returns; None where that has no graph.
        attributes: What of each node's arguments is shown.
        names: How each node is called.
        operations: All other nodes: what more members share comes first, so that operands still
            precede what uses them.
    """

    def __init__(self, case: Case, batch: Any, outputs: Mapping[str, tuple[Tensor, ...]]) -> None:
        nodes = nodes_of(outputs)
        self.tensors = outputs
        self.members = tuple(outputs)
        self.registered = registered(case.model)
        self.functions, self.operands, self.ends = nodes.functions, nodes.operands, nodes.ends
        self.leaves = self._named_leaves(nodes, batch)
        # Every step fills lists, and uses those of the steps before it.
        self._find_operations()
        self._find_members()
        self._find_layers()
        self._hash_within_layers()
        self._hash_surroundings()
        self._sort_operands()
        self._name()

    def layer_of(self, node: int) -> str:
        """The layer that a node is named after."""
        return self._nearest[node].layer

    def members_of(self, node: int) -> tuple[str, ...]:
        """The members whose outputs a node reaches."""
        return tuple(m for bit, m in enumerate(self.members) if self._member_bits[node] >> bit & 1)

    def name_of(self, edge: Edge | None) -> str:
        """The name of an operand or output; "-" where there is no graph."""
        if edge is None:
            return "-"
        return self.names[edge.node] + (f"[{edge.output}]" if edge.output else "")

    def _named_leaves(self, nodes: Nodes, batch: Any) -> dict[int, NamedLeaf]:
        known: dict[int, tuple[tuple[str, ...], str, int]] = {
            id(tensor): (names, kind, rank)
            for rank, (tensor, names, kind) in enumerate(self.registered)
        }
        # The batch is last of all: it may be near to an operation, and is no layer.
        for path, value in pytree.tree_flatten_with_path(batch)[0]:
            known.setdefault(id(value), ((f"batch{pytree.keystr(path)}",), "batch", -2))
        unregistered = (("unregistered",), "unregistered", -1)
        return {
            i: NamedLeaf(leaf, *known.get(id(leaf), unregistered))
            for i, leaf in nodes.leaves.items()
        }

    def _find_operations(self) -> None:
        """What a node computes, regardless of where it stands."""
        self._operations: list[str] = []
        self.attributes: list[tuple[tuple[str, str], ...]] = []
        weights = {i for i, leaf in self.leaves.items() if leaf.kind != "batch"}
        for i, function in enumerate(self.functions):
            if i in self.leaves:
                self._operations.append("")
                self.attributes.append(())
                continue
            operation, operands = operation_of(function), self.operands[i]
            of_weight = all(edge is not None and edge.node in weights for edge in operands)
            if of_weight and operation in _WEIGHT_VIEWS:
                weights.add(i)
            self._operations.append(operation)
            self.attributes.append(attributes_of(function, of_weight=of_weight))
            if self._commutes(i):  # a constant may stand on either side
                operands[:] = [edge for edge in operands if edge is not None]
            # How many operands without gradient there are at the end depends on the kernel.
            while operands and operands[-1] is None:
                operands.pop()

    def _find_members(self) -> None:
        """The members whose outputs a node reaches."""
        self._member_bits = [0] * len(self.functions)
        for bit, ends in enumerate(self.ends.values()):
            for end in filter(None, ends):
                self._member_bits[end.node] |= 1 << bit
        for i in reversed(range(len(self.functions))):
            for edge in filter(None, self.operands[i]):
                self._member_bits[edge.node] |= self._member_bits[i]

    def _find_layers(self) -> None:
        """The layer that a node is named after: that of the nearest leaf."""
        self._nearest: list[_NearestLeaf] = []
        for i, operands in enumerate(self.operands):
            if leaf := self.leaves.get(i):
                name = leaf.names[0]
                layer = name.rpartition(".")[0] or name
                self._nearest.append(_NearestLeaf(0, -leaf.rank, layer, self._member_bits[i]))
                continue
            near = min(
                (self._nearest[edge.node] for edge in filter(None, operands)),
                default=_NearestLeaf(len(self.functions), 0, "model", self._member_bits[i]),
            )
            self._nearest.append(near._replace(distance=near.distance + 1))

    def _hash_within_layers(self) -> None:
        """A hash of what a node is computed from within its layer."""
        self._local: list[str] = []

        def seen(edge: Edge | None, layer: str) -> str:
            if edge is None:
                return "-"
            other = self.layer_of(edge.node)
            if edge.node in self.leaves:
                what = self.leaves[edge.node].names[0]
            elif other == layer:
                what = self._local[edge.node]
            else:
                what = f"{other}:{self._operations[edge.node]}"
            return f"{what}[{edge.output}]"

        for i, operands in enumerate(self.operands):
            found = self._ordered(i, [seen(edge, self.layer_of(i)) for edge in operands])
            self._local.append(_digest(self._operations[i], str(self.attributes[i]), *found))

    def _hash_surroundings(self) -> None:
        """A hash of all that a node is computed from and used for.

        Two rounds up and down the graph tell nodes apart that differ only in what the operands of
        their users are used for. What is still equal then is put in the order of the program.
        """
        users: list[list[tuple[int, str]]] = [[] for _ in self.functions]
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
        hashes = []
        for i, operation in enumerate(self._operations):
            leaf = self.leaves.get(i)
            own = f"{leaf.names}{tuple(leaf.tensor.shape)}" if leaf else ""
            hashes.append(_digest(operation, str(self.attributes[i]), own, ends[i]))
        for _ in range(2):
            for i, operands in enumerate(self.operands):
                below = [f"{hashes[e.node]}[{e.output}]" if e else "-" for e in operands]
                hashes[i] = _digest(hashes[i], *self._ordered(i, below))
            for i in reversed(range(len(hashes))):
                above = sorted(f"{hashes[user]}@{at}" for user, at in users[i])
                hashes[i] = _digest(hashes[i], *above)
        self._hashes = hashes

    def _sort_operands(self) -> None:
        for i, operands in enumerate(self.operands):
            if self._commutes(i):
                operands.sort(key=self._operand_key)

    def _operand_key(self, edge: Edge | None) -> tuple[Any, ...]:
        """What is near first: the order of operands does not change when what is far does."""
        if edge is None:
            return (1,)
        i = edge.node
        near = self._nearest[i]
        return (
            0,
            -near.last_registered_first,
            near.distance,
            self._operations[i],
            self._local[i],
            edge.output,
            self._hashes[i],
            self.functions[i]._sequence_nr(),
        )

    def _name(self) -> None:
        """The order of the lines, and the names."""
        order = postorder(
            [end.node for ends in self.ends.values() for end in ends if end],
            lambda i: [edge.node for edge in self.operands[i] if edge is not None],
        )
        groups = {
            reach: n for n, reach in enumerate(dict.fromkeys(self._member_bits[i] for i in order))
        }
        self.operations = sorted(
            (i for i in order if i not in self.leaves),
            key=lambda i: (-self._member_bits[i].bit_count(), groups[self._member_bits[i]]),
        )
        self.names = [""] * len(self.functions)
        seen: Counter[str] = Counter()
        for i in order:
            name = self.leaves[i].names[0] if i in self.leaves else self._operation_name(i)
            seen[name] += 1
            # A dot would make the number of a leaf look like a parameter's own name.
            mark = "-" if i in self.leaves else "."
            self.names[i] = name if seen[name] == 1 else f"{name}{mark}{seen[name]}"
        found = [(i, self.leaves[i]) for i in order if i in self.leaves]
        found.sort(key=lambda leaf: leaf[1].rank if leaf[1].rank >= 0 else len(self.registered))
        self.leaves = {
            i: leaf if leaf.kind != "unregistered" else leaf._replace(names=(self.names[i],))
            for i, leaf in found
        }

    def _operation_name(self, i: int) -> str:
        near = self._nearest[i]
        name = f"{near.layer}:{self._operations[i]}"
        if near.members.bit_count() == 1:
            return name
        mine = self.members_of(i)
        return f"{'*' if mine == self.members else '+'.join(mine)}/{name}"

    def _commutes(self, i: int) -> bool:
        # With alpha, a + alpha * b is computed.
        return self._operations[i] in _COMMUTATIVE and not self.attributes[i]

    def _ordered(self, i: int, operands: list[str]) -> list[str]:
        return sorted(operands) if self._commutes(i) else operands


def _digest(*parts: str) -> str:
    # repr tells ("a", "b") from ("ab",); Python's own hash differs from process to process.
    return blake2b(repr(parts).encode(), digest_size=16).hexdigest()
