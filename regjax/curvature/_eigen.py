"""The leading eigenpairs by Lanczos with thick restart, each with its residual norm.

A Ritz pair (theta, y) of the basis Q has the residual A y - theta y, whose norm is read off the
last component of the small eigenvector: |beta s_last|. It bounds the distance of theta to *some*
eigenvalue. It cannot tell that an eigenvalue was passed over, and a Krylov space of one start
never sees the second copy of a multiple one. So the converged pairs are followed by a search: a
fresh random start in their orthogonal complement, continued until a larger eigenvalue there would
have shown itself.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from regjax import _checks, _loops, _tree
from regjax.curvature._lanczos import absorb, empty
from regjax.curvature._operators import Operator, product
from regjax.curvature._ritz import EigenState, assess, restart, rounding

_ENDS = ("LA", "SA", "LM", "BE")


class EigenResult(NamedTuple):
    """The k wanted eigenpairs, in the order of `which`.

    Attributes:
      values: (k,), Ritz values.
      vectors: tree like the parameters with a leading axis k, orthonormal.
      residual_norms: (k,), ||A v - value v||: some eigenvalue lies within it of the value. Says
        nothing about the value's rank in the spectrum.
      num_matvecs: (), int32, products used, the search for missed copies included.
      converged: (k,), bool: the residual norm is at most max(tol, 8 eps) times the largest
        |Ritz value|.
      complete: (), bool: all have converged, and the search (if asked for) ended without finding
        an eigenvalue that was passed over.
    """

    values: jax.Array
    vectors: Any
    residual_norms: jax.Array
    num_matvecs: jax.Array
    converged: jax.Array
    complete: jax.Array


def top_eigenpairs(
    operator: Operator,
    k: int,
    *,
    key: jax.Array,
    tol: Any = 1e-3,
    which: str = "LA",
    max_basis: int | None = None,
    max_matvecs: int | None = None,
    search: bool = True,
    callback: Callable[[int, int], None] | None = None,
) -> EigenResult:
    """The k eigenpairs at one end of the spectrum, with residual norms.

    Called from Python the host drives and stops as soon as all pairs have converged; inside
    `jax.jit` it is one compiled loop with the same limits and the same flags.

    Args:
      operator: symmetric, of order n.
      k: number of eigenpairs, at most n.
      key: typed key of the random starts.
      tol: relative tolerance: a pair has converged when ||A v - value v|| is at most
        max(tol, 8 eps) times the largest |Ritz value|.
      which: "LA" algebraically largest, "SA" smallest, "LM" largest magnitude, "BE" from both ends
        (the larger half from above).
      max_basis: number of vectors (n,) in memory; at this size the basis is compressed to the best
        Ritz vectors (thick restart). Default: min(n, max(40, 2 k + 20)).
      max_matvecs: limit of the number of products. Default: 20 times `max_basis`.
      search: whether to look for missed copies of multiple eigenvalues after convergence, at about
        ten products; an eigenvalue beyond the k-th one by a gap g is overlooked with probability
        below 1e-3 (converging where the next one is closer).
      callback: called as callback(products, max_matvecs) after each product when the host drives.

    Returns:
      An `EigenResult`; pairs that have not converged are flagged, never passed off.

    Raises:
      ValueError: an argument is out of its range.
      Interrupted: Ctrl-C; its `.result` is the `EigenResult` so far.

    References:
      K. Wu, H. Simon (2000), Thick-restart Lanczos method for large symmetric eigenvalue problems,
      SIAM J. Matrix Anal. Appl. 22(2). J. Kuczynski, H. Wozniakowski (1992), Estimating the
      largest eigenvalue by the power and Lanczos algorithms with a random start, SIAM J. Matrix
      Anal. Appl. 13(4), for the length of the search; the search itself is ours.
    """
    state = top_eigenpairs_init(
        operator, k, key=key, tol=tol, which=which, max_basis=max_basis, search=search
    )
    limit = 20 * state.num_rows if max_matvecs is None else max_matvecs
    result = functools.partial(top_eigenpairs_result, operator)
    state = _loops.repeat_until(
        top_eigenpairs_step,
        state,
        operands=operator,
        done=lambda state: state.done,
        max_steps=_checks.integer("max_matvecs", limit),
        result=result,
        callback=callback,
    )
    return result(state)


def top_eigenpairs_init(
    operator: Operator,
    k: int,
    *,
    key: jax.Array,
    tol: Any = 1e-3,
    which: str = "LA",
    max_basis: int | None = None,
    search: bool = True,
) -> EigenState:
    """The state before the first product; arguments as in `top_eigenpairs`."""
    size = operator.shape[0]
    _checks.integer("k", k, maximum=size)
    _checks.non_negative("tol", tol)
    _checks.choice("which", which, _ENDS)
    # Two rows beyond the kept ones: one for the residual's direction, one to make progress.
    num_rows = min(size, max(40, 2 * k + 20)) if max_basis is None else max_basis
    _checks.integer("max_basis", num_rows, minimum=min(k + 2, size), maximum=size)
    key, subkey = jax.random.split(_checks.key("key", key))
    krylov = empty(jax.random.normal(subkey, (size,), operator.dtype), num_rows, key)
    rows, dtype = krylov.basis.shape[0], operator.dtype
    return EigenState(
        krylov=krylov,
        tol=jnp.asarray(tol, dtype),
        num_matvecs=jnp.int32(0),
        search_start=jnp.int32(0),
        search_steps=jnp.int32(0),
        searching=jnp.bool_(False),
        weights=jnp.zeros((rows, rows), dtype),
        values=jnp.full(rows, jnp.nan, dtype),
        bounds=jnp.full(rows, jnp.inf, dtype),
        small=jnp.zeros(rows, bool),
        in_search=jnp.zeros(rows, bool),
        wants_search=jnp.bool_(False),
        done=jnp.bool_(False),
        k=k,
        which=which,
        num_rows=num_rows,
        search=search,
    )


def top_eigenpairs_step(operator: Operator, state: EigenState) -> EigenState:
    """One product, then the assessment; `state` is donated when called from Python."""
    state = _advance(state, product(operator, state.krylov.direction))
    full = state.krylov.filled >= state.num_rows
    return _loops.branch((state.wants_search | full) & ~state.done, restart, state)


def top_eigenpairs_result(operator: Operator, state: EigenState) -> EigenResult:
    """The wanted pairs as they stand, converged or not."""
    vectors, floor = _wanted_vectors(state)
    return EigenResult(
        values=state.values[: state.k],
        vectors=jax.vmap(lambda flat: _tree.unravel(flat, operator.params))(vectors),
        residual_norms=jnp.maximum(state.bounds[: state.k], floor),
        num_matvecs=state.num_matvecs,
        converged=state.small[: state.k],
        complete=jnp.all(state.small[: state.k]) & state.done,
    )


@jax.jit
def _wanted_vectors(state: EigenState) -> tuple[jax.Array, jax.Array]:
    vectors = state.weights[:, : state.k].T @ state.krylov.basis
    return vectors, rounding(state.values, jnp.isfinite(state.values))


@functools.partial(jax.jit, donate_argnums=0)
def _advance(state: EigenState, image: jax.Array) -> EigenState:
    state = dataclasses.replace(
        state,
        krylov=absorb(state.krylov, image),
        num_matvecs=state.num_matvecs + 1,
        search_steps=state.search_steps + 1,
    )
    return assess(state)
