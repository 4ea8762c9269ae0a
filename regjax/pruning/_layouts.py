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
        else:
            graph.fix(operand.labels[axis], "is taken out alone and repeated")
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
    for axis in dropped:
        graph.fix(operands[0].labels[axis], "is taken out alone by `squeeze`")
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
    for alone in operand.labels:
        if len(alone) == 1:
            graph.fix(alone, "is taken out alone by `reshape`")
    for olds, news in _blocks([len(axis) for axis in operand.labels], shape):
        if len(olds) == len(news) == 1:
            labels[news[0]], sources[news[0]] = operand.labels[olds[0]], operand.sources[olds[0]]
            continue
        whole = _flattened(graph, [operand.labels[axis] for axis in olds])
        for axis, part in zip(
            news, _split_axis(graph, equation, whole, [shape[axis] for axis in news]), strict=True
        ):
            labels[axis] = part
    return carried(graph, operands[:1], [Value(tuple(labels), tuple(sources))])


def _split_axis(
    graph: Graph, equation: JaxprEqn, whole: Labels, lengths: Sequence[int]
) -> list[Labels]:
    """Splits an axis in several, of which one keeps the channels: heads, or groups, go whole."""
    if len(lengths) == 1:
        return [whole]
    if (whole < 0).all():
        return [rigid(length, int(whole.min())) for length in lengths]
    place = graph.choose(equation, whole, lengths)
    rows = np.moveaxis(whole.reshape(lengths), place, 0).reshape(lengths[place], -1)
    channels = functools.reduce(graph.couple, rows.T)
    return [channels if i == place else rigid(n, MIXED) for i, n in enumerate(lengths)]


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
    """Flattens the labels of several axes; of two with channels the first one keeps them."""
    if len(axes) == 1:
        return axes[0]
    grids = np.meshgrid(*axes, indexing="ij")
    channels = [i for i, labels in enumerate(axes) if (labels >= 0).any()]
    for i in channels[1:]:
        graph.fix(axes[i], "is flattened together with another axis of channels")
    return (grids[channels[0]] if channels else np.minimum.reduce(grids)).ravel()


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


def slices(graph: Graph, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"] or (1,) * len(starts)
    bounds = zip(starts, limits, strides, strict=True)
    return carried(graph, operands, [taken(operands[0], [slice(*bound) for bound in bounds])])


def split(graph: Graph, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    axis, ends = equation.params["axis"], np.cumsum(equation.params["sizes"])
    whole = [slice(None)] * len(operands[0].labels)
    parts = [
        taken(operands[0], [*whole[:axis], slice(start, end), *whole[axis + 1 :]])
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]
    return carried(graph, operands, parts)


def taken(operand: Value, parts: Sequence[slice]) -> Value:
    """Takes a part of each axis; an axis of which something is missing is no leaf's own."""
    labels = tuple(axis[part] for axis, part in zip(operand.labels, parts, strict=True))
    pairs = zip(labels, operand.labels, operand.sources, strict=True)
    return Value(labels, tuple(s if len(new) == len(old) else None for new, old, s in pairs))


def unstack(graph: Graph, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    axis, operand = equation.params["axis"], operands[0]
    graph.fix(operand.labels[axis], "is taken apart by `unstack`")
    part = _pick(operand, [i for i in range(len(operand.labels)) if i != axis])
    return carried(graph, operands, [part] * len(equation.outvars))


def gather(graph: Graph, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Keeps the axes of which all is looked up: an embedding's features."""
    (operand, indices), numbers = operands[:2], equation.params["dimension_numbers"]
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [i for i in range(len(operand.labels)) if i not in dropped]
    shape = shape_of(equation.outvars[0])
    labels = [rigid(length, DATA) for length in shape]
    for labels_of_index in indices.labels:
        graph.fix(labels_of_index, "is an index of `gather`")
    for axis, size in enumerate(equation.params["slice_sizes"]):
        if axis in kept and size == len(operand.labels[axis]):
            labels[numbers.offset_dims[kept.index(axis)]] = operand.labels[axis]
        else:
            graph.fix(operand.labels[axis], "is looked up by `gather`")
    return carried(graph, operands, [Value(tuple(labels), (None,) * len(labels))])


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
