"""Eigenpairs from vectors that are known: the same answer, sooner."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import curvature
from tests import oracles

EIGENVALUES = np.r_[9.0, 7.0, 5.0, 3.0, np.linspace(0, 0.5, 92), -1.0, -2.0, -4.0, -6.0]
MATRIX = oracles.symmetric(EIGENVALUES, 0)
VECTORS = np.linalg.eigh(MATRIX)[1].T.astype(np.float32)  # ascending
WANTED = {"LA": [9, 7, 5], "SA": [-6, -4, -2], "LM": [9, 7, -6], "BE": [9, 7, -6]}
TOP = VECTORS[::-1][:3]


@functools.cache
def operator():
    return curvature.from_matvec(oracles.matvec_of(MATRIX), jnp.zeros(len(MATRIX), jnp.float32))


def solve(k=3, seed=1, start=None, **options):
    start = None if start is None else jnp.asarray(start)
    return curvature.top_eigenpairs(operator(), k, key=jax.random.key(seed), start=start, **options)


def assert_right(found, expected):
    np.testing.assert_allclose(np.sort(found.values), np.sort(expected), atol=1e-2)
    vectors = np.asarray(found.vectors, np.float64)
    residuals = vectors @ MATRIX - np.asarray(found.values)[:, None] * vectors
    assert np.all(np.linalg.norm(residuals, axis=1) <= found.residual_norms)
    assert np.all(found.converged)


@pytest.mark.parametrize("which", ["LA", "BE"])
def test_an_earlier_result_gives_the_same_sooner(which):
    cold = solve(which=which)
    warm = curvature.top_eigenpairs(operator(), 3, key=jax.random.key(5), which=which, start=cold)
    assert_right(warm, WANTED[which])
    assert bool(warm.complete)
    assert float(warm.miss_probability) <= 0.02
    assert int(warm.num_matvecs) < int(cold.num_matvecs)


def test_exact_vectors_end_after_as_many_products():
    counts = []
    solver = curvature.top_eigenpairs_solver(
        operator(), 3, key=jax.random.key(0), start=jnp.asarray(TOP)
    )
    state = solver.init()
    while not solver.done(state):
        state = solver.step(state)
        counts.append(bool(state.search.active))
    assert counts.index(True) == 2  # the search begins with the third product
    assert_right(solver.result(state), WANTED["LA"])


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("first", [0, 40])
def test_a_start_orthogonal_to_the_wanted_ends_right(first, search):
    # Eigenvectors, so that no product leaves their span: the other end, and the middle.
    found = solve(start=VECTORS[first : first + 3], search=search)
    assert_right(found, WANTED["LA"])
    assert bool(found.complete) == search


def test_without_a_random_part_the_wrong_ones_would_be_taken():
    # The named wrong version of the test above, by hand.
    start = jnp.asarray(VECTORS[0])
    alone = curvature.lanczos(operator(), start, 1)
    assert float(alone.alphas[0]) == pytest.approx(-6, abs=1e-3)
    assert float(jnp.linalg.norm(alone.residual)) < 1e-3


@pytest.mark.parametrize(
    "start",
    [
        TOP[:1],
        np.concatenate([TOP, VECTORS[:4]]),
        np.stack([TOP[0], TOP[0], 0 * TOP[0], -TOP[1]]),
        1e-30 * TOP,
        TOP + 0.05 * np.random.default_rng(0).normal(size=TOP.shape).astype(np.float32),
    ],
    ids=["fewer", "more", "dependent", "tiny", "rough"],
)
def test_any_vectors_end_right(start):
    found = solve(start=start)
    assert_right(found, WANTED["LA"])
    assert bool(found.complete)


def test_copies_are_found_from_one_of_them():
    diagonal = jnp.asarray([5.0, 5.0, 3.0, 1.0] + [0.25, 0.125] * 20, jnp.float32)
    twice = curvature.from_matvec(lambda v: v * diagonal, diagonal)
    start = jnp.eye(44, dtype=jnp.float32)[:1]
    found = curvature.top_eigenpairs(twice, 2, key=jax.random.key(0), tol=1e-2, start=start)
    np.testing.assert_allclose(found.values, [5, 5], atol=0.1)


def test_in_jit_and_what_is_not_finite_there():
    compiled = jax.jit(lambda start: solve(start=start))
    assert_right(compiled(jnp.asarray(TOP)), WANTED["LA"])
    # A traced start that is no direction is a random one.
    assert_right(compiled(jnp.full_like(TOP, jnp.nan)), WANTED["LA"])


def test_a_checkpoint_is_that_of_its_start(tmp_path):
    checkpoint = curvature.Checkpoint(tmp_path / "run", every=2)
    whole = solve(start=TOP, checkpoint=checkpoint)
    again = solve(start=TOP, checkpoint=checkpoint)
    np.testing.assert_array_equal(whole.values, again.values)
    with pytest.raises(ValueError, match="start"):
        solve(start=VECTORS[:3], checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("start", "error", "text"),
    [
        (np.zeros((2, 100), np.float32), ValueError, "must not be zero"),
        (np.full((1, 100), np.nan, np.float32), ValueError, "must be finite, got NaN"),
        (np.ones((2, 99), np.float32), ValueError, r"must have shape \(2, 100\), got \(2, 99\)"),
        (np.ones(100, np.float32), ValueError, "must have a leading axis, the number of vectors"),
        (np.ones((101, 100), np.float32), ValueError, "must hold between 1 and 100 vectors"),
        (np.ones((2, 100), np.int32), TypeError, "must be real floating point"),
    ],
)
def test_bad_starts_are_refused(start, error, text):
    with pytest.raises(error, match=f"`start` {text}"):
        solve(start=start)


def test_the_tree_of_other_parameters_is_refused():
    with pytest.raises(ValueError, match="`start` must have the tree structure"):
        curvature.top_eigenpairs(
            operator(), 1, key=jax.random.key(0), start={"w": jnp.ones((1, 100))}
        )


def test_of_parameters_a_tree_with_a_leading_axis():
    problem = oracles.problem()
    hessian = curvature.hessian(oracles.loss_fn, problem.params, *problem.batch)
    cold = curvature.top_eigenpairs(hessian, 2, key=jax.random.key(0))
    for start in (cold, cold.vectors):
        warm = curvature.top_eigenpairs(hessian, 2, key=jax.random.key(1), start=start)
        np.testing.assert_allclose(warm.values, cold.values, rtol=1e-3)
    head = curvature.hessian(
        oracles.loss_fn, problem.params, *problem.batch, wrt={"first": False, "second": True}
    )
    part = curvature.top_eigenpairs(head, 1, key=jax.random.key(0))
    again = curvature.top_eigenpairs(head, 1, key=jax.random.key(1), start=part)
    np.testing.assert_allclose(again.values, part.values, rtol=1e-3)
    with pytest.raises(ValueError, match="`start` must have the tree structure"):
        curvature.top_eigenpairs(head, 1, key=jax.random.key(0), start=cold)
