"""Trace and diagonal from random products, with standard errors; and the dense spectrum.

Hutchinson's estimator averages z' A z over random signs z. Hutch++ first captures the range that
matters: with Q an orthonormal basis of A's image of s random vectors, the trace and the diagonal of
QQ' A are computed exactly and only those of the remainder are sampled, by u = (I - QQ') z: the
mean of u * A u has the expectation diag((I - QQ') A).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from regjax import _checks, _loops, _tree
from regjax._sharding import Columns
from regjax.curvature import _allocation
from regjax.curvature._accumulation import inner_products
from regjax.curvature._operators import Operator, block_product, product
from regjax.curvature._precision import precisely

_METHODS = ("hutchinson", "hutch++")


class TraceResult(NamedTuple):
    """An estimate of the trace.

    Attributes:
      value: (), the sum of the eigenvalues.
      standard_error: (), over the draw of the probes; NaN with a single one.
      num_matvecs: (), int32, products used.
    """

    value: jax.Array
    standard_error: jax.Array
    num_matvecs: jax.Array


class DiagonalResult(NamedTuple):
    """An estimate of the diagonal.

    Attributes:
      value: tree like the parameters.
      standard_error: tree like the parameters, of each entry; NaN with a single probe.
      num_matvecs: (), int32, products used.
    """

    value: Any
    standard_error: Any
    num_matvecs: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["key", "vectors", "rows", "images", "mean", "squares", "count"],
    meta_fields=["num_rows", "total", "block", "columns"],
)
@dataclasses.dataclass(frozen=True)
class EstimatorState:
    """The estimator between two products; trace and diagonal share it.

    Attributes:
      key: typed key.
      vectors: (block, n), what the next products take.
      rows: (s, n), first the images of random signs, then their orthonormal basis Q; divided as
        `columns` says.
      images: (s, n), rows of (A Q)'; likewise.
      mean: (n,) or (), running mean over the probes of u * A u, or of its sum.
      squares: the same shape, running sum of squared deviations from the mean.
      count: (), int32, products so far that count.
      num_rows: s. total: number of products.
      block: number of products at once, 1 or s or, without Q, all. Beyond the total they are idle.
      columns: whether and how the n columns are divided over devices.
    """

    key: jax.Array
    vectors: jax.Array
    rows: jax.Array
    images: jax.Array
    mean: jax.Array
    squares: jax.Array
    count: jax.Array
    num_rows: int
    total: int
    block: int
    columns: Columns


def trace(
    operator: Operator,
    *,
    key: jax.Array,
    num_probes: int,
    method: str = "hutchinson",
    callback: Callable[[int, int], None] | None = None,
) -> TraceResult:
    """The trace by random products.

    Args:
      operator: symmetric, of order n.
      key: typed key of the random signs.
      num_probes: number of products in all; Hutch++ spends two thirds of them (rounded down to an
        even number, n at most each way) on the range.
      method: "hutchinson", or "hutch++", better where a few eigenvalues dominate.
      callback: called as callback(products, num_probes) after each product, or each block of them,
        when the host drives.

    Returns:
      A `TraceResult`; unbiased.

    Raises:
      ValueError: `method` is unknown, or `num_probes` below 1 (below 3 for Hutch++).
      MemoryError: the device has no room; names what to lower, with the bytes that are needed.
      Interrupted: Ctrl-C; its `.result` is the estimate of the probes so far.

    References:
      M. Hutchinson (1990), Communications in Statistics 19(2). R. Meyer, C. Musco, C. Musco,
      D. Woodruff (2021), Hutch++, arXiv:2010.09649, algorithm 1.
    """
    init = functools.partial(trace_init, key=key, num_probes=num_probes, method=method)
    return _run("trace", operator, init, trace_result, callback)


def diagonal(
    operator: Operator,
    *,
    key: jax.Array,
    num_probes: int,
    method: str = "hutchinson",
    callback: Callable[[int, int], None] | None = None,
) -> DiagonalResult:
    """The diagonal by random products.

    Args:
      operator: symmetric, of order n.
      key: typed key of the random signs.
      num_probes: number of products in all, split as in `trace`.
      method: "hutchinson": the mean of z * A z. "hutch++": the diagonal of QQ' A exactly, the
        mean of u * A u for the remainder.
      callback: called as callback(products, num_probes) after each product, or each block of them,
        when the host drives.

    Returns:
      A `DiagonalResult`; unbiased.

    Raises:
      ValueError: `method` is unknown, or `num_probes` below 1 (below 3 for Hutch++).
      MemoryError: the device has no room; names what to lower, with the bytes that are needed.
      Interrupted: Ctrl-C; its `.result` is the estimate of the probes so far.

    References:
      C. Bekas, E. Kokiopoulou, Y. Saad (2007), An estimator for the diagonal of a matrix, Applied
      Numerical Mathematics 57. The Hutch++ form is its direct analogue.
    """
    init = functools.partial(diagonal_init, key=key, num_probes=num_probes, method=method)
    result = functools.partial(diagonal_result, operator)
    return _run("diagonal", operator, init, result, callback)


def trace_init(
    operator: Operator, *, key: jax.Array, num_probes: int, method: str = "hutchinson"
) -> EstimatorState:
    """The state before the first product; arguments as in `trace`."""
    return _init(operator, key, num_probes, method, jnp.zeros((), operator.dtype))


def diagonal_init(
    operator: Operator, *, key: jax.Array, num_probes: int, method: str = "hutchinson"
) -> EstimatorState:
    """The state before the first product; arguments as in `diagonal`."""
    return _init(operator, key, num_probes, method, jnp.zeros(operator.shape[0], operator.dtype))


def estimator_step(operator: Operator, state: EstimatorState) -> EstimatorState:
    """One block of products, for `trace` and `diagonal` alike; `state` is donated from Python."""
    if state.block == 1:
        images = product(operator, state.vectors[0])[None]
    else:
        images = block_product(operator, state.vectors)
    state = _absorb(state, images)
    if state.num_rows:
        state = _loops.branch(state.count == state.num_rows, _orthonormalise, state)
    return _draw(state)


def trace_result(state: EstimatorState) -> TraceResult:
    """The trace after the products done so far."""
    value = state.mean + jnp.sum(state.rows * state.images)
    return TraceResult(value, _standard_error(state), state.count)


def diagonal_result(operator: Operator, state: EstimatorState) -> DiagonalResult:
    """The diagonal after the products done so far."""
    value = state.mean + state.columns.join(jnp.sum(state.rows * state.images, axis=0))
    return DiagonalResult(
        _tree.unravel(value, operator.params),
        _tree.unravel(_standard_error(state), operator.params),
        state.count,
    )


def exact_spectrum(operator: Operator) -> jax.Array:
    """All eigenvalues of a small matrix, ascending (n,), from its dense form.

    Args:
      operator: symmetric, of order n at most 32768; in float64 if the parameters are.

    Returns:
      Eigenvalues (n,), exact up to rounding of n eps times the largest magnitude.

    Raises:
      ValueError: n is above 32768.
    """
    return jnp.linalg.eigvalsh(operator.dense())


def _run(solver: str, operator: Operator, init: Any, result: Any, callback: Any) -> Any:
    begin = functools.partial(init, operator)
    plan = _allocation.Plan(solver, operator, begin, result, ("num_probes",))
    with _allocation.explained(plan):
        state = begin()
        block, total = state.block, state.total

        def report(count: int, _: int) -> None:
            if callback is not None:
                callback(min(count * block, total), total)

        state = _loops.repeat_until(
            estimator_step,
            state,
            operands=operator,
            done=lambda state: jnp.bool_(False),
            max_steps=-(-total // block),
            result=result,
            callback=report,
        )
        return result(state)


def _init(
    operator: Operator, key: jax.Array, num_probes: int, method: str, zeros: jax.Array
) -> EstimatorState:
    _checks.choice("method", method, _METHODS)
    _checks.integer("num_probes", num_probes, minimum=3 if method == "hutch++" else 1)
    size, dtype, columns = operator.shape[0], operator.dtype, operator.columns
    num_rows = min(num_probes // 3, size) if method == "hutch++" else 0
    # One at a time on CPU, where a block of vectors costs as much as its members.
    block = (num_rows or num_probes) if operator.takes_blocks else 1
    state = EstimatorState(
        key=jax.random.fold_in(_checks.key("key", key), 0),
        vectors=jnp.zeros((block, size), dtype),
        rows=columns.zeros(num_rows, dtype),
        images=columns.zeros(num_rows, dtype),
        mean=zeros,
        squares=zeros.copy(),
        count=jnp.int32(0),
        num_rows=num_rows,
        total=num_probes,
        block=block,
        columns=columns,
    )
    return _draw(columns.copied(state))


@functools.partial(jax.jit, donate_argnums=0)
@precisely
def _draw(state: EstimatorState) -> EstimatorState:
    """The next vectors: random signs, then the rows of Q, then signs outside of Q."""
    key, subkey = jax.random.split(state.key)
    vectors = jax.random.rademacher(subkey, state.vectors.shape, state.vectors.dtype)
    if state.num_rows:
        columns = state.columns
        start = jnp.clip(state.count - state.num_rows, 0, state.num_rows - state.block)
        rows = columns.join(jax.lax.dynamic_slice_in_dim(state.rows, start, state.block))

        def outside(whole: jax.Array) -> jax.Array:
            return whole - inner_products(state.rows, whole, columns) @ state.rows

        rest = columns.join(jax.vmap(outside)(columns.divide(vectors)))
        stage = state.count // state.num_rows
        vectors = jnp.where(stage == 0, vectors, jnp.where(stage == 1, rows, rest))
    return dataclasses.replace(state, key=key, vectors=vectors)


@functools.partial(jax.jit, donate_argnums=0)
@precisely
def _absorb(state: EstimatorState, images: jax.Array) -> EstimatorState:
    count, num_rows = state.count, state.num_rows
    state = _sampled(state, images)
    if num_rows:
        start = count % num_rows
        rows, parts = (state.rows, state.images), state.columns.divide(images)
        is_range = count < num_rows, (count >= num_rows) & (count < 2 * num_rows)

        def put(rows: jax.Array, is_wanted: jax.Array) -> jax.Array:
            there = jax.lax.dynamic_slice_in_dim(rows, start, state.block)
            new = jnp.where(is_wanted, parts, there)
            return state.columns.keep(jax.lax.dynamic_update_slice_in_dim(rows, new, start, 0))

        state = dataclasses.replace(
            state, rows=put(rows[0], is_range[0]), images=put(rows[1], is_range[1])
        )
    return dataclasses.replace(state, count=jnp.minimum(count + state.block, state.total))


def _sampled(state: EstimatorState, images: jax.Array) -> EstimatorState:
    """With the samples of a block of probes, if they are: the mean, and squares about it."""
    samples = state.vectors * images
    if state.mean.ndim == 0:
        samples = jnp.sum(samples, 1)
    before = jnp.maximum(state.count - 2 * state.num_rows, 0)
    new = jnp.minimum(state.total - state.count, state.block)
    is_new = (jnp.arange(state.block) < new).reshape(-1, *[1] * state.mean.ndim)
    before, new = before.astype(samples.dtype), new.astype(samples.dtype)
    mean = jnp.sum(jnp.where(is_new, samples, 0), 0) / new
    squares = jnp.sum(jnp.where(is_new, (samples - mean[None]) ** 2, 0), 0)
    # T. Chan, G. Golub, R. LeVeque (1983), of two parts.
    deviation = mean - state.mean
    mean = state.mean + deviation * new / (before + new)
    squares = state.squares + squares + deviation**2 * before * new / (before + new)
    is_probe = state.count >= 2 * state.num_rows
    return dataclasses.replace(
        state,
        mean=jnp.where(is_probe, mean, state.mean),
        squares=jnp.where(is_probe, squares, state.squares),
    )


@functools.partial(jax.jit, donate_argnums=0)
@precisely
def _orthonormalise(state: EstimatorState) -> EstimatorState:
    """An orthonormal basis of the rows; directions at rounding level are harmless extra ones."""
    return dataclasses.replace(state, rows=state.columns.orthonormal(state.rows))


def _standard_error(state: EstimatorState) -> jax.Array:
    num_probes = (state.count - 2 * state.num_rows).astype(state.squares.dtype)
    variance = state.squares / jnp.maximum(num_probes - 1, 1)
    error = jnp.sqrt(variance / jnp.maximum(num_probes, 1))
    return jnp.where(num_probes > 1, error, jnp.nan)
