"""What this process has of arrays on several devices, and how processes go together.

A process writes its own shards and reads them again, each once, in the order of their places. What
all devices have it has as well; so the states of all processes together are a whole one, and only
if all of them are whole and of the same step.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from regjax import _files, _sharding
from regjax._base import Tree

_Result = TypeVar("_Result")
Index = tuple[slice, ...]


def pieces(leaf: Any) -> Tree:
    """An array that each device has as it is, or this process's shards of a divided one."""
    if not _is_divided(leaf):
        return leaf.addressable_data(0) if _is_spread(leaf) else leaf
    own = {_place(shard.index): shard.data for shard in leaf.addressable_shards}
    return [own[place] for place in sorted(own)]


def shapes(leaf: Any) -> Tree:
    """The shapes of the `pieces` of an array like a shape with a sharding."""
    if not _is_divided(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    piece = jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
    return [piece] * len({_place(index) for index in _indices(leaf).values()})


def joined(own: Tree, like: Any) -> jax.Array:
    """The array of its `pieces`, where one `like` it lies; a copy, which may be overwritten."""
    if not _is_divided(like):
        leaf = own if isinstance(own, jax.Array) else jnp.array(own)
        if isinstance(like.sharding, NamedSharding) and isinstance(like.sharding.mesh, Mesh):
            return _sharding.place(leaf, like.sharding.mesh, PartitionSpec())
        return jax.device_put(leaf, like.sharding) if _is_spread(like) else leaf
    indices = _indices(like)
    order = sorted({_place(index) for index in indices.values()})
    parts = [
        jax.device_put(own[order.index(_place(index))], device) for device, index in indices.items()
    ]
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, parts)


def without_rows(sharding: Sharding | None) -> Sharding | None:
    """How one row of blocks (..., rows, n) lies."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = list(sharding.spec)
    del spec[-2:-1]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def everywhere(count: int) -> list[int]:
    """The numbers of all processes."""
    if jax.process_count() == 1:
        return [count]
    return np.asarray(multihost_utils.process_allgather(np.int32(count))).ravel().tolist()


def together(work: Callable[[], _Result]) -> _Result:
    """What `work` returns, if it does so in all processes; it must not send messages itself.

    Raises:
      CheckpointError: it failed in another process, which says why.
    """
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:  # so that nobody waits for who does not come
        failure = error
    failed = [i for i, is_bad in enumerate(everywhere(failure is not None)) if is_bad]
    if failure is not None:
        raise failure
    if failed:
        raise _files.CheckpointError(
            f"`checkpoint` must be readable and of the same problem in all processes, got an error "
            f"in those numbered {failed}."
        )
    return result


def _is_spread(leaf: Any) -> bool:
    return leaf.sharding is not None and len(leaf.sharding.device_set) > 1


def _is_divided(leaf: Any) -> bool:
    return _is_spread(leaf) and not leaf.sharding.is_fully_replicated


def _indices(leaf: Any) -> dict[jax.Device, Index]:
    return leaf.sharding.addressable_devices_indices_map(leaf.shape)


def _place(index: Index) -> tuple[int, ...]:
    return tuple(axis.start or 0 for axis in index)
