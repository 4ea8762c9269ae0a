import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import _checks, _tree


def test_size_counts_all_scalars():
    assert _tree.size({"a": jnp.zeros((2, 3)), "b": (jnp.float32(7), jnp.zeros((0, 2)))}) == 7


def test_vectors_are_as_wide_as_the_widest_leaf_and_float32_at_least():
    half = jnp.zeros(2, jnp.bfloat16)
    assert _tree.vector_dtype({"a": half}) == jnp.float32
    with jax.enable_x64(True):
        assert _tree.vector_dtype({"a": half, "b": jnp.zeros(2, jnp.float64)}) == jnp.float64


def test_inner_products_are_summed_wide():
    one = {"a": jnp.full(300, 1.0, jnp.bfloat16), "b": jnp.asarray([2.0, 3.0])}
    other = {"a": jnp.full(300, -1.0, jnp.bfloat16), "b": jnp.asarray([5.0, 7.0])}
    assert float(_tree.inner(one, other)) == 31 - 300  # bfloat16 would stop at 256
    assert _tree.inner(one, other).dtype == jnp.float32


def test_batches_share_one_leading_axis():
    assert _checks.num_examples({"x": jnp.zeros((4, 2)), "y": jnp.zeros(4)}) == 4
    with pytest.raises(ValueError, match=r"one leading axis of examples.*\(4,\), .*\(5,\)"):
        _checks.num_examples((jnp.zeros(4), jnp.zeros(5)))
    with pytest.raises(ValueError, match="at least one example, got 0"):
        _checks.num_examples((jnp.zeros((0, 3)),))
    with pytest.raises(ValueError, match="at least one array"):
        _checks.num_examples(())


def test_numbers():
    assert _checks.integer("n", np.int64(3)) == 3
    with pytest.raises(TypeError, match="`n` must be a Python integer, got True"):
        _checks.integer("n", True)
    with pytest.raises(ValueError, match="`x` must be non-negative, got nan"):
        _checks.non_negative("x", float("nan"))
    with pytest.raises(ValueError, match=r"`x` must be positive, got 0\.0"):
        _checks.positive("x", 0.0)
