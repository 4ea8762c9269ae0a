"""The layout of vectors on one device; on several: tests/curvature/sharded.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax._space import Space

TREE = {"a": jnp.arange(6.0).reshape(2, 3), "b": (jnp.float32(7), jnp.zeros((0, 2)))}
SPACE = Space.of(TREE)


def test_ravel_and_unravel_are_inverse():
    flat = SPACE.ravel(TREE)
    np.testing.assert_array_equal(flat, [0, 1, 2, 3, 4, 5, 7])
    back = SPACE.unravel(flat)
    np.testing.assert_array_equal(back["a"], TREE["a"])
    assert back["b"][1].shape == (0, 2)
    assert SPACE.size == SPACE.length == 7


def test_rows_are_vectors_with_a_leading_axis():
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), TREE)
    rows = SPACE.ravel_rows(several)
    np.testing.assert_array_equal(rows, np.outer([1, 2], SPACE.ravel(TREE)))
    back = SPACE.unravel_rows(rows)
    jax.tree.map(np.testing.assert_array_equal, back, several)


def test_vectors_are_as_wide_as_the_widest_leaf_and_float32_at_least():
    half = jnp.zeros(2, jnp.bfloat16)
    space = Space.of({"a": half})
    assert space.dtype == jnp.float32
    assert space.unravel(jnp.ones(2))["a"].dtype == jnp.bfloat16
    assert space.ravel({"a": half}, jnp.bfloat16).dtype == jnp.bfloat16
    with jax.enable_x64(True):
        assert Space.of({"a": half, "b": jnp.zeros(2, jnp.float64)}).dtype == jnp.float64


def test_spaces_of_like_trees_are_equal_and_of_others_are_not():
    assert Space.of(jax.tree.map(lambda leaf: leaf + 1, TREE)) == SPACE
    assert hash(Space.of(SPACE.like())) == hash(SPACE)
    for other in (
        TREE["a"],
        {**TREE, "a": jnp.zeros((3, 2))},
        {**TREE, "a": jnp.zeros((2, 3), int)},
    ):
        assert Space.of(other) != SPACE


def test_products_norms_and_draws_are_those_of_flat_vectors():
    one, other = SPACE.normal(jax.random.key(0)), SPACE.normal(jax.random.key(1))
    np.testing.assert_array_equal(one, jax.random.normal(jax.random.key(0), (7,)))
    np.testing.assert_allclose(SPACE.inner(one, other), np.dot(one, other), rtol=1e-6)
    np.testing.assert_allclose(SPACE.norm(one), np.linalg.norm(one), rtol=1e-6)
    assert SPACE.normal(jax.random.key(0), 3).shape == SPACE.zeros(3).shape == (3, 7)
    assert set(np.unique(SPACE.signs(jax.random.key(0), 5))) == {-1, 1}


def test_bytes_are_those_of_arrays_or_of_their_shapes():
    tree = {"rows": jnp.zeros((3, 7)), "key": jax.random.key(0), "on": jnp.zeros(2, bool), "k": 3}
    assert SPACE.num_bytes(tree) == 3 * 7 * 4 + 2
    assert SPACE.num_bytes(jax.eval_shape(lambda: tree["rows"])) == 84


def test_an_orthonormal_basis_spans_the_rows():
    rows = SPACE.normal(jax.random.key(0), 4)
    basis = np.asarray(SPACE.orthonormal(rows))
    np.testing.assert_allclose(basis @ basis.T, np.eye(4), atol=1e-6)
    np.testing.assert_allclose((rows @ basis.T) @ basis, rows, atol=1e-5)


def test_another_length_is_not_a_vector():
    with pytest.raises((TypeError, ValueError)):
        SPACE.unravel(jnp.zeros(5))
