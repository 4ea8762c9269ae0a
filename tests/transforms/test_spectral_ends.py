"""What counts as an end of the spectrum, and what as the bulk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax.transforms._spectral_ends import spectral_ends


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
    ends = jax.jit(spectral_ends)(values, weights)
    assert float(ends.smallest) == np.float32(expected)
    assert float(ends.largest) == float(jnp.max(jnp.where(weights > 0, jnp.abs(values), 0)))


def test_the_bound_of_the_smallest_and_unusable_values():
    values, weights = jnp.asarray([0.05, 0.4, 3.0, 10.0]), jnp.full(4, 0.25)
    assert float(spectral_ends(values, weights, smallest_ratio=0.02).smallest) == (
        pytest.approx(0.2)
    )
    assert float(spectral_ends(jnp.zeros(4), weights).largest) == 0
    broken = spectral_ends(jnp.asarray([jnp.nan, 1.0, 2.0, 3.0]), weights)
    assert np.isnan(broken.largest)
    for unknown in (values, weights.at[1].set(jnp.nan)), (values.at[3].set(jnp.nan), weights):
        assert np.isnan(jax.jit(spectral_ends)(*unknown)).all()
    fillers = spectral_ends(jnp.append(values, jnp.nan), jnp.append(weights, 0.0))
    assert float(fillers.largest) == 10
    with pytest.raises(ValueError, match="`smallest_ratio` must be non-negative, got -1"):
        spectral_ends(values, weights, smallest_ratio=-1)
