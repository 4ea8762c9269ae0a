"""What the primitives that move, reduce, cut or join axes do to channels: rules of `_rules.py`."""

import functools
from collections.abc import Sequence

import numpy as np
from jax.extend.core import JaxprEqn

from regjax.pruning._channels import (
    CONSTANT,
    DATA,
    FREE,
    MIXED,
    Graph,
    Labels,
    Value,
    carried,
    opaque,
    rigid,
    shape_of,
    unlabelled,
)


def unchanged(graph: Graph, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    return operands


def broadcast(graph: Graph, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    shape, operand = equation.params["shape"], operands[0]
    output = unlabelled(shape, FREE)
    labels, sources = list(output.labels), list(output.sources)
    for axis, place in enumerate(equation.params["broadcast_dimensions"]):
        if len(operand.labels[axis]) == shape[place]:
            labels[place], sources[place] = operand.labels[axis], operand.sources[axis]
    return carried(graph, operands[:1], [Value(tuple(labels), tuple(sources))])


def _pick(operand: Value, axes: Sequence[int]) -> Value:
    """Takes some of the axes of a value, in this order."""
    return Value(
        tuple(operand.labels[axis] for axis in axes), tuple(operand.sources[axis] for axis in axes)
    )


def transpose(graph: Graph, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    return [_pick(operands[0], equation.params["permutation"])]


def squeeze(graph: Graph, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    dropped = equation.params["dimensions"]
    return [_pick(operands[0], [i for i in range(len(operands[0].labels)) if i not in dropped])]


def reverse(graph: Graph, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    turned = equation.params["dimensions"]
    labels = [x[::-1] if axis in turned else x for axis, x in enumerate(operands[0].labels)]
    return [Value(tuple(labels), operands[0].sources)]


def reshape(graph: Graph, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    operand, shape = operands[0], equation.params["new_sizes"]
    if equation.params.get("dimensions") is not None or 0 in shape:
        return opaque(graph, equation, operands, "passes through an odd `reshape`")
    output = unlabelled(shape, FREE)
    labels, sources = list(output.labels), list(output.sources)
    for olds, news in _blocks([len(axis) for axis in operand.labels], shape):
        if len(olds) == len(news) == 1:
            labels[news[0]], sources[news[0]] = operand.labels[olds[0]], operand.sources[olds[0]]
        elif len(news) == 1:
            labels[news[0]] = _flattened(graph, [operand.labels[axis] for axis in olds])
        else:
            for axis in olds:
                graph.fix(operand.labels[axis], "is split by a reshape, as for norms of groups")
            code = min(int(operand.labels[axis].min()) for axis in olds)
            for axis in news:
                labels[axis] = rigid(shape[axis], MIXED if code >= 0 else code)
    return carried(graph, operands[:1], [Value(tuple(labels), tuple(sources))])


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Splits the axes, shorter ones than two left out, into the smallest runs of equal size."""
    left = [axis for axis, length in enumerate(old) if length != 1]
    right = [axis for axis, length in enumerate(new) if length != 1]
    blocks = []
    while left or right:
        olds, news = [left.pop(0)], [right.pop(0)]
        while (one := np.prod([old[i] for i in olds])) != (two := np.prod([new[i] for i in news])):
            (olds if one < two else news).append((left if one < two else right).pop(0))
        blocks.append((olds, news))
    return blocks


def _flattened(graph: Graph, axes: list[Labels]) -> Labels:
    """Flattens the labels of several axes, of which one may have channels."""
    grids = np.meshgrid(*axes, indexing="ij")
    channels = [grid for grid, labels in zip(grids, axes, strict=True) if (labels >= 0).any()]
    if len(channels) > 1:
        for labels in axes:
            graph.fix(labels, "is flattened together with another axis of channels")
    return np.maximum.reduce(channels or [np.minimum.reduce(grids)]).ravel()


def reduction(graph: Graph, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    operand, axes = operands[0], equation.params["axes"]
    for axis in axes:
        graph.fix(operand.labels[axis], f"is reduced by `{equation.primitive.name}`")
    output = _pick(operand, [i for i in range(len(operand.labels)) if i not in axes])
    return carried(graph, operands, [output._replace(sources=(None,) * len(output.labels))])


def cumulative(graph: Graph, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    changed = [equation.params["axis"] == i for i in range(len(operands[0].labels))]
    return _along(graph, equation, operands, changed)


def cut(graph: Graph, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    lengths = [len(labels) for labels in operands[0].labels]
    new = shape_of(equation.outvars[0])
    return _along(graph, equation, operands, [a != b for a, b in zip(lengths, new, strict=True)])


def pad(graph: Graph, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    changed = [tuple(widths) != (0, 0, 0) for widths in equation.params["padding_config"]]
    return _along(graph, equation, operands, changed)


def window(graph: Graph, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    names = "window_dimensions", "window_strides", "base_dilation", "window_dilation"
    sizes = zip(*(equation.params[name] for name in names), strict=True)
    changed = [
        size != (1, 1, 1, 1) or tuple(widths) != (0, 0)
        for size, widths in zip(sizes, equation.params["padding"], strict=True)
    ]
    return _along(graph, equation, operands, changed)


def _along(
    graph: Graph, equation: JaxprEqn, operands: list[Value], changed: list[bool]
) -> list[Value]:
    """Keeps the axes but those that the operation changes, which lose their labels."""
    operand, shape = operands[0], shape_of(equation.outvars[0])
    labels, sources = list(operand.labels), list(operand.sources)
    for axis in np.flatnonzero(changed):
        graph.fix(labels[axis], f"is cut or mixed by `{equation.primitive.name}`")
        labels[axis], sources[axis] = rigid(shape[axis], DATA), None
    return carried(graph, operands[:1], [Value(tuple(labels), tuple(sources))])


def concatenate(graph: Graph, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    joined = equation.params["dimension"]
    parts = [operand.labels for operand in operands]
    # What does not change along a part does so from one part to the next.
    join = lambda along: np.where((row := np.concatenate(along)) == FREE, CONSTANT, row)
    labels = [
        join(along) if axis == joined else functools.reduce(graph.couple, along)
        for axis, along in enumerate(zip(*parts, strict=True))
    ]
    return carried(graph, operands, [Value(tuple(labels), (None,) * len(labels))])


def stack(graph: Graph, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    parts = [operand.labels for operand in operands]
    labels = [functools.reduce(graph.couple, along) for along in zip(*parts, strict=True)]
    labels.insert(equation.params["axis"], rigid(len(operands), DATA))
    return carried(graph, operands, [Value(tuple(labels), (None,) * len(labels))])


def iota(graph: Graph, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    counted = equation.params["dimension"]
    shape = shape_of(equation.outvars[0])
    labels = [rigid(n, CONSTANT if i == counted else FREE) for i, n in enumerate(shape)]
    return [Value(tuple(labels), (None,) * len(shape))]
