"""Derivatives through the solvers, against those of the dense matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import curvature
from tests import oracles


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def hessian(params, chunk_size=None):
    batch = oracles.problem(dtype=np.float64).batch
    return curvature.hessian(oracles.loss_fn, params, *batch, chunk_size=chunk_size)


def dense(params):
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    batch = oracles.problem(dtype=np.float64).batch
    return jax.hessian(lambda w: oracles.loss_fn(unravel(w), *batch))(flat)


def eigenvalues(params, which="LA", chunk_size=None):
    operator = hessian(params, chunk_size)
    options = {"key": jax.random.key(0), "which": which, "tol": 1e-10}
    return curvature.top_eigenpairs(operator, 3, **options).values @ jnp.arange(1.0, 4.0)


def exact_eigenvalues(params, which="LA"):
    values = jnp.linalg.eigvalsh(dense(params))
    return (values[::-1][:3] if which == "LA" else values[:3]) @ jnp.arange(1.0, 4.0)


def assert_close(one, other, rtol):
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=rtol * scale), one, other)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
@pytest.mark.parametrize("which", ["LA", "SA"])
def test_eigenvalues_have_the_derivative_of_the_dense_ones(which, wrap):
    params = oracles.problem(dtype=np.float64).params
    found = wrap(jax.grad(lambda p: eigenvalues(p, which)))(params)
    assert_close(found, jax.grad(lambda p: exact_eigenvalues(p, which))(params), 1e-7)


def test_derivatives_go_through_chunks_and_forwards():
    params = oracles.problem(dtype=np.float64).params
    direction = jax.tree.map(jnp.cos, params)
    _, found = jax.jvp(lambda p: eigenvalues(p, chunk_size=7), (params,), (direction,))
    _, expected = jax.jvp(exact_eigenvalues, (params,), (direction,))
    np.testing.assert_allclose(found, expected, rtol=1e-7)


def test_data_and_multiples_have_derivatives_too():
    # The Hessian of c |w|^2 / 2 is c; a data set x makes it x.
    def largest(scale, x):
        operator = scale * curvature.hessian(
            lambda w, x: jnp.mean(x) * jnp.sum(jnp.arange(1.0, 4.0) * w**2) / 2, jnp.ones(3), x
        )
        return curvature.top_eigenpairs(operator, 1, key=jax.random.key(0)).values[0]

    slopes = jax.grad(largest, argnums=(0, 1))(2.0, jnp.full(4, 5.0))
    np.testing.assert_allclose(slopes[0], 15.0)
    np.testing.assert_allclose(slopes[1], np.full(4, 2 * 3 / 4))


def signs(num_matvecs, size):
    """The vectors that the estimator takes, read off its images of the identity."""
    seen = []
    space = curvature.Space.of(jnp.zeros(size))
    solver = curvature.trace_solver(
        curvature.identity(space), key=jax.random.key(1), num_matvecs=num_matvecs
    )
    state = solver.init()
    for _ in range(solver.max_steps):
        seen.extend(np.atleast_2d(solver.vectors(state)))
        state = solver.step(state)
    return np.stack(seen)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_trace_and_diagonal_have_the_derivative_of_the_same_probes(wrap):
    params = oracles.problem(dtype=np.float64).params
    z = jnp.asarray(signs(4, 57), jnp.float64)
    options = {"key": jax.random.key(1), "num_matvecs": 4}
    pick = jnp.cos(jnp.arange(57.0))

    def estimates(params):
        found = curvature.diagonal(hessian(params), **options)
        flat = jax.flatten_util.ravel_pytree(found.value)[0]
        return curvature.trace(hessian(params), **options).value, found.trace, flat @ pick

    def expected(params):
        entries = jnp.mean(z * (z @ dense(params)), 0)
        return jnp.sum(entries), jnp.sum(entries), entries @ pick

    for i in range(3):
        found = wrap(jax.value_and_grad(lambda p, i=i: estimates(p)[i]))(params)
        value, slope = jax.value_and_grad(lambda p, i=i: expected(p)[i])(params)
        np.testing.assert_allclose(found[0], value, rtol=1e-10)
        assert_close(found[1], slope, 1e-10)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_trace_and_diagonal_come_from_the_same_products(method):
    operator = hessian(oracles.problem(dtype=np.float64).params)
    options = {"key": jax.random.key(2), "num_matvecs": 12, "method": method}
    found, alone = (f(operator, **options) for f in (curvature.diagonal, curvature.trace))
    np.testing.assert_allclose(found.trace, alone.value, rtol=1e-12)
    np.testing.assert_allclose(found.trace_standard_error, alone.standard_error, rtol=1e-12)
    total = sum(float(jnp.sum(leaf)) for leaf in jax.tree.leaves(found.value))
    np.testing.assert_allclose(found.trace, total, rtol=1e-12)


def test_what_has_no_rule_is_nan_or_refused():
    params, key = oracles.problem(dtype=np.float64).params, jax.random.key(0)
    unknown = [
        lambda p: curvature.top_eigenpairs(hessian(p), 1, key=key).vectors["first"]["bias"].sum(),
        lambda p: curvature.top_eigenpairs(hessian(p), 1, key=key).residual_norms[0],
        lambda p: curvature.trace(hessian(p), key=key, num_matvecs=3).standard_error,
    ]
    for function in unknown:
        slope = jax.grad(function)(params)
        assert all(np.all(np.isnan(leaf)) for leaf in jax.tree.leaves(slope))
    refused = [
        lambda p: curvature.trace(hessian(p), key=key, num_matvecs=6, method="hutch++").value,
        lambda p: curvature.lanczos(hessian(p), params, 4).alphas[0],
        lambda p: (
            curvature.spectral_density(
                hessian(p), key=key, num_steps=4, num_probes=2, deflate=0
            ).trace
        ),
    ]
    for function in refused:
        with pytest.raises(TypeError, match="`operator` must not be differentiated through"):
            jax.grad(function)(params)
