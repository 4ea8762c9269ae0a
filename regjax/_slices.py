"""The parameters taken apart into layers: stacked ones as if each had arrays of its own.

A part of a stacked array is an index into it, and its path has the index where the stack begins,
as "blocks/3/attention/kernel".
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from regjax import _layout_guess, _layouts
from regjax._axes import Axes, Layouts
from regjax._base import Params

Where: TypeAlias = tuple[tuple[int, int], ...]
"""(axis, index) of each axis of an array that is looked up; () for the whole array."""


class Part(NamedTuple):
    """An array, or one layer's slice of it.

    Attributes:
      leaf: number of the array among the leaves.
      where: what is looked up.
      path: in parts, with the indices of the layers in it.
    """

    leaf: int
    where: Where
    path: tuple[str, ...]

    @property
    def name(self) -> str:
        """The path as one word."""
        return "/".join(self.path)


def parts(
    params: Params, layout: Layouts, depth: int | None = None, chosen: Sequence[bool] | None = None
) -> list[Part]:
    """Lists the layers' arrays, in the order of the leaves.

    Args:
      params: tree of arrays.
      layout: what their axes are for.
      depth: number of parts of the path that matter: what is looked up behind them stays whole.
        None: all of them.
      chosen: the leaves whose axes have to be known, as in `_layouts.of_leaves`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = [
        tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path) for path, _ in leaves
    ]
    axes = _layouts.of_leaves(layout, params, chosen)
    stacks = [own.stack_shape(jnp.shape(leaf)) for own, (_, leaf) in zip(axes, leaves, strict=True)]
    found = []
    for i, (path, own) in enumerate(zip(names, axes, strict=True)):
        places = _places(i, names, stacks)
        found += [Part(i, *one) for one in _of_leaf(path, own, stacks[i], places, depth)]
    return found


def _of_leaf(
    path: tuple[str, ...],
    axes: Axes,
    lengths: Sequence[int],
    places: Sequence[int],
    depth: int | None,
) -> list[tuple[Where, tuple[str, ...]]]:
    """Lists the parts of one array: what is looked up, and the path."""
    found: list[tuple[Where, tuple[str, ...]]] = [((), path)]
    for number, (axis, length, place) in enumerate(zip(axes.stack, lengths, places, strict=True)):
        at = place + number  # behind the indices that are in the path already
        if depth is not None and at >= depth:
            break
        found = [
            ((*where, (axis, i)), (*own[:at], str(i), *own[at:]))
            for where, own in found
            for i in range(length)
        ]
    return found


def _places(
    leaf: int, names: Sequence[tuple[str, ...]], stacks: Sequence[tuple[int, ...]]
) -> list[int]:
    """Finds how many names stand before each index: all arrays below share the stack from there."""
    places: list[int] = []
    for number in range(len(stacks[leaf])):
        shared = stacks[leaf][: number + 1]
        place = places[-1] if places else 0
        while not all(
            stack[: number + 1] == shared
            for path, stack in zip(names, stacks, strict=True)
            if path[:place] == names[leaf][:place]
        ):
            place += 1
        places.append(_behind_container(leaf, names, place))
    return places


def _behind_container(leaf: int, names: Sequence[tuple[str, ...]], place: int) -> int:
    """Moves the place of an index behind a container that alone stands there, as "net/layers"."""
    own = names[leaf]
    below = [path for path in names if path[:place] == own[:place]]
    shared = place
    while not (shared and _layout_guess.CONTAINERS.match(own[shared - 1])):
        if not all(len(path) > shared + 1 and path[shared] == own[shared] for path in below):
            is_alone = place == 0 and shared > 0
            return 1 if is_alone else place
        shared += 1
    return shared


def take(array: jax.Array, where: Where, *, leading: int = 0) -> jax.Array:
    """Looks up a part of an array, perhaps behind leading axes."""
    for axis, index in sorted(where, reverse=True):
        array = lax.index_in_dim(array, index, axis + leading, keepdims=False)
    return array


def put(array: jax.Array, where: Where, part: jax.Array, *, leading: int = 0) -> jax.Array:
    """Puts a part back into an array, perhaps behind leading axes."""
    if not where:
        return part
    index: list[int | slice] = [slice(None)] * array.ndim
    for axis, i in where:
        index[axis + leading] = i
    return array.at[tuple(index)].set(part)
