"""The search for passed-over eigenvalues: its overlaps against the true ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.claims import missed_copies
from regjax import curvature
from regjax.curvature import _assessment, _krylov, _search

# The third eigenvalue is double: the first Krylov space holds one combination of its vectors.
DIAGONAL = np.concatenate([[3.0, 2.5, 2.0, 2.0, 1.0], np.linspace(0.3, 0, 195)])
OPERATOR = curvature.from_matvec(lambda v: v * jnp.asarray(DIAGONAL, v.dtype), jnp.zeros(200))


def grow(krylov, steps):
    for _ in range(steps):
        krylov = _krylov.expand(krylov, OPERATOR.matvec(krylov.direction))
    return krylov


def first_space():
    start = jax.random.normal(jax.random.key(0), (200,))
    # The part of the double eigenvalue's space that the start does not see.
    missed = np.zeros(200)
    missed[2:4] = [-start[3], start[2]]
    return grow(
        _krylov.empty(OPERATOR.space, start, 30, jax.random.key(1)), 6
    ), missed / np.linalg.norm(missed)


def test_overlaps_are_those_of_the_missed_eigenvector():
    krylov, missed = first_space()
    krylov = _krylov.redirect(krylov)
    targets = jnp.asarray([2.0, -1.0]) * krylov.scale  # as all numbers of a basis
    search = _search.begin(targets, targets, num_rows=krylov.basis.num_rows, num_searches=1)
    share = float(missed @ np.asarray(krylov.direction))
    assert abs(share) > 1e-3
    for _ in range(5):
        krylov = grow(krylov, 1)
        search = _search.follow(search, krylov)
        rows = np.concatenate(krylov.basis.blocks)
        np.testing.assert_allclose(share * np.asarray(search.overlaps[0]), rows @ missed, atol=1e-3)
        ahead = missed @ np.asarray(krylov.direction)
        assert share * float(search.next_overlap[0]) == pytest.approx(ahead, abs=1e-3)
        # The bound: the overlap is at most what the evidence leaves.
        assert abs(share) <= (1 + 1e-3) / np.sqrt(float(search.evidence[0]))
    # Five steps are enough to know: the rest of the spectrum lies below 1.
    assert float(search.evidence[0]) > 1e3


def test_an_invariant_space_leaves_nothing_to_search():
    identity = curvature.from_matvec(lambda v: v, jnp.zeros(50))
    result = curvature.top_eigenpairs(identity, 2, key=jax.random.key(0))
    assert bool(result.complete)
    assert float(result.miss_probability) == 0


def test_miss_probability_is_reported_and_holds():
    result = curvature.top_eigenpairs(OPERATOR, 4, key=jax.random.key(0))
    assert float(result.miss_probability) <= 0.01
    alone = curvature.top_eigenpairs(OPERATOR, 4, key=jax.random.key(0), search=False)
    assert float(alone.miss_probability) == 1


@pytest.mark.parametrize("copies", [5, 9])
def test_the_promise_is_shared_by_all_searches(copies):
    """Each search but the last could have been the last, and have missed what it found."""
    diagonal = jnp.asarray(np.r_[np.ones(copies), np.linspace(0.5, 0, 100)], jnp.float32)
    operator = curvature.from_matvec(lambda v: v * diagonal, diagonal)
    solver = curvature.top_eigenpairs_solver(operator, copies, key=jax.random.key(copies))
    state = solver.init()
    while not solver.done(state):
        state = solver.step(state)
    count = int(state.search.num_searches)
    assert count > 1
    spent = 0.01 * sum(1 / (s * (s + 1)) for s in range(1, count))
    assert (
        spent
        <= float(solver.result(state).miss_probability)
        <= spent + 0.01 / (count * (count + 1))
    )


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_copies_are_missed_as_rarely_as_claimed(which):
    sign = -1 if which == "SA" else 1
    diagonal = jnp.asarray(sign * DIAGONAL, jnp.float32)
    operator = curvature.from_matvec(lambda v: v * diagonal, diagonal)
    solve = jax.jit(lambda key: curvature.top_eigenpairs(operator, 4, key=key, which=which))
    ascending = np.sort(sign * DIAGONAL)
    # From both ends: 3, 2.5 and two zeros.
    wanted = {"LA": ascending[-4:], "SA": ascending[:4], "LM": ascending[-4:]}
    expected = wanted.get(which, np.concatenate([ascending[:2], ascending[-2:]]))
    missed = 0
    for seed in range(40):
        values = np.sort(solve(jax.random.key(seed)).values)
        missed += bool(np.max(np.abs(values - expected)) > 0.01)
    assert missed <= 2  # of 40 fixed starts, at 1 % each at most


def test_the_first_start_knows_the_overlaps_of_any_eigenvector():
    """Before and after a restart: they follow from the Ritz values and the betas alone."""
    place = 5  # of an eigenvalue of 0.3, which no Ritz value reaches in so few steps
    start = jax.random.normal(jax.random.key(3), (200,))
    krylov = _krylov.empty(OPERATOR.space, start, 30, jax.random.key(1))
    share = float(krylov.direction[place])
    search = _search.begin(jnp.zeros(4), jnp.zeros(2), num_rows=30, num_searches=0)
    solver = curvature.top_eigenpairs_solver(OPERATOR, 4, key=jax.random.key(2), max_basis=30)
    state = solver.init()
    for steps, restarts in ((1, False), (4, False), (2, True), (3, False)):
        for _ in range(steps):
            krylov = grow(krylov, 1)
            search = _search.follow(jax.tree.map(jnp.asarray, search), krylov)
        search = search._replace(targets=jnp.full(2, 0.3) * krylov.scale)
        state = dataclasses.replace(state, krylov=krylov, search=search)
        state = _assessment.assess(state)
        if restarts:
            state = _assessment.restart(dataclasses.replace(state, num_rows=8))
            assert int(state.krylov.filled) == int(krylov.filled) - 1
            state = dataclasses.replace(state, num_rows=30)
            krylov, search = state.krylov, state.search
        exists = _assessment.is_pair(state.bounds)
        couplings = krylov.coupling @ state.weights
        found = _search.seen_from_start(search, search.targets, state.values, couplings, exists)
        rows = np.concatenate(krylov.basis.blocks)[:, place]
        seen = np.sum(rows**2) + float(krylov.direction[place]) ** 2
        np.testing.assert_allclose(found.evidence, seen / share**2, rtol=1e-2)


def test_a_single_value_needs_no_second_start():
    """Its copies would not change the list; what lies beyond it, the first start has seen."""
    for which in ("LA", "SA", "LM"):
        found = curvature.top_eigenpairs_solver(OPERATOR, 1, key=jax.random.key(0), which=which)
        state = found.init()
        while not found.done(state):
            state = found.step(state)
        assert int(state.search.num_searches) == 0
        result = found.result(state)
        assert bool(result.complete)
        assert 0 < float(result.miss_probability) <= 0.02
    # From known vectors nothing is known of others: then there is a search.
    warm = curvature.top_eigenpairs_solver(
        OPERATOR, 1, key=jax.random.key(0), start=jnp.eye(200)[:1]
    )
    assert warm.init().certificate == "search"


def test_copies_are_missed_as_rarely_as_is_accepted():
    """A small part of benchmarks/claims/missed_copies.py, which has 2000 matrices."""
    found = missed_copies.missed(60, 3, 0.01, range(60))
    assert all(run["complete"] for run in found)
    assert max(run["promised"] for run in found) <= 0.01
    assert sum(run["wrong"] for run in found) <= 2


def test_overlaps_survive_a_restart():
    krylov, missed = first_space()
    krylov = _krylov.redirect(krylov)
    targets = jnp.full(2, 2.0) * krylov.scale
    search = _search.begin(jnp.zeros(4), targets, num_rows=krylov.basis.num_rows, num_searches=1)
    share = missed @ np.asarray(krylov.direction)
    for _ in range(4):
        krylov = grow(krylov, 1)
        search = _search.follow(search, krylov)
    solver = curvature.top_eigenpairs_solver(OPERATOR, 4, key=jax.random.key(2), max_basis=30)
    state = solver.init()
    state = _assessment.assess(dataclasses.replace(state, krylov=krylov, search=search))
    state = _assessment.restart(dataclasses.replace(state, wants_search=jnp.bool_(False)))
    rows = np.concatenate(state.krylov.basis.blocks)
    overlaps = share * np.asarray(state.search.overlaps[0])
    assert np.max(np.abs(overlaps)) > 0.1
    np.testing.assert_allclose(overlaps, rows @ missed, atol=1e-3)
