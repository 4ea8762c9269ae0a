"""What each primitive of a forward pass does to channels.

A rule takes (graph, equation, operands) and returns the value of each output, after
`graph.couple(one, other)` for two axes that share their channels and `graph.fix(labels, reason)`
for an axis whose channels it mixes. To add one, write it and enter it in `RULES` under the name of
the primitive. Without a rule all channels that meet the primitive are fixed, which is always right.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from regjax.pruning import _layouts
from regjax.pruning._channels import (
    CONSTANT,
    DATA,
    FREE,
    Graph,
    Labels,
    LeafAxis,
    Value,
    carried,
    free,
    opaque,
    rigid,
    shape_of,
    unlabelled,
)

Rule: TypeAlias = Callable[[Graph, JaxprEqn, list[Value]], list[Value]]

_ELEMENTWISE_NAMES = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type cbrt ceil clamp
clz convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor
ge gt integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not or
population_count pow reduce_precision rem round rsqrt select_n shift_left shift_right_arithmetic
shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor
"""
ELEMENTWISE = frozenset(_ELEMENTWISE_NAMES.split())
_REDUCTIONS = """
argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor
"""
_CUMULATIVE = ["cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"]
_WINDOWS = ["reduce_window_max", "reduce_window_min", "reduce_window_sum"]
_CALLS = """
checkpoint closed_call core_call custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr jit pjit
remat remat2
"""
# The outcome is linear in the first operand; of a product in each.
_LINEAR = {"convert_element_type", "copy", "copy_p", "div", "mul", "neg", "stop_gradient"}
_ROLES = {"mul": "scale", "div": "scale", "add": "bias", "sub": "bias"}


def propagate(
    graph: Graph, jaxpr: Jaxpr, constants: Sequence[Value], arguments: Sequence[Value]
) -> list[Value]:
    """Computes the values of the outputs of a jaxpr; the graph notes what its equations do."""
    values = dict(zip(jaxpr.constvars, constants, strict=True))
    values |= zip(jaxpr.invars, arguments, strict=True)
    read = lambda atom: (
        unlabelled(np.shape(atom.val), CONSTANT) if isinstance(atom, Literal) else values[atom]
    )
    for equation in live(jaxpr):
        operands = [read(atom) for atom in equation.invars]
        outputs = RULES.get(equation.primitive.name, without_rule)(graph, equation, operands)
        values |= zip(equation.outvars, outputs, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def live(jaxpr: Jaxpr) -> list[JaxprEqn]:
    """Returns the equations that outputs come of, and kernels that nothing reads.

    What a model computes beside its outputs, as what it sows, fixes no unit.
    """
    needed = set(map(id, jaxpr.outvars))
    found = []
    for equation in reversed(jaxpr.eqns):
        is_read = any(id(variable) in needed for variable in equation.outvars)
        if is_read or equation.primitive.name in _CONTRACTIONS or inner_jaxpr(equation):
            found.append(equation)
            needed |= set(map(id, equation.invars))
    return found[::-1]


_CONTRACTIONS = ("dot_general", "conv_general_dilated")


def inner_jaxpr(equation: JaxprEqn) -> tuple[Jaxpr, Sequence[jax.Array]] | None:
    """Returns the jaxpr that a call runs, and its constants; None for other primitives."""
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    inner = next((equation.params[name] for name in names if name in equation.params), None)
    return None if inner is None else (getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()))


def without_rule(graph: Graph, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    reason = f"passes through `{equation.primitive.name}`, which has no rule"
    return opaque(graph, equation, operands, reason)


def _call(graph: Graph, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    inner = inner_jaxpr(equation)
    if inner is None:
        return without_rule(graph, equation, operands)
    constants = [unlabelled(np.shape(array), CONSTANT) for array in inner[1]]
    return propagate(graph, inner[0], constants, operands)


def _elementwise(graph: Graph, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    name, shape = equation.primitive.name, shape_of(equation.outvars[0])
    arrays = [operand for operand in operands if operand.labels]  # a scalar has no axes
    if any(len(array.labels) != len(shape) for array in arrays):  # bits of another width
        return opaque(graph, equation, operands, f"goes through `{name}`, which moves bits")
    labels = [free(length) for length in shape]
    for array in arrays:
        for axis, along in enumerate(array.labels):
            if len(along) == shape[axis]:
                labels[axis] = graph.couple(labels[axis], along)
            else:
                graph.fix(along, "is taken out alone and repeated")
    sources = [_linear_source(name, operands, axis) for axis in range(len(shape))]
    output = Value(tuple(labels), tuple(sources))
    return carried(graph, arrays, [output], _ROLES.get(name, "carried"))


def _linear_source(name: str, operands: list[Value], axis: int) -> LeafAxis | None:
    """Finds the leaf axis along which an elementwise outcome is still linear in the leaf."""
    if name not in _LINEAR:
        return None
    varying = [o for o in operands if o.labels and (o.labels[axis] != FREE).any()]
    if len(varying) != 1 or (varying[0] is not operands[0] and name != "mul"):
        return None
    return varying[0].sources[axis]


def _carry_axis(graph: Graph, operand: Value, axis: int) -> Labels:
    graph.use(operand.sources[axis], "carried")
    return operand.labels[axis]


def _dot(graph: Graph, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    left, right = operands
    (left_sum, right_sum), (left_batch, right_batch) = equation.params["dimension_numbers"]
    for i, j in zip(left_sum, right_sum, strict=True):
        graph.contract(left, i, right, j)
    labels = [
        graph.couple(_carry_axis(graph, left, i), _carry_axis(graph, right, j))
        for i, j in zip(left_batch, right_batch, strict=True)
    ]
    for operand, taken in ((left, left_sum + left_batch), (right, right_sum + right_batch)):
        rest = [i for i in range(len(operand.labels)) if i not in taken]
        labels += [_carry_axis(graph, operand, i) for i in rest]
    return [Value(tuple(labels), (None,) * len(labels))]


def _convolution(graph: Graph, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    inputs, kernel = operands
    numbers, shape = equation.params["dimension_numbers"], shape_of(equation.outvars[0])
    if equation.params["batch_group_count"] > 1:
        return opaque(graph, equation, operands, "passes through `conv_general_dilated` in groups")
    (batch, features, *places), (out, into, *window) = numbers.lhs_spec, numbers.rhs_spec
    num_groups = equation.params["feature_group_count"]
    if num_groups == 1:
        graph.contract(inputs, features, kernel, into)
        channels = _carry_axis(graph, kernel, out)
    else:
        graph.fix(_carry_axis(graph, kernel, into), "goes into each group of a convolution")
        channels = _in_groups(graph, inputs, features, kernel, out, num_groups)
    for operand, axes in ((inputs, places), (kernel, window)):
        for axis in axes:
            graph.fix(operand.labels[axis], "is a position of a convolution")
    labels = [rigid(length, DATA) for length in shape]
    labels[numbers.out_spec[0]] = _carry_axis(graph, inputs, batch)
    labels[numbers.out_spec[1]] = channels
    return [Value(tuple(labels), (None,) * len(labels))]


def _in_groups(
    graph: Graph, inputs: Value, features: int, kernel: Value, out: int, num_groups: int
) -> Labels:
    """Joins what goes into each group of a convolution with what comes out of it."""
    into, come = (
        _carry_axis(graph, operand, axis).reshape(num_groups, -1)
        for operand, axis in ((inputs, features), (kernel, out))
    )
    channels = functools.reduce(graph.couple, (*come.T, *into.T))
    return np.repeat(channels, come.shape[1])


def scan_counts(equation: JaxprEqn) -> tuple[int, int]:
    """Returns how many operands of a scan are constants, and how many are carried."""
    if "num_carry" in equation.params:
        return equation.params["num_consts"], equation.params["num_carry"]
    # From 0.11 on JAX keeps the three of them as flattened trees.
    constants, carry, _ = (len(list(part.vals)) for part in equation.params["ft_in"].unpack())
    return constants, carry


def inside_scan(graph: Graph, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Finds the values of what the body of a scan takes: constants, carry and slices."""
    num_consts, num_carry = scan_counts(equation)
    given = list(operands)
    for i, operand in enumerate(given[num_consts + num_carry :], num_consts + num_carry):
        graph.fix(_carry_axis(graph, operand, 0), "is scanned over")
        given[i] = Value(operand.labels[1:], operand.sources[1:])
    places = range(num_consts, num_consts + num_carry)
    for i in places:
        given[i] = carried(graph, [given[i]], [_sourceless(given[i].labels)])[0]
    while True:
        found = _call(graph, equation, given)
        changed = False
        for i, after in zip(places, found, strict=False):
            labels = tuple(map(graph.couple, given[i].labels, after.labels))
            changed |= not all(map(np.array_equal, labels, given[i].labels))
            given[i] = _sourceless(labels)
        if not changed:
            return given


def _scan(graph: Graph, equation: JaxprEqn, operands: list[Value]) -> list[Value]:
    given = inside_scan(graph, equation, operands)
    (num_consts, num_carry), length = scan_counts(equation), equation.params["length"]
    found = _call(graph, equation, given)
    stacked = [(rigid(length, DATA), *value.labels) for value in found[num_carry:]]
    return [*given[num_consts : num_consts + num_carry], *map(_sourceless, stacked)]


def _sourceless(labels: Sequence[Labels]) -> Value:
    return Value(tuple(labels), (None,) * len(labels))


RULES: dict[str, Rule] = {
    **dict.fromkeys(_CALLS.split(), _call),
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(_REDUCTIONS.split(), _layouts.reduction),
    **dict.fromkeys(_CUMULATIVE, _layouts.cumulative),
    **dict.fromkeys(_WINDOWS, _layouts.window),
    "broadcast_in_dim": _layouts.broadcast,
    "concatenate": _layouts.concatenate,
    "conv_general_dilated": _convolution,
    "dot_general": _dot,
    "dynamic_slice": _layouts.cut,
    "gather": _layouts.gather,
    "iota": _layouts.iota,
    "optimization_barrier": _layouts.unchanged,
    "pad": _layouts.pad,
    "reshape": _layouts.reshape,
    "rev": _layouts.reverse,
    "scan": _scan,
    "slice": _layouts.slices,
    "split": _layouts.split,
    "squeeze": _layouts.squeeze,
    "stack": _layouts.stack,
    "transpose": _layouts.transpose,
    "unstack": _layouts.unstack,
}
