"""What `top_eigenpairs` knows between two products: Ritz pairs, bounds, and when to go on how.

The small matrix Q A Q' gives Ritz pairs with residual bounds. From them follow whether the wanted
pairs have converged, whether a search for missed copies is due or over, and to what the basis is
compressed when it is full.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from regjax.curvature import _basis, _rounding, _search
from regjax.curvature._lanczos import Krylov, redirect
from regjax.curvature._precision import precisely

# With so many rows left, the first search keeps the whole basis: what is known of the unwanted
# eigenvalues makes it shorter.
_ROOM = 10


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "krylov", "search", "tol", "num_matvecs", "num_restarts",
        "weights", "values", "bounds", "small", "in_search",
        "wants_restart", "wants_search", "done",
    ],
    meta_fields=["k", "which", "num_rows", "searches"],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class EigenState:
    """The solver between two products.

    Attributes:
      krylov: the basis with Q A Q'.
      search: the search for missed eigenvalues.
      tol: (), relative tolerance.
      num_matvecs: (), int32, products so far.
      num_restarts: (), int32, how often the basis was compressed.
      weights: (rows, rows), columns: the small eigenvectors, wanted ones first.
      values: (rows,), Ritz values in the same order.
      bounds: (rows,), their residual norms.
      small: (rows,), bool, which of them meet the tolerance.
      in_search: (rows,), bool, whether they live in the search's own directions.
      wants_restart: (), bool, whether the basis must be compressed first.
      wants_search: (), bool, whether it is time for a (further) search.
      done: (), bool, whether nothing more is to be gained.
      k: number of wanted pairs. which: end of the spectrum. num_rows: rows in use at most.
      searches: whether missed copies are looked for.
    """

    krylov: Krylov
    search: _search.Search
    tol: jax.Array
    num_matvecs: jax.Array
    num_restarts: jax.Array
    weights: jax.Array
    values: jax.Array
    bounds: jax.Array
    small: jax.Array
    in_search: jax.Array
    wants_restart: jax.Array
    wants_search: jax.Array
    done: jax.Array
    k: int
    which: str
    num_rows: int
    searches: bool


def assess(state: EigenState) -> EigenState:
    """Ritz pairs with bounds, wanted first; then whether to search or to stop."""
    krylov, k = state.krylov, state.k
    rows = jnp.arange(krylov.basis.num_rows, dtype=jnp.int32)
    active = rows < krylov.filled
    # Unfilled rows get an eigenvalue below all others, so that they mix with none.
    norm = jnp.linalg.norm(krylov.projected)
    below = -2 * jnp.where(norm > 0, norm, 1)
    values, weights = jnp.linalg.eigh(krylov.projected + jnp.diag(jnp.where(active, 0, below)))
    # eigh sorts: the unfilled ones come first, the filled ones come last.
    valid = rows >= rows.size - krylov.filled
    order = jnp.argsort(_preference(jnp.where(valid, values, jnp.nan), state.which))
    values, weights, valid = values[order], weights[:, order], valid[order]

    outside = jnp.abs(krylov.beta * weights[krylov.filled - 1])
    bounds = jnp.where(valid, outside + krylov.lost @ jnp.abs(weights), jnp.inf)
    scale = jnp.max(jnp.where(valid, jnp.abs(values), 0))
    eps = float(jnp.finfo(krylov.direction.dtype).eps)
    threshold = jnp.maximum(state.tol * scale, _rounding.floor(jnp.where(valid, values, 0), eps))
    small = bounds <= threshold

    search = state.search
    in_search = jnp.sum(jnp.where((rows >= search.first_row)[:, None], weights**2, 0), 0) > 0.5
    in_search &= valid & search.active
    found_new = jnp.any(in_search[:k])
    met = jnp.all(small[:k])
    # Searching drops the residuals of the kept pairs for good: they go in with room to spare, or
    # with nothing to gain.
    ready = met & jnp.all((bounds[:k] <= threshold / 2) | (outside[:k] <= threshold / 16))
    # What the residual of the first space keeps from converging has to be found anew.
    stuck = search.is_first & jnp.any(~small[:k] & (outside[:k] <= threshold / 2))
    exhausted = krylov.filled >= krylov.direction.size
    broken = ~jnp.isfinite(krylov.beta)
    if state.searches:
        over = _search.is_over(
            search, values, small, in_search, k=k, which=state.which, size=krylov.direction.size
        )
        done = exhausted | broken | (search.active & met & ~found_new & over)
        wants_search = ~done & ((ready & (found_new | ~search.active)) | stuck)
    else:
        done = exhausted | broken | met
        wants_search = jnp.zeros_like(met)
    # The first search keeps the whole basis, later ones what has converged.
    cramped = search.active | (krylov.filled + _ROOM > state.num_rows)
    full = krylov.filled >= state.num_rows
    return dataclasses.replace(
        state,
        values=jnp.where(valid & ~broken, values, jnp.nan),
        weights=weights,
        bounds=bounds,
        small=small,
        in_search=in_search,
        wants_restart=jnp.where(wants_search, cramped, full) & ~done,
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


@functools.partial(jax.jit, donate_argnums=0)
@precisely
def begin_search(state: EigenState) -> EigenState:
    """Goes on from a fresh direction; the residual of the rows so far is dropped and charged."""
    targets = _search.targets_of(state.values, state.k, state.which)
    return dataclasses.replace(
        state,
        krylov=redirect(state.krylov),
        search=_search.begin(
            targets,
            num_rows=state.values.size,
            filled=state.krylov.filled,
            active=True,
            is_first=~state.search.active,
        ),
        wants_search=jnp.zeros_like(state.wants_search),
    )


@functools.partial(jax.jit, donate_argnums=0)
@precisely
def restart(state: EigenState) -> EigenState:
    """Compresses the basis to Ritz vectors."""
    krylov, k, search = state.krylov, state.k, state.search
    rows = jnp.arange(krylov.basis.num_rows, dtype=jnp.int32)
    valid = jnp.isfinite(state.values)
    most = min(k + max(1, (state.num_rows - k) // 2), state.num_rows - 1)
    # If a search follows, the residual is lost: what has not converged can no longer.
    dropped = jnp.where(state.wants_search, krylov.beta, 0)
    lost = krylov.lost.at[krylov.filled - 1].add(dropped) @ jnp.abs(state.weights)
    kept = valid & (state.small | ~state.wants_search)
    kept &= jnp.cumsum(kept) <= most
    # Kept rows of the search stay behind the others, where `first_row` finds them.
    order = jnp.argsort(jnp.where(kept, jnp.where(state.in_search, 1, 0), 2), stable=True)
    inside = rows < jnp.sum(kept)
    weights = jnp.where(inside[None], state.weights[:, order], 0)
    # Every recombination of the rows rounds them once more.
    largest = jnp.max(jnp.abs(state.values), where=valid, initial=0)
    rounding = float(jnp.finfo(krylov.direction.dtype).eps) * largest
    lost = lost[order] + rounding
    krylov = krylov._replace(
        basis=_basis.recombine(krylov.basis, weights),
        newest=jnp.zeros_like(krylov.newest),
        projected=jnp.diag(jnp.where(inside, state.values[order], 0)),
        lost=jnp.where(inside, lost, 0),
        beta=krylov.beta - dropped,
        filled=jnp.sum(kept, dtype=jnp.int32),
    )
    search = search._replace(
        first_row=jnp.sum(kept & ~state.in_search, dtype=jnp.int32),
        overlaps=search.overlaps @ weights,
    )
    return dataclasses.replace(
        state,
        krylov=krylov,
        search=search,
        num_restarts=state.num_restarts + 1,
        wants_restart=jnp.zeros_like(state.wants_restart),
    )
