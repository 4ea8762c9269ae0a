"""Batch-normalized linear regression, whose constrained minimum has a closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regjax import diagnostics, normalization

RANDOM = np.random.default_rng(0)
D = 5
ROOT = RANDOM.normal(size=(D, D))
SIGMA, MEAN = ROOT @ ROOT.T / D + 0.1 * np.eye(D), RANDOM.normal(size=D)
TARGET = RANDOM.normal(size=D)  # c = Cov(x, y)


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def gradient(w):
    """Of E (y - w'x)^2 / 2 on centred data."""
    return SIGMA @ w - TARGET[:, None]


def optimum(scale, sigma=SIGMA):
    inverse = np.linalg.solve(sigma, TARGET)
    return inverse * scale / np.sqrt(TARGET @ inverse)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0, 1.5])
def test_multiplier_at_the_constrained_minimum(share, double):
    best = np.sqrt(TARGET @ np.linalg.solve(SIGMA, TARGET))  # the least-squares scale
    scale = share * best
    w = optimum(scale)[:, None]
    # The report gets any multiple of it: the constraint sets the length.
    report = diagnostics.batch_norm_regularization(
        3 * w, scale, 0.5, MEAN, SIGMA, jnp.asarray(gradient(w))
    )
    np.testing.assert_allclose(report.equivalent_kernel, w, rtol=1e-12)
    np.testing.assert_allclose(report.equivalent_bias, 0.5 - MEAN @ w, rtol=1e-10)
    # The penalty with 1/2 has best / scale - 1; ours has none.
    np.testing.assert_allclose(report.multiplier, (best / scale - 1) / 2, atol=1e-10)
    if share != 1:
        assert float(report.relative_residual[0]) < 1e-10
        assert np.sign(report.multiplier[0]) == np.sign(1 - share)
    np.testing.assert_allclose(
        report.isotropic_rate, report.multiplier * np.trace(SIGMA) / D, rtol=1e-12
    )


def test_away_from_the_minimum_the_residual_says_so(double):
    w = RANDOM.normal(size=(D, 2))
    w *= 0.7 / np.sqrt(np.sum(w * (SIGMA @ w), 0))
    report = diagnostics.batch_norm_regularization(w, 0.7, 0.0, MEAN, SIGMA, gradient(w))
    assert np.all(report.relative_residual > 0.05)


def test_unit_with_batch_norm_is_the_equivalent_plain_unit(double):
    x = jnp.asarray(RANDOM.normal(size=(40, D)) @ ROOT.T + MEAN)
    kernel = jnp.asarray(RANDOM.normal(size=(D, 3)))
    scale, bias = jnp.asarray([1.7, -0.5, 2.0]), jnp.asarray([0.1, 0.2, -0.3])
    layer = normalization.BatchNorm(epsilon=1e-2)
    params = {"scale": scale, "bias": bias}
    outputs, _ = layer.apply(params, layer.init_state(3), x @ kernel, train=True)
    report = diagnostics.batch_norm_regularization(
        kernel,
        scale,
        bias,
        x.mean(0),
        jnp.cov(x.T, bias=True),
        jnp.ones((D, 3)),
        epsilon=1e-2,
    )
    plain = x @ report.equivalent_kernel + report.equivalent_bias[None]
    np.testing.assert_allclose(plain, outputs, rtol=1e-9, atol=1e-9)


def test_input_noise_acts_as_ridge(double):
    noise = 0.4 * np.eye(D)
    w = optimum(0.5, SIGMA + noise)[:, None]
    grad = (SIGMA + noise) @ w - TARGET[:, None]
    report = diagnostics.batch_norm_regularization(
        w, 0.5, 0.0, MEAN, SIGMA + noise, grad, noise_covariance=noise
    )
    ridge = np.linalg.solve(SIGMA + noise, TARGET)
    cosine = ridge @ w[:, 0] / np.linalg.norm(ridge) / np.linalg.norm(w)
    assert cosine == pytest.approx(1, abs=1e-12)
    total = report.multiplier * 0.5**2
    np.testing.assert_allclose(report.signal_penalty + report.noise_penalty, total, rtol=1e-10)
    np.testing.assert_allclose(
        report.noise_penalty, report.multiplier * 0.4 * np.sum(w**2), rtol=1e-10
    )


def test_a_trained_unit_turns_to_the_ridge_direction():
    x = RANDOM.normal(size=(400, D)) @ ROOT.T
    y = x @ np.array([1.0, -2, 0.5, 0, 1]) + 0.1 * RANDOM.normal(size=400)
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y - y.mean(), jnp.float32)
    sigma = np.cov(x.T, bias=True)
    noise = 0.5 * np.trace(sigma) / D
    # Noise of exactly this covariance: both signs of each direction.
    directions = np.sqrt(noise * D) * np.eye(D)
    both = jnp.asarray(np.concatenate([directions, -directions]), x.dtype)
    noisy = (x[None] + both[:, None]).reshape(-1, D)
    targets = jnp.tile(y, 2 * D)
    layer = normalization.BatchNorm(epsilon=0.0)
    params, state = {"scale": jnp.ones(1), "bias": jnp.zeros(1)}, layer.init_state(1)

    def loss(w):
        outputs, _ = layer.apply(params, state, noisy @ w, train=True)
        return jnp.mean((outputs[:, 0] - targets) ** 2) / 2

    w, tx = jnp.ones((D, 1)) / 2, optax.sgd(0.3)
    opt = tx.init(w)

    @jax.jit
    def train(w, opt):
        def step(carry, _):
            updates, opt = tx.update(jax.grad(loss)(carry[0]), carry[1])
            return (optax.apply_updates(carry[0], updates), opt), None

        return jax.lax.scan(step, (w, opt), length=2000)[0][0]

    w = np.asarray(train(w, opt))[:, 0]
    ridge = np.linalg.solve(sigma + noise * np.eye(D), x.T @ y / 400)
    plain = np.linalg.solve(sigma, x.T @ y / 400)
    cosine = lambda v: float(v @ w / np.linalg.norm(v) / np.linalg.norm(w))
    assert cosine(ridge) == pytest.approx(1, abs=1e-3)
    assert cosine(plain) < 0.99


def test_zeros_are_finite_and_shapes_are_checked():
    report = diagnostics.batch_norm_regularization(
        jnp.zeros((D, 2)), 1.0, 0.0, jnp.zeros(D), jnp.zeros((D, D)), jnp.zeros((D, 2))
    )
    assert all(jnp.all(leaf == 0) for leaf in report)
    with pytest.raises(ValueError, match=r"`covariance` must have shape \(5, 5\), got \(5,\)"):
        diagnostics.batch_norm_regularization(
            jnp.zeros((D, 2)), 1.0, 0.0, jnp.zeros(D), jnp.zeros(D), jnp.zeros((D, 2))
        )
    with pytest.raises(ValueError, match=r"`kernel` must have shape \(d, k\), got \(5,\)"):
        diagnostics.batch_norm_regularization(
            jnp.zeros(D), 1.0, 0.0, jnp.zeros(D), jnp.zeros((D, D)), jnp.zeros((D, 2))
        )
