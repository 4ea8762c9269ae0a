"""Stochastic Lanczos quadrature: the probes of a spectral density, and the measure that they find.

A probe is a random vector outside of what was taken out. Its Lanczos matrix gives the nodes and
weights of a Gauss rule for the rest of the spectrum.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from regjax import _loops
from regjax._base import PRNGKey, Tree
from regjax._on_host import on_host
from regjax._one_program import one_program
from regjax.curvature._deflation import Deflation, outside
from regjax.curvature._engine import _basis
from regjax.curvature._krylov import Krylov, absorb, empty, expand, renewed
from regjax.curvature._measure import DensityResult, dimension_left, sampled_sum, share_error
from regjax.curvature._precision import precisely, rounding
from regjax.curvature._quadrature import gauss_rule, open_share
from regjax.curvature._ritz import recurrence

_LOOKS = (40, 56, 80, 113, 160, 226)
# Where numbers of eigenvalues are to be known, in units of the largest magnitude.
_PLACES = np.outer([-1, 1], 10.0 ** np.arange(-3, 0.1, 0.5)).ravel()


class DensityState(NamedTuple):
    """The probes between two products.

    Attributes:
      key: typed key of the probes to come.
      deflation: what was taken out.
      probes: bases of the probes under way: one, or each leaf with a leading axis of their number.
      alphas: (P, m), diagonal of each probe's T. betas: (P, m), its off-diagonal.
      num_steps: (P,), int32, steps of each probe. num_finished: (), int32, probes done.
      resolved: (), bool, whether the probes under way may end.
      num_matvecs: (), int32, products so far, those of the deflation included.
      product_error: (), norm of what all products of probes are off by, where they are differences.
    """

    key: PRNGKey
    deflation: Deflation
    probes: Krylov
    alphas: jax.Array
    betas: jax.Array
    num_steps: jax.Array
    num_finished: jax.Array
    resolved: jax.Array
    num_matvecs: jax.Array
    product_error: jax.Array


def first(
    deflation: Deflation,
    key: PRNGKey,
    num_matvecs: jax.Array,
    num_probes: int,
    most: int,
    block: int,
) -> DensityState:
    """The state before the first `block` of probes with at most `most` steps each."""
    given = _before(deflation, key, num_matvecs, num_probes, most)
    return begin(deflation, *(*deflation.rows.space.replicate(given), block))


@on_host(static=(3, 4))
def _before(
    deflation: Deflation, key: PRNGKey, num_matvecs: jax.Array, num_probes: int, most: int
) -> Any:
    probe_key, _, _ = jax.random.split(key, 3)
    zeros = jnp.zeros((num_probes, most), deflation.values.dtype)
    none = jnp.zeros(num_probes, jnp.int32)
    # A number of its own, which NumPy can count on.
    return probe_key, zeros, zeros, none, jnp.int32(0), num_matvecs + jnp.int32(0)


def begin(
    deflation: Deflation,
    key: PRNGKey,
    alphas: jax.Array,
    betas: jax.Array,
    num_steps: jax.Array,
    num_finished: jax.Array,
    num_matvecs: jax.Array,
    block: int,
) -> DensityState:
    """The state before the next `block` probes."""
    key, probe_key, krylov_key = _keys(key, block)
    rows, most = deflation.rows, alphas.shape[1]
    make = lambda start, key: empty(rows.space, start, most, key, rows.accumulation, num_finished)
    if block == 1:
        probes = make(_outside(rows, rows.space.normal(probe_key)), krylov_key)
    else:
        starts = _outside(rows, rows.space.normal(probe_key, block))
        probes = jax.jit(jax.vmap(make))(starts, krylov_key)
    resolved, product_error = _nothing_known(alphas)
    return DensityState(
        key=key,
        deflation=deflation,
        probes=probes,
        alphas=alphas,
        betas=betas,
        num_steps=num_steps,
        num_finished=num_finished,
        resolved=resolved,
        num_matvecs=num_matvecs,
        product_error=product_error,
    )


@on_host()
def _nothing_known(alphas: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.bool_(False), jnp.zeros((), alphas.dtype)


@on_host(static=(1,))
def _keys(key: PRNGKey, block: int) -> tuple[PRNGKey, PRNGKey, PRNGKey]:
    """The next key, that of the probes, and those of their bases: of one its own."""
    key, probe_key, krylov_key = jax.random.split(key, 3)
    krylov_keys = jax.random.split(krylov_key, block)
    return key, probe_key, krylov_keys if block > 1 else krylov_keys[0]


_outside = one_program(effort=3)(precisely(outside))


def update(state: DensityState, images: jax.Array, *, chosen: bool) -> DensityState:
    """One more row for each probe under way, and what it knows of its measure when that is all."""
    state = _absorbed(state, images)
    known: Any = np.asarray if _loops.is_concrete(state) else lambda array: array
    filled, most = known(state.probes.filled), state.alphas.shape[1]
    filled = filled[0] if filled.ndim else filled
    if chosen:
        looks = np.asarray([count for count in _LOOKS if count < most], np.int32)
        state = _loops.cond((filled == looks).any(), _look, state)
    return _loops.cond(known(state.resolved) | (filled == most), _collect, state)


def _absorbed(state: DensityState, images: jax.Array) -> DensityState:
    if images.ndim == 1:
        probes = expand(state.probes, _outside(state.deflation.rows, images))
    else:
        probes = renewed(_absorb_block(state.probes, state.deflation.rows, images))
    block = 1 if images.ndim == 1 else images.shape[0]
    return state._replace(probes=probes, num_matvecs=state.num_matvecs + block)


@one_program(donate="probes", effort=3)
@precisely
def _absorb_block(probes: Krylov, rows: _basis.Basis, images: jax.Array) -> Krylov:
    return jax.vmap(absorb)(probes, outside(rows, images))


def _each(function: Callable[[Krylov], Tree], probes: Krylov) -> Tree:
    """What a function gives of the probes, with a leading axis of their number."""
    if probes.filled.ndim:
        return jax.vmap(function)(probes)
    return jax.tree.map(lambda leaf: leaf[None], function(probes))


@on_host()
@precisely
def _look(state: DensityState) -> DensityState:
    """Whether the probes under way know the numbers of eigenvalues as well as their draw does."""
    count = state.deflation.rows.filled
    taken = jnp.max(jnp.abs(state.deflation.values), initial=0)
    num_probes = state.num_steps.size
    dimension = dimension_left(state.deflation.rows.space.size, count, state.alphas.dtype)

    def is_resolved(krylov: Krylov) -> jax.Array:
        measure = *recurrence(krylov), krylov.filled
        nodes, weights = gauss_rule(*measure)
        largest = jnp.maximum(taken * krylov.scale, jnp.max(jnp.abs(nodes)))
        places = largest * jnp.asarray(_PLACES, largest.dtype)
        below = jnp.where(nodes[None] <= places[:, None], weights[None], 0)
        share = jnp.minimum(jnp.sum(below, 1), 1)
        error = dimension * share_error(share, dimension, num_probes)
        return jnp.all(dimension * open_share(*measure, places) / 2 <= jnp.maximum(error, 1))

    return state._replace(resolved=jnp.all(_each(is_resolved, state.probes)))


def _collect(state: DensityState) -> DensityState:
    """Stores the coefficients of the finished probes and starts the next ones."""
    state = _stored(state)
    return begin(
        state.deflation,
        state.key,
        state.alphas,
        state.betas,
        state.num_steps,
        state.num_finished,
        state.num_matvecs,
        state.probes.filled.size,
    )._replace(product_error=state.product_error)


@on_host()
@precisely
def _stored(state: DensityState) -> DensityState:
    most = state.alphas.shape[1]
    found = _each(lambda krylov: tuple(map(krylov.unscaled, recurrence(krylov))), state.probes)
    alphas, betas = (numbers[:, :most] for numbers in found)
    store, at = jax.lax.dynamic_update_slice_in_dim, state.num_finished
    return state._replace(
        alphas=store(state.alphas, alphas, at, 0),
        betas=store(state.betas, betas, at, 0),
        num_steps=store(state.num_steps, jnp.ravel(state.probes.filled), at, 0),
        num_finished=state.num_finished + alphas.shape[0],
    )


def charge(state: DensityState, _: jax.Array, errors: jax.Array) -> DensityState:
    """The state that knows what the products of the probes are off by."""
    more = jnp.linalg.norm(errors).astype(state.product_error.dtype)
    return state._replace(product_error=jnp.hypot(state.product_error, more))


def result(state: DensityState, size: int, eps: float) -> DensityResult:
    """The measure of the probes finished so far; NaN before the first one, also where forbidden."""
    if _loops.is_concrete(state) and not state.num_finished:
        with jax.debug_nans(False):
            return _measured(state, size, eps)
    return _measured(state, size, eps)


@on_host(static=(1, 2), gives_arrays=True)
@precisely
def _measured(state: DensityState, size: int, eps: float) -> DensityResult:
    deflation, dtype = state.deflation, state.alphas.dtype
    count = deflation.rows.filled
    finished = jnp.arange(state.alphas.shape[0], dtype=jnp.int32) < state.num_finished
    nodes, weights = jax.vmap(gauss_rule)(state.alphas, state.betas, state.num_steps)
    nodes = jnp.where(finished[:, None], nodes, 0)
    rest = dimension_left(size, count, dtype) / float(size)
    # Nothing is known before the first probe, not even that a weight is zero.
    absent = jnp.where(state.num_finished > 0, jnp.zeros((), dtype), jnp.nan)
    share = rest / jnp.maximum(state.num_finished, 1).astype(dtype)
    inside = jnp.arange(deflation.values.size, dtype=jnp.int32) < count
    values, num_rows = [nodes.ravel(), deflation.values], jnp.max(state.num_steps) + count
    unknown = rounding(jnp.concatenate(values), eps=eps, dtype=dtype, num_rows=num_rows)
    result = DensityResult(
        nodes=nodes,
        weights=jnp.where(finished[:, None], weights * share, absent),
        alphas=state.alphas,
        betas=state.betas,
        num_steps=state.num_steps,
        node_error_bound=unknown + state.product_error,
        eigenvalues=deflation.values,
        eigenvalue_weights=jnp.where(inside, jnp.asarray(1 / size, dtype), 0),
        residual_norms=deflation.residual_norms,
        num_eigenvalues=count,
        trace=jnp.zeros((), dtype),
        trace_standard_error=jnp.zeros((), dtype),
        num_matvecs=state.num_matvecs,
        size=jnp.asarray(size, jnp.int32 if size < 2**31 else dtype),
    )
    mean, error, dimension = sampled_sum(result, result.nodes)
    total = jnp.sum(result.eigenvalues) + dimension * mean
    return result._replace(trace=total, trace_standard_error=error)
