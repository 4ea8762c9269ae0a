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
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from regjax import _checks, _loops, _tree
from regjax.curvature._lanczos import Krylov, absorb, empty, redirect
from regjax.curvature._operators import Operator, product

# Rounding of the recurrence: no residual is claimed below this many units of it.
_FLOOR = 8
# Probability that the search overlooks an eigenvalue beyond the k-th one (see `_search_steps`).
_MISS = 1e-3
# Column width in which a restart recombines the basis in place, in scalars.
_RESTART_WIDTH = 2**14
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


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "krylov", "tol", "num_matvecs", "search_start", "search_steps", "searching",
        "weights", "values", "bounds", "small", "in_search", "wants_search", "done",
    ],
    meta_fields=["k", "which", "num_rows", "search"],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class EigenState:
    """The solver between two products.

    Attributes:
      krylov: the basis with Q A Q'.
      tol: (), relative tolerance.
      num_matvecs: (), int32, products so far.
      search_start: (), int32, first row of the search's own directions.
      search_steps: (), int32, products since the search began.
      searching: (), bool, whether a search for missed eigenvalues is under way.
      weights: (rows, rows), columns: the small eigenvectors, wanted ones first.
      values: (rows,), Ritz values in the same order.
      bounds: (rows,), their residual norms.
      small: (rows,), bool, which of them meet the tolerance.
      in_search: (rows,), bool, whether they live in the search's own directions.
      wants_search: (), bool, whether it is time for a (further) search.
      done: (), bool, whether nothing more is to be gained.
      k: number of wanted pairs. which: end of the spectrum. num_rows: rows in use at most.
      search: whether missed copies are looked for.
    """

    krylov: Krylov
    tol: jax.Array
    num_matvecs: jax.Array
    search_start: jax.Array
    search_steps: jax.Array
    searching: jax.Array
    weights: jax.Array
    values: jax.Array
    bounds: jax.Array
    small: jax.Array
    in_search: jax.Array
    wants_search: jax.Array
    done: jax.Array
    k: int
    which: str
    num_rows: int
    search: bool


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
    full = state.krylov.index >= state.num_rows
    return _loops.branch((state.wants_search | full) & ~state.done, _restart, state)


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
    return vectors, _rounding(state.values, jnp.isfinite(state.values))


@functools.partial(jax.jit, donate_argnums=0)
def _advance(state: EigenState, image: jax.Array) -> EigenState:
    state = dataclasses.replace(
        state,
        krylov=absorb(state.krylov, image),
        num_matvecs=state.num_matvecs + 1,
        search_steps=state.search_steps + 1,
    )
    return _assess(state)


def _assess(state: EigenState) -> EigenState:
    """Ritz pairs with bounds, wanted first; then whether to search or to stop."""
    krylov, k = state.krylov, state.k
    rows = jnp.arange(krylov.basis.shape[0], dtype=jnp.int32)
    active = rows < krylov.index
    # Unfilled rows get an eigenvalue below all others, so that they mix with none.
    norm = jnp.linalg.norm(krylov.projected)
    below = -2 * jnp.where(norm > 0, norm, 1)
    values, weights = jnp.linalg.eigh(krylov.projected + jnp.diag(jnp.where(active, 0, below)))
    # eigh sorts: the unfilled ones come first, the filled ones are the last `index`.
    valid = rows >= rows.size - krylov.index
    order = jnp.argsort(_preference(jnp.where(valid, values, jnp.nan), state.which))
    values, weights, valid = values[order], weights[:, order], valid[order]

    bounds = jnp.abs(krylov.beta * weights[krylov.index - 1]) + krylov.lost @ jnp.abs(weights)
    bounds = jnp.where(valid, bounds, jnp.inf)
    scale = jnp.max(jnp.where(valid, jnp.abs(values), 0))
    threshold = jnp.maximum(state.tol * scale, _rounding(values, valid))
    small = bounds <= threshold

    in_search = jnp.sum(jnp.where((rows >= state.search_start)[:, None], weights**2, 0), 0) > 0.5
    in_search &= valid & state.searching
    found_new = jnp.any(in_search[:k])
    met = jnp.all(small[:k])
    # Searching drops the residuals of the kept pairs for good: they go in with room to spare.
    ready = jnp.all(bounds[:k] <= threshold / 2)
    exhausted = krylov.index >= krylov.direction.size
    broken = ~jnp.isfinite(krylov.beta)
    if state.search:
        cleared = _search_is_over(state, values, small, in_search, valid)
        done = exhausted | broken | (state.searching & met & ~found_new & cleared)
        wants_search = ready & ~done & (found_new | ~state.searching)
    else:
        done = exhausted | broken | met
        wants_search = jnp.zeros_like(met)
    return dataclasses.replace(
        state,
        values=jnp.where(valid & ~broken, values, jnp.nan),
        weights=weights,
        bounds=bounds,
        small=small,
        in_search=in_search,
        wants_search=wants_search,
        done=done,
    )


def _preference(values: jax.Array, which: str) -> jax.Array:
    """Sort key: wanted values first, NaN last."""
    if which == "LA":
        return -values
    if which == "SA":
        return values
    if which == "LM":
        return -jnp.abs(values)
    # From both ends in turn, largest first: rank r from above is 2 r, from below 2 r + 1.
    count = jnp.sum(~jnp.isnan(values))
    from_below = jnp.argsort(jnp.argsort(values))
    from_above = count - 1 - from_below
    turn = jnp.where(from_above <= from_below, 2 * from_above, 2 * from_below + 1)
    return jnp.where(jnp.isnan(values), jnp.inf, turn.astype(values.dtype))


def _search_is_over(
    state: EigenState, values: jax.Array, small: jax.Array, in_search: jax.Array, valid: jax.Array
) -> jax.Array:
    """Whether a wanted eigenvalue in the complement would have shown itself by now."""
    wanted = values[: state.k]
    lowest = jnp.min(jnp.where(valid, values, jnp.inf))
    highest = jnp.max(jnp.where(valid, values, -jnp.inf))
    searched_high = jnp.max(jnp.where(in_search, values, -jnp.inf))
    searched_low = jnp.min(jnp.where(in_search, values, jnp.inf))
    high_met = jnp.any(small & in_search & (values == searched_high))
    low_met = jnp.any(small & in_search & (values == searched_low))
    if state.which == "LM":
        above, below = jnp.min(jnp.abs(wanted)), -jnp.min(jnp.abs(wanted))
    elif state.which == "BE":
        num_high = (state.k + 1) // 2
        ranked = jnp.sort(wanted)
        above = ranked[-num_high]
        below = ranked[state.k - num_high - 1] if state.k > num_high else -jnp.inf
    else:
        above = below = wanted[state.k - 1]

    def clear(gap: jax.Array, spread: jax.Array, met: jax.Array) -> jax.Array:
        relative = jnp.clip(gap / jnp.where(spread > 0, spread, 1), 0, 1)
        return _enough_steps(state, relative) | (met & _enough_steps(state, jnp.ones_like(gap)))

    high = clear(above - searched_high, above - lowest, high_met)
    low = clear(searched_low - below, highest - below, low_met)
    if state.which == "LA" or (state.which == "BE" and state.k == 1):
        return high
    return low if state.which == "SA" else high & low


def _enough_steps(state: EigenState, relative_gap: jax.Array) -> jax.Array:
    """Kuczynski & Wozniakowski (1992): after j steps from a random start in n dimensions the
    largest Ritz value misses the largest eigenvalue by more than a share e of the spread with
    probability at most 1.648 sqrt(n) exp(-sqrt(e) (2 j - 1))."""
    needed = math.log(1.648 * math.sqrt(state.krylov.direction.size) / _MISS)
    odd = (2 * state.search_steps - 1).astype(relative_gap.dtype)
    return jnp.sqrt(relative_gap) * odd >= needed


def _rounding(values: jax.Array, valid: jax.Array) -> jax.Array:
    scale = jnp.max(jnp.where(valid, jnp.abs(values), 0))
    return _FLOOR * jnp.finfo(values.dtype).eps * scale


@functools.partial(jax.jit, donate_argnums=0)
def _restart(state: EigenState) -> EigenState:
    """Compresses the basis to Ritz vectors; for a search, goes on from a fresh direction."""
    krylov, k = state.krylov, state.k
    rows = jnp.arange(krylov.basis.shape[0], dtype=jnp.int32)
    most = min(k + max(1, (state.num_rows - k) // 2), state.num_rows - 1)
    # Into a search go the wanted and the other converged pairs: nearly invariant, so that the
    # complement has the rest of the spectrum for its own.
    nearly_invariant = (rows < k) | state.small
    kept = jnp.where(state.wants_search, nearly_invariant, True) & (rows < krylov.index)
    kept &= jnp.cumsum(kept) <= most
    # Kept rows of an earlier search stay behind the others, where `search_start` finds them.
    order = jnp.argsort(jnp.where(kept, jnp.where(state.in_search, 1, 0), 2), stable=True)
    count = jnp.sum(kept, dtype=jnp.int32)
    num_before = jnp.sum(kept & ~state.in_search, dtype=jnp.int32)
    inside = rows < count
    weights = jnp.where(inside[None], state.weights[:, order], 0)

    lost = krylov.lost.at[krylov.index - 1].add(jnp.where(state.wants_search, krylov.beta, 0))
    valid = jnp.isfinite(state.values)
    krylov = krylov._replace(
        basis=_recombine(krylov.basis, weights),
        projected=jnp.diag(jnp.where(inside, state.values[order], 0)),
        # Every recombination of the rows rounds them once more.
        lost=lost @ jnp.abs(weights) + _rounding(state.values, valid) / _FLOOR,
        # The residual is charged to `lost` if a fresh direction is to follow.
        beta=jnp.where(state.wants_search, 0, krylov.beta),
        index=count,
    )
    return dataclasses.replace(
        state,
        krylov=redirect(krylov, state.wants_search),
        searching=state.searching | state.wants_search,
        search_start=jnp.where(state.wants_search, count, num_before),
        search_steps=jnp.where(state.wants_search, 0, state.search_steps),
        wants_search=jnp.zeros_like(state.wants_search),
    )


def _recombine(basis: jax.Array, weights: jax.Array) -> jax.Array:
    """weights' basis, in place, a slab of columns at a time."""
    rows, size = basis.shape
    width = min(size, _RESTART_WIDTH)

    def recombine(slab: jax.Array, basis: jax.Array) -> jax.Array:
        # The last slab reaches back; its overlap must not be recombined twice.
        start = jnp.minimum(slab * width, size - width)
        columns = lax.dynamic_slice(basis, (0, start), (rows, width))
        fresh = start + jnp.arange(width, dtype=start.dtype) >= slab * width
        columns = jnp.where(fresh[None], weights.T @ columns, columns)
        return lax.dynamic_update_slice(basis, columns, (0, start))

    return lax.fori_loop(0, -(-size // width), recombine, basis)
