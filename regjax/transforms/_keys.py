"""Keys in the states of transformations, as words that every serialisation keeps.

A typed key is an array of a type of its own, which flax's `to_bytes`, `np.savez` and Equinox's
serialisation do not know. So a state holds the words behind it, unsigned integers, and the
generator that they belong to is that of the key that the transformation was made with.
"""

import jax
import jax.numpy as jnp

from regjax._base import PRNGKey

# By the number of words; two generators of JAX have four.
_GENERATORS = {2: "threefry2x32", 4: "rbg"}


def words(key: PRNGKey) -> jax.Array:
    """Copies the words of a typed key: states are donated, the caller's key is not."""
    return jnp.array(jax.random.key_data(key))


def typed(key_data: jax.Array, like: PRNGKey | None = None) -> PRNGKey:
    """Makes a typed key of its words.

    Args:
      key_data: what `words` gave, (words,).
      like: a key of the same generator; None: the default generator if its keys are as long, else
        the one with so many words.

    Raises:
      ValueError: no generator of JAX has keys of this length.
    """
    if like is not None:
        return jax.random.wrap_key_data(key_data, impl=jax.random.key_impl(like))
    length = key_data.shape[-1]
    # Not by `jax.eval_shape`, which remembers what an earlier default gave.
    if jax.random.key_data(jax.random.key(0)).shape[-1] == length:
        return jax.random.wrap_key_data(key_data)
    if length not in _GENERATORS:
        raise ValueError(
            f"`state.key_data` must have {' or '.join(map(str, _GENERATORS))} words, got {length}."
        )
    return jax.random.wrap_key_data(key_data, impl=_GENERATORS[length])
