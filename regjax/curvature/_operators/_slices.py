"""The block of one layer of a stack: the principal submatrix of a slice of the parameters."""

import dataclasses
import functools

import jax
from jax.sharding import PartitionSpec

from regjax import _slices
from regjax._base import Params, Tree
from regjax._slices import Where
from regjax.curvature._operators._operator import Operator, Projected


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["operator"], meta_fields=["places"]
)
@dataclasses.dataclass(frozen=True, repr=False)
class Sliced(Projected):
    """P A P' of an operator, P looks up slices of its leaves.

    Attributes:
      operator: of the whole arrays, and of no others.
      places: what is looked up in each of its leaves.
    """

    operator: Operator
    places: tuple[Where, ...]

    def taken(self, tree: Params, *, leading: int = 0) -> Params:
        leaves, treedef = jax.tree.flatten(tree)
        take = functools.partial(_slices.take, leading=leading)
        return jax.tree.unflatten(treedef, map(take, leaves, self.places))

    def taken_specs(self, specs: tuple[PartitionSpec, ...]) -> tuple[PartitionSpec, ...]:
        # What is looked up along an axis that is divided is on each of its devices.
        return tuple(map(_without, specs, self.places))

    def placed(self, tree: Params, zeros: Params) -> Params:
        leaves, treedef = jax.tree.flatten(zeros)
        put = functools.partial(_slices.put, leading=1)
        return jax.tree.unflatten(treedef, map(put, leaves, self.places, jax.tree.leaves(tree)))

    def facts(self) -> dict[str, Tree]:
        return super().facts() | {"places": repr(self.places)}

    def submatrix(self, inside: tuple[bool, ...]) -> Operator:
        pairs = zip(self.places, inside, strict=True)
        return Sliced(
            self.operator.submatrix(inside), tuple(where for where, here in pairs if here)
        )


def _without(spec: PartitionSpec, where: Where) -> PartitionSpec:
    looked_up = {axis for axis, _ in where}
    return PartitionSpec(*(names for axis, names in enumerate(spec) if axis not in looked_up))
