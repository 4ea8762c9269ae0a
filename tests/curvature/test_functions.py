"""F(A) b, and sums over the spectrum, against dense matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import curvature
from tests.curvature.test_density import solve as density_of
from tests.curvature.test_density import spectrum
from tests.curvature.test_solve import operator_of, symmetric, vector_of

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def problem():
    values = np.geomspace(0.01, 3, 50)
    matrix, target = symmetric(values), vector_of(50)
    return matrix, target, operator_of(matrix), jnp.asarray(target, jnp.float32)


def dense(function, matrix, target):
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ (function(values) * (vectors.T @ target))


@pytest.mark.parametrize(
    ("ours", "theirs"), [(jnp.sqrt, np.sqrt), (lambda x: jnp.exp(-3 * x), lambda x: np.exp(-3 * x))]
)
def test_it_is_that_of_the_dense_matrix_and_the_estimate_is_above_the_error(ours, theirs, problem):
    matrix, target, operator, vector = problem
    expected = dense(theirs, matrix, target)
    for num_steps in (6, 12):
        found = curvature.apply_function(ours, operator, vector, num_steps=num_steps)
        error = np.linalg.norm(np.asarray(found.value) - expected)
        assert int(found.num_matvecs) == num_steps
        assert error <= float(found.error_estimate) + 1e-5
        half = curvature.apply_function(ours, operator, vector, num_steps=num_steps // 2)
        before = np.linalg.norm(np.asarray(half.value) - expected)
        assert abs(float(found.error_estimate) - before) <= error + 1e-5
    found = curvature.apply_function(ours, operator, vector, num_steps=50)
    np.testing.assert_allclose(found.value, expected, rtol=0, atol=2e-5)
    assert float(found.error_estimate) == 0


def test_polynomials_of_lower_degree_are_exact(problem):
    matrix, target, operator, vector = problem
    cubic = lambda x: 2 * x**3 - x + 1
    expected = dense(cubic, matrix, target)
    found = curvature.apply_function(cubic, operator, vector, num_steps=4)
    np.testing.assert_allclose(found.value, expected, rtol=0, atol=1e-4)
    # With one step fewer it is none of lower degree.
    found = curvature.apply_function(cubic, operator, vector, num_steps=3)
    assert np.abs(np.asarray(found.value) - expected).max() > 0.1


def test_the_inverse_is_what_conjugate_gradients_find_after_as_many_steps(problem):
    _, _, operator, vector = problem
    for num_steps in (3, 7):
        found = curvature.apply_function(lambda x: 1 / x, operator, vector, num_steps=num_steps)
        # One product more is the check of the residual.
        solved = curvature.solve(operator, vector, tol=1e-9, max_matvecs=num_steps + 1)
        np.testing.assert_allclose(found.value, solved.solution, rtol=0, atol=2e-3)


def test_exhausted_spaces_zero_and_what_a_function_has_closed_over(problem):
    _, _, operator, vector = problem
    ones = curvature.identity(operator.space)
    found = curvature.apply_function(jnp.exp, 2 * ones, vector, num_steps=5)
    np.testing.assert_allclose(found.value, np.exp(2) * np.asarray(vector), rtol=1e-5)
    assert (int(found.num_matvecs), float(found.error_estimate)) == (1, 0)
    found = curvature.apply_function(jnp.log, operator, 0 * vector, num_steps=3)
    assert not np.any(np.asarray(found.value))
    factor = {"by": 1.0}
    scaled = lambda x: factor["by"] * x
    once = curvature.apply_function(scaled, operator, vector, num_steps=4).value
    factor["by"] = 2.0
    twice = curvature.apply_function(scaled, operator, vector, num_steps=4).value
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-5)
    compiled = jax.jit(functools.partial(curvature.apply_function, scaled, num_steps=4))
    np.testing.assert_allclose(compiled(operator, vector).value, twice, rtol=1e-4, atol=1e-5)


def test_bad_input_is_refused_by_name(problem):
    _, _, operator, vector = problem
    with pytest.raises(ValueError, match="`function` must map eigenvalues"):
        curvature.apply_function(jnp.sum, operator, vector)
    with pytest.raises(ValueError, match=r"`num_steps` must be between 1 and 50 \(.*\), got 51"):
        curvature.apply_function(jnp.exp, operator, vector, num_steps=51)
    with pytest.raises(ValueError, match="`vector` must be finite, got infinity"):
        curvature.apply_function(jnp.exp, operator, vector * jnp.inf)
    density = density_of(spectrum(), num_steps=4, num_probes=1, deflate=0)
    with pytest.raises(ValueError, match="`damping` must be non-negative, got -1"):
        curvature.log_determinant(density, damping=-1)
    for order in (0, -2.0, np.inf):
        with pytest.raises(ValueError, match=r"`order` must be (positive|finite)"):
            curvature.schatten_norm(density, order=order)


def test_determinants_and_norms_of_a_dense_spectrum():
    values = np.abs(spectrum())
    densities = [density_of(values, seed, num_steps=20) for seed in range(2)]
    exact = {
        "log_determinant": np.sum(np.log(values + 0.1)),
        "nuclear": np.sum(values),
        "frobenius": np.sqrt(np.sum(values**2)),
        "quartic": np.sum(values**4) ** 0.25,
    }
    for name, expected in exact.items():
        order = {"nuclear": 1, "frobenius": 2, "quartic": 4}.get(name)
        totals = [
            curvature.log_determinant(density, damping=0.1) if order is None
            else curvature.schatten_norm(density, order=order)
            for density in densities
        ]  # fmt: skip
        found = np.asarray([total.value for total in totals], np.float64)
        errors = np.asarray([total.standard_error for total in totals])
        rest = np.asarray([total.quadrature_error for total in totals])
        # The mean of two within five standard errors, each within as many and its quadrature.
        room = 1e-5 * abs(expected)
        assert abs(found.mean() - expected) <= 5 * errors.mean() / np.sqrt(2) + rest.mean() + room
        assert np.all(np.abs(found - expected) <= 5 * errors + rest + room)
    # Without damping a zero eigenvalue decides.
    zero = density_of(np.append(values, 0), num_steps=4, num_probes=1, deflate=0)
    assert not np.isnan(curvature.log_determinant(zero, damping=0.1).value)


def test_where_all_is_taken_out_quadrature_leaves_nothing_open():
    matrix = jnp.diag(jnp.arange(1.0, 7.0))
    operator = curvature.from_matvec(lambda vector: matrix @ vector, jnp.zeros(6))
    density = curvature.spectral_density(operator, key=jax.random.key(0), num_steps=6)
    found = curvature.log_determinant(density)
    assert float(found.value) == pytest.approx(np.log(720), rel=1e-5)
    assert float(found.quadrature_error) < 1e-5
