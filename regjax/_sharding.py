"""Arrays on several devices: where the examples of a batch lie.

The engine is JAX's own: arrays carry their shardings, and the compiler divides the work. What it
cannot guess is kept here, as a static value that passes through `jax.jit` with the operator: over
which axes of the mesh the examples are divided, so that each device loops over its own.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from regjax import _meshes, _platforms
from regjax._base import Batch, Params, Tree
from regjax._shares import names_of


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the examples and the parameters lie.

    Attributes:
      mesh: of all arrays.
      example_axes: its axes over which the examples are divided; none: each device has them all.
      specs: how the leaves of the parameters are divided over it; none: they are replicated, or
        there are no parameters.
      home: the mesh with explicit axes that the arrays come from; None: they are as given.
    """

    mesh: Mesh
    example_axes: tuple[str, ...]
    specs: tuple[PartitionSpec, ...] = ()
    home: Mesh | None = dataclasses.field(default=None, compare=False)

    @property
    def num_parts(self) -> int:
        """The number of parts of the batch."""
        return math.prod(self.mesh.shape[axis] for axis in self.example_axes)

    def shard(self, batch: Batch) -> Batch:
        """`batch` with what is not on the mesh yet divided along the examples."""
        return place(batch, self.mesh, PartitionSpec(self.example_axes or None))

    def shapes_of(self, batch: Batch) -> Batch:
        """Shapes of `batch`, divided along the examples."""
        sharding = NamedSharding(self.mesh, PartitionSpec(self.example_axes or None))
        shape_of = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.tree.map(shape_of, batch)

    def replicate(self, tree: Tree) -> Tree:
        """`tree` with what is not on the mesh yet copied to each device."""
        return place(tree, self.mesh, PartitionSpec())

    @property
    def takes_parts(self) -> bool:
        """Whether a part can go over its own examples alone, on devices with all parameters."""
        names = {name for spec in self.specs for axis in names_of(spec, len(spec)) for name in axis}
        return names.isdisjoint(self.example_axes)

    def zeros(self, shapes: Tree) -> Tree:
        """Zeros for the sums over examples; each leaf divided as a parameter is.

        With an axis in front for the parts, divided over the devices, where these take parts.
        """
        leading = (self.num_parts,) if self.takes_parts else ()
        front = (self.example_axes,) if self.takes_parts else ()
        leaves, treedef = jax.tree.flatten(shapes)
        specs = self.specs if len(self.specs) == len(leaves) else (PartitionSpec(),) * len(leaves)

        def zeros_of(leaf: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.Array:
            sharding = NamedSharding(self.mesh, PartitionSpec(*front, *spec))
            zeros = jnp.zeros((*leading, *leaf.shape), leaf.dtype)
            return jax.lax.with_sharding_constraint(zeros, sharding)

        return jax.tree.unflatten(treedef, map(zeros_of, leaves, specs))

    def together(self, batch: Batch, start: ArrayLike, length: int) -> Batch:
        """So many examples of each part, as one batch that is divided like `batch`."""
        sharding = NamedSharding(self.mesh, PartitionSpec(self.example_axes))

        def of(leaf: jax.Array) -> jax.Array:
            parts = leaf.reshape(self.num_parts, -1, *leaf.shape[1:])
            rows = jax.lax.dynamic_slice_in_dim(parts, start, length, 1)
            rows = rows.reshape(self.num_parts * length, *leaf.shape[1:])
            return jax.lax.with_sharding_constraint(rows, sharding)

        return jax.tree.map(of, batch)

    def map_parts(
        self, function: Callable[..., Any], parts: Tree, batch: Batch, shared: Tree
    ) -> Tree:
        """`function(part, own examples, shared)` on each part of the batch, without communication.

        Args:
          function: from trees of one part to a tree like the part.
          parts: tree of arrays with a leading axis of `num_parts`, divided over the devices.
          batch: tree of arrays with a leading axis of examples, divided likewise.
          shared: tree of arrays that each device has.
        """

        def local(parts: Tree, batch: Batch, shared: Tree) -> Tree:
            own = function(jax.tree.map(lambda leaf: leaf[0], parts), batch, shared)
            return jax.tree.map(lambda leaf: leaf[None], own)

        by_example = PartitionSpec(self.example_axes)
        # Checked for what varies, a gradient inside would be summed over the devices each time.
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(by_example, by_example, PartitionSpec()),
            out_specs=by_example,
            axis_names=set(self.example_axes),
            check_vma=False,
        )(parts, batch, shared)


def place(tree: Tree, mesh: Mesh, spec: PartitionSpec) -> Tree:
    """`tree` with its concrete arrays that are not on a mesh yet put on `mesh` as `spec` says.

    Those on explicit axes go on automatic ones where they are. NumPy's are constants inside of
    `jax.jit`, which lie nowhere: the devices may be those of a machine that is not here.
    """
    sharding, tree = NamedSharding(mesh, spec), _meshes.automatic(tree)

    def put(leaf: Any) -> Any:
        is_there = _is_concrete(leaf) or (
            isinstance(leaf, np.ndarray) and not _platforms.is_in_program()
        )
        if not is_there or _mesh(leaf) is not None:
            return leaf
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        # Several processes: each puts what its own devices need, of typed keys the data.
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return _put(leaf, sharding)
        data = _put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))

    return jax.tree.map(put, tree)


def find(batch: Batch, params: Params, *others: Tree) -> Placement | None:
    """The placement that trees show by their concrete arrays; None: one device.

    Args:
      batch: arrays with a leading axis of examples.
      params: the parameters, or ().
      *others: what else may lie on the mesh.

    Raises:
      ValueError: the arrays of `batch` are divided over different axes.
    """
    meshes = [_mesh(leaf) for leaf in jax.tree.leaves((batch, params, *others))]
    mesh = next((mesh for mesh in meshes if mesh is not None), None)
    if mesh is None:
        return None
    divisions = {
        _leading(leaf.sharding.spec) for leaf in jax.tree.leaves(batch) if _mesh(leaf) is not None
    }
    if len(divisions) > 1:
        raise ValueError(
            "`batch` must have all its arrays divided alike along the examples, got "
            f"{sorted(divisions)}."
        )
    home = mesh if _meshes.is_explicit(mesh) else _meshes.home()
    axes = divisions.pop() if divisions else ()
    mesh = _meshes.automatic_mesh(mesh)
    return Placement(mesh, axes, specs_on(params, mesh), home)


def specs_on(tree: Tree, mesh: Mesh) -> tuple[PartitionSpec, ...]:
    """How arrays, and shapes that say so, are divided over `mesh`; those elsewhere are not."""
    return tuple(_spec_on(leaf, mesh) for leaf in jax.tree.leaves(tree))


def _spec_on(leaf: Any, mesh: Mesh) -> PartitionSpec:
    sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return PartitionSpec()
    same = _meshes.automatic_mesh(sharding.mesh) == _meshes.automatic_mesh(mesh)
    return PartitionSpec(*_entries(sharding.spec)) if same else PartitionSpec()


def explicit(leaf: jax.Array) -> NamedSharding | None:
    """How an array lies where its type says so, on a mesh with explicit axes; None elsewhere."""
    sharding = jax.typeof(leaf).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def like(array: jax.Array, reference: jax.Array) -> jax.Array:
    """`array` as `reference` of the same shape lies, where its type says how."""
    sharding = explicit(reference)
    return array if sharding is None else jax.sharding.reshard(array, sharding)


def gathered_rows(array: jax.Array) -> jax.Array:
    """`array` with all of its leading axis on each device, on a mesh with explicit axes.

    What cuts that axis has to say there where the parts shall lie; XLA decides elsewhere.
    """
    sharding = explicit(array)
    if sharding is None:
        return array
    spec = PartitionSpec(None, *sharding.spec[1:])
    return jax.sharding.reshard(array, NamedSharding(sharding.mesh, spec))


def like_rows(rows: jax.Array, reference: jax.Array) -> jax.Array:
    """`rows` divided along the leading axis as `reference` is, where its type says how.

    As they are if there are too few rows for all devices.
    """
    sharding = explicit(reference)
    if sharding is None:
        return rows
    num_devices = math.prod(sharding.mesh.shape[name] for name in _leading(sharding.spec))
    if rows.shape[0] % num_devices:
        return rows
    return jax.sharding.reshard(rows, sharding)


def _mesh(leaf: Any) -> Mesh | None:
    """The mesh of several devices that a concrete array lies on."""
    if not _is_concrete(leaf):
        return None
    sharding = leaf.sharding
    is_on_many = isinstance(sharding, NamedSharding) and sharding.mesh.size > 1
    return sharding.mesh if is_on_many else None


def _put(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
    values = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: values[index])


def _is_concrete(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)


def _entries(spec: PartitionSpec) -> list[tuple[str, ...] | None]:
    """The entries of `spec` in one form, so that equal divisions are equal."""
    names = names_of(spec, len(spec))
    while names and not names[-1]:
        names = names[:-1]
    return [axis or None for axis in names]


def _leading(spec: PartitionSpec) -> tuple[str, ...]:
    return next(iter(names_of(spec, len(spec))), ())
