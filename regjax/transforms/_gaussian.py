"""Gaussian noise for the leaves of a tree."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from regjax import _sharding, _tree
from regjax._base import PRNGKey


def normal_like(key: PRNGKey, leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """Draws standard normal arrays of the shapes of `leaves`, in float32 at least."""
    return list(map(normal, jax.random.split(key, len(leaves)), leaves))


def normal(key: PRNGKey, leaf: jax.Array) -> jax.Array:
    """Draws a standard normal array of the shape of a leaf, in float32 at least.

    A leaf by itself, so that on a mesh each device draws what it has of the parameters; the numbers
    are the same on any mesh.
    """
    shape, dtype = jnp.shape(leaf), _tree.wide_dtype(leaf)
    noise = jax.random.normal(key, shape, dtype, out_sharding=_sharding.explicit(leaf))
    # Or each use of the noise would compute it again.
    return lax.optimization_barrier(noise)
