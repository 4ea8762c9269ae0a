"""Population statistics, folding, and statistics behind a rescaled kernel."""

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
    after = evaluate(scaled, *normalization.rescale_statistics(mean, variance, factor=factor))
    np.testing.assert_allclose(after, before, atol=1e-5)
    assert jnp.abs(evaluate(scaled, mean, variance) - before).max() > 0.1
    one = normalization.rescale_statistics(mean, variance, factor=2.0)
    np.testing.assert_allclose(one[0], 2 * mean)
    np.testing.assert_allclose(one[1], 4 * variance)


def test_exact_statistics_of_a_partition_are_unbiased():
    data = RANDOM.normal(3, 2, size=(600, 4))
    batches = data.reshape(50, 12, 4)
    mean, variance = normalization.exact_population_statistics(
        batches.mean(1), batches.var(1), num_values=12
    )
    np.testing.assert_allclose(mean, data.mean(0), rtol=1e-6)
    expected = (12 / 11) * batches.var(1).mean(0)
    np.testing.assert_allclose(variance, expected, rtol=1e-6)
    # Standard error of a variance from 50 * 11 degrees of freedom; the biased one is 8 % too small.
    error = 4 * np.sqrt(2 / 550)
    assert np.all(np.abs(variance - 4) < 4 * error)


@pytest.mark.parametrize("shape", [(5, 3), (3, 3, 2, 3)])
def test_folded_layer_is_the_layer_with_its_norm_in_evaluation(shape):
    normal = lambda *size: jnp.asarray(RANDOM.normal(size=size), jnp.float32)
    kernel, bias = normal(*shape), normal(3)
    scale, norm_bias, mean = normal(3), normal(3), normal(3)
    variance = jnp.abs(normal(3)) + 0.5

    def layer(kernel, bias):
        if len(shape) == 2:
            return inputs @ kernel + bias[None]
        return jax.lax.conv_general_dilated(
            inputs, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ) + bias.reshape(1, 1, 1, -1)

    inputs = normal(7, 5) if len(shape) == 2 else normal(2, 6, 6, 2)
    norm = normalization.BatchNorm(epsilon=1e-3)
    state = {"mean": mean, "var": variance}
    for b in (bias, None):
        params = {"scale": scale, "bias": norm_bias}
        outputs = layer(kernel, jnp.zeros(3) if b is None else b)
        expected, _ = norm.apply(params, state, outputs, train=False)
        folded = normalization.fold_batch_norm(
            kernel, b, scale, norm_bias, mean, variance, epsilon=1e-3
        )
        np.testing.assert_allclose(layer(*folded), expected, rtol=1e-4, atol=1e-5)


def test_error_texts():
    with pytest.raises(ValueError, match="`num_values` must be at least 2, got 1"):
        normalization.exact_population_statistics(np.ones((2, 3)), np.ones((2, 3)), num_values=1)
    with pytest.raises(ValueError, match=r"shape \(batches, channels\), got \(3,\) and \(3,\)"):
        normalization.exact_population_statistics(np.ones(3), np.ones(3), num_values=4)
