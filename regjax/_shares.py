"""Which columns of a vector a device has: its own shards of the leaves of a tree.

A shard that several devices hold is shared out among them in equal slices, filled up with zeros. So
what is divided over all devices goes into a vector and out of it without a message; of the rest,
all that lies on the same devices is gathered at once, over the axes on which it is replicated.
The methods that take or return arrays run on each device, inside of `jax.shard_map`; the functions
at the end call them there.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

Names: TypeAlias = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Share:
    """What a device has of a leaf.

    Attributes:
      shape: of the leaf.
      names: for each axis of the leaf those of the mesh over which it is divided.
      parts: for each axis the number of its parts.
      copies: axes of the mesh on which a shard is replicated.
      num_copies: how many devices hold a shard.
      first: number of scalars in the leaves before.
      start: the first of its columns.
    """

    shape: tuple[int, ...]
    names: tuple[Names, ...]
    parts: tuple[int, ...]
    copies: Names
    num_copies: int
    first: int
    start: int

    @property
    def shard(self) -> tuple[int, ...]:
        """Shape of a shard."""
        return tuple(size // parts for size, parts in zip(self.shape, self.parts, strict=True))

    @property
    def size(self) -> int:
        """Number of scalars of a shard."""
        return math.prod(self.shard)

    @property
    def width(self) -> int:
        """Number of columns: of a slice of the shard, the same for all who hold it."""
        return -(-self.size // self.num_copies)

    def slice(self, shard: jax.Array) -> jax.Array:
        """The device's columns (..., width) of its shard."""
        rows = shard.reshape(*shard.shape[: shard.ndim - len(self.shape)], self.size)
        if self.num_copies == 1:
            return rows
        if fill := self.width * self.num_copies - self.size:
            rows = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, fill)])
        start = lax.axis_index(self.copies) * self.width
        return lax.dynamic_slice_in_dim(rows, start, self.width, rows.ndim - 1)

    def joined(self, slices: jax.Array) -> jax.Array:
        """The shard of the slices (num_copies, ..., width) of all who hold it."""
        rows = jnp.moveaxis(slices, 0, -2)
        rows = rows.reshape(*rows.shape[:-2], self.num_copies * self.width)
        return rows[..., : self.size].reshape(*rows.shape[:-1], *self.shard)

    def places(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Where the columns are in the flat tree (width,), and whether they are, or fill up."""
        # Divisions of 64 bits take XLA for TPU longer to compile than all else in a step.
        axes = self._axes()
        largest = max([self.width * self.num_copies, *(size for size, _, _ in axes)])
        kind = jnp.uint32 if largest < 2**32 else dtype
        number = functools.partial(jnp.asarray, dtype=kind)
        index = lambda names: number(lax.axis_index(names) if names else 0)
        rest = jnp.arange(self.width, dtype=kind) + index(self.copies) * number(self.width)
        is_there = rest < number(self.size)
        found, stride = jnp.asarray(self.first, dtype), 1
        for size, names, parts in reversed(axes):
            own = size // parts
            here = (rest % number(own) + index(names) * number(own)).astype(dtype)
            rest, found = rest // number(own), found + here * jnp.asarray(stride, dtype)
            stride *= size
        return jnp.broadcast_to(found, rest.shape), is_there

    def _axes(self) -> list[tuple[int, Names, int]]:
        """Size, names and parts of the axes; an undivided one belongs to that before it."""
        found: list[tuple[int, Names, int]] = []
        for size, names, parts in zip(self.shape, self.names, self.parts, strict=True):
            if found and parts == 1:
                found[-1] = (found[-1][0] * size, *found[-1][1:])
            else:
                found.append((size, names, parts))
        return found


@dataclasses.dataclass(frozen=True)
class Shares:
    """What each device of a mesh has of a tree; static and hashable.

    Attributes:
      mesh: the devices.
      shapes: of the leaves.
      specs: how they are divided.
    """

    mesh: Mesh
    shapes: tuple[tuple[int, ...], ...]
    specs: tuple[PartitionSpec, ...]

    @functools.cached_property
    def of_leaves(self) -> tuple[Share, ...]:
        """That of each leaf; leaves with the same holders have their columns side by side."""
        firsts = itertools.accumulate(map(math.prod, self.shapes), initial=0)
        # The last of the numbers belongs to no leaf.
        found = [self._share(*leaf) for leaf in zip(self.shapes, self.specs, firsts, strict=False)]
        start = 0
        for copies in dict.fromkeys(share.copies for share in found):
            for i, share in enumerate(found):
                if share.copies == copies:
                    found[i] = dataclasses.replace(share, start=start)
                    start += share.width
        return tuple(found)

    @functools.cached_property
    def num_columns(self) -> int:
        """Of a vector on each device."""
        return sum(share.width for share in self.of_leaves)

    def columns(self, shards: Sequence[jax.Array], dtype: Any) -> jax.Array:
        """The device's columns (..., num_columns) of its shards, each with the same axes before."""
        ndims = zip(shards, self.shapes, strict=True)
        leading = next((shard.shape[: shard.ndim - len(shape)] for shard, shape in ndims), ())
        columns = jnp.zeros((*leading, self.num_columns), dtype)
        # Updates in place: XLA on CPU takes four times as long for a concatenation.
        for share, shard in zip(self.of_leaves, shards, strict=True):
            piece = share.slice(shard).astype(dtype)
            columns = lax.dynamic_update_slice_in_dim(columns, piece, share.start, len(leading))
        return columns

    def shards(self, columns: jax.Array) -> list[jax.Array]:
        """The device's shards, of its columns and those of the others who hold them."""
        gathered, found = dict[Names, tuple[int, jax.Array]](), []
        for copies, start, stop in self._groups():
            part = columns[..., start:stop]
            slices = lax.all_gather(part, copies) if copies else part[None]
            gathered[copies] = start, slices
        for share in self.of_leaves:
            start, slices = gathered[share.copies]
            own = lax.slice_in_dim(
                slices, share.start - start, share.start - start + share.width, axis=-1
            )
            found.append(share.joined(own))
        return found

    def spec(self, ndim: int) -> PartitionSpec:
        """How an array of vectors (..., length) is divided."""
        return PartitionSpec(*[None] * (ndim - 1), self.mesh.axis_names)

    def leaf_specs(self, num_leading: int) -> list[PartitionSpec]:
        """How the leaves are, with axes before their own."""
        return [PartitionSpec(*[None] * num_leading, *spec) for spec in self.specs]

    def is_there(self) -> jax.Array:
        """(num_columns,), False for the device's columns that fill up."""
        with jax.enable_x64(True):
            return self.places(jnp.uint64)[1]

    def places(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Where the device's columns are in the flat tree, and whether they are there.

        Args:
          dtype: of integers that hold the size of the tree.

        Returns:
          (num_columns,) of that type, and of booleans: False for what fills up.
        """
        nothing = jnp.zeros(0, dtype), jnp.zeros(0, bool)
        ordered = sorted(self.of_leaves, key=lambda share: share.start)
        pairs = [nothing, *(share.places(dtype) for share in ordered if share.width)]
        places, is_there = zip(*pairs, strict=True)
        return jnp.concatenate(places), jnp.concatenate(is_there)

    def _share(self, shape: tuple[int, ...], spec: PartitionSpec, first: int) -> Share:
        names = names_of(spec, len(shape))
        sizes = self.mesh.shape
        parts = tuple(math.prod(sizes[name] for name in axis) for axis in names)
        used = set(itertools.chain.from_iterable(names))
        copies = tuple(name for name in self.mesh.axis_names if name not in used)
        num_copies = math.prod(sizes[name] for name in copies)
        return Share(shape, names, parts, copies, num_copies, first, 0)

    def _groups(self) -> Iterator[tuple[Names, int, int]]:
        """Axes of replication, and the columns of the leaves with these."""
        for copies in dict.fromkeys(share.copies for share in self.of_leaves):
            ours = [share for share in self.of_leaves if share.copies == copies]
            yield copies, ours[0].start, ours[-1].start + ours[-1].width


def names_of(spec: PartitionSpec, ndim: int) -> tuple[Names, ...]:
    """The names of the mesh's axes over which each axis of an array is divided."""
    entries = (*spec, *[None] * (ndim - len(spec)))
    as_names = lambda entry: (
        () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
    )
    return tuple(map(as_names, entries))


# Compiled, an array of this process alone can go to the devices of all.
@functools.partial(jax.jit, static_argnums=(0, 2))
def vectors(shares: Shares, leaves: list[jax.Array], dtype: Any) -> jax.Array:
    """Vectors (..., length) of leaves with the same axes before their own."""
    num_leading = jnp.ndim(leaves[0]) - len(shares.shapes[0]) if leaves else 0
    return jax.shard_map(
        lambda shards: shares.columns(shards, dtype),
        mesh=shares.mesh,
        in_specs=(shares.leaf_specs(num_leading),),
        out_specs=shares.spec(num_leading + 1),
        check_vma=False,
    )(leaves)


@functools.partial(jax.jit, static_argnums=0)
def leaves(shares: Shares, rows: jax.Array) -> list[jax.Array]:
    """The leaves (..., *shape) of vectors (..., length), of the type of these."""
    return jax.shard_map(
        shares.shards,
        mesh=shares.mesh,
        in_specs=shares.spec(rows.ndim),
        out_specs=shares.leaf_specs(rows.ndim - 1),
        check_vma=False,
    )(rows)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def drawn(
    shares: Shares, draw: Callable[..., jax.Array], leading: tuple[int, ...], dtype: Any,
    key_data: jax.Array,
) -> jax.Array:  # fmt: skip
    """Vectors (*leading, length) of random numbers, each device its own columns.

    Args:
      shares: of the tree.
      draw: (key_data, places, dtype) -> the numbers at places of the flat tree, or of rows of it.
      leading: (), or the number of rows.
      dtype: of the numbers.
      key_data: of a key.
    """

    def local(key_data: jax.Array) -> jax.Array:
        with jax.enable_x64(True):
            places, is_there = shares.places(jnp.uint64)
            for count in leading:
                size = sum(map(math.prod, shares.shapes))
                rows = jnp.arange(count, dtype=jnp.uint64) * jnp.uint64(size)
                places = rows[:, None] + places[None]
        numbers = draw(key_data, places, dtype)
        return jnp.where(is_there, numbers, jnp.zeros((), dtype))

    return jax.shard_map(
        local,
        mesh=shares.mesh,
        in_specs=PartitionSpec(),
        out_specs=shares.spec(len(leading) + 1),
        check_vma=False,
    )(key_data)
