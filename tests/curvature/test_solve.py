"""Linear systems: dense solves in float64, closed forms, flags, bounds."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from regjax import curvature
from regjax.curvature._operators._positive import lower_bound
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


@pytest.fixture
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
    found = curvature.solve(
        operator, jnp.asarray(target), damping=damping, method=method, tol=1e-10
    )
    expected = np.linalg.solve(matrix + damping * np.eye(40), target)
    assert bool(found.converged)
    assert not bool(found.negative_curvature)
    np.testing.assert_allclose(found.solution, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    true = np.linalg.norm(target - matrix @ found.solution - damping * np.asarray(found.solution))
    assert float(found.residual_norm) == pytest.approx(true, rel=1e-4, abs=1e-14)


def test_identity_and_rank_one_with_damping():
    target = jnp.asarray(vector_of(30), jnp.float32)
    ones = curvature.identity(curvature.Space.of(target))
    found = curvature.solve(ones, target, damping=3.0, tol=1e-6)
    np.testing.assert_allclose(found.solution, target / 4, rtol=1e-6)
    assert int(found.num_matvecs) == 2  # a step, and the check
    # (u u' + d I)^-1 b = (b - u u'b / (d + u'u)) / d: two distinct eigenvalues, two steps.
    u = jnp.asarray(vector_of(30, 5), jnp.float32)
    rank_one = curvature.from_matvec(Partial(lambda u, v: u * jnp.vdot(u, v), u), u)
    found = curvature.solve(rank_one, target, damping=0.5, tol=1e-6)
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
        least[name] = float(lower_bound(whole))
        assert float(lower_bound(streamed)) == least[name]
    infinite = float("-inf")
    assert least == {
        "hessian": infinite, "gauss_newton": infinite, "empirical_fisher": 0.0, "fisher": 0.0
    }  # fmt: skip
    positive, indefinite = whole, pair("hessian")[1]
    ones = curvature.identity(positive.space)
    scales = jax.tree.map(jnp.ones_like, positive.space.like())
    bounds = lambda *operators: [float(lower_bound(operator)) for operator in operators]
    assert bounds(positive + 0.5 * ones, 2 * (positive + ones), positive.scaled(scales)) == [
        0.5, 2.0, 0.0
    ]  # fmt: skip
    assert bounds(-1 * positive, 0 * indefinite, indefinite + ones) == [infinite, 0.0, infinite]
    assert set(bounds(*curvature.by_block(positive).values())) == {0.0}


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


def test_preconditioners_save_products_and_keep_the_solution():
    """Of scales that differ, and of a few eigenvalues far above the others."""
    scales = np.geomspace(1, 100, 60)
    matrix = symmetric(np.linspace(1, 2, 60)) * scales[:, None] * scales
    operator, target = operator_of(matrix), jnp.asarray(vector_of(60), jnp.float32)
    expected = np.linalg.solve(matrix + np.eye(60), np.float64(target))
    estimate = np.float32(np.diagonal(matrix))
    estimate[:3] = -1, 0, np.nan
    jacobi = curvature.jacobi_preconditioner(operator, estimate, damping=1.0)
    plain = curvature.solve(operator, target, damping=1.0)
    for method in METHODS:
        found = curvature.solve(operator, target, damping=1.0, preconditioner=jacobi, method=method)
        assert bool(found.converged)
        assert int(found.num_matvecs) < int(plain.num_matvecs) / 2
        np.testing.assert_allclose(found.solution, expected, atol=1e-3 * np.abs(expected).max())

    matrix = symmetric(np.append(np.linspace(0.5, 1, 55), np.geomspace(100, 1e4, 5)))
    operator = operator_of(matrix)
    expected = np.linalg.solve(matrix + 0.1 * np.eye(60), np.float64(target))
    pairs = curvature.top_eigenpairs(operator, 6, key=KEY, tol=1e-6)
    low_rank = curvature.low_rank_preconditioner(operator, pairs, damping=0.1)
    plain = curvature.solve(operator, target, damping=0.1)
    for method in METHODS:
        found = curvature.solve(
            operator, target, damping=0.1, preconditioner=low_rank, method=method
        )
        assert int(found.num_matvecs) < int(plain.num_matvecs) / 2
        np.testing.assert_allclose(found.solution, expected, atol=1e-3 * np.abs(expected).max())
    # What it is: A + damping I becomes a multiple of the identity on the pairs. Of the largest
    # ones, ten thousand times the smallest, that is rounded to a tenth of a percent.
    image = operator.matvec(low_rank.matvec(jax.tree.map(lambda v: v[4], pairs.vectors)))
    smallest = float(pairs.values.min()) + 0.1
    ratio = np.linalg.norm(image) / float(pairs.values[4])
    assert ratio == pytest.approx(smallest / (float(pairs.values[4]) + 0.1), rel=1e-3)


def test_what_runs_solve_is_the_one_driver(tmp_path):
    """Inside of jit, on a stream, by hand, and from a checkpoint: the same numbers."""
    streamed, whole, source = pair("gauss_newton")
    target = jax.tree.map(jnp.ones_like, whole.space.like())
    solve = functools.partial(curvature.solve, damping=0.1, lower_bound=0)
    alone = solve(whole, target)
    assert bool(alone.converged)
    compiled = jax.jit(solve)(whole, target)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, compiled.solution, alone.solution)
    before = source.passes
    found = solve(streamed, target)
    assert source.passes - before == int(found.num_matvecs)
    jax.tree.map(close, found.solution, alone.solution)

    class Stopped(Exception):
        pass

    def stop(count, total, progress):
        if count == 3:
            raise Stopped

    checkpoint = curvature.Checkpoint(tmp_path, every=2)
    with pytest.raises(Stopped) as caught:
        solve(whole, target, callback=stop, checkpoint=checkpoint)
    assert not bool(caught.value.result.converged)
    assert np.isinf(caught.value.result.error_bound)
    counts = []
    again = solve(
        whole, target, callback=lambda count, *_: counts.append(count), checkpoint=checkpoint
    )
    assert counts[0] == 3
    jax.tree.map(np.testing.assert_array_equal, again, alone)
    with pytest.raises(ValueError, match=r"`damping` must be 0\.2, got 0\.1"):
        curvature.solve(whole, target, damping=0.2, checkpoint=checkpoint)


def test_bfloat16_parameters_have_the_residual_of_what_is_returned():
    matrix = symmetric(np.linspace(1, 3, 20))
    product = Partial(lambda m, v: (m @ v.astype(jnp.float32)).astype(v.dtype), jnp.float32(matrix))
    operator = curvature.from_matvec(product, jnp.zeros(20, jnp.bfloat16))
    target = jnp.asarray(vector_of(20), jnp.bfloat16)
    found = curvature.solve(operator, target, tol=1e-2, max_matvecs=40)
    assert found.solution.dtype == jnp.bfloat16
    true = np.float64(target) - matrix @ np.float64(found.solution)
    assert float(found.residual_norm) == pytest.approx(np.linalg.norm(true), rel=0.5)


def test_several_right_sides_are_each_as_alone():
    operator = operator_of(symmetric(np.linspace(1, 2, 8)))
    targets = jnp.asarray(np.random.default_rng(2).normal(size=(3, 8)), jnp.float32)
    block = curvature.solve(operator, targets.at[1].set(0))
    assert block.residual_norm.shape == block.converged.shape == (3,)
    assert not np.any(np.asarray(block.solution[1]))
    for i in (0, 2):
        alone = curvature.solve(operator, targets[i])
        np.testing.assert_allclose(block.solution[i], alone.solution, rtol=0, atol=1e-6)


def test_edges():
    operator, zeros = operator_of(symmetric(np.linspace(1, 2, 8))), jnp.zeros(8)
    for method in METHODS:
        solve = functools.partial(curvature.solve, operator, method=method)
        found = solve(zeros)
        assert not np.any(np.asarray(found.solution))
        assert bool(found.converged)
        assert (float(found.residual_norm), int(found.num_matvecs)) == (0, 0)
        found = solve(jnp.ones(8), max_matvecs=1)
        assert not bool(found.converged)
        assert float(found.residual_norm) == pytest.approx(np.sqrt(8), rel=1e-6)
        # Any size of right side and matrix.
        for size in (1e-30, 1e30):
            found = solve(size * jnp.ones(8))
            assert bool(found.converged)
            scaled = curvature.solve(float(size) * operator, jnp.ones(8), method=method)
            assert bool(scaled.converged)
        # NaN in a product is never a solution.
        broken = curvature.from_matvec(lambda v: v * jnp.nan, zeros)
        compiled = jax.jit(functools.partial(curvature.solve, method=method))
        found = compiled(broken, jnp.ones(8))
        assert not bool(found.converged)
        assert np.isinf(found.error_bound) or np.isnan(found.error_bound)
        traced = jax.jit(lambda v: curvature.solve(operator, v).solution)
        assert np.all(np.isnan(traced(zeros * jnp.nan)))
    # Singular, and the right side not in its range: no solution, and no converged one.
    singular = operator_of(np.diag(np.arange(8.0)))
    for method in METHODS:
        found = curvature.solve(singular, jnp.ones(8), method=method)
        assert not bool(found.converged)
        assert np.all(np.isfinite(found.solution))
        assert float(found.residual_norm) >= 0.99


def test_bad_input_is_refused_by_name():
    operator, ones = operator_of(np.eye(4)), jnp.ones(4)
    refuse = lambda error, match: pytest.raises(error, match=match)
    with refuse(ValueError, "`damping` must be non-negative, got -0.1"):
        curvature.solve(operator, ones, damping=-0.1)
    for tol in (0, -1e-3):
        with refuse(ValueError, re.escape(f"`tol` must be positive, got {tol}")):
            curvature.solve(operator, ones, tol=tol)
    with refuse(ValueError, "`vector` must have the tree structure"):
        curvature.solve(operator, {"w": ones})
    with refuse(ValueError, "`vector` must have shape"):
        curvature.solve(operator, jnp.ones(5))
    with refuse(ValueError, "`vector` must be finite, got NaN"):
        curvature.solve(operator, ones.at[1].set(jnp.nan))
    with refuse(ValueError, "`method` must be one of cg, minres"):
        curvature.solve(operator, ones, method="gmres")
    with refuse(ValueError, "`preconditioner` must be positive definite"):
        curvature.solve(operator, ones, preconditioner=-operator)
    with refuse(ValueError, "`preconditioner` must be of the operator's space"):
        curvature.solve(operator, ones, preconditioner=operator_of(np.eye(5)))
    with refuse(ValueError, "`diagonal` must have shape"):
        curvature.jacobi_preconditioner(operator, jnp.ones(5))
    with refuse(TypeError, "must not be differentiated"):
        jax.jacfwd(lambda v: curvature.solve(operator, v).solution)(ones)


@pytest.mark.parametrize(
    "values", [[*np.linspace(1, 2, 39), 0], [0] * 5 + [*np.linspace(-2, 3, 35)]]
)
def test_minres_ends_at_the_least_residual_of_a_system_without_a_solution(values):
    matrix, target = symmetric(values), vector_of(40)
    found = curvature.solve(operator_of(matrix), jnp.asarray(target, jnp.float32), method="minres")
    least = np.linalg.norm(target - matrix @ (np.linalg.pinv(matrix, rcond=1e-9) @ target))
    assert float(found.residual_norm) == pytest.approx(least, rel=1e-4)
    assert not bool(found.converged)
    assert float(jnp.linalg.norm(found.solution)) < 100


def test_minres_never_returns_what_is_worse_than_nothing():
    matrix, target = symmetric(np.geomspace(1e-6, 1, 12)), vector_of(12)
    operator, length = operator_of(matrix), np.linalg.norm(target)
    for damping in (0.0, 1e-7):
        found = curvature.solve(
            operator, jnp.asarray(target, jnp.float32), damping=damping, method="minres"
        )
        image = (matrix + damping * np.eye(12)) @ np.asarray(found.solution, np.float64)
        assert np.linalg.norm(target - image) <= 1.01 * length
        assert float(found.residual_norm) <= 1.01 * length


@pytest.mark.parametrize("method", METHODS)
def test_a_solution_beyond_its_type_is_not_passed_off(method):
    operator, target = operator_of(symmetric(np.arange(12.0))), jnp.ones(12)
    found = curvature.solve(operator, target, damping=1e38, method=method, lower_bound=0.0)
    assert not bool(found.converged)
    assert np.isnan(found.residual_norm)
    assert np.isinf(found.error_bound)
