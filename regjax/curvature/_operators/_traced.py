"""Matrices of which a product is one traced program on trees, compiled once."""

import abc

import jax
import jax.numpy as jnp

from regjax import _checks, _programs
from regjax._base import Params
from regjax._meshes import on_one_mesh
from regjax.curvature._operators._operator import Operator
from regjax.curvature._precision import narrowest_eps, precision


class TracedOperator(Operator):
    """An operator that is applied to a tree by what JAX can trace."""

    @abc.abstractmethod
    def apply(self, tree: Params) -> Params:
        """A v for a tree like the parameters, of all examples at once."""

    def product(self, vector: jax.Array) -> jax.Array:
        return _product(self, vector)

    @on_one_mesh
    def matvec(self, vector: Params) -> Params:
        self._check_vector(vector)
        # On a mesh a tree goes in and out as it is: the sum over the examples is the only message.
        return _like_vectors(self, self.space.put(vector))

    @property
    def eps(self) -> float:
        own = float(jnp.finfo(self.dtype).eps)
        return max(own, narrowest_eps(image, self, self.space.like()))

    def product_bytes(self, count: int) -> int:
        zeros = self.space.shapes_of(jax.eval_shape(lambda: self.space.zeros(count)))
        several = lambda operator, rows: operator.block_product(rows)
        one = lambda operator, rows: operator.product(rows[0])
        return _programs.num_bytes(one if count == 1 else several, self, zeros)


def image(operator: TracedOperator, tree: Params) -> Params:
    """A v of a tree, in full precision, checked."""
    example = operator.space.like()
    tree = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), tree, example)
    with precision():
        found = operator.apply(tree)
    _checks.same_tree("matvec(vector)", found, example)
    return found


@_programs.bounded
@jax.jit
def _product(operator: TracedOperator, vector: jax.Array) -> jax.Array:
    return operator.space.ravel(image(operator, operator.space.unravel(vector)), vector.dtype)


@_programs.bounded
@jax.jit
def _like_vectors(operator: TracedOperator, tree: Params) -> Params:
    example = operator.space.like()
    found = image(operator, tree)
    typed = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), found, example)
    return operator.space.place(typed)
