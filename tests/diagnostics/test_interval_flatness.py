"""Interval flatness against valleys whose width has a closed form."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import diagnostics

# Of length 5: distances do not depend on it.
DIRECTION = (3.0, 4.0)


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def of_distance(shape):
    """A loss of the position along the direction, repeated for each example."""

    def loss(params, rows):
        t = params["w"] @ jnp.asarray([0.6, 0.8])
        return jnp.mean(shape(t) + rows[:, 0])

    return loss


def flatness(shape, direction=DIRECTION, **options):
    origin, rows = {"w": jnp.zeros(2)}, jnp.zeros((4, 1))
    return diagnostics.interval_flatness(
        of_distance(shape),
        origin,
        {"w": jnp.asarray(direction)},
        rows,
        **{"max_distance": 10.0, **options},
    )


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_an_exponential_of_the_square(chunk_size, double):
    m = 0.3
    report = flatness(lambda t: 0.2 * jnp.exp(0.5 * m * t**2), chunk_size=chunk_size)
    np.testing.assert_allclose(report.interval_width, math.sqrt(8 / m), rtol=1e-4)
    assert bool(report.converged)
    assert float(report.interval_width_error_bound) < 1e-6


@pytest.mark.optimized
def test_a_square_and_another_level_in_float32():
    h, start = 2.5, 0.4
    square = lambda t: start + 0.5 * h * t**2
    np.testing.assert_allclose(
        flatness(square).interval_width, 2 * math.sqrt(2 * (math.e - 1) * start / h), rtol=1e-4
    )
    np.testing.assert_allclose(
        flatness(lambda t: jnp.exp(0.5 * h * t**2), factor=2.0).interval_width,
        math.sqrt(8 * math.log(2) / h),
        rtol=1e-4,
    )


def test_an_asymmetric_valley_under_jit(double):
    valley = lambda t: jnp.where(t > 0, 1 + t, 1 - 4 * t)
    report = jax.jit(functools.partial(flatness, valley))()
    np.testing.assert_allclose(report.right, math.e - 1, rtol=1e-4)
    np.testing.assert_allclose(report.left, -(math.e - 1) / 4, rtol=1e-4)
    np.testing.assert_allclose(report.interval_width, report.right - report.left)


def test_the_nearest_crossing_counts_and_infinity_is_above(double):
    # Above the level from 1 to 6 only, then below it again.
    hump = lambda t: jnp.where((t >= 1) & (t <= 6), 3.0, 1.0) + jnp.where(t <= -2, jnp.inf, 0.0)
    report = flatness(hump)
    np.testing.assert_allclose(report.right, 1, rtol=1e-4)
    np.testing.assert_allclose(report.left, -2, rtol=1e-4)


def test_a_level_that_is_not_reached_is_flagged():
    report = flatness(lambda t: jnp.where(t < 0, 1 - t, 1.0))
    assert not bool(report.converged)
    np.testing.assert_allclose(report.left, -(math.e - 1), rtol=1e-4)
    assert float(report.right) == 10


def test_no_loss_no_flatness():
    assert np.isnan(flatness(lambda t: t**2).interval_width)
    report = flatness(lambda t: 1 + t**2, direction=(0.0, 0.0))
    assert np.isnan(report.interval_width)
    assert not bool(report.converged)


def test_bad_input():
    shape = lambda t: 1 + t**2
    with pytest.raises(ValueError, match=r"`factor` must be above 1, got 0\.5"):
        flatness(shape, factor=0.5)
    with pytest.raises(ValueError, match="`max_distance` must be positive, got 0"):
        flatness(shape, max_distance=0.0)
    with pytest.raises(ValueError, match="`num_evaluations` must be at least 3, got 2"):
        flatness(shape, num_evaluations=2)
    params, other, rows = {"w": jnp.ones(2)}, {"v": jnp.ones(2)}, jnp.ones((4, 1))
    with pytest.raises(ValueError, match="`direction` must have the tree structure"):
        diagnostics.interval_flatness(of_distance(shape), params, other, rows, max_distance=1.0)
