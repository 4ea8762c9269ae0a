"""The spectral density: extreme eigenpairs exactly, the rest by stochastic Lanczos quadrature.

Plain quadrature spends its accuracy on the few outliers, which a random probe hardly touches. Here
a first Lanczos run finds the extreme pairs; those that converged are taken out, and the probes see
the complement alone. The mass is split exactly: r eigenvalues weigh 1/n each, the complement the
rest.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from regjax import _checks, _loops
from regjax._base import Callback, PRNGKey, Tree
from regjax.curvature._engine import _basis
from regjax.curvature._engine._accumulation import small_dtype
from regjax.curvature._engine._checkpoint import Checkpoint
from regjax.curvature._engine._driver import run
from regjax.curvature._engine._solver import Solver
from regjax.curvature._lanczos import Krylov, absorb, empty, expand
from regjax.curvature._measure import DensityResult, spectral_sum
from regjax.curvature._operators._operator import Operator
from regjax.curvature._precision import precisely, rounding
from regjax.curvature._ritz import residual_parts, small_pairs

# A Ritz pair is taken out when its residual norm is below this share of the largest |Ritz value|.
# Left-over coupling moves no eigenvalue of the complement by more than the residual norm.
_DEFLATION_TOLERANCE = 1e-3


class Deflation(NamedTuple):
    """The eigenpairs that are taken out.

    Attributes:
      rows: their vectors.
      values: (r,), NaN beyond the rows that are filled.
      residual_norms: (r,), likewise.
    """

    rows: _basis.Basis
    values: jax.Array
    residual_norms: jax.Array


class DensityState(NamedTuple):
    """The probes between two products.

    Attributes:
      key: typed key of the probes to come.
      deflation: what was taken out.
      probes: bases of the probes under way, each leaf with a leading axis of their number.
      nodes: (P, m). weights: (P, m), each probe of mass 1. num_finished: (), int32, probes done.
      num_matvecs: (), int32, products so far, those of the deflation included.
    """

    key: PRNGKey
    deflation: Deflation
    probes: Krylov
    nodes: jax.Array
    weights: jax.Array
    num_finished: jax.Array
    num_matvecs: jax.Array


def spectral_density(
    operator: Operator,
    *,
    key: PRNGKey,
    num_steps: int = 40,
    num_probes: int = 2,
    deflate: int | None = None,
    accumulation: str | None = None,
    callback: Callback | None = None,
    checkpoint: Checkpoint | None = None,
) -> DensityResult:
    """Estimates a spectral density by deflated stochastic Lanczos quadrature.

    Args:
      operator: symmetric, of order n.
      key: typed key of the start and of the probes.
      num_steps: Lanczos steps m a probe, at most n.
      num_probes: number of probes P, Gaussian directions in the complement.
      deflate: products spent on finding extreme eigenpairs to take out, at most n; the vectors
        stay in memory. 0 gives the plain method; None takes 2 `num_steps`.
      accumulation: how inner products of vectors (n,) are summed, as for `lanczos`; with "float64"
        nodes, weights, eigenvalues and what follows from them are float64.
      callback: called as callback(products, total) after each product when the host drives.
      checkpoint: where the state is kept every few products, and found again by the same call after
        the process was killed; only when the host drives.

    Returns:
      A `DensityResult`, after `deflate` + P m products. Multiplying the matrix by c > 0 and
      adding d I maps all nodes and eigenvalues likewise, up to rounding.

    Raises:
      ValueError: an argument is out of its range, or the checkpoint is of another problem.
      CheckpointError: a file of the checkpoint cannot be written.
      MemoryError: the device has no room; names what to lower, with the bytes that are needed.
      Interrupted: Ctrl-C; its `.result` is the result of the probes finished so far.

    References:
      S. Ubaru, J. Chen, Y. Saad (2017), Fast estimation of tr(f(A)) via stochastic Lanczos
      quadrature, SIAM J. Matrix Anal. Appl. 38(4). The deflation is our addition.
    """
    solver = spectral_density_solver(
        operator, key=key, num_steps=num_steps, num_probes=num_probes, deflate=deflate,
        accumulation=accumulation,
    )  # fmt: skip
    return run(solver, callback=callback, checkpoint=checkpoint)


def spectral_density_solver(
    operator: Operator,
    *,
    key: PRNGKey,
    num_steps: int = 40,
    num_probes: int = 2,
    deflate: int | None = None,
    accumulation: str | None = None,
) -> Solver[Tree, DensityResult]:
    """Makes the solver of `spectral_density`, whose arguments these are, to drive by hand.

    It finds what is taken out; its `then` is the solver of the probes.
    """
    space = operator.space
    _checks.integer("num_steps", num_steps, maximum=space.size)
    _checks.integer("num_probes", num_probes)
    num_rows = min(2 * num_steps, space.size) if deflate is None else deflate
    _checks.integer("deflate", num_rows, minimum=0, maximum=space.size)
    _checks.key("key", key)
    small = small_dtype(space.dtype, accumulation)
    # One at a time on CPU, where a block of vectors costs as much as its members.
    block = num_probes if operator.takes_blocks else 1
    num_rounds = -(-num_probes // block) * num_steps

    def before_deflation() -> Krylov:
        _, start_key, krylov_key = jax.random.split(key, 3)
        return empty(space, space.normal(start_key), num_rows, krylov_key, accumulation)

    def after_deflation(krylov: Krylov) -> DensityState:
        return begin(_taken_out(krylov, num_rows, operator.eps), krylov.filled)

    def without_deflation() -> DensityState:
        nothing = jnp.zeros(0, small)
        rows = _basis.zeros(space, 0, accumulation)
        return begin(space.replicate(Deflation(rows, nothing, nothing)), jnp.int32(0))

    def begin(deflation: Deflation, num_matvecs: jax.Array) -> DensityState:
        probe_key, _, _ = jax.random.split(key, 3)
        zeros = jnp.zeros((num_probes, num_steps), small)
        rest = space.replicate((probe_key, zeros, zeros.copy(), jnp.int32(0), num_matvecs))
        return _begin(deflation, *rest, block)

    probes: Solver[Any, DensityResult] = Solver(
        name="spectral_density",
        operator=operator,
        arguments={
            "key": key, "num_steps": num_steps, "num_probes": num_probes, "deflate": num_rows,
            "probes at once": block, "accumulation": accumulation,
        },
        init=without_deflation,
        vectors=lambda state: state.probes.direction,
        update=_update,
        done=lambda state: False,
        result=lambda state: _result(state, space.size),
        max_steps=num_rounds,
        lower=("num_steps", "deflate", "num_probes"),
    )  # fmt: skip
    if num_rows == 0:
        return probes
    return dataclasses.replace(
        probes,
        init=before_deflation,
        vectors=lambda krylov: krylov.direction,
        update=expand,
        result=lambda krylov: _result(after_deflation(krylov), space.size),
        max_steps=num_rows,
        then=lambda krylov: (probes, after_deflation(krylov)),
        later_steps=num_rounds,
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
@precisely
def _taken_out(krylov: Krylov, num_rows: int, eps: float) -> Deflation:
    """The Ritz pairs that converged, in descending order."""
    values, vectors, _ = small_pairs(krylov.projected, krylov.filled)
    values, vectors = values[::-1][:num_rows], vectors[:, ::-1][:, :num_rows]
    outside, dropped = residual_parts(krylov, vectors)
    bounds = outside + dropped
    take = bounds <= _DEFLATION_TOLERANCE * jnp.max(jnp.abs(values))
    # A run cut short by Ctrl-C has empty rows, whose pairs are nobody's.
    take &= krylov.filled == num_rows
    order = jnp.argsort(~take, stable=True)
    dtype = krylov.basis.space.dtype
    bounds += rounding(values, eps=eps, dtype=dtype, num_rows=krylov.filled)
    count = jnp.sum(take, dtype=jnp.int32)
    inside = jnp.arange(num_rows, dtype=jnp.int32) < count
    weights = jnp.where(inside[None], vectors[:, order], 0)
    values, bounds = krylov.unscaled(values), krylov.unscaled(bounds)
    return Deflation(
        rows=_basis.combined(krylov.basis, weights, count),
        values=jnp.where(inside, values[order], jnp.nan),
        residual_norms=jnp.where(inside, bounds[order], jnp.nan),
    )


@functools.partial(jax.jit, static_argnums=6)
@precisely
def _begin(
    deflation: Deflation,
    key: PRNGKey,
    nodes: jax.Array,
    weights: jax.Array,
    num_finished: jax.Array,
    num_matvecs: jax.Array,
    block: int,
) -> DensityState:
    """The state before the next `block` probes."""
    key, probe_key, krylov_key = jax.random.split(key, 3)
    rows, num_steps = deflation.rows, nodes.shape[1]
    starts = _outside(rows, rows.space.normal(probe_key, block))
    make = lambda start, key: empty(
        rows.space, start, num_steps, key, rows.accumulation, num_finished
    )
    probes = jax.vmap(make)(starts, jax.random.split(krylov_key, block))
    return DensityState(key, deflation, probes, nodes, weights, num_finished, num_matvecs)


def _update(state: DensityState, images: jax.Array) -> DensityState:
    """One more row for each probe under way, and the quadrature when they are full."""
    state = _absorb(state, images)
    return _loops.cond(state.probes.filled[0] == state.nodes.shape[1], _collect, state)


@functools.partial(jax.jit, donate_argnums=0)
@precisely
def _absorb(state: DensityState, images: jax.Array) -> DensityState:
    images, block = _outside(state.deflation.rows, images), images.shape[0]
    if block == 1:
        probes = jax.tree.map(lambda leaf: leaf[0], state.probes)
        probes = jax.tree.map(lambda leaf: leaf[None], absorb(probes, images[0]))
    else:
        probes = jax.vmap(absorb)(state.probes, images)
    return state._replace(probes=probes, num_matvecs=state.num_matvecs + block)


@functools.partial(jax.jit, donate_argnums=0)
@precisely
def _collect(state: DensityState) -> DensityState:
    """Stores the quadrature of the finished probes and starts the next ones."""
    num_steps, block = state.nodes.shape[1], state.probes.direction.shape[0]
    projected = state.probes.projected[:, :num_steps, :num_steps]
    values, vectors = jnp.linalg.eigh(projected)
    values = jax.vmap(Krylov.unscaled)(state.probes, values)
    start = (state.num_finished, jnp.int32(0))
    return _begin(
        state.deflation,
        state.key,
        jax.lax.dynamic_update_slice(state.nodes, values, start),
        jax.lax.dynamic_update_slice(state.weights, vectors[:, 0, :] ** 2, start),
        state.num_finished + block,
        state.num_matvecs,
        block,
    )


def _outside(rows: _basis.Basis, vectors: jax.Array) -> jax.Array:
    """The `vectors` less their part in the rows; twice is enough."""
    for _ in range(2):
        vectors = jax.vmap(lambda vector: _basis.outside(rows, vector)[0])(vectors)
    return vectors


def _result(state: DensityState, size: int) -> DensityResult:
    """The measure of the probes finished so far; NaN weights before the first one."""
    deflation, dtype = state.deflation, state.nodes.dtype
    count = deflation.rows.filled
    rest = (size - count).astype(dtype) / size
    finished = jnp.arange(state.nodes.shape[0], dtype=jnp.int32) < state.num_finished
    share = jnp.where(state.num_finished > 0, rest / state.num_finished.astype(dtype), jnp.nan)
    # Nothing is known before the first probe, not even that a weight is zero.
    absent = jnp.where(state.num_finished > 0, jnp.zeros((), dtype), jnp.nan)
    inside = jnp.arange(deflation.values.size, dtype=jnp.int32) < count
    result = DensityResult(
        nodes=state.nodes,
        weights=jnp.where(finished[:, None], state.weights * share, absent),
        eigenvalues=deflation.values,
        eigenvalue_weights=jnp.where(inside, jnp.asarray(1 / size, dtype), 0),
        residual_norms=deflation.residual_norms,
        num_eigenvalues=count,
        trace=jnp.zeros((), dtype),
        trace_standard_error=jnp.zeros((), dtype),
        num_matvecs=state.num_matvecs,
        size=jnp.int32(size),
    )
    total = spectral_sum(result, lambda values: values)
    return result._replace(trace=total.value, trace_standard_error=total.standard_error)
