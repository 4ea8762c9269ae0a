"""Arrays on several devices: where an operator's data lie, and rows divided along their columns.

The engine is JAX's own: arrays carry their shardings, and the compiler divides the work. What it
cannot guess is kept here, as static values that pass through `jax.jit` with the operator: over
which axes of the mesh the examples are divided, so that each device loops over its own, and how
many long rows (a Krylov basis) are divided along their columns, so that none has them all.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the examples and the parameters lie.

    Attributes:
      mesh: of all arrays.
      example_axes: its axes over which the examples are divided; none: each device has them all.
    """

    mesh: Mesh
    example_axes: tuple[str, ...]

    @property
    def num_parts(self) -> int:
        """The number of parts of the batch."""
        return math.prod(self.mesh.shape[axis] for axis in self.example_axes)

    def divided(self, batch: Any) -> Any:
        """`batch` with what is not on the mesh yet divided along the examples."""
        return self._placed(batch, PartitionSpec(self.example_axes or None))

    def copied(self, tree: Any) -> Any:
        """`tree` with what is not on the mesh yet copied to each device."""
        return self._placed(tree, PartitionSpec())

    def zeros(self, shapes: Any) -> Any:
        """A tree of zeros for each part, divided over the devices."""
        sharding = NamedSharding(self.mesh, PartitionSpec(self.example_axes))
        keep = lambda zeros: jax.lax.with_sharding_constraint(zeros, sharding)
        return jax.tree.map(
            lambda leaf: keep(jnp.zeros((self.num_parts, *leaf.shape), leaf.dtype)), shapes
        )

    def by_part(self, function: Callable[..., Any], parts: Any, batch: Any, shared: Any) -> Any:
        """`function(part, own examples, shared)` on each part of the batch, without communication.

        Args:
          function: from trees of one part to a tree like the part.
          parts: tree of arrays with a leading axis of `num_parts`, divided over the devices.
          batch: tree of arrays with a leading axis of examples, divided likewise.
          shared: tree of arrays that each device has.
        """

        def local(parts: Any, batch: Any, shared: Any) -> Any:
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

    def _placed(self, tree: Any, spec: PartitionSpec) -> Any:
        sharding = NamedSharding(self.mesh, spec)

        def place(leaf: Any) -> Any:
            if not _is_concrete(leaf) or _mesh(leaf) is not None:
                return leaf
            if sharding.is_fully_addressable:
                return jax.device_put(leaf, sharding)
            # Several processes: each puts what its own devices need, of typed keys the data.
            if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return _put(leaf, sharding)
            data = _put(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))

        return jax.tree.map(place, tree)


@dataclasses.dataclass(frozen=True)
class Columns:
    """The n columns of many rows: whole, or divided over all devices of a mesh.

    A device has ceil(n / devices) of them; what lies beyond n is zero.

    Attributes:
      size: n.
      mesh: None: whole.
    """

    size: int
    mesh: Mesh | None = None

    @property
    def padded(self) -> int:
        """The number of columns with those that fill the last devices' parts."""
        return self.size if self.mesh is None else -(-self.size // self.mesh.size) * self.mesh.size

    def zeros(self, num_rows: int, dtype: Any) -> jax.Array:
        """Divided rows (num_rows, padded)."""
        if self.mesh is None:
            return jnp.zeros((num_rows, self.size), dtype)
        return _zeros(self, num_rows, dtype)

    def divide(self, rows: jax.Array) -> jax.Array:
        """From rows (..., n) to divided ones (..., padded)."""
        if self.mesh is None:
            return rows
        widths = [(0, 0)] * (rows.ndim - 1) + [(0, self.padded - self.size)]
        return self.keep(jnp.pad(rows, widths))

    def keep(self, rows: jax.Array) -> jax.Array:
        """Rows (..., padded), which the compiler is to leave divided."""
        if self.mesh is None:
            return rows
        spec = self._spec(rows.ndim)
        return jax.lax.with_sharding_constraint(rows, NamedSharding(self.mesh, spec))

    def join(self, rows: jax.Array) -> jax.Array:
        """From divided rows (..., padded) to whole ones (..., n) on each device."""
        if self.mesh is None:
            return rows
        whole = NamedSharding(self.mesh, PartitionSpec())
        return jax.lax.with_sharding_constraint(rows, whole)[..., : self.size]

    def copied(self, tree: Any) -> Any:
        """`tree` with what is not on the mesh yet copied to each device."""
        return tree if self.mesh is None else Placement(self.mesh, ()).copied(tree)

    def locally(self, function: Callable[[Any, Any], Any], rows: Any, shared: Any) -> Any:
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

    def added(self, function: Callable[..., Any], *rows: jax.Array) -> Any:
        """`function(*rows)` of divided rows, that of each device's own columns added up."""
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
        """An orthonormal basis of divided rows (k, padded), k at most n, divided likewise."""
        if self.mesh is None:
            return jnp.linalg.qr(rows.T)[0].T
        axes = self.mesh.axis_names

        # The factors of the devices' parts, then those of the small factors, stacked.
        def local(rows: jax.Array, _: Any) -> jax.Array:
            own, small = jnp.linalg.qr(rows.T)
            stacked = jax.lax.all_gather(small, axes, tiled=True)
            start = jax.lax.axis_index(axes) * small.shape[0]
            mixing = jnp.linalg.qr(stacked)[0]
            return (own @ jax.lax.dynamic_slice_in_dim(mixing, start, small.shape[0])).T

        return self.locally(local, rows, None)

    def _spec(self, ndim: int) -> PartitionSpec:
        axes = None if self.mesh is None else self.mesh.axis_names
        return PartitionSpec(*[None] * (ndim - 1), axes)


def find(batch: Any, *others: Any) -> Placement | None:
    """The placement that `batch` and other trees show by their concrete arrays; None: one device.

    Raises:
      ValueError: the arrays of `batch` are divided over different axes, or the mesh has explicit
        axes.
    """
    meshes = [_mesh(leaf) for leaf in jax.tree.leaves((batch, *others))]
    mesh = next((mesh for mesh in meshes if mesh is not None), None)
    if mesh is None:
        return None
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        kinds = ", ".join(str(kind) for kind in mesh.axis_types)
        raise ValueError(
            "`batch` and `params` must lie on a mesh with automatic axes, "
            f"jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,)), got {kinds}."
        )
    divisions = {
        _leading(leaf.sharding.spec) for leaf in jax.tree.leaves(batch) if _mesh(leaf) is not None
    }
    if len(divisions) > 1:
        raise ValueError(
            "`batch` must have all its arrays divided alike along the examples, got "
            f"{sorted(divisions)}."
        )
    return Placement(mesh, divisions.pop() if divisions else ())


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


def _leading(spec: PartitionSpec) -> tuple[str, ...]:
    first = spec[0] if len(spec) else None
    return () if first is None else (first,) if isinstance(first, str) else tuple(first)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(columns: Columns, num_rows: int, dtype: Any) -> jax.Array:
    return columns.keep(jnp.zeros((num_rows, columns.padded), dtype))
