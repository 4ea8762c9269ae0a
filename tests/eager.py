"""Operations outside of a program, without a compiler where NumPy has the same result in all bits.

JAX compiles each operation that is called outside of a jit, once for each shape: half of all that
the tests would compile. Many only move numbers, compare them, or round one sum, difference,
product, quotient or root, for which IEEE 754 leaves one result. NumPy needs no compiler for that.
Everything else is compiled as ever. tests/test_eager.py holds both side by side.
"""

import contextlib
import itertools
import weakref

import jax
import numpy as np
from jax._src import pjit
from jax._src.interpreters import pxla
from jax._src.sharding_impls import UNSPECIFIED
from jax.sharding import SingleDeviceSharding

_LARGEST = 1 << 20  # elements; a long one is worth a program
_FLOATS = tuple(map(np.dtype, ("float32", "float64")))
_BOOL = np.dtype("bool")
_DTYPES = (_BOOL, *map(np.dtype, ("int32", "uint32", "int64")), *_FLOATS)


def _broadcast(x, *, shape, broadcast_dimensions, **_):
    ones = [1] * len(shape)
    for size, dimension in zip(x.shape, broadcast_dimensions, strict=True):
        ones[dimension] = size
    return np.broadcast_to(x.reshape(ones), shape)


def _iota(*, dtype, shape, dimension, **_):
    along = np.arange(shape[dimension], dtype=dtype)
    return _broadcast(along, shape=shape, broadcast_dimensions=(dimension,))


def _slice(x, *, start_indices, limit_indices, strides):
    steps = strides or (1,) * x.ndim
    return x[tuple(map(slice, start_indices, limit_indices, steps))]


def _dynamic_slice(x, *starts, slice_sizes):
    parts = []
    for start, whole, size in zip(starts, x.shape, slice_sizes, strict=True):
        first = min(max(int(start), 0), whole - size)  # one that would leave is moved inside
        parts.append(slice(first, first + size))
    return x[tuple(parts)]


# What only chooses and moves numbers, or counts.
_MOVED = {
    "broadcast_in_dim": _broadcast,
    "concatenate": lambda *xs, dimension: np.concatenate(xs, axis=dimension),
    "convert_element_type": lambda x, *, new_dtype, **_: x.astype(new_dtype),
    "copy": lambda x: x,
    "dynamic_slice": _dynamic_slice,
    "iota": _iota,
    "reduce_and": lambda x, *, axes, **_: np.logical_and.reduce(x, axis=axes),
    "reduce_or": lambda x, *, axes, **_: np.logical_or.reduce(x, axis=axes),
    "reshape": lambda x, *, new_sizes, **_: x.reshape(new_sizes),
    "rev": lambda x, *, dimensions: np.flip(x, dimensions),
    "select_n": lambda which, *cases: np.where(which, *cases[::-1]),
    "slice": _slice,
    "split": lambda x, *, sizes, axis: np.split(x, np.cumsum(sizes)[:-1], axis),
    "squeeze": lambda x, *, dimensions: np.squeeze(x, dimensions),
    "stack": lambda *xs, axis: np.stack(xs, axis),
    "stop_gradient": lambda x: x,
    "transpose": lambda x, *, permutation: np.transpose(x, permutation),
    "unstack": lambda x, *, axis: list(np.moveaxis(x, axis, 0)),
}
_COMPARED = {
    "abs": np.abs,
    "and": np.bitwise_and,
    "eq": np.equal,
    "ge": np.greater_equal,
    "gt": np.greater,
    "is_finite": np.isfinite,
    "le": np.less_equal,
    "lt": np.less,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.bitwise_not,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
_ROUNDED = {
    "add": np.add,
    "add_any": np.add,
    "div": np.divide,
    "integer_pow": np.square,
    "mul": np.multiply,
    "sqrt": np.sqrt,
    "square": np.square,
    "sub": np.subtract,
}
_COMPUTED = _COMPARED | _ROUNDED


def _parts(jaxpr):
    """The equations of a function and its constants; JAX 0.12 has no closed ones any more."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def _add_operations(jaxpr, known, operations):
    """Appends each that a function does, also where it calls another one, with which operands are
    known beforehand; returns which results are."""
    function, _ = _parts(jaxpr)
    of = dict(zip(function.invars, known, strict=True)) | dict.fromkeys(function.constvars, True)
    is_known = lambda atom: hasattr(atom, "val") or of[atom]
    for equation in function.eqns:
        operands = [is_known(atom) for atom in equation.invars]
        if equation.primitive.name == "jit":
            results = _add_operations(equation.params["jaxpr"], operands, operations)
        else:
            operations.append((equation, operands))
            results = [all(operands)] * len(equation.outvars)
        of.update(zip(equation.outvars, results, strict=True))
    return [is_known(atom) for atom in function.outvars]


def _is_covered(equation, known):
    name, dtype = equation.primitive.name, _BOOL
    if equation.invars:
        dtype = equation.invars[0].aval.dtype
    match name:
        case "select_n":
            return dtype == _BOOL
        case "reshape":
            return equation.params["dimensions"] is None
        case "reduce_and" | "reduce_or":
            return dtype == _BOOL
        case "convert_element_type":
            # Numbers that are no integers of the range may become anything.
            return dtype not in _FLOATS or equation.params["new_dtype"] == dtype
        case "add":
            # Of what is known XLA makes another program: x + 0 is x, even if that is -0,
            return dtype not in _FLOATS or not any(known)
        case "div":
            # and x / 3 is a product, as is a quotient by one number for all.
            shapes = {variable.aval.shape for variable in (*equation.invars, *equation.outvars)}
            return dtype in _FLOATS and not any(known) and len(shapes) == 1
        case "sqrt":
            return dtype in _FLOATS
        case "integer_pow":
            return equation.params["y"] == 2
        case _:
            return name in _MOVED or name in _COMPUTED


def _is_usual(variable):
    aval = variable.aval
    return getattr(aval, "dtype", None) in _DTYPES and aval.size <= _LARGEST


def _is_exact(jaxpr):
    rounded, operations = 0, []
    function, _ = _parts(jaxpr)
    if not all(map(_is_usual, (*function.invars, *function.outvars))):
        return False
    _add_operations(jaxpr, [False] * len(function.invars), operations)
    for equation, known in operations:
        variables = (*equation.invars, *equation.outvars)
        if not all(map(_is_usual, variables)) or not _is_covered(equation, known):
            return False
        rounded += equation.primitive.name in _ROUNDED and variables[0].aval.dtype in _FLOATS
    names = {equation.primitive.name for equation, _ in operations}
    # A compiler may round a product and its sum once.
    return rounded <= 1 and not {"div", "broadcast_in_dim"} <= names


class _Subnormal(Exception):
    """A number that XLA takes for zero."""


def _normal(x):
    if x.dtype in _FLOATS and x.size:
        size = np.abs(x)
        if np.any((size > 0) & (size < np.finfo(x.dtype).tiny)):
            raise _Subnormal
    return x


def _evaluated(jaxpr, arguments):
    jaxpr, constants = _parts(jaxpr)
    values = dict(zip(jaxpr.constvars, map(np.asarray, constants), strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        xs = [
            np.asarray(atom.val, atom.aval.dtype) if hasattr(atom, "val") else values[atom]
            for atom in equation.invars
        ]
        if name == "jit":
            results = _evaluated(equation.params["jaxpr"], xs)
        elif name in _MOVED:
            results = _MOVED[name](*xs, **equation.params)
            results = results if equation.primitive.multiple_results else [results]
        else:
            results = [_normal(np.asarray(_COMPUTED[name](*map(_normal, xs))))]
        values.update(zip(equation.outvars, results, strict=True))
    return [
        np.asarray(atom.val, atom.aval.dtype) if hasattr(atom, "val") else values[atom]
        for atom in jaxpr.outvars
    ]


def _is_plain(x):
    if isinstance(x, jax.Array):
        return type(x.sharding) is SingleDeviceSharding and not (x._committed or x.is_deleted())
    return isinstance(x, np.ndarray | np.generic | int | float | bool)


_exact = weakref.WeakKeyDictionary()
_compiling = pjit._pjit_call_impl_python


def _is_simple(arguments, *, jaxpr, **parameters):
    """Whether arguments and results are whole arrays on the one device, and nothing is debugged."""
    function, _ = _parts(jaxpr)
    if function not in _exact:
        _exact[function] = _is_exact(function)
    placements = [parameters[f"{way}_shardings"] for way in ("in", "out")]
    layouts = [parameters[f"{way}_layouts"] for way in ("in", "out")]
    return (
        _exact[function]
        and not any(parameters["donated_invars"])
        and all(placement is UNSPECIFIED for placement in itertools.chain(*placements))
        and all(layout is None for layout in itertools.chain(*layouts))
        and parameters["ctx_mesh"].empty
        and not (jax.config.jax_debug_nans or jax.config.jax_debug_infs)
        and jax.config.jax_default_device is None
        and all(map(_is_plain, arguments))
    )


def _results(arguments, parameters):
    """Of NumPy, or None."""
    if not _is_simple(arguments, **parameters):
        return None
    function, _ = _parts(parameters["jaxpr"])
    inputs = [
        np.asarray(x, variable.aval.dtype)
        for x, variable in zip(arguments, function.invars, strict=True)
    ]
    try:
        with np.errstate(all="ignore"):
            return _evaluated(parameters["jaxpr"], inputs)
    except _Subnormal:
        return None


def _without_compiler(*arguments, **parameters):
    """In place of a function of JAX that compiles a program and calls it."""
    results = _results(arguments, parameters)
    if results is None:
        return _compiling(*arguments, **parameters)
    [device] = jax.local_devices()[:1]
    outputs = [
        # A copy: never the memory of another array, which its owner may give away.
        pxla.batched_device_put(
            aval, SingleDeviceSharding(device), [np.array(x, aval.dtype)], [device], committed=False
        )
        for x, aval in zip(results, parameters["jaxpr"].out_avals, strict=True)
    ]
    return outputs, None, None, ()


def use_numpy(on=True):
    """From here on; `on=False` compiles everything again, as for users."""
    pjit._pjit_call_impl_python = _without_compiler if on else _compiling


@contextlib.contextmanager
def compiled():
    """Compiles everything, for tests of what is compiled."""
    before = pjit._pjit_call_impl_python
    use_numpy(on=False)
    try:
        yield
    finally:
        pjit._pjit_call_impl_python = before
