"""Linear maps that keep every array once, against those of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from regjax import curvature
from regjax.curvature._operators._kept import slim
from tests import oracles

MATRIX = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
CONSTANTS = [np.full(4, 2.0, np.float32), np.arange(4, dtype=np.float32)]


def linear_of(function):
    return lambda x: jax.linearize(function, x)[1]


def relu_twice(x):
    """Reads the same mask in both terms, and the zeros of its derivative."""
    return jax.nn.relu(x) + jnp.sin(x) * jnp.where(x > 0, x, 0)


def in_a_loop(x):
    turn = lambda carry, i: (jnp.sin(carry) * i, jnp.cos(carry))
    carry, others = jax.lax.scan(turn, x, jnp.arange(1.0, 4.0))
    return carry + others.sum(0)


def noisy(x):
    one, other = (jax.random.normal(jax.random.key(seed), x.shape) for seed in (0, 1))
    return jnp.sin(x * one) + jnp.sin(x * other)


def angle(zero, x):
    return jnp.arctan2(jnp.full_like(x, zero), -(x**2))


FUNCTIONS = {
    "relu": relu_twice,
    "other axes": lambda x: jnp.cumsum(x**2, 0) * jnp.cumsum(x**2, 1),
    "other numbers": lambda x: jnp.sin(2.0 * x) * jnp.sin(3.0 * x),
    "zeros with a sign": lambda x: x * angle(0.0, x) - 2 * (x * angle(-0.0, x)),
    "other arrays": lambda x: jnp.sin(x * CONSTANTS[0][None]) + jnp.sin(x * CONSTANTS[1][None]),
    "other types": lambda x: (
        x * (x.astype(jnp.float16).astype(x.dtype) + x.astype(int).astype(x.dtype))
    ),
    "a loop": in_a_loop,
    "a branch": lambda x: jax.lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x) * jnp.cos(x),
    "other keys": noisy,
    "a rule": lambda x: jax.nn.silu(x) * jax.nn.relu6(x),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("is_compiled", [False, True])
def test_the_map_is_that_of_jax(function, is_compiled):
    x = jnp.asarray(MATRIX)
    make = lambda x: slim(linear_of(function), x)
    linear = (jax.jit(make) if is_compiled else make)(x)
    assert isinstance(linear, Partial)
    vector = jnp.asarray(np.random.default_rng(1).normal(size=(4, 4)), jnp.float32)
    expected = jax.jvp(function, (x,), (vector,))[1]
    np.testing.assert_allclose(jax.jit(lambda f, v: f(v))(linear, vector), expected, rtol=1e-5)


def test_a_perceptron_keeps_each_feature_once():
    num_examples, width = 500, 24
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape) / shape[0] ** 0.5, jnp.float32)
    params = {"in": normal(8, width), "inside": normal(width, width), "out": normal(width, 1)}
    batch = normal(num_examples, 8), normal(num_examples, 1)

    def loss_fn(params, x, y):
        for name in ("in", "inside"):
            x = jax.nn.relu(x @ params[name])
        return jnp.mean((x @ params["out"] - y) ** 2)

    operator = curvature.hessian(loss_fn, params, *batch)
    leaves = jax.tree.leaves(operator.linear_map)
    # Of both layers values and mask, of the second what it sends back. `jax.linearize` keeps two
    # masks of each, and zeros as large as the layer beside every one.
    numbers = 4 * num_examples * width
    features = [leaf for leaf in leaves if leaf.shape == (num_examples, width)]
    assert len({np.asarray(leaf).tobytes() for leaf in features}) == len(features)
    assert all(np.unique(np.asarray(leaf)).size > 1 for leaf in features)
    assert sum(leaf.nbytes for leaf in features) <= 3.5 * numbers
    dense = oracles.dense_hessian(loss_fn, params, *batch)
    vector = np.random.default_rng(1).normal(size=len(dense)).astype(np.float32)
    np.testing.assert_allclose(operator.product(jnp.asarray(vector)), dense @ vector, atol=1e-5)
