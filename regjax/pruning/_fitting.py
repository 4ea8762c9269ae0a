"""How operands of a primitive are cut to fit each other, and which sizes that leaves."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from regjax.pruning._channels import Labels, Value, joined
from regjax.pruning._rules import ELEMENTWISE


class Sized(NamedTuple):
    """A smaller array, and the labels of the axes that it had.

    Attributes:
      array: what is left.
      value: labels along the axes as they were: of a channel where it is removed, else a code.
    """

    array: jax.Array
    value: Value


def fitted(equation: JaxprEqn, operands: list[Sized], values: list[Value]) -> list[jax.Array]:
    """Returns the operands' arrays, cut so that they fit together."""
    fit = _FITTED.get(equation.primitive.name)
    return (
        [operand.array for operand in operands] if fit is None else fit(equation, operands, values)
    )


def resized(equation: JaxprEqn, operands: list[Sized], values: list[Value]) -> dict[str, Any]:
    """Returns the parameters of a primitive with the sizes that are left."""
    change = _RESIZED.get(equation.primitive.name)
    changed = {} if change is None else change(equation, operands, values)
    return {**equation.params, **changed}


def _counts(value: Value) -> tuple[int, ...]:
    return tuple(int((labels < 0).sum()) for labels in value.labels)


def _cut(array: jax.Array, axis: int, before: Labels, after: Labels) -> jax.Array:
    """Takes along an axis what is left after more of it is removed."""
    stays = (after < 0)[before < 0] if len(before) == len(after) else np.ones(1, bool)
    return array if stays.all() else jnp.take(array, np.flatnonzero(stays), axis)


def cut(operand: Sized, labels: Sequence[Labels]) -> jax.Array:
    """Cuts off from an operand what others that it meets have lost."""
    array = operand.array
    for axis, (before, after) in enumerate(zip(operand.value.labels, labels, strict=True)):
        array = _cut(array, axis, before, after)
    return array


def _all_like_the_output(
    equation: JaxprEqn, operands: list[Sized], values: list[Value]
) -> list[jax.Array]:
    labels = values[0].labels
    return [cut(o, labels) if o.value.labels else o.array for o in operands]


def _but_for_one_axis(
    equation: JaxprEqn, operands: list[Sized], values: list[Value]
) -> list[jax.Array]:
    """Fits all but the axis that is concatenated, or that a stack makes."""
    name = equation.primitive.name
    axis = equation.params["dimension" if name == "concatenate" else "axis"]
    found = []
    for operand in operands:
        others = [x for i, x in enumerate(values[0].labels) if i != axis]
        if name == "concatenate":
            others.insert(axis, operand.value.labels[axis])
        found.append(cut(operand, others))
    return found


def _along_shared_axes(
    equation: JaxprEqn, operands: list[Sized], values: list[Value]
) -> list[jax.Array]:
    left, right = operands
    labels = [list(left.value.labels), list(right.value.labels)]
    for pairs in equation.params["dimension_numbers"]:
        for i, j in zip(*pairs, strict=True):
            labels[0][i] = labels[1][j] = joined(labels[0][i], labels[1][j])
    return [cut(left, labels[0]), cut(right, labels[1])]


def _of_convolution(
    equation: JaxprEqn, operands: list[Sized], values: list[Value]
) -> list[jax.Array]:
    numbers = equation.params["dimension_numbers"]
    labels = [list(operand.value.labels) for operand in operands]
    i, (out, j) = numbers.lhs_spec[1], numbers.rhs_spec[:2]
    if equation.params["feature_group_count"] == 1:
        labels[0][i] = labels[1][j] = joined(labels[0][i], labels[1][j])
    else:
        # What has lost its inputs, or its outputs, loses both.
        channels = values[0].labels[numbers.out_spec[1]]
        labels[1][out] = channels
        groups = channels.reshape(equation.params["feature_group_count"], -1)[:, 0]
        labels[0][i] = np.repeat(groups, len(labels[0][i]) // len(groups))
    return [cut(operand, along) for operand, along in zip(operands, labels, strict=True)]


_FITTED: dict[str, Callable[..., list[jax.Array]]] = {
    **dict.fromkeys(ELEMENTWISE, _all_like_the_output),
    "concatenate": _but_for_one_axis,
    "conv_general_dilated": _of_convolution,
    "dot_general": _along_shared_axes,
    "stack": _but_for_one_axis,
}


def _groups_left(equation: JaxprEqn, operands: list[Sized], values: list[Value]) -> Any:
    count = equation.params["feature_group_count"]
    channels = values[0].labels[equation.params["dimension_numbers"].out_spec[1]]
    return {"feature_group_count": int((channels.reshape(count, -1)[:, 0] < 0).sum())
            if count > 1 else 1}  # fmt: skip


def _rows_looked_up(equation: JaxprEqn, operands: list[Sized], values: list[Value]) -> Any:
    operand = operands[0]
    sizes = zip(equation.params["slice_sizes"], operand.value.labels, strict=True)
    left = _counts(operand.value)
    return {"slice_sizes": tuple(
        left[i] if size == len(labels) else size for i, (size, labels) in enumerate(sizes)
    )}  # fmt: skip


_RESIZED: dict[str, Callable[..., dict[str, Any]]] = {
    "broadcast_in_dim": lambda equation, operands, values: {"shape": _counts(values[0])},
    "conv_general_dilated": _groups_left,
    "dynamic_slice": lambda equation, operands, values: {"slice_sizes": _counts(values[0])},
    "gather": _rows_looked_up,
    "reshape": lambda equation, operands, values: {"new_sizes": _counts(values[0])},
    "split": lambda equation, operands, values: {
        "sizes": tuple(_counts(value)[equation.params["axis"]] for value in values)
    },
}
