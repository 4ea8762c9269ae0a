"""What JAX's operations are in NumPy: those that small matrices and decisions are made of.

A rule takes the parameters of an equation and the types of its results, and gives the function of
its operands. That returns an array, or a list of arrays where the operation has several results.
They have the types that JAX gives them; sums are NumPy's, which adds in another order.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from regjax import _draws, _lapack

Operation = Callable[..., Any]
Rule = Callable[[Any, Any], Operation]

ELEMENTARY: dict[str, Rule] = {}
"""Primitive's name -> rule(parameters, types of the results)."""


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        ELEMENTARY.update(dict.fromkeys(names, rule))
        return rule

    return register


def _elementwise(function: Any) -> Rule:
    return lambda parameters, types: function


def _reduction(function: Operation) -> Rule:
    return lambda parameters, types: functools.partial(function, axis=parameters["axes"])


ELEMENTARY |= {
    name: _elementwise(function)
    for name, function in {
        "abs": np.abs, "add": np.add, "and": np.bitwise_and, "ceil": np.ceil, "copy": np.array,
        "copy_p": np.array, "cos": np.cos, "eq": np.equal, "exp": np.exp, "expm1": np.expm1,
        "floor": np.floor, "ge": np.greater_equal, "gt": np.greater, "is_finite": np.isfinite,
        "le": np.less_equal, "log": np.log, "log1p": np.log1p, "lt": np.less, "max": np.maximum,
        "min": np.minimum, "mul": np.multiply, "ne": np.not_equal, "neg": np.negative,
        "not": np.invert, "or": np.bitwise_or, "pow": np.power, "rem": np.fmod,
        "shift_left": np.left_shift, "shift_right_arithmetic": np.right_shift, "sign": np.sign,
        "sin": np.sin, "sqrt": np.sqrt, "square": np.square, "stop_gradient": np.asarray,
        "sub": np.subtract, "tanh": np.tanh, "xor": np.bitwise_xor,
    }.items()
}  # fmt: skip
ELEMENTARY |= {
    "clamp": _elementwise(lambda least, array, most: np.minimum(np.maximum(array, least), most)),
    "reduce_and": _reduction(np.logical_and.reduce),
    "reduce_max": _reduction(np.maximum.reduce),
    "reduce_min": _reduction(np.minimum.reduce),
    "reduce_or": _reduction(np.logical_or.reduce),
}


@_rule("div")
def _divide(parameters: Any, types: Any) -> Operation:
    if np.issubdtype(types[0].dtype, np.inexact):
        return np.divide
    # Towards zero.
    return lambda one, other: np.sign(one) * np.sign(other) * (np.abs(one) // np.abs(other))


@_rule("integer_pow")
def _integer_power(parameters: Any, types: Any) -> Operation:
    exponent = np.asarray(parameters["y"], types[0].dtype)
    return np.square if exponent == 2 else lambda base: np.power(base, exponent)


@_rule("select_n")
def _select(parameters: Any, types: Any) -> Operation:
    def selected(which: Any, *cases: Any) -> Any:
        return np.where(which, cases[1], cases[0]) if len(cases) == 2 else np.choose(which, cases)

    return selected


@_rule("convert_element_type")
def _converted(parameters: Any, types: Any) -> Operation:
    dtype = types[0].dtype
    return lambda array: array.astype(dtype)


@_rule("bitcast_convert_type")
def _bits(parameters: Any, types: Any) -> Operation:
    dtype = types[0].dtype
    return lambda array: array.view(dtype)


@_rule("reduce_sum")
def _sum(parameters: Any, types: Any) -> Operation:
    return functools.partial(np.add.reduce, axis=parameters["axes"], dtype=types[0].dtype)


@_rule("cumsum")
def _cumulative_sum(parameters: Any, types: Any) -> Operation:
    axis, dtype = parameters["axis"], types[0].dtype
    if not parameters["reverse"]:
        return lambda array: np.cumsum(array, axis, dtype)
    return lambda array: np.flip(np.cumsum(np.flip(array, axis), axis, dtype), axis)


@_rule("platform_index")
def _platform(parameters: Any, types: Any) -> Operation:
    fits = [names is None or "cpu" in names for names in parameters["platforms"]]
    return lambda: np.asarray(fits.index(True), np.int32)


@_rule("broadcast_in_dim")
def _broadcast(parameters: Any, types: Any) -> Operation:
    (kind,), lengths = types, [1] * len(types[0].shape)
    places = parameters["broadcast_dimensions"]

    def spread(array: Any) -> np.ndarray:
        for place, length in zip(places, array.shape, strict=True):
            lengths[place] = length
        found = np.empty(kind.shape, array.dtype)
        found[...] = array.reshape(lengths)
        return found

    return spread


@_rule("reshape", "squeeze", "expand_dims")
def _reshaped(parameters: Any, types: Any) -> Operation:
    shape = types[0].shape
    return lambda array: array.reshape(shape)


@_rule("transpose")
def _transposed(parameters: Any, types: Any) -> Operation:
    order = parameters["permutation"]
    return lambda array: array.transpose(order)


@_rule("rev")
def _flipped(parameters: Any, types: Any) -> Operation:
    axes = parameters["dimensions"]
    return lambda array: np.flip(array, axes)


@_rule("iota")
def _iota(parameters: Any, types: Any) -> Operation:
    (kind,), axis = types, parameters["dimension"]
    lengths = [length if i == axis else 1 for i, length in enumerate(kind.shape)]
    places = np.arange(kind.shape[axis], dtype=kind.dtype).reshape(lengths)
    return lambda: np.broadcast_to(places, kind.shape)


@_rule("concatenate")
def _concatenated(parameters: Any, types: Any) -> Operation:
    axis = parameters["dimension"]
    return lambda *arrays: np.concatenate(arrays, axis)


@_rule("stack")
def _stacked(parameters: Any, types: Any) -> Operation:
    axis = parameters["axis"]
    return lambda *arrays: np.stack(arrays, axis)


@_rule("unstack")
def _unstacked(parameters: Any, types: Any) -> Operation:
    axis = parameters["axis"]
    return lambda array: list(np.moveaxis(array, axis, 0))


@_rule("split")
def _split(parameters: Any, types: Any) -> Operation:
    cuts, axis = np.cumsum(parameters["sizes"])[:-1], parameters["axis"]
    return lambda array: np.split(array, cuts, axis)


@_rule("pad")
def _padded(parameters: Any, types: Any) -> Operation:
    (kind,) = types

    def padded(array: Any, filling: Any) -> np.ndarray:
        into, out_of = [], []
        sizes = zip(parameters["padding_config"], array.shape, kind.shape, strict=True)
        for (low, _, between), length, total in sizes:
            places = low + np.arange(length) * (between + 1)
            kept = (places >= 0) & (places < total)
            into.append(places[kept])
            out_of.append(np.flatnonzero(kept))
        found = np.full(kind.shape, filling, kind.dtype)
        found[np.ix_(*into)] = array[np.ix_(*out_of)]
        return found

    return padded


@_rule("slice")
def _slice(parameters: Any, types: Any) -> Operation:
    starts, limits = parameters["start_indices"], parameters["limit_indices"]
    window = tuple(map(slice, starts, limits, parameters["strides"] or (1,) * len(starts)))
    return lambda array: array[window]


@_rule("dynamic_slice")
def _dynamic_slice(parameters: Any, types: Any) -> Operation:
    sizes = parameters["slice_sizes"]
    return lambda array, *starts: array[_window(array.shape, starts, sizes)]


@_rule("dynamic_update_slice")
def _dynamic_update_slice(parameters: Any, types: Any) -> Operation:
    def updated(array: Any, part: Any, *starts: Any) -> np.ndarray:
        changed = np.array(array)
        changed[_window(changed.shape, starts, part.shape)] = part
        return changed

    return updated


def _window(shape: Any, starts: Any, sizes: Any) -> tuple[slice, ...]:
    given = zip(starts, shape, sizes, strict=True)
    firsts = [min(max(int(start), 0), length - size) for start, length, size in given]
    return tuple(slice(first, first + size) for first, size in zip(firsts, sizes, strict=True))


@_rule("sort")
def _sorted(parameters: Any, types: Any) -> Operation:
    axis, num_keys = parameters["dimension"], parameters["num_keys"]

    def ordered(*arrays: Any) -> list[np.ndarray]:
        if num_keys > 1:
            order = np.lexsort(arrays[num_keys - 1 :: -1], axis)
        else:
            order = np.argsort(arrays[0], axis, kind="stable")
        return [np.take_along_axis(array, order, axis) for array in arrays]

    return ordered


@_rule("dot_general")
def _product(parameters: Any, types: Any) -> Operation:
    (contracted, summed), (batch, others) = parameters["dimension_numbers"]
    dtype = types[0].dtype

    def product(one: Any, other: Any) -> Any:
        letters = iter("abcdefghijklmnopqrstuvwxyz")
        names = [next(letters) for _ in range(one.ndim)]
        shared = dict(zip((*others, *summed), (*batch, *contracted), strict=True))
        theirs = [names[shared[i]] if i in shared else next(letters) for i in range(other.ndim)]
        kept = [name for i, name in enumerate(names) if i not in {*batch, *contracted}]
        kept += [name for i, name in enumerate(theirs) if i not in shared]
        result = "".join([*(names[i] for i in batch), *kept])
        return np.einsum(f"{''.join(names)},{''.join(theirs)}->{result}", one, other, dtype=dtype)

    return product if batch else lambda one, other: np.tensordot(one, other, (contracted, summed))


@_rule("eigh")
def _eigenpairs(parameters: Any, types: Any) -> Operation:
    is_lower = parameters["lower"]
    return lambda matrix: list(reversed(_lapack.eigh(matrix, lower=is_lower)))


def is_key(dtype: Any) -> bool:
    """Whether a type is that of JAX's own keys, made by their places: a number of two words here.

    Raises:
      NotImplementedError: it is one of other keys.
    """
    if not jax.numpy.issubdtype(dtype, jax.dtypes.prng_key):
        return False
    if str(dtype) != "key<fry>" or not _draws.partitionable():
        raise NotImplementedError(str(dtype))
    return True


@_rule("random_split")
def _split_keys(parameters: Any, types: Any) -> Operation:
    shape = tuple(parameters["shape"])
    counts = np.arange(np.prod(shape, dtype=int), dtype=np.uint32).reshape(shape)
    zeros = np.zeros_like(counts)
    return lambda keys: _threefry(keys.reshape(keys.shape + (1,) * len(shape)), zeros, counts)


@_rule("random_fold_in")
def _fold_in(parameters: Any, types: Any) -> Operation:
    return lambda keys, number: _threefry(keys, np.uint32(0), number.astype(np.uint32))


def _threefry(keys: Any, high: Any, low: Any) -> np.ndarray:
    """Threefry of two words with 20 rounds (Salmon et al. 2011), as `jax.random` has it."""
    first, second = (keys >> np.uint64(32)).astype(np.uint32), keys.astype(np.uint32)
    schedule = first, second, first ^ second ^ np.uint32(0x1BD11BDA)
    one, other = high + first, low + second
    for i in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            one = one + other
            other = one ^ ((other << np.uint32(turn)) | (other >> np.uint32(32 - turn)))
        one = one + schedule[(i + 1) % 3]
        other = other + schedule[(i + 2) % 3] + np.uint32(i + 1)
    return (one.astype(np.uint64) << np.uint64(32)) | other.astype(np.uint64)
