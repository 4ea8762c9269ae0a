"""Eigenpairs of multiple, zero and clustered eigenvalues, of which networks are full."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from sklearn.datasets import load_digits

from regjax import curvature
from tests.curvature import test_eigen

WHICH = ("LA", "SA", "LM", "BE")
# Of the comparison itself: vectors are orthonormal, and products exact, to some units of rounding.
ROUNDING = 1e-6


def multiply(matrix, vector):
    return matrix @ vector


def rotated(eigenvalues, seed):
    random = np.random.default_rng(seed)
    vectors = np.linalg.qr(random.normal(size=(len(eigenvalues),) * 2))[0]
    matrix = (vectors * eigenvalues) @ vectors.T
    return ((matrix + matrix.T) / 2).astype(np.float32)


def ordered(values, which):
    values = np.asarray(values, np.float64)
    if which == "LM":
        return np.sort(np.abs(values))[::-1]
    return np.sort(values) if which == "BE" else values


def wanted(eigenvalues, k, which):
    return ordered(test_eigen.wanted(eigenvalues, k, which), which)


def assert_bounded(residuals, residual_norms, scale):
    found = np.linalg.norm(residuals, axis=1)
    assert np.all(found <= np.asarray(residual_norms) + ROUNDING * scale), (found, residual_norms)


def is_missed(matrix, result, k, which):
    """Whether the list lacks an eigenvalue; all else of what is complete is right."""
    matrix = np.asarray(matrix, np.float64)
    exact = np.linalg.eigvalsh(matrix)
    scale = np.abs(exact).max()
    assert bool(result.complete)
    vectors = np.asarray(result.vectors, np.float64)
    residuals = vectors @ matrix - np.asarray(result.values)[:, None] * vectors
    assert_bounded(residuals, result.residual_norms, scale)
    assert np.all(np.asarray(result.residual_norms) <= 1.1e-3 * scale + 1e-30)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(k), atol=1e-4)
    error = np.abs(ordered(result.values, which) - wanted(exact, k, which))
    return bool(np.any(error > 2e-3 * scale))


def spectra(size, random):
    """Named spectra of one size with multiplicities of all kinds."""
    copies = int(random.integers(2, size))
    centres = random.normal(size=max(1, size // 7))
    return {
        "identity": np.ones(size),
        "zero": np.zeros(size),
        "plus and minus one": random.choice([-1.0, 1.0], size),
        "rank one": np.r_[3.0, np.zeros(size - 1)],
        "two values": np.r_[np.ones(copies), np.zeros(size - copies)],
        "one multiple": np.r_[np.full(copies, random.normal()), random.normal(size=size - copies)],
        "a zero block": np.r_[random.normal(size=size - size // 2), np.zeros(size // 2)],
        "clusters": random.choice(centres, size) * (1 + 1e-7 * random.normal(size=size)),
    }


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize(("size", "k"), [(8, 3), (12, 12), (20, 7), (60, 5), (120, 11)])
def test_what_is_complete_is_right(size, k, which):
    solve = jax.jit(
        lambda operator, key: curvature.top_eigenpairs(operator, k, key=key, which=which)
    )
    random, missed = np.random.default_rng(size + k), 0
    for seed in range(2):
        for eigenvalues in spectra(size, random).values():
            matrix = rotated(eigenvalues, seed)
            operator = curvature.from_matvec(
                Partial(multiply, jnp.asarray(matrix)), jnp.zeros(size)
            )
            missed += is_missed(matrix, solve(operator, jax.random.key(seed)), k, which)
    assert missed <= 1  # of 16 fixed starts, at 1 % each at most


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
    exact = wanted(np.linalg.eigvalsh(matrix), 4, which)
    np.testing.assert_allclose(ordered(result.values, which), exact, atol=1e-4 * 4)
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
