"""A traced forward pass run on smaller arrays, whatever sizes its code remembers.

What a model computes is traced with arrays of the old sizes; nothing is computed by that. Its
equations are then applied to the arrays without the removed channels, each with the sizes that are
left, after the rules of `_rules.py`: the same program, with constants as they were.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from regjax._base import Tree
from regjax.pruning._channels import (
    CONSTANT,
    DATA,
    Graph,
    Labels,
    LeafAxis,
    Value,
    free,
    joined,
    unlabelled,
)
from regjax.pruning._fitting import Sized, cut, fitted, resized
from regjax.pruning._rules import RULES, inner_jaxpr, inside_scan, live, scan_counts, without_rule

_REMOVED = 0
"""The label of what is removed; what stays has a code that is no channel's."""


Evaluator: TypeAlias = Callable[["Removal", JaxprEqn, list[Sized]], list[Sized]]


class Removal(Graph):
    """The rules' view of a program whose removed channels are known."""

    def couple(self, one: Labels, other: Labels) -> Labels:
        """Joins two axes: what one of them has lost is cut off from the other."""
        return joined(one, other)

    def fix(self, labels: Labels, reason: str) -> None:
        """Refuses a program that does more with a removed channel than its structure says."""
        if (labels >= 0).any():
            raise ValueError(
                f"`structure` must be that of the model in this mode, got one whose removed unit "
                f"{reason}."
            )

    def choose(self, equation: JaxprEqn, labels: Labels, lengths: Sequence[int]) -> int:
        """Finds the axis along which what is removed lies."""
        is_removed = (labels >= 0).reshape(lengths)
        for axis in range(len(lengths)):
            others = tuple(i for i in range(len(lengths)) if i != axis)
            if np.array_equal(is_removed.all(others), is_removed.any(others)):
                return axis
        self.fix(labels, "is a part of an axis that is split")
        return 0


def leaf(index: int, array: jax.Array, shape: Sequence[int], kept: dict[LeafAxis, Any]) -> Sized:
    """Makes the value of a leaf of the model, of which `kept` marks what is left."""
    labels = []
    for axis, length in enumerate(shape):
        stays = kept.get((index, axis), np.ones(length, bool))
        labels.append(np.where(stays, DATA, _REMOVED) if length > 1 else free(length))
    return Sized(array, Value(tuple(labels), tuple((index, axis) for axis in range(len(shape)))))


def given(array: jax.Array, code: int) -> Sized:
    """Makes the value of an array that the model does not own."""
    return Sized(array, unlabelled(np.shape(array), code))


def evaluate(
    graph: Removal, jaxpr: Jaxpr, constants: Sequence[Sized], arguments: Sequence[Sized]
) -> list[Sized]:
    """Computes the outputs of a jaxpr."""
    values = dict(zip(jaxpr.constvars, constants, strict=True))
    values |= zip(jaxpr.invars, arguments, strict=True)
    read = lambda atom: given(atom.val, CONSTANT) if isinstance(atom, Literal) else values[atom]
    for equation in live(jaxpr):
        operands = [read(atom) for atom in equation.invars]
        is_whole = not any((x >= 0).any() for o in operands for x in o.value.labels)
        evaluator = _bound if is_whole else _EVALUATORS.get(equation.primitive.name, _bound)
        values |= zip(equation.outvars, evaluator(graph, equation, operands), strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _bound(graph: Removal, equation: JaxprEqn, operands: list[Sized]) -> list[Sized]:
    """Applies a primitive, after its rule, to arrays that fit together."""
    name = equation.primitive.name
    rule = RULES.get(name, without_rule)
    values = rule(graph, equation, [operand.value for operand in operands])
    params = resized(equation, operands, values)
    outputs = _applied(equation, fitted(equation, operands, values), params)
    return [Sized(array, value) for array, value in zip(outputs, values, strict=True)]


def _slice(graph: Removal, equation: JaxprEqn, operands: list[Sized]) -> list[Sized]:
    (operand,), array = operands, operands[0].array
    (value,) = RULES["slice"](graph, equation, [operand.value])
    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"] or (1,) * len(starts)
    for axis, bound in enumerate(zip(starts, limits, strides, strict=True)):
        stays = operand.value.labels[axis] < 0
        places = np.cumsum(stays) - 1
        wanted = places[slice(*bound)][stays[slice(*bound)]]
        if not np.array_equal(wanted, np.arange(array.shape[axis])):
            array = jnp.take(array, wanted, axis)
    return [Sized(array, value)]


def _call(graph: Removal, equation: JaxprEqn, operands: list[Sized]) -> list[Sized]:
    inner = inner_jaxpr(equation)
    if inner is None:
        return _bound(graph, equation, operands)
    return evaluate(graph, inner[0], [given(array, CONSTANT) for array in inner[1]], operands)


def _applied(equation: JaxprEqn, arrays: Sequence[jax.Array], params: Any) -> list[jax.Array]:
    primitive = equation.primitive
    found = primitive.get_bind_params(params)
    # JAX has handed over functions beside the parameters, and among them.
    functions, params = found if isinstance(found, tuple) else ((), found)
    outputs = primitive.bind(*functions, *arrays, **params)
    return list(outputs) if primitive.multiple_results else [outputs]


def _checkpoint(graph: Removal, equation: JaxprEqn, operands: list[Sized]) -> list[Sized]:
    values = [operand.value for operand in operands]
    run = lambda *arrays: [o.array for o in _call(graph, equation, _sized(arrays, values))]
    params = equation.params
    again = jax.checkpoint(run, prevent_cse=params["prevent_cse"], policy=params["policy"])
    arrays = again(*(operand.array for operand in operands))
    return _sized(arrays, RULES[equation.primitive.name](graph, equation, values))


def _scan(graph: Removal, equation: JaxprEqn, operands: list[Sized]) -> list[Sized]:
    outside = [operand.value for operand in operands]
    values = inside_scan(graph, equation, outside)
    first, num_carry = scan_counts(equation)
    last = first + num_carry
    shared = [operand.array for operand in operands[:first]]

    def body(carry: list[jax.Array], slices: list[jax.Array]) -> tuple[Tree, Tree]:
        outputs = _call(graph, equation, _sized([*shared, *carry, *slices], values))
        kept, rows = outputs[: last - first], outputs[last - first :]
        return _like(kept, values[first:last]), [row.array for row in rows]

    options = {name: equation.params[name] for name in ("length", "reverse", "unroll")}
    start = _like(operands[first:last], values[first:last])
    carry, rows = jax.lax.scan(body, start, [o.array for o in operands[last:]], **options)
    return _sized([*carry, *rows], RULES["scan"](graph, equation, outside))


def _like(operands: Sequence[Sized], values: Sequence[Value]) -> list[jax.Array]:
    return [cut(o, value.labels) for o, value in zip(operands, values, strict=True)]


def _sized(arrays: Sequence[jax.Array], values: Sequence[Value]) -> list[Sized]:
    return [Sized(array, value) for array, value in zip(arrays, values, strict=True)]


def _rerun(graph: Removal, function: Callable[..., Tree], *arguments: list[Sized]) -> list[Sized]:
    """Traces a function of lists of arrays of the old sizes, and runs it on the smaller ones."""
    whole = [[_whole(operand) for operand in operands] for operands in arguments]
    traced = jax.make_jaxpr(function)(*whole)
    constants = [given(array, CONSTANT) for array in traced.consts]
    inputs = [operand for operands in arguments for operand in operands]
    return evaluate(graph, traced.jaxpr, constants, inputs)


def _whole(operand: Sized) -> jax.ShapeDtypeStruct:
    shape = tuple(len(labels) for labels in operand.value.labels)
    return jax.ShapeDtypeStruct(shape, jnp.result_type(operand.array))


def _custom(graph: Removal, equation: JaxprEqn, operands: list[Sized]) -> list[Sized]:
    """Keeps the derivative that the model's code gives: it is traced and run like all else."""
    values = [operand.value for operand in operands]
    is_real = [jnp.issubdtype(jnp.result_type(o.array), jnp.inexact) for o in operands]
    real = lambda items: [item for item, flag in zip(items, is_real, strict=True) if flag]
    plain = lambda *arrays: [o.array for o in _call(graph, equation, _sized(arrays, values))]
    outside = RULES[equation.primitive.name](graph, equation, values)

    def of_real(arrays: list[jax.Array]) -> Callable[..., list[jax.Array]]:
        """The equation at the old sizes, as a function of what can be differentiated."""

        def function(*some: jax.Array) -> list[jax.Array]:
            left = iter(some)
            inputs = [next(left) if flag else x for x, flag in zip(arrays, is_real, strict=True)]
            return _applied(equation, inputs, equation.params)

        return function

    if equation.primitive.name == "custom_jvp_call":
        forwards = jax.custom_jvp(plain)

        @forwards.defjvp
        def along(primals: Any, tangents: Any) -> tuple[Tree, Tree]:
            moved = _rerun(
                graph,
                lambda at, by: jax.jvp(of_real(at), real(at), by),
                _sized(primals, values), _sized(real(tangents), real(values)),
            )  # fmt: skip
            return _like(moved[: len(outside)], outside), _like(moved[len(outside) :], outside)

        return _sized(forwards(*(operand.array for operand in operands)), outside)

    backwards = jax.custom_vjp(plain)
    found: dict[str, Any] = {}

    def linearize(*arrays: jax.Array) -> tuple[Tree, Tree]:
        def linearized(at: list[jax.Array]) -> tuple[Tree, Tree]:
            outputs, pull_back = jax.vjp(of_real(at), *real(at))
            leaves, found["tree"] = jax.tree.flatten(pull_back)
            return outputs, leaves

        outputs = _rerun(graph, linearized, _sized(arrays, values))
        rest = outputs[len(outside) :]
        found["values"] = [o.value for o in rest]
        return _like(outputs[: len(outside)], outside), [o.array for o in rest]

    def pull(rest: Tree, cotangents: Tree) -> tuple[Tree, ...]:
        pulled = _rerun(
            graph,
            lambda leaves, by: jax.tree.unflatten(found["tree"], leaves)(by),
            _sized(rest, found["values"]), _sized(cotangents, outside),
        )  # fmt: skip
        left = iter(_like(pulled, real(values)))
        return tuple(next(left) if flag else None for flag in is_real)

    backwards.defvjp(linearize, pull)
    return _sized(backwards(*(operand.array for operand in operands)), outside)


_EVALUATORS: dict[str, Evaluator] = {
    **dict.fromkeys(("checkpoint", "remat", "remat2"), _checkpoint),
    **dict.fromkeys(("closed_call", "core_call", "jit", "pjit"), _call),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"), _custom),
    "scan": _scan,
    "slice": _slice,
}
