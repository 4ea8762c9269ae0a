"""A small nnx model with everything that a pass changes, its loss, and comparison of trees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Net(nnx.Module):
    """Linear, batch norm, dropout, linear."""

    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(jnp.tanh(self.norm(self.first(x)))))


def nnx_loss(model, x, y):
    out = model(x)
    return jnp.mean((out - y) ** 2), out


def data(num=8):
    random = np.random.default_rng(0)
    x = random.normal(size=(num, 3))
    return jnp.asarray(x, jnp.float32), jnp.asarray(np.sin(x[:, :1]), jnp.float32)


def assert_same(one, other, **tolerance):
    compare = (
        functools.partial(np.testing.assert_allclose, **tolerance)
        if tolerance
        else np.testing.assert_array_equal
    )
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = jnp.asarray(a), jnp.asarray(b)
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        compare(np.asarray(a, np.float64), np.asarray(b, np.float64))
