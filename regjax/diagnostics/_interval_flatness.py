"""How wide a minimum is: where the loss reaches a multiple of its value there."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike

from regjax import _checks, _chunks, _numerics
from regjax._arguments import checked
from regjax._base import LossFn, Params, Tree
from regjax._printing import legible
from regjax.diagnostics._surface import Path, walk


@legible
class FlatnessResult(NamedTuple):
    """The interval around a minimum in which the loss stays below a level.

    Attributes:
      left: (), the nearest negative distance along the direction at which the level is reached.
      right: (), the nearest positive one.
      interval_width: (), right - left.
      interval_width_error_bound: (), bound of the error of the width, from the brackets of both
        ends.
      converged: (), bool: the level was reached on both sides. If not, the other end is set to the
        largest distance, and the width is a lower bound.
    """

    left: jax.Array
    right: jax.Array
    interval_width: jax.Array
    interval_width_error_bound: jax.Array
    converged: jax.Array


@checked
def interval_flatness(
    loss_fn: LossFn,
    params: Params,
    direction: Params,
    *batch: Tree,
    max_distance: float,
    factor: ArrayLike = math.e,
    num_evaluations: int = 60,
    chunk_size: int | None = None,
) -> FlatnessResult:
    """Measures the interval along a direction in which the loss stays below a multiple of it.

        L(w + l p) = L(w + r p) = factor L(w),   l < 0 < r

    Here p is the unit vector of the direction, l and r are the nearest such points, and the width
    of the interval is r - l. Each side is searched outwards by doubling the distance, and then
    bisected: two crossings within one doubling can be missed.

    Example:
      >>> loss_fn = lambda w: 1.0 + jnp.sum(w**2)
      >>> params, direction = jnp.zeros(2), jnp.array([0.0, 1.0])
      >>> result = diagnostics.interval_flatness(
      ...     loss_fn, params, direction, max_distance=10.0, factor=2.0
      ... )
      >>> print(f"{result.left:.3f} {result.right:.3f} {result.interval_width:.3f}")
      -1.000 1.000 2.000

    Args:
      loss_fn: (params, *batch) -> scalar, the mean over the examples.
      params: tree of parameters, w, at a minimum or near one.
      direction: tree like `params`, of any length. The paper takes principal components of the
        trajectory.
      *batch: arrays with a leading axis of examples.
      max_distance: largest distance of the search, in units of the parameters.
      factor: multiple of the loss at `params`, above 1; e in the paper.
      num_evaluations: number of losses on each side, at most a third of them for the doubling.
      chunk_size: number of examples per pass; None: all at once.

    Returns:
      A `FlatnessResult`; NaN if the loss at `params` is not positive, the direction is zero, or one
      of them is not finite.

    Raises:
      ValueError: a number is out of its range, `direction` is another tree, or the loss is no
        scalar or cannot be split in chunks.

    References:
      Y. Feng, Y. Tu (2021), PNAS 118(9), doi 10.1073/pnas.2015617118, the definition of F.
    """
    loss_fn, chunk_size = _chunks.prepared(loss_fn, params, batch, chunk_size)
    _checks.floating_like("direction", direction, params)
    _checks.number("max_distance", max_distance, above_zero=True)
    _checks.integer("num_evaluations", num_evaluations, minimum=3)
    _checks.number("factor", factor, above_zero=True)
    known = _checks.host_value(factor)
    if known is not None and not (known > 1).all():
        raise ValueError(f"`factor` must be above 1, got {factor}.")
    start = _chunks.mean(loss_fn, params, batch, chunk_size)
    norm = _numerics.scaled_norm(direction)
    first = jnp.asarray(max_distance * 2.0 ** (1 - num_evaluations // 3), norm.dtype)
    is_defined = (start > 0) & (norm > 0) & jnp.isfinite(start) & jnp.isfinite(norm)
    ends, brackets, found = [], [], []
    for sign in (-1, 1):
        place = Partial(_along, params, direction, _numerics.divide(sign, norm))
        path = Path(loss_fn, place, batch, chunk_size)
        zero = jnp.zeros((), norm.dtype)
        limits = (start * factor, first, jnp.asarray(max_distance, norm.dtype))
        low, high, is_found = walk(
            _narrow, (zero, limits[2], jnp.bool_(False)), num_evaluations, (path, limits)
        )
        ends.append(sign * jnp.where(is_found, (low + high) / 2, limits[2]))
        brackets.append(jnp.where(is_found, (high - low) / 2, 0))
        found.append(is_found)
    left, right = (jnp.where(is_defined, end, jnp.nan) for end in ends)
    return FlatnessResult(
        left, right, right - left, brackets[0] + brackets[1], is_defined & found[0] & found[1]
    )


def _narrow(
    operands: tuple[Path, tuple[jax.Array, jax.Array, jax.Array]],
    bracket: tuple[jax.Array, jax.Array, jax.Array],
    i: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    path, (level, first, limit) = operands
    low, high, is_found = bracket
    outwards = jnp.minimum(jnp.where(low > 0, 2 * low, first), limit)
    distance = jnp.where(is_found, (low + high) / 2, outwards)
    is_above = ~(path.loss(distance) < level)  # an infinite loss, or NaN, is above
    return (
        jnp.where(is_above, low, distance),
        jnp.where(is_above, distance, high),
        is_found | is_above,
    )


def _along(params: Params, direction: Params, unit: jax.Array, distance: jax.Array) -> Params:
    return jax.tree.map(
        lambda w, d: (w + (unit * distance) * d.astype(unit.dtype)).astype(w.dtype),
        params,
        direction,
    )
