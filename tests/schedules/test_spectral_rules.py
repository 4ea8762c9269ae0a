"""The rules on quadratics, where the rate of convergence is known; what counts as the bulk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import schedules

SPECTRUM = np.array([1.0, 7.0, 30.0, 100.0])


def shrinkage(rule, *, nesterov, scale=1.0, num_steps=300):
    """Factor of the distance to the minimum a step, over the last third of the steps."""
    rate, momentum = (float(x) for x in rule(100.0 * scale, 1.0 * scale))
    w, v = np.ones(4), np.zeros(4)
    distances = []
    for _ in range(num_steps):
        g = scale * SPECTRUM * w
        v = momentum * v - rate * g
        w = w + (momentum * v - rate * g if nesterov else v)
        distances.append(np.linalg.norm(w))
    third = num_steps // 3
    return (distances[-1] / distances[-third]) ** (1 / (third - 1))


def test_polyak_is_optimal_on_a_quadratic():
    assert abs(shrinkage(schedules.polyak_rule, nesterov=False) - 9 / 11) < 0.02 * 9 / 11
    rate, momentum = schedules.polyak_rule(100.0, 1.0)
    np.testing.assert_allclose(rate, 4 / 121, rtol=1e-6)
    np.testing.assert_allclose(momentum, 81 / 121, rtol=1e-6)


def test_nesterov_converges_at_its_rate():
    # The slowest mode shrinks by sqrt(momentum (1 - rate m)) = 0.9 a step.
    assert abs(shrinkage(schedules.nesterov_rule, nesterov=True) - 0.9) < 0.02 * 0.9
    rate, momentum = schedules.nesterov_rule(100.0, 1.0)
    np.testing.assert_allclose([rate, momentum], [0.01, 9 / 11], rtol=1e-6)


def test_the_printed_rates_diverge():
    def unsquared(largest, smallest):
        rate, momentum = schedules.polyak_rule(largest, smallest)
        return jnp.sqrt(rate), momentum

    assert shrinkage(unsquared, nesterov=False, num_steps=60) > 2
    for nesterov in (True, False):
        assert shrinkage(schedules.paper_nesterov_rule, nesterov=nesterov, num_steps=60) > 2
    rate, momentum = schedules.paper_nesterov_rule(100.0, 1.0)
    np.testing.assert_allclose([rate, (1 - rate) / (1 + rate)], [0.1, momentum], rtol=1e-6)


@pytest.mark.parametrize("name", ["nesterov_rule", "polyak_rule", "paper_nesterov_rule"])
def test_a_loss_times_ten(name):
    rule = getattr(schedules, name)
    one, ten = rule(50.0, 0.2), rule(500.0, 2.0)
    np.testing.assert_allclose(ten.momentum, one.momentum, rtol=1e-6)
    is_invariant = abs(ten.learning_rate * 10 / one.learning_rate - 1) < 1e-5
    assert is_invariant == (name != "paper_nesterov_rule")


@pytest.mark.parametrize(
    ("values", "weights", "expected"),
    [
        # The heaviest hides a second near zero: renormalised, 0.467 is more than half of the rest.
        ([1e-4, 0.04, 0.16, 3.0, 10.0], [0.506, 0.467, 0.012, 0.009, 0.006], 0.16),
        # Neither is heavy by itself; together they are the bulk.
        ([1e-4, 3e-3, 0.16, 3.0, 10.0], [0.49, 0.49, 0.009, 0.006, 0.005], 0.16),
        # What is no bulk stays, however small.
        ([0.05, 0.4, 3.0, 10.0], [0.3, 0.3, 0.2, 0.2], 0.05),
        # Magnitudes: a negative one counts as large as it is.
        ([-4.0, 0.4, 3.0, 10.0], [0.3, 0.2, 0.3, 0.2], 0.4),
        ([-40.0, 4.0, 3.0, 10.0], [0.3, 0.2, 0.3, 0.2], 3.0),
        # The last one is never dropped; bounded by smallest_ratio.
        ([2.0, 5.0], [0.9, 0.1], 5.0),
        ([1e-5], [1.0], 1e-5),
        ([1e-6, 2e-6, 1.0, 2.0], [0.2, 0.2, 0.3, 0.3], 2e-3),
        # Weight 0: no value, be it larger or smaller than all.
        ([-77.0, 1.0, 2.0, 3.0], [0.0, 0.3, 0.3, 0.4], 1.0),
        ([0.0, 1.0, 2.0, 3.0], [0.0, 0.3, 0.3, 0.4], 1.0),
    ],
)
def test_ends_of_the_spectrum(values, weights, expected):
    values, weights = jnp.asarray(values), jnp.asarray(weights)
    ends = jax.jit(schedules.spectral_ends)(values, weights)
    assert float(ends.smallest) == np.float32(expected)
    assert float(ends.largest) == float(jnp.max(jnp.where(weights > 0, jnp.abs(values), 0)))


def test_the_bound_of_the_smallest_and_unusable_values():
    values, weights = jnp.asarray([0.05, 0.4, 3.0, 10.0]), jnp.full(4, 0.25)
    assert float(schedules.spectral_ends(values, weights, smallest_ratio=0.02).smallest) == (
        pytest.approx(0.2)
    )
    assert float(schedules.spectral_ends(jnp.zeros(4), weights).largest) == 0
    broken = schedules.spectral_ends(jnp.asarray([jnp.nan, 1.0, 2.0, 3.0]), weights)
    assert np.isnan(broken.largest)
    with pytest.raises(ValueError, match="`smallest_ratio` must be non-negative, got -1"):
        schedules.spectral_ends(values, weights, smallest_ratio=-1)
