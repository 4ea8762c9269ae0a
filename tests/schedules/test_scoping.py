import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import schedules


def test_geometric_growth_at_once():
    schedule = schedules.scoping_schedule(1e-4, 1e-3)
    for count in (0, 1, 5000):
        expected = 1e-4 * 1.001**count
        np.testing.assert_allclose(schedule(jnp.int32(count)), expected, rtol=1e-3)
    traced = jax.jit(schedule)(jnp.int32(7))
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, 1e-4 * 1.001**7, rtol=1e-6)


def test_error_texts():
    with pytest.raises(ValueError, match="`gamma0` must be non-negative, got -1"):
        schedules.scoping_schedule(-1, 0.1)
    with pytest.raises(ValueError, match="`growth` must be non-negative, got -1"):
        schedules.scoping_schedule(1, -1)
