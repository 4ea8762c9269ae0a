"""The vector space of trees like an example: how a tree is a vector, and where vectors lie.

A vector is a flat array, rows are several vectors (k, length). On one device it is the leaves in
the order of `jax.tree.leaves`; on a mesh the columns of a device are its own shards of the leaves,
and zeros that make them as many on each (`_shares.py`). Nothing but this file knows how a vector is
laid out: whoever has one adds, scales and selects it as an array, and asks its space for all else.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from regjax import _checks, _draws, _meshes, _sharding, _tree
from regjax._base import Params, PRNGKey, Tree
from regjax._one_program import one_program
from regjax._shares import Shares, drawn, leaves, vectors


@dataclasses.dataclass(frozen=True)
class Space:
    """The vector space of trees like an example: how a tree is a flat vector; static and hashable.

    Example:
      >>> space = curvature.Space.of({"a": jnp.ones(2), "b": jnp.ones((2, 2))})
      >>> vector = space.ravel({"a": jnp.ones(2), "b": jnp.zeros((2, 2))})
      >>> print(space.size, vector)
      6 [1. 1. 0. 0. 0. 0.]
      >>> print(space.unravel(vector)["a"])
      [1. 1.]

    Attributes:
      treedef: structure of a tree.
      shapes: of its leaves.
      dtypes: of its leaves.
      mesh: the devices over which vectors are divided; None: vectors are whole.
      specs: how the leaves are divided over the mesh.
    """

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[jnp.dtype, ...]
    mesh: Mesh | None = None
    specs: tuple[PartitionSpec, ...] = ()

    @classmethod
    def of(
        cls, tree: Params, mesh: Mesh | None = None, specs: tuple[PartitionSpec, ...] | None = None
    ) -> "Space":
        """The space of trees like `tree`, of arrays or of anything with a shape and a dtype.

        On a mesh trees are divided as `specs` say; None: as the arrays are that lie there, and the
        shapes that say so.
        """
        arrays, treedef = jax.tree.flatten(tree)
        shapes = tuple(tuple(jnp.shape(leaf)) for leaf in arrays)
        dtypes = tuple(jnp.result_type(leaf) for leaf in arrays)
        if mesh is None:
            return cls(treedef, shapes, dtypes)
        specs = _sharding.specs_on(tree, mesh) if specs is None else specs
        return cls(treedef, shapes, dtypes, mesh, specs)

    @classmethod
    def at(cls, tree: Params, placement: _sharding.Placement | None) -> "Space":
        """The space of trees like `tree` where parameters lie so; None: on one device."""
        return cls.of(tree) if placement is None else cls.of(tree, placement.mesh, placement.specs)

    @functools.cached_property
    def size(self) -> int:
        """The dimension: the number of scalars in a tree."""
        return sum(map(math.prod, self.shapes))

    @functools.cached_property
    def dtype(self) -> jnp.dtype:
        """Type of a vector: the widest of the leaves, float32 at least."""
        return _tree.widest(self.dtypes)

    @functools.cached_property
    def length(self) -> int:
        """Length of the array of a vector: the size, and what fills the devices' shares."""
        return self.size if self.mesh is None else self._shares.num_columns * self.mesh.size

    def whole(self) -> "Space":
        """The same trees on one device."""
        return self if self.mesh is None else dataclasses.replace(self, mesh=None, specs=())

    def subspace(self, inside: Sequence[bool]) -> "Space":
        """Of trees with None for the leaves that are not inside."""
        part = _tree.partition(self.like(), inside)[0]
        # On one device there are no specs.
        return Space.of(part, self.mesh, tuple(itertools.compress(self.specs, inside)))

    def like(self, leading: tuple[int, ...] = ()) -> Params:
        """A tree of shapes and dtypes, for checks."""
        structs = [
            jax.ShapeDtypeStruct(leading + shape, dtype)
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]
        return jax.tree.unflatten(self.treedef, structs)

    def ravel(self, tree: Params, dtype: Any = None) -> jax.Array:
        """The vector of `tree`, of this space's dtype unless another one is named.

        Raises:
          TypeError: a leaf is complex.
        """
        _checks.real_tree("tree", tree)
        dtype = self.dtype if dtype is None else dtype
        if self.mesh is not None:
            return vectors(self._shares, jax.tree.leaves(self.put(tree)), dtype)
        return self._raveled(jax.tree.leaves(tree), dtype)

    @one_program(static=("self", "dtype"))
    def _raveled(self, leaves: list[jax.Array], dtype: Any) -> jax.Array:
        vector, start = jnp.zeros(self.size, dtype), 0
        # Updates in place: XLA on CPU takes four times as long for a concatenation.
        for leaf in leaves:
            piece = _sharding.like(jnp.ravel(leaf).astype(dtype), vector)
            vector = jax.lax.dynamic_update_slice(vector, piece, (start,))
            start += piece.size
        return vector

    def unravel(self, vector: jax.Array) -> Params:
        """The tree of a vector: the inverse of `ravel`, with the dtypes of the example."""
        if self.mesh is None:
            return self._unraveled(vector)
        return self._typed(leaves(self._shares, vector))

    @one_program(static="self")
    def _unraveled(self, vector: jax.Array) -> Params:
        return self._typed(self._cut(vector))

    def _typed(self, pieces: list[jax.Array]) -> Params:
        typed = [leaf.astype(dtype) for leaf, dtype in zip(pieces, self.dtypes, strict=True)]
        return jax.tree.unflatten(self.treedef, typed)

    def wide(self) -> "Space":
        """The same trees with all leaves as wide as vectors are."""
        return dataclasses.replace(self, dtypes=(self.dtype,) * len(self.dtypes))

    def ravel_rows(self, trees: Params) -> jax.Array:
        """Rows (k, length) of a tree whose leaves have a leading axis k."""
        if self.mesh is None:
            return jax.vmap(self.ravel)(trees)
        _checks.real_tree("trees", trees)
        return vectors(self._shares, jax.tree.leaves(self.put(trees, 1)), self.dtype)

    def unravel_rows(self, rows: jax.Array) -> Params:
        """The inverse of `ravel_rows`."""
        return jax.vmap(self.unravel)(rows) if self.mesh is None else self.unravel(rows)

    def zeros(self, num_rows: int) -> jax.Array:
        """Rows (num_rows, length) of zeros."""
        if self.mesh is None:
            return jnp.zeros((num_rows, self.size), self.dtype)
        return _zeros(self, num_rows)

    def normal(self, key: PRNGKey, num_rows: int | None = None) -> jax.Array:
        """A vector, or rows, of standard normal numbers, the same ones on any mesh."""
        return self._drawn(_normal, _draws.normal, key, num_rows)

    def signs(self, key: PRNGKey, num_rows: int) -> jax.Array:
        """Rows of random signs, the same ones on any mesh."""
        return self._drawn(jax.random.rademacher, _draws.signs, key, num_rows)

    def inner(self, one: jax.Array, other: jax.Array) -> jax.Array:
        """The inner product of two vectors."""
        return jnp.vdot(one, other)

    def norm(self, vector: jax.Array) -> jax.Array:
        """The Euclidean norm of a vector."""
        return jnp.linalg.norm(vector)

    def shard(self, rows: jax.Array) -> jax.Array:
        """From whole vectors (..., size), their leaves in order, to vectors as they lie."""
        return rows if self.mesh is None else _sharded(self, self.replicate(rows))

    def gather(self, rows: jax.Array) -> jax.Array:
        """From vectors as they lie to whole ones (..., size), on each device."""
        return rows if self.mesh is None else _gathered(self, rows)

    def put(self, tree: Params, num_leading: int = 0) -> Params:
        """`tree` with what is not on the mesh yet divided as vectors are, after so many axes."""
        mesh = self.mesh
        if mesh is None:
            return tree
        specs = jax.tree.unflatten(self.treedef, self._shares.leaf_specs(num_leading))
        return jax.tree.map(lambda leaf, spec: _sharding.place(leaf, mesh, spec), tree, specs)

    def place(self, tree: Params) -> Params:
        """A tree of this space, which the compiler is to leave divided as vectors are."""
        if self.mesh is None:
            return tree
        shardings = [NamedSharding(self.mesh, spec) for spec in self.specs]
        return jax.lax.with_sharding_constraint(tree, jax.tree.unflatten(self.treedef, shardings))

    def constrain(self, rows: jax.Array) -> jax.Array:
        """The same vectors, which the compiler is to leave as they lie."""
        if self.mesh is None:
            return rows
        sharding = NamedSharding(self.mesh, self._spec(rows.ndim))
        return jax.lax.with_sharding_constraint(rows, sharding)

    def keep(self, tree: Tree) -> Tree:
        """`tree`, whose vectors the compiler is to leave as they lie."""
        return jax.tree.map(lambda leaf: self.constrain(leaf) if self._holds(leaf) else leaf, tree)

    def replicate(self, tree: Tree) -> Tree:
        """`tree` with what is not on the mesh yet copied to each device."""
        return tree if self.mesh is None else _sharding.place(tree, self.mesh, PartitionSpec())

    def map_shards(self, function: Callable[..., Any], rows: Tree, shared: Tree) -> Tree:
        """`function(rows, shared)`, which treats all columns alike, on each device's own."""
        if self.mesh is None:
            return function(rows, shared)
        spec = self._spec(2)
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=(spec, PartitionSpec()),
            out_specs=spec,
            check_vma=False,
        )(rows, shared)

    def psum(self, function: Callable[..., Any], *rows: jax.Array) -> Tree:
        """`function(*rows)`, a sum over columns, of each device's own, summed over the devices."""
        if self.mesh is None:
            return function(*rows)
        axes = self.mesh.axis_names
        return jax.shard_map(
            lambda *own: jax.lax.psum(function(*own), axes),
            mesh=self.mesh,
            in_specs=tuple(self._spec(leaf.ndim) for leaf in rows),
            out_specs=PartitionSpec(),
            check_vma=False,
        )(*rows)

    def orthonormal(self, rows: jax.Array) -> jax.Array:
        """An orthonormal basis of rows (k, length), k at most the size."""
        if self.mesh is None:
            return jnp.linalg.qr(rows.T)[0].T
        if self._shares.num_columns < rows.shape[0]:
            return self.shard(self.whole().orthonormal(self.gather(rows)))
        axes = self.mesh.axis_names

        # The factors of the devices' parts, then those of the small factors, stacked. All columns
        # of the first device are used, so that what completes a basis is no filling.
        def local(rows: jax.Array, _: Tree) -> jax.Array:
            own, small = jnp.linalg.qr(rows.T)
            stacked = jax.lax.all_gather(small, axes, tiled=True)
            start = jax.lax.axis_index(axes) * small.shape[0]
            mixing = jnp.linalg.qr(stacked)[0]
            mixed = (own @ jax.lax.dynamic_slice_in_dim(mixing, start, small.shape[0])).T
            return jnp.where(self._shares.is_there(), mixed, jnp.zeros_like(mixed))

        return self.map_shards(local, rows, None)

    def shapes_of(self, tree: Tree) -> Tree:
        """Shapes of a tree, each with where it lies: an array where it is, a vector where it would.

        Args:
          tree: of arrays, or of shapes that `jax.eval_shape` found.
        """

        def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
            sharding = getattr(leaf, "sharding", None)
            if sharding is None and self.mesh is not None:
                spec = self._spec(len(leaf.shape)) if self._holds(leaf) else PartitionSpec()
                sharding = NamedSharding(self.mesh, spec)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(shape_of, tree)

    def num_bytes(self, tree: Tree) -> int:
        """Bytes of a tree of arrays, or of their shapes, on one device; keys count nothing."""
        arrays = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
        return _meshes.num_bytes(self.shapes_of(arrays))

    @functools.cached_property
    def _shares(self) -> Shares:
        assert self.mesh is not None
        return Shares(self.mesh, self.shapes, self.specs)

    def _holds(self, leaf: Any) -> bool:
        """Whether an array has the shape of vectors."""
        return leaf.shape[-1:] == (self.length,)

    def _spec(self, ndim: int) -> PartitionSpec:
        return self._shares.spec(ndim)

    def _cut(self, rows: jax.Array) -> list[jax.Array]:
        """The leaves (..., *shape) of whole vectors."""
        pieces, start = [], 0
        for shape in self.shapes:
            stop = start + math.prod(shape)
            piece = jax.lax.slice_in_dim(rows, start, stop, axis=rows.ndim - 1)
            pieces.append(piece.reshape(*rows.shape[:-1], *shape))
            start = stop
        return pieces

    def _drawn(
        self, whole: Callable[..., jax.Array], by_place: Callable[..., jax.Array],
        key: PRNGKey, num_rows: int | None,
    ) -> jax.Array:  # fmt: skip
        leading = () if num_rows is None else (num_rows,)
        if self.mesh is None or not _draws.goes_by_place(key):
            return self.shard(whole(key, (*leading, self.size), self.dtype))
        return drawn(self._shares, by_place, leading, self.dtype, jax.random.key_data(key))


@one_program(static=("shape", "dtype"), effort=1)
def _normal(key: PRNGKey, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype)


# Compiled, an array of this process alone can go to the devices of all.
@functools.partial(jax.jit, static_argnums=0)
def _sharded(space: Space, rows: jax.Array) -> jax.Array:
    return vectors(space._shares, space._cut(rows), rows.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _gathered(space: Space, rows: jax.Array) -> jax.Array:
    assert space.mesh is not None
    everywhere = NamedSharding(space.mesh, PartitionSpec())
    whole, start = jnp.zeros((*rows.shape[:-1], space.size), rows.dtype), 0
    for leaf in leaves(space._shares, rows):
        piece = leaf.reshape(*rows.shape[:-1], -1)
        whole = jax.lax.dynamic_update_slice_in_dim(whole, piece, start, rows.ndim - 1)
        start += piece.shape[-1]
    return jax.lax.with_sharding_constraint(whole, everywhere)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _zeros(space: Space, num_rows: int) -> jax.Array:
    return space.constrain(jnp.zeros((num_rows, space.length), space.dtype))
