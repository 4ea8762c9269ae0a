"""One number for each array of the parameters, or for each layer of those that stack some."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from regjax._axes import Axes
from regjax._base import Params, Tree


@dataclasses.dataclass(frozen=True)
class Scales:
    """Which numbers of a vector belong to which array.

    Attributes:
      axes: of the arrays.
    """

    axes: tuple[Axes, ...]

    def sizes(self, params: Params) -> list[int]:
        """Counts the numbers of each array."""
        pairs = zip(self.axes, jax.tree.leaves(params), strict=True)
        return [math.prod(axes.stack_shape(leaf.shape)) for axes, leaf in pairs]

    def split(self, scales: jax.Array, params: Params) -> list[jax.Array]:
        """Takes the scales apart, () or (layers,) for each array."""
        ends = np.cumsum(self.sizes(params))[:-1]
        rows = zip(jnp.split(scales, ends), self.axes, jax.tree.leaves(params), strict=True)
        return [part.reshape(axes.stack_shape(leaf.shape)) for part, axes, leaf in rows]

    def scaled(self, scales: jax.Array, params: Params) -> Params:
        """Multiplies each layer of each array by its number."""
        leaves, treedef = jax.tree.flatten(params)
        rows = zip(self.split(scales, params), leaves, self.axes, strict=True)
        scaled = [axes.over_layers(scale.astype(p.dtype)) * p for scale, p, axes in rows]
        return jax.tree.unflatten(treedef, scaled)

    def reduced(self, reduce: Callable[..., jax.Array], tree: Tree) -> jax.Array:
        """Reduces each layer of each array to one number."""
        pairs = zip(jax.tree.leaves(tree), self.axes, strict=True)
        return jnp.concatenate(
            [jnp.ravel(axes.stack_first(reduce(x, axes.layer, keepdims=True))) for x, axes in pairs]
        )
