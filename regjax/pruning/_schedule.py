"""When how much is removed: pure functions of the step, and an average of the scores of rounds."""

import jax
import jax.numpy as jnp

from regjax import _checks, _tree
from regjax._arguments import checked
from regjax._base import Tree


@checked
def linear_removal(
    step: int | jax.Array, *, every: int, num_each: int, total: int, begin: int = 0
) -> jax.Array:
    """Counts how many units should be removed by `step`, with equal numbers in each round.

        min(total, num_each * floor((step - begin) / every))

    Example:
      >>> options = {"every": 10, "num_each": 5, "total": 12}
      >>> print([int(pruning.linear_removal(step, **options)) for step in (5, 10, 25, 99)])
      [0, 5, 10, 12]

    Args:
      step: number of steps done, a Python integer or an integer array ().
      every: number of steps between two rounds.
      num_each: number of units, or weights, per round.
      total: the most that is removed.
      begin: number of steps before the first interval.

    Returns:
      The number removed so far (), int32.

    Raises:
      ValueError: a number is out of its range.
      TypeError: a number is not an integer.

    References:
      P. Molchanov et al. (2019), arXiv:1906.10771, with 100 units every 30 batches.
    """
    _checks.integer("every", every)
    _checks.integer("num_each", num_each)
    _checks.integer("total", total, minimum=0)
    _checks.integer("begin", begin, minimum=0)
    # More rounds than it takes would change nothing but might overflow.
    rounds = jnp.clip((_count("step", step) - begin) // every, 0, total // num_each + 1)
    return jnp.minimum(rounds * num_each, total)


@checked
def cubic_removal(
    step: int | jax.Array,
    *,
    num_units: int,
    final: float,
    every: int,
    num_rounds: int,
    initial: float = 0.0,
    begin: int = 0,
) -> jax.Array:
    """Counts how many units should be removed by `step`, fast at first and then more slowly.

        s(t) = final + (initial - final) (1 - (t - begin) / (num_rounds every))^3

    is the share that is removed at t = begin, begin + every, ..., begin + num_rounds every. Between
    these steps the share stays, after the last one it is `final`, and before the first one nothing
    is removed.

    Example:
      >>> options = {"num_units": 100, "final": 0.8, "every": 10, "num_rounds": 4}
      >>> print([int(pruning.cubic_removal(step, **options)) for step in (0, 10, 20, 30, 40)])
      [0, 46, 70, 79, 80]

    Args:
      step: number of steps done, a Python integer or an integer array ().
      num_units: number of all units, or of all weights.
      final: share removed in the end, between 0 and 1.
      every: number of steps between two rounds.
      num_rounds: number of rounds after the first one, n in the paper.
      initial: share removed in the first round.
      begin: step of the first round.

    Returns:
      The number removed so far (), int32: s(t) `num_units`, rounded.

    Raises:
      ValueError: a number is out of its range.
      TypeError: a number has the wrong type.

    References:
      M. Zhu, S. Gupta (2017), arXiv:1710.01878, equation 1.
    """
    _checks.integer("num_units", num_units)
    _checks.integer("every", every)
    _checks.integer("num_rounds", num_rounds)
    _checks.integer("begin", begin, minimum=0)
    for name, value in (("final", final), ("initial", initial)):
        _checks.between(name, _checks.number(name, value), 0, 1)
    done = _count("step", step) - begin
    rounds = jnp.clip(done // every, 0, num_rounds).astype(jnp.float32)
    share = final + (initial - final) * (1 - rounds / num_rounds) ** 3
    return jnp.where(done < 0, 0, jnp.round(share * num_units).astype(jnp.int32))


@checked
def num_missing(masks: Tree, num_removed: int | jax.Array) -> jax.Array:
    """Counts how many units are still to be removed, for `mask_lowest`.

    Example:
      >>> print(pruning.num_missing({"a": jnp.array([True, False, True])}, 2))  # one of two is gone
      1

    Args:
      masks: tree of bool arrays, False for what is removed.
      num_removed: number that should be removed by now, from a schedule: an integer or an integer
        array ().

    Returns:
      `num_removed` minus the number of False, at least 0: (), int32.

    Raises:
      ValueError: `num_removed` is negative.
      TypeError: a leaf is not bool, or `num_removed` not an integer.
    """
    _checks.bool_tree("masks", masks)
    num_removed = _count("num_removed", num_removed)
    gone = sum(jnp.sum(~leaf, dtype=jnp.int32) for leaf in jax.tree.leaves(masks))
    return jnp.maximum(num_removed - gone, 0)


def average_scores(previous: Tree | None, scores: Tree, *, decay: float = 0.9) -> Tree:
    """Averages scores over rounds, with less weight for older ones.

        decay previous + (1 - decay) scores

    Example:
      >>> scores = pruning.average_scores(None, {"a": jnp.array([1.0, 2.0])})
      >>> print(pruning.average_scores(scores, {"a": jnp.array([2.0, 2.0])}, decay=0.9)["a"])
      [1.1 2. ]

    Args:
      previous: average so far, a tree like `scores`; None in the first round.
      scores: scores of this round.
      decay: weight of the average so far, in [0, 1).

    Returns:
      The new average; `scores` in the first round.

    Raises:
      ValueError: the trees differ, or `decay` is not in [0, 1).

    References:
      P. Molchanov et al. (2019), arXiv:1906.10771, whose code offers a decay of 0.9.
    """
    if not _checks.number("decay", decay) < 1:
        raise ValueError(f"`decay` must be below 1, got {decay}.")
    _checks.floating_tree("scores", scores)
    if previous is None:
        return scores
    _checks.same_tree("previous", _checks.floating_tree("previous", previous), scores)
    return jax.tree.map(
        lambda old, new: decay * _tree.wide(old) + (1 - decay) * _tree.wide(new),
        previous,
        scores,
    )


def _count(name: str, count: int | jax.Array) -> jax.Array:
    """Returns a number of steps or of units, as an int32 array ()."""
    if not isinstance(count, jax.Array):
        return jnp.asarray(_checks.integer(name, count, minimum=0), jnp.int32)
    if count.shape or not jnp.issubdtype(count.dtype, jnp.integer):
        raise TypeError(f"`{name}` must be one integer, got {count.dtype} of shape {count.shape}.")
    return jnp.asarray(_checks.non_negative(name, count), jnp.int32)
