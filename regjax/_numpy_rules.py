"""What JAX's operations are in NumPy: those that small matrices and decisions are made of.

Each rule takes the operands, the parameters of the equation and the types of its results, and gives
an array, or a list of arrays where the operation has several results. Results have the dtypes that
JAX gives them; sums are NumPy's, which adds in another order.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import threadpoolctl
from scipy.linalg import lapack

from regjax import _draws

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
"""Primitive's name -> rule(operands, parameters, types of the results)."""


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def _elementwise(function: Callable[..., Any]) -> Rule:
    return lambda operands, parameters, types: function(*operands)


def _reduction(function: Callable[..., Any]) -> Rule:
    return lambda operands, parameters, types: function(operands[0], axis=parameters["axes"])


RULES |= {
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
RULES |= {
    "reduce_and": _reduction(np.all),
    "reduce_max": _reduction(np.max),
    "reduce_min": _reduction(np.min),
    "reduce_or": _reduction(np.any),
}


@_rule("div")
def _divide(operands: Any, parameters: Any, types: Any) -> Any:
    if np.issubdtype(types[0].dtype, np.inexact):
        return np.divide(*operands)
    one, other = operands
    return np.sign(one) * np.sign(other) * (np.abs(one) // np.abs(other))  # towards zero


@_rule("integer_pow")
def _integer_power(operands: Any, parameters: Any, types: Any) -> Any:
    base, exponent = operands[0], parameters["y"]
    if exponent == 2:
        return np.square(base)
    return np.power(base, np.asarray(exponent, types[0].dtype))


@_rule("clamp")
def _clamp(operands: Any, parameters: Any, types: Any) -> Any:
    least, array, most = operands
    return np.minimum(np.maximum(array, least), most)


@_rule("select_n")
def _select(operands: Any, parameters: Any, types: Any) -> Any:
    which, *cases = operands
    if len(cases) == 2 and np.asarray(which).dtype == bool:
        return np.where(which, cases[1], cases[0])
    return np.choose(which, cases)


@_rule("convert_element_type")
def _converted(operands: Any, parameters: Any, types: Any) -> Any:
    return np.asarray(operands[0]).astype(types[0].dtype)


@_rule("bitcast_convert_type")
def _bits(operands: Any, parameters: Any, types: Any) -> Any:
    return np.asarray(operands[0]).view(types[0].dtype)


@_rule("reduce_sum")
def _sum(operands: Any, parameters: Any, types: Any) -> Any:
    return np.sum(operands[0], axis=parameters["axes"], dtype=types[0].dtype)


@_rule("cumsum")
def _cumulative_sum(operands: Any, parameters: Any, types: Any) -> Any:
    axis, flip = parameters["axis"], parameters["reverse"]
    array = np.flip(operands[0], axis) if flip else operands[0]
    sums = np.cumsum(array, axis, dtype=types[0].dtype)
    return np.flip(sums, axis) if flip else sums


@_rule("platform_index")
def _platform(operands: Any, parameters: Any, types: Any) -> Any:
    names = parameters["platforms"]
    fits = [name is None or "cpu" in name for name in names]
    return np.int32(fits.index(True))


@_rule("broadcast_in_dim")
def _broadcast(operands: Any, parameters: Any, types: Any) -> Any:
    shape, places = parameters["shape"], parameters["broadcast_dimensions"]
    array, lengths = np.asarray(operands[0]), [1] * len(shape)
    for place, length in zip(places, array.shape, strict=True):
        lengths[place] = length
    return np.broadcast_to(array.reshape(lengths), shape)


@_rule("reshape", "squeeze", "expand_dims")
def _reshaped(operands: Any, parameters: Any, types: Any) -> Any:
    return np.reshape(operands[0], types[0].shape)


@_rule("transpose")
def _transposed(operands: Any, parameters: Any, types: Any) -> Any:
    return np.transpose(operands[0], parameters["permutation"])


@_rule("rev")
def _flipped(operands: Any, parameters: Any, types: Any) -> Any:
    return np.flip(operands[0], parameters["dimensions"])


@_rule("iota")
def _iota(operands: Any, parameters: Any, types: Any) -> Any:
    axis, shape = parameters["dimension"], types[0].shape
    lengths = [1] * len(shape)
    lengths[axis] = shape[axis]
    return np.broadcast_to(np.arange(shape[axis], dtype=types[0].dtype).reshape(lengths), shape)


@_rule("concatenate")
def _concatenated(operands: Any, parameters: Any, types: Any) -> Any:
    return np.concatenate(operands, parameters["dimension"])


@_rule("stack")
def _stacked(operands: Any, parameters: Any, types: Any) -> Any:
    return np.reshape(np.stack(operands, parameters["axis"]), types[0].shape)


@_rule("split")
def _split(operands: Any, parameters: Any, types: Any) -> Any:
    return np.split(operands[0], np.cumsum(parameters["sizes"])[:-1], parameters["axis"])


@_rule("pad")
def _padded(operands: Any, parameters: Any, types: Any) -> Any:
    array, filling = operands
    padded = np.full(types[0].shape, filling, types[0].dtype)
    into, out_of = [], []
    for (low, _, between), length, total in zip(
        parameters["padding_config"], np.shape(array), types[0].shape, strict=True
    ):
        places = low + np.arange(length) * (between + 1)
        kept = (places >= 0) & (places < total)
        into.append(places[kept])
        out_of.append(np.flatnonzero(kept))
    padded[np.ix_(*into)] = array[np.ix_(*out_of)]
    return padded


@_rule("slice")
def _slice(operands: Any, parameters: Any, types: Any) -> Any:
    starts, limits = parameters["start_indices"], parameters["limit_indices"]
    steps = parameters["strides"] or (1,) * len(starts)
    return operands[0][tuple(map(slice, starts, limits, steps))]


@_rule("dynamic_slice")
def _dynamic_slice(operands: Any, parameters: Any, types: Any) -> Any:
    array, *starts = operands
    return array[_window(array.shape, starts, parameters["slice_sizes"])]


@_rule("dynamic_update_slice")
def _dynamic_update_slice(operands: Any, parameters: Any, types: Any) -> Any:
    array, part, *starts = operands
    changed = np.array(array)
    changed[_window(changed.shape, starts, np.shape(part))] = part
    return changed


def _window(shape: Any, starts: Any, sizes: Any) -> tuple[slice, ...]:
    firsts = [
        min(max(int(start), 0), length - size)
        for start, length, size in zip(starts, shape, sizes, strict=True)
    ]
    return tuple(slice(first, first + size) for first, size in zip(firsts, sizes, strict=True))


@_rule("gather")
def _gather(operands: Any, parameters: Any, types: Any) -> Any:
    array, indices = operands
    form = parameters["dimension_numbers"]
    places, is_inside = _places(
        array.shape, indices, types[0].shape, parameters["slice_sizes"], form.offset_dims,
        (*form.collapsed_slice_dims, *form.operand_batching_dims), form.start_index_map,
        tuple(zip(form.operand_batching_dims, form.start_indices_batching_dims, strict=True)),
    )  # fmt: skip
    found = array[places]
    if is_inside is None or parameters["mode"] != jax.lax.GatherScatterMode.FILL_OR_DROP:
        return found
    filling = parameters["fill_value"]
    if filling is None:
        filling = np.nan if np.issubdtype(array.dtype, np.inexact) else 0
    return np.where(is_inside, found, np.asarray(filling, array.dtype))


def _places(
    shape: Any, indices: Any, result: Any, sizes: Any, offsets: Any, dropped: Any,
    targets: Any, batching: Any,
) -> tuple[tuple[np.ndarray, ...], np.ndarray | None]:  # fmt: skip
    """Where each element of a gather's result, or of a scatter's updates, is in the array.

    Returns:
      An index for each axis of the array; whether it lies inside, None if all do.
    """
    rank = len(result)
    batch = [axis for axis in range(rank) if axis not in offsets]

    def along(axis: int) -> np.ndarray:
        lengths = [1] * rank
        lengths[axis] = result[axis]
        return np.arange(result[axis]).reshape(lengths)

    def spread(values: np.ndarray) -> np.ndarray:
        lengths = [1] * rank
        for axis in batch:
            lengths[axis] = result[axis]
        return values.reshape(lengths)

    window = iter(offsets)
    places: list[Any] = []
    is_inside: Any = None
    for axis, (length, size) in enumerate(zip(shape, sizes, strict=True)):
        place: Any = np.zeros((1,) * rank, int)
        if axis in targets:
            start = spread(np.asarray(indices)[..., targets.index(axis)].astype(int))
            clipped = np.clip(start, 0, length - size)
            if (clipped != start).any():
                inside = clipped == start
                is_inside = inside if is_inside is None else is_inside & inside
            place = clipped
        for own, other in batching:
            if own == axis:
                place = along(batch[other])
        if axis not in dropped:
            place = place + along(next(window))
        places.append(place)
    return tuple(places), is_inside


def _scattered(operands: Any, parameters: Any, types: Any, *, adds: bool) -> Any:
    array, indices, updates = operands
    form = parameters["dimension_numbers"]
    dropped = (*form.inserted_window_dims, *form.operand_batching_dims)
    window = iter(form.update_window_dims)
    sizes = [
        1 if axis in dropped else np.shape(updates)[next(window)] for axis in range(array.ndim)
    ]
    places, is_inside = _places(
        array.shape, indices, np.shape(updates), sizes, form.update_window_dims, dropped,
        form.scatter_dims_to_operand_dims,
        tuple(zip(form.operand_batching_dims, form.scatter_indices_batching_dims, strict=True)),
    )  # fmt: skip
    places = tuple(np.broadcast_arrays(*places, updates)[:-1])
    updates, changed = np.asarray(updates), np.array(array)
    if is_inside is not None and parameters["mode"] != jax.lax.GatherScatterMode.CLIP:
        kept = np.broadcast_to(is_inside, updates.shape)
        places, updates = tuple(place[kept] for place in places), updates[kept]
    if adds:
        np.add.at(changed, places, updates)
    else:
        changed[places] = updates
    return changed


RULES["scatter"] = lambda *given: _scattered(*given, adds=False)
RULES["scatter-add"] = RULES["scatter_add"] = lambda *given: _scattered(*given, adds=True)


@_rule("sort")
def _sorted(operands: Any, parameters: Any, types: Any) -> Any:
    axis, num_keys = parameters["dimension"], parameters["num_keys"]
    if num_keys > 1:
        order = np.lexsort(operands[num_keys - 1 :: -1], axis)
    else:
        order = np.argsort(operands[0], axis, kind="stable")
    return [np.take_along_axis(operand, order, axis) for operand in operands]


@_rule("dot_general")
def _product(operands: Any, parameters: Any, types: Any) -> Any:
    one, other = operands
    (contracted, summed), (batch, others) = parameters["dimension_numbers"]
    if not batch:
        return np.tensordot(one, other, (contracted, summed)).astype(types[0].dtype)
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    names = [next(letters) for _ in range(one.ndim)]
    shared = dict(zip((*others, *summed), (*batch, *contracted), strict=True))
    theirs = [names[shared[i]] if i in shared else next(letters) for i in range(other.ndim)]
    given = {*batch, *contracted}
    kept = [name for i, name in enumerate(names) if i not in given]
    kept += [name for i, name in enumerate(theirs) if i not in shared]
    result = "".join([*(names[i] for i in batch), *kept])
    return np.einsum(f"{''.join(names)},{''.join(theirs)}->{result}", one, other)


def keys(dtype: Any) -> bool:
    """Whether a type is that of JAX's own keys, made by their places.

    Raises:
      NotImplementedError: it is one of other keys.
    """
    if not jax.numpy.issubdtype(dtype, jax.dtypes.prng_key):
        return False
    if str(dtype) != "key<fry>" or not _draws.partitionable():
        raise NotImplementedError(str(dtype))
    return True


# A key is one number here, of its two words.
@_rule("random_split")
def _split_keys(operands: Any, parameters: Any, types: Any) -> Any:
    shape = tuple(parameters["shape"])
    counts = np.arange(np.prod(shape, dtype=int), dtype=np.uint32).reshape(shape)
    key = np.reshape(operands[0], np.shape(operands[0]) + (1,) * len(shape))
    return _threefry(key, np.zeros_like(counts), counts)


@_rule("random_fold_in")
def _fold_in(operands: Any, parameters: Any, types: Any) -> Any:
    key, number = operands
    return _threefry(key, np.uint32(0), np.asarray(number).astype(np.uint32))


def _threefry(keys: Any, high: Any, low: Any) -> np.ndarray:
    """Threefry of two words with 20 rounds (Salmon et al. 2011), as `jax.random` has it."""
    words = np.asarray(keys, np.uint64)
    first, second = (words >> np.uint64(32)).astype(np.uint32), words.astype(np.uint32)
    schedule = first, second, first ^ second ^ np.uint32(0x1BD11BDA)
    one, other = high + first, low + second
    for i in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            one = one + other
            other = (other << np.uint32(turn)) | (other >> np.uint32(32 - turn))
            other = one ^ other
        one = one + schedule[(i + 1) % 3]
        other = other + schedule[(i + 2) % 3] + np.uint32(i + 1)
    return (one.astype(np.uint64) << np.uint64(32)) | other.astype(np.uint64)


@functools.cache
def _libraries() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController()


@_rule("eigh")
def _eigenpairs(operands: Any, parameters: Any, types: Any) -> Any:
    matrix = np.asarray(operands[0])
    solve = lapack.ssyevd if matrix.dtype == np.float32 else lapack.dsyevd
    stack = matrix.reshape(-1, *matrix.shape[-2:])
    # The threads of a library wait for each other, and for those of XLA: for a matrix of order 320
    # two took 50 times as long as one on a busy machine.
    with _libraries().limit(limits=1, user_api="blas"):
        found = [solve(one, lower=parameters["lower"]) for one in stack]
    # LAPACK's vectors are by columns in memory; what did not converge is NaN, as in JAX.
    values = np.stack([np.where(info == 0, values, np.nan) for values, _, info in found])
    vectors = np.stack([np.where(info == 0, vectors, np.nan) for _, vectors, info in found])
    dtype = matrix.dtype
    results = vectors.astype(dtype), values.astype(dtype)
    return [np.reshape(array, kind.shape) for array, kind in zip(results, types, strict=True)]
