"""Operators of arrays alone, without a function behind them, and the identity."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from regjax._base import Tree
from regjax._space import Space
from regjax.curvature._operators._operator import Operator


@dataclasses.dataclass(frozen=True, repr=False)
class OnTrees(Operator):
    """An operator of arrays alone: `trees` is its space, and a product rounds as its vectors do."""

    trees: Space

    @property
    def space(self) -> Space:
        return self.trees

    @property
    def eps(self) -> float:
        return float(jnp.finfo(self.dtype).eps)


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["trees"])
@dataclasses.dataclass(frozen=True, repr=False)
class Identity(OnTrees):
    """v -> v, on the trees of a space."""

    def product(self, vector: jax.Array) -> jax.Array:
        return vector

    def block_product(self, rows: jax.Array) -> jax.Array:
        return rows

    def facts(self) -> dict[str, Tree]:
        return {}

    def product_bytes(self, count: int) -> int:
        return 0

    def submatrix(self, inside: tuple[bool, ...]) -> Operator:
        return Identity(self.space.subspace(inside))


def identity(space: Space) -> Operator:
    """Makes the operator that changes nothing, for dampings.

    Example:
      >>> A = curvature.from_matvec(lambda v: jnp.array([3.0, 1.0]) * v, jnp.zeros(2))
      >>> print((A + 0.5 * curvature.identity(A.space)) @ jnp.ones(2))
      [3.5 1.5]

    Args:
      space: `A.space` of an operator, or `Space.of(params)`.

    Returns:
      An `Operator` of shape (n, n).
    """
    return Identity(space)
