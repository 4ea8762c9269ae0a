"""The blocks of rows against one NumPy array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax.curvature import _basis

SIZE = 70


def filled(num_rows, count):
    basis = _basis.zeros(num_rows, SIZE, jnp.float32)
    rows = np.linalg.qr(np.random.default_rng(0).normal(size=(SIZE, count)))[0].T
    rows = rows.astype(np.float32)
    for i, row in enumerate(rows):
        basis = _basis.put(basis, jnp.int32(i), jnp.asarray(row))
    return basis, rows


@pytest.mark.parametrize(("num_rows", "blocks"), [(1, 1), (16, 1), (17, 2), (40, 3), (300, 8)])
def test_rows_suffice_in_few_blocks(num_rows, blocks):
    basis = _basis.zeros(num_rows, 3, jnp.float32)
    assert len(basis.blocks) == blocks
    assert num_rows <= basis.num_rows < num_rows + 16 + 8 * blocks


@pytest.mark.parametrize("count", [1, 16, 17, 40])
def test_outside_is_a_projection_in_all_blocks(count):
    basis, rows = filled(40, count)
    np.testing.assert_array_equal(_basis.to_array(basis, count), rows)
    vector = np.random.default_rng(1).normal(size=SIZE).astype(np.float32)
    rest, coefficients = jax.jit(_basis.outside)(basis, jnp.int32(count), vector)
    np.testing.assert_allclose(coefficients[:count], rows @ vector, atol=1e-5)
    np.testing.assert_array_equal(coefficients[count:], 0)
    np.testing.assert_allclose(rest, vector - rows.T @ (rows @ vector), atol=1e-5)


@pytest.mark.parametrize("width", [SIZE, 32])
def test_combining_and_recombining(width, monkeypatch):
    # 32 does not divide the size: the last slab of columns reaches back over the one before.
    monkeypatch.setattr(_basis, "_RECOMBINED_WIDTH", width)
    basis, rows = filled(40, 40)
    weights = np.random.default_rng(2).normal(size=(basis.num_rows,) * 2).astype(np.float32)
    expected = weights[:40].T @ rows
    np.testing.assert_allclose(_basis.combine(basis, weights), expected, atol=1e-4)
    again = _basis.recombine(basis, jnp.asarray(weights))
    np.testing.assert_allclose(_basis.to_array(again, basis.num_rows), expected, atol=1e-4)
