"""What `top_eigenpairs` knows between two products, and how it goes on.

From the Ritz pairs with their residual bounds follow which of the wanted ones have converged,
whether a search for missed copies is due or over, and to what the basis is compressed when it is
full.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from regjax import _loops
from regjax._on_host import on_host
from regjax._one_program import one_program
from regjax.curvature import _search
from regjax.curvature._eigen_state import EigenState, unbounded
from regjax.curvature._engine import _basis
from regjax.curvature._krylov import redirect
from regjax.curvature._precision import precisely, rounding
from regjax.curvature._ritz import residual_parts, small_pairs

# With so many rows left, the first search keeps the whole basis: what is known of the unwanted
# eigenvalues makes it shorter.
_ROOM = 10
# The most products that the next assessment waits for, beside the first one.
_MOST_WAITING = 3
# Units of rounding by which a row is off after the rows were combined anew; 1 to 2 were seen.
_RECOMBINED = 3
# A pair with so much of its mass in the search's directions tells of them.
_SOME = 0.1


class _Pairs(NamedTuple):
    """Ritz pairs, the wanted ones first; what does not belong to a filled row comes last.

    Attributes:
      values: (rows,), 0 for rows that are not filled.
      weights: (rows, rows), columns: the small eigenvectors.
      outside: (rows,), the part of the residual norms that goes on to shrink.
      bounds: (rows,), of the residual norms; `unbounded` for rows that are not filled.
    """

    values: jax.Array
    weights: jax.Array
    outside: jax.Array
    bounds: jax.Array


class _Standing(NamedTuple):
    """How far the pairs have come.

    Attributes:
      largest: (), the largest magnitude of a Ritz value so far.
      threshold: (), the residual norm that is small enough.
      small: (rows,), bool, which pairs meet it.
      mass: (rows,), how much of each lies in the search's own directions, between 0 and 1.
    """

    largest: jax.Array
    threshold: jax.Array
    small: jax.Array
    mass: jax.Array


def is_pair(bounds: jax.Array) -> jax.Array:
    """Which bounds are those of pairs, and not of rows that are not filled."""
    return bounds < unbounded(bounds.dtype)


# What an assessment finds out.
_FOUND = (
    "search", "weights", "values", "bounds", "largest", "threshold", "small", "mass",
    "wants_restart", "wants_search", "done", "num_assessed", "next_assessment",
)  # fmt: skip


def assess_in_time(state: EigenState) -> EigenState:
    """`assess` if that is due, or if something happened that cannot wait."""
    krylov = state.krylov
    is_due = state.num_matvecs >= state.next_assessment
    is_due |= krylov.broke_down | ~jnp.isfinite(krylov.beta)
    is_due |= (krylov.filled >= state.num_rows) | _basis.spans_all(krylov.basis)
    return _assess_where(is_due, state)


@on_host()
@precisely
def assessed(state: EigenState) -> EigenState:
    """The state with an assessment of all its products."""
    return _assess_where(state.num_assessed < state.num_matvecs, state)


def _assess_where(condition: jax.Array, state: EigenState) -> EigenState:
    found = lambda state: {name: getattr(state, name) for name in _FOUND}
    # Nothing large goes through the branches, which would copy it.
    changed = _loops.cond(condition, lambda _: found(assess(state)), found(state))
    return dataclasses.replace(state, **changed)


def assess(state: EigenState) -> EigenState:
    """Ritz pairs with bounds, wanted first; then whether to search, to compress or to stop."""
    pairs = _pairs(state)
    standing = _standing(state, pairs)
    return _decided(state, pairs, standing)


def _pairs(state: EigenState) -> _Pairs:
    krylov = state.krylov
    values, weights, valid = small_pairs(krylov.projected, krylov.filled)
    order = jnp.argsort(_preference(values, valid, state.which))
    values, weights, valid = values[order], weights[:, order], valid[order]
    outside, dropped = residual_parts(krylov, weights)
    bounds = jnp.where(valid, outside + dropped, unbounded(values.dtype))
    return _Pairs(jnp.where(valid, values, 0), weights, outside, bounds)


def _standing(state: EigenState, pairs: _Pairs) -> _Standing:
    largest = jnp.max(jnp.abs(jnp.nan_to_num(pairs.values)), initial=0)
    largest = jnp.maximum(state.largest, largest)
    dtype = state.krylov.direction.dtype
    # Of a full basis: what has converged in one stays so when it is compressed.
    unknown = rounding(
        largest,
        eps=float(jnp.finfo(dtype).eps),
        dtype=dtype,
        num_rows=jnp.int32(state.num_rows),
    )
    # What is reported is the bound and what rounding adds.
    threshold = jnp.maximum(state.tol * largest - unknown, unknown)
    mass = jnp.sum(pairs.weights * (state.search.own @ pairs.weights), 0)
    mass = jnp.where(is_pair(pairs.bounds), mass, 0)
    return _Standing(largest, threshold, pairs.bounds <= threshold, mass)


def _decided(state: EigenState, pairs: _Pairs, standing: _Standing) -> EigenState:
    krylov, search, k = state.krylov, state.search, state.k
    size = krylov.basis.space.size
    small, bounds, outside = standing.small[:k], pairs.bounds[:k], pairs.outside[:k]
    all_converged = jnp.all(small)
    spans_everything = _basis.spans_all(krylov.basis)
    is_broken = ~jnp.isfinite(krylov.beta)

    if state.certificate == "search":
        inside = standing.mass > _SOME
        nothing_hides = _search.is_over(search, pairs.values, inside, which=state.which, size=size)
        has_found = _search.has_found(search, pairs.values, inside, standing.threshold, state.which)
        search_is_done = search.active & all_converged & ~has_found & nothing_hides
        # Searching drops the residuals of the kept pairs for good: they go in with room to spare,
        # or with nothing to gain.
        has_room = bounds <= standing.threshold / 2
        gains_nothing = outside <= standing.threshold / 16
        may_search = all_converged & jnp.all(has_room | gains_nothing)
        # What dropped residuals keep from converging has to be found anew.
        is_held_back = is_pair(bounds) & (bounds - outside > standing.threshold)
        is_stuck = search.active & jnp.any(is_held_back)
        done = spans_everything | is_broken | search_is_done
        wants_search = ~done & ((may_search & (has_found | ~search.active)) | is_stuck)
    elif state.certificate == "start":
        targets = _search.targets_of(pairs.values[:k], standing.threshold, state.which)
        exists = is_pair(pairs.bounds)
        search = _search.seen_from_start(search, targets, pairs.values, pairs.outside, exists)
        is_enough = _search.start_is_enough(search, which=state.which, size=size)
        done = spans_everything | is_broken | (all_converged & is_enough)
        wants_search = jnp.zeros_like(all_converged)
    else:
        # Before, an eigenvalue at the other end may stand for one that is wanted; the invariant
        # space of a random start has all of them, once each.
        has_seen_both_ends = state.num_matvecs >= min(size, _search.fewest_steps(size))
        has_seen_both_ends |= krylov.broke_down
        done = spans_everything | is_broken | (all_converged & has_seen_both_ends)
        wants_search = jnp.zeros_like(all_converged)

    # A residual norm seldom falls to less than a tenth in one product; in a search each one counts.
    far = jnp.max(bounds) / jnp.where(standing.threshold > 0, standing.threshold, 1)
    far = jnp.where(search.active, 1, jnp.clip(far, 1, 10.0**_MOST_WAITING))
    waits = jnp.maximum(jnp.floor(jnp.log10(far)).astype(jnp.int32), 0)
    waits = jnp.maximum(1 + waits, k - krylov.filled)

    # The first search keeps the whole basis, later ones what has converged.
    is_cramped = search.active | (krylov.filled + _ROOM > state.num_rows)
    # With room for the whole space nothing is to be gained by less.
    is_cramped &= jnp.bool_(state.num_rows < size)
    is_full = krylov.filled >= state.num_rows
    return dataclasses.replace(
        state,
        search=search,
        values=jnp.where(is_broken, jnp.nan, pairs.values),
        weights=pairs.weights,
        bounds=pairs.bounds,
        largest=standing.largest,
        threshold=standing.threshold,
        small=standing.small,
        mass=standing.mass,
        wants_restart=jnp.where(wants_search, is_cramped, is_full) & ~done,
        wants_search=wants_search,
        done=done,
        num_assessed=state.num_matvecs,
        next_assessment=state.num_matvecs + waits,
    )


def _preference(values: jax.Array, valid: jax.Array, which: str) -> jax.Array:
    """Sort key: wanted values first, what is not valid last."""
    if which == "LA":
        key = -values
    elif which == "SA":
        key = values
    elif which == "LM":
        key = -jnp.abs(values)
    else:
        # From both ends in turn, largest first: rank r from above is 2 r, from below 2 r + 1.
        from_below = jnp.argsort(jnp.argsort(jnp.where(valid, values, jnp.inf)))
        from_above = jnp.sum(valid) - 1 - from_below
        turn = jnp.where(from_above <= from_below, 2 * from_above, 2 * from_below + 1)
        key = turn.astype(values.dtype)
    return jnp.where(valid, key, jnp.inf)


def begin_search(state: EigenState) -> EigenState:
    """Goes on from a fresh direction; the residual of the rows so far is dropped and charged."""
    return _searching(dataclasses.replace(state, krylov=redirect(state.krylov)))


@on_host()
@precisely
def _searching(state: EigenState) -> EigenState:
    known = state.values[: state.k]
    return dataclasses.replace(
        state,
        search=_search.begin(
            known,
            _search.targets_of(known, state.threshold, state.which),
            num_rows=state.values.size,
            num_searches=state.search.num_searches + 1,
        ),
        wants_search=jnp.zeros_like(state.wants_search),
    )


def restart(state: EigenState) -> EigenState:
    """Compresses the basis to Ritz vectors; the state is whole again at its end."""
    state, weights, num_kept = _compressed(state)
    basis, newest = _recombined(state.krylov.basis, state.krylov.newest, weights, num_kept)
    return dataclasses.replace(state, krylov=state.krylov._replace(basis=basis, newest=newest))


@one_program(donate=("basis", "newest"))
@precisely
def _recombined(
    basis: _basis.Basis, newest: jax.Array, weights: jax.Array, num_kept: jax.Array
) -> tuple[_basis.Basis, jax.Array]:
    """The rows of weights' Q, and no newest row."""
    recombined = _basis.recombine(basis, weights, num_kept)
    return recombined, basis.space.constrain(jnp.zeros_like(newest))


@on_host()
@precisely
def _compressed(state: EigenState) -> tuple[EigenState, jax.Array, jax.Array]:
    """The state but for its rows, the weights that combine them, and how many there are then."""
    krylov, search = state.krylov, state.search
    rows = jnp.arange(krylov.basis.num_rows, dtype=jnp.int32)
    # If a search follows, the residual is lost: what has not converged can no longer.
    kept = jnp.isfinite(state.values) & is_pair(state.bounds) & (state.small | ~state.wants_search)
    kept = _most_useful(kept, state)
    order = jnp.argsort(~kept, stable=True)
    num_kept = jnp.sum(kept, dtype=jnp.int32)
    inside = rows < num_kept
    weights = jnp.where(inside[None], state.weights[:, order], 0)
    values = jnp.where(inside, state.values[order], 0)
    # Every recombination of the rows rounds them once more.
    unit = _RECOMBINED * float(jnp.finfo(krylov.direction.dtype).eps) * state.largest
    blur = jnp.hypot(krylov.blur, unit * jnp.sqrt(num_kept.astype(unit.dtype)))
    krylov = krylov._replace(
        projected=jnp.diag(values),
        largest=jnp.max(jnp.abs(values)),
        coupling=krylov.coupling @ weights,
        lost=krylov.lost @ weights,
        blur=blur,
    )
    bounds = state.bounds[order] + blur - state.krylov.blur
    state = dataclasses.replace(
        state,
        krylov=krylov,
        search=_search.compressed(search, weights, state.values, is_pair(state.bounds) & ~kept),
        num_restarts=state.num_restarts + 1,
        weights=jnp.diag(inside.astype(weights.dtype)),
        values=values,
        bounds=jnp.where(inside, bounds, unbounded(bounds.dtype)),
        small=state.small[order] & inside,
        mass=jnp.where(inside, state.mass[order], 0),
        wants_restart=jnp.zeros_like(state.wants_restart),
    )
    return state, weights, num_kept


def _most_useful(allowed: jax.Array, state: EigenState) -> jax.Array:
    """(rows,), bool, the pairs to go on with among those allowed, in the order of preference.

    Beside the wanted ones and the next best, those of the other end: outliers there, such as those
    of a network above a small bulk, would come back after each restart before the wanted end moves.
    """
    most = min(state.k + max(1, (state.num_rows - state.k) // 2), state.num_rows - 1)
    # From both ends, or by magnitude, what is wanted least lies within the spectrum.
    far = (most - state.k) // 2 if state.which in ("LA", "SA") else 0
    from_front, from_back = jnp.cumsum(allowed), jnp.cumsum(allowed[::-1])[::-1]
    return allowed & ((from_front <= most - far) | (from_back <= far))
