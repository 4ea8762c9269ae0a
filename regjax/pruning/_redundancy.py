"""Redundant units: the rank deficit of the matrix of per-example gradients at the gates.

For a change d of the gates of a group the loss changes by g'd + d'H d / 2; at the end of training g
is near 0 and H near the Fisher matrix F = G'G / N, with the per-example gradients G (N, C). So a
direction with a small singular value of G may be removed at little cost, and as many units are
redundant as G has fewer directions than units.

A unit is redundant only as a whole: two units with equal incoming weights but outgoing ones that
are not proportional do different things, and G has full rank.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from regjax import _checks, _chunks, _numerics, _tree
from regjax._arguments import checked
from regjax._base import LossFn, Tree, couples_examples
from regjax._printing import legible


@legible
class RedundancyResult(NamedTuple):
    """The redundancy of a group of C units, from the gradients G of N examples at their gates.

    Attributes:
      rank: (), int32, number of directions that the loss depends on (`numerical_rank`). Inside
        `jit`, if G is not finite, it is -1, and the other numbers are NaN.
      num_units: (), int32, number of units that are still there.
      rate: (), the redundant share 1 - rank / num_units.
      smallest_null_energy: (), sigma^2 / N of the weakest of the `num_units` directions, which is 0
        if the loss does not depend on it. In squared units of the loss.
      singular_values: (C,), those of G, falling.
      directions: (C, C), the right singular vectors as columns, in the same order.
      num_examples: (), int32, N.
      has_enough_examples: (), whether N >= num_units. If not, the rank is at most N, and the rate
        says nothing.
      is_vanishing: (), whether sigma_1 / sqrt(N) is so small that all of G may be rounding, as when
        the loss is nearly 0.
    """

    rank: jax.Array
    num_units: jax.Array
    rate: jax.Array
    smallest_null_energy: jax.Array
    singular_values: jax.Array
    directions: jax.Array
    num_examples: jax.Array
    has_enough_examples: jax.Array
    is_vanishing: jax.Array


@checked
def gradient_matrix(
    gate_loss: LossFn, gates: Tree, *batch: Tree, chunk_size: int | None = None
) -> Tree:
    """Computes the gradient of each example's loss with respect to the gates.

    With convolutions each example needs a gradient of the whole kernel after a gate: choose a
    `chunk_size`.

    Example:
      >>> gate_loss = lambda gates, x: jnp.mean(jnp.sum(x * gates, axis=1))  # two units
      >>> examples = jnp.array([[1.0, 2.0], [3.0, 6.0]])
      >>> print(pruning.gradient_matrix(gate_loss, jnp.ones(2), examples))
      [[1. 2.]
       [3. 6.]]

    Args:
      gate_loss: (gates, *batch) -> scalar, the mean over independent examples, in evaluation mode,
        from `gated_loss`. It is called with one example at a time.
      gates: tree of gates {group: (C,)}.
      *batch: arrays with a leading axis of N examples.
      chunk_size: number of examples at a time, for bounded memory; None: all at once.

    Returns:
      The matrices, a tree like `gates` with leaves (N, C).

    Raises:
      ValueError: `gate_loss` is no scalar, or couples the examples.
      TypeError: a gate is not real floating point.
    """
    if couples_examples(gate_loss):
        raise ValueError(
            "`gate_loss` must not couple the examples of a batch (batch norm or dropout in train "
            'mode), got one that does; use mode="evaluation".'
        )
    gate_loss, chunk_size = _chunks.prepared(
        gate_loss, gates, batch, chunk_size, name="gate_loss", single=True
    )
    return _chunks.each(Partial(_gradients, gate_loss), gates, batch, chunk_size)


@checked
def gradient_redundancy(
    matrix: jax.Array,
    *,
    mask: jax.Array | None = None,
    tol: float = 1e-2,
    vanishing_threshold: float = 1e-6,
) -> RedundancyResult:
    """Computes how many units of a group are redundant, from its per-example gradients.

    G is the matrix of the gradients of N examples with respect to the gates of C units. At the end
    of training a change d of the gates raises the loss by about

        |G d|^2 / (2 N)

    so that a direction with a small singular value of G can be removed at little cost. The rank is
    the number of singular values above `tol` times the largest, and C - rank units are redundant.

    Example:
      >>> matrix = jnp.array([[1.0, 2.0], [3.0, 6.0], [0.0, 0.0]])  # three examples, two units
      >>> result = pruning.gradient_redundancy(matrix)
      >>> print(result.rank, result.rate, result.singular_values)
      1 0.5 [7.071 0.   ]

    Args:
      matrix: (N, C), the gradients G of a group, from `gradient_matrix`.
      mask: (C,), False for units that are already removed; None: no unit is.
      tol: threshold of the singular values, relative to the largest.
      vanishing_threshold: below this value of the largest singular value over sqrt(N), in units of
        the loss, `is_vanishing` is set. The default is our choice, a few roundings of a loss of 1
        in float32.

    Returns:
      A `RedundancyResult`.

    Raises:
      ValueError: `matrix` does not have two axes or has an entry that is not finite, `mask` has
        another length, or a number is negative.
      TypeError: `matrix` is not real floating point, or `mask` not bool.

    References:
      Z. Zhou, L. Lian, Y. Yin, Z. Wang (2022), arXiv:2206.03596. The form given here is ours.
    """
    matrix = _checks.floating_array("matrix", matrix)
    if jnp.ndim(matrix) != 2 or 0 in jnp.shape(matrix):
        raise ValueError(
            f"`matrix` must have shape (N, C), neither of them 0, got {jnp.shape(matrix)}."
        )
    _checks.number("tol", tol)
    _checks.number("vanishing_threshold", vanishing_threshold)
    num_examples, size = jnp.shape(matrix)
    mask = jnp.ones(size, bool) if mask is None else _check_mask(mask, size)
    matrix = _checks.finite_tree("matrix", jnp.where(mask[None], _tree.wide(matrix), 0))
    values, rows = _numerics.finite_svd(_filled(matrix))
    num_units = jnp.sum(mask, dtype=jnp.int32)
    rank = numerical_rank(values, tol=tol)
    energies = values**2 / num_examples
    rate = 1 - rank / jnp.maximum(num_units, 1)
    return RedundancyResult(
        rank=rank,
        num_units=num_units,
        rate=jnp.where(rank < 0, jnp.nan, rate),
        smallest_null_energy=energies[jnp.maximum(num_units - 1, 0)],
        singular_values=values,
        directions=rows.T,
        num_examples=jnp.int32(num_examples),
        has_enough_examples=num_units <= num_examples,
        is_vanishing=values[0] / math.sqrt(num_examples) < vanishing_threshold,
    )


def redundancy_saliency(result: RedundancyResult) -> jax.Array:
    """Scores each unit by its part in the directions that are not redundant.

        s_c = sum_{i <= rank} sigma_i^2 V_ci^2

    sigma_i are the singular values of the group's per-example gradients, V the right singular
    vectors. Remove the units with the lowest scores (`mask_planned`).

    Example:
      >>> result = pruning.gradient_redundancy(jnp.array([[1.0, 2.0], [3.0, 6.0], [0.0, 0.0]]))
      >>> print(pruning.redundancy_saliency(result))  # 1 + 9 and 4 + 36
      [10. 40.]

    Args:
      result: the `RedundancyResult` of a group, from `gradient_redundancy`.

    Returns:
      The scores (C,), in squared units of the loss; NaN if the result is not finite.

    Raises:
      TypeError: `result` is not a `RedundancyResult`.
    """
    if not isinstance(result, RedundancyResult):
        raise TypeError(
            f"`result` must come from `gradient_redundancy`, got a {type(result).__name__}."
        )
    number = jnp.arange(result.singular_values.size, dtype=jnp.int32)
    energies = jnp.where(number < result.rank, result.singular_values**2, 0)
    scores = jnp.matmul(result.directions**2, energies, precision="highest")
    is_known = (result.rank >= 0) & jnp.all(jnp.isfinite(result.singular_values))
    return jnp.where(is_known, scores, jnp.nan)


@checked
def numerical_rank(singular_values: jax.Array, *, tol: float = 1e-2) -> jax.Array:
    """Counts the singular values above `tol` times the largest.

    Example:
      >>> print(pruning.numerical_rank(jnp.array([10.0, 1.0, 0.01])))
      2

    Args:
      singular_values: (C,), in any order.
      tol: relative to the largest one.

    Returns:
      The rank (), int32; 0 if all are 0, and -1 where one that is traced is NaN or infinite.

    Raises:
      ValueError: `tol` is negative, or `singular_values` are no vector of finite numbers that are
        not negative.
      TypeError: `singular_values` are not real floating point.
    """
    _checks.number("tol", tol)
    values = _falling(singular_values)
    rank = jnp.sum(values > jnp.asarray(tol, values.dtype) * values[0], dtype=jnp.int32)
    return jnp.where(jnp.all(jnp.isfinite(values)), rank, -1)


@checked
def energy_rank(singular_values: jax.Array, *, share: float = 0.99) -> jax.Array:
    """Finds the least number r such that the r largest have a share of the sum of squares.

    Example:
      >>> print(pruning.energy_rank(jnp.array([3.0, 2.0, 0.1]), share=0.9))  # 9 of 13 is too little
      2

    Args:
      singular_values: (C,), in any order.
      share: between 0 and 1; at 1 rounding decides.

    Returns:
      The rank (), int32; 0 if all are 0, and -1 where one that is traced is NaN or infinite.

    Raises:
      ValueError: `share` is not in [0, 1], or `singular_values` are no vector of finite numbers
        that are not negative.
      TypeError: `singular_values` are not real floating point.
    """
    _checks.between("share", _checks.number("share", share), 0, 1)
    values = _relative(singular_values)
    held = jnp.cumsum(values**2)
    before = jnp.concatenate([jnp.zeros(1, held.dtype), held[:-1]])
    rank = jnp.sum(before < jnp.asarray(share, held.dtype) * held[-1], dtype=jnp.int32)
    return jnp.where(jnp.all(jnp.isfinite(values)), rank, -1)


@checked
def stable_rank(singular_values: jax.Array) -> jax.Array:
    """Divides the squared Frobenius norm by the squared spectral norm.

        sum_i sigma_i^2 / sigma_1^2

    Example:
      >>> print(pruning.stable_rank(jnp.array([2.0, 2.0, 1.0])))  # (4 + 4 + 1) / 4
      2.25

    Args:
      singular_values: (C,), in any order.

    Returns:
      The rank (), a real number between 1 and C; 0 if all are 0, and NaN where one that is traced
      is NaN or infinite.

    Raises:
      ValueError: `singular_values` are no vector of finite numbers that are not negative.
      TypeError: `singular_values` are not real floating point.
    """
    return jnp.sum(_relative(singular_values) ** 2)


@checked
def effective_rank(singular_values: jax.Array) -> jax.Array:
    """Computes the exponential of the entropy of the singular values' shares in their sum.

        exp(-sum_i p_i log p_i),   p_i = sigma_i / sum_j sigma_j

    Example:
      >>> print(f"{pruning.effective_rank(jnp.array([2.0, 2.0, 0.0])):.3f}")
      2.000

    Args:
      singular_values: (C,), in any order.

    Returns:
      The rank (), a real number between 1 and C; 0 if all are 0, and NaN where one that is traced
      is NaN or infinite.

    Raises:
      ValueError: `singular_values` are no vector of finite numbers that are not negative.
      TypeError: `singular_values` are not real floating point.

    References:
      O. Roy, M. Vetterli (2007), "The effective rank", EUSIPCO.
    """
    values = _relative(singular_values)
    shares = _numerics.divide(values, jnp.sum(values))
    logarithms = jnp.log(jnp.where(shares > 0, shares, 1))
    return jnp.where(values[0] == 0, 0, jnp.exp(-jnp.sum(shares * logarithms)))


def _falling(singular_values: jax.Array) -> jax.Array:
    """Returns the singular values from the largest one; those that are none are refused."""
    singular_values = _checks.floating_array("singular_values", singular_values)
    if jnp.ndim(singular_values) != 1 or not jnp.size(singular_values):
        raise ValueError(
            "`singular_values` must be a vector with at least one entry, got shape "
            f"{jnp.shape(singular_values)}."
        )
    _checks.finite_tree("singular_values", singular_values)
    _checks.non_negative("singular_values", singular_values)
    return jnp.sort(_tree.wide(singular_values), descending=True)


def _relative(singular_values: jax.Array) -> jax.Array:
    """Divides them by the largest one, so that no square under- or overflows; NaN for infinity."""
    values = _falling(singular_values)
    return _numerics.divide(values, values[0])


def _filled(matrix: jax.Array) -> jax.Array:
    """Adds rows of zeros, which add singular values of 0, up to as many as there are columns."""
    num_rows, num_columns = matrix.shape
    return jnp.pad(matrix, ((0, max(num_columns - num_rows, 0)), (0, 0)))


def _gradients(gate_loss: Partial, gates: Tree, *batch: Tree) -> Tree:
    def gradient(*example: Tree) -> Tree:
        return jax.grad(gate_loss)(gates, *jax.tree.map(lambda leaf: leaf[None], example))

    return jax.vmap(gradient)(*batch)


def _check_mask(mask: jax.Array, size: int) -> jax.Array:
    if jnp.result_type(mask) != jnp.bool_:
        raise TypeError(f"`mask` must be bool, got {jnp.result_type(mask)}.")
    if jnp.shape(mask) != (size,):
        raise ValueError(f"`mask` must have shape ({size},), got {jnp.shape(mask)}.")
    return jnp.asarray(mask)
