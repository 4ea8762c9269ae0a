"""The inverse as an operator, and its diagonal, against dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import curvature
from tests.curvature.test_solve import operator_of, symmetric, vector_of

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def problem():
    """A few eigenvalues far above the damping, all others below it."""
    matrix = symmetric(np.append(np.geomspace(1e-4, 1e-2, 34), [1.0, 3, 10, 30]))
    return operator_of(matrix), np.linalg.inv(matrix + 0.1 * np.eye(38))


def test_products_are_solved_systems(problem):
    operator, expected = problem
    inverse = curvature.inverse(operator, damping=0.1)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(inverse.dense(), expected, rtol=0, atol=2e-3 * scale)
    vector = jnp.asarray(vector_of(38), jnp.float32)
    found = jax.jit(lambda matrix, vector: matrix @ vector)(inverse, vector)
    np.testing.assert_allclose(found, expected @ np.asarray(vector), rtol=0, atol=1e-2 * scale)
    short = curvature.inverse(operator, damping=0.1, max_matvecs=2)
    assert np.all(np.isnan(short @ vector))  # what has not converged is no product


def test_its_diagonal_is_unbiased_and_pairs_make_it_sharper(problem):
    operator, expected = problem
    pairs = curvature.top_eigenpairs(operator, 4, key=KEY, tol=1e-5)
    plain = curvature.inverse_diagonal(operator, damping=0.1, key=KEY, num_probes=16)
    found = curvature.inverse_diagonal(operator, damping=0.1, key=KEY, num_probes=16, pairs=pairs)
    for result in (plain, found):
        errors = np.asarray(result.value) - np.diagonal(expected)
        assert np.all(np.abs(errors) <= 6 * np.asarray(result.standard_error) + 1e-2)
        distance = abs(float(result.trace) - np.trace(expected))
        assert distance <= 5 * float(result.trace_standard_error) + 0.05
        assert int(result.num_matvecs) == 16
    ratio = np.mean(np.asarray(found.standard_error)) / np.mean(np.asarray(plain.standard_error))
    assert ratio < 0.2


def test_bad_input_is_refused_by_name(problem):
    operator, _ = problem
    with pytest.raises(ValueError, match="`damping` must be positive"):
        curvature.inverse_diagonal(operator, damping=0, key=KEY, num_probes=2)
    with pytest.raises(ValueError, match="`tol` must be positive"):
        curvature.inverse(operator, tol=0)
