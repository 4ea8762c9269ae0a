"""One step of Langevin dynamics in a quadratic well around an anchor."""

from typing import Any

import jax
import jax.numpy as jnp

from regjax import _tree
from regjax.transforms import _gaussian, _schedules


def langevin_step(
    position: Any,
    grads: Any,
    *,
    key: jax.Array,
    anchor: Any,
    gamma: Any,
    learning_rate: Any,
    noise_scale: Any,
) -> Any:
    """X' - learning_rate (g - gamma (x - x')) + sqrt(learning_rate) noise_scale N(0, I).

    Args:
      position: tree, the point x'.
      grads: tree like it, the gradient g at x' (or what momentum made of it).
      key: typed key of this step's noise.
      anchor: tree like it, the centre x of the well.
      gamma: stiffness of the well, in units of the loss over the parameter squared.
      learning_rate: inner learning rate.
      noise_scale: standard deviation of the noise per square root of the learning rate, in units of
        the parameters. sqrt(2) is temperature 1. A Python zero draws nothing.

    Returns:
      The next position, of the same dtypes.

    References:
      P. Chaudhari et al. (2017), arXiv:1611.01838, the inner loop.
    """
    leaves, treedef = jax.tree.flatten(position)
    moved, is_quiet = [], _schedules.is_zero(noise_scale)
    drawn = [None] * len(leaves) if is_quiet else _gaussian.normal_like(key, leaves)
    for leaf, grad, centre, noise in zip(
        leaves, jax.tree.leaves(grads), jax.tree.leaves(anchor), drawn, strict=True
    ):
        x, g = _tree.wide(leaf), _tree.wide(grad)
        pull = jnp.asarray(gamma, x.dtype) * (_tree.wide(centre) - x)
        step = jnp.asarray(learning_rate, x.dtype)
        x = x - step * (g - pull)
        if noise is not None:
            x = x + jnp.sqrt(step) * jnp.asarray(noise_scale, x.dtype) * noise
        moved.append(x.astype(jnp.result_type(leaf)))
    return jax.tree.unflatten(treedef, moved)
