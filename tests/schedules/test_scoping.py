import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import schedules


def test_geometric_growth_at_once():
    traced = jax.jit(schedules.scoping_schedule(1e-4, 1e-3))(jnp.int32(7))
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, 1e-4 * 1.001**7, rtol=1e-6)


@pytest.mark.parametrize(("growth", "largest"), [(1e-3, 90_000), (1e-6, 2**31 - 1), (0.7, 170)])
def test_growth_keeps_the_precision_of_float32_at_any_count(growth, largest):
    # A factor in float32 is off by 2e-4 at count 5000, and by 1 at 10 million.
    counts = np.unique(np.geomspace(1, largest, 300).astype(np.int32))
    counts = np.concatenate([[0], counts[counts * np.log1p(growth) < 88]])
    found = schedules.scoping_schedule(0.5, growth)(jnp.asarray(counts, jnp.int32))
    expected = 0.5 * np.exp(counts * np.log1p(np.float64(growth)))
    np.testing.assert_allclose(found, expected, rtol=5e-7)


def test_no_growth_and_growth_out_of_range():
    assert float(schedules.scoping_schedule(0.3, 0)(jnp.int32(10**9))) == np.float32(0.3)
    assert np.isinf(schedules.scoping_schedule(0.3, 0.1)(10**6))
    assert float(schedules.scoping_schedule(0.0, 0.1)(10**6)) == 0


def test_error_texts():
    with pytest.raises(ValueError, match="`gamma0` must be non-negative, got -1"):
        schedules.scoping_schedule(-1, 0.1)
    with pytest.raises(ValueError, match="`growth` must be non-negative, got -1"):
        schedules.scoping_schedule(1, -1)
    for wrong in (np.nan, np.inf):
        with pytest.raises(ValueError, match="`growth` must be"):
            schedules.scoping_schedule(1, wrong)
    schedule = schedules.scoping_schedule(1, 0.1)
    with pytest.raises(ValueError, match="`count` must be non-negative, got -1"):
        schedule(-1)
    with pytest.raises(TypeError, match="`count` must be an integer, got float32"):
        schedule(1.5)
    with pytest.raises(TypeError, match="`gamma0` must be known when the program is built"):
        jax.jit(lambda g: schedules.scoping_schedule(g, 0.1)(1))(0.5)
