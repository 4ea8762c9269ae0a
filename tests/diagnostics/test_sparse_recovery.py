"""The recovery report against NumPy, and its baselines against the normal equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import diagnostics, models

RANDOM = np.random.default_rng(0)
TRUE = np.asarray([2.0, 0.0, -1.0, 0.0, 0.0, 0.5], np.float32)
X = RANDOM.choice([-1.0, 1.0], size=(20, 6)).astype(np.float32)
Y = (X @ TRUE + 0.3 * RANDOM.normal(size=20)).astype(np.float32)


def roots(weights, depth):
    """u, v with the given weights."""
    weights = jnp.asarray(weights, jnp.float32)
    power = lambda x: (x + 0.01) ** (1 / depth)
    return power(jnp.maximum(weights, 0)), power(jnp.maximum(-weights, 0))


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("transform", [jax.jit, lambda f: f])
def test_errors_on_the_support_and_off_it(depth, transform):
    weights = np.asarray([1.7, 0.6, -1.0, -0.1, 0.0, 0.55], np.float32)
    u, v = roots(weights, depth)
    report = transform(
        lambda u, v, w: diagnostics.sparse_recovery(u, v, depth=depth, true_weights=w)
    )(u, v, jnp.asarray(TRUE))
    np.testing.assert_allclose(report.squared_error, np.sum((weights - TRUE) ** 2), rtol=1e-5)
    np.testing.assert_allclose(report.largest_error, 0.3, rtol=1e-5)
    np.testing.assert_allclose(report.largest_off_support, 0.6, rtol=1e-5)
    # 0.6 off the support is larger than the 0.55 on it.
    np.testing.assert_allclose(report.share_found, 2 / 3, rtol=1e-6)
    assert report.is_positive


def test_without_v_the_weights_are_the_powers_of_u():
    u = jnp.asarray([1.0, 2.0])
    report = diagnostics.sparse_recovery(u, None, depth=3, true_weights=jnp.asarray([0.0, 7.0]))
    assert (float(report.largest_off_support), float(report.largest_error)) == (1.0, 1.0)
    assert float(report.share_found) == 1


@pytest.mark.parametrize("which", ["u", "v"])
def test_a_crossed_sign_is_seen(which):
    pair = dict(zip("uv", roots(TRUE, 2), strict=True))
    pair[which] = pair[which].at[1].set(-0.1)
    assert not diagnostics.sparse_recovery(
        **pair, depth=2, true_weights=jnp.asarray(TRUE)
    ).is_positive


def test_no_support_and_nothing_else():
    u = jnp.asarray([0.5, 1.0])
    empty = diagnostics.sparse_recovery(u, None, depth=2, true_weights=jnp.zeros(2))
    assert (float(empty.largest_error), float(empty.largest_off_support)) == (0, 1)
    assert np.isnan(empty.share_found)
    full = diagnostics.sparse_recovery(u, None, depth=2, true_weights=jnp.ones(2))
    assert (float(full.largest_error), float(full.largest_off_support)) == (0.75, 0)


def test_baselines_are_those_of_the_normal_equations():
    found = diagnostics.recovery_baselines(
        jnp.asarray(X), jnp.asarray(Y), true_weights=jnp.asarray(TRUE)
    )
    x, y, true = (np.asarray(a, np.float64) for a in (X, Y, TRUE))
    support = true != 0
    oracle = np.zeros(6)
    oracle[support] = np.linalg.solve(x[:, support].T @ x[:, support], x[:, support].T @ y)
    whole = np.linalg.solve(x.T @ x, x.T @ y)
    np.testing.assert_allclose(found.oracle_squared_error, np.sum((oracle - true) ** 2), rtol=1e-4)
    np.testing.assert_allclose(
        found.least_norm_squared_error, np.sum((whole - true) ** 2), rtol=1e-4
    )
    np.testing.assert_allclose(
        found.noise_level, np.max(np.abs(x.T @ (y - x @ true))) / 20, rtol=1e-4
    )


def test_with_fewer_examples_than_weights_the_norm_is_least():
    few = slice(3, 7)
    found = diagnostics.recovery_baselines(
        jnp.asarray(X[few]), jnp.asarray(Y[few]), true_weights=jnp.asarray(TRUE)
    )
    x = np.asarray(X[few], np.float64)
    weights = x.T @ np.linalg.solve(x @ x.T, Y[few])
    np.testing.assert_allclose(
        found.least_norm_squared_error, np.sum((weights - TRUE) ** 2), rtol=1e-4
    )


def test_the_network_of_the_library_goes_in():
    model = models.DiagonalLinear(3, depth=2, init_scale=0.1)
    report = diagnostics.sparse_recovery(
        model.u[...], model.v[...], depth=model.depth, true_weights=jnp.asarray([0.0, 1.0, 0.0])
    )
    np.testing.assert_allclose(report.squared_error, 1)


def test_bad_input():
    u, v = roots(TRUE, 2)
    true = jnp.asarray(TRUE)
    with pytest.raises(ValueError, match=r"`u` must have shape \(6,\), got \(3,\)"):
        diagnostics.sparse_recovery(u[:3], v, depth=2, true_weights=true)
    with pytest.raises(ValueError, match=r"`v` must have shape \(6,\)"):
        diagnostics.sparse_recovery(u, v[:3], depth=2, true_weights=true)
    with pytest.raises(ValueError, match="`depth` must be at least 2, got 1"):
        diagnostics.sparse_recovery(u, v, depth=1, true_weights=true)
    with pytest.raises(ValueError, match="`true_weights` must have one axis"):
        diagnostics.sparse_recovery(u, v, depth=2, true_weights=true[None])
    with pytest.raises(ValueError, match=r"`inputs` must have shape \(20, 6\), got \(19, 6\)"):
        diagnostics.recovery_baselines(jnp.asarray(X[:19]), jnp.asarray(Y), true_weights=true)
