import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import normalization

RANDOM = np.random.default_rng(0)


def test_rescaled_weights_with_rescaled_statistics_are_the_same_network():
    inputs, kernel = (jnp.asarray(RANDOM.normal(size=s), jnp.float32) for s in ((9, 4), (4, 3)))
    mean, variance = jnp.asarray([0.1, -0.2, 0.3]), jnp.asarray([1.0, 0.5, 2.0])
    factor = jnp.asarray([2.0, 0.5, 3.0])

    def evaluate(kernel, mean, variance):
        return (inputs @ kernel - mean[None]) / jnp.sqrt(variance)[None]

    before = evaluate(kernel, mean, variance)
    scaled = kernel * factor[None]
    after = evaluate(scaled, *normalization.rescale_statistics(mean, variance, factor))
    np.testing.assert_allclose(after, before, atol=1e-5)
    assert jnp.abs(evaluate(scaled, mean, variance) - before).max() > 0.1
    one = normalization.rescale_statistics(mean, variance, 2.0)
    np.testing.assert_allclose(one[0], 2 * mean)
    np.testing.assert_allclose(one[1], 4 * variance)


@pytest.mark.parametrize("shape", [(6, 4), (3, 3, 2, 4)])
def test_standardized_weights_have_mean_zero_and_variance_one(shape):
    kernel = jnp.asarray(3 + 2 * RANDOM.normal(size=shape), jnp.float32)
    flat = np.asarray(normalization.standardize_weight(kernel)).reshape(-1, 4)
    np.testing.assert_allclose(flat.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(flat.var(0), 1, rtol=1e-4)
    # A constant filter has no direction: finite, and so is its gradient.
    constant = jnp.ones(shape)
    assert jnp.all(normalization.standardize_weight(constant) == 0)
    gradient = jax.grad(lambda k: jnp.sum(normalization.standardize_weight(k) ** 2))(constant)
    assert jnp.all(jnp.isfinite(gradient))


def test_error_texts():
    with pytest.raises(ValueError, match=r"`kernel` must have at least two axes, got shape \(3,\)"):
        normalization.standardize_weight(jnp.ones(3))
    with pytest.raises(ValueError, match="`epsilon` must be non-negative, got -1"):
        normalization.standardize_weight(jnp.ones((2, 3)), epsilon=-1)
