import _thread

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import regjax
from regjax import curvature
from tests import oracles


def operator_with(eigenvalues, seed=0):
    matrix = oracles.symmetric(eigenvalues, seed)
    return matrix, curvature.from_matvec(oracles.matvec_of(matrix), jnp.zeros(len(matrix)))


def wanted(eigenvalues, k, which):
    ascending = np.sort(eigenvalues)
    if which == "LA":
        return ascending[::-1][:k]
    if which == "SA":
        return ascending[:k]
    if which == "LM":
        return np.sort(ascending[np.argsort(-np.abs(ascending))[:k]])[::-1]
    high = (k + 1) // 2
    return np.concatenate([ascending[::-1][:high], ascending[: k - high][::-1]])


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("max_basis", [None, 12])
def test_wanted_pairs_with_true_residuals(which, max_basis):
    eigenvalues = np.random.default_rng(3).normal(size=150) ** 3
    matrix, operator = operator_with(eigenvalues)
    result = curvature.top_eigenpairs(
        operator, 5, key=jax.random.key(0), which=which, max_basis=max_basis, max_matvecs=2000
    )
    assert bool(result.complete)
    assert np.all(result.converged)
    scale = np.abs(eigenvalues).max()
    expected = np.sort(wanted(eigenvalues, 5, which))
    np.testing.assert_allclose(np.sort(result.values), expected, atol=1e-3 * scale)
    vectors = np.asarray(result.vectors, np.float64)
    residuals = np.linalg.norm(
        vectors @ matrix - np.asarray(result.values)[:, None] * vectors, axis=1
    )
    # The bound is a bound, and not an idle one.
    assert np.all(residuals <= result.residual_norms)
    assert np.all(result.residual_norms <= 1e-3 * scale)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(5), atol=1e-5)


def test_order_of_both_ends():
    _, operator = operator_with(np.arange(-20.0, 31.0))
    result = curvature.top_eigenpairs(operator, 5, key=jax.random.key(0), which="BE")
    np.testing.assert_allclose(result.values, [30, -20, 29, -19, 28], atol=0.05)


@pytest.mark.parametrize("copies", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_every_copy_of_a_multiple_eigenvalue_is_found(copies, seed):
    eigenvalues = np.concatenate([[5.0] * copies, [3.0, 1.0], np.linspace(0, 0.5, 95)])
    _, operator = operator_with(eigenvalues, seed)
    result = curvature.top_eigenpairs(operator, copies + 1, key=jax.random.key(seed), tol=1e-4)
    np.testing.assert_allclose(result.values, [5.0] * copies + [3.0], atol=1e-3)


def test_without_the_search_the_second_copy_is_missed():
    # The named wrong version of the test above. The matrix is diagonal and the start exact, so
    # that no rounding brings the second copy in.
    diagonal = jnp.asarray([5.0, 5.0, 3.0, 1.0] + [0.25, 0.125] * 20)
    operator = curvature.from_matvec(lambda v: v * diagonal, diagonal)
    alone = curvature.top_eigenpairs(operator, 2, key=jax.random.key(0), tol=1e-2, search=False)
    searched = curvature.top_eigenpairs(operator, 2, key=jax.random.key(0), tol=1e-2)
    np.testing.assert_allclose(alone.values, [5, 3], atol=0.1)
    np.testing.assert_allclose(searched.values, [5, 5], atol=0.1)


@pytest.mark.parametrize(("size", "k"), [(1, 1), (3, 3), (30, 30), (45, 44), (60, 60)])
def test_all_of_a_small_spectrum(size, k):
    eigenvalues = np.random.default_rng(0).normal(size=size)
    _, operator = operator_with(eigenvalues)
    result = curvature.top_eigenpairs(operator, k, key=jax.random.key(0))
    np.testing.assert_allclose(result.values, np.sort(eigenvalues)[::-1][:k], atol=2e-3)
    assert bool(result.complete)


def test_unconverged_values_are_flagged():
    _, operator = operator_with(np.linspace(0, 1, 200))
    result = curvature.top_eigenpairs(operator, 3, key=jax.random.key(0), max_matvecs=6)
    assert int(result.num_matvecs) == 6
    assert not np.any(result.converged)
    assert not bool(result.complete)
    assert np.all(result.residual_norms > 1e-3)


def test_zero_and_identity_matrices():
    for factor in (0.0, 1.0):
        operator = curvature.from_matvec(lambda v, factor=factor: factor * v, jnp.zeros(100))
        result = curvature.top_eigenpairs(operator, 3, key=jax.random.key(0))
        np.testing.assert_allclose(result.values, [factor] * 3, atol=1e-5)
        assert bool(result.complete)


def test_nan_products_end_at_once_and_converge_to_nothing():
    operator = curvature.from_matvec(lambda v: v * jnp.nan, jnp.zeros(100))
    solve = jax.jit(lambda operator, key: curvature.top_eigenpairs(operator, 3, key=key))
    result = solve(operator, jax.random.key(0))
    assert int(result.num_matvecs) == 1
    assert np.all(np.isnan(result.values))
    assert not np.any(result.converged)


def test_tiny_and_large_scales_are_relative():
    for scale in (1e-12, 1e12):
        eigenvalues = scale * np.random.default_rng(3).normal(size=80) ** 3
        _, operator = operator_with(eigenvalues)
        result = curvature.top_eigenpairs(operator, 3, key=jax.random.key(0), tol=1e-4)
        assert bool(result.complete)
        np.testing.assert_allclose(result.values, wanted(eigenvalues, 3, "LA"), rtol=1e-3)


def test_compiled_loop_gives_the_host_driven_result():
    _, operator = operator_with(np.random.default_rng(3).normal(size=120) ** 3)
    solve = jax.jit(lambda operator, key: curvature.top_eigenpairs(operator, 4, key=key))
    compiled = solve(operator, jax.random.key(0))
    driven = curvature.top_eigenpairs(operator, 4, key=jax.random.key(0))
    np.testing.assert_allclose(compiled.values, driven.values, rtol=1e-4)
    assert int(compiled.num_matvecs) == pytest.approx(int(driven.num_matvecs), abs=3)
    assert bool(compiled.complete)


def test_tracks_the_top_eigenvalue_inside_a_training_scan():
    problem = oracles.problem()

    def step(params, key):
        operator = curvature.hessian(oracles.loss_fn, params, *problem.batch)
        result = curvature.top_eigenpairs(operator, 1, key=key, max_matvecs=40)
        grads = jax.grad(oracles.loss_fn)(params, *problem.batch)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), (params, result.values[0])

    keys = jax.random.split(jax.random.key(0), 4)
    _, (history, values) = jax.jit(lambda p: jax.lax.scan(step, p, keys))(problem.params)
    for i in range(4):
        params = jax.tree.map(lambda leaf, i=i: leaf[i], history)
        dense = oracles.dense_hessian(oracles.loss_fn, params, *problem.batch)
        assert float(values[i]) == pytest.approx(np.linalg.eigvalsh(dense)[-1], rel=2e-3)


def test_stages_by_hand_are_the_plain_function():
    _, operator = operator_with(np.random.default_rng(3).normal(size=80) ** 3)
    solver = curvature.top_eigenpairs_solver(operator, 3, key=jax.random.key(0))
    state = solver.init()
    while not solver.done(state):
        state = solver.step(state)
    ours = solver.result(state)
    plain = curvature.top_eigenpairs(operator, 3, key=jax.random.key(0))
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_array_equal(one, other)


def test_interrupt_returns_what_was_computed():
    _, operator = operator_with(np.linspace(0, 1, 300))

    def callback(done, total, progress):
        del total
        if done == 5:
            _thread.interrupt_main()

    with pytest.raises(regjax.Interrupted) as caught:
        curvature.top_eigenpairs(operator, 3, key=jax.random.key(0), callback=callback)
    assert int(caught.value.result.num_matvecs) == 5
    assert np.all(np.isfinite(caught.value.result.values))
    with pytest.raises(KeyboardInterrupt):  # the old handler is back
        _thread.interrupt_main()


def test_vectors_are_trees_like_the_parameters():
    problem = oracles.problem()
    operator = curvature.hessian(oracles.loss_fn, problem.params, *problem.batch)
    result = curvature.top_eigenpairs(operator, 2, key=jax.random.key(0))
    top = jax.tree.map(lambda leaf: leaf[0], result.vectors)
    image = operator.matvec(top)
    for ours, vector in zip(jax.tree.leaves(image), jax.tree.leaves(top), strict=True):
        np.testing.assert_allclose(ours, result.values[0] * vector, atol=2e-3 * result.values[0])


def test_error_texts():
    _, operator = operator_with([1.0, 2.0, 3.0, 4.0, 5.0])
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"`k` must be between 1 and 5 \(.*\), got 6"):
        curvature.top_eigenpairs(operator, 6, key=key)
    with pytest.raises(ValueError, match=r"`tol` must be non-negative, got -0.1"):
        curvature.top_eigenpairs(operator, 1, key=key, tol=-0.1)
    with pytest.raises(ValueError, match="`which` must be one of LA, SA, LM, BE, got 'top'"):
        curvature.top_eigenpairs(operator, 1, key=key, which="top")
    with pytest.raises(
        ValueError, match=r"`max_basis` must be between 3 \(`k` and two more .*\) and 5 .*, got 2"
    ):
        curvature.top_eigenpairs(operator, 1, key=key, max_basis=2)
    with pytest.raises(TypeError, match=r"`key` must be a typed key from jax.random.key"):
        curvature.top_eigenpairs(operator, 1, key=jax.random.PRNGKey(0))
