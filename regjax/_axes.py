"""What the axes of one array of parameters are for: what a user says of them, and all of them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax import _checks, _selection

_Tree: TypeAlias = Any  # `_base` stands on this file
Layouts: TypeAlias = Any
"""A `Layout`, a tree of them like the parameters or an upper part of it (None: guessed), a function
params -> such a tree, or None."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Layout:
    """Says what the axes of an array of parameters are for.

    A kernel of flax, (inputs, outputs), is `Layout(inputs=0, outputs=1)`, a kernel of Equinox
    `Layout(inputs=1, outputs=0)`. `Layout(stack=0)` is what `nnx.scan` and `nnx.vmap` make: axis 0
    counts the layers, and each index is the array of one layer. MaxText makes `Layout(stack=1)`.

    Every other axis belongs to the inputs or to the outputs. If one of the two is named, the rest
    belongs to the other. If neither is named, the outputs are the last axis, or what flax, Keras,
    Haiku and Equinox have there under the name of the array (heads and features of attention, say).

    A tree of layouts need not name each array: a layout for an upper part of the tree holds for all
    below. A layout is a pytree without leaves, so that it passes through `jax.jit`.

    Example:
      >>> params = {"layers": {"kernel": jnp.ones((4, 3, 3)), "bias": jnp.ones((4, 3))}}
      >>> layout = {"layers": regjax.Layout(stack=0)}  # four layers in each array
      >>> squares = lambda params: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
      >>> hessian = curvature.hessian(squares, params)
      >>> print(list(curvature.by_block(hessian, depth=2, layout=layout)))
      ['layers/0', 'layers/1', 'layers/2', 'layers/3']

    Attributes:
      stack: axes of layers, or of experts, from the outer one to the inner one; () for none.
      inputs: axes that a unit sums over; None: what is left.
      outputs: axes of the units, whose weights are the filters; None: what is left.

    Raises:
      TypeError: an axis is not an integer.
      ValueError: an axis is named twice.
    """

    stack: int | tuple[int, ...] = ()
    inputs: int | tuple[int, ...] | None = None
    outputs: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Turns single axes into tuples."""
        seen: list[int] = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.name != "stack":
                continue
            axes = tuple(value) if isinstance(value, (tuple, list)) else (value,)
            for axis in axes:
                _checks.integer(field.name, axis, minimum=None)
                if axis in seen:
                    raise ValueError(f"`{field.name}` must name no axis twice, got {axis} again.")
                seen.append(axis)
            object.__setattr__(self, field.name, tuple(int(axis) for axis in axes))


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of one array, all of them, each once and from 0.

    Attributes:
      stack: axes of layers.
      inputs: axes that a unit sums over; () for what is no kernel: biases, scales.
      outputs: axes of the units.
    """

    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def is_kernel(self) -> bool:
        """Tells whether there are filters: weights of several inputs to one unit."""
        return bool(self.inputs)

    @property
    def layer(self) -> tuple[int, ...]:
        """All axes but those of the stack, as they lie."""
        return tuple(sorted((*self.inputs, *self.outputs)))

    @property
    def units(self) -> tuple[int, ...]:
        """Axes of layers and of their units, as they lie: one filter for each index."""
        return tuple(sorted((*self.stack, *self.outputs)))

    def group(self, per_filter: bool) -> tuple[int, ...]:
        """Returns the axes of one group of weights: a filter of a kernel, else a layer's array."""
        return self.inputs if per_filter and self.inputs else self.layer

    def stack_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the numbers of layers, () without a stack."""
        return tuple(shape[axis] for axis in self.stack)

    def within(self) -> "Axes":
        """Returns the axes of one layer's array, without the stack."""
        at = {axis: place for place, axis in enumerate(self.layer)}
        rest = (tuple(at[axis] for axis in axes) for axes in (self.inputs, self.outputs))
        return Axes((), *rest)

    def over_stack(
        self, function: Callable[..., _Tree], *, outside: int = 0
    ) -> Callable[..., _Tree]:
        """Maps a function of one layer's arrays over the stack, as `jax.vmap` does.

        Args:
          function: of arrays that are laid out like this one, each without its stack.
          outside: number of leading axes of the stack that are mapped already.

        Returns:
          A function of the arrays with their stack; its results have the stack in front.
        """
        if outside == len(self.stack):
            return function
        inner = self.over_stack(function, outside=outside + 1)
        # The axes of the stack that are mapped already are gone.
        axis = self.stack[outside] - sum(a < self.stack[outside] for a in self.stack[:outside])
        return jax.vmap(inner, in_axes=axis)

    def spread(self, array: ArrayLike, shape: Sequence[int]) -> jax.Array:
        """Repeats an array with one number for each of `units` over the inputs."""
        return jnp.broadcast_to(jnp.expand_dims(jnp.asarray(array), self.inputs), shape)

    def over_layers(self, array: jax.Array) -> jax.Array:
        """Gives an array with one number for each layer the axes of the whole, to broadcast."""
        return self.restack(array.reshape((*array.shape, *[1] * len(self.layer))))

    def stack_first(self, array: jax.Array) -> jax.Array:
        """Brings the stack of an array that is so laid out to the front."""
        return jnp.moveaxis(array, self.stack, range(len(self.stack)))

    def restack(self, array: jax.Array) -> jax.Array:
        """Puts the stack of an array that has it in front back to where it belongs."""
        return jnp.moveaxis(array, range(len(self.stack)), self.stack)

    def single(self, name: str) -> "Axes":
        """Returns these axes if they are those of one layer, for what looks at a single one."""
        if self.stack:
            raise ValueError(
                f"`layout` must have no `stack` for one `{name}`, got {self.stack}: use jax.vmap "
                "over the layers."
            )
        return self

    def matrices(self, array: jax.Array) -> jax.Array:
        """Returns (layers, inputs, outputs), each of them flat, of an array that is so laid out."""
        order = (*self.stack, *self.inputs, *self.outputs)
        count = [1, 1, 1]
        for i, axes in enumerate((self.stack, self.inputs, self.outputs)):
            for axis in axes:
                count[i] *= array.shape[axis]
        return jnp.transpose(array, order).reshape(count)


def is_leaf(node: object) -> bool:
    """Tells whether a node of a tree of layouts is one of its leaves."""
    return node is None or isinstance(node, Layout)


def check(name: str, layout: object) -> None:
    """Checks the type of a layout: a `Layout`, a tree of them and of None, or a function."""
    if _selection.is_function(layout, is_leaf=is_leaf):
        return
    for leaf in jax.tree.leaves(layout, is_leaf=is_leaf):
        if leaf is not None and not isinstance(leaf, Layout):
            raise TypeError(
                f"`{name}` must be a regjax.Layout, a tree of them like `params`, or a function "
                f"that makes one, got {type(leaf).__name__}."
            )
