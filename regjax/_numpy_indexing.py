"""What JAX's `gather` and `scatter` are in NumPy: indexing by arrays."""

import functools
from typing import Any

import numpy as np
from jax.lax import GatherScatterMode

from regjax._numpy_rules import Operation, Rule


def _gather(parameters: Any, types: Any) -> Operation:
    form, mode = parameters["dimension_numbers"], parameters["mode"]
    batching = zip(form.operand_batching_dims, form.start_indices_batching_dims, strict=True)
    where = _Places(
        types[0].shape, form.offset_dims, form.start_index_map, tuple(batching),
        (*form.collapsed_slice_dims, *form.operand_batching_dims),
    )  # fmt: skip
    sizes, filling = parameters["slice_sizes"], parameters["fill_value"]
    if filling is None:
        filling = np.nan if np.issubdtype(types[0].dtype, np.inexact) else 0

    def gathered(array: Any, indices: Any) -> Any:
        places, is_inside = where(array.shape, indices, sizes)
        found = array[places]
        if is_inside is None or mode != GatherScatterMode.FILL_OR_DROP:
            return found
        return np.where(is_inside, found, np.asarray(filling, array.dtype))

    return gathered


def _scatter(parameters: Any, types: Any, *, adds: bool) -> Operation:
    form, mode = parameters["dimension_numbers"], parameters["mode"]
    batching = tuple(
        zip(form.operand_batching_dims, form.scatter_indices_batching_dims, strict=True)
    )
    dropped = (*form.inserted_window_dims, *form.operand_batching_dims)

    def scattered(array: Any, indices: Any, updates: Any) -> np.ndarray:
        window = iter(form.update_window_dims)
        sizes = [1 if i in dropped else updates.shape[next(window)] for i in range(array.ndim)]
        where = _Places(
            updates.shape, form.update_window_dims, form.scatter_dims_to_operand_dims, batching,
            dropped,
        )  # fmt: skip
        places, is_inside = where(array.shape, indices, sizes)
        changed = np.array(array)
        if is_inside is not None and mode != GatherScatterMode.CLIP:
            kept = np.broadcast_to(is_inside, updates.shape)
            places = tuple(np.broadcast_to(place, updates.shape)[kept] for place in places)
            updates = updates[kept]
        if adds:
            np.add.at(changed, places, updates)
        else:
            changed[places] = updates
        return changed

    return scattered


class _Places:
    """Where each element of a gather's result, or of a scatter's updates, is in the array.

    Args:
      shape: of the result, or of the updates.
      offsets: its axes within a slice.
      targets: axes of the array that the indices are of, in their order.
      batching: (axis of the array, axis of the indices) that go together.
      dropped: axes of the array that a slice does not have.
    """

    def __init__(self, shape: Any, offsets: Any, targets: Any, batching: Any, dropped: Any):
        self.targets, self.dropped = list(targets), dropped
        rank = len(shape)
        batch = [axis for axis in range(rank) if axis not in offsets]
        self.spread = [shape[axis] if axis in batch else 1 for axis in range(rank)]

        def along(axis: int) -> np.ndarray:
            lengths = [shape[axis] if i == axis else 1 for i in range(rank)]
            return np.arange(shape[axis]).reshape(lengths)

        self.offsets = [along(axis) for axis in offsets]
        self.batches = {own: along(batch[other]) for own, other in batching}

    def __call__(
        self, shape: Any, indices: Any, sizes: Any
    ) -> tuple[tuple[np.ndarray, ...], np.ndarray | None]:
        """An index for each axis of an array; whether it lies inside, None if all do."""
        window, places, is_inside = iter(self.offsets), [], None
        for axis, (length, size) in enumerate(zip(shape, sizes, strict=True)):
            place: Any = self.batches.get(axis, 0)
            if axis in self.targets:
                start = indices[..., self.targets.index(axis)].reshape(self.spread)
                place = np.minimum(np.maximum(start, 0), length - size)
                inside = place == start
                if not inside.all():
                    is_inside = inside if is_inside is None else is_inside & inside
            if axis not in self.dropped:
                place = place + next(window)
            places.append(place)
        return tuple(places), is_inside


INDEXING: dict[str, Rule] = {
    "gather": _gather,
    "scatter": functools.partial(_scatter, adds=False),
    "scatter-add": functools.partial(_scatter, adds=True),
    "scatter_add": functools.partial(_scatter, adds=True),
}
