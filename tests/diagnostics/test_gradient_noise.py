"""Noise scales against all batches of six examples, and linear regression in closed form."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import curvature, diagnostics
from tests import oracles

RANDOM = np.random.default_rng(0)
X, Y = RANDOM.normal(size=(6, 3)), RANDOM.normal(size=6)
W = {"w": jnp.asarray(RANDOM.normal(size=3), jnp.float32)}


def regression(params, inputs, targets):
    return 0.5 * jnp.mean((inputs @ params["w"] - targets) ** 2)


def rows():
    """Each example's gradient, (6, 3), in float64."""
    return (X @ np.asarray(W["w"], np.float64) - Y)[:, None] * X


def norms(batches):
    return np.asarray([np.sum(rows()[list(batch)].mean(0) ** 2) for batch in batches])


def test_expectations_over_all_batches_are_exact():
    """With replacement the numbers of the paper; without, those of a population of N - 1."""
    gradient = rows().mean(0)
    noise = np.mean(np.sum((rows() - gradient) ** 2, 1))
    with_replacement = lambda size: itertools.product(range(6), repeat=size)
    without = lambda size: itertools.combinations(range(6), size)
    for draw, square, trace in (
        (with_replacement, np.sum(gradient**2), noise),
        (without, np.sum(gradient**2) - noise / 5, noise * 6 / 5),
    ):
        for small, large in ((1, 3), (2, 4), (1, 2)):
            # The estimators are linear, so that the means of the norms give their expectations.
            means = (np.asarray([norms(draw(size)).mean()]) for size in (small, large))
            with jax.enable_x64(True):
                found = diagnostics.noise_scale(
                    *means, small_batch_size=small, large_batch_size=large
                )
            np.testing.assert_allclose(found.squared_gradient_norm, square, rtol=1e-12)
            np.testing.assert_allclose(found.noise_trace, trace, rtol=1e-12)
            np.testing.assert_allclose(found.gradient_noise_scale, trace / square, rtol=1e-12)


def test_errors_of_pairs_are_those_of_means_and_of_a_ratio():
    random = np.random.default_rng(1)
    num_pairs, small, large, dim = 400, 4, 32, 10
    gradient, noise = np.full(dim, 0.3), np.linspace(0.5, 1.5, dim)

    def draw(size):
        drawn = gradient + noise * random.normal(size=(200, num_pairs, dim)) / np.sqrt(size)
        return np.float32(np.sum(drawn**2, -1))

    pairs = zip(draw(small), draw(large), strict=True)
    sizes = {"small_batch_size": small, "large_batch_size": large}
    found = [diagnostics.noise_scale(*pair, **sizes) for pair in pairs]
    for name, expected in (
        ("squared_gradient_norm", np.sum(gradient**2)),
        ("noise_trace", np.sum(noise**2)),
        ("gradient_noise_scale", np.sum(noise**2) / np.sum(gradient**2)),
    ):
        values = np.asarray([getattr(one, name) for one in found])
        errors = np.asarray([getattr(one, f"{name}_standard_error") for one in found])
        spread = np.std(values)
        # 200 repetitions: the mean to 5 errors and the ratio's bias, the spread to a quarter.
        assert abs(values.mean() - expected) < 5 * spread / np.sqrt(200) + 0.01 * expected, name
        np.testing.assert_allclose(errors.mean(), spread, rtol=0.25, err_msg=name)
        assert all(one.resolved for one in found)


def test_of_linear_regression_the_closed_form():
    """Of standard normal inputs and residuals x'd + e: tr Sigma = (p + 1) |d|^2 + p s^2."""
    p, num, s = 5, 20_000, 0.7
    random = np.random.default_rng(3)
    inputs = random.normal(size=(num, p))
    targets = s * random.normal(size=num)
    params = {"w": jnp.asarray(0.2 * np.arange(1.0, p + 1), jnp.float32)}
    batch = jnp.asarray(inputs, jnp.float32), jnp.asarray(targets, jnp.float32)
    square = float(np.sum(np.asarray(params["w"]) ** 2))
    trace = (p + 1) * square + p * s**2
    found = diagnostics.gradient_noise(regression, params, *batch, batch_size=10)
    assert (
        abs(found.squared_gradient_norm - square) < 5 * found.squared_gradient_norm_standard_error
    )
    assert abs(found.noise_trace - trace) < 5 * found.noise_trace_standard_error
    scale_error = found.gradient_noise_scale_standard_error
    assert abs(found.gradient_noise_scale - trace / square) < 5 * scale_error
    assert 0 < scale_error < 0.1 * trace / square
    # In the metric of the true Hessian, the identity, all is the same; twice it is twice as large.
    metric = 2.0 * curvature.identity(curvature.hessian(regression, params, *batch).space)
    twice = diagnostics.gradient_noise(regression, params, *batch, batch_size=10, metric=metric)
    np.testing.assert_allclose(twice.noise_trace, 2 * found.noise_trace, rtol=1e-5)
    np.testing.assert_allclose(twice.gradient_noise_scale, found.gradient_noise_scale, rtol=1e-4)


def test_of_a_network_all_is_that_of_the_dense_covariance():
    problem = oracles.problem(num_examples=24)
    found = lambda size, **more: diagnostics.gradient_noise(
        oracles.loss_fn, problem.params, *problem.batch, batch_size=size, **more
    )
    covariance = curvature.gradient_covariance(
        oracles.model_fn, oracles.cross_entropy, problem.params, *problem.batch
    )
    hessian = curvature.hessian(oracles.loss_fn, problem.params, *problem.batch)
    # With batches of one the estimates are exact: the unbiased covariance of the 24 examples.
    factor = 24 / 23
    np.testing.assert_allclose(
        found(1).noise_trace, factor * np.trace(covariance.dense()), rtol=1e-4
    )
    product = np.sum(np.asarray(hessian.dense()) * np.asarray(covariance.dense()))
    np.testing.assert_allclose(
        found(1, metric=hessian).noise_trace, factor * product, rtol=1e-3, atol=1e-5
    )
    # Leaving a batch out by hand.
    whole, rests = found(6), []
    for j in range(4):
        keep = np.delete(np.arange(24), slice(6 * j, 6 * j + 6))
        rest = [jnp.asarray(np.asarray(array)[keep]) for array in problem.batch]
        rests.append(
            diagnostics.gradient_noise(oracles.loss_fn, problem.params, *rest, batch_size=6)
        )
    for name in ("squared_gradient_norm", "noise_trace"):
        values = np.asarray([getattr(rest, name) for rest in rests], np.float64)
        error = np.sqrt(3 / 4 * np.sum((values - values.mean()) ** 2))
        np.testing.assert_allclose(getattr(whole, f"{name}_standard_error"), error, rtol=1e-3)


def test_where_the_noise_hides_the_gradient_it_says_so():
    found = diagnostics.noise_scale(
        jnp.asarray([1.0, 1.2, 0.9]), jnp.asarray([0.2, 0.3, 0.2]), small_batch_size=1,
        large_batch_size=4,
    )  # fmt: skip
    assert found.squared_gradient_norm < 0
    assert jnp.isnan(found.gradient_noise_scale)
    assert not found.resolved
    two = diagnostics.gradient_noise(regression, W, X.astype("f4"), Y.astype("f4"), batch_size=3)
    assert jnp.isfinite(two.noise_trace)
    assert jnp.isnan(two.noise_trace_standard_error)
    assert not two.resolved


def test_bad_arguments():
    small, large = jnp.ones(3), jnp.ones(3)
    sizes = {"small_batch_size": 4, "large_batch_size": 4}
    with pytest.raises(
        ValueError, match="`small_batch_size` must be below `large_batch_size`, 4, got 4"
    ):
        diagnostics.noise_scale(small, large, **sizes)
    sizes["large_batch_size"] = 8
    for bad in ((small, jnp.ones(2)), (jnp.ones((3, 2, 1)), large), (jnp.ones(()), jnp.ones(()))):
        with pytest.raises(ValueError, match=r"`small_squared_norms` must have shape \(pairs,\)"):
            diagnostics.noise_scale(*bad, **sizes)
    for bad in (-small, small * jnp.nan):
        with pytest.raises(ValueError, match="`small_squared_norms` must be"):
            diagnostics.noise_scale(bad, large, **sizes)
    data = X.astype("f4"), Y.astype("f4")
    for size, text in (
        (6, "`batch_size` must be below the number of examples, 6, got 6"),
        (4, "`batch_size` must divide the number of examples, 6, got 4"),
        (0, "`batch_size` must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=text):
            diagnostics.gradient_noise(regression, W, *data, batch_size=size)
    with pytest.raises(TypeError, match="`metric` must be an operator, got"):
        diagnostics.gradient_noise(regression, W, *data, batch_size=2, metric=jnp.eye(3))
    other = curvature.from_matvec(lambda v: v, jnp.ones(3))
    with pytest.raises(ValueError, match="`metric` must have the tree structure"):
        diagnostics.gradient_noise(regression, W, *data, batch_size=2, metric=other)
