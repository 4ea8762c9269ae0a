"""What the tests compute without a compiler is what a program gives, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import eager

SPECIAL = np.float32([1.5, -0.1, -0.0, 0.0, 1e36, np.inf, -np.inf, np.nan, 7.0, 1 / 3])
SMALL = np.float32([3e-39, -3e-39, 1e-30, 1e-9, 0.0])  # XLA takes subnormal numbers for zero
DRAWN = np.random.default_rng(0).standard_cauchy((2, 500)).astype(np.float32)


def pairs(values):
    return np.stack([np.repeat(values, len(values)), np.tile(values, len(values))])


OPERATIONS = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "multiply": lambda x, y: x * y,
    "divide": lambda x, y: x / y,
    "halved": lambda x, y: 0.1 * x,
    "square": lambda x, y: x**2,
    "root": lambda x, y: jnp.sqrt(x),
    "absolute": lambda x, y: jnp.abs(x),
    "negative": lambda x, y: -x,
    "less": lambda x, y: x < y,
    "equal": lambda x, y: x == y,
    "finite": lambda x, y: jnp.isfinite(x),
    "nan": lambda x, y: jnp.isnan(x),
    "all": lambda x, y: jnp.all(x > 0, axis=0),
    "any": lambda x, y: jnp.any(x > 0, axis=0),
    "where": lambda x, y: jnp.where(x > y, x, y),
    "row": lambda x, y: x[0],
    "last": lambda x, y: x[..., -1],
    "reversed": lambda x, y: x[..., ::-1],
    "transposed": lambda x, y: x.T,
    "raveled": lambda x, y: x.ravel(),
    "stacked": lambda x, y: jnp.stack([x, y], axis=1),
    "joined": lambda x, y: jnp.concatenate([x, y], axis=-1),
    "rows": lambda x, y: jnp.stack(list(x)),
    "rounded": lambda x, y: (2**30 + 7 * jnp.arange(99)).astype(jnp.float32),
    "taken": lambda x, y: jax.lax.dynamic_slice(x, (1, 99), (2, 3)),
    "identity": lambda x, y: jnp.eye(3, 4, k=1),
    "counted": lambda x, y: jnp.arange(7) * 3 - 1,
    "wrapped": lambda x, y: jnp.int32(2**31 - 1) + jnp.arange(3),
    "filled": lambda x, y: jnp.full((2, 3), 0.5),
    "mask": lambda x, y: ~(x > y) | (x < 0) & (y < 0),
    "as numbers": lambda x, y: (x > y).astype(jnp.float32),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_numpy_and_xla_agree_in_all_bits(name, monkeypatch):
    for rows in (pairs(SPECIAL), DRAWN, pairs(SMALL)):
        x, y = jnp.asarray(rows), jnp.asarray(rows[::-1])
        with monkeypatch.context() as patched:
            if not np.array_equal(rows, pairs(SMALL)):
                patched.setattr(eager, "_compiling", None)
            ours = OPERATIONS[name](x, y)
        with eager.compiled():
            theirs = OPERATIONS[name](x, y)
        assert (ours.dtype, ours.weak_type) == (theirs.dtype, theirs.weak_type)
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(np.signbit(ours[ours == 0]), np.signbit(theirs[ours == 0]))


def test_what_may_differ_is_compiled(monkeypatch):
    x = jnp.asarray(DRAWN)
    donated = jax.jit(jnp.negative, donate_argnums=0)
    placed = jax.device_put(x, jax.devices()[0])
    monkeypatch.setattr(eager, "_compiling", None)
    for function, argument in [
        (jnp.sum, x),
        (jnp.exp, x),
        (jax.jit(lambda x: x * x + x), x),
        (jax.jit(lambda x: x / 3.0), x),
        (jax.jit(lambda x: x / jax.jit(lambda x: (x * 2, 3.0))(x)[1]), x),
        (jax.jit(lambda x: x + 0.0), x),
        (lambda x: x / jnp.float32(3.0), x),
        (jax.jit(lambda x: x[0] / jnp.broadcast_to(x[0, 0], 500)), x),
        (lambda x: x.astype(jnp.int32), x),
        (lambda x: x.astype(jnp.bfloat16), x),
        (donated, x),
        (jnp.negative, placed),
        (jnp.negative, jnp.float32(3e-39)),
    ]:
        with pytest.raises(TypeError, match="NoneType"):
            function(argument)


def test_keys_are_compiled():
    key = jax.random.key(0)
    passed = jax.jit(lambda key, x: (key, -x))(key, jnp.ones(2))
    assert passed[0] == key
    assert jnp.stack([key, key]).shape == (2,)
