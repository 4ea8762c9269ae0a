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
import numpy as np

from regjax import _checks, _loops
from regjax._arguments import checked
from regjax._base import Callback, PRNGKey, Tree
from regjax.curvature._deflation import Deflation, outside, taken_out
from regjax.curvature._engine import _basis
from regjax.curvature._engine._accumulation import small_dtype
from regjax.curvature._engine._checkpoint import Checkpoint
from regjax.curvature._engine._driver import run
from regjax.curvature._engine._solver import Solver
from regjax.curvature._lanczos import Krylov, absorb, charged, empty, expand, renewed
from regjax.curvature._measure import DensityResult, dimension_left, sampled_sum, share_error
from regjax.curvature._operators._operator import Operator
from regjax.curvature._precision import precisely, rounding
from regjax.curvature._quadrature import gauss_rule, open_share
from regjax.curvature._ritz import recurrence

# Where `num_steps` is chosen: the fewest, the most, and the bytes of vectors beyond which there are
# no more than the fewest.
_FEWEST, _MOST, _BUDGET = 40, 320, 2**30
_LOOKS = (40, 56, 80, 113, 160, 226)
# Where numbers of eigenvalues are to be known, in units of the largest magnitude.
_PLACES = np.outer([-1, 1], 10.0 ** np.arange(-3, 0.1, 0.5)).ravel()


class DensityState(NamedTuple):
    """The probes between two products.

    Attributes:
      key: typed key of the probes to come.
      deflation: what was taken out.
      probes: bases of the probes under way, each leaf with a leading axis of their number.
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


@checked
def spectral_density(
    operator: Operator,
    *,
    key: PRNGKey,
    num_steps: int | None = None,
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
      num_steps: Lanczos steps m a probe, at most n. None takes as many as it needs to know how many
        eigenvalues lie beyond each of the shares 0.001, 0.003, 0.01, ..., 1 of the largest
        magnitude, on both sides of 0, as well as the draw of the probes lets it: to one standard
        error, or to one eigenvalue. At least 40, at most 320, and no more than 40 where a vector is
        so long that they would take more than 1 GiB; at most n.
      num_probes: number of probes P, Gaussian directions in the complement.
      deflate: products spent on finding extreme eigenpairs to take out, at most n; the vectors
        stay in memory. 0 gives the plain method; None takes 2 `num_steps`, 80 where that is None,
        at most n.
      accumulation: how inner products of vectors (n,) are summed, as for `lanczos`; with "float64"
        nodes, weights, eigenvalues and what follows from them are float64.
      callback: called as callback(products, total, progress) after each product, by the host.
      checkpoint: where the state is kept every few products, and found again by the same call after
        the process was killed; only when the host drives.

    Returns:
      A `DensityResult`, after `deflate` + P m products at most. Multiplying the matrix by c > 0 and
      adding d I map all nodes and eigenvalues likewise, up to rounding.

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


@checked
def spectral_density_solver(
    operator: Operator,
    *,
    key: PRNGKey,
    num_steps: int | None = None,
    num_probes: int = 2,
    deflate: int | None = None,
    accumulation: str | None = None,
) -> Solver[Tree, DensityResult]:
    """Makes the solver of `spectral_density`, whose arguments these are, to drive by hand.

    It finds what is taken out; its `then` is the solver of the probes.
    """
    space = operator.space
    chosen = num_steps is None
    if num_steps is None:
        fit = _BUDGET // max(space.size * space.dtype.itemsize, 1)
        most, num_steps = min(max(_FEWEST, min(_MOST, fit)), space.size), _FEWEST
    else:
        most = _checks.integer("num_steps", num_steps, maximum=space.size)
    _checks.integer("num_probes", num_probes)
    num_rows = min(2 * num_steps, space.size) if deflate is None else deflate
    _checks.integer("deflate", num_rows, minimum=0, maximum=space.size)
    _checks.key("key", key)
    small = small_dtype(space.dtype, accumulation)
    # One at a time on CPU, where a block of vectors costs as much as its members.
    block = num_probes if operator.takes_blocks else 1
    num_rounds = -(-num_probes // block) * most

    def before_deflation() -> Krylov:
        _, start_key, krylov_key = jax.random.split(key, 3)
        return empty(space, space.normal(start_key), num_rows, krylov_key, accumulation)

    def after_deflation(krylov: Krylov) -> DensityState:
        return begin(taken_out(krylov, num_rows, operator.eps), krylov.filled)

    def without_deflation() -> DensityState:
        nothing = jnp.zeros(0, small)
        rows = _basis.zeros(space, 0, accumulation)
        return begin(space.replicate(Deflation(rows, nothing, nothing)), jnp.int32(0))

    def begin(deflation: Deflation, num_matvecs: jax.Array) -> DensityState:
        probe_key, _, _ = jax.random.split(key, 3)
        zeros, none = jnp.zeros((num_probes, most), small), jnp.zeros(num_probes, jnp.int32)
        rest = (probe_key, zeros, zeros.copy(), none, jnp.int32(0), num_matvecs)
        return _begin(deflation, *space.replicate(rest), block)

    probes: Solver[Any, DensityResult] = Solver(
        name="spectral_density",
        operator=operator,
        arguments={
            "key": key, "num_steps": most, "steps are chosen": chosen, "num_probes": num_probes,
            "deflate": num_rows, "probes at once": block, "accumulation": accumulation,
        },
        init=without_deflation,
        vectors=lambda state: state.probes.direction,
        update=functools.partial(_update, chosen=chosen),
        done=lambda state: (state.num_finished >= num_probes) if chosen else False,
        result=lambda state: _result(state, space.size, operator.eps),
        max_steps=num_rounds,
        lower=("num_steps", "deflate", "num_probes"),
        charge=_charge,
    )  # fmt: skip
    if num_rows == 0:
        return probes
    return dataclasses.replace(
        probes,
        init=before_deflation,
        vectors=lambda krylov: krylov.direction,
        update=expand,
        done=lambda krylov: False,
        charge=charged,
        result=lambda krylov: _result(after_deflation(krylov), space.size, operator.eps),
        max_steps=num_rows,
        then=lambda krylov: (probes, after_deflation(krylov)),
        later_steps=num_rounds,
    )


@functools.partial(jax.jit, static_argnums=7)
@precisely
def _begin(
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
    key, probe_key, krylov_key = jax.random.split(key, 3)
    rows, most = deflation.rows, alphas.shape[1]
    starts = outside(rows, rows.space.normal(probe_key, block))
    make = lambda start, key: empty(rows.space, start, most, key, rows.accumulation, num_finished)
    probes = jax.vmap(make)(starts, jax.random.split(krylov_key, block))
    return DensityState(
        key=key,
        deflation=deflation,
        probes=probes,
        alphas=alphas,
        betas=betas,
        num_steps=num_steps,
        num_finished=num_finished,
        resolved=jnp.bool_(False),
        num_matvecs=num_matvecs,
        product_error=jnp.zeros((), alphas.dtype),
    )


def _update(state: DensityState, images: jax.Array, *, chosen: bool) -> DensityState:
    """One more row for each probe under way, and what it knows of its measure when that is all."""
    state = _absorb(state, images)
    state = state._replace(probes=renewed(state.probes))
    known: Any = np.asarray if _loops.is_concrete(state) else lambda array: array
    filled, most = known(state.probes.filled)[0], state.alphas.shape[1]
    if chosen:
        looks = np.asarray([count for count in _LOOKS if count < most], np.int32)
        state = _loops.cond((filled == looks).any(), _look, state)
    return _loops.cond(known(state.resolved) | (filled == most), _collect, state)


@functools.partial(jax.jit, donate_argnums=0)
@precisely
def _absorb(state: DensityState, images: jax.Array) -> DensityState:
    images, block = outside(state.deflation.rows, images), images.shape[0]
    if block == 1:
        probes = jax.tree.map(lambda leaf: leaf[0], state.probes)
        probes = jax.tree.map(lambda leaf: leaf[None], absorb(probes, images[0]))
    else:
        probes = jax.vmap(absorb)(state.probes, images)
    return state._replace(probes=probes, num_matvecs=state.num_matvecs + block)


@functools.partial(jax.jit, donate_argnums=0)
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

    resolved = jnp.all(jax.vmap(is_resolved)(state.probes))
    return state._replace(resolved=resolved)


@functools.partial(jax.jit, donate_argnums=0)
@precisely
def _collect(state: DensityState) -> DensityState:
    """Stores the coefficients of the finished probes and starts the next ones."""
    found = jax.vmap(recurrence)(state.probes)
    most = state.alphas.shape[1]
    alphas, betas = (jax.vmap(Krylov.unscaled)(state.probes, numbers) for numbers in found)
    alphas, betas = alphas[:, :most], betas[:, :most]
    store, at = jax.lax.dynamic_update_slice_in_dim, state.num_finished
    return _begin(
        state.deflation,
        state.key,
        store(state.alphas, alphas, at, 0),
        store(state.betas, betas, at, 0),
        store(state.num_steps, state.probes.filled, at, 0),
        state.num_finished + alphas.shape[0],
        state.num_matvecs,
        alphas.shape[0],
    )._replace(product_error=state.product_error)


def _charge(state: DensityState, _: jax.Array, errors: jax.Array) -> DensityState:
    more = jnp.linalg.norm(errors).astype(state.product_error.dtype)
    return state._replace(product_error=jnp.hypot(state.product_error, more))


def _result(state: DensityState, size: int, eps: float) -> DensityResult:
    """The measure of the probes finished so far; NaN before the first one, also where forbidden."""
    if _loops.is_concrete(state) and not state.num_finished:
        with jax.debug_nans(False):
            return _measured(state, size, eps)
    return _measured(state, size, eps)


@functools.partial(jax.jit, static_argnums=(1, 2))
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
    mean, error, dimension = sampled_sum(result, lambda values: values)
    total = jnp.sum(result.eigenvalues) + dimension * mean
    return result._replace(trace=total, trace_standard_error=error)
