"""Which channels of a model are one: labels of the axes of its values, and how they are joined.

Every position along every axis of a parameter (or of the state) is an atom. A value of the forward
pass has for each axis the label of each position: an atom, or a code for what is no channel. The
operations join atoms (`_rules.py`); a component of joined atoms is one channel of the network, with
all the weights that come and go with it. What mixes channels, so that none can be removed alone,
fixes them and says why.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from jax.extend.core import JaxprEqn, Literal, Var

FREE, DATA, CONSTANT, MIXED = -1, -2, -3, -4
"""Labels that are no atoms. FREE: the same value all along the axis, which may be of any length."""

_WHY = {
    DATA: "meets an axis of the data",
    CONSTANT: "meets a constant array of the forward pass",
    MIXED: "meets an axis that an operation has mixed",
}

Labels: TypeAlias = np.ndarray
"""(length of the axis,) of int."""

LeafAxis: TypeAlias = tuple[int, int]
"""Which leaf, and which of its axes."""


class Value(NamedTuple):
    """What is known of a value of the forward pass, axis by axis.

    Attributes:
      labels: of each axis.
      sources: the leaf axis along which the value is linear in a leaf, and nothing else of it
        depends on that axis; None where there is none.
    """

    labels: tuple[Labels, ...]
    sources: tuple[LeafAxis | None, ...]


class Graph:
    """The atoms and what was found about them.

    Attributes:
      atoms: of each axis of each leaf with more than one position.
      roles: what was done along each leaf axis, in the order of the forward pass: "consumed" where
        it is contracted with channels, "scale" or "bias" where it multiplies or is added to them,
        "carried" for other ways of passing them on.
      reasons: why an atom is fixed.
      splits: the labels of the axes that an equation splits in several.
    """

    def __init__(self, choices: Mapping[int, int] | None = None) -> None:
        """Begins without any.

        Args:
          choices: which of the axes that a split makes has the channels, by the equation; the first
            if it is not here.
        """
        self.choices = {} if choices is None else choices
        self.splits: dict[int, tuple[Labels, Sequence[int]]] = {}
        self.atoms: dict[LeafAxis, Labels] = {}
        self.roles: dict[LeafAxis, set[str]] = {}
        self.reasons: dict[int, str] = {}
        self._num_atoms = 0
        self._edges: list[np.ndarray] = []

    def leaf(self, index: int, shape: Sequence[int]) -> Value:
        """Makes the value of a leaf of the model, with atoms of its own."""
        labels, sources = [], []
        for axis, length in enumerate(shape):
            is_channel = length > 1
            labels.append(np.arange(length) + self._num_atoms if is_channel else free(length))
            sources.append((index, axis) if is_channel else None)
            if is_channel:
                self.atoms[index, axis] = labels[-1]
                self._num_atoms += length
        return Value(tuple(labels), tuple(sources))

    def couple(self, one: Labels, other: Labels) -> Labels:
        """Joins an axis that both share, position by position the same channel; its labels."""
        for these, those in ((one, other), (other, one)):
            for code, reason in _WHY.items():
                self.fix(these[those == code], reason)
        both = (one >= 0) & (other >= 0) & (one != other)
        if both.any():
            self._edges.append(np.stack([one[both], other[both]]))
        return joined(one, other)

    def choose(self, equation: JaxprEqn, labels: Labels, lengths: Sequence[int]) -> int:
        """Chooses the axis that keeps the channels where one axis is split in several."""
        self.splits[id(equation)] = labels, lengths
        return self.choices.get(id(equation), 0)

    def contract(self, left: Value, i: int, right: Value, j: int) -> None:
        """Notes the sum over axis i of the left and axis j of the right value.

        The one that is linear in a parameter consumes the channels of the other: to multiply its
        slice by a gate is to multiply the channel, seen from here.
        """
        if right.sources[j] is not None:
            left, i, right, j = right, j, left, i
        self.use(right.sources[j], "carried")
        if left.sources[i] is not None:
            self.use(left.sources[i], "consumed")
            self.couple(left.labels[i], right.labels[j])
            return
        for labels in (left.labels[i], right.labels[j]):
            self.fix(labels, "is contracted with what is no parameter")

    def fix(self, labels: Labels, reason: str) -> None:
        """Notes that no channel of an axis can be removed."""
        for atom in labels[labels >= 0].tolist():
            self.reasons.setdefault(atom, reason)

    def use(self, source: LeafAxis | None, role: str) -> None:
        """Notes what is done along a leaf axis."""
        if source is not None:
            self.roles.setdefault(source, set()).add(role)

    def channels(self) -> np.ndarray:
        """Finds the component of each atom, (number of atoms,)."""
        edges = np.concatenate([np.zeros((2, 0), int), *self._edges], axis=1)
        return components(self._num_atoms, edges)


def components(num_nodes: int, edges: np.ndarray) -> np.ndarray:
    """Finds the smallest node that each node is connected to; edges (2, number)."""
    labels = np.arange(num_nodes)
    while True:
        found = labels.copy()
        np.minimum.at(found, edges[0], labels[edges[1]])
        np.minimum.at(found, edges[1], labels[edges[0]])
        found = np.minimum(found, found[found])
        if np.array_equal(found, labels):
            return labels
        labels = found


def joined(one: Labels, other: Labels) -> Labels:
    """Takes at each position the label that says more."""
    return np.where((one == FREE) | ((one < 0) & (other >= 0)), other, one)


def free(length: int) -> Labels:
    """Makes labels of an axis along which nothing changes."""
    return np.full(length, FREE)


def rigid(length: int, code: int) -> Labels:
    """Makes labels of an axis of `code`; one position alone is free, as it may be repeated."""
    return np.full(length, code if length > 1 else FREE)


def unlabelled(shape: Sequence[int], code: int) -> Value:
    """Makes a value without channels."""
    return Value(tuple(rigid(length, code) for length in shape), (None,) * len(shape))


def shape_of(atom: Var | Literal) -> tuple[int, ...]:
    """Returns the shape of a value in a jaxpr."""
    return getattr(atom.aval, "shape", ())


def opaque(graph: Graph, equation: JaxprEqn, operands: list[Value], reason: str) -> list[Value]:
    """Fixes all channels of the operands."""
    for operand in operands:
        for labels in operand.labels:
            graph.fix(labels, reason)
    outputs = [unlabelled(shape_of(variable), MIXED) for variable in equation.outvars]
    return carried(graph, operands, outputs)


def carried(
    graph: Graph, operands: Sequence[Value], outputs: list[Value], role: str = "carried"
) -> list[Value]:
    """Returns the outputs; notes the leaf axes along which they are not a leaf's own any more."""
    kept = {source for output in outputs for source in output.sources}
    for operand in operands:
        for source in operand.sources:
            if source not in kept:
                graph.use(source, role)
    return outputs
