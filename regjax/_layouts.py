"""Which entries of the parameters make one filter, and which layer they belong to.

Whoever normalises, rescales, prunes or draws filters asks here. A user says it once, as `layout`;
what is not said is guessed (`_layout_guess.py`) or refused.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from regjax import _axes, _checks, _layout_guess, _selection
from regjax._arguments import checked
from regjax._axes import Axes, Layouts
from regjax._axes import Layout as Layout
from regjax._base import Params, Tree


def of_leaves(layout: Layouts, params: Params, chosen: Sequence[bool] | None = None) -> list[Axes]:
    """Finds the axes of each leaf of `params`.

    Args:
      layout: as the user gives it.
      params: tree of arrays.
      chosen: the leaves whose axes have to be known; None: all. Others may get a plain guess.

    Raises:
      TypeError: `layout` holds other things than `Layout`s.
      ValueError: it is no upper part of the tree, a leaf has not the axes that it names, or the
        axes of a chosen leaf cannot be guessed.
    """
    if _selection.is_function(layout, is_leaf=_axes.is_leaf):
        layout = layout(params)
    _axes.check("layout", layout)
    leaves, given = (
        _layout_guess.leaves_of(params),
        _checks.prefix_leaves("layout", layout, params, is_leaf=_axes.is_leaf),
    )
    said = [
        _validated(f"params{leaf.label}", one, leaf.shape)
        for leaf, one in zip(leaves, given, strict=True)
    ]
    for leaf, axes in zip(leaves, said, strict=True):
        leaf.said = leaf.said if axes is None else axes[0]
    _layout_guess.find_stacks(leaves)
    wanted = [True] * len(leaves) if chosen is None else chosen
    for leaf, axes, want in zip(leaves, said, wanted, strict=True):
        if want and axes is None and leaf.is_unknown:
            raise ValueError(_layout_guess.unknown(leaf))
    are_first = _layout_guess.outputs_first(leaves)
    return [_completed(leaf, axes, are_first) for leaf, axes in zip(leaves, said, strict=True)]


def of_array(name: str, layout: Layout | None, array: jax.Array) -> Axes:
    """Finds the axes of the single array that is the argument `name`; outputs last for None."""
    if layout is not None and not isinstance(layout, Layout):
        raise TypeError(f"`layout` must be one regjax.Layout, got {type(layout).__name__}.")
    shape = jnp.shape(array)
    leaf = _layout_guess.Leaf("", ("kernel",), shape, None)
    said = _validated(name, layout or Layout(), shape)
    leaf.stack = said[0] if said else ()
    return _completed(leaf, said, False)


@checked
def guess_layout(
    params: Params,
    module: object = None,
    *,
    stack: Mapping[str, int | tuple[int, ...]] | None = None,
) -> Tree:
    """Guesses what the axes of the parameters are for, from what is known of their layers.

    What the layers of `module` (or of an Equinox module as parameters) say of their arrays is
    certain, and so is what flax's metadata name, such as an axis "layers" or "experts". Otherwise
    the guess goes by the names that flax, Keras, Haiku and Equinox give to arrays: a bias with two
    axes beside a kernel with three belongs to a stack of layers or to attention heads, and the
    lengths say which. A kernel without a bias may be either; `stack` then says which:

        regjax.guess_layout(params, stack={"decoder/layers": 1})

    All below "decoder/layers" is stacked along axis 1, as in MaxText. Of two such paths the lower
    one counts: experts in a stack have (0, 1) there.

    Example:
      >>> params = {"layers": {"kernel": jnp.ones((4, 8, 16)), "bias": jnp.ones((4, 16))}}
      >>> print(regjax.guess_layout(params)["layers"]["kernel"])
      Layout(stack=(0,), inputs=(1,), outputs=(2,))

    Args:
      params: tree of arrays, with flax's metadata if there are any.
      module: the nnx module that they belong to, whose layers know their sizes; None: names tell.
      stack: the axes of the stack of all that is below a path, such as "encoder/layers"; () for
        what is none. "" is the whole tree.

    Returns:
      A tree like `params` of `Layout`s that name all axes, to be given as `layout`; None where the
      axes cannot be guessed. A function that needs them there refuses the parameters.

    Raises:
      ValueError: a path of `stack` is none in the tree, or an axis is not there or is named twice.
      TypeError: an axis is not an integer, or a parameter is not real floating point.

    References:
      optax has `MuonDimensionNumbers` for the same purpose; the form with the guess is ours.
    """
    leaves = _layout_guess.leaves_of(params, module)
    places = {path: Layout(axes) for path, axes in (stack or {}).items()}
    for path, layout in sorted(places.items(), key=lambda item: len(item[0])):
        parts = tuple(path.strip("/").split("/")) if path.strip("/") else ()
        below = [leaf for leaf in leaves if leaf.names[: len(parts)] == parts]
        if not below:
            top = sorted({"/".join(leaf.names[: max(len(parts), 1)]) for leaf in leaves})
            raise ValueError(
                f"`stack` must hold paths of `params`, got {path!r}, where nothing is; there are "
                f"{', '.join(top[:8])}."
            )
        for leaf in below:
            found = _validated(f"params{leaf.label}", layout, leaf.shape)
            leaf.said = None if found is None else found[0]
    return _guessed(params, leaves)


def of_model(params: Params, module: object = None) -> Tree:
    """Guesses the layout of a model's parameters, as far as it is known."""
    return _guessed(params, _layout_guess.leaves_of(params, module))


def _guessed(params: Params, leaves: list[_layout_guess.Leaf]) -> Tree:
    _layout_guess.find_stacks(leaves)
    are_first = _layout_guess.outputs_first(leaves)
    axes = [None if leaf.is_unknown else _completed(leaf, None, are_first) for leaf in leaves]
    layouts = [None if one is None else Layout(one.stack, one.inputs, one.outputs) for one in axes]
    return jax.tree.unflatten(jax.tree.structure(params), layouts)


_Named: TypeAlias = tuple[tuple[int, ...], tuple[int, ...] | None, tuple[int, ...] | None]


def _validated(name: str, layout: Layout | None, shape: Sequence[int]) -> _Named | None:
    """Returns the axes that a layout names, from 0, if an array of this shape has them."""
    if layout is None:
        return None
    ndim, named, seen = len(shape), [], []
    for field in dataclasses.fields(layout):
        axes: tuple[int, ...] | None = getattr(layout, field.name)
        for axis in axes or ():
            if not -ndim <= axis < ndim:
                raise ValueError(
                    f"`layout` must name axes that are there: `{field.name}` has {axis} for "
                    f"`{name}` of shape {tuple(shape)}."
                )
            if axis % ndim in seen:
                raise ValueError(
                    f"`layout` must name no axis twice, got {axis} twice for `{name}` of shape "
                    f"{tuple(shape)}."
                )
            seen.append(axis % ndim)
        named.append(None if axes is None else tuple(axis % ndim for axis in axes))
    stack, inputs, outputs = named
    left = [axis for axis in range(ndim) if axis not in seen]
    if left and inputs is not None and outputs is not None:
        raise ValueError(
            f"`layout` must name every axis or leave `inputs` or `outputs` out, got none for axis "
            f"{left[0]} of `{name}` of shape {tuple(shape)}."
        )
    return stack or (), inputs, outputs


def _completed(leaf: _layout_guess.Leaf, named: _Named | None, are_first: bool) -> Axes:
    """Finds all axes of an array from those that are named and those that are guessed."""
    stack, inputs, outputs = (leaf.stack, None, None) if named is None else named
    if inputs is None and outputs is None:
        outputs = _layout_guess.units(leaf, are_first)
    taken = {*stack, *(inputs or ()), *(outputs or ())}
    rest = tuple(axis for axis in range(len(leaf.shape)) if axis not in taken)
    if inputs is None and leaf.is_vector and all(leaf.shape[axis] == 1 for axis in rest):
        inputs, outputs = (), (*(outputs or ()), *rest)  # a bias with axes for the broadcast
    return Axes(stack, rest if inputs is None else inputs, rest if outputs is None else outputs)
