"""Taylor importance: the squared change of the loss on removing a unit, foreseen at its gate.

A gate z = 1 multiplies what a unit hands on. Removing the unit moves the gate to 0, and to second
order in this step the loss changes by -g + H / 2, with the gate's gradient g and second derivative
H. All functions work on trees of gates {group: (num_units,)}, of any shape.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from regjax import _checks, _chunks, _loops, _numerics, _tree
from regjax._arguments import checked
from regjax._base import Batch, LossFn, Tree, terms
from regjax._losses import MeanLoss, check_parts, factors_of, mean_loss, mean_weights, with_factors
from regjax._printing import legible
from regjax._programs import Program
from regjax.pruning._oracle import gate_hessian_diagonal

_Moments: TypeAlias = tuple[Tree, Tree]
"""Mean and sum of squared deviations, trees like the gates."""


@legible
class TaylorScoresResult(NamedTuple):
    """Importance of the units from a data set; trees like the gates.

    Attributes:
      scores: mean over the batches, in squared units of the loss.
      standard_error: of these means, from the spread over the batches; NaN with a single batch.
    """

    scores: Tree
    standard_error: Tree


def taylor_importance(gate_grads: Tree) -> Tree:
    """Squares the gate gradients of one batch, which gives the first-order importance of each unit.

    This is the squared change of the loss, to first order, when the unit's gate goes from 1 to 0.
    Average it over batches. The mean of the squares is not the square of the mean gradient: with B
    examples per batch the two differ by the variance of the examples' gradients over B.

    Example:
      >>> print(pruning.taylor_importance({"a": jnp.array([-3.0, 0.1])})["a"])
      [9.   0.01]

    Args:
      gate_grads: tree of gradients of the loss with respect to the gates.

    Returns:
      The scores, a tree like `gate_grads`, in float32 at least.

    Raises:
      TypeError: a leaf is not real floating point.

    References:
      P. Molchanov, A. Mallya, S. Tyree, I. Frosio, J. Kautz (2019), arXiv:1906.10771, the
      first-order criterion at gates.
    """
    _checks.floating_tree("gate_grads", gate_grads)
    return jax.tree.map(lambda g: _tree.wide(g) ** 2, gate_grads)


def taylor_importance_second_order(gate_grads: Tree, gate_hessian_diagonal: Tree) -> Tree:
    """Computes the second-order importance of one batch at gates of 1.

        (g - H / 2)^2

    Exact for a loss that is quadratic in each gate.

    Args:
      gate_grads: tree of gradients g of the loss with respect to the gates.
      gate_hessian_diagonal: tree like it, the second derivatives H, as `gate_hessian_diagonal`
        gives them.

    Returns:
      The scores, a tree like `gate_grads`, in float32 at least.

    Raises:
      ValueError: the trees differ.
      TypeError: a leaf is not real floating point.

    References:
      P. Molchanov et al. (2019), arXiv:1906.10771, with the diagonal in place of the row of the
      Hessian, which belongs to the removal of this unit alone.
    """
    _checks.floating_tree("gate_grads", gate_grads)
    _checks.same_tree("gate_hessian_diagonal", gate_hessian_diagonal, gate_grads)
    return jax.tree.map(
        lambda g, h: (_tree.wide(g) - _tree.wide(h) / 2) ** 2, gate_grads, gate_hessian_diagonal
    )


@checked
def taylor_scores(
    gate_loss: LossFn, gates: Tree, *batch: Tree, batch_size: int
) -> TaylorScoresResult:
    """Computes the first-order importance of each unit, as a mean over the batches of a data set.

        E_B[(z g_B)^2]

    Here z is the gate of a unit, and g_B the gradient of the loss on batch B with respect to it.
    All batches count the same; if the loss is a weighted mean, they count by their weights. This
    takes one gradient with respect to the gates per batch, and the memory of one batch. A removed
    unit, whose gate is 0, scores 0.

    Example:
      >>> weights = jnp.array([1.0, 2.0, 0.0])  # with which three units go into the output
      >>> gate_loss = lambda gates, x: jnp.mean(x * jnp.sum(weights * gates))
      >>> batch = jnp.array([1.0, 1.0, 3.0, 3.0])  # two batches of two examples
      >>> print(pruning.taylor_scores(gate_loss, jnp.ones(3), batch, batch_size=2).scores)
      [ 5. 20.  0.]

    Args:
      gate_loss: (gates, *batch) -> scalar, the mean over the examples, from `gated_loss`. The loss
        may couple the examples of a batch.
      gates: tree of gates z, 1 for units that are there and 0 for removed ones.
      *batch: arrays with a leading axis of N examples, which are divided in this order.
      batch_size: number of examples per batch. The scores depend on it, because they are means of
        squares. Examples after the last whole batch are not used.

    Returns:
      A `TaylorScoresResult`.

    Raises:
      ValueError: `gate_loss` is not a scalar, `batch_size` is not between 1 and N, the weight of a
        batch is negative, or the weights of the batches do not add up to that of all examples.
      TypeError: a gate is not real floating point, or `batch_size` not an integer.

    References:
      P. Molchanov et al. (2019), arXiv:1906.10771.
    """
    loss, num_batches = _prepared(gate_loss, gates, batch, batch_size)

    def add(_: None, moments: _Moments, i: jax.Array) -> _Moments:
        return _with_first_order(moments, loss, gates, batch, i, batch_size)

    return _over_batches(add, gates, num_batches)


@checked
def taylor_scores_second_order(
    gate_loss: LossFn, gates: Tree, *batch: Tree, batch_size: int, block_size: int = 16
) -> TaylorScoresResult:
    """Computes the second-order importance of each unit, as a mean over the batches of a data set.

        E_B[(z g_B - z^2 H_B / 2)^2]

    Here z is the gate of a unit, and g_B and H_B are the first and second derivative of the loss on
    batch B with respect to it. The second derivatives are exact, which takes one Hessian product
    per gate and batch.

    Example:
      >>> weights = jnp.array([1.0, 2.0, 0.0])
      >>> gate_loss = lambda gates, x: jnp.mean(x * jnp.sum(weights * gates**2))
      >>> gates, batch = jnp.ones(3), jnp.array([1.0, 1.0, 3.0, 3.0])  # two batches of two examples
      >>> print(pruning.taylor_scores_second_order(gate_loss, gates, batch, batch_size=2).scores)
      [ 5. 20.  0.]

    Args:
      gate_loss: (gates, *batch) -> scalar, the mean over the examples, from `gated_loss`; twice
        differentiable almost everywhere.
      gates: tree of gates z, 1 for units that are there and 0 for removed ones.
      *batch: arrays with a leading axis of N examples, which are divided in this order.
      batch_size: number of examples per batch. Examples after the last whole batch are not used.
      block_size: number of Hessian products at a time.

    Returns:
      A `TaylorScoresResult`.

    Raises:
      ValueError: `gate_loss` is not a scalar, `batch_size` is not between 1 and N, the weight of a
        batch is negative, the weights of the batches do not add up to that of all examples, or
        `block_size` is below 1.
      TypeError: a gate is not real floating point, or a size is not an integer.

    References:
      P. Molchanov et al. (2019), arXiv:1906.10771.
    """
    loss, num_batches = _prepared(gate_loss, gates, batch, batch_size)

    def add(_: None, moments: _Moments, i: jax.Array) -> _Moments:
        part = _part(batch, i, batch_size)
        # A loop of its own over blocks of gates, and so not inside of one program with the rest.
        diagonal = gate_hessian_diagonal(loss, gates, *part, block_size=block_size)
        return _with_second_order(moments, loss, gates, part, diagonal, i)

    return _over_batches(add, gates, num_batches)


def _prepared(
    gate_loss: LossFn, gates: Tree, batch: Batch, batch_size: int
) -> tuple[Program | MeanLoss, int]:
    """The loss of a batch, of weighted means over all weights, and the number of batches."""
    _checks.function("gate_loss", gate_loss)
    _checks.floating_tree("gates", gates)
    length = _checks.num_examples(batch)
    size = _checks.integer("batch_size", batch_size, maximum=(length, "the number of examples"))
    num_batches = length // size
    used = jax.tree.map(lambda leaf: leaf[: num_batches * size], batch)
    one = jax.eval_shape(lambda batch: jax.tree.map(lambda leaf: leaf[:size], batch), used)
    program = _chunks.traced(gate_loss, gates, one, used, name="gate_loss")
    if len(terms(program.outputs(gates, *one))) > 1:
        raise ValueError(
            "`gate_loss` must return one regjax.WeightedMean, got several that add up: a batch has "
            "no weight of its own."
        )
    loss = mean_loss(program)
    if loss is not program:
        weights = Partial(mean_weights, program)
        loss = with_factors(loss, factors_of(weights, gates, used, "gate_loss"))
        check_parts(weights, gates, used, size, "gate_loss")
    return loss, num_batches


def _over_batches(
    add: Callable[[None, _Moments, jax.Array], _Moments], gates: Tree, num_batches: int
) -> TaylorScoresResult:
    zeros = jax.tree.map(lambda gate: jnp.zeros_like(_tree.wide(gate)), gates)
    scores, squares = _loops.scan(add, (zeros, zeros), num_batches)
    # NaN with a single batch: 0 / 0.
    error = jax.tree.map(
        lambda s: jnp.sqrt(s / jnp.asarray((num_batches - 1.0) * num_batches, s.dtype)), squares
    )
    return TaylorScoresResult(scores, error)


# A single program a batch: beside a small network's gradient a second call would show.
@functools.partial(jax.jit, static_argnums=5)
def _with_first_order(
    moments: _Moments,
    gate_loss: Program | MeanLoss,
    gates: Tree,
    batch: Batch,
    i: jax.Array,
    size: int,
) -> _Moments:
    part = _part(batch, i, size)
    scores = taylor_importance(_along(gate_loss, gates, part))
    return _added(moments, _weighted(scores, gate_loss, gates, part), i)


@jax.jit
def _with_second_order(
    moments: _Moments,
    gate_loss: Program | MeanLoss,
    gates: Tree,
    part: Batch,
    diagonal: Tree,
    i: jax.Array,
) -> _Moments:
    curved = jax.tree.map(lambda z, h: _tree.wide(z) ** 2 * h, gates, diagonal)
    scores = taylor_importance_second_order(_along(gate_loss, gates, part), curved)
    return _added(moments, _weighted(scores, gate_loss, gates, part), i)


def _weighted(scores: Tree, gate_loss: Program | MeanLoss, gates: Tree, part: Batch) -> Tree:
    """What a batch adds to the mean of scores, weighted by the weights of the batches.

    With r the weight of the batch over their mean, the loss at hand is r times the batch's own, its
    square r^2 times, and it counts r times: the scores over r.
    """
    if not isinstance(gate_loss, MeanLoss):
        return scores
    (weight,) = mean_weights(gate_loss.loss_fn, gates, *part)
    ratio = weight * gate_loss.factors.values[0]
    return jax.tree.map(lambda leaf: _numerics.divide(leaf, ratio.astype(leaf.dtype)), scores)


def _along(gate_loss: Program | MeanLoss, gates: Tree, part: Batch) -> Tree:
    """Computes the products z g: a removed unit scores 0."""
    grads = jax.grad(gate_loss)(gates, *part)
    return jax.tree.map(lambda z, g: _tree.wide(z) * _tree.wide(g), gates, grads)


@functools.partial(jax.jit, static_argnums=2)
def _part(batch: Batch, i: jax.Array, size: int) -> Batch:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, i * size, size), batch)


def _added(moments: _Moments, values: Tree, i: jax.Array) -> _Moments:
    """Updates mean and sum of squared deviations by one more value, by Welford's rule."""
    mean, squares = moments
    new = jax.tree.map(lambda m, v: m + (v - m) / (i + 1).astype(m.dtype), mean, values)
    squares = jax.tree.map(lambda s, v, old, m: s + (v - old) * (v - m), squares, values, mean, new)
    return new, squares
