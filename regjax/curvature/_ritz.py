"""What `top_eigenpairs` knows between two products: Ritz pairs, bounds, and when to go on how.

The small matrix Q A Q' gives Ritz pairs with residual bounds. From them follow whether the wanted
pairs have converged, whether a search for missed copies is due or over, and to what the basis is
compressed when it is full.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from regjax.curvature._lanczos import Krylov, redirect

# Rounding of the recurrence: no residual is claimed below this many units of it.
_FLOOR = 8
# Probability that the search overlooks an eigenvalue beyond the k-th one (see `_search_steps`).
_MISS = 1e-3
# Column width in which a restart recombines the basis in place, in scalars.
_RESTART_WIDTH = 2**14


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


def assess(state: EigenState) -> EigenState:
    """Ritz pairs with bounds, wanted first; then whether to search or to stop."""
    krylov, k = state.krylov, state.k
    rows = jnp.arange(krylov.basis.shape[0], dtype=jnp.int32)
    active = rows < krylov.filled
    # Unfilled rows get an eigenvalue below all others, so that they mix with none.
    norm = jnp.linalg.norm(krylov.projected)
    below = -2 * jnp.where(norm > 0, norm, 1)
    values, weights = jnp.linalg.eigh(krylov.projected + jnp.diag(jnp.where(active, 0, below)))
    # eigh sorts: the unfilled ones come first, the filled ones come last.
    valid = rows >= rows.size - krylov.filled
    order = jnp.argsort(_preference(jnp.where(valid, values, jnp.nan), state.which))
    values, weights, valid = values[order], weights[:, order], valid[order]

    bounds = jnp.abs(krylov.beta * weights[krylov.filled - 1]) + krylov.lost @ jnp.abs(weights)
    bounds = jnp.where(valid, bounds, jnp.inf)
    scale = jnp.max(jnp.where(valid, jnp.abs(values), 0))
    threshold = jnp.maximum(state.tol * scale, rounding(values, valid))
    small = bounds <= threshold

    in_search = jnp.sum(jnp.where((rows >= state.search_start)[:, None], weights**2, 0), 0) > 0.5
    in_search &= valid & state.searching
    found_new = jnp.any(in_search[:k])
    met = jnp.all(small[:k])
    # Searching drops the residuals of the kept pairs for good: they go in with room to spare.
    ready = jnp.all(bounds[:k] <= threshold / 2)
    exhausted = krylov.filled >= krylov.direction.size
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
        above = jnp.min(jnp.abs(wanted))
        below = -above
    elif state.which == "BE":
        num_high = (state.k + 1) // 2
        ranked = jnp.sort(wanted)
        above = ranked[-num_high]
        below = ranked[max(state.k - num_high - 1, 0)]
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
    """Whether an eigenvalue beyond the gap would have shown itself by now.

    Kuczynski & Wozniakowski (1992): after j steps from a random start in n dimensions the largest
    Ritz value misses the largest eigenvalue by more than a share e of the spread with probability
    at most 1.648 sqrt(n) exp(-sqrt(e) (2 j - 1)).
    """
    needed = math.log(1.648 * math.sqrt(state.krylov.direction.size) / _MISS)
    odd = (2 * state.search_steps - 1).astype(relative_gap.dtype)
    return jnp.sqrt(relative_gap) * odd >= needed


def rounding(values: jax.Array, valid: jax.Array) -> jax.Array:
    scale = jnp.max(jnp.where(valid, jnp.abs(values), 0))
    return _FLOOR * jnp.finfo(values.dtype).eps * scale


@functools.partial(jax.jit, donate_argnums=0)
def restart(state: EigenState) -> EigenState:
    """Compresses the basis to Ritz vectors; for a search, goes on from a fresh direction."""
    krylov, k = state.krylov, state.k
    rows = jnp.arange(krylov.basis.shape[0], dtype=jnp.int32)
    most = min(k + max(1, (state.num_rows - k) // 2), state.num_rows - 1)
    # Into a search go the wanted and the other converged pairs: nearly invariant, so that the
    # complement has the rest of the spectrum for its own.
    nearly_invariant = (rows < k) | state.small
    kept = jnp.where(state.wants_search, nearly_invariant, True) & (rows < krylov.filled)
    kept &= jnp.cumsum(kept) <= most
    # Kept rows of an earlier search stay behind the others, where `search_start` finds them.
    order = jnp.argsort(jnp.where(kept, jnp.where(state.in_search, 1, 0), 2), stable=True)
    count = jnp.sum(kept, dtype=jnp.int32)
    num_before = jnp.sum(kept & ~state.in_search, dtype=jnp.int32)
    inside = rows < count
    weights = jnp.where(inside[None], state.weights[:, order], 0)

    lost = krylov.lost.at[krylov.filled - 1].add(jnp.where(state.wants_search, krylov.beta, 0))
    valid = jnp.isfinite(state.values)
    krylov = krylov._replace(
        basis=_recombine(krylov.basis, weights),
        projected=jnp.diag(jnp.where(inside, state.values[order], 0)),
        # Every recombination of the rows rounds them once more.
        lost=lost @ jnp.abs(weights) + rounding(state.values, valid) / _FLOOR,
        # The residual is charged to `lost` if a fresh direction is to follow.
        beta=jnp.where(state.wants_search, 0, krylov.beta),
        filled=count,
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
    """The rows recombined, weights' basis, in place, a slab of columns at a time."""
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
