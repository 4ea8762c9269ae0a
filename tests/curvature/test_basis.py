"""The blocks of rows against one NumPy array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax._space import Space
from regjax.curvature._engine import _basis

pytestmark = pytest.mark.usefixtures("in_blocks")

SIZE = 70
SPACE = Space.of(jnp.zeros(SIZE))


def filled(num_rows, count):
    basis = _basis.zeros(SPACE, num_rows)
    rows = np.linalg.qr(np.random.default_rng(0).normal(size=(SIZE, count)))[0].T
    rows = rows.astype(np.float32)
    append = jax.jit(_basis.append)
    for i, row in enumerate(rows):
        assert int(basis.filled) == i
        basis = append(basis, jnp.asarray(row))
    return basis, rows


@pytest.mark.parametrize(("num_rows", "blocks"), [(1, 1), (8, 1), (9, 2), (40, 5), (300, 10)])
def test_rows_suffice_in_few_blocks(num_rows, blocks):
    basis = _basis.zeros(Space.of(jnp.zeros(3)), num_rows)
    assert len(basis.blocks) == blocks
    assert num_rows <= basis.num_rows < num_rows + 16 + 8 * blocks


def test_a_row_beyond_the_last_is_not_written(monkeypatch):
    monkeypatch.setattr(_basis, "_SMALL", 2**21)
    basis, rows = filled(20, 20)
    assert len(basis.blocks) == 1
    more = jax.jit(_basis.append)(basis, jnp.ones(SIZE))
    np.testing.assert_array_equal(more.blocks[0], rows)


@pytest.mark.parametrize("is_accumulated", [False, True])
def test_an_empty_basis_takes_nothing_away(is_accumulated, monkeypatch):
    monkeypatch.setattr(_basis, "_SMALL", 2**21)
    basis = _basis.zeros(SPACE, 20, "compensated" if is_accumulated else None)
    vector = jnp.arange(SIZE, dtype=jnp.float32) - 3
    rest, coefficients = _basis.outside(basis, vector)
    np.testing.assert_array_equal(rest, vector)
    np.testing.assert_array_equal(coefficients, np.zeros(20))


@pytest.mark.parametrize("count", [1, 8, 9, 40])
def test_outside_is_a_projection_in_all_blocks(count):
    basis, rows = filled(40, count)
    np.testing.assert_array_equal(_basis.to_trees(basis, count), rows)
    vector = np.random.default_rng(1).normal(size=SIZE).astype(np.float32)
    rest, coefficients = jax.jit(_basis.outside)(basis, vector)
    np.testing.assert_allclose(coefficients[:count], rows @ vector, atol=1e-5)
    np.testing.assert_array_equal(coefficients[count:], 0)
    np.testing.assert_allclose(rest, vector - rows.T @ (rows @ vector), atol=1e-5)


@pytest.mark.parametrize("num_rows", [3, 8, 16, 29])
def test_weighted_rows_are_subtracted_in_groups_and_the_rest(num_rows):
    random = np.random.default_rng(3)
    block, weights = random.normal(size=(num_rows, SIZE)), random.normal(size=num_rows)
    vector = random.normal(size=SIZE)
    given = (jnp.asarray(array, jnp.float32) for array in (vector, weights, block))
    found = jax.jit(_basis._less)(_basis.zeros(SPACE, num_rows), *given)
    np.testing.assert_allclose(found, vector - weights @ block, atol=1e-5)


def test_on_cpu_no_block_is_multiplied_as_a_matrix():
    # XLA reads the rows of a vector times a matrix at half of the speed of memory.
    basis = _basis.zeros(Space.of(jnp.zeros(3000)), 20)
    program = jax.jit(_basis.outside).lower(basis, jnp.zeros(3000)).compile().as_text()
    assert " dot(" not in program
    assert "__onednn" not in program


@pytest.mark.parametrize("width", [SIZE, 32])
def test_combining_and_recombining(width, monkeypatch):
    # 32 does not divide the size: the last slab of columns reaches back over the one before.
    monkeypatch.setattr(_basis, "_RECOMBINED_WIDTH", width)
    basis, rows = filled(40, 40)
    weights = np.random.default_rng(2).normal(size=(basis.num_rows,) * 2).astype(np.float32)
    expected = weights[:40].T @ rows
    np.testing.assert_allclose(_basis.combine(basis, weights), expected, atol=1e-4)
    again = _basis.recombine(basis, jnp.asarray(weights), jnp.int32(7))
    assert (int(again.filled), int(again.generation)) == (7, 1)
    np.testing.assert_allclose(_basis.to_trees(again, basis.num_rows), expected, atol=1e-4)
    few = _basis.combined(basis, jnp.asarray(weights[:, :20]), jnp.int32(20))
    assert len(few.blocks) == 3
    np.testing.assert_allclose(_basis.to_trees(few, 20), expected[:20], atol=1e-4)


def test_combining_takes_little_more_than_its_result():
    # A sum over the blocks held all of its terms at once, k vectors each.
    basis = _basis.zeros(Space.of(jnp.zeros(20_000)), 40)
    assert len(basis.blocks) == 5
    program = jax.jit(_basis.combine).lower(basis, jnp.zeros((basis.num_rows, 16))).compile()
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < 0.5 * memory.output_size_in_bytes


def test_nothing_is_outside_of_no_rows():
    vector = jnp.arange(float(SIZE))
    rest, coefficients = _basis.outside(_basis.zeros(SPACE, 0), vector)
    np.testing.assert_array_equal(rest, vector)
    assert coefficients.shape == (0,)
