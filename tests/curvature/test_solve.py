"""Linear systems: dense solves in float64, closed forms, flags, bounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from regjax import curvature
from tests.curvature.streams import pair

KEY = jax.random.key(0)
METHODS = ("cg", "minres")


def operator_of(matrix, dtype=np.float32):
    matrix = jnp.asarray(matrix, dtype)
    return curvature.from_matvec(Partial(_multiply, matrix), jnp.zeros(len(matrix), dtype))


def _multiply(matrix, vector):
    return jnp.matmul(matrix, vector, precision="highest")


def symmetric(values, seed=0):
    values = np.asarray(values, np.float64)
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
    return (basis * values) @ basis.T


def vector_of(size, seed=1):
    return np.random.default_rng(seed).normal(size=size)


@pytest.fixture(scope="module")
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("method", METHODS)
def test_the_dense_solution_in_float64(method, float64):
    values = np.geomspace(1e-3, 10, 40)
    if method == "minres":
        values = values * np.where(np.arange(40) % 3 == 0, -1, 1)
    matrix, target = symmetric(values), vector_of(40)
    damping = 0.0 if method == "minres" else 1e-3
    operator = operator_of(matrix, np.float64)
    found = curvature.solve(operator, jnp.asarray(target), damping=damping, method=method, tol=1e-10)
    expected = np.linalg.solve(matrix + damping * np.eye(40), target)
    assert bool(found.converged)
    assert not bool(found.negative_curvature)
    np.testing.assert_allclose(found.solution, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    true = np.linalg.norm(target - matrix @ found.solution - damping * np.asarray(found.solution))
    assert float(found.residual_norm) == pytest.approx(true, rel=1e-4, abs=1e-14)


def test_identity_and_rank_one_with_damping():
    target = jnp.asarray(vector_of(30), jnp.float32)
    ones = curvature.identity(curvature.Space.of(target))
    found = curvature.solve(ones, target, damping=3.0)
    np.testing.assert_allclose(found.solution, target / 4, rtol=1e-6)
    assert int(found.num_matvecs) == 2  # a step, and the check
    # (u u' + d I)^-1 b = (b - u u'b / (d + u'u)) / d: two distinct eigenvalues, two steps.
    u = jnp.asarray(vector_of(30, 5), jnp.float32)
    rank_one = curvature.from_matvec(Partial(lambda u, v: u * jnp.vdot(u, v), u), u)
    found = curvature.solve(rank_one, target, damping=0.5)
    expected = (target - u * (u @ target) / (0.5 + u @ u)) / 0.5
    np.testing.assert_allclose(found.solution, expected, rtol=0, atol=2e-5)
    assert int(found.num_matvecs) == 3


@pytest.mark.parametrize("method", METHODS)
def test_the_residual_is_the_true_one_where_the_recurrence_drifts(method):
    """In float32 the recurrence goes below what the solution's own residual can be."""
    matrix, target = symmetric(np.geomspace(1e-5, 1, 60)), vector_of(60)
    found = curvature.solve(
        operator_of(matrix), jnp.asarray(target, jnp.float32), method=method, tol=1e-9,
        max_matvecs=600,
    )  # fmt: skip
    solution = np.asarray(found.solution, np.float64)
    true = np.linalg.norm(target - np.float32(matrix).astype(np.float64) @ solution)
    assert float(found.residual_norm) == pytest.approx(true, rel=0.2)
    assert not bool(found.converged)
    assert float(found.residual_norm) > 1e-9 * np.linalg.norm(target)


def test_the_error_bound_holds_where_the_least_eigenvalue_is_known():
    matrix = symmetric(np.concatenate([np.zeros(10), np.geomspace(1e-3, 10, 30)]))
    target = vector_of(40)
    for steps in (3, 10, 60):
        solve = functools.partial(
            curvature.solve, operator_of(matrix), jnp.asarray(target, jnp.float32), damping=0.05,
            max_matvecs=steps,
        )  # fmt: skip
        assert np.isinf(solve().error_bound)  # of a given product nothing is known
        found = solve(lower_bound=0)
        expected = np.linalg.solve(matrix + 0.05 * np.eye(40), target)
        error = np.linalg.norm(np.asarray(found.solution) - expected)
        assert error <= float(found.error_bound) <= 400 * error
    # One that claims the smallest eigenvalue is 0.05 too large would not.
    assert float(solve(lower_bound=0.1).error_bound) < float(solve(lower_bound=0).error_bound)


def test_which_matrices_are_positive_by_construction():
    least = {}
    for name in ("hessian", "gauss_newton", "empirical_fisher", "fisher"):
        streamed, whole, _ = pair(name)
        least[name] = float(whole.lower_bound)
        assert float(streamed.lower_bound) == least[name]
    infinite = float("-inf")
    assert least == {
        "hessian": infinite, "gauss_newton": infinite, "empirical_fisher": 0.0, "fisher": 0.0
    }  # fmt: skip
    positive, indefinite = whole, pair("hessian")[1]
    ones = curvature.identity(positive.space)
    scales = jax.tree.map(jnp.ones_like, positive.space.like())
    bounds = lambda *operators: [float(operator.lower_bound) for operator in operators]
    assert bounds(positive + 0.5 * ones, 2 * (positive + ones), positive.scaled(scales)) == [
        0.5, 2.0, 0.0
    ]  # fmt: skip
    assert bounds(-1 * positive, 0 * indefinite, indefinite + ones) == [infinite, 0.0, infinite]
    assert list(bounds(*curvature.by_block(positive).values()))[0] == 0.0


def test_negative_curvature_is_flagged_with_its_direction():
    values = np.linspace(-0.5, 4, 30)
    matrix, target = symmetric(values), jnp.asarray(vector_of(30), jnp.float32)
    operator = operator_of(matrix)
    found = curvature.solve(operator, target, lower_bound=0)
    assert bool(found.negative_curvature)
    assert not bool(found.converged)
    direction = np.asarray(found.direction, np.float64)
    assert np.linalg.norm(direction) == pytest.approx(1, rel=1e-5)
    assert float(found.curvature) == pytest.approx(direction @ matrix @ direction, rel=1e-3)
    assert float(found.curvature) <= 0
    assert np.isinf(found.error_bound)
    # The remedies: the last iterate is there, MINRES goes on, a damping lifts all eigenvalues.
    assert np.any(np.asarray(found.solution))
    assert bool(curvature.solve(operator, target, method="minres").converged)
    lifted = curvature.solve(operator, target, damping=0.6)
    assert bool(lifted.converged)
    assert not bool(lifted.negative_curvature)
    assert not np.any(np.asarray(lifted.direction))
