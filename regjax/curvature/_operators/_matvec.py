"""A matrix of which the product is given."""

import dataclasses
import functools

import jax
from jax.sharding import Mesh

from regjax import _checks, _jaxprs, _programs
from regjax._base import MatVec, Params, Tree
from regjax._programs import Program
from regjax._sharding import find
from regjax._space import Space
from regjax.curvature._operators._operator import Operator, Submatrix
from regjax.curvature._operators._traced import TracedOperator
from regjax.curvature._precision import precision


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["linear_map", "example"], meta_fields=["mesh"]
)
@dataclasses.dataclass(frozen=True)
class MatvecOperator(TracedOperator):
    """A matrix of which the product is given.

    Attributes:
      linear_map: v -> A v on trees.
      example: a tree like a vector, of which only structure, shapes and dtypes count.
      mesh: the devices over which vectors are divided; None: one.
    """

    linear_map: Program
    example: Params
    mesh: Mesh | None

    @property
    def space(self) -> Space:
        return Space.of(self.example, self.mesh)

    def apply(self, tree: Params) -> Params:
        return self.linear_map(tree)

    def facts(self) -> dict[str, Tree]:
        traced = jax.make_jaxpr(MatvecOperator.apply)(
            *_programs.structs((self, self.space.like()))
        )
        text = _jaxprs.describe(traced, lasting=True).text[:16]
        return {"linear_map": self.linear_map, "program": text}

    def submatrix(self, inside: tuple[bool, ...]) -> Operator:
        return Submatrix(self, inside)


def from_matvec(matvec: MatVec, like: Params) -> Operator:
    """Makes an operator from any symmetric product.

    Args:
      matvec: v -> A v on trees (or arrays) like `like`; traceable by JAX. It is traced now; the
        arrays that it closes over are data of the operator.
      like: an example of a vector: a tree or an array of real floating point.

    Returns:
      An `Operator` of shape (n, n).

    Raises:
      TypeError: a leaf of `like` is not real floating point.
    """
    _checks.floating_tree("like", like)
    with precision():
        linear_map = _programs.share(_programs.trace(matvec, (like,)))
    placement = find((), like, linear_map)
    if placement is None:
        return MatvecOperator(linear_map, like, None)
    linear_map, like = placement.replicate((linear_map, like))
    return MatvecOperator(linear_map, like, placement.mesh)
