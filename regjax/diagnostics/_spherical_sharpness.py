"""Sharpness of weights that have no scale.

Where a normalization divides the weights' scale out again, H(c w) = H(w) / c^2: an eigenvalue means
nothing without the norm, nor does a learning rate. On the unit sphere both do.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike

from regjax import _checks, _chunks, _loops, _numerics, _selection, _tree, curvature
from regjax._arguments import checked
from regjax._base import LossFn, Mask, Params, PRNGKey, Tree, Wrapper, as_partial
from regjax._printing import legible
from regjax.diagnostics._sharpness import SharpnessResult, largest_eigenvalue


@legible
class SphericalEdgeResult(NamedTuple):
    """The place of training relative to the edge of stability.

    Attributes:
      edge_ratio: (), effective learning rate times spherical sharpness: about 2 at the edge of
        stability, and below 2 if descent is stable. Its error is `effective_learning_rate` times
        `residual_norm`.
      effective_learning_rate: (), that of the step from `params`.
      sharpness: (), spherical sharpness at the midpoint of the two directions.
      residual_norm: (), some eigenvalue lies within it of `sharpness`.
      converged: (), bool: the residual norm is within the tolerance.
    """

    edge_ratio: jax.Array
    effective_learning_rate: jax.Array
    sharpness: jax.Array
    residual_norm: jax.Array
    converged: jax.Array


@checked
def spherical_sharpness(
    loss_fn: LossFn,
    params: Params,
    *batch: Tree,
    key: PRNGKey,
    mask: Mask = None,
    tangent: bool = False,
    max_matvecs: int = 50,
    tol: ArrayLike = 1e-3,
    chunk_size: int | None = None,
) -> SharpnessResult:
    """Finds the largest Hessian eigenvalue at unit norm of the weights that have no scale.

        ||w||^2 lambda_max(H(w)) = lambda_max(H(w / ||w||))

    H is the Hessian of the loss with respect to the masked leaves w, all of them together. The
    others are held constant. If the scale of w does not change the loss, the Hessian shrinks with
    the square of ||w||, and only this product is meaningful.

    Example:
      >>> def loss_fn(w):
      ...     direction = w / jnp.linalg.norm(w)
      ...     return direction[1] ** 2
      >>> for w in (jnp.array([1.0, 0.0]), jnp.array([10.0, 0.0])):  # the same at any length
      ...     result = diagnostics.spherical_sharpness(loss_fn, w, key=jax.random.key(0))
      ...     print(f"{result.value:.2f}")
      2.00
      2.00

    Args:
      loss_fn: (params, *batch) -> scalar, the mean over the examples, in train mode for batch norm.
      params: tree of parameters.
      *batch: arrays with a leading axis of examples.
      key: typed key of the random start.
      mask: the scale-invariant leaves, such as
        `scale_invariant_mask(...).mask`; None: all.
      tangent: whether to take P H P with P = I - w w' / ||w||^2, the Hessian on the sphere. At a
        minimum it makes no difference; elsewhere H(w) w = -grad L(w).
      max_matvecs: limit of the number of Hessian products.
      tol: relative tolerance: the residual norm over the largest magnitude of an eigenvalue.
      chunk_size: number of examples per pass, for bounded memory; None: all at once.

    Returns:
      A `SharpnessResult`, in units of the loss.

    Raises:
      ValueError: `mask` is another tree or chooses no leaf; the norm of w is so large or small that
        its curvature overflows (beyond 4e-19 to 2e18 in float32; NaN inside `jit`); a number is out
        of its range; or the loss is not a scalar or cannot be split into chunks.
      TypeError: `mask` holds anything but Python bools, a parameter is not real floating point, or
        `key` is not a typed key.

    References:
      K. Lyu, Z. Li, S. Arora (2022), arXiv:2206.07085. We derived the identities again.
    """
    displacement_loss, at = displaced(loss_fn, params, mask, tangent)
    of_direction, chunk_size = _chunks.prepared(displacement_loss, at, batch, chunk_size)
    hessian = curvature.hessian(of_direction, at, *batch, chunk_size=chunk_size)
    return largest_eigenvalue(hessian, key=key, max_matvecs=max_matvecs, tol=tol)


@checked
def effective_learning_rate(
    params: Params,
    *,
    learning_rate: ArrayLike,
    weight_decay: ArrayLike = 0.0,
    mask: Mask = None,
) -> jax.Array:
    """Computes the learning rate of descent on the sphere that turns the weights by the same angle.

        eta / ((1 - eta lambda) ||w||^2)

    With the learning rate eta and the weight decay lambda, the step
    (1 - eta lambda) w - eta grad L(w) of scale-invariant weights w moves their direction w / ||w||
    as descent on the unit sphere with this learning rate does. This holds for plain descent,
    without momentum and preconditioner.

    Example:
      >>> params = jnp.array([6.0, 8.0])  # of norm 10
      >>> print(f"{diagnostics.effective_learning_rate(params, learning_rate=0.5):.3f}")
      0.005

    Args:
      params: tree of parameters.
      learning_rate: eta, positive.
      weight_decay: lambda in (lambda / 2) ||w||^2, at least 0.
      mask: the scale-invariant leaves w; None: all.

    Returns:
      The effective learning rate (), infinite for weights of zero.

    Raises:
      ValueError: a number is out of its range, or `mask` is another tree or chooses no leaf.
      TypeError: `mask` holds anything but Python bools.

    References:
      K. Lyu, Z. Li, S. Arora (2022), arXiv:2206.07085. We derived the identities again.
    """
    _checks.positive("learning_rate", learning_rate)
    _checks.non_negative("weight_decay", weight_decay)
    weights, _ = split(params, mask)
    norm = _numerics.scaled_norm(weights)
    rate, decay = (jnp.asarray(x, norm.dtype) for x in (learning_rate, weight_decay))
    # One after the other: the square may overflow where the rate does not.
    return rate / (1 - rate * decay) / norm / norm


@checked
def spherical_edge_of_stability(
    loss_fn: LossFn,
    params: Params,
    other_params: Params,
    *batch: Tree,
    key: PRNGKey,
    learning_rate: ArrayLike,
    weight_decay: ArrayLike = 0.0,
    mask: Mask = None,
    max_matvecs: int = 50,
    tol: ArrayLike = 1e-3,
    chunk_size: int | None = None,
) -> SphericalEdgeResult:
    """Compares spherical sharpness and effective learning rate with the edge of stability.

        edge_ratio = effective learning rate times spherical sharpness

    Descent is stable while the ratio is below 2. At the edge of stability the direction of the
    weights jumps from one side of the valley to the other in each step. So the sharpness is taken
    between two iterates: at the midpoint of the directions w / ||w|| and w' / ||w'||, and for the
    other leaves at the midpoint of their values.

    Example:
      >>> def loss_fn(w):
      ...     direction = w / jnp.linalg.norm(w)
      ...     return direction[1] ** 2
      >>> params, other_params = jnp.array([2.0, 0.1]), jnp.array([2.0, -0.1])  # two iterates
      >>> result = diagnostics.spherical_edge_of_stability(
      ...     loss_fn, params, other_params, key=jax.random.key(0), learning_rate=4.0
      ... )
      >>> print(f"{result.sharpness:.2f} {result.edge_ratio:.2f}")
      2.00 2.00

    Args:
      loss_fn: (params, *batch) -> scalar, the mean over the examples, in train mode for batch norm.
      params: tree of parameters.
      other_params: tree like `params`, after a step of full-batch descent.
      *batch: arrays with a leading axis of examples.
      key: typed key of the random start.
      learning_rate: learning rate of the step, positive.
      weight_decay: lambda in (lambda / 2) ||w||^2, at least 0.
      mask: the scale-invariant leaves w; None: all.
      max_matvecs: limit of the number of Hessian products.
      tol: relative tolerance: the residual norm over the largest magnitude of an eigenvalue.
      chunk_size: number of examples per pass, for bounded memory; None: all at once.

    Returns:
      A `SphericalEdgeResult`.

    Raises:
      ValueError: `other_params` is another tree, `mask` is another tree or chooses no leaf, a
        number is out of its range, or the loss is not a scalar or cannot be split into chunks.
      TypeError: `mask` holds anything but Python bools, a parameter is not real floating point, or
        `key` is not a typed key.

    References:
      K. Lyu, Z. Li, S. Arora (2022), arXiv:2206.07085. Taking the midpoint is our choice.
    """
    rate = effective_learning_rate(
        params, learning_rate=learning_rate, weight_decay=weight_decay, mask=mask
    )
    _checks.same_tree("other_params", other_params, params)
    sharpness = spherical_sharpness(
        loss_fn, _midpoint(params, other_params, mask), *batch,
        key=key, mask=mask, max_matvecs=max_matvecs, tol=tol, chunk_size=chunk_size,
    )  # fmt: skip
    value, residual_norm, converged = sharpness
    return SphericalEdgeResult(rate * value, rate, value, residual_norm, converged)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["loss_fn", "weights", "rest"],
    meta_fields=["tangent"],
)
@dataclasses.dataclass(frozen=True)
class _Displaced(Wrapper):
    """u -> L(w + ||w|| u), or L(w + ||w|| P u): its Hessian at u = 0 is ||w||^2 H or P H P."""

    loss_fn: Partial
    weights: Params
    rest: Params
    tangent: bool

    @property
    def within(self) -> Partial:
        return self.loss_fn

    def __call__(self, displacement: Params, *batch: Tree) -> jax.Array:
        norm, direction = _numerics.scaled_norm(self.weights), _numerics.unit(self.weights)
        along = _tree.inner(direction, displacement) if self.tangent else 0.0
        moved = jax.tree.map(
            lambda w, v, u: w + (norm * (_tree.wide(u) - along * _tree.wide(v))).astype(w.dtype),
            self.weights,
            direction,
            displacement,
        )
        return self.loss_fn(_tree.merge(moved, self.rest), *batch)


def displaced(
    loss_fn: LossFn, params: Params, mask: Mask, tangent: bool
) -> tuple[_Displaced, Params]:
    """Returns the loss as a function of a displacement of the masked leaves' direction, and zeros.

    Lengths are in units of the norm of these leaves, as if it were one. The zeros have the
    structure of `params`, with None in place of the other leaves.
    """
    weights, rest = split(params, mask)
    weights = _of_usable_norm(weights)
    function = _Displaced(as_partial(loss_fn), weights, rest, tangent)
    return function, jax.tree.map(jnp.zeros_like, weights)


def _of_usable_norm(weights: Params) -> Params:
    """Returns the weights, or NaN where they are traced, unless curvature would leave its type."""
    norm = _numerics.scaled_norm(weights)
    # The curvature goes with the inverse square of the norm: there it over- or underflows.
    limit = math.sqrt(float(jnp.finfo(norm.dtype).max)) / 8
    is_usable = (norm > 1 / limit) & (norm < limit)
    if not _loops.is_concrete(is_usable):
        return jax.tree.map(lambda w: jnp.where(is_usable, w, jnp.nan), weights)
    if jnp.isfinite(norm) and not is_usable:
        raise ValueError(
            f"`params` must have a norm between {1 / limit:.0e} and {limit:.0e} in the leaves of "
            f"`mask`, got {float(norm):.2g}: the loss does not see their scale, so multiply them."
        )
    return weights


def split(params: Params, mask: Mask) -> tuple[Params, Params]:
    """Returns the masked leaves and the others, each with None in place of the rest."""
    return _tree.partition(params, chosen_leaves(mask, params))


def chosen_leaves(mask: Mask, params: Params) -> list[bool]:
    """Returns one bool for each leaf of `params`, at least one of them True."""
    leaves = _selection.mask_leaves(mask, params)
    if not any(leaves):
        raise ValueError("`mask` must choose at least one leaf, got none.")
    return leaves


def _midpoint(params: Params, other_params: Params, mask: Mask) -> Params:
    (weights, rest), (other_weights, other_rest) = split(params, mask), split(other_params, mask)
    shrink = _numerics.scaled_norm(weights) / _numerics.scaled_norm(other_weights)
    turned = jax.tree.map(lambda w, v: (w + shrink.astype(v.dtype) * v) / 2, weights, other_weights)
    is_real = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
    middle = lambda a, b: _numerics.between(a, b, 0.5) if is_real(a) else a
    return _tree.merge(turned, jax.tree.map(middle, rest, other_rest))
