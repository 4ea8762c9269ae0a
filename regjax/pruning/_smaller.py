"""A model without some of its channels: its own code, run on smaller arrays."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import PyTreeDef

from regjax import _checks
from regjax._adapters import Model
from regjax._base import Params, PRNGKey, State, Tree
from regjax._runners import ApplyFn
from regjax.pruning._channels import CONSTANT, DATA, LeafAxis
from regjax.pruning._evaluation import Removal, evaluate, given, leaf
from regjax.pruning._fitting import Sized
from regjax.pruning._structure import Slice

Parts: TypeAlias = Sequence[tuple[Slice, np.ndarray]]
"""Where the units of a group lie, and the mask of the group, (num_units,)."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """A tree of a whole model, and what is left of it; static.

    Attributes:
      structure: of the tree.
      shapes: of its leaves, whole.
      kept: which positions are left along axes of leaves, where not all are.
    """

    structure: PyTreeDef
    shapes: tuple[tuple[int, ...], ...]
    kept: tuple[tuple[LeafAxis, tuple[bool, ...]], ...] = ()

    @classmethod
    def of(cls, tree: Tree) -> "Cut":
        """Leaves all of a tree."""
        leaves, structure = jax.tree.flatten(tree)
        return cls(structure, tuple(tuple(np.shape(x)) for x in leaves))

    def without(self, parts: Parts) -> "Cut":
        """Removes the units whose mask is False, of what is left."""
        found = {place: np.array(stays) for place, stays in self.kept}
        gone: dict[LeafAxis, np.ndarray] = {}
        for part, mask in parts:
            place = part.leaf, part.axis
            # Several groups may lie along one axis, behind a concatenation.
            gone[place] = gone.get(place, False) | ((part.units >= 0) & ~mask[part.units])
        for place, removed in gone.items():
            stays = found.setdefault(place, np.ones(len(removed), bool))
            stays[np.flatnonzero(stays)[removed]] = False
        kept = {place: tuple(stays.tolist()) for place, stays in found.items()}
        return dataclasses.replace(self, kept=tuple(sorted(kept.items())))

    def values(self, name: str, tree: Tree) -> tuple[Tree, list[Sized]]:
        """Returns the whole tree as `jax.ShapeDtypeStruct`s, and the smaller one's leaves."""
        leaves, structure = jax.tree.flatten(tree)
        if structure != self.structure:
            raise ValueError(
                f"`{name}` must have the tree structure of the model's, {self.structure}, "
                f"got {structure}."
            )
        shapes = [list(shape) for shape in self.shapes]
        for (index, axis), stays in self.kept:
            shapes[index][axis] = sum(stays)
        smaller = [jax.ShapeDtypeStruct(tuple(shape), jnp.float32) for shape in shapes]
        _checks.same_tree(name, tree, jax.tree.unflatten(structure, smaller))
        whole = [
            jax.ShapeDtypeStruct(shape, jnp.result_type(x))
            for shape, x in zip(self.shapes, leaves, strict=True)
        ]
        kept, pairs = dict(self.kept), zip(leaves, self.shapes, strict=True)
        sized = [leaf(i, x, shape, kept) for i, (x, shape) in enumerate(pairs)]
        return jax.tree.unflatten(structure, whole), sized


@dataclasses.dataclass(frozen=True)
class SmallerApply:
    """`apply` of a model of which channels are removed; equal for equal ones.

    Attributes:
      apply: that of the whole model.
      params: its parameters, and what is left of them.
      state: its state, likewise.
    """

    apply: ApplyFn
    params: Cut
    state: Cut

    @classmethod
    def of(cls, model: Model) -> "SmallerApply":
        """Removes nothing from a model, which may have lost units before."""
        if isinstance(model.apply, SmallerApply):
            return model.apply
        return cls(model.apply, Cut.of(model.params), Cut.of(model.state))

    def without(self, of_params: Parts, of_state: Parts) -> "SmallerApply":
        """Removes units."""
        return SmallerApply(
            self.apply, self.params.without(of_params), self.state.without(of_state)
        )

    def __call__(
        self,
        params: Params,
        state: State,
        inputs: Tree,
        *,
        train: bool,
        key: PRNGKey | None = None,
    ) -> tuple[Tree, State]:
        """Computes the outputs and the new state, as the whole model's `apply` does."""
        return _run(self, train, params, state, inputs, key)


# What a whole model's code does is traced for arrays of its sizes; nothing is computed by that.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    smaller: SmallerApply,
    train: bool,
    params: Params,
    state: State,
    inputs: Tree,
    key: PRNGKey | None,
) -> tuple[Tree, State]:
    whole_params, of_params = smaller.params.values("params", params)
    whole_state, of_state = smaller.state.values("state", state)
    traced, outputs = jax.make_jaxpr(
        lambda *trees: smaller.apply(*trees[:3], train=train, key=trees[3]), return_shape=True
    )(whole_params, whole_state, inputs, key)
    rest: list[Any] = [given(x, DATA) for x in jax.tree.leaves((inputs, key))]
    constants = [given(x, CONSTANT) for x in traced.consts]
    found = evaluate(Removal(), traced.jaxpr, constants, [*of_params, *of_state, *rest])
    return jax.tree.unflatten(jax.tree.structure(outputs), [x.array for x in found])
