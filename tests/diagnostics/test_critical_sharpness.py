"""The critical sharpness against closed forms along a line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import regjax
from regjax import diagnostics

EIGENVALUES = jnp.asarray([3.0, 1.0, 0.2], jnp.float32)
WEIGHTS = jnp.asarray([1.0, 2.0, -1.0], jnp.float32)
X = jnp.ones(4, jnp.float32)


def quadratic(w, x):
    return jnp.mean(x) * 0.5 * jnp.sum(EIGENVALUES * w**2)


def quartic(w, x):
    return jnp.mean(x) * w**4


def measure(loss_fn, w, direction, rate, **options):
    return diagnostics.critical_sharpness(
        loss_fn, w, -rate * direction, X, learning_rate=rate, **options
    )


@pytest.mark.parametrize("rate", [1e-6, 1e-3, 0.1, 0.8, 1.0, 30.0, 1e4])
def test_of_a_quadratic_it_is_the_weighted_mean_curvature(rate):
    grad = EIGENVALUES * WEIGHTS
    found = measure(quadratic, WEIGHTS, grad, rate)
    expected = float(jnp.sum(grad * EIGENVALUES * grad) / jnp.sum(grad**2))  # d'Hd / g'd, d = g
    assert float(found.value) == pytest.approx(expected, rel=1e-4)
    assert float(found.critical_learning_rate) == pytest.approx(2 / expected, rel=1e-4)
    assert bool(found.resolved)
    assert bool(found.descends)
    assert float(found.lower_bound) < expected < float(found.upper_bound)
    assert float(found.upper_bound / found.lower_bound) < 1.05
    assert int(found.num_evaluations) <= 10


def test_of_another_direction_it_is_relative_to_the_slope():
    direction = jnp.asarray([1.0, 0.5, 0.1], jnp.float32)
    grad = EIGENVALUES * WEIGHTS
    expected = float(jnp.sum(direction**2 * EIGENVALUES) / jnp.sum(grad * direction))
    assert float(measure(quadratic, WEIGHTS, direction, 0.1).value) == pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.parametrize("rate", [0.01, 0.3, 5.0])
def test_of_a_quartic_it_is_where_the_loss_returns(rate):
    # (1 - 4 eta)^4 = 1 at eta = 1/2; d'Hd / g'd would give 3.
    found = measure(quartic, jnp.float32(1), jnp.float32(4), rate)
    assert float(found.value) == pytest.approx(4, rel=0.01)
    assert float(found.lower_bound) <= 4 <= float(found.upper_bound)
    assert bool(found.resolved)


def test_a_direction_that_ascends_gives_nan_and_says_so():
    found = measure(quadratic, WEIGHTS, -EIGENVALUES * WEIGHTS, 0.1)
    assert np.isnan(found.value)
    assert not bool(found.resolved)
    assert not bool(found.descends)
    assert np.isinf(found.upper_bound)
    assert int(found.num_evaluations) == 10


def test_a_loss_that_only_falls_has_an_upper_bound_alone():
    found = measure(lambda w, x: jnp.mean(x) * w, jnp.float32(1), jnp.float32(1), 0.1)
    assert np.isnan(found.value)
    assert bool(found.descends)
    assert not bool(found.resolved)
    assert float(found.lower_bound) == 0
    assert np.isfinite(found.upper_bound)


def test_rounding_is_not_taken_for_a_crossing():
    large = lambda w, x: 1e4 * jnp.mean(x) + 1e-6 * w**2
    found = measure(large, jnp.float32(1), jnp.float32(1), 0.1)
    assert np.isnan(found.value)
    assert not bool(found.resolved)


@pytest.mark.parametrize("rate", [0.3, 1.0, 10.0])  # the second looks at the crossing itself
def test_a_loss_that_overflows_beyond_is_above(rate):
    steep = lambda w, x: jnp.mean(x) * (w**2 + jnp.exp(200 * (jnp.abs(w) - 1)) - 1)
    found = measure(steep, jnp.float32(1), jnp.float32(1), rate)
    # Down from w = 1 with slope 202, back to the same loss at w = -1.
    assert float(found.lower_bound) < 1 < float(found.upper_bound)
    assert float(found.upper_bound / found.lower_bound) < 1.3


def test_jit_chunks_and_weighted_means_give_the_same():
    weights = jnp.asarray([1.0, 2.0, 0.5, 4.0], jnp.float32)

    def weighted(w, weights):
        losses = weights * (0.5 * jnp.sum(EIGENVALUES * w**2))
        return regjax.WeightedMean(jnp.sum(losses), jnp.sum(weights))

    grad, rate = EIGENVALUES * WEIGHTS, 0.1
    of = lambda w, **options: diagnostics.critical_sharpness(
        weighted, w, -rate * grad, weights, learning_rate=rate, **options
    )
    plain = measure(quadratic, WEIGHTS, grad, rate)
    for found in (of(WEIGHTS), of(WEIGHTS, chunk_size=2), jax.jit(of)(WEIGHTS)):
        assert float(found.value) == pytest.approx(float(plain.value), rel=1e-4)
        assert int(found.num_evaluations) == int(plain.num_evaluations)


def test_the_passes_are_counted_and_bounded():
    calls = []

    def counted(w, x):
        jax.debug.callback(lambda: calls.append(1))
        return quartic(w, x)

    found = measure(counted, jnp.float32(1), jnp.float32(4), 0.01, num_evaluations=6)
    jax.effects_barrier()
    assert len(calls) == int(found.num_evaluations) == 6


def test_bad_input_is_refused_by_name():
    with pytest.raises(ValueError, match="`updates` must have the tree structure"):
        diagnostics.critical_sharpness(quadratic, WEIGHTS, {"w": WEIGHTS}, X, learning_rate=0.1)
    with pytest.raises(ValueError, match="`updates` must be finite, got NaN"):
        measure(quadratic, WEIGHTS, WEIGHTS * jnp.nan, 0.1)
    with pytest.raises(ValueError, match="`learning_rate` must be positive, got 0"):
        measure(quadratic, WEIGHTS, WEIGHTS, 0.0)
    with pytest.raises(ValueError, match="`num_evaluations` must be at least 4, got 3"):
        measure(quadratic, WEIGHTS, WEIGHTS, 0.1, num_evaluations=3)
