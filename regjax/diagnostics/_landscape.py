"""How far the loss and its gradient can be trusted along a step, and what other layers do to it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike

from regjax import _checks, _chunks, _loops, _numerics, _tree
from regjax._arguments import checked
from regjax._base import Batch, LossFn, Params, Tree
from regjax._printing import legible

_Pair: TypeAlias = tuple[jax.Array, jax.Array]


@legible
class LineProbeResult(NamedTuple):
    """The loss and its gradient along the negative gradient; S learning rates.

    Attributes:
      losses: (S,), L(w - s g). Their range is the variation of the loss.
      gradient_distances: (S,), ||grad L(w - s g) - g||. Their range tells how well the gradient
        predicts those along the step.
      smoothness: (S,), gradient_distances / (s ||g||). The largest is the effective smoothness. NaN
        if s ||g|| = 0. In float32 it is only rounding if s is far below the inverse curvature.
      loss: (), L(w).
      gradient_norm: (), ||g||.
    """

    losses: jax.Array
    gradient_distances: jax.Array
    smoothness: jax.Array
    loss: jax.Array
    gradient_norm: jax.Array


@legible
class CovariateShiftResult(NamedTuple):
    """How the gradient of each layer changes when the layers before it move.

    Attributes:
      distances: (num_layers,), ||G' - G||; 0 for the first layer.
      cosines: (num_layers,), of the angle between G' and G; 1 for the first layer, NaN at another
        where one of them is zero.
    """

    distances: jax.Array
    cosines: jax.Array


@checked
def line_probe(
    loss_fn: LossFn,
    params: Params,
    *batch: Tree,
    learning_rates: ArrayLike,
    chunk_size: int | None = None,
) -> LineProbeResult:
    """Measures how loss and gradient change along the next gradient step, on the same batch.

        losses = L(w - s g),   gradient_distances = ||grad L(w - s g) - g||,
        smoothness = gradient_distances / (s ||g||)

    for each learning rate s, with g = grad L(w), the gradient itself and not the direction of an
    optimiser. Costs S + 1 gradients for S learning rates.

    Example:
      >>> loss_fn = lambda w: 2.0 * w**2  # of curvature 4
      >>> rates = jnp.array([0.25, 0.5])
      >>> result = diagnostics.line_probe(loss_fn, jnp.array(1.0), learning_rates=rates)
      >>> print(result.losses, result.smoothness)
      [0. 2.] [4. 4.]

    Args:
      loss_fn: (params, *batch) -> scalar, the mean over the examples, in train mode for the
        landscape that training sees.
      params: tree of parameters, w.
      *batch: arrays with a leading axis of examples.
      learning_rates: (S,), s. The paper takes 1/2 to 4 times the learning rate of the training.
      chunk_size: number of examples per pass, for bounded memory; None: all at once.

    Returns:
      A `LineProbeResult`.

    Raises:
      ValueError: `learning_rates` is not a vector, or the loss is not a scalar or cannot be split
        into chunks.

    References:
      S. Santurkar, D. Tsipras, A. Ilyas, A. Madry (2018), arXiv:1805.11604, figure 4.
    """
    loss_fn, chunk_size = _chunks.prepared(loss_fn, params, batch, chunk_size)
    learning_rates = vector_of("learning_rates", learning_rates)
    differentiate = Partial(_value_and_grad, loss_fn)
    loss, gradient = _chunks.mean(differentiate, params, batch, chunk_size)

    zeros = jnp.zeros(learning_rates.shape, _tree.wide_dtype(loss))
    operands = (differentiate, params, gradient, learning_rates, batch)
    if chunk_size is None:
        losses, distances = _loops.scan(
            _probe, (zeros, zeros), len(zeros), operands=operands, unroll=True
        )
    else:
        losses, distances = _loops.scan(
            lambda _, found, i: _probe(operands, found, i, chunk_size), (zeros, zeros), len(zeros)
        )
    return _assessed(losses, distances, learning_rates, loss, gradient)


@checked
def internal_covariate_shift(
    loss_fn: LossFn,
    params: Params,
    other_params: Params,
    *batch: Tree,
    layers: Sequence[str | Sequence[str]],
    chunk_size: int | None = None,
) -> CovariateShiftResult:
    """Measures how much the gradient of each layer changes when the layers before it are updated.

        G = grad_i L(W_1, ..., W_k),   G' = grad_i L(W'_1, ..., W'_{i-1}, W_i, ..., W_k)

    for each layer i of k, on the same batch, with the weights W before a step and W' after it.
    Costs k gradients.

    Example:
      >>> loss_fn = lambda w: 0.5 * (w["first"] * w["second"]) ** 2
      >>> params = {"first": jnp.array(1.0), "second": jnp.array(2.0)}
      >>> other_params = {"first": jnp.array(2.0), "second": jnp.array(2.0)}
      >>> result = diagnostics.internal_covariate_shift(
      ...     loss_fn, params, other_params, layers=("first", "second")
      ... )
      >>> print(result.distances)  # the gradient of the second layer is 1^2 * 2, then 2^2 * 2
      [0. 6.]

    Args:
      loss_fn: (params, *batch) -> scalar, the mean over the examples, in train mode.
      params: tree of parameters, W.
      other_params: tree like `params`, W', after a step.
      *batch: arrays with a leading axis of examples.
      layers: the layers from the first to the last, each as the path of its sub-tree with keys
        joined by "/", or as several paths: ("layer_0", "head") or (("Dense_0", "BatchNorm_0"),
        "Dense_1"). Leaves of no layer are held at their old values.
      chunk_size: number of examples per pass; None: all at once.

    Returns:
      A `CovariateShiftResult`.

    Raises:
      TypeError: a parameter is not real floating point, or `layers` is not a tuple of paths.
      ValueError: a layer is not in the tree or shares a leaf with another one, `other_params` is
        another tree, or the loss is not a scalar or cannot be split into chunks.

    References:
      S. Santurkar, D. Tsipras, A. Ilyas, A. Madry (2018), arXiv:1805.11604, definition 2.1.
    """
    loss_fn, chunk_size = _chunks.prepared(loss_fn, params, batch, chunk_size)
    _checks.floating_like("other_params", other_params, params)
    places = _layer_numbers(params, layers)
    differentiate = Partial(_value_and_grad, loss_fn)
    loss, gradient = _chunks.mean(differentiate, params, batch, chunk_size)

    # Nothing before the first layer moves.
    zeros = jnp.zeros(len(layers), _tree.wide_dtype(loss))
    found, num_others = (zeros, zeros.at[0].set(1)), len(layers) - 1
    operands = (differentiate, params, other_params, gradient, batch)
    shift = _Shift(places, chunk_size)
    if chunk_size is None:
        found = _loops.scan(shift, found, num_others, operands=operands, unroll=True)
    else:
        found = _loops.scan(lambda _, found, i: shift(operands, found, i), found, num_others)
    return CovariateShiftResult(*found)


def vector_of(name: str, values: ArrayLike) -> jax.Array:
    """Returns `values` as a vector of at least one finite number."""
    if not isinstance(values, (jax.Array, np.ndarray, list, tuple, float, int)):
        raise TypeError(f"`{name}` must be a vector of numbers, got {type(values).__name__}.")
    array = values if isinstance(values, jax.Array) else jnp.asarray(np.asarray(values))
    _checks.finite_tree(name, _checks.real(name, array))
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"`{name}` must be a vector with at least one entry, got {array.shape}.")
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(float)


def _value_and_grad(loss_fn: Partial, params: Params, *batch: Tree) -> tuple[jax.Array, Params]:
    return jax.value_and_grad(lambda p: loss_fn(p, *batch))(params)


@jax.jit
def _assessed(
    losses: jax.Array,
    distances: jax.Array,
    learning_rates: jax.Array,
    loss: jax.Array,
    gradient: Params,
) -> LineProbeResult:
    norm = _numerics.scaled_norm(gradient)
    lengths = learning_rates.astype(norm.dtype) * norm
    smoothness = _numerics.divide(distances, lengths, otherwise=jnp.nan)
    return LineProbeResult(losses, distances, smoothness, _tree.wide(loss), norm)


def _probe(
    operands: tuple[Partial, Params, Params, jax.Array, Batch],
    found: _Pair,
    i: jax.Array,
    chunk_size: int | None = None,
) -> _Pair:
    differentiate, params, gradient, learning_rates, batch = operands
    losses, distances = found
    moved = jax.tree.map(lambda w, g: w - learning_rates[i].astype(w.dtype) * g, params, gradient)
    loss, there = _chunks.mean(differentiate, moved, batch, chunk_size)
    distance = _numerics.scaled_norm(jax.tree.map(jnp.subtract, there, gradient))
    return losses.at[i].set(loss.astype(losses.dtype)), distances.at[i].set(distance)


@dataclasses.dataclass(frozen=True)
class _Shift:
    """How the gradient of layer i + 1 changes when the layers before it move.

    Static, so that the compiler leaves out gradients of other layers and sums of their zeros.

    Attributes:
      places: the number of each leaf's layer, -1 for none.
      chunk_size: number of examples per pass; None: all at once.
    """

    places: tuple[int, ...]
    chunk_size: int | None

    def __call__(
        self, operands: tuple[Partial, Params, Params, Params, Batch], found: _Pair, i: jax.Array
    ) -> _Pair:
        i = i + 1
        differentiate, params, other_params, gradient, batch = operands
        distances, cosines = found
        places = jax.tree.unflatten(jax.tree.structure(params), self.places)
        mixed = jax.tree.map(
            lambda new, old, place: jnp.where((place >= 0) & (place < i), new, old),
            other_params,
            params,
            places,
        )
        _, there = _chunks.mean(differentiate, mixed, batch, self.chunk_size)
        old, new = (
            jax.tree.map(lambda leaf, place: jnp.where(place == i, leaf, 0), tree, places)
            for tree in (gradient, there)
        )
        distance = _numerics.scaled_norm(jax.tree.map(jnp.subtract, new, old))
        cosine = jnp.where(_is_any(new) & _is_any(old), _numerics.cosine(new, old), jnp.nan)
        return distances.at[i].set(distance), cosines.at[i].set(cosine)


def _is_any(tree: Tree) -> jax.Array:
    """Tells whether a tree holds anything but zeros."""
    return functools.reduce(jnp.logical_or, [jnp.any(leaf != 0) for leaf in jax.tree.leaves(tree)])


def _layer_numbers(params: Params, layers: Sequence[str | Sequence[str]]) -> tuple[int, ...]:
    """Returns the number of each leaf's layer, -1 for none."""
    if not isinstance(layers, (tuple, list)):
        raise TypeError(f"`layers` must be a tuple of paths, got {layers!r}.")
    owners = [
        (path, i)
        for i, layer in enumerate(layers)
        for path in ([layer] if isinstance(layer, str) else layer)
    ]
    numbers, seen = [], set()
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        own = [owner for owner in owners if f"{name}/".startswith(f"{owner[0]}/")]
        if len(own) > 1:
            raise ValueError(f"`layers` must be disjoint, got {name} in more than one.")
        numbers.append(own[0][1] if own else -1)
        seen |= {path for path, _ in own}
    missing = sorted({path for path, _ in owners} - seen)
    if missing or not owners:
        known = list(params) if isinstance(params, dict) else jax.tree.structure(params)
        raise ValueError(
            f"`layers` must be paths in the parameters, such as {known}, got "
            f"{missing[0] if missing else 'none'!r}."
        )
    return tuple(numbers)
