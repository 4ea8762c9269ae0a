"""Random numbers by their places: what `jax.random` draws there in an array of any size.

JAX's own generator, threefry, makes the number at a place from the key and the place alone, if it
may (`jax_threefry_partitionable`, which is the default). So whoever has a part of a vector draws
that part, and it is the same one wherever it is drawn.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import threefry2x32_p, threefry_2x32

from regjax._base import PRNGKey

_PARTITIONABLE = "jax_threefry_partitionable"


def goes_by_place(key: PRNGKey) -> bool:
    """Whether the numbers of a key are made so."""
    return partitionable() and "threefry" in str(jax.random.key_impl(key))


def partitionable() -> bool:
    """Whether the numbers of JAX's own keys are made so."""
    return bool(getattr(jax.config, _PARTITIONABLE))


def normal(key_data: jax.Array, places: jax.Array, dtype: Any) -> jax.Array:
    """`jax.random.normal` at places.

    Args:
      key_data: (2,), of a threefry key.
      places: uint64, any shape, of the numbers in the flat array.
      dtype: float32 or float64.
    """
    kind = jnp.uint32 if dtype == jnp.float32 else jnp.uint64
    high, low = _words(key_data, places)
    if kind == jnp.uint32:
        bits = high ^ low
    else:
        bits = (high.astype(kind) << jnp.asarray(32, kind)) | low.astype(kind)
    return _normal(bits, dtype)


def signs(key_data: jax.Array, places: jax.Array, dtype: Any) -> jax.Array:
    """`jax.random.rademacher` at places; the arguments are those of `normal`."""
    high, low = _words(key_data, places)
    # Whether a uniform number of JAX's default type is below a half: the first bit.
    bits = high ^ low if jnp.result_type(float) == jnp.float32 else high
    one = jnp.ones((), dtype)
    return jnp.where(bits >> jnp.uint32(31) == 0, one, -one)


def uniform_and_normal(
    key: PRNGKey, shape: tuple[int, ...], dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Independent arrays, uniform on [-1, 1) and standard normal, for the price of one.

    Threefry makes two words for each place; `jax.random` hands out one word made of both. Here each
    array has its own. Other generators and types make two draws.
    """
    if dtype != jnp.float32 or not goes_by_place(key):
        one, other = jax.random.split(key)
        return jax.random.uniform(one, shape, dtype, -1), jax.random.normal(other, shape, dtype)
    # A place is counted along the leading axis, and in the rest.
    row = lax.broadcasted_iota(jnp.uint32, shape, 0)
    rest = lax.iota(jnp.uint32, math.prod(shape[1:])).reshape(shape[1:])
    rest = lax.broadcast(rest, shape[:1])
    words = threefry2x32_p.bind(*jax.random.key_data(key), row, rest)
    return 2 * _unit(words[0], dtype) - 1, _normal(words[1], dtype)


def _unit(bits: jax.Array, dtype: Any) -> jax.Array:
    """Numbers on [0, 1) from words of the size of `dtype`."""
    mantissa, kind = jnp.finfo(dtype).nmant, bits.dtype
    one = jnp.asarray(np.ones((), dtype).view(kind), kind)
    unused = jnp.asarray(jnp.iinfo(kind).bits - mantissa, kind)
    return lax.bitcast_convert_type((bits >> unused) | one, dtype) - jnp.ones((), dtype)


def _normal(bits: jax.Array, dtype: Any) -> jax.Array:
    """Standard normal numbers from words of the size of `dtype`."""
    # Uniform on (-1, 1), its ends left out.
    lowest = np.nextafter(np.array(-1, dtype), np.array(0, dtype))
    uniform = jnp.maximum(_unit(bits, dtype) * (np.array(1, dtype) - lowest) + lowest, lowest)
    return np.sqrt(np.array(2, dtype)) * lax.erf_inv(uniform)


def _words(key_data: jax.Array, places: jax.Array) -> tuple[jax.Array, jax.Array]:
    with jax.enable_x64(True):
        high = (places >> jnp.uint64(32)).astype(jnp.uint32)
        low = places.astype(jnp.uint32)
    words = jnp.stack([high.reshape(-1), low.reshape(-1)])
    high, low = threefry_2x32((key_data[0], key_data[1]), words)
    return high.reshape(places.shape), low.reshape(places.shape)
