"""Eigenpairs of multiple, zero and clustered eigenvalues, of which networks are full."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from sklearn.datasets import load_digits

from benchmarks.claims import random_spectra
from regjax import curvature

# Of the comparison itself: vectors are orthonormal, and products exact, to some units of rounding.
ROUNDING = 1e-6


def multiply(matrix, vector):
    return matrix @ vector


def rotated(eigenvalues, seed):
    random = np.random.default_rng(seed)
    vectors = np.linalg.qr(random.normal(size=(len(eigenvalues),) * 2))[0]
    matrix = (vectors * eigenvalues) @ vectors.T
    return ((matrix + matrix.T) / 2).astype(np.float32)


def assert_bounded(residuals, residual_norms, scale):
    found = np.linalg.norm(residuals, axis=1)
    assert np.all(found <= np.asarray(residual_norms) + ROUNDING * scale), (found, residual_norms)


@pytest.mark.parametrize("which", random_spectra.ENDS)
@pytest.mark.parametrize(("size", "k"), [(8, 3), (12, 12), (60, 5)])
def test_what_is_complete_is_right(size, k, which):
    """A small part of benchmarks/claims/random_spectra.py, which has over a thousand matrices."""
    random, runs = np.random.default_rng(size + k), []
    solve = random_spectra.solver_of(size, k, which)
    for i, kind in enumerate(random_spectra.KINDS):
        copies = min(int(random.integers(1, 2 * k)), size - 1)
        values = random_spectra.eigenvalues(kind, size, copies, random)
        matrix = random_spectra.matrix_of(values, random, blocks=bool(i % 2))
        runs.append(random_spectra.look(solve, matrix, "float32", k, which, seed=i))
    runs = {name: [run[name] for run in runs] for name in runs[0]}
    assert all(runs["complete"])
    assert max(runs["promised"]) <= 0.02
    assert sum(runs["wrong"]) == 0  # for fixed starts; one in a hundred may be
    assert max(runs["bound"]) <= 1


def test_a_softmax_table_of_zeros():
    """20 tokens, 10 classes: the smaller curvature is 180-fold, 18 copies of it are wanted."""
    tokens = jnp.arange(20)
    labels = jnp.asarray(np.random.default_rng(0).integers(10, size=20))

    def loss_fn(table, tokens, labels):
        logits = jax.nn.log_softmax(table[tokens])
        return -jnp.mean(jnp.take_along_axis(logits, labels[:, None], 1))

    operator = curvature.hessian(loss_fn, jnp.zeros((20, 10)), tokens, labels)
    result = curvature.top_eigenpairs(operator, 20, key=jax.random.key(0))
    assert bool(result.complete)
    np.testing.assert_allclose(result.values, np.full(20, 0.005), rtol=1e-4)


def softmax_loss(head, inputs, targets):
    logits = jax.nn.log_softmax(inputs @ head)
    return -jnp.mean(jnp.take_along_axis(logits, targets[:, None], 1))


def square_loss(head, inputs, targets):
    return jnp.mean(jnp.sum((inputs @ head - jax.nn.one_hot(targets, 10)) ** 2, 1))


@pytest.mark.parametrize("loss_fn", [softmax_loss, square_loss])
@pytest.mark.parametrize("seed", range(3))
def test_a_linear_head_at_zero(loss_fn, seed):
    """Each eigenvalue nine or ten times: bounds stay bounds over many searches."""
    images, labels = load_digits(return_X_y=True)
    inputs = jnp.asarray(images[:300] / 16, jnp.float32)
    operator = curvature.hessian(loss_fn, jnp.zeros((64, 10)), inputs, jnp.asarray(labels[:300]))
    exact = np.asarray(curvature.exact_spectrum(operator))[::-1]
    result = curvature.top_eigenpairs(operator, 20, key=jax.random.key(seed))
    assert bool(result.complete)
    np.testing.assert_allclose(result.values, exact[:20], atol=1e-3 * exact[0])
    assert float(result.residual_norms.max()) <= 1.1e-3 * exact[0]
    assert int(result.num_matvecs) < 400


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["host", "jit"])
def test_a_limit_in_the_step_that_compresses_the_basis(wrap):
    """Order 300, basis of 48, 48 products: the state is whole after each step."""
    matrix = rotated(np.random.default_rng(3).normal(size=300) ** 3, 0)
    operator = curvature.from_matvec(Partial(multiply, jnp.asarray(matrix)), jnp.zeros(300))
    solve = lambda operator, key: curvature.top_eigenpairs(operator, 5, key=key, max_matvecs=48)
    result = wrap(solve)(operator, jax.random.key(0))
    vectors, values = np.asarray(result.vectors, np.float64), np.asarray(result.values)
    assert_bounded(vectors @ matrix - values[:, None] * vectors, result.residual_norms, 20)


def test_the_state_is_whole_between_all_steps():
    matrix = rotated(np.random.default_rng(3).normal(size=80) ** 3, 0)
    operator = curvature.from_matvec(Partial(multiply, jnp.asarray(matrix)), jnp.zeros(80))
    solver = curvature.top_eigenpairs_solver(operator, 4, key=jax.random.key(0), max_basis=10)
    state, restarts = solver.init(), 0
    for _ in range(60):
        if solver.done(state):
            break
        state = solver.step(state)
        restarts = int(state.num_restarts)
        found = solver.result(state)
        valid = np.isfinite(np.asarray(found.values))
        vectors = np.asarray(found.vectors, np.float64)[valid]
        values = np.asarray(found.values)[valid]
        residuals = vectors @ matrix - values[:, None] * vectors
        assert_bounded(residuals, np.asarray(found.residual_norms)[valid], 10)
    assert restarts > 3


@pytest.mark.parametrize("which", ["LA", "SA", "BE"])
def test_bounds_do_not_grow_over_many_restarts(which):
    """A one-dimensional Laplacian: hundreds of restarts."""
    size = 100
    matrix = 2 * np.eye(size) - np.eye(size, k=1) - np.eye(size, k=-1)
    operator = curvature.from_matvec(
        Partial(multiply, jnp.asarray(matrix, jnp.float32)), jnp.zeros(size)
    )
    result = curvature.top_eigenpairs(
        operator, 4, key=jax.random.key(0), which=which, max_basis=16, max_matvecs=4000, tol=1e-4
    )
    assert np.all(result.converged)
    exact = random_spectra.wanted(np.linalg.eigvalsh(matrix), 4, which)
    np.testing.assert_allclose(np.sort(result.values), np.sort(exact), atol=1e-4 * 4)
    vectors = np.asarray(result.vectors, np.float64)
    residuals = vectors @ matrix - np.asarray(result.values)[:, None] * vectors
    assert_bounded(residuals, result.residual_norms, 4)


def test_without_a_search_no_list_is_called_complete():
    """Three outliers above a small bulk: the largest stood for the third smallest."""
    eigenvalues = np.r_[100.0, 50.0, 20.0, 1e-3 * np.random.default_rng(0).normal(size=197)]
    diagonal = jnp.asarray(eigenvalues, jnp.float32)
    operator = curvature.from_matvec(Partial(jnp.multiply, diagonal), diagonal)
    for seed in range(10):
        result = curvature.top_eigenpairs(
            operator, 3, key=jax.random.key(seed), which="SA", search=False
        )
        assert not bool(result.complete)


@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e-10, 1e19, 1e30])
def test_curvature_of_any_size_is_that_of_size_one(scale):
    """Powers of two are taken out, so that no square under- or overflows."""
    factor = 2.0 ** np.round(np.log2(scale))
    eigenvalues = np.random.default_rng(3).normal(size=80) ** 3
    key, found = jax.random.key(0), []
    for size in (1.0, factor):
        matrix = jnp.asarray(rotated(eigenvalues, 0) * np.float32(size))
        operator = curvature.from_matvec(Partial(multiply, matrix), jnp.zeros(80))
        top = curvature.top_eigenpairs(operator, 4, key=key, max_basis=12)
        run = curvature.lanczos(operator, jnp.ones(80), 12)
        pairs = curvature.ritz_pairs(run)
        density = curvature.spectral_density(operator, key=key, num_steps=8)
        assert bool(top.complete)
        found.append(
            [np.asarray(x, np.float64) / size for x in (
                top.values, top.residual_norms, run.alphas, run.betas, pairs.values,
                pairs.residual_norms, density.nodes, density.eigenvalues, density.residual_norms,
                density.trace, density.trace_standard_error,
            )]
        )  # fmt: skip
    largest = np.nanmax(np.abs(found[0][0]))
    for one, other in zip(*found, strict=True):
        # What is 0 but for rounding differs by rounding of the matrix.
        atol = max(2e-5 * np.nanmax(np.abs(one)), 1e-6 * largest)
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_a_start_of_any_length_is_a_direction(size):
    matrix = jnp.asarray(rotated(np.arange(1.0, 31.0), 0))
    operator = curvature.from_matvec(Partial(multiply, matrix), jnp.zeros(30))
    start = jax.random.normal(jax.random.key(0), (30,))
    one, other = (curvature.lanczos(operator, length * start, 8) for length in (1.0, size))
    np.testing.assert_allclose(other.alphas, one.alphas, rtol=1e-5)


@pytest.mark.parametrize("copies", [6, 10])
def test_all_copies_and_nothing_else(copies):
    """A search's find may be spread over all copies: asked of single pairs, lists were wrong."""
    values = np.r_[np.ones(copies), np.zeros(120 - copies)]
    solve = jax.jit(lambda operator, key: curvature.top_eigenpairs(operator, copies, key=key))
    for seed in range(12):
        matrix = jnp.asarray(rotated(values, seed))
        operator = curvature.from_matvec(Partial(multiply, matrix), jnp.zeros(120))
        result = solve(operator, jax.random.key(seed))
        assert bool(result.complete)
        np.testing.assert_allclose(result.values, np.ones(copies), atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_small_ends_of_a_large_spectrum(seed):
    """Outliers that come back after each compression kept a bulk from converging."""
    large = 1 / np.arange(1.0, 38) ** 1.5
    diagonal = jnp.asarray(np.r_[large, np.zeros(226), -0.02 / np.arange(1.0, 38)], jnp.float32)
    operator = curvature.from_matvec(Partial(jnp.multiply, diagonal), diagonal)
    result = curvature.top_eigenpairs(operator, 10, key=jax.random.key(seed), which="SA")
    assert bool(result.complete)
    assert int(result.num_matvecs) < 200
    np.testing.assert_allclose(result.values, np.sort(diagonal)[:10], atol=1e-3)


def test_a_tolerance_that_is_wider_than_the_bulk():
    bulk = 1e-3 * np.random.default_rng(0).normal(size=197)
    diagonal = jnp.asarray(np.r_[100.0, 50.0, 20.0, bulk], jnp.float32)
    operator = curvature.from_matvec(Partial(jnp.multiply, diagonal), diagonal)
    for seed in range(5):
        result = curvature.top_eigenpairs(operator, 3, key=jax.random.key(seed), which="SA")
        assert bool(result.complete)
        assert int(result.num_matvecs) < 20


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [3, 12, 40])
def test_bounds_at_rounding_level(size, dtype):
    """Nothing but rounding is left: 8 units of it were exceeded, by up to 1.34 times."""
    random = np.random.default_rng(size)

    def from_noise(operator, key):
        start = operator.space.unravel(operator.space.normal(key))
        return curvature.lanczos(operator, start, size, key=key)

    run = jax.jit(from_noise)
    for seed in range(20):
        signs = np.ones(size) if seed % 4 == 0 else random.choice([-1.0, 1.0], size)
        matrix = jnp.asarray(rotated(signs, seed), dtype)
        operator = curvature.from_matvec(Partial(multiply, matrix), jnp.zeros(size, dtype))
        found = run(operator, jax.random.key(seed))
        pairs = curvature.ritz_pairs(found)
        vectors = np.asarray(pairs.vectors, np.float64).T @ np.asarray(found.basis, np.float64)
        image = vectors @ np.asarray(matrix, np.float64)
        residuals = np.linalg.norm(image - np.asarray(pairs.values)[:, None] * vectors, axis=1)
        assert np.all(residuals <= pairs.residual_norms)


@pytest.mark.parametrize("ratio", [0.95, 0.96, 0.97])
def test_a_tolerance_at_rounding_level_survives_a_compression(ratio):
    """A threshold that follows the rows that are filled disowns what has converged, for good."""
    size, k = 300, 10
    bulk = np.abs(np.random.default_rng(0).normal(size=size - 40)) * ratio**40
    eigenvalues = 28 * np.sort(np.append(ratio ** np.arange(40), bulk))[::-1]

    @jax.jit
    def solve(matrix, key):
        operator = curvature.from_matvec(Partial(multiply, matrix), jnp.zeros(size))
        return curvature.top_eigenpairs(operator, k, key=key, tol=1e-6)

    for seed in range(4):
        found = solve(jnp.asarray(rotated(eigenvalues, seed)), jax.random.key(seed))
        assert bool(found.complete)
        assert int(found.num_matvecs) < 100
        assert np.all(np.abs(found.values - eigenvalues[:k]) <= found.residual_norms)
