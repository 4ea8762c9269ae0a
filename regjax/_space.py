"""The vector space of trees like an example: how a tree is a vector, and where vectors lie.

A vector is a flat array of the leaves in the order of `jax.tree.leaves`, rows are several vectors
(k, length). On a mesh each device has the same number of their columns; those beyond the size of
the tree are zero. Nothing but this file knows how a vector is laid out: whoever has one adds,
scales and selects it as an array, and asks its space for all else.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from regjax import _checks, _sharding, _tree
from regjax._base import Params, PRNGKey, Tree


@dataclasses.dataclass(frozen=True)
class Space:
    """Vectors made of trees like an example; static and hashable.

    Attributes:
      treedef: structure of a tree.
      shapes: of its leaves.
      dtypes: of its leaves.
      mesh: the devices over which vectors are divided; None: vectors are whole.
    """

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[jnp.dtype, ...]
    mesh: Mesh | None = None

    @classmethod
    def of(cls, tree: Params, mesh: Mesh | None = None) -> "Space":
        """The space of trees like `tree`, of arrays or of anything with a shape and a dtype."""
        leaves, treedef = jax.tree.flatten(tree)
        shapes = tuple(tuple(jnp.shape(leaf)) for leaf in leaves)
        return cls(treedef, shapes, tuple(jnp.result_type(leaf) for leaf in leaves), mesh)

    @functools.cached_property
    def size(self) -> int:
        """The dimension: the number of scalars in a tree."""
        return sum(map(math.prod, self.shapes))

    @functools.cached_property
    def dtype(self) -> jnp.dtype:
        """Type of a vector: the widest of the leaves, float32 at least."""
        return _tree.widest(self.dtypes)

    @property
    def length(self) -> int:
        """Length of the array of a vector: the size, and what fills the last devices' shares."""
        return self.size if self.mesh is None else -(-self.size // self.mesh.size) * self.mesh.size

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
        vector, start = jnp.zeros(self.size, dtype), 0
        # Updates in place: XLA on CPU takes four times as long for a concatenation.
        for leaf in jax.tree.leaves(tree):
            piece = _sharding.like(jnp.ravel(leaf).astype(dtype), vector)
            vector = jax.lax.dynamic_update_slice(vector, piece, (start,))
            start += piece.size
        return self.shard(vector)

    def unravel(self, vector: jax.Array) -> Params:
        """The tree of a vector: the inverse of `ravel`, with the dtypes of the example."""
        vector, pieces, start = self.gather(vector), [], 0
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            stop = start + math.prod(shape)
            pieces.append(jax.lax.slice_in_dim(vector, start, stop).reshape(shape).astype(dtype))
            start = stop
        return jax.tree.unflatten(self.treedef, pieces)

    def ravel_rows(self, trees: Params) -> jax.Array:
        """Rows (k, length) of a tree whose leaves have a leading axis k."""
        return self.shard(jax.vmap(self._whole().ravel)(trees))

    def unravel_rows(self, rows: jax.Array) -> Params:
        """The inverse of `ravel_rows`."""
        return jax.vmap(self._whole().unravel)(self.gather(rows))

    def zeros(self, num_rows: int) -> jax.Array:
        """Rows (num_rows, length) of zeros."""
        if self.mesh is None:
            return jnp.zeros((num_rows, self.size), self.dtype)
        return _zeros(self, num_rows)

    def normal(self, key: PRNGKey, num_rows: int | None = None) -> jax.Array:
        """A vector, or rows, of standard normal numbers, the same ones on any mesh."""
        leading = () if num_rows is None else (num_rows,)
        return self.shard(jax.random.normal(key, (*leading, self.size), self.dtype))

    def signs(self, key: PRNGKey, num_rows: int) -> jax.Array:
        """Rows of random signs, the same ones on any mesh."""
        return self.shard(jax.random.rademacher(key, (num_rows, self.size), self.dtype))

    def inner(self, one: jax.Array, other: jax.Array) -> jax.Array:
        """The inner product of two vectors."""
        return jnp.vdot(one, other)

    def norm(self, vector: jax.Array) -> jax.Array:
        """The Euclidean norm of a vector."""
        return jnp.linalg.norm(vector)

    def shard(self, rows: jax.Array) -> jax.Array:
        """From whole vectors (..., size) to vectors as they lie (..., length)."""
        if self.mesh is None:
            return rows
        return _shard(self, rows)

    def gather(self, rows: jax.Array) -> jax.Array:
        """From vectors as they lie to whole ones (..., size) on each device."""
        if self.mesh is None:
            return rows
        whole = NamedSharding(self.mesh, PartitionSpec())
        return jax.lax.with_sharding_constraint(rows, whole)[..., : self.size]

    def crop(self, rows: jax.Array) -> jax.Array:
        """Vectors (..., size), wherever the compiler leaves them; for results with many rows."""
        return rows if self.mesh is None else rows[..., : self.size]

    def constrain(self, rows: jax.Array) -> jax.Array:
        """The same vectors, which the compiler is to leave as they lie."""
        if self.mesh is None:
            return rows
        sharding = NamedSharding(self.mesh, self._spec(rows.ndim))
        return jax.lax.with_sharding_constraint(rows, sharding)

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
        axes = self.mesh.axis_names

        # The factors of the devices' parts, then those of the small factors, stacked.
        def local(rows: jax.Array, _: Tree) -> jax.Array:
            own, small = jnp.linalg.qr(rows.T)
            stacked = jax.lax.all_gather(small, axes, tiled=True)
            start = jax.lax.axis_index(axes) * small.shape[0]
            mixing = jnp.linalg.qr(stacked)[0]
            return (own @ jax.lax.dynamic_slice_in_dim(mixing, start, small.shape[0])).T

        return self.map_shards(local, rows, None)

    def shapes_of(self, tree: Tree) -> Tree:
        """Shapes of a tree, each with where it lies: an array where it is, a vector where it would.

        Args:
          tree: of arrays, or of shapes that `jax.eval_shape` found.
        """

        def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
            sharding = getattr(leaf, "sharding", None)
            if sharding is None and self.mesh is not None:
                is_vector = leaf.shape[-1:] == (self.length,)
                spec = self._spec(len(leaf.shape)) if is_vector else PartitionSpec()
                sharding = NamedSharding(self.mesh, spec)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(shape_of, tree)

    def num_bytes(self, tree: Tree) -> int:
        """Bytes of a tree of arrays, or of their shapes, on one device; keys count nothing."""

        def of(leaf: jax.ShapeDtypeStruct) -> int:
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return 0
            shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
            return math.prod(shape) * leaf.dtype.itemsize

        arrays = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
        return sum(map(of, self.shapes_of(arrays)))

    def _whole(self) -> "Space":
        return self if self.mesh is None else dataclasses.replace(self, mesh=None)

    def _spec(self, ndim: int) -> PartitionSpec:
        axes = None if self.mesh is None else self.mesh.axis_names
        return PartitionSpec(*[None] * (ndim - 1), axes)


# Compiled, an array of this process alone can go to the devices of all.
@functools.partial(jax.jit, static_argnums=0)
def _shard(space: Space, rows: jax.Array) -> jax.Array:
    widths = [(0, 0)] * (rows.ndim - 1) + [(0, space.length - space.size)]
    return space.constrain(jnp.pad(rows, widths))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _zeros(space: Space, num_rows: int) -> jax.Array:
    return space.constrain(jnp.zeros((num_rows, space.length), space.dtype))
