"""One step of Langevin dynamics in a quadratic well around an anchor."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax import _tree
from regjax._base import Params, PRNGKey
from regjax.transforms import _gaussian, _schedules


def langevin_step(
    position: Params,
    grads: Params,
    *,
    key: PRNGKey,
    anchor: Params,
    gamma: ArrayLike,
    learning_rate: ArrayLike,
    noise_scale: ArrayLike,
) -> Params:
    """Moves a point down the gradient, towards an anchor, and by noise.

        x' - learning_rate (g - gamma (x - x')) + sqrt(learning_rate) noise_scale N(0, I)

    Args:
      position: tree, the point x'.
      grads: tree like it, the gradient g at x' (or what momentum made of it).
      key: typed key of this step's noise.
      anchor: tree like it, the centre x of the well.
      gamma: stiffness of the well, in units of the loss over the parameter squared.
      learning_rate: of this step.
      noise_scale: standard deviation of the noise per square root of the learning rate, in units of
        the parameters. sqrt(2) is temperature 1. A Python zero draws nothing.

    Returns:
      The next position, of the same dtypes.

    References:
      P. Chaudhari et al. (2017), arXiv:1611.01838, the inner loop.
    """
    leaves, treedef = jax.tree.flatten(position)
    is_quiet = _schedules.is_zero(noise_scale)
    drawn = [None] * len(leaves) if is_quiet else _gaussian.normal_like(key, leaves)

    def move(
        leaf: jax.Array, grad: jax.Array, centre: jax.Array, noise: jax.Array | None
    ) -> jax.Array:
        x, g = _tree.wide(leaf), _tree.wide(grad)
        pull = jnp.asarray(gamma, x.dtype) * (_tree.wide(centre) - x)
        rate = jnp.asarray(learning_rate, x.dtype)
        x = x - rate * (g - pull)
        if noise is not None:
            x = x + jnp.sqrt(rate) * jnp.asarray(noise_scale, x.dtype) * noise
        return x.astype(jnp.result_type(leaf))

    moved = map(move, leaves, jax.tree.leaves(grads), jax.tree.leaves(anchor), drawn)
    return jax.tree.unflatten(treedef, moved)
