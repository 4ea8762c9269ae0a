import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.claims._printed import minimal_damping
from regjax import curvature, schedules


@pytest.mark.parametrize("power", [1, 0.5])
def test_powers_of_the_batch_size(power):
    rate = schedules.batch_size_scaling(0.1, 128, power=power)
    sizes = jnp.asarray([32, 128, 512], jnp.int32)
    np.testing.assert_allclose(jax.jit(rate)(sizes), [0.1 * 0.25**power, 0.1, 0.1 * 4**power],
                               rtol=1e-6)  # fmt: skip
    assert float(rate(128)) == np.float32(0.1)


def test_saturating_scaling():
    crossover, reference = 44.5, 16
    rate = schedules.saturating_batch_size_scaling(0.01, reference, crossover=crossover)
    assert float(rate(reference)) == np.float32(0.01)
    assert float(jax.jit(rate)(jnp.int32(reference))) == np.float32(0.01)
    np.testing.assert_allclose(rate(np.inf), 0.01 * (1 + crossover / reference), rtol=1e-6)
    # Far below the crossover it is linear.
    small = schedules.saturating_batch_size_scaling(0.01, 0.4, crossover=44.5)
    linear = schedules.batch_size_scaling(0.01, 0.4, power=1)
    for size in (0.1, 0.4, 0.445):
        np.testing.assert_allclose(small(size), linear(size), rtol=0.01)
    assert abs(small(44.5) / linear(44.5) - 0.5) < 0.01  # and half of that at the crossover


def test_saturating_scaling_is_the_stability_limit_of_the_additive_law():
    largest, power = 4.359, 845.6
    sizes = jnp.asarray([4.0, 16.0, 64.0, 512.0])
    extremes = curvature.batch_extreme_eigenvalues(
        largest, -0.1, noise_power=power, batch_size=sizes, law=curvature.additive_outlier
    )
    limits = 2 / extremes.largest
    rate = schedules.saturating_batch_size_scaling(
        float(limits[1]), 16, crossover=power / largest**2
    )
    np.testing.assert_allclose(rate(sizes), limits, rtol=1e-5)


def test_damping_follows_rate_over_batch():
    damping = minimal_damping(1e-3, 0.1, 128)
    np.testing.assert_allclose(damping(0.2, jnp.asarray([64, 256])), [4e-3, 1e-3], rtol=1e-6)
    assert "first version only" in minimal_damping.__doc__


def test_double_precision_stays_double():
    with jax.enable_x64(True):
        rate = schedules.saturating_batch_size_scaling(0.01, 16, crossover=3.0)
        assert rate(jnp.float64(32)).dtype == jnp.float64


def test_error_texts():
    linear = functools.partial(schedules.batch_size_scaling, power=1)
    saturating = functools.partial(schedules.saturating_batch_size_scaling, crossover=1.0)
    for make in (linear, saturating):
        with pytest.raises(ValueError, match="`reference_learning_rate` must be positive, got 0"):
            make(0, 1)
        with pytest.raises(ValueError, match="`reference_batch_size` must be positive, got -1"):
            make(1, -1)
    with pytest.raises(ValueError, match="`power` must be non-negative, got -1"):
        schedules.batch_size_scaling(1, 1, power=-1)
    with pytest.raises(ValueError, match="`crossover` must be non-negative, got -1"):
        schedules.saturating_batch_size_scaling(1, 1, crossover=-1)
    with pytest.raises(ValueError, match="`reference_damping` must be positive, got 0"):
        minimal_damping(0, 1, 1)
