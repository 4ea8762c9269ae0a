"""Extreme eigenvalues of mini-batch curvature, from the noise of the examples' curvature.

A batch Hessian is the full one plus the noise of its examples, H' = H + E. Random matrix theory
says where an eigenvalue of H ends up in H' if E has no direction of its own. E is measured by the
noise power p (`hessian_noise_power`): the variance of an element times the number of parameters P,
if all elements have one variance. In a batch of B the noise is p / b, b the effective batch.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from regjax import _checks, _chunks, _numerics, _tree
from regjax._arguments import checked
from regjax._base import LossFn, Params, Tree, couples_examples
from regjax._printing import legible
from regjax._space import Space
from regjax.curvature._operators._hessian import differentiate_gradient
from regjax.curvature._precision import precision

Number: TypeAlias = float | jax.Array
"""A number, or an array of them."""

Law: TypeAlias = Callable[..., "BatchExtremesResult"]
"""(largest, smallest, noise_power, inverse_batch) -> `BatchExtremesResult`."""


@legible
class NoisePowerResult(NamedTuple):
    """How much the Hessians of single examples differ along a direction.

    Attributes:
      value: (), mean_i ||H_i z - H z||^2, in squared units of the Hessian; exact for the examples.
      standard_error: (), of `value` as an estimate for the population the examples are drawn from;
        NaN with a single example.
    """

    value: jax.Array
    standard_error: jax.Array


@legible
class BatchExtremesResult(NamedTuple):
    """The ends of the spectrum of a batch's curvature, in units of the Hessian.

    Attributes:
      largest: predicted largest eigenvalue, of the shape of the arguments.
      smallest: predicted smallest eigenvalue.
    """

    largest: jax.Array
    smallest: jax.Array


@checked
def hessian_noise_power(
    loss_fn: LossFn,
    params: Params,
    direction: Params,
    *batch: Tree,
    chunk_size: int | None = None,
) -> NoisePowerResult:
    """Measures how much the examples' Hessian products along a direction differ.

        mean_i ||H_i z - H z||^2,   H_i the Hessian of example i, H their mean

    It costs a Hessian product and keeps the product of each example of a chunk. For isotropic noise
    any z will do. The noise of networks is far from isotropic, and what moves an eigenvalue is the
    noise along its own eigenvector: take z from `top_eigenpairs`. If the other eigenvalues are near
    0, its largest eigenvalue then grows in a batch by value / (b largest) to second order (see
    `additive_outlier`).

    Example:
      >>> loss_fn = lambda w, x: 0.5 * jnp.mean(x) * jnp.sum(w**2)  # each H_i is x_i times I
      >>> x, z = jnp.array([1.0, 3.0]), jnp.array([1.0, 0.0])
      >>> print(curvature.hessian_noise_power(loss_fn, jnp.ones(2), z, x).value)  # x has variance 1
      1.0

    Args:
      loss_fn: (params, *batch) -> scalar, the mean over independent examples.
      params: tree of real floating-point parameters, n in all.
      direction: z, a tree like `params`; only its direction counts. Zero gives NaN.
      *batch: arrays with a leading axis of N examples.
      chunk_size: number of examples per pass; None: all at once.

    Returns:
      A `NoisePowerResult`, in float32 at least.

    Raises:
      ValueError: the loss is not a scalar or couples the examples (batch norm in train mode, a
        sum), or `direction` is not a tree like `params`.
      TypeError: a parameter is not real floating point.

    References:
      D. Granziol, S. Zohren, S. Roberts (2022), arXiv:2006.09092, algorithm 1, with ||H z||^2 of
      the official code where the paper prints (z'H z)^2. The paper draws z at random; the top
      eigenvector and the standard error are ours.
    """
    if couples_examples(loss_fn):
        raise ValueError(
            "`loss_fn` must not couple the examples of a batch (batch norm or dropout in train "
            'mode), got one that does; use mode="evaluation".'
        )
    # Single examples are chunks of one: what is no mean over examples is found out here.
    function, chunk_size = _chunks.prepared(loss_fn, params, batch, chunk_size, single=True)
    _checks.same_tree("direction", direction, params)
    space = Space.of(params)
    flat = space.ravel(direction)
    unit = space.unravel(flat / space.norm(flat))
    mean = _chunks.mean(Partial(_product, function, unit), params, batch, chunk_size)
    squares = _chunks.each(
        Partial(_squared_distances, function, unit, mean), params, batch, chunk_size
    )
    return NoisePowerResult(*_numerics.mean_and_error(squares))


@checked
def wigner_outlier(
    largest: Number, smallest: Number, noise_power: Number, inverse_batch: Number
) -> BatchExtremesResult:
    """Moves the ends of a spectrum by the law for noise of independent elements (Hessian).

        s = sqrt(p / b);  l' = l + s^2 / l if |l| > s, else +-2 s, the edge of the noise

    Where it holds, it gives at most 2 l, and below that sqrt(p / b). So linear scaling of the
    learning rate with the batch does not follow from it.

    Example:
      >>> print(curvature.wigner_outlier(4.0, -0.5, 8.0, 1 / 2))  # s = 2: 4 + 4 / 4 and -2 s
      BatchExtremesResult(largest=5, smallest=-4)

    Args:
      largest: largest eigenvalue without noise.
      smallest: smallest eigenvalue without noise; an outlier if below -s.
      noise_power: p, of a single example, from `hessian_noise_power`.
      inverse_batch: 1 / b, b the effective batch size.

    Returns:
      A `BatchExtremesResult`.

    References:
      D. Granziol, S. Zohren, S. Roberts (2022), arXiv:2006.09092, for spiked Wigner matrices.
    """
    edge = jnp.sqrt(noise_power * inverse_batch)

    def moved(eigenvalue: Number) -> jax.Array:
        outlier = ~(eigenvalue <= edge)  # NaN stays NaN
        return jnp.where(outlier, _shifted(eigenvalue, edge**2, outlier), 2 * edge)

    return BatchExtremesResult(moved(largest), -moved(-smallest))


@checked
def additive_outlier(
    largest: Number, smallest: Number, noise_power: Number, inverse_batch: Number
) -> BatchExtremesResult:
    """Moves the ends of a spectrum by second-order perturbation, wherever they lie.

        l' = l + p / (b l)

    With p along the eigenvector it needs no isotropy, only the other eigenvalues near 0. Figures 9
    and 12 of the paper use it in effect.

    Example:
      >>> print(curvature.additive_outlier(4.0, -1.0, 8.0, 1 / 2))  # 4 + 4 / 4 and -1 - 4 / 1
      BatchExtremesResult(largest=5, smallest=-5)

    Args:
      largest: largest eigenvalue without noise; NaN where it is not positive.
      smallest: smallest eigenvalue without noise; NaN where it is not negative.
      noise_power: p, of a single example, along the eigenvector of the end in question.
      inverse_batch: 1 / b, b the effective batch size.

    Returns:
      A `BatchExtremesResult`. Each end has an eigenvector of its own, so that with p along one
      of them only that end counts.

    References:
      D. Granziol, S. Zohren, S. Roberts (2022), arXiv:2006.09092; the direction is ours.
    """
    variance = noise_power * inverse_batch

    def moved(eigenvalue: Number) -> jax.Array:
        outlier = eigenvalue > 0
        return jnp.where(outlier, _shifted(eigenvalue, variance, outlier), jnp.nan)

    return BatchExtremesResult(moved(largest), -moved(-smallest))


@checked
def marchenko_pastur_outlier(
    largest: Number,
    smallest: Number,
    noise_power: Number,
    inverse_batch: Number,
    *,
    num_params: int,
) -> BatchExtremesResult:
    """Moves the ends of a spectrum by the law for positive semi-definite noise (Gauss-Newton).

        c = P / b, v = p / P;   l' = l + v / (1 - c v / l)
        outside of the noise if l > v (c + sqrt(c)), else its edge v (1 + sqrt(c))^2

    and likewise for the smallest, with -sqrt(c) and, where c > 1, the edge 0. The noise has the
    mean v: it moves an eigenvalue by v also where c is near 0.

    Example:
      >>> print(curvature.marchenko_pastur_outlier(4.0, 0.0, 10.0, 0.1, num_params=10))  # c = v = 1
      BatchExtremesResult(largest=5.3333, smallest=0)

    Args:
      largest: largest eigenvalue without noise.
      smallest: smallest eigenvalue without noise.
      noise_power: p, of a single example, from `hessian_noise_power`.
      inverse_batch: 1 / b, b the effective batch size.
      num_params: P, number of parameters; bind it with `functools.partial`.

    Returns:
      A `BatchExtremesResult`.

    Raises:
      ValueError: `num_params` is not positive.

    References:
      D. Granziol, S. Zohren, S. Roberts (2022), arXiv:2006.09092, theorem 7, whose threshold and
      edge (v (1 + c) and 2 v (1 + c)) are wrong as printed: here are those of Baik, Ben Arous and
      Peche, which matrices of order 1000 meet.
    """
    _checks.integer("num_params", num_params)
    spread = noise_power * inverse_batch  # c v
    variance, ratio = noise_power / num_params, num_params * inverse_batch
    root = jnp.sqrt(ratio)

    def outside(eigenvalue: Number, outlier: Number) -> jax.Array:
        safe = jnp.where(outlier, eigenvalue, 1)
        room = jnp.where(outlier, 1 - spread / safe, 1)
        return eigenvalue + variance / room

    # Not the other way round: what is NaN is to stay so.
    above = ~(largest <= variance * (ratio + root))
    below = ~(smallest >= jnp.minimum(variance * (ratio - root), 0))
    return BatchExtremesResult(
        jnp.where(above, outside(largest, above), variance * (1 + root) ** 2),
        jnp.where(below, outside(smallest, below), variance * (1 - jnp.minimum(root, 1)) ** 2),
    )


@checked
def batch_extreme_eigenvalues(
    largest: Number,
    smallest: Number,
    *,
    noise_power: Number,
    batch_size: Number,
    num_examples: Number | None = None,
    law: Law = wigner_outlier,
) -> BatchExtremesResult:
    """Predicts the extreme eigenvalues of a mini-batch's curvature from those of all examples.

    Drawn without replacement from N examples, an element of a batch's curvature has the variance of
    one example's over the effective batch b,

        1 / b = (N - B) / (B (N - 1))

    so that b is B for large N and infinite for the whole set. A law says what the noise makes of
    the eigenvalues. Name the law with every number: the laws differ by orders of magnitude.

    Example:
      >>> sizes = jnp.array([2.0, 8.0])  # with noise of p / b = 4 and 1
      >>> print(curvature.batch_extreme_eigenvalues(4.0, -0.5, noise_power=8.0, batch_size=sizes))
      BatchExtremesResult(largest=[5, 4.25], smallest=[-4, -2])

    Args:
      largest: largest eigenvalue of the curvature of all examples; an array broadcasts.
      smallest: smallest eigenvalue.
      noise_power: p, from `hessian_noise_power`, in squared units of the eigenvalues.
      batch_size: B, number of examples in a batch; an array gives a curve.
      num_examples: N, number of examples; None: infinitely many.
      law: `wigner_outlier`, `additive_outlier`, or
        `functools.partial(marchenko_pastur_outlier, num_params=...)`: a function of (largest,
        smallest, noise_power, inverse_batch), the last 1 / b.

    Returns:
      A `BatchExtremesResult`.

    Raises:
      ValueError: `noise_power` is negative, `batch_size` is not positive, or above `num_examples`.

    References:
      D. Granziol, S. Zohren, S. Roberts (2022), arXiv:2006.09092. The factor is 1 / B - 1 / N
      there, equal up to terms in 1 / N.
    """
    _checks.non_negative("noise_power", noise_power)
    _checks.positive("batch_size", batch_size)
    largest = _floating(largest)
    smallest, noise_power, batch_size = (
        jnp.asarray(value, largest.dtype) for value in (smallest, noise_power, batch_size)
    )
    inverse_batch = 1 / batch_size
    if num_examples is not None:
        _check_population(batch_size, num_examples)
        count = jnp.asarray(num_examples, largest.dtype)
        inverse_batch = (count - batch_size) / (batch_size * (count - 1))
    return law(largest, smallest, noise_power, inverse_batch)


def _shifted(eigenvalue: Number, variance: Number, valid: Number) -> jax.Array:
    return eigenvalue + variance / jnp.where(valid, eigenvalue, 1)


def _product(loss_fn: Partial, unit: Params, params: Params, *batch: Tree) -> Tree:
    with precision():
        return differentiate_gradient(loss_fn, params, unit, *batch)


def _squared_distances(
    loss_fn: Partial, unit: Params, mean: Params, params: Params, *batch: Tree
) -> jax.Array:
    """||H_i z - mean||^2 of each example, (N,)."""

    def distance(*example: Tree) -> jax.Array:
        alone = jax.tree.map(lambda leaf: leaf[None], example)
        difference = jax.tree.map(jnp.subtract, _product(loss_fn, unit, params, *alone), mean)
        return _tree.inner(difference, difference)

    return jax.vmap(distance)(*batch)


def _floating(value: Number) -> jax.Array:
    value = jnp.asarray(value)
    return value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(float)


def _check_population(batch_size: jax.Array, num_examples: Number | None) -> None:
    _checks.positive("num_examples", num_examples)
    known = not isinstance(batch_size, jax.core.Tracer) and not isinstance(num_examples, jax.Array)
    if (
        known
        and num_examples is not None
        and (num_examples < 2 or bool(jnp.any(batch_size > num_examples)))
    ):
        raise ValueError(
            f"`batch_size` must be at most `num_examples`, {num_examples} (at least 2), "
            f"got {batch_size}."
        )
