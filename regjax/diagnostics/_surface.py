"""The loss along lines and over planes of parameter space."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike

from regjax import _checks, _chunks, _layouts, _loops, _numerics, _tree
from regjax._arguments import checked
from regjax._axes import Axes, Layouts
from regjax._base import Batch, LossFn, Params, PRNGKey, Tree
from regjax.diagnostics._landscape import vector_of

_Carry = TypeVar("_Carry")


@checked
def filter_normalized_direction(
    params: Params, *, key: PRNGKey, per_filter: bool = True, layout: Layouts = None
) -> Params:
    """Draws a random direction in which each filter is as long as in the parameters.

        d_r / ||d_r|| ||w_r||   for each filter r

    with a normal draw d and the parameters w. So networks whose filters have different scales can
    be compared. The direction is zero for biases and for the parameters of normalizations.

    Layer i of L stacked layers has the draw that it would have alone with the key
    `jax.random.split(key, L)[i]`, as under `jax.vmap`.

    Example:
      >>> params = {"kernel": jnp.array([[3.0], [4.0]]), "bias": jnp.array([1.0])}
      >>> direction = diagnostics.filter_normalized_direction(params, key=jax.random.key(0))
      >>> print(f"{jnp.linalg.norm(direction['kernel']):.3f}", direction["bias"])
      5.000 [0.]

    Args:
      params: tree of parameters.
      key: typed key of the draw.
      per_filter: True: filters are the output channels. False: each kernel of a layer is one
        filter, as is usual for dense networks.
      layout: which axes of the leaves are channels, and which stack layers (`regjax.Layout`); None:
        a guess, which for plain kernels is that the channels are last.

    Returns:
      A tree like `params`.

    Raises:
      ValueError: `layout` must tell the axes of a leaf, or names axes that a leaf does not have.
      TypeError: a parameter is not real floating point, or `key` is not a typed key.

    References:
      H. Li, Z. Xu, G. Taylor, C. Studer, T. Goldstein (2018), arXiv:1712.09913; for a leaf as one
      filter Z. Zhang, Z. Xu (2024), arXiv:2207.05952.
    """
    _checks.floating_tree("params", params)
    leaves, treedef = jax.tree.flatten(params)
    _checks.key("key", key)
    directions = [
        _scaled_like(leaf, axes, functools.partial(_draw, key, i, len(leaves)), per_filter)
        for i, (leaf, axes) in enumerate(
            zip(leaves, _layouts.of_leaves(layout, params), strict=True)
        )
    ]
    return jax.tree.unflatten(treedef, directions)


@checked
def interpolate(
    loss_fn: LossFn,
    params: Params,
    other_params: Params,
    *batch: Tree,
    positions: ArrayLike,
    chunk_size: int | None = None,
) -> jax.Array:
    """Computes the loss on the line through two points.

        L((1 - t) params + t other_params)

    Example:
      >>> loss_fn = lambda w: w**2
      >>> start, end = jnp.array(0.0), jnp.array(2.0)
      >>> print(diagnostics.interpolate(loss_fn, start, end, positions=[0.0, 0.5, 1.0, 1.5]))
      [0. 1. 4. 9.]

    Args:
      loss_fn: (params, *batch) -> scalar, the mean over the examples.
      params: tree of parameters.
      other_params: tree like `params`.
      *batch: arrays with a leading axis of examples.
      positions: (len,), t: 0 is at `params`, 1 at `other_params`.
      chunk_size: number of examples per pass, for bounded memory; None: all at once.

    Returns:
      Losses (len,), in the widest type of the parameters, float32 at least.

    Raises:
      ValueError: `other_params` is another tree, `positions` is not a vector, or the loss is not a
        scalar or cannot be split into chunks.
    """
    loss_fn, chunk_size = _chunks.prepared(loss_fn, params, batch, chunk_size)
    _checks.floating_like("other_params", other_params, params)
    positions = vector_of("positions", positions)
    place = Partial(_between, params, other_params, positions)
    return _losses(loss_fn, place, len(positions), batch, chunk_size)


@checked
def loss_surface(
    loss_fn: LossFn,
    params: Params,
    direction: Params,
    other_direction: Params,
    *batch: Tree,
    positions: ArrayLike,
    chunk_size: int | None = None,
) -> jax.Array:
    """Computes the loss over a plane.

        L(params + a direction + b other_direction)

    Costs one forward pass per point, and memory for one more copy of the parameters.

    Example:
      >>> loss_fn = lambda w: w[0] ** 2 + 10.0 * w[1] ** 2
      >>> one, other = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
      >>> positions = jnp.array([-1.0, 0.0, 2.0])
      >>> print(diagnostics.loss_surface(loss_fn, jnp.zeros(2), one, other, positions=positions))
      [[11.  1. 41.]
       [10.  0. 40.]
       [14.  4. 44.]]

    Args:
      loss_fn: (params, *batch) -> scalar, the mean over the examples.
      params: tree of parameters, the origin.
      direction: tree like `params`, such as one from `filter_normalized_direction`.
      other_direction: another such tree.
      *batch: arrays with a leading axis of examples.
      positions: (len,), the values of both a and b, in units of the directions.
      chunk_size: number of examples per pass, for bounded memory; None: all at once.

    Returns:
      Losses (len, len), the first axis is a, the second b; in the widest type of the parameters,
      float32 at least.

    Raises:
      ValueError: a direction is another tree, `positions` is not a vector, or the loss is not a
        scalar or cannot be split into chunks.

    References:
      H. Li, Z. Xu, G. Taylor, C. Studer, T. Goldstein (2018), arXiv:1712.09913.
    """
    loss_fn, chunk_size = _chunks.prepared(loss_fn, params, batch, chunk_size)
    _checks.floating_like("direction", direction, params)
    _checks.floating_like("other_direction", other_direction, params)
    positions = vector_of("positions", positions)
    place = Partial(_on_plane, params, direction, other_direction, positions)
    losses = _losses(loss_fn, place, len(positions) ** 2, batch, chunk_size)
    return losses.reshape(len(positions), len(positions))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["loss_fn", "place", "batch"],
    meta_fields=["chunk_size"],
)
@dataclasses.dataclass(frozen=True)
class Path:
    """The loss at the points that `place` gives."""

    loss_fn: LossFn
    place: Partial
    batch: Batch
    chunk_size: int | None

    def loss(self, point: jax.Array) -> jax.Array:
        return _chunks.mean(self.loss_fn, self.place(point), self.batch, self.chunk_size)


def _losses(
    loss_fn: LossFn, place: Partial, num_points: int, batch: Batch, chunk_size: int | None
) -> jax.Array:
    path = Path(loss_fn, place, batch, chunk_size)
    dtype = _tree.vector_dtype(place.args[0])
    return walk(_evaluate, jnp.zeros(num_points, dtype), num_points, path)


def walk(
    body: Callable[[Tree, _Carry, jax.Array], _Carry], carry: _Carry, length: int, operands: Tree
) -> _Carry:
    """Runs `_loops.scan` over `operands`, a `Path` or a tuple that begins with one.

    Where every point goes over chunks, the host takes the points if it can, and the chunks' loop is
    compiled, or the host's too.
    """
    path = operands if isinstance(operands, Path) else operands[0]
    if path.chunk_size is None:
        return _loops.scan(body, carry, length, operands=operands)
    return _loops.scan(lambda _, carry, i: body(operands, carry, i), carry, length)


def _evaluate(path: Path, losses: jax.Array, i: jax.Array) -> jax.Array:
    return losses.at[i].set(path.loss(i).astype(losses.dtype))


def _between(params: Params, other_params: Params, positions: jax.Array, i: jax.Array) -> Params:
    return _numerics.between(params, other_params, positions[i])


def _on_plane(
    params: Params,
    direction: Params,
    other_direction: Params,
    positions: jax.Array,
    i: jax.Array,
) -> Params:
    a, b = positions[i // len(positions)], positions[i % len(positions)]
    return jax.tree.map(
        lambda w, d, e: (
            w + a.astype(w.dtype) * d.astype(w.dtype) + b.astype(w.dtype) * e.astype(w.dtype)
        ),
        params,
        direction,
        other_direction,
    )


def _draw(key: PRNGKey, number: int, num_leaves: int, weights: jax.Array, axes: Axes) -> jax.Array:
    """Draws normal numbers for a leaf, layer by layer with the keys that `jax.vmap` would give."""
    dtype, layer = _tree.wide_dtype(weights), [weights.shape[axis] for axis in axes.layer]

    def draw(key: PRNGKey, lengths: Sequence[int]) -> jax.Array:
        if lengths:
            keys = jax.random.split(key, lengths[0])
            return jax.vmap(lambda own: draw(own, lengths[1:]))(keys)
        return jax.random.normal(jax.random.split(key, num_leaves)[number], layer, dtype)

    return axes.restack(draw(key, axes.stack_shape(weights.shape)))


def _scaled_like(
    weights: jax.Array,
    axes: Axes,
    draw: Callable[[jax.Array, Axes], jax.Array],
    per_filter: bool,
) -> jax.Array:
    if not axes.is_kernel:
        return jnp.zeros_like(weights)
    weights, group = jnp.asarray(weights), axes.group(per_filter)
    drawn = draw(weights, axes)
    norms = [_numerics.norms_along(_tree.wide(a), group) for a in (weights, drawn)]
    return (drawn * (norms[0] / norms[1])).astype(weights.dtype)
