"""How descent with weight decay moves along the minima of a loss whose weights have no scale."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial
from jax.typing import ArrayLike

from regjax import _checks, _chunks, _numerics, _tree, curvature
from regjax._arguments import checked
from regjax._base import LossFn, Mask, Params, PRNGKey, Tree
from regjax._printing import legible
from regjax.diagnostics._spherical_sharpness import displaced


@legible
class FlowResult(NamedTuple):
    """The predicted motion of the direction at the edge of stability; lambda_1 is the sharpness.

    Attributes:
      velocity: tree like the parameters, d zeta / d tau on the unit sphere; zero for leaves outside
        the mask.
      gradient_norm: (), ||grad log lambda_1|| along the minima, per radian.
      gradient_error_bound: (), bound of the error of that gradient's projection, if all Hessian
        eigenvalues of magnitude up to `flat_tol` lambda_1 are zero. The error of the eigenvector
        is not included.
      log_sharpness_rate: (), d log lambda_1 / d tau, never positive.
      amplitude: (), u, in radians: the direction alternates between zeta + u v and zeta - u v.
      excess_loss: (), lambda_1 u^2 / 2, above that of the minimum.
      sharpness: (), lambda_1, spherical and tangent.
      residual_norm: (), of the sharpness.
      relative_gap: (), (lambda_1 - lambda_2) / lambda_1 of the Ritz values. The eigenvector v is
        wrong by an angle of about residual_norm / (lambda_1 relative_gap); at a gap of zero
        lambda_1 has no gradient.
      converged: (), bool: the residual norm is at most `tol` lambda_1, and the error of the
        gradient at most `tol` times its norm.
    """

    velocity: Params
    gradient_norm: jax.Array
    gradient_error_bound: jax.Array
    log_sharpness_rate: jax.Array
    amplitude: jax.Array
    excess_loss: jax.Array
    sharpness: jax.Array
    residual_norm: jax.Array
    relative_gap: jax.Array
    converged: jax.Array


@checked
def sharpness_reduction_flow(
    loss_fn: LossFn,
    params: Params,
    *batch: Tree,
    key: PRNGKey,
    intrinsic_rate: ArrayLike,
    mask: Mask = None,
    flat_tol: ArrayLike = 1e-3,
    num_steps: int = 50,
    tol: ArrayLike = 1e-2,
    chunk_size: int | None = None,
) -> FlowResult:
    """Predicts how descent with weight decay moves along minima, and how it oscillates.

    At the edge of stability the direction w / ||w|| of scale-invariant weights swings to both sides
    of a minimum zeta on the unit sphere, along the leading eigenvector v of the Hessian there. At
    the same time zeta moves slowly among the minima to lower sharpness lambda_1. In t steps with
    the learning rate eta and the weight decay lambda, with tau = eta lambda t and g = grad log
    lambda_1,

        d zeta / d tau = -2 g / (4 + ||g||^2),   u = sqrt(2 eta lambda / (4 + ||g||^2))

    where u is the amplitude of the oscillation. The flow holds for a single leading eigenvalue,
    plain full-batch descent, one joint norm of all masked leaves, and parameters at a minimum or
    near one, such as the midpoint of two steps.

    g is the third derivative of the loss along v, v and each direction, over lambda_1, projected on
    the null space of the Hessian on the sphere. Two runs of Lanczos give v and the projection, in
    which Ritz values up to `flat_tol` lambda_1 count as zero. The projection is exact if
    `num_steps` is at least the number of different eigenvalues; `gradient_error_bound` bounds its
    error otherwise. Costs 2 `num_steps` Hessian products and one third derivative.

    Example:
      >>> def loss_fn(w):  # its minima are a circle, where the sharpness is 1 + y
      ...     x, y, z = w / jnp.linalg.norm(w)
      ...     return 0.5 * (1.0 + y) * z**2
      >>> result = diagnostics.sharpness_reduction_flow(
      ...     loss_fn, jnp.array([1.0, 0.0, 0.0]), key=jax.random.key(0), intrinsic_rate=0.01,
      ...     num_steps=3,
      ... )
      >>> print(f"{result.velocity[1]:.3f} {result.amplitude:.3f}")  # -2 / 5 and sqrt(0.02 / 5)
      -0.400 0.063

    Args:
      loss_fn: (params, *batch) -> scalar, the mean over the examples, in train mode for batch norm.
      params: tree of parameters.
      *batch: arrays with a leading axis of examples.
      key: typed key of the random start.
      intrinsic_rate: eta lambda, learning rate times weight decay, positive; the flow holds for
        small ones.
      mask: the scale-invariant leaves w; None: all.
      flat_tol: curvature that counts as zero, relative to lambda_1.
      num_steps: number of steps of each run of Lanczos.
      tol: relative tolerance of `converged`.
      chunk_size: number of examples per pass, for bounded memory; None: all at once.

    Returns:
      A `FlowResult`.

    Raises:
      ValueError: a number is out of its range, `mask` is another tree or chooses no leaf, the norm
        of w is out of range, or the loss is not a scalar or cannot be split into chunks.
      TypeError: `mask` holds anything but Python bools, a parameter is not real floating point, or
        `key` is not a typed key.

    References:
      K. Lyu, Z. Li, S. Arora (2022), arXiv:2206.07085. We derived flow and amplitude again, and
      tested them with descent on batch-normalized linear regression. The projection by Lanczos and
      its error bound are ours.
    """
    _checks.number("intrinsic_rate", intrinsic_rate, above_zero=True)
    _checks.number("flat_tol", flat_tol, above_zero=True)
    _checks.number("tol", tol)
    displacement_loss, origin = displaced(loss_fn, params, mask, tangent=True)
    of_direction, chunk_size = _chunks.prepared(displacement_loss, origin, batch, chunk_size)
    hessian = curvature.hessian(of_direction, origin, *batch, chunk_size=chunk_size)

    space = hessian.space
    num_steps = min(_checks.integer("num_steps", num_steps), space.size)
    noise = space.unravel(space.normal(_checks.key("key", key)))
    from_noise = curvature.lanczos(hessian, noise, num_steps, key=key)
    pairs = curvature.ritz_pairs(from_noise)
    leading = optax.tree.cast_like(_combined(from_noise, pairs.vectors[:, -1]), origin)
    third = _chunks.mean(
        Partial(_third_derivative, of_direction), (origin, leading), batch, chunk_size
    )
    norm = _numerics.scaled_norm(third)
    # Where there is no gradient any direction will do: it is multiplied by its norm of 0.
    start = jax.tree.map(functools.partial(jnp.where, norm > 0), third, noise)
    from_third = curvature.lanczos(hessian, start, num_steps)
    predicted = _predicted(
        pairs,
        from_third,
        curvature.ritz_pairs(from_third),
        norm,
        _Numbers(intrinsic_rate, flat_tol, tol),
    )
    velocity = optax.tree.cast_like(predicted.velocity, origin)
    return predicted._replace(velocity=_tree.merge(velocity, jax.tree.map(jnp.zeros_like, params)))


def _third_derivative(
    of_direction: LossFn, origin_and_leading: tuple[Params, Params], *batch: Tree
) -> Params:
    """Computes the gradient of v' H v in the displacement, at a fixed v."""
    origin, leading = origin_and_leading

    def curvature_along(displacement: Params) -> jax.Array:
        line = lambda t: of_direction(
            jax.tree.map(lambda u, v: u + t.astype(v.dtype) * v, displacement, leading), *batch
        )
        slope = lambda t: jax.jvp(line, (t,), (jnp.ones_like(t),))[1]
        start = jnp.zeros((), _tree.vector_dtype(leading))
        return jax.jvp(slope, (start,), (jnp.ones_like(start),))[1]

    with jax.default_matmul_precision("highest"):
        return jax.grad(curvature_along)(origin)


class _Numbers(NamedTuple):
    """The numbers among the options."""

    intrinsic_rate: ArrayLike
    flat_tol: ArrayLike
    tol: ArrayLike


@jax.jit
def _predicted(
    pairs: curvature.RitzResult,
    from_third: curvature.LanczosResult,
    third_pairs: curvature.RitzResult,
    norm: jax.Array,
    numbers: _Numbers,
) -> FlowResult:
    """Follows all from the sharpness and from the Krylov space of its gradient.

    Args:
      pairs: of the Hessian from a random start.
      from_third: Lanczos from the third derivative.
      third_pairs: its Ritz pairs.
      norm: (), of the third derivative.
      numbers: as in `sharpness_reduction_flow`.
    """
    largest, residual_norm = pairs.values[-1], pairs.residual_norms[-1]
    intrinsic_rate, flat_tol, tol = (jnp.asarray(x, norm.dtype) for x in numbers)
    slope, limit = norm / largest, flat_tol * largest
    # 0 for steps that were not done: the gradient lies in a space that the Hessian does not leave.
    values = jnp.nan_to_num(third_pairs.values)
    flat = jnp.abs(values) <= limit
    # Of the gradient in the basis of the Ritz vectors, and of those vectors along the residual.
    first = third_pairs.vectors[0]
    last = _numerics.scaled_norm(from_third.residual) * third_pairs.vectors[-1]
    kept = jnp.where(flat, first, 0)
    gradient = _combined(from_third, slope * (third_pairs.vectors @ kept))
    size = slope * jnp.linalg.norm(kept)
    # ||H g||, and how much of the dropped part H did not make: H Q s = Q T s + residual.
    curved = jnp.hypot(jnp.linalg.norm(values * kept), jnp.sum(last * kept))
    missed = jnp.sum(_numerics.divide(last * first, values, where=~flat))
    error = slope * jnp.hypot(curved / limit, missed)

    denominator = 4 + size**2
    amplitude = jnp.sqrt(2 * intrinsic_rate / denominator)
    return FlowResult(
        velocity=jax.tree.map(lambda leaf: -2 * leaf / denominator, gradient),
        gradient_norm=size,
        gradient_error_bound=error,
        log_sharpness_rate=-2 * size**2 / denominator,
        amplitude=amplitude,
        excess_loss=largest * amplitude**2 / 2,
        sharpness=largest,
        residual_norm=residual_norm,
        relative_gap=(largest - pairs.values[-2:][0]) / largest,
        converged=(residual_norm <= tol * jnp.abs(largest)) & (error <= tol * size),
    )


def _combined(found: curvature.LanczosResult, weights: jax.Array) -> Params:
    """The combination of the rows of the basis."""
    combine = functools.partial(jnp.tensordot, weights, axes=1, precision="highest")
    return jax.tree.map(combine, found.basis)
