"""Langevin steps in a quadratic well: the stationary law is a known Gaussian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax.transforms._langevin import langevin_step

A, B, GAMMA, STEP, NOISE = np.array([1.0, 3.0]), np.array([0.3, -0.2]), 0.7, 0.1, 0.5
ANCHOR = np.array([1.0, -0.5])


def test_one_step_is_the_formula():
    x, g, anchor = (
        {"a": jnp.asarray([1.0, 2.0])},
        {"a": jnp.asarray([3.0, 4.0])},
        {"a": jnp.zeros(2)},
    )
    step = lambda noise, key: langevin_step(
        x,
        g,
        key=jax.random.key(key),
        anchor=anchor,
        gamma=0.5,
        learning_rate=0.01,
        noise_scale=noise,
    )["a"]
    clean = np.array([1.0, 2.0]) - 0.01 * (np.array([3.0, 4.0]) - 0.5 * (0 - np.array([1.0, 2.0])))
    np.testing.assert_allclose(step(0.0, 0), clean, rtol=1e-6)
    np.testing.assert_array_equal(step(0.0, 0), step(0.0, 1))
    # The noise is linear in its scale: sqrt(learning_rate) noise_scale N.
    np.testing.assert_allclose(step(2.0, 0) - clean, 2 * (step(1.0, 0) - clean), rtol=1e-4)
    assert jnp.any(step(1.0, 0) != step(1.0, 1))


def test_stationary_mean_and_covariance():
    a, b, anchor = (jnp.asarray(v, jnp.float32) for v in (A, B, ANCHOR))
    num_chains, burn_in, kept = 256, 500, 5500

    def step(carry, key):
        position, total, square = carry
        keys = jax.random.split(key, num_chains)
        move = lambda x, k: langevin_step(
            x, a * x + b, key=k, anchor=anchor, gamma=GAMMA, learning_rate=STEP, noise_scale=NOISE
        )
        position = jax.vmap(move)(position, keys)
        return (position, total + position, square + position**2), None

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[0])
    zeros = jnp.zeros((num_chains, 2))
    keys = jax.random.split(jax.random.key(0), burn_in + kept)
    position, _, _ = run((zeros, zeros, zeros), keys[:burn_in])
    _, total, square = run((position, zeros, zeros), keys[burn_in:])
    stiffness = A + GAMMA
    means, squares = np.asarray(total) / kept, np.asarray(square) / kept
    mean = (GAMMA * ANCHOR - B) / stiffness
    variance = NOISE**2 / 2 / (stiffness - STEP / 2 * stiffness**2)
    # The chains are independent: their spread gives the standard errors.
    error = means.std(0) / np.sqrt(num_chains)
    np.testing.assert_array_less(np.abs(means.mean(0) - mean), 5 * error)
    spreads = squares - 2 * mean * means + mean**2
    error = spreads.std(0) / np.sqrt(num_chains)
    np.testing.assert_array_less(np.abs(spreads.mean(0) - variance), 5 * error)
    assert np.all(error < 0.01 * variance)


def test_dtypes_stay():
    x = jnp.ones(3, jnp.bfloat16)
    new = langevin_step(
        x, x, key=jax.random.key(0), anchor=x, gamma=0.1, learning_rate=0.1, noise_scale=0.1
    )
    assert new.dtype == jnp.bfloat16


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_traced_noise_scale_is_the_same(noise):
    x = jnp.ones(3)
    step = lambda noise: langevin_step(
        x, x, key=jax.random.key(0), anchor=0 * x, gamma=0.1, learning_rate=0.1, noise_scale=noise
    )
    np.testing.assert_allclose(jax.jit(step)(noise), step(noise), rtol=1e-6)
