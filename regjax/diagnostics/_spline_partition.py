"""The pieces on which a ReLU network is linear: how far their boundaries are, and how many.

A unit's boundary is the zero set of its pre-activation h. Inside a piece all of them are linear in
the inputs, and |h| / ||grad h|| is a distance, exactly so for the boundaries of the piece itself.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike

from regjax import _checks, _chunks, _jacobian, _loops, _numerics, _tree
from regjax._arguments import checked
from regjax._base import Params, PRNGKey, Tree
from regjax._printing import legible

_WORD = 32  # units to a word of the sign pattern


@legible
class BoundaryDensityResult(NamedTuple):
    """How many boundaries pass near the examples.

    Attributes:
      shares: tree like the pre-activations, (): share of a layer's units whose boundary is within
        the radius, averaged over the examples; NaN if a distance is.
      shares_standard_error: tree like it, (): over the draw of the examples for this network; NaN
        with a single example.
      counts: (N,), int32: number of boundaries within the radius of each example, over all layers;
        -1 if a distance of the example is NaN.
    """

    shares: Tree
    shares_standard_error: Tree
    counts: jax.Array


@legible
class RegionCountResult(NamedTuple):
    """How many pieces a sample of points hit.

    Attributes:
      num_regions: (), int32: number of pieces that were hit, a lower bound of the pieces in the
        ball; -1 if a pre-activation is NaN or infinite.
      unseen_share: (), the share of the ball's volume in pieces that were not hit, estimated by the
        share of the points that are alone in their piece (Good and Turing). If it is near 1, the
        number of regions is just that of the samples. NaN if a pre-activation is not finite.
    """

    num_regions: jax.Array
    unseen_share: jax.Array


@checked
def boundary_distances(
    preactivations_fn: Callable[[Params, jax.Array], Tree],
    params: Params,
    inputs: jax.Array,
    *,
    chunk_size: int | None = None,
) -> Tree:
    """Computes the distance of each input from the boundary of each unit, in input space.

        d_k(x) = |h_k(x)| / ||grad_x h_k(x)||

    Here h_k is the pre-activation of unit k, whose boundary is the set where it is zero. The
    distance is exact for the first layer. For a deeper layer it is the distance from the hyperplane
    that continues the boundary from the linear piece around x, which is exact if no other boundary
    is closer. It is infinite where the gradient is zero: a unit that sees only dead units, or whose
    scale after batch norm is zero, has no boundary. Distances are in units of `inputs`, so that
    standardising the inputs changes them.

    Each layer costs one forward pass per coordinate of an input or one reverse pass per unit,
    whichever is less, and memory of coordinates times units for each example.

    Example:
      >>> preactivations_fn = lambda w, x: x @ w
      >>> w, inputs = jnp.array([[3.0], [4.0]]), jnp.array([[1.0, 1.0], [0.0, 0.0]])
      >>> print(diagnostics.boundary_distances(preactivations_fn, w, inputs).ravel())  # 7 / 5 and 0
      [1.4 0. ]

    Args:
      preactivations_fn: (params, inputs) -> tree of arrays (N, units...), such as a list with one
        array per layer: the pre-activations, after any normalization. Each row must be a function
        of its own example alone, so that batch norm needs stored statistics.
      params: tree of parameters.
      inputs: (N, ...), real floating point.
      chunk_size: number of examples per pass, for bounded memory; None: all at once.

    Returns:
      A tree like the pre-activations, (N, units...), in float32 at least.

    Raises:
      ValueError: the function couples the examples, or an array lacks their axis.
      TypeError: `inputs` or a pre-activation is not real floating point.

    References:
      R. Balestriero, R. Baraniuk (2022), arXiv:2209.14778. The formula is the usual one for
      piecewise linear functions.
    """
    check_preactivations("preactivations_fn", preactivations_fn, params, inputs)
    function = Partial(
        signed_distances, _chunks.fixed(preactivations_fn, params, inputs, chunk_size)
    )
    distances = _chunks.each(function, params, (inputs,), chunk_size)
    return jax.tree.map(jnp.abs, distances)


@checked
def boundary_density(
    preactivations_fn: Callable[[Params, jax.Array], Tree],
    params: Params,
    inputs: jax.Array,
    *,
    radius: ArrayLike,
    chunk_size: int | None = None,
) -> BoundaryDensityResult:
    """Counts the units whose boundary passes within a radius of the inputs.

        n_r(x) = #{k: d_k(x) < r},   d_k from `boundary_distances`

    A unit without a boundary counts as infinitely far. Compare a network on the data and away from
    them at the same radius, or several networks on the same data.

    Example:
      >>> preactivations_fn = lambda w, x: x @ w
      >>> w, inputs = jnp.array([[3.0], [4.0]]), jnp.array([[1.0, 1.0], [0.0, 0.0]])
      >>> result = diagnostics.boundary_density(preactivations_fn, w, inputs, radius=1.0)
      >>> print(result.shares, result.counts)
      0.5 [0 1]

    Args:
      preactivations_fn: (params, inputs) -> tree of arrays (N, units...): the pre-activations, each
        row a function of its own example alone.
      params: tree of parameters.
      inputs: (N, ...), real floating point.
      radius: r, (), positive, in the units of `inputs`.
      chunk_size: number of examples per pass; None: all at once.

    Returns:
      A `BoundaryDensityResult`.

    Raises:
      ValueError: `radius` is not positive, the function couples the examples, or an array lacks
        their axis.
      TypeError: `inputs` or a pre-activation is not real floating point.

    References:
      R. Balestriero, R. Baraniuk (2022), arXiv:2209.14778. This measure of density is ours.
    """
    _checks.number("radius", radius, above_zero=True)
    shapes = check_preactivations("preactivations_fn", preactivations_fn, params, inputs)
    fixed = _chunks.fixed(preactivations_fn, params, inputs, chunk_size)
    function = Partial(_near, fixed, jnp.asarray(radius))
    counts = _chunks.each(function, params, (inputs,), chunk_size)
    shares = jax.tree.map(
        lambda count, shape: jnp.where(count < 0, jnp.nan, count / (shape.size // len(inputs))),
        counts,
        shapes,
    )
    leaves, treedef = jax.tree.flatten(shares)
    means, errors = zip(*map(_numerics.mean_and_error, leaves), strict=True)
    return BoundaryDensityResult(
        jax.tree.unflatten(treedef, means),
        jax.tree.unflatten(treedef, errors),
        jax.tree.reduce(lambda a, b: jnp.where((a < 0) | (b < 0), -1, a + b), counts),
    )


@checked
def region_count(
    preactivations_fn: Callable[[Params, jax.Array], Tree],
    params: Params,
    center: jax.Array,
    *,
    key: PRNGKey,
    radius: ArrayLike,
    num_samples: int,
    chunk_size: int | None = None,
) -> RegionCountResult:
    """Counts the linear pieces hit by points drawn uniformly in a ball.

    A piece is the set of points with the same signs of all pre-activations. The count grows with
    the number of samples: compare values only at the same number.

    Example:
      >>> preactivations_fn = lambda w, x: x @ w  # two units, whose boundaries are the axes
      >>> result = diagnostics.region_count(
      ...     preactivations_fn, jnp.eye(2), jnp.zeros(2), key=jax.random.key(0), radius=1.0,
      ...     num_samples=100,
      ... )
      >>> print(result.num_regions, result.unseen_share)
      4 0.0

    Args:
      preactivations_fn: (params, inputs) -> tree of arrays (N, units...): the pre-activations, each
        row a function of its own example alone.
      params: tree of parameters.
      center: centre of the ball, one example without the axis of examples.
      key: typed key of the points, which do not depend on `chunk_size`.
      radius: radius of the ball, (), positive, in the units of the inputs.
      num_samples: number of points.
      chunk_size: number of points per pass; None: all at once.

    Returns:
      A `RegionCountResult`.

    Raises:
      ValueError: `radius` or `num_samples` is not positive, the function couples the examples, or
        an array lacks their axis.
      TypeError: `key` is not a typed key, or a pre-activation is not real floating point.

    References:
      I. Good (1953), Biometrika 40, for `unseen_share`. Counting by samples is ours.
    """
    _checks.number("radius", radius, above_zero=True)
    _checks.integer("num_samples", num_samples)
    _checks.key("key", key)
    center = _checks.finite_tree("center", _checks.floating_array("center", center))
    if not center.size:
        raise ValueError(f"`center` must hold at least one number, got shape {center.shape}.")
    points = _in_ball(key, center, radius, num_samples)
    check_preactivations("preactivations_fn", preactivations_fn, params, points)
    function = Partial(_patterns, _chunks.fixed(preactivations_fn, params, points, chunk_size))
    words, known = _chunks.each(function, params, (points,), chunk_size)
    ranks = _loops.scan(_refined, jnp.zeros(num_samples, jnp.int32), words.shape[1], operands=words)
    sizes = jnp.bincount(ranks, length=num_samples)
    alone = jnp.mean(sizes == 1, dtype=_tree.wide_dtype(points))
    return RegionCountResult(
        jnp.where(jnp.all(known), jnp.max(ranks) + 1, -1),
        jnp.where(jnp.all(known), alone, jnp.nan),
    )


def signed_distances(function: Partial, params: Params, inputs: jax.Array) -> Tree:
    """Computes signed h / ||grad h|| of each unit of a chunk; infinite ones have h's sign too."""
    leaves, treedef = jax.tree.flatten(jax.eval_shape(function, params, inputs))

    def layer(i: int) -> Callable[[jax.Array], jax.Array]:
        return lambda x: jax.tree.leaves(function(params, x))[i]

    distances = [_distances(layer(i), inputs).reshape(leaf.shape) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(treedef, distances)


def check_preactivations(
    name: str, function: Callable[..., Tree], params: Params, inputs: jax.Array, *rest: Tree
) -> Tree:
    """Returns the shapes of the pre-activations, each with the axis of the examples."""
    _jacobian.check_model(name, function, inputs)
    shapes = jax.eval_shape(lambda *arguments: function(*arguments), params, inputs, *rest)
    for path, leaf in jax.tree_util.tree_leaves_with_path(_checks.floating_tree(name, shapes)):
        if leaf.ndim == 0 or leaf.shape[0] != len(inputs):
            raise ValueError(
                f"`{name}` must return arrays with the leading axis of its inputs, {len(inputs)}, "
                f"got shape {leaf.shape} at {jax.tree_util.keystr(path) or 'the top'}."
            )
    return shapes


def _distances(function: Callable[[jax.Array], jax.Array], inputs: jax.Array) -> jax.Array:
    """Computes signed distances (N, k) of the k outputs of one layer."""
    outputs = _jacobian.flat(function(inputs), len(inputs))
    if inputs[0].size < outputs.shape[1]:
        basis = jnp.eye(inputs[0].size, dtype=inputs.dtype)
        columns = _tree.wide(_jacobian.columns(function, inputs, basis))
        norms = _numerics.norms_along(columns, (0,))[0]
    else:
        rows = _tree.wide(_jacobian.rows(function, inputs)[1])
        norms = _numerics.norms_along(rows, (2,))[:, :, 0].T
    # What has overflown is at no known distance, and not at infinity.
    outputs = jnp.where(jnp.isfinite(outputs), _tree.wide(outputs), jnp.nan)
    return ratio(outputs, norms)


def ratio(values: jax.Array, norms: jax.Array) -> jax.Array:
    """Divides values by norms, infinite with the sign of the value where the norm is zero."""
    infinite = jnp.where(values < 0, -jnp.inf, jnp.inf)
    # A NaN is no zero; of either, it stays.
    return _numerics.divide(
        values, norms, otherwise=jnp.where(jnp.isnan(values), jnp.nan, infinite)
    )


def _near(function: Partial, radius: jax.Array, params: Params, inputs: jax.Array) -> Tree:
    """Counts the units of each layer within the radius, (N,) each; -1 where a distance is NaN."""

    def count(distances: jax.Array) -> jax.Array:
        distances = jnp.abs(distances).reshape(len(inputs), -1)
        near = jnp.sum(distances < radius.astype(distances.dtype), 1, dtype=jnp.int32)
        return jnp.where(jnp.any(jnp.isnan(distances), 1), -1, near)

    return jax.tree.map(count, signed_distances(function, params, inputs))


def _in_ball(key: PRNGKey, center: jax.Array, radius: ArrayLike, num_samples: int) -> jax.Array:
    direction_key, distance_key = jax.random.split(key)
    dtype = _tree.wide_dtype(center)
    directions = jax.random.normal(direction_key, (num_samples, center.size), dtype)
    directions = directions / jnp.linalg.norm(directions, axis=1, keepdims=True)
    # The volume within distance t is that of the ball times (t / radius)^d.
    uniform = jax.random.uniform(distance_key, (num_samples, 1), dtype)
    offsets = jnp.asarray(radius, dtype) * uniform ** (1 / center.size) * directions
    points = center[None] + offsets.reshape(num_samples, *center.shape)
    return points.astype(center.dtype)


def _patterns(function: Partial, params: Params, points: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Packs the signs of all pre-activations, as words (N, units / 32); and if all are finite."""
    layers = [layer.reshape(len(points), -1) for layer in jax.tree.leaves(function(params, points))]
    known = jnp.all(jnp.stack([jnp.all(jnp.isfinite(layer), 1) for layer in layers]), 0)
    bits = jnp.concatenate([layer > 0 for layer in layers], 1)
    bits = jnp.pad(bits, ((0, 0), (0, -bits.shape[1] % _WORD)))
    powers = jnp.uint32(1) << jnp.arange(_WORD, dtype=jnp.uint32)
    words = bits.reshape(len(points), -1, _WORD).astype(jnp.uint32)
    return jnp.sum(words * powers[None, None], 2, dtype=jnp.uint32), known


def _refined(words: jax.Array, ranks: jax.Array, i: jax.Array) -> jax.Array:
    """Ranks the patterns up to word i, from those of the patterns up to the one before."""
    order = jnp.lexsort((words[:, i], ranks))
    word, rank = words[order, i], ranks[order]
    is_new = (word[1:] != word[:-1]) | (rank[1:] != rank[:-1])
    sorted_ranks = jnp.pad(jnp.cumsum(is_new, dtype=jnp.int32), (1, 0))
    return ranks.at[order].set(sorted_ranks)
