"""The block of one layer of a stack: the principal submatrix of a slice of the parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from regjax import _slices
from regjax._base import Params, Tree
from regjax._slices import Where
from regjax._space import Space
from regjax.curvature._operators._operator import Multiply, Operator, _Composed


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["operator"], meta_fields=["places"]
)
@dataclasses.dataclass(frozen=True)
class Sliced(_Composed):
    """P A P' of an operator, P looks up slices of its leaves.

    Attributes:
      operator: of the whole arrays, and of no others.
      places: what is looked up in each of its leaves.
    """

    operator: Operator
    places: tuple[Where, ...]

    @property
    def parts(self) -> tuple[Operator, ...]:
        return (self.operator,)

    @property
    def space(self) -> Space:
        whole = self.operator.space
        return Space.of(jax.eval_shape(self._taken, whole.like()), whole.mesh)

    def compose(self, multiply: Multiply, vectors: jax.Array) -> jax.Array:
        if vectors.ndim == 1:
            one = lambda part, rows: multiply(part, rows[0])[None]
            return self.compose(one, vectors[None])[0]
        ours, whole = self.space, self.operator.space
        zeros = [
            jnp.zeros((len(vectors), *leaf.shape), leaf.dtype)
            for leaf in jax.tree.leaves(whole.like())
        ]
        slices = jax.tree.leaves(ours.unravel_rows(vectors))
        put = functools.partial(_slices.put, leading=1)
        trees = jax.tree.unflatten(whole.treedef, map(put, zeros, self.places, slices))
        images = whole.unravel_rows(multiply(self.operator, whole.ravel_rows(trees)))
        return ours.ravel_rows(self._taken(images, leading=1))

    def facts(self) -> dict[str, Tree]:
        return super().facts() | {"places": repr(self.places)}

    def submatrix(self, inside: tuple[bool, ...]) -> Operator:
        pairs = zip(self.places, inside, strict=True)
        return Sliced(
            self.operator.submatrix(inside), tuple(where for where, here in pairs if here)
        )

    def _taken(self, tree: Params, *, leading: int = 0) -> Params:
        leaves, treedef = jax.tree.flatten(tree)
        take = functools.partial(_slices.take, leading=leading)
        return jax.tree.unflatten(treedef, map(take, leaves, self.places))
