"""The rules on quadratics, where the rate of convergence is known, and those that were printed."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.claims._printed import paper_nesterov_rule
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
        assert shrinkage(paper_nesterov_rule, nesterov=nesterov, num_steps=60) > 2
    rate, momentum = paper_nesterov_rule(100.0, 1.0)
    np.testing.assert_allclose([rate, (1 - rate) / (1 + rate)], [0.1, momentum], rtol=1e-6)


@pytest.mark.parametrize(
    "rule", [schedules.nesterov_rule, schedules.polyak_rule, paper_nesterov_rule]
)
def test_a_loss_times_ten(rule):
    one, ten = rule(50.0, 0.2), rule(500.0, 2.0)
    np.testing.assert_allclose(ten.momentum, one.momentum, rtol=1e-6)
    is_invariant = abs(ten.learning_rate * 10 / one.learning_rate - 1) < 1e-5
    assert is_invariant == (rule is not paper_nesterov_rule)
